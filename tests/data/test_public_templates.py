"""Ten public chat templates: the text of prompt and response, and the tokens of TRL."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.helpers.chat_templates import NAMES, encoded, message, scored, template, with_template

PROMPT = [
    message("user", "What is tea?"),
    message("assistant", "A drink."),
    message("user", "And bread?"),
]
ROW = {
    "prompt": PROMPT,
    "chosen": [message("assistant", "Bread is food.")],
    "rejected": [message("assistant", "No")],
}
_OSS = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\nCurrent date: 2026-01-31\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    "<|end|><|start|>user<|message|>What is tea?<|end|><|start|>assistant<|channel|>final"
    "<|message|>A drink.<|end|><|start|>user<|message|>And bread?<|end|><|start|>assistant"
)
_CHATML = (
    "<|im_start|>user\nWhat is tea?<|im_end|>\n<|im_start|>assistant\nA drink.<|im_end|>\n"
    "<|im_start|>user\nAnd bread?<|im_end|>\n<|im_start|>assistant\n"
)
# Text of the prompt, and what stands before and behind each response.
EXPECTED = {
    "chatml": (_CHATML, "", "<|im_end|>\n"),
    "command": (
        "<s><|START_OF_TURN_TOKEN|><|USER_TOKEN|>What is tea?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>A drink.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>And bread?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "deepseek_r1": (
        "<s><｜User｜>What is tea?<｜Assistant｜>A drink.<｜end▁of▁sentence｜><｜User｜>And bread?"
        "<｜Assistant｜>",
        "",
        "<｜end▁of▁sentence｜>",
    ),
    "gemma": (
        "<s><start_of_turn>user\nWhat is tea?<end_of_turn>\n<start_of_turn>model\nA drink."
        "<end_of_turn>\n<start_of_turn>user\nAnd bread?<end_of_turn>\n<start_of_turn>model\n",
        "",
        "<end_of_turn>\n",
    ),
    "gpt_oss": (_OSS, "<|channel|>final<|message|>", "<|return|>"),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nWhat is tea?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA drink.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd bread?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "",
        "<|eot_id|>",
    ),
    "mistral": (
        "<s>[INST] What is tea? [/INST] A drink.</s>[INST] And bread? [/INST]",
        " ",
        "</s>",
    ),
    "phi": (
        "<|user|>\nWhat is tea?<|end|>\n<|assistant|>\nA drink.<|end|>\n<|user|>\nAnd bread?"
        "<|end|>\n<|assistant|>\n",
        "",
        "<|end|>\n</s>",
    ),
    "qwen3": (_CHATML, "<think>\n\n</think>\n\n", "<|im_end|>\n"),
    "zephyr": (
        "<|user|>\nWhat is tea?</s>\n<|assistant|>\nA drink.</s>\n<|user|>\nAnd bread?</s>\n"
        "<|assistant|>\n",
        "",
        "</s>\n",
    ),
}


@pytest.fixture(scope="module")
def tokenizers(tokenizer: PreTrainedTokenizerFast) -> dict[str, PreTrainedTokenizerFast]:
    return {name: with_template(tokenizer, template(name)) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_responses_are_the_texts_of_the_template(
    tokenizers: dict[str, PreTrainedTokenizerFast], name: str
) -> None:
    prompt, before, behind = EXPECTED[name]
    responses = (before + text + behind for text in ("Bread is food.", "No"))
    options = {"template_date": "2026-01-31"}
    assert scored(tokenizers[name], ROW, **options) == (prompt, *responses)


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_text_are_written_as_their_text(
    tokenizers: dict[str, PreTrainedTokenizerFast], name: str
) -> None:
    def parts(text: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text[:4]}, {"type": "text", "text": text[4:]}]

    row = {
        column: [{**m, "content": parts(m["content"])} for m in messages]
        for column, messages in ROW.items()
    }
    assert encoded(tokenizers[name], row) == encoded(tokenizers[name], ROW)


@pytest.mark.parametrize("sft_on", ["completion", "assistant"])
@pytest.mark.parametrize("name", sorted({*NAMES} - {"deepseek_r1"}))
def test_sft_trains_on_the_same_text(
    tokenizers: dict[str, PreTrainedTokenizerFast], name: str, sft_on: str
) -> None:
    """The generation prompt of DeepSeek-R1 begins with <think>, which its answers lack."""
    prompt, before, behind = EXPECTED[name]
    question = prompt.partition("?")[0] + prompt[prompt.rindex("?") :]
    chat = {"messages": [PROMPT[0], *ROW["chosen"]]}
    texts = scored(tokenizers[name], chat, sft_on=sft_on, template_date="2026-01-31")
    assert texts == (question, before + "Bread is food." + behind)


def test_thinking_is_a_variable_of_the_config_and_of_a_row(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    qwen = tokenizers["qwen3"]
    empty = "<think>\n\n</think>\n\n"
    with_it = (_CHATML, empty + "Bread is food.<|im_end|>\n", empty + "No<|im_end|>\n")
    without = (_CHATML + empty, "Bread is food.<|im_end|>\n", "No<|im_end|>\n")
    off = {"enable_thinking": False}
    assert scored(qwen, ROW) == with_it
    assert scored(qwen, ROW, chat_template_kwargs=off) == without
    assert scored(qwen, {**ROW, "chat_template_kwargs": off}) == without
    assert scored(qwen, {**ROW, "chat_template_kwargs": '{"enable_thinking": false}'}) == without
    both = {**ROW, "chat_template_kwargs": {"enable_thinking": True}}
    assert scored(qwen, both, chat_template_kwargs=off) == with_it
    null = {**ROW, "chat_template_kwargs": {"enable_thinking": None}}
    assert scored(qwen, null, chat_template_kwargs=off) == without


def test_reasoning_in_a_field_or_in_the_text_is_scored(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    expected = (
        _CHATML,
        "<think>\nwinter\n</think>\n\nBread<|im_end|>\n",
        "<think>\nsummer\n</think>\n\nNo<|im_end|>\n",
    )
    field = {
        "prompt": PROMPT,
        "chosen": [message("assistant", "Bread", reasoning_content="winter")],
        "rejected": [message("assistant", "No", reasoning="summer")],
    }
    text = {
        "prompt": PROMPT,
        "chosen": [message("assistant", "<think>winter</think>Bread")],
        "rejected": [message("assistant", "<think>\nsummer\n</think>\n\nNo")],
    }
    assert scored(tokenizers["qwen3"], field) == scored(tokenizers["qwen3"], text) == expected


def test_the_tokens_are_those_of_trl(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    for name, tokenizer in tokenizers.items():
        trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
        arguments = SimpleNamespace(dataset_num_proc=None, max_length=512,
                                    truncation_mode="keep_start")  # fmt: skip
        rows = datasets.Dataset.from_list([ROW]).to_iterable_dataset()
        (theirs,) = trl.DPOTrainer._prepare_dataset(trainer, rows, tokenizer, arguments, "train")
        expected = (theirs["prompt_ids"], [theirs["chosen_ids"], theirs["rejected_ids"]])
        assert encoded(tokenizer, ROW)[:2] == expected, name
