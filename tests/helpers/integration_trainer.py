"""The `Trainer` in the code block of docs/integrations.md, for one step of SGD."""

from __future__ import annotations

import copy
import importlib
import re
from functools import partial
from pathlib import Path
from typing import Any

import transformers

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"


def documented_trainer(folder: Path, batch_size: int, accumulation: int = 1) -> Any:
    """Run the block on the tiny model of the examples; return the model after one step.

    `examples` must be on the path. Eight pairs, on all ranks together if there are several.
    """
    plain = importlib.import_module("plain_pytorch")
    model, tokenizer = plain.load(None)
    (code,) = re.findall(
        r"```python\n([^`]*class PreferenceTrainer\(Trainer\)[^`]*)```", PAGE.read_text("utf-8")
    )
    reference = copy.deepcopy(model)
    reference.lm_head.weight.data.mul_(1.1)
    names: dict[str, Any] = {
        "model": model,
        "reference": reference,
        "pairs": plain.pairs(8),
        "collate": partial(plain.collate, tokenizer=tokenizer),
        "arguments": transformers.TrainingArguments(
            str(folder),
            max_steps=1,
            learning_rate=1.0,
            optim="sgd",
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
    }
    exec(code, names)  # noqa: S102
    return model
