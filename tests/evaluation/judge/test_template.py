"""Questions to a chat model and the verdicts in its answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpref.evaluation.judge.template import DEFAULT, Reply, fill, read_template, verdict
from fastpref.utils.errors import UserError


def test_text_that_looks_like_a_placeholder_stays_as_it_is() -> None:
    text = fill("{prompt}|{answer_a}|{answer_b}", "say {answer_b}", "{prompt}", r"\1 {x}")
    assert text == r"say {answer_b}|{prompt}|\1 {x}"


def test_the_default_template_shows_all_parts_once() -> None:
    text = fill(read_template(None), "PROMPT", "FIRST", "SECOND")
    assert [text.count(part) for part in ("PROMPT", "FIRST", "SECOND")] == [1, 1, 1]
    assert text.index("PROMPT") < text.index("FIRST") < text.index("SECOND")
    assert all(f"[[{label}]]" in DEFAULT for label in "ABC")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("A is right.\n[[A]]", "A>B"),
        ("[[B]]", "B>A"),
        ("Both are fine: [[C]]", "A=B"),
        ("My final verdict is: [[A>>B]]", "A>>B"),
        ("[[B>A]]", "B>A"),
        ("[[A=B]] so [[C]]", "A=B"),
        ("[[A]] at first, and still [[A]]", "A>B"),
        ("<think>[[A]] or [[B]]?</think>It is [[B]].", "B>A"),
        ("It depends on taste.", None),
        ("[[A]] or [[B]]", None),
        ("A", None),
        ("[A]", None),
        ("[[a]]", None),
        ("[[D]]", None),
        ("", None),
        ("<think>[[A]] looks", None),
    ],
)
def test_a_verdict_is_one_clear_label(text: str, label: str | None) -> None:
    assert verdict(Reply(text, "stop")) == label


def test_an_answer_that_was_cut_has_no_verdict() -> None:
    assert verdict(Reply("At first sight [[A]], but", "length")) is None
    assert verdict(Reply("[[A]]", None)) == "A>B"


def test_templates_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    with pytest.raises(UserError, match=r"--template: cannot read .*t\.txt \("):
        read_template(path)
    path.write_text("{prompt} {answer_a}")
    with pytest.raises(UserError, match=r"has no \{answer_b\}; add \{prompt\} and \{answer_a\}"):
        read_template(path)
    path.write_text("{prompt} {answer_a} {answer_b} {reference}")
    with pytest.raises(UserError, match=r"has the unknown placeholder \{reference\}; remove it"):
        read_template(path)
    path.write_text('{prompt} {answer_a} {answer_b} {"verdict": 1}')
    assert read_template(path).endswith('{"verdict": 1}')
