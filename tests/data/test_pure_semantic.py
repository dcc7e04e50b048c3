"""The pure-semantic dataset: minimal, reproducible, split without leaks, and learnable."""

import hashlib
import json
import math
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fastpref.data.synthetic import pure_semantic
from fastpref.data.synthetic.pure_semantic import (
    SETS,
    TEMPLATES,
    Pair,
    generate,
    split,
    verify,
    write,
)

# SHA-256 of the files of seed 0. A change here changes the data of every user.
TRAIN_SHA256 = "094cd6df34be695d850c47c51765b808ccb1614ae7eda75300f1bababcb9ee69"
TEST_SHA256 = "4939a4eb930dde0335df22ddb25ad6da3eabd8cd404753440cbd3517902f8669"
INDEPENDENT_SHA256 = "cdbd24c8b8533b619572446195fdb704c921bb4d73611becbb4af5b86655fe46"


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return generate(0)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def logit(p: float) -> float:
    return math.log(p / (1.0 - p))


# --- the tables ---------------------------------------------------------------------------------


def test_tables_are_well_formed() -> None:
    assert len(SETS) >= 12 and all(len(words) >= 9 for words in SETS.values())
    assert len(TEMPLATES) >= 5
    words = [word.lower() for group in SETS.values() for word in group]
    assert len(words) == len(set(words)), "a word in two sets would tie their utilities together"
    assert all(word.isascii() and word.isalpha() for word in words)


def test_templates_need_no_article_for_the_noun_and_show_no_content_word() -> None:
    for question, response in TEMPLATES:
        assert question.count("{noun}") == 1 and response.count("{word}") == 1
        assert not {"a", "an"} & set(question.lower().split())
        assert "a {word}" not in response and "an {word}" not in response
        for noun, words in SETS.items():
            text_words = set(
                (question.format(noun=noun) + response).replace(",", "").lower().split()
            )
            assert not text_words & {word.lower() for word in words}


# --- the pairs ----------------------------------------------------------------------------------


def test_counts_and_uniqueness(pairs: list[Pair]) -> None:
    expected = sum(math.comb(len(words), 2) for words in SETS.values()) * len(TEMPLATES)
    assert len(pairs) == expected == 3375
    # The unordered responses: the same comparison in the other orientation is a duplicate too.
    assert len({(x.prompt, frozenset((x.chosen, x.rejected))) for x in pairs}) == len(pairs)
    assert set(Counter(x.contrast for x in pairs).values()) == {len(TEMPLATES)}


@pytest.mark.parametrize("independent", [False, True])
def test_p_is_oriented_in_range_and_spread(independent: bool) -> None:
    ps = [x.p for x in generate(0, independent=independent)]
    assert all(0.5 < p <= 0.98 for p in ps)
    # The mean of min(p, 1 - p) is 0.26 for p uniform on (0.02, 0.98), and 0.275 for the sigmoid of
    # a normal of variance 2, with a standard deviation of 0.015 over seeds. Hard labels would give
    # 0.02, coin flips 0.5.
    assert sum(1.0 - p for p in ps) / len(ps) == pytest.approx(0.265, abs=0.03)
    # Nine bins of width 0.05 below 0.95: a flat density on (0.5, 0.98) puts 10 % in each.
    bins = Counter(int((p - 0.5) / 0.05) for p in ps if p < 0.95)
    assert all(bins[i] > 0.05 * len(ps) for i in range(9))
    assert sum(p == 0.98 for p in ps) < 0.03 * len(ps), "clipping must be rare"


@pytest.mark.parametrize(("seed", "independent"), [(2, False), (3, True)])
def test_a_p_that_rounds_to_one_half_is_kept_off_the_tie(seed: int, independent: bool) -> None:
    # These seeds were searched for: each draws a p within 0.00005 of one half.
    assert min(x.p for x in generate(seed, independent=independent)) == 0.5001


def test_orientation_is_that_of_the_utilities_and_not_of_the_tables(pairs: list[Pair]) -> None:
    order = {word: i for words in SETS.values() for i, word in enumerate(words)}
    first_wins = sum(order[x.words[0]] < order[x.words[1]] for x in pairs) / len(pairs)
    # 150 random utilities: the share's standard deviation is about 0.03.
    assert 0.35 < first_wins < 0.65


def fit_utilities(train: list[Pair]) -> dict[str, float]:
    """Least squares for u in logit(p) = u_chosen - u_rejected."""
    index = {word: i for i, word in enumerate(sorted({w for x in train for w in x.words}))}
    design = torch.zeros(len(train), len(index), dtype=torch.float64)
    for row, x in enumerate(train):
        design[row, index[x.words[0]]], design[row, index[x.words[1]]] = 1.0, -1.0
    target = torch.tensor([[logit(x.p)] for x in train], dtype=torch.float64)
    # One constant per set is free, so the design is rank-deficient; gelsd takes the shortest u.
    solution = torch.linalg.lstsq(design, target, driver="gelsd").solution[:, 0]
    return {word: float(solution[i]) for word, i in index.items()}


def excess_loss(test: list[Pair], utility: Mapping[str, float]) -> float:
    """Mean KL(p ‖ p̂) in nats over held-out pairs."""
    total = 0.0
    for x in test:
        q = 1.0 / (1.0 + math.exp(utility[x.words[1]] - utility[x.words[0]]))
        total += x.p * math.log(x.p / q) + (1.0 - x.p) * math.log((1.0 - x.p) / (1.0 - q))
    return total / len(test)


NO_UTILITY: Mapping[str, float] = defaultdict(float)  # predicts 1/2 for every pair


def test_train_predicts_test_unless_p_is_independent() -> None:
    train, test = split(generate(0))
    assert excess_loss(test, NO_UTILITY) > 0.1
    # The noise of 0.1 in the logit costs 0.1²·E[p(1 - p)]/2 ≈ 0.001 nats.
    assert excess_loss(test, fit_utilities(train)) < 0.002
    train, test = split(generate(0, independent=True))
    # Utilities fitted to randomly oriented rows predict almost nothing about other contrasts.
    assert excess_loss(test, fit_utilities(train)) > 0.8 * excess_loss(test, NO_UTILITY)


# --- verification -------------------------------------------------------------------------------

GOOD = Pair(
    prompt="User: Which drink?\nAssistant:",
    chosen=" I favor tea, always.",
    rejected=" I favor milk, always.",
    p=0.7,
    set="drink",
    words=("tea", "milk"),
)

VIOLATIONS: dict[str, dict[str, Any]] = {
    "two words differ": {"rejected": " I love milk, always."},
    "no word differs": {"rejected": GOOD.chosen},
    "one word more": {"rejected": " I favor milk, almost always."},
    "a two-word term": {"rejected": " I favor iced tea, always."},
    "other punctuation": {"rejected": " I favor milk; always."},
    "no punctuation": {"rejected": " I favor milk always."},
    "other final punctuation": {"rejected": " I favor milk, always!"},
    "no leading space": {"chosen": "I favor tea, always.", "rejected": "I favor milk, always."},
    "doubled space": {"chosen": " I  favor tea, always.", "rejected": " I  favor milk, always."},
    "trailing space": {"chosen": GOOD.chosen + " ", "rejected": GOOD.rejected + " "},
    "opens the sentence": {"chosen": " tea always.", "rejected": " milk always."},
    "words swapped": {"words": ("milk", "tea")},
    "words of another pair": {"words": ("cola", "cocoa")},
    "part of the word": {
        "chosen": " I favor cats.",
        "rejected": " I favor dogs.",
        "words": ("cat", "dog"),
    },
    "hyphenated word": {"chosen": " I favor x-tea, always.", "words": ("x-tea", "milk")},
    "empty responses": {"chosen": "", "rejected": ""},
    "prompt without turns": {"prompt": "Which drink?"},
    "prompt without a user": {"prompt": "Which drink?\nAssistant:"},
    "prompt with another turn": {"prompt": "User: Hi\nUser: Which drink?\nAssistant:"},
    "prompt that ends in a space": {"prompt": GOOD.prompt + " "},
    "oriented the wrong way": {"p": 0.3},
    "tie": {"p": 0.5},
    "too certain": {"p": 0.99},
    "not a number": {"p": math.nan},
}


def test_verify_accepts_a_minimal_pair() -> None:
    verify(GOOD)


@pytest.mark.parametrize("changes", VIOLATIONS.values(), ids=VIOLATIONS.keys())
def test_verify_refuses(changes: dict[str, Any]) -> None:
    bad = Pair(**asdict(GOOD) | changes)
    with pytest.raises(ValueError, match="pair: expected"):
        verify(bad)


def test_generate_verifies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETS, "drink", ("coffee", "iced tea"))
    with pytest.raises(ValueError, match="responses of equally many words"):
        generate(0)


# --- the split ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.01, 0.15, 0.5, 0.99])
@pytest.mark.parametrize("seed", [0, 1])
def test_split_shares_no_contrast_and_train_has_every_word(
    pairs: list[Pair], seed: int, fraction: float
) -> None:
    train, test = split(pairs, seed, fraction)
    assert Counter(train) + Counter(test) == Counter(pairs)
    assert not {frozenset(x.words) for x in train} & {frozenset(x.words) for x in test}
    words = {word for group in SETS.values() for word in group}
    assert {word for x in train for word in x.words} == words


def test_split_takes_its_share_from_every_set(pairs: list[Pair]) -> None:
    _, test = split(pairs)
    assert Counter(x.set for x in test) == {noun: 7 * len(TEMPLATES) for noun in SETS}


def test_split_depends_on_seed_but_not_on_row_order_or_p(pairs: list[Pair]) -> None:
    def held_out(rows: list[Pair], seed: int) -> set[tuple[str, str]]:
        return {x.contrast for x in split(rows, seed)[1]}

    assert held_out(pairs, 0) == held_out(pairs[::-1], 0)
    assert held_out(pairs, 0) == held_out(generate(5, independent=True), 0)
    assert held_out(pairs, 0) != held_out(pairs, 1)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 15, math.nan])
def test_split_refuses_a_fraction_outside_the_unit_interval(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"test_fraction: expected a number in \(0, 1\)"):
        split([GOOD], test_fraction=fraction)


# --- the files ----------------------------------------------------------------------------------


def test_files_are_pinned(tmp_path: Path) -> None:
    train, test = write(tmp_path / "made" / "on demand")
    assert (train.name, test.name) == ("train.jsonl", "test.jsonl")
    assert (digest(train), digest(test)) == (TRAIN_SHA256, TEST_SHA256)
    assert sorted(train.parent.iterdir()) == [test, train]
    assert digest(write(tmp_path, independent=True)[0]) == INDEPENDENT_SHA256
    assert digest(write(tmp_path, seed=1)[0]) not in (TRAIN_SHA256, INDEPENDENT_SHA256)


def test_files_do_not_depend_on_hash_randomization(tmp_path: Path) -> None:
    code = f"from fastpref.data.synthetic.pure_semantic import write; write({str(tmp_path)!r})"
    root = Path(pure_semantic.__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=os.environ | {"PYTHONHASHSEED": "7"}, check=True
    )
    assert digest(tmp_path / "train.jsonl") == TRAIN_SHA256
    assert digest(tmp_path / "test.jsonl") == TEST_SHA256


def test_rows_round_trip(tmp_path: Path, pairs: list[Pair]) -> None:
    for path, expected in zip(write(tmp_path), split(pairs), strict=True):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert list(rows[0]) == ["prompt", "chosen", "rejected", "p", "set", "words"]
        assert [Pair(**row | {"words": tuple(row["words"])}) for row in rows] == expected
        assert rows == [asdict(x) | {"words": list(x.words)} for x in expected]


@pytest.mark.parametrize("step", ["write", "rename"])
def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    old = tmp_path / "train.jsonl"
    old.write_text("old\n")

    def write_half(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("disk full")

    def no_rename(source: Path, target: Path) -> None:
        raise OSError("disk full")

    if step == "write":
        monkeypatch.setattr(Path, "write_bytes", write_half)
    else:
        monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == [old] and old.read_text() == "old\n"


# --- tokens -------------------------------------------------------------------------------------


def test_responses_have_equally_many_tokens(pairs: list[Pair]) -> None:
    # At most 2048 entries, the size of a toy tokenizer; training stops at 947, when every word of
    # the text is one token.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (x.prompt + response for x in pairs for response in (x.chosen, x.rejected)), trainer
    )
    words = [word for group in SETS.values() for word in group]
    whole = sum(len(tokenizer.encode(" " + word).ids) == 1 for word in words)
    print(f"{whole} of {len(words)} words are one token of {tokenizer.get_vocab_size()}")
    assert whole == len(words)
    for x in pairs:
        chosen, rejected = (tokenizer.encode(text).ids for text in (x.chosen, x.rejected))
        assert len(chosen) == len(rejected)
        assert sum(a != b for a, b in zip(chosen, rejected, strict=True)) == 1
        # The prompt's tokens are the same with and without the response.
        prompt = tokenizer.encode(x.prompt).ids
        assert tokenizer.encode(x.prompt + x.chosen).ids == prompt + chosen
