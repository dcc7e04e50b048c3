"""Rows for supervised fine-tuning: formats, the tokens that are trained on, and refusals."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fastpref import losses
from fastpref.config import Data
from fastpref.data.collate import collate
from fastpref.data.dataset import GroupDataset, load_groups
from fastpref.data.formats import SftOn
from fastpref.data.readers import DataError
from fastpref.data.sft import row_kind, to_group
from tests.helpers.data import rows, write_jsonl

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "tea?"}
YES = {"role": "assistant", "content": "tea"}
THEN = {"role": "user", "content": "bread?"}
NO = {"role": "assistant", "content": "cheese"}
CHAT = [SYSTEM, USER, YES, THEN, NO]
PROMPT = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\ntea?<|im_end|>\n"
BEGIN, AGAIN = "<|im_start|>assistant\n", "<|im_start|>user\nbread?<|im_end|>\n"


def load(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    records: list[dict[str, Any]],
    **options: Any,
) -> GroupDataset:
    path = write_jsonl(tmp_path / "d.jsonl", records)
    data = Data(train=str(path), cache=str(tmp_path / "cache"), **options)
    assert row_kind(losses.build("sft"), data) == "sft"
    return load_groups(data.train, tokenizer, data, "sft")


def parts(
    dataset: GroupDataset, tokenizer: PreTrainedTokenizerFast, index: int = 0
) -> tuple[str, list[tuple[bool, str]]]:
    """The prompt, and the response in parts that are trained on or are not."""
    group = dataset[index]
    (response,) = group.responses
    mask = np.ones(len(response), dtype=bool) if group.mask is None else group.mask
    pieces, first = [], 0
    for is_scored, run in groupby(mask.tolist()):
        last = first + len(list(run))
        pieces.append((is_scored, tokenizer.decode(response[first:last])))
        first = last
    return tokenizer.decode(group.prompt), pieces


@pytest.mark.parametrize(
    ("sft_on", "prompt", "pieces"),
    [
        (
            "completion",
            f"{PROMPT}{BEGIN}tea<|im_end|>\n{AGAIN}{BEGIN}",
            [(True, "cheese<|im_end|>\n")],
        ),
        (
            "assistant",
            f"{PROMPT}{BEGIN}",
            [
                (True, "tea<|im_end|>\n"),
                (False, f"{AGAIN}{BEGIN}"),
                (True, "cheese<|im_end|>\n"),
            ],
        ),
        (
            "all",
            "<|im_start|>",
            [
                (
                    True,
                    f"{PROMPT[12:]}{BEGIN}tea<|im_end|>\n{AGAIN}{BEGIN}cheese<|im_end|>\n",
                )
            ],
        ),
    ],
)
@pytest.mark.parametrize("columns", ["messages", "prompt and completion"])
def test_tokens_of_a_conversation(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    sft_on: SftOn,
    prompt: str,
    pieces: list[tuple[bool, str]],
    columns: str,
) -> None:
    row: dict[str, Any] = {"messages": CHAT, "prompt": "ignored"}
    if columns != "messages":
        row = {"prompt": CHAT[:4], "completion": CHAT[4:]}
    dataset = load(tmp_path, tokenizer, [row], sft_on=sft_on)
    assert parts(dataset, tokenizer) == (prompt, pieces)


def test_a_completion_of_several_messages_is_trained_on_as_a_whole(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    row = {"prompt": CHAT[:2], "completion": CHAT[2:]}
    whole = load(tmp_path, tokenizer, [row])
    response = f"tea<|im_end|>\n{AGAIN}{BEGIN}cheese<|im_end|>\n"
    assert parts(whole, tokenizer) == (f"{PROMPT}{BEGIN}", [(True, response)])


def test_messages_after_the_last_assistant_message_are_left_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for sft_on in ("completion", "assistant"):
        records = [{"messages": CHAT}, {"messages": [*CHAT, USER]}]
        dataset = load(tmp_path, tokenizer, records, sft_on=sft_on)
        assert parts(dataset, tokenizer, 0) == parts(dataset, tokenizer, 1)


def test_text_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    records = [{"prompt": "User: tea?\nAssistant:", "completion": " tea"}]
    dataset = load(tmp_path, tokenizer, records)
    assert parts(dataset, tokenizer) == ("User: tea?\nAssistant:", [(True, " tea</s>")])
    group = load(tmp_path, tokenizer, records, sft_on="all")[0]
    whole = tokenizer("User: tea?\nAssistant: tea")["input_ids"]
    assert group.prompt.tolist() == whole[:1]
    assert group.responses[0].tolist() == [*whole[1:], tokenizer.eos_token_id]


def test_only_scored_tokens_are_labels(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """In every layout: labels, the positions that predict them, and lengths."""
    records = [{"messages": CHAT}, {"messages": CHAT[1:3]}]
    dataset = load(tmp_path, tokenizer, records, sft_on="assistant")
    groups = [dataset[0], dataset[1]]
    expected = [
        token
        for group in groups
        for token, scored in zip(group.responses[0].tolist(), group.mask.tolist(), strict=True)
        if scored
    ]
    counts = [int(group.mask.sum()) for group in groups]
    for layout in ("padded", "packed", "prefix_shared"):
        batch = collate(groups, "pointwise", layout)
        assert batch.labels.tolist() == expected
        assert batch.lengths.tolist() == counts
        assert batch.cu_seqlens.tolist() == [0, counts[0], sum(counts)]
        assert batch.input_ids.flatten()[batch.label_positions].tolist() == expected
        assert torch.equal(batch.predictor_positions, batch.label_positions - 1)
        assert batch.targets is not None and batch.targets.tolist() == [1.0, 1.0]


def test_a_mask_is_cut_with_its_response(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    full = load(tmp_path, tokenizer, [{"messages": CHAT}], sft_on="assistant")[0]
    room = int(full.mask.argmin()) + 2  # two tokens behind the first assistant message
    length = len(full.prompt) + room
    cut = load(tmp_path, tokenizer, [{"messages": CHAT}], sft_on="assistant", max_length=length)
    assert cut[0].mask.tolist() == [*[True] * (room - 2), False, False]
    assert cut.counts["responses_cut"] == 1
    with pytest.raises(DataError, match=r"no response is left .*no completion left: 1"):
        load(
            tmp_path,
            tokenizer,
            [{"messages": CHAT}],
            sft_on="assistant",
            max_length=len(full.prompt),
        )


def test_the_identity_of_the_data_includes_the_mask(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The same prompt and response, of which another part is trained on."""
    whole = load(tmp_path, tokenizer, [{"prompt": CHAT[:2], "completion": CHAT[2:]}])
    masked = load(tmp_path, tokenizer, [{"messages": CHAT}], sft_on="assistant")
    assert whole[0].prompt.tolist() == masked[0].prompt.tolist()
    assert whole[0].responses[0].tolist() == masked[0].responses[0].tolist()
    assert whole.fingerprint != masked.fingerprint


def test_the_summary_says_what_is_trained_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    dataset = load(tmp_path, tokenizer, [{"messages": CHAT}] * 2, sft_on="assistant")
    assert dataset.summary() == (
        f"2 of 2 responses from {tmp_path / 'd.jsonl'}; dropped 0 (no completion left: 0); cut to "
        "max_length: 0 responses, 0 prompts; trained on: assistant messages"
    )


def templated(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    other = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    other.chat_template = template
    return other


@pytest.mark.parametrize("sft_on", ["completion", "assistant"])
@pytest.mark.parametrize(
    "template",
    [
        # The number of messages comes first; earlier answers are left out; another generation
        # prompt than the answers have.
        "{{ messages|length }}CHATML",
        "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}{{ m.content + '\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}",
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: <think>' }}{% endif %}",
    ],
)
def test_a_template_whose_prefixes_differ_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, template: str, sft_on: str
) -> None:
    template = template.replace("CHATML", str(tokenizer.chat_template))
    match = (
        r"row 1: chat template failed: the whole conversation does not begin with the text of its "
        r"first \d messages \(.*\), so the tokens to train on are not known; fix the row, or use"
    )
    with pytest.raises(DataError, match=match):
        load(tmp_path, templated(tokenizer, template), [{"messages": CHAT}], sft_on=sft_on)


def test_tokens_that_differ_before_an_assistant_message_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """One token may merge with the text behind it; here four letters become another token."""
    from tokenizers import Tokenizer, models

    merges = [("f", "g"), ("e", "fg"), ("d", "efg"), ("c", "defg")]
    tokens = [*"abcdefg", *(left + right for left, right in merges)]
    vocabulary = {token: k for k, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    other = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="a", eos_token="b")
    other.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    row = {"messages": [{"role": "user", "content": "abcdef"}, {**YES, "content": "g"}]}
    match = (
        r"row 1: the tokenizer makes other tokens of the messages before an assistant message than "
        r"of the whole conversation, from token 3 of 6, so the tokens to train on are not known"
    )
    with pytest.raises(DataError, match=match):
        load(tmp_path, other, [row])


@pytest.mark.parametrize(
    ("row", "sft_on", "message"),
    [
        ({"text": "a"}, "all", "no prompt and no completion; columns found: text; formats accepte"),
        ({}, "all", "no prompt and no completion; columns found: none; formats accepted for sft: "),
        ({"completion": "a"}, "all", "no prompt; columns found: completion; formats accepted for"),
        ({"prompt": "a", "completion": 3}, "all", "completion must be text, or be lists of"),
        ({"prompt": [USER], "completion": "a"}, "all", "prompt must be text like completion, got"),
        ({"prompt": "a", "completion": "b", "messages": CHAT}, "all", "has messages and comple"),
        ({"messages": "a"}, "all", r"messages must be a list of \{role, content\} messages"),
        ({"messages": [{"content": "a"}]}, "all", r"messages must be a list of \{role, content\}"),
        ({"messages": []}, "all", "messages are empty; remove the row"),
        ({"messages": [USER]}, "completion", "messages have no assistant message to train on; rem"),
        ({"messages": [YES, USER, NO]}, "assistant", "messages begin with the assistant message "),
        ({"messages": [YES]}, "completion", "messages begin with the assistant message to train "),
        ({"prompt": "a", "completion": "b"}, "assistant", "data.sft_on: assistant needs messages"),
        ({"messages": CHAT, "tools": 3}, "all", "tools must be a list, got int"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_trained_on(row: dict[str, Any], sft_on: SftOn, message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_group(row, sft_on)


def test_the_first_row_decides_whether_the_rows_are_pairs(tmp_path: Path) -> None:
    sft, dpo = losses.build("sft"), losses.build("dpo")
    pairs = Data(train=str(write_jsonl(tmp_path / "pairs.jsonl", rows(2))))
    chats = Data(train=str(write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}])))
    assert (row_kind(sft, pairs), row_kind(sft, chats)) == ("pairwise", "sft")
    assert row_kind(dpo, chats) == "pairwise"
    combined = losses.from_config([{"name": "dpo"}, {"name": "sft"}])
    assert row_kind(combined, chats) == "pairwise"
    match = "data.sft_on: all is for rows with completion or messages, and .* has pairs, of which"
    with pytest.raises(DataError, match=match):
        row_kind(sft, pairs.model_copy(update={"sft_on": "all"}))
