"""Rows of preference data, and the config of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = "tea coffee river mountain piano guitar winter summer bread cheese".split()  # noqa: SIM905
LLAMA = {
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def rows(count: int, soft: bool = False) -> list[dict[str, Any]]:
    """Pairs of different lengths, some of one word; no two alike."""
    made = []
    for i in range(count):
        first, second = WORDS[i % 10], WORDS[(i * 3 + 1) % 10]
        row = {
            "prompt": f"User: {i}. {first} or {second}?\nAssistant:",
            "chosen": f" {first}" + f" and {second}" * (i % 4),
            "rejected": f" {second} of course" + " really" * (i % 3),
        }
        if soft:
            row["p"] = round(0.55 + 0.4 * (i % 7) / 7, 4)
        made.append(row)
    return made


def labelled(count: int) -> list[dict[str, Any]]:
    """Single responses with labels, two of three desirable."""
    return [
        {
            "prompt": row["prompt"],
            "completion": row["rejected" if i % 3 == 2 else "chosen"],
            "label": i % 3 != 2,
        }
        for i, row in enumerate(rows(count))
    ]


def scored(count: int) -> list[dict[str, Any]]:
    """Groups of one to four responses; the scores of every fifth are equal."""
    made = []
    for i, row in enumerate(rows(count)):
        completions = [row["chosen"], row["rejected"], " neither", " both of them"][: 1 + i % 4]
        scores = [1.0 if i % 5 == 4 else round((k * 3 + i) % 7 / 7, 4) for k in range(1 + i % 4)]
        made.append({"prompt": row["prompt"], "completions": completions, "scores": scores})
    return made


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
