"""Prompts under other names are read or refused: without one, other tokens would be scored."""

from __future__ import annotations

from typing import Any

import pytest

from fastpref.data.formats import to_groups
from fastpref.data.prompt_column import prompt_of
from fastpref.data.readers import DataError

ASKED = [{"from": "human", "value": "Name a color."}]
BLUE = {"from": "gpt", "value": "Blue."}
SEVEN = {"from": "gpt", "value": "Seven."}


@pytest.mark.parametrize("responses", [(BLUE, SEVEN), ([BLUE], [SEVEN])])
def test_conversations_are_the_prompt_of_single_messages(responses: Any) -> None:
    row = {"conversations": ASKED, "chosen": responses[0], "rejected": responses[1]}
    (group,) = to_groups(row)
    assert group.prompt == [{"role": "user", "content": "Name a color."}]
    assert group.responses[0] == [{"role": "assistant", "content": "Blue."}]


@pytest.mark.parametrize("name", ["question", "instruction", "query"])
def test_another_name_of_the_prompt_is_refused(name: str) -> None:
    """As in data sets whose answers begin alike: that beginning would become the prompt."""
    row = {name: "What is 2 + 2?", "chosen": "It is four.", "rejected": "It is five."}
    with pytest.raises(DataError, match=rf"^no prompt, and the column {name} is not in chosen; "):
        to_groups(row)


def test_conversations_before_texts_are_refused() -> None:
    with pytest.raises(DataError, match="the column conversations is not in chosen"):
        to_groups({"conversations": ASKED, "chosen": "Blue.", "rejected": "Seven."})


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Q?", "chosen": "Human: Q?\n\nAssistant: a", "rejected": "x"},
        {"question": " ", "chosen": "a", "rejected": "b"},
        {"question": None, "instruction": 3, "chosen": "a", "rejected": "b"},
        {"conversations": [], "chosen": [BLUE], "rejected": [SEVEN]},
        {"question": "Name a color.", "chosen": [*ASKED, BLUE], "rejected": [*ASKED, SEVEN]},
        {"conversations": [*ASKED], "chosen": [*ASKED, BLUE], "rejected": [*ASKED, SEVEN]},
    ],
)
def test_responses_that_have_their_prompt_need_no_column(row: dict[str, Any]) -> None:
    assert prompt_of(row) is None


def test_the_column_of_its_own_name_comes_first() -> None:
    row = {"prompt": "p", "question": "q", "conversations": ASKED, "chosen": "a", "rejected": "b"}
    assert prompt_of(row) == "p"
