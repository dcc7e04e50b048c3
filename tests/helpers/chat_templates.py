"""Chat templates that write what those of public models write, and tokenizers with them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from fastpref.config import Data
from fastpref.data.formats import to_groups
from fastpref.data.sft import to_group
from fastpref.data.tokenize import tokenize

FOLDER = Path(__file__).parent / "templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
# Tokens of templates, such as <|im_end|> and [INST].
_SPECIAL = re.compile(r"<[^<>\s'\"{}]{2,}>|\[/?[A-Z]{3,}\]")


def template(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text("utf-8")


def with_template(base: PreTrainedTokenizerFast, text: str) -> PreTrainedTokenizerFast:
    """A tokenizer with another template, whose special tokens it has."""
    backend = base.backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(backend).from_str(backend.to_str()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    special = sorted(set(_SPECIAL.findall(text)))
    tokenizer.add_special_tokens({"extra_special_tokens": special})
    tokenizer.chat_template = text
    return tokenizer


def message(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def encoded(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], **options: Any
) -> tuple[list[int], list[list[int]], Counter[str]]:
    """Token ids of the prompt and of each response of a row, and the counts; none if dropped."""
    config, counts = Data(train="x", **options), Counter[str]()
    groups = [to_group(row, config.sft_on)] if "messages" in row else to_groups(row, "pairwise")
    batch = [(7, group) for group in groups]
    (rows,) = tokenize([batch], "x", tokenizer, config, "pairwise", counts)
    if not rows:
        return [], [], counts
    return rows[0]["prompt"].tolist(), [ids.tolist() for ids in rows[0]["responses"]], counts


def scored(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], **options: Any
) -> tuple[str, ...]:
    """Text of the prompt and of each response, decoded from what is trained on."""
    prompt, responses, _ = encoded(tokenizer, row, **options)
    return tuple(tokenizer.decode(ids) for ids in (prompt, *responses) if ids)
