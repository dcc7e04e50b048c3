"""Training files and rows; rows of any JSON, too."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.bad_input.command import PAST_THE_DATA, Case, Shell
from tests.bad_input.data import CASES, GOOD, TO_THE_DATA

COLUMNS = ("prompt", "chosen", "rejected", "p", "tools", "completion", "label", "completions")
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content"]) | st.text(), inner, max_size=3)
    ),
    max_leaves=4,
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_data_that_is_refused(shell: Shell, case: Case) -> None:
    shell.meet(case)


@pytest.mark.parametrize("loss", GOOD)
def test_any_row(shell: Shell, loss: str) -> None:
    """One with a value that may be anything is trained on, or named with its number."""

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from([*COLUMNS, "scores"]), ANYTHING, max_size=2))
    def holds(change: dict[str, Any]) -> None:
        good = GOOD[loss](2)
        shell.prepare(Case("any", None, {"loss": loss}, [good[0], {**good[1], **change}]))
        outcome = shell(*TO_THE_DATA)
        named = "row 2" in outcome.err or "kto needs responses to at least two" in outcome.err
        outcome.check(Case("any", "*" if named else PAST_THE_DATA))

    holds()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([".jsonl", ".json", ".parquet", ".arrow"]), st.binary(min_size=1))
def test_any_bytes(shell: Shell, ending: str, content: bytes) -> None:
    (shell.folder / f"d{ending}").write_bytes(content)
    shell.prepare(Case("any", None, {"data": {"train": f"d{ending}"}}))
    shell(*TO_THE_DATA).check(Case("any", f"d{ending}*"))


def test_lines_are_numbered_as_an_editor_does(shell: Shell) -> None:
    text = json.dumps(GOOD["dpo"](1)[0]).encode() + b"\n\n\n{oops\n"
    shell.meet(Case("blank lines", "pairs.jsonl, line 4: *", {}, text, arguments=TO_THE_DATA))
