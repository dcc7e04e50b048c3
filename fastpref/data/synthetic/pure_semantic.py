"""Pure semantic preference data set: minimal pairs with known preference probabilities.

The two responses to a prompt share their template and their number of words and differ in one
content word at one position, so neither length nor form nor style can carry the preference; and
each pair stores the probability p that its first response is preferred, so a trained policy can be
scored by how well it matches a distribution instead of by accuracy alone. The construction follows
"A fine-grained analysis of pure semantic preference alignment in large language models", section 3
and appendix A.2, with one change: where p comes from.

The paper draws p independently for every pair, so one pair carries no information about another
and a held-out pair can only be guessed. Here each word w has a latent Bradley–Terry utility
u_w ~ N(0, 1), and

    p = σ(u_A − u_B + ε),   ε ~ N(0, 0.1²) for each row,

so the comparisons of the training split determine those of the test split up to ε.
`generate(independent=True)` draws p as the paper does, uniformly on (0.02, 0.98).

Every row is oriented so that p >= 0.5 belongs to `chosen`: dropping p leaves ordinary hard-label
preference data.
"""

import json
import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TypeVar

from fastpref.utils.atomic_files import replacing

Item = TypeVar("Item")

# Every word is a mass noun, a plural or a name, and no template agrees in number with it, so that
# each template reads naturally with each set and no article is needed.
SETS: dict[str, tuple[str, ...]] = {
    noun: tuple(words.split())
    for noun, words in {
        "drink": "coffee tea milk water juice soda cocoa lemonade cola cider",
        "car brand": "Toyota Honda Ford Tesla Volvo Audi Nissan Mazda Porsche Subaru",
        "football club": "Arsenal Chelsea Liverpool Everton Juventus Ajax Celtic Bayern Dortmund "
        "Benfica",
        "operating system": "Windows Linux Unix Android Ubuntu Debian Fedora Solaris Gentoo "
        "Symbian",
        "pet": "dogs cats rabbits hamsters parrots turtles lizards snakes horses goldfish",
        "city": "London Paris Tokyo Berlin Madrid Rome Vienna Sydney Chicago Toronto",
        "sport": "tennis basketball baseball golf hockey rugby cricket volleyball swimming soccer",
        "fruit": "apples bananas oranges grapes cherries peaches pears mangoes lemons strawberries",
        "color": "blue red green yellow purple orange pink teal gold silver",
        "music genre": "jazz rock pop blues folk soul opera reggae techno disco",
        "school subject": "history geography chemistry physics biology mathematics economics "
        "philosophy literature psychology",
        "foreign language": "Spanish French German Italian Japanese Korean Russian Arabic Greek "
        "Portuguese",
        "programming language": "Python Java Rust Ruby Swift Kotlin Perl Scala Haskell Julia",
        "hobby": "painting gardening cooking fishing hiking photography reading dancing knitting "
        "sailing",
        "material": "wood glass steel paper stone leather cotton silk plastic wool",
    }.items()
}

TEMPLATES: tuple[tuple[str, str], ...] = (
    ("Which {noun} do you like best?", " I like {word} more than all the others."),
    ("What is your favorite {noun}?", " My favorite would have to be {word}, I think."),
    (
        "If you could choose only one {noun}, which one would you choose?",
        " I would always pick {word} over anything else.",
    ),
    (
        "My friends argue about the best {noun}. What do you say?",
        " For me, {word} will always come first.",
    ),
    ("Please recommend one {noun} to me.", " I would go with {word} if I were you."),
)

NOISE = 0.1  # nats of logit; small compared with the spread √2 of u_A − u_B
P_LOW, P_HIGH = 0.02, 0.98
P_DIGITS = 4  # coarse enough that the last bit of a platform's exp, log and cos never shows
P_MIN = 0.5 + 10.0**-P_DIGITS  # an exact tie would leave the orientation undefined


@dataclass(frozen=True)
class Pair:
    """One row: `chosen` is preferred to `rejected` with probability p.

    `set` names the contrast set, and `words` are the content words of (chosen, rejected).
    """

    prompt: str
    chosen: str
    rejected: str
    p: float
    set: str
    words: tuple[str, str]

    @property
    def contrast(self) -> tuple[str, str]:
        """The unordered pair of words, as a sorted tuple."""
        first, second = sorted(self.words)
        return first, second


def generate(seed: int = 0, *, independent: bool = False) -> list[Pair]:
    """Generate all word pairs of every set in every template, verified and shuffled by `seed`.

    p = σ(u_A − u_B + ε), or uniform on (0.02, 0.98) for each row if `independent`; then oriented,
    clipped to at most 0.98 and rounded to four digits. Equal arguments give equal rows on every
    platform and Python version. Raises ValueError if a row is not a minimal pair.
    """
    # Only random() is used: its sequence is the one that Python promises to keep.
    rng = random.Random(f"pairs {seed}")
    utility = _utilities(rng)
    pairs = []
    for noun, words in SETS.items():
        for a, b in combinations(words, 2):
            for question, response in TEMPLATES:
                if independent:
                    p = P_LOW + (P_HIGH - P_LOW) * rng.random()
                else:
                    p = _sigmoid(utility[a] - utility[b] + NOISE * _normal(rng))
                chosen, rejected, p = (a, b, p) if p >= 0.5 else (b, a, 1.0 - p)
                pair = Pair(
                    prompt=f"User: {question.format(noun=noun)}\nAssistant:",
                    chosen=response.format(word=chosen),
                    rejected=response.format(word=rejected),
                    p=round(min(max(p, P_MIN), P_HIGH), P_DIGITS),
                    set=noun,
                    words=(chosen, rejected),
                )
                verify(pair)
                pairs.append(pair)
    return _shuffled(pairs, rng)


def utilities(seed: int = 0) -> dict[str, float]:
    """The latent utility of each word, by which `generate` draws p with the same seed."""
    return _utilities(random.Random(f"pairs {seed}"))


def _utilities(rng: random.Random) -> dict[str, float]:
    return {word: _normal(rng) for words in SETS.values() for word in words}


def verify(pair: Pair) -> None:
    """Raise ValueError unless `pair` is a well-formed, oriented minimal pair.

    The prompt is one user turn that opens the assistant's. The responses start with a space, have
    equally many words and differ in one of them, which is not the first and is the one that
    `pair.words` names. 0.5 < p <= 0.98.
    """

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"pair: expected {what}, got {pair}")

    require(
        pair.prompt.startswith("User: ")
        and pair.prompt.endswith("\nAssistant:")
        and pair.prompt.count("\n") == 1,
        "a prompt 'User: ...\\nAssistant:'",
    )
    # split(" ") keeps empty strings, so that doubled spaces and a missing leading one are seen.
    chosen, rejected = pair.chosen.split(" "), pair.rejected.split(" ")
    require(chosen[0] == rejected[0] == "", "responses that start with a space")
    require("" not in chosen[1:] + rejected[1:], "single spaces between words")
    require(len(chosen) == len(rejected), "responses of equally many words")
    differing = [i for i, (a, b) in enumerate(zip(chosen, rejected, strict=True)) if a != b]
    require(len(differing) == 1, "exactly one differing word")
    slot = differing[0]
    tails = [
        text[slot].removeprefix(word)
        for text, word in zip((chosen, rejected), pair.words, strict=True)
    ]
    require(slot > 1, "a content word that does not open the sentence")
    require(all(word.isascii() and word.isalpha() for word in pair.words), "words of letters only")
    same_tail = tails[0] == tails[1] and tails[0] in ("", ",", ".")
    require(same_tail, "`words` at the differing position")
    require(0.5 < pair.p <= P_HIGH, f"0.5 < p <= {P_HIGH}")


def split(
    pairs: Sequence[Pair], seed: int = 0, test_fraction: float = 0.15
) -> tuple[list[Pair], list[Pair]]:
    """Split into (train, test) with disjoint unordered word pairs; train contains every word.

    In each set ⌊test_fraction · contrasts + ½⌋ contrasts are held out, fewer if another one would
    remove a word's last comparison from train. Rows keep their order. Raises ValueError unless
    0 < test_fraction < 1.
    """
    if not 0.0 < test_fraction < 1.0:
        raise ValueError(
            f"test_fraction: expected a number in (0, 1), got {test_fraction!r}; "
            "0.15 holds out 7 of a set's 45 contrasts"
        )
    # The text makes this stream independent of the one that draws the utilities.
    rng = random.Random(f"split {seed}")
    held_out: list[tuple[str, str]] = []
    for noun in sorted({pair.set for pair in pairs}):
        contrasts = sorted({pair.contrast for pair in pairs if pair.set == noun})
        room = math.floor(test_fraction * len(contrasts) + 0.5)
        left = Counter(word for contrast in contrasts for word in contrast)
        for contrast in _shuffled(contrasts, rng):
            if room and all(left[word] > 1 for word in contrast):
                held_out.append(contrast)
                left.subtract(contrast)
                room -= 1
    test = set(held_out)
    return (
        [pair for pair in pairs if pair.contrast not in test],
        [pair for pair in pairs if pair.contrast in test],
    )


def write(
    directory: str | os.PathLike[str],
    seed: int = 0,
    *,
    independent: bool = False,
    test_fraction: float = 0.15,
) -> tuple[Path, Path]:
    """Write `train.jsonl` and `test.jsonl` into `directory` and return their paths.

    Each line is a UTF-8 JSON object with the fields of `Pair`; equal arguments give equal bytes.
    The directory is created if missing. Each file is written atomically.
    """
    train, test = split(generate(seed, independent=independent), seed, test_fraction)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    return _write_rows(folder / "train.jsonl", train), _write_rows(folder / "test.jsonl", test)


def _write_rows(path: Path, pairs: Iterable[Pair]) -> Path:
    text = "".join(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs)
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())  # bytes, because text mode rewrites "\n" on Windows
    return path


def _normal(rng: random.Random) -> float:
    """Standard normal sample by Box–Muller."""
    radius = math.sqrt(-2.0 * math.log(1.0 - rng.random()))
    return radius * math.cos(2.0 * math.pi * rng.random())


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def _shuffled(items: Iterable[Item], rng: random.Random) -> list[Item]:
    return sorted(items, key=lambda _: rng.random())
