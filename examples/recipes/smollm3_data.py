"""Write the preference data of SmolLM3 as text: `prompt, chosen, rejected`.

    python examples/recipes/smollm3_data.py data/smollm3-preferences.jsonl

Half of the pairs without and a quarter of those with reasoning, as in the mixture of the recipe.
Every row brings options for the chat template, such as whether to think, so that the template is
applied here; `data.add_eos: false` belongs to it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MODEL, REVISION = "HuggingFaceTB/SmolLM3-3B-checkpoints", "it-SFT"
# Split of the config Preference of HuggingFaceTB/smoltalk2, and the share of it that is used.
SPLITS = {
    "llama_3.1_tulu_3_8b_preference_mixture_no_think": 0.5,
    "tulu_3_8b_pref_mix_Qwen3_32B_Qwen3_0.6B_think": 0.25,
}


def as_text(row: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    """Return prompt and responses of a row as the chat template writes them."""
    options = row.get("chat_template_kwargs") or {}

    def apply(messages: list[dict[str, Any]], ends: bool) -> str:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not ends, **options
        )
        return str(text)

    prompt = apply(row["chosen"][:-1], ends=False)
    texts = {name: apply(row[name], ends=True) for name in ("chosen", "rejected")}
    for name, text in texts.items():
        if not text.startswith(prompt):
            raise ValueError(f"{name} does not go on from the prompt: {text[: len(prompt)]!r}")
    return {"prompt": prompt, **{name: text[len(prompt) :] for name, text in texts.items()}}


def main(out: Path) -> None:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL, revision=REVISION)
    with out.open("w", encoding="utf-8") as file:
        for split, share in SPLITS.items():
            rows = load_dataset("HuggingFaceTB/smoltalk2", "Preference", split=split)
            for row in rows.shuffle(seed=0).select(range(int(len(rows) * share))):
                file.write(json.dumps(as_text(row, tokenizer)) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
