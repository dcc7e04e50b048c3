"""Parts of a prompt in columns of their own are read or refused, never left out silently."""

from __future__ import annotations

from typing import Any

import pytest

from fastpref.config import ConfigError, Data
from fastpref.data.formats import to_groups
from fastpref.data.readers import DataError, rename
from fastpref.data.sft import to_group

USER = {"role": "user", "content": "Name a color."}
BLUE = {"role": "assistant", "content": "Blue."}
SEVEN = {"role": "assistant", "content": "Seven."}
BRIEF = {"role": "system", "content": "Be brief."}
PAIR = {"prompt": [USER], "chosen": [BLUE], "rejected": [SEVEN]}
TEXTS = {"prompt": "Name a color.", "chosen": " Blue.", "rejected": " Seven."}


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (PAIR, "pairwise"),
        ({"chosen": [USER, BLUE], "rejected": [USER, SEVEN]}, "pairwise"),
        ({**PAIR, "prompt": "Name a color."}, "pairwise"),
        ({**PAIR, "prompt": [BRIEF, USER]}, "pairwise"),
        ({"prompt": [USER], "completion": [BLUE], "label": 1}, "pointwise"),
        ({"prompt": [USER], "completions": [[BLUE], [SEVEN]], "scores": [1, 0]}, "groupwise"),
    ],
)
def test_a_system_column_is_the_first_message(row: dict[str, Any], kind: Any, name: str) -> None:
    (group,) = to_groups({**row, name: "Be brief."}, kind)
    assert group.prompt == [BRIEF, USER]


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_conversations_of_sft_begin_with_it(column: str) -> None:
    group = to_group({"system": "Be brief.", column: [USER, BLUE]})
    assert (group.prompt, group.responses) == ([BRIEF, USER], ([BLUE],))


@pytest.mark.parametrize("text", [None, "", "  \n"])
def test_an_empty_one_is_none(text: str | None) -> None:
    assert to_groups({**PAIR, "system": text}) == to_groups(PAIR)
    assert to_groups({**TEXTS, "system": text, "input": text, "history": []}) == to_groups(TEXTS)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({**TEXTS, "system": "Be brief."}, "system has text, for which a prompt of plain text has"),
        ({**PAIR, "prompt": [{**BRIEF, "content": "Shout."}, USER], "system": "Be brief."},
         "system is not the system message that the prompt begins with; remove one of them, or"),
        ({**PAIR, "system": ["Be brief."]}, "system must be text, got a list"),
        ({**TEXTS, "input": "In French."}, "the column input has text that is not in the prompt; "),
        ({**PAIR, "history": [["Hello.", "Hi."]]}, "the column history has text that is not in"),
    ],
)  # fmt: skip
def test_parts_without_a_place_are_refused(row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        to_groups(row)


@pytest.mark.parametrize("name", ["system", "input", "history"])
def test_a_column_that_is_mapped_to_null_is_left_out(name: str) -> None:
    columns = Data(train="x", columns={name: None}).columns
    assert rename({**TEXTS, name: "Be brief."}, columns) == TEXTS


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"chosen": None}, "chosen cannot be left out; name the column that has it"),
        ({"input": "text"}, "input can only be null, to be left out; put its text into prompt"),
    ],
)
def test_mappings_that_make_no_sense(columns: dict[str, str | None], says: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=says):
        Data(train="x", columns=columns)


def test_a_system_message_that_the_user_repeats_is_one_all_the_same() -> None:
    (group,) = to_groups({**PAIR, "system": "color"})
    assert group.prompt == [{"role": "system", "content": "color"}, USER]


def test_parts_that_the_prompt_repeats_are_no_mistake() -> None:
    row = {**TEXTS, "system": "Name a color.", "input": "Name a color."}
    assert to_groups(row) == to_groups(TEXTS)
