"""Graded advice: words determine the scores, and `quality` scores texts by them."""

from __future__ import annotations

import numpy as np
import pytest

from fastpref.data.synthetic import graded

ROWS = graded.groups(300, seed=1, noise=0.5)


def test_equal_arguments_give_equal_rows_and_other_seeds_others() -> None:
    assert graded.groups(20, 1) == ROWS[:20]
    assert graded.groups(20, 2) != ROWS[:20]
    assert len({row["prompt"] for row in ROWS}) == 300


def test_scores_are_the_logistic_function_of_quality_and_noise() -> None:
    qualities = np.array([graded.quality(t, 1) for row in ROWS for t in row["completions"]])
    scores = np.array([score for row in ROWS for score in row["scores"]])
    noise = np.log(scores / (1 - scores)) - qualities
    assert abs(noise.mean()) < 0.05
    assert 0.45 < noise.std() < 0.55
    lengths = [len(t.split()) for row in ROWS for t in row["completions"]]
    assert abs(np.corrcoef(lengths, scores)[0, 1]) < 0.1


def test_without_noise_the_better_words_win() -> None:
    for row in graded.groups(50, seed=3, noise=0.0):
        qualities = [graded.quality(text, 3) for text in row["completions"]]
        assert np.argsort(qualities).tolist() == np.argsort(row["scores"]).tolist()


@pytest.mark.parametrize(
    "text",
    [
        "",
        " First, measure the wood.",
        " First, measure the wood carefully",
        " First, measure the wood carefully. And",
        " measure the wood carefully.",
        " First, measure the unicorn carefully.",
        " First, praise the wood carefully.",
    ],
)
def test_what_is_no_recipe_has_no_quality(text: str) -> None:
    assert graded.quality(text) is None
    assert graded.quality(" First, measure the wood carefully.") is not None


def test_the_kinds_agree_with_the_groups() -> None:
    pairs, singles, two = graded.pairs(ROWS), graded.singles(ROWS), graded.top(ROWS, 2)
    for row, pair, both in zip(ROWS, pairs, two, strict=True):
        best, worst = np.argmax(row["scores"]), np.argmin(row["scores"])
        assert pair["chosen"] == both["completions"][0] == row["completions"][best]
        assert pair["rejected"] == both["completions"][1] == row["completions"][worst]
    assert graded.top(ROWS, 4)[0]["scores"] == sorted(ROWS[0]["scores"], reverse=True)
    assert sum(row["label"] for row in singles) * 2 == len(singles) == 2 * len(pairs)


@pytest.mark.parametrize("count", [0, 601])
def test_more_rows_than_prompts_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="count: expected 1 to 600"):
        graded.groups(count)
