"""Real preference pairs as conversations of a chat model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Messages = list[dict[str, str]]
Row = dict[str, Messages]


def conversations(path: Path, tokenizer: Any, max_length: int, whole: bool) -> list[Row]:
    """Read pairs as `prompt`, `chosen` and `rejected` messages; leave out those that do not fit.

    whole: both responses must fit into `max_length` tokens with the prompt; otherwise the prompt
        must leave half of them to the responses, which are cut later.
    """

    def tokens(messages: Messages, prompt: bool = False) -> int:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    def fits(row: Row) -> bool:
        if not whole:
            return tokens(row["prompt"], prompt=True) <= max_length // 2
        sides = (row["chosen"], row["rejected"])
        return max(tokens(row["prompt"] + side) for side in sides) <= max_length

    rows = map(conversation, map(json.loads, path.read_text(encoding="utf-8").splitlines()))
    return [row for row in rows if row is not None and fits(row)]


def conversation(row: dict[str, Any]) -> Row | None:
    """A pair as messages; None if its transcripts have no common prompt or an empty answer.

    row: `prompt, chosen, rejected` as text, or `chosen, rejected` as whole transcripts of
        Anthropic's form, whose turns begin with "Human:" and "Assistant:".
    """
    if "prompt" in row:
        prompt = [{"role": "user", "content": row["prompt"]}]
        sides = [[{"role": "assistant", "content": row[k]}] for k in ("chosen", "rejected")]
    else:
        whole = [transcript(row[k]) for k in ("chosen", "rejected")]
        if not whole[0] or whole[0][:-1] != whole[1][:-1]:
            return None
        prompt, sides = whole[0][:-1], [messages[-1:] for messages in whole]
    answers = [side[0] for side in sides]
    if any(a["role"] != "assistant" or not a["content"].strip() for a in answers):
        return None
    return {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}


def transcript(text: str) -> Messages:
    """The turns of a transcript."""
    messages = []
    for turn in text.split("\n\nHuman: ")[1:]:
        question, *answers = turn.split("\n\nAssistant: ")
        messages.append({"role": "user", "content": question})
        messages += [{"role": "assistant", "content": answer} for answer in answers]
    return messages
