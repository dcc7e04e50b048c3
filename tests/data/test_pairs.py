"""Pairs, labeled responses and groups of k from scored completions."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from fastpref.data.formats import TextGroup
from fastpref.data.pairs import Recipe, build_rows
from fastpref.data.scored import LeftOut
from fastpref.utils.errors import UserError


def group(scores: tuple[float, ...], prompt: str = "Q") -> TextGroup:
    return TextGroup(prompt, tuple("abcdef"[: len(scores)]), labels=scores)


def built(group: TextGroup, **options: Any) -> list[dict[str, Any]]:
    rows = build_rows(group, Recipe(**options))
    assert not isinstance(rows, LeftOut), rows
    return [row.record for row in rows]


def reason(group: TextGroup, **options: Any) -> str:
    rows = build_rows(group, Recipe(**options))
    assert isinstance(rows, LeftOut)
    return rows.reason


def pairs(records: list[dict[str, Any]]) -> list[str]:
    return [record["chosen"] + record["rejected"] for record in records]


def test_best_against_worst() -> None:
    assert built(group((2.0, 5.0, 1.0, 4.0)), build="best-worst") == [
        {"prompt": "Q", "chosen": "b", "rejected": "c", "score_chosen": 5.0, "score_rejected": 1.0}
    ]


def test_best_against_each_of_the_worse_ones_equally_often() -> None:
    counts = Counter(
        pairs(built(group((2.0, 5.0, 5.0 - 1e-6, 4.0), prompt=f"Q{i}")))[0] for i in range(3000)
    )
    assert set(counts) == {"ba", "bc", "bd"}
    # Five standard deviations of a binomial with p = 1/3.
    assert all(abs(count - 1000) < 5 * (3000 * 2 / 9) ** 0.5 for count in counts.values())


def test_all_pairs_with_different_scores() -> None:
    assert pairs(built(group((2.0, 3.0, 2.0, 1.0)), build="all-pairs")) == [
        "ad", "ba", "bc", "bd", "cd"
    ]  # fmt: skip


def test_equal_scores_are_in_no_order() -> None:
    for build in ("best-random", "best-worst", "all-pairs", "k-responses", "binary"):
        assert reason(group((1.0, 1.0, 1.0, 1.0)), build=build) == "equal scores"
    tied = [pairs(built(group((3.0, 3.0, 1.0), f"Q{i}")))[0] for i in range(200)]
    assert set(tied) == {"ac", "bc"}  # never a against b


def test_the_smallest_gap() -> None:
    scores = (0.3, 0.1, 0.25)
    assert pairs(built(group(scores), build="all-pairs", min_gap=0.2)) == ["ab"]
    assert pairs(built(group(scores), min_gap=0.2)) == ["ab"]
    for build in ("best-random", "best-worst", "all-pairs", "k-responses", "binary"):
        says = reason(group(scores), build=build, min_gap=0.21, k=3)
        assert says == "score gap below --min-gap"


def test_a_text_is_not_preferred_to_itself() -> None:
    same = TextGroup("Q", ("a", "a", "b"), labels=(3.0, 1.0, 2.0))
    assert pairs(built(same, build="best-worst")) == ["ab"]
    two = TextGroup("Q", ("a", "a"), labels=(3.0, 1.0))
    assert reason(two, build="best-worst") == "the same text with different scores"


@pytest.mark.parametrize("k", [2, 3, 4])
def test_k_responses_are_the_best_and_others_in_the_order_of_the_row(k: int) -> None:
    drawn = set()
    for i in range(100):
        (record,) = built(group((2.0, 5.0, 1.0, 4.0), f"Q{i}"), build="k-responses", k=k)
        assert record["completions"] == sorted(record["completions"])
        assert record["scores"] == [dict(zip("abcd", (2.0, 5.0, 1.0, 4.0), strict=True))[c]
                                    for c in record["completions"]]  # fmt: skip
        assert "b" in record["completions"] and len(record["completions"]) == k
        drawn.add("".join(record["completions"]))
    assert len(drawn) == {2: 3, 3: 3, 4: 1}[k]


def test_fewer_completions_than_k() -> None:
    assert reason(group((1.0, 2.0, 3.0)), build="k-responses", k=4) == "fewer than 4 completions"


def test_binary_is_the_pair_of_best_random_taken_apart() -> None:
    scored = TextGroup("Q", tuple("abcd"), [{"name": "kettle"}], (2.0, 5.0, 1.0, 4.0))
    (pair,) = built(scored)
    shared = {"prompt": "Q", "tools": [{"name": "kettle"}]}
    assert built(scored, build="binary") == [
        {**shared, "completion": "b", "label": True},
        {**shared, "completion": pair["rejected"], "label": False},
    ]


def test_a_draw_depends_neither_on_the_order_of_completions_nor_on_other_rows() -> None:
    scores = dict(zip("abcdef", (1.0, 7.0, 7.0, 2.0, 3.0, 0.0), strict=True))
    expected = {seed: built(group(tuple(scores.values())), seed=seed) for seed in range(20)}
    assert len({str(rows) for rows in expected.values()}) > 5
    for shuffle in range(5):
        order = random.Random(shuffle).sample("abcdef", 6)
        shuffled = TextGroup("Q", tuple(order), labels=tuple(scores[name] for name in order))
        assert {seed: built(shuffled, seed=seed) for seed in range(20)} == expected


def test_the_draws_of_seed_zero() -> None:
    """Data of an earlier version can be built again."""
    assert pairs([built(group((2.0, 5.0, 1.0, 4.0), f"Q{i}"))[0] for i in range(6)]) == [
        "bd", "ba", "bd", "ba", "bc", "bc"
    ]  # fmt: skip


def test_messages_and_text() -> None:
    (record,) = built(group((1.0, 2.0)), form="messages")
    assert record["prompt"] == [{"role": "user", "content": "Q"}]
    assert record["chosen"] == [{"role": "assistant", "content": "b"}]
    said = [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]
    chat = TextGroup([{"role": "user", "content": "Q"}], said, labels=(2.0, 1.0))
    assert built(chat, form="messages") == built(chat) != []
    with pytest.raises(UserError, match="--form: text cannot hold messages with roles; leave it"):
        built(chat, form="text")


def test_a_range_of_scores_becomes_zero_to_one() -> None:
    scored = group((1.0, 10.0, 5.5, 4.0))
    options: dict[str, Any] = {"build": "k-responses", "score_range": (1.0, 10.0)}
    (record,) = built(scored, **options)
    assert record["scores"] == [0.0, 1.0, 0.5, 1 / 3]
    assert reason(scored, min_gap=1.1, **options) == "score gap below --min-gap"
    with pytest.raises(UserError, match="--score-range: got a score of 10; choose a range that"):
        built(scored, build="best-random", score_range=(0.0, 5.0))
