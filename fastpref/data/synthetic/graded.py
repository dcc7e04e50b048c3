"""Graded advice: several responses to each prompt, of several lengths, with scores in [0, 1].

A stand-in for human feedback whose truth is known. A response is two to four steps of a recipe,
each a verb, a thing and an adverb; every verb and adverb has a latent utility u ~ N(0, 1), and

    quality = mean utility of the words · √2 + ε,    score = σ(quality),    ε ~ N(0, noise²),

so words decide, lengths do not, and what is learnt from some prompts holds for others up to ε.
The groups serve every kind of objective: as they are, as the pair of the best and the worst, or as
single responses whose label says on which side of the group's middle they lie.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

Row = dict[str, Any]

TASKS = (
    "build a bookshelf", "bake a cake", "plant a tree", "repair a bicycle", "paint a wall",
    "clean a carpet", "train a puppy", "write a letter", "pack a suitcase", "light a fire",
    "sew a shirt", "brew some beer", "grow tomatoes", "wash a car", "plan a party",
    "learn a song", "choose a laptop", "sharpen a knife", "hang a picture", "mend a roof",
    "cook some rice", "draw a map", "catch a fish", "tune a guitar", "start a garden",
    "fold a paper crane", "polish a table", "press some flowers", "knit a scarf", "make a kite",
)  # fmt: skip
CIRCUMSTANCES = (
    "at home", "with children", "in the rain", "without any help", "on a small budget",
    "in an hour", "for the first time", "before winter", "in a small flat", "as a gift",
    "without much noise", "with old tools", "in the evening", "for a friend", "on my own",
    "during a holiday", "after work", "with one hand", "by the sea", "in the dark",
)  # fmt: skip
OPENERS = ("First,", "Next,", "Then,", "Finally,")
VERBS = (
    "measure", "check", "clean", "sort", "heat", "cool", "mark", "trim", "soak", "dry",
    "weigh", "press", "shake", "cover", "open", "turn", "mix", "count", "lift", "test",
)  # fmt: skip
THINGS = (
    "wood", "water", "paper", "soil", "cloth", "metal", "paint", "thread", "stone", "glass",
    "wire", "sand", "rope", "oil", "salt", "wax", "glue", "clay", "leaves", "string",
)  # fmt: skip
ADVERBS = (
    "carefully", "quickly", "slowly", "twice", "gently", "firmly", "evenly", "daily", "outside",
    "quietly", "again", "loosely", "fully", "partly", "early", "late", "alone", "together",
    "briefly", "well",
)  # fmt: skip
RESPONSES = 4
_STEP = re.compile(rf"(?:{'|'.join(OPENERS)}) (\w+) the (?:{'|'.join(THINGS)}) (\w+)\.")


def groups(count: int, seed: int = 0, noise: float = 0.5) -> list[Row]:
    """Rows `prompt, completions[4], scores[4]`; equal arguments, equal rows.

    noise: standard deviation of what the words do not explain, in the units of their utility.
    Raises ValueError for more rows than there are prompts.
    """
    prompts = [
        f"User: How do I {task} {how}?\nAssistant:" for task in TASKS for how in CIRCUMSTANCES
    ]
    if not 0 < count <= len(prompts):
        raise ValueError(f"count: expected 1 to {len(prompts)}, got {count}; lower it")
    rng, utility = random.Random(f"responses {seed}"), _utilities(seed)
    rng.shuffle(prompts)
    return [_group(prompt, rng, utility, noise) for prompt in prompts[:count]]


def _group(prompt: str, rng: random.Random, utility: dict[str, float], noise: float) -> Row:
    completions, scores = [], []
    for _ in range(RESPONSES):
        steps = rng.randint(2, 4)
        words = [(rng.choice(VERBS), rng.choice(THINGS), rng.choice(ADVERBS)) for _ in range(steps)]
        said = (
            f" {opener} {verb} the {thing} {adverb}."
            for opener, (verb, thing, adverb) in zip(OPENERS, words, strict=False)
        )
        felt = [utility[word] for verb, _, adverb in words for word in (verb, adverb)]
        completions.append("".join(said))
        scores.append(round(1 / (1 + math.exp(-_weighed(felt) - noise * rng.gauss(0, 1))), 4))
    return {"prompt": prompt, "completions": completions, "scores": scores}


@cache
def _utilities(seed: int) -> dict[str, float]:
    rng = random.Random(f"utilities {seed}")
    return {word: rng.gauss(0, 1) for word in VERBS + ADVERBS}


def _weighed(felt: list[float]) -> float:
    return math.fsum(felt) / len(felt) * math.sqrt(2)


def pairs(rows: Iterable[Row]) -> list[Row]:
    """The best and the worst response of each group as `prompt, chosen, rejected`, without ties."""
    made = []
    for row in rows:
        ranked = sorted(zip(row["scores"], row["completions"], strict=True))
        (low, rejected), (high, chosen) = ranked[0], ranked[-1]
        if low < high:
            made.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return made


def top(rows: Iterable[Row], count: int) -> list[Row]:
    """The groups with `count` of their responses: the best ones and the worst."""
    made = []
    for row in rows:
        ranked = sorted(zip(row["scores"], row["completions"], strict=True), reverse=True)
        kept = ranked[: count - 1] + ranked[-1:]
        scores, completions = map(list, zip(*kept, strict=True))
        made.append({"prompt": row["prompt"], "completions": completions, "scores": scores})
    return made


def singles(rows: Iterable[Row]) -> list[Row]:
    """The two responses of each pair as `prompt, completion, label`."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs(rows)
        for side in ("chosen", "rejected")
    ]


def quality(text: str, seed: int = 0) -> float | None:
    """The quality of a response without ε, or None unless it is steps from end to end.

    The judge of what a model says after training on `groups(…, seed)`.
    """
    steps = [_STEP.fullmatch(part) for part in re.split(r"(?<=\.) ", text.strip())]
    if not all(steps):
        return None
    utility = _utilities(seed)
    felt = [utility.get(word) for step in steps if step for word in step.groups()]
    return _weighed([u for u in felt if u is not None]) if None not in felt else None
