"""Scored completions of every layout, and the reasons for which some are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastpref.data.formats import TextGroup
from fastpref.data.readers import DataError
from fastpref.data.scored import LeftOut, ScoredFile, characters
from fastpref.utils.errors import UserError
from tests.helpers.data import write_jsonl
from tests.helpers.scored import completion, ultrafeedback

USER = [{"role": "user", "content": "Tea or coffee?"}]
TEA, COFFEE = ([{"role": "assistant", "content": text}] for text in ("Tea.", "Coffee"))
GROUP = {"prompt": "Q", "completions": ["a", "b"], "scores": [1, 0]}


def read(
    folder: Path, rows: list[dict[str, Any]], *arguments: Any, **options: Any
) -> list[TextGroup | LeftOut]:
    return list(ScoredFile(str(write_jsonl(folder / "s.jsonl", rows)), *arguments, **options))


def one(folder: Path, row: dict[str, Any], *arguments: Any) -> TextGroup | LeftOut:
    (group,) = read(folder, [row], *arguments)
    return group


def reason(group: TextGroup | LeftOut) -> str:
    assert isinstance(group, LeftOut), group
    return group.reason


@pytest.mark.parametrize(
    ("score", "expected"),
    [(None, (8.0, 6.5)), ("overall", (8.0, 6.5)), ("mean", (3.75, 4.0))],
)
def test_ultrafeedback_has_two_scores(tmp_path: Path, score: Any, expected: Any) -> None:
    row = ultrafeedback("Q", completion("a", 8.0, (3, 4, 5, 3)), completion("b", 6.5, 4))
    assert one(tmp_path, row, score) == TextGroup("Q", ("a", "b"), labels=expected)


@pytest.mark.parametrize(
    ("score", "second", "says"),
    [
        ("mean", completion("b", 5, (4, "N/A", 4, 4)), "a rating is N/A"),
        ("overall", completion("b", None, 4), "a completion without a score"),
        ("overall", completion("b", "N/A", 4), "a completion without a score"),
        ("overall", completion("b", float("nan"), 4), "a completion without a score"),
        ("mean", {"response": "b", "overall_score": 5}, "a completion without a score"),
        ("mean", {**completion("b", 5, 4), "annotations": {}, "fine-grained_score": None},
         "a completion without a score"),
        ("overall", completion(" \n", 5, 4), "an empty completion"),
        ("overall", {"overall_score": 5}, "an empty completion"),
        ("overall", completion("half \ud800", 5, 4), "text that is not valid Unicode"),
    ],
)  # fmt: skip
def test_a_row_that_is_left_out(tmp_path: Path, score: str, second: Any, says: str) -> None:
    row = ultrafeedback("Q", completion("a", 8, 5), second)
    assert reason(one(tmp_path, row, score)) == says


def test_a_row_with_one_completion_is_left_out(tmp_path: Path) -> None:
    row = ultrafeedback("Q", completion("a", 8, 5))
    assert reason(one(tmp_path, row)) == "fewer than two completions"


@pytest.mark.parametrize(("ratings", "used"), [(1, False), (2, False), ((2, 2, 2, 3), True)])
def test_an_overall_score_of_ten_for_a_bad_response_is_the_error_of_the_first_release(
    tmp_path: Path, ratings: Any, used: bool
) -> None:
    row = ultrafeedback("Q", completion("bad", 10, ratings), completion("good", 8, 5))
    group = one(tmp_path, row, "overall")
    if used:
        assert isinstance(group, TextGroup) and group.labels == (10.0, 8.0)
    else:
        assert reason(group) == "overall score 10 with a mean rating of at most 2"
    assert isinstance(one(tmp_path, row, "mean"), TextGroup)


def test_without_annotations_the_mean_is_the_fine_grained_score(tmp_path: Path) -> None:
    first, second = completion("a", 1, 1), completion("b", 1, 1)
    for each, value in ((first, 4.25), (second, 2.5)):
        del each["annotations"]
        each["fine-grained_score"] = value
    group = one(tmp_path, ultrafeedback("Q", first, second), "mean")
    assert isinstance(group, TextGroup) and group.labels == (4.25, 2.5)


def test_groups_of_the_trainer(tmp_path: Path) -> None:
    row = {"prompt": USER, "completions": [TEA, COFFEE], "scores": [1, "0.5"], "tools": [{"a": 1}]}
    assert one(tmp_path, row) == TextGroup(USER, (TEA, COFFEE), [{"a": 1}], (1.0, 0.5))
    assert reason(one(tmp_path, {**GROUP, "scores": [1, None]})) == "a completion without a score"
    assert reason(one(tmp_path, {**GROUP, "completions": ["", "b"]})) == "an empty completion"


def test_single_completions_of_a_prompt_are_a_group(tmp_path: Path) -> None:
    rows = [
        {"prompt": prompt, "response": text, "helpfulness": score}
        for prompt, text, score in (("P", "a", 3), ("P", "b", 4), ("Q", "c", 1), ("Q", "d", 0))
    ]
    assert read(tmp_path, rows, "helpfulness") == [
        TextGroup("P", ("a", "b"), labels=(3.0, 4.0)),
        TextGroup("Q", ("c", "d"), labels=(1.0, 0.0)),
    ]


def test_a_prompt_that_comes_back_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": p, "completion": "a", "score": 1} for p in "PPQP"]
    with pytest.raises(DataError, match=r"row 4: the prompt of row 1 again, after others; sort"):
        read(tmp_path, rows)


def test_the_column_of_the_score_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 1: no column score; columns found: prompt, completio"):
        read(tmp_path, [{"prompt": "P", "completion": "a", "reward": 1}])


def test_pairs_have_a_winner(tmp_path: Path) -> None:
    row = {"chosen": "Q: tea", "rejected": "Q: coffee"}
    expected = TextGroup("Q:", (" tea", " coffee"), labels=(1.0, 0.0))
    assert one(tmp_path, row) == expected
    assert one(tmp_path, {**row, "p": 0.25}) == expected._replace(labels=(0.25, 0.75))
    assert reason(one(tmp_path, {"prompt": "Q", "chosen": "a", "rejected": ""})) == (
        "an empty completion"
    )


def test_excluded_rows(tmp_path: Path) -> None:
    two = (completion("a", 8, 5), completion("b", 7, 5))
    rows = [ultrafeedback("P", *two, source="truthful_qa"), ultrafeedback("Q", *two)]
    first, second = read(tmp_path, rows, exclude=[("source", "truthful_qa")])
    assert reason(first) == "source=truthful_qa" and isinstance(second, TextGroup)
    with pytest.raises(UserError, match=r"--exclude: .* has no column sorce; use one of source, "):
        read(tmp_path, rows, exclude=[("sorce", "truthful_qa")])


@pytest.mark.parametrize(
    ("row", "score", "says"),
    [
        (GROUP, "mean", "--score: there is no choice for rows of groups, got mean; leave it out"),
        ({"chosen": "a b", "rejected": "a c"}, "mean", "--score: there is no choice for rows of"),
        (ultrafeedback("Q"), "best", "--score: must be overall or mean for UltraFeedback, got b"),
        ({"prompt": "Q"}, None, "row 1: no completions with scores; columns found: prompt; accept"),
        ({"instruction": "Q", "completions": ["a"]}, None, "completions must be a list of objects"),
        ({**GROUP, "scores": [1, [2]]}, None, r"row 1: a score must be a number, got \[2\]"),
        ({**GROUP, "scores": 1}, None, "row 1: scores must be a list, got int"),
        ({**GROUP, "scores": [1]}, None, "completions and scores must be lists of the same length"),
        (ultrafeedback("Q", {**completion("a", 1, 1), "annotations": [1]}, completion("b", 1, 1)),
         "mean", "annotations must be an object, got a list"),
    ],
)  # fmt: skip
def test_what_is_no_scored_completion_is_refused(
    tmp_path: Path, row: dict[str, Any], score: str | None, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        one(tmp_path, row, score)


def test_a_file_without_rows(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no rows; use data with at least one prompt"):
        ScoredFile(str(tmp_path / "e.jsonl"))


def test_characters() -> None:
    assert characters("four") == 4
    assert characters([*TEA, {"role": "tool", "content": None}]) == 4
