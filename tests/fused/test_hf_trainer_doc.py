"""The `Trainer` of docs/integrations.md takes the same step however its batch is accumulated."""

from __future__ import annotations

import copy
import importlib
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastpref.fused import FusedPreferenceLoss

ROOT = Path(__file__).parents[2]


def documented_trainer() -> Any:
    """Class in the code block of the page."""
    page = (ROOT / "docs" / "integrations.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(from transformers import Trainer\n.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102
    return names["PreferenceTrainer"]


def test_accumulated_batches_give_the_step_of_one_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    plain = importlib.import_module("plain_pytorch")
    first, tokenizer = plain.load(None)
    trained = []
    for batch_size, accumulation in ((8, 1), (4, 2)):
        model = copy.deepcopy(first)
        arguments = transformers.TrainingArguments(
            str(tmp_path),
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
            use_cpu=True,
        )
        documented_trainer()(
            model,
            arguments,
            train_dataset=plain.pairs(8),
            data_collator=partial(plain.collate, tokenizer=tokenizer),
            preference_loss=FusedPreferenceLoss("simpo"),
        ).train()
        trained.append(model.lm_head.weight.detach() - first.lm_head.weight.detach())
    whole, accumulated = trained
    assert whole.abs().max() > 0
    torch.testing.assert_close(accumulated, whole, rtol=1e-3, atol=1e-6)
