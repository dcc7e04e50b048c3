"""What is scored of a conversation: the text of the responses, and no header, whatever a template
does with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fastpref.config import Data
from fastpref.data.dataset import load_groups
from fastpref.data.prompts import read_prompts
from fastpref.data.readers import DataError
from tests.helpers.chat_templates import encoded, message, scored, with_template
from tests.helpers.data import write_jsonl

TURNS = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<E>' }}{% endfor %}"
BEGIN = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
PLAIN = TURNS + BEGIN
USER, SYSTEM = message("user", "Which tea?"), message("system", "Be kind.")
CHOSEN, REJECTED = message("assistant", "Black tea, of course."), message("assistant", "e")
PAIR = {"prompt": [USER], "chosen": [CHOSEN], "rejected": [REJECTED]}
WITH_SYSTEM = {**PAIR, "prompt": [SYSTEM, USER]}
THOUGHT = {
    **PAIR,
    "chosen": [message("assistant", "<think>winter</think>Black tea, of course.")],
}
# Mistral's third: the system message is in the last turn, if that is the user's.
IN_LAST_TURN = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' }}"
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{{ m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ m.content + '</s>' }}{% endif %}"
    "{% endfor %}"
)
AFTER_THOUGHT = TURNS.replace("m.content", "m.content.split('</think>')[-1]") + BEGIN
ONLY_USERS = PLAIN.replace("m.content", "(m.content if m.role == 'user' else '')")


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        (AFTER_THOUGHT, THOUGHT, "lost_text"),
        (ONLY_USERS, PAIR, "lost_text"),
        (PLAIN.replace("m.content", "m.content|upper"), PAIR, "lost_text"),
        (PLAIN.replace("m.role + '|>' + m.content", "m.role + '|>'"), PAIR, "lost_text"),
        # The answer is there, but not the question.
        (PLAIN.replace("m.content", "(m.content if m.role != 'user' else '')"), PAIR, "lost_text"),
        # A short answer that is in the words of the template alone.
        (ONLY_USERS, {**PAIR, "chosen": [REJECTED]}, "lost_text"),
        (IN_LAST_TURN, WITH_SYSTEM, "other_prompt"),
        ("{{ messages|length }}" + PLAIN, PAIR, "other_prompt"),
    ],
)
def test_a_row_whose_text_is_not_scored_is_dropped_counted_and_named(
    tokenizer: PreTrainedTokenizerFast, template: str, row: dict[str, Any], reason: str
) -> None:
    prompt, responses, counts = encoded(with_template(tokenizer, template), row)
    assert (prompt, responses) == ([], [])
    assert counts == {"found": 1, reason: 1, f"{reason}_row": 7}


@pytest.mark.parametrize(
    ("template", "row", "prompt", "chosen"),
    [
        (PLAIN, PAIR, "<|user|>Which tea?<E><|assistant|>", "Black tea, of course.<E>"),
        # No generation prompt: the header is not scored.
        (TURNS, PAIR, "<|user|>Which tea?<E><|assistant|>", "Black tea, of course.<E>"),
        # A header other than the generation prompt's.
        (TURNS.replace("m.role", "m.role|capitalize") + BEGIN, PAIR,
         "<|User|>Which tea?<E><|Assistant|>", "Black tea, of course.<E>"),
        # A generation prompt with more than the answer has.
        (PLAIN.replace("'<|assistant|>'", "'<|assistant|><think>'"), PAIR,
         "<|user|>Which tea?<E><|assistant|>", "Black tea, of course.<E>"),
        (PLAIN.replace("'<|assistant|>'", "'<|assistant|><think>'"), THOUGHT,
         "<|user|>Which tea?<E><|assistant|>", "<think>winter</think>Black tea, of course.<E>"),
        # A default system text, and stripped white space.
        ("Be kind.\n" + PLAIN, PAIR, "Be kind.\n<|user|>Which tea?<E><|assistant|>",
         "Black tea, of course.<E>"),
        (PLAIN.replace("m.content", "m.content|trim"),
         {**PAIR, "chosen": [message("assistant", "\n Black tea, of course. \n")]},
         "<|user|>Which tea?<E><|assistant|>", "Black tea, of course.<E>"),
        (IN_LAST_TURN, PAIR, "[INST]Which tea?[/INST]", "Black tea, of course.</s>"),
        (AFTER_THOUGHT, PAIR, "<|user|>Which tea?<E><|assistant|>", "Black tea, of course.<E>"),
    ],
)  # fmt: skip
def test_a_response_begins_behind_its_header(
    tokenizer: PreTrainedTokenizerFast, template: str, row: dict[str, Any], prompt: str, chosen: str
) -> None:
    texts = scored(with_template(tokenizer, template), row)
    assert texts[:2] == (prompt, chosen)
    assert texts[2] in ("e<E>", "e</s>")


def test_the_header_of_a_template_without_a_generation_prompt_is_in_prompts_to_sample(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    other = with_template(tokenizer, TURNS)
    path = write_jsonl(tmp_path / "d.jsonl", [PAIR])
    (prompt,) = read_prompts(str(path), other)
    assert other.decode(prompt.ids) == "<|user|>Which tea?<E><|assistant|>"
    path = write_jsonl(tmp_path / "e.jsonl", [PAIR])
    match = "e.jsonl, row 1: the chat template does not write the text of the prompt; use a model"
    with pytest.raises(DataError, match=match):
        read_prompts(str(path), with_template(tokenizer, TURNS.replace("m.content", "''")))


@pytest.mark.parametrize("sft_on", ["completion", "assistant", "all"])
def test_sft_drops_the_same_rows(tokenizer: PreTrainedTokenizerFast, sft_on: str) -> None:
    row = {"messages": [USER, *THOUGHT["chosen"]]}
    _, _, counts = encoded(with_template(tokenizer, AFTER_THOUGHT), row, sft_on=sft_on)
    assert counts == {"found": 1, "lost_text": 1, "lost_text_row": 7}


def test_sft_trains_on_no_header(tokenizer: PreTrainedTokenizerFast) -> None:
    other = with_template(tokenizer, TURNS)
    row = {"messages": [USER, REJECTED, USER, CHOSEN]}
    texts = scored(other, row)
    assert texts[1] == "Black tea, of course.<E>"
    config = Data(train="x", sft_on="assistant")
    from fastpref.data.chat_template import ChatTemplate
    from fastpref.data.sft import to_group

    beginning, whole, end, again = ChatTemplate(other, config).render(to_group(row, "assistant"))
    assert beginning == "<|user|>Which tea?<E><|assistant|>"
    assert end == beginning + "e<E>" and whole == again + "Black tea, of course.<E>"


def test_calls_that_a_template_leaves_out_drop_the_row(tokenizer: PreTrainedTokenizerFast) -> None:
    call = message("assistant", "", tool_calls=[{"function": {"name": "brew", "arguments": {}}}])
    row = {**PAIR, "chosen": [call]}
    assert encoded(with_template(tokenizer, PLAIN), row)[2]["lost_text"] == 1
    writes_them = PLAIN.replace("m.content", "m.content + (m.tool_calls or []) | string")
    assert "brew" in scored(with_template(tokenizer, writes_them), row)[1]


def test_the_summary_names_rows_and_what_a_template_leaves_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    reasoning = {**PAIR, "chosen": [{**CHOSEN, "reasoning_content": "winter"}]}
    rows = [PAIR, THOUGHT, WITH_SYSTEM, reasoning, THOUGHT]
    config = Data(train=str(write_jsonl(tmp_path / "d.jsonl", rows)), cache=str(tmp_path / "c"))
    template = AFTER_THOUGHT.replace("{% for m in", "{% for m in messages if m.role != 'system' %}"
                                     "{% set x = 1 %}{% endfor %}{% for m in", 1)  # fmt: skip
    template = template.replace("in messages %}", "in messages if m.role != 'system' %}")
    dataset = load_groups(config.train, with_template(tokenizer, template), config)
    assert dataset.summary() == (
        f"3 of 5 pairs from {config.train}; dropped 2 (no completion left: 0; the chat template "
        "leaves out their text: 2, the first in row 2); cut to max_length: 0 chosen, 0 rejected, 0 "
        "prompts; the chat template leaves out the system message of 1, the first in row 3; the "
        "chat template leaves out the reasoning of 1, the first in row 4"
    )
    only = Data(train=str(write_jsonl(tmp_path / "e.jsonl", [THOUGHT])), cache=str(tmp_path / "c"))
    match = r"no pair is left to train on \(.*\); use another template in data.chat_template, or"
    with pytest.raises(DataError, match=match):
        load_groups(only.train, with_template(tokenizer, template), only)


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"prompt": "tea", "chosen": "", "rejected": "bread"}, "give the rows text"),
        ({"prompt": "tea " * 90, "chosen": "a", "rejected": "b"}, "raise data.max_length or look"),
    ],
)
def test_no_row_left_blames_what_is_wrong(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], remedy: str
) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [row])
    config = Data(train=str(path), cache=str(tmp_path / "c"), add_eos=False, max_length=32)
    with pytest.raises(DataError, match=rf"no pair is left to train on \(.*\); {remedy}"):
        load_groups(config.train, tokenizer, config)


def test_templates_that_read_lists_alone_get_lists(tokenizer: PreTrainedTokenizerFast) -> None:
    lists = with_template(tokenizer, PLAIN.replace("m.content", "m.content[0]['text']"))
    assert scored(lists, PAIR) == scored(with_template(tokenizer, PLAIN), PAIR)
    both = PLAIN.replace(
        "m.content", "(m.content if m.content is string else m.content|map(attribute='text')|join)"
    )
    parts = [{"type": "text", "text": "Black tea, "}, {"type": "text", "text": "of course."}]
    row = {**PAIR, "chosen": [message("assistant", parts)]}
    assert scored(with_template(tokenizer, both), row) == scored(
        with_template(tokenizer, PLAIN), PAIR
    )
    # A template that joins parts by itself does so.
    commas = with_template(tokenizer, both.replace("join", "join('\n')"))
    assert scored(commas, row)[1] == "Black tea, \nof course.<E>"
