"""Messages of data sets: names of roles and fields, and contents that hold text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fastpref.data import bpe
from fastpref.data.formats import to_groups
from fastpref.data.messages import normalized, text_of
from fastpref.data.readers import DataError
from fastpref.data.scored import characters
from fastpref.data.sft import to_group
from tests.helpers.chat_templates import message, scored, template, with_template

TEA, BREAD = message("user", "Tea?"), message("assistant", "Bread, of course.")


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        *[(role, "user") for role in ("user", "User", "USER", " human ", "Human", "prompter")],
        *[(role, "assistant") for role in ("assistant", "Assistant", "gpt", "GPT", "ChatGPT", "ai",
                                           "bot", "model")],
        *[(role, "system") for role in ("system", "System")],
        *[(role, "tool") for role in ("tool", "Tool", "observation", "function_response")],
        ("developer", "developer"),
        ("Critic", "Critic"),  # the template decides
    ],
)  # fmt: skip
def test_roles_have_the_names_of_chat_templates(role: str, expected: str) -> None:
    assert normalized("x", [message(role, "a")]) == [message(expected, "a")]


def test_fields_of_sharegpt_become_role_and_content() -> None:
    conversation = [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "Tea?", "weight": 0},
        {"from": "gpt", "value": "Yes.", "role": None, "content": None},
    ]
    assert normalized("x", conversation) == [
        message("system", "Be kind."),
        message("user", "Tea?", weight=0),
        message("assistant", "Yes."),
    ]
    (pair,) = to_groups({"chosen": conversation, "rejected": [*conversation[:2], BREAD]})
    assert pair.prompt == [message("system", "Be kind."), message("user", "Tea?", weight=0)]
    assert pair.responses == ([message("assistant", "Yes.")], [BREAD])
    assert to_group({"conversations": conversation}).responses == ([message("assistant", "Yes.")],)


@pytest.mark.parametrize("name", ["chatml", "llama3", "phi"])
def test_no_header_of_a_role_is_scored(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    other = with_template(tokenizer, template(name))
    expected = scored(other, {"prompt": [TEA], "chosen": [BREAD], "rejected": [BREAD]})
    for user, assistant in (("human", "gpt"), ("User", "Assistant")):
        row = {
            "prompt": [message(user, "Tea?")],
            "chosen": [message(assistant, "Bread, of course.")],
            "rejected": [{"from": assistant, "value": "Bread, of course."}],
        }
        assert scored(other, row) == expected
        implicit = {
            "chosen": [*row["prompt"], *row["chosen"]],
            "rejected": [*row["prompt"], *row["rejected"]],
        }
        assert implicit["chosen"] != implicit["rejected"]
        assert scored(other, implicit) == expected
        assert scored(other, {"messages": implicit["chosen"]}, sft_on="assistant") == expected[:2]


def test_a_role_that_no_one_knows_is_refused_by_row(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": [TEA], "chosen": [BREAD], "rejected": [message("critic", "Bread, no.")]}
    match = "x, row 7: chat template failed: the role 'critic' is unknown; name it user, assistant"
    with pytest.raises(DataError, match=match):
        scored(tokenizer, row)
    knows_it = str(tokenizer.chat_template) + "{# role == 'critic' #}"
    assert len(scored(with_template(tokenizer, knows_it), row)) == 3


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "Tea"}], "Tea"),
        ([{"type": "text", "text": "Tea"}, {"type": "text", "text": " or not"}], "Tea or not"),
        ([{"type": "input_text", "text": "Te"}, "a"], "Tea"),
        ([{"text": "Tea", "type": None, "image_url": None}], "Tea"),
        ([], ""),
        ("Tea", "Tea"),
    ],
)
def test_parts_of_text_are_kept_in_one_form(content: Any, text: str) -> None:
    (normal,) = normalized("x", [message("user", content)])
    assert text_of(normal["content"]) == text
    if isinstance(content, list):
        assert all(part.keys() == {"type", "text"} for part in normal["content"])
    assert characters([normal]) == len(text)


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "a"}, {"type": "image"}],
        [{"type": "image_url", "image_url": {"url": "a"}}],
        [{"type": "input_audio", "input_audio": {}}],
        [{"type": "text", "text": None}],
        [{"image": "a.png"}],
        [3],
    ],
)
def test_parts_other_than_text_are_refused_by_row(content: Any) -> None:
    match = "chosen has a part .* in its content; only text is trained on, remove the row"
    with pytest.raises(DataError, match=match):
        to_groups({"prompt": [TEA], "chosen": [message("assistant", content)], "rejected": [BREAD]})


def test_content_that_is_no_text_is_refused_but_calls_need_none() -> None:
    with pytest.raises(DataError, match="x has a content that is int; it must be text or a list"):
        normalized("x", [message("user", 3)])
    for empty in (message("user", None), {"role": "user"}):
        with pytest.raises(DataError, match="x has a message of role 'user' without content; give"):
            normalized("x", [empty])
    call = message("assistant", None, tool_calls=[{"function": {"name": "tea"}}])
    assert normalized("x", [call]) == [call]


def test_a_tokenizer_is_trained_on_the_text_of_parts() -> None:
    (pair,) = to_groups({"prompt": [message("user", [{"type": "text", "text": "Tea?"}])],
                         "chosen": [BREAD], "rejected": [BREAD]})  # fmt: skip
    assert list(bpe.texts_of([(1, pair)])) == ["Tea?", "Bread, of course.", "Bread, of course."]


def test_a_list_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    from fastpref.data.readers import read_rows

    path = tmp_path / "d.json"
    path.write_bytes(b'\xef\xbb\xbf [{"prompt": "a", "chosen": "b", "rejected": "c"}]')
    assert list(read_rows(str(path))) == [(1, {"prompt": "a", "chosen": "b", "rejected": "c"})]
