"""The `Trainer` of docs/integrations.md takes the same step however its batch is accumulated."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from tests.helpers.integration_trainer import documented_trainer

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_accumulated_batches_give_the_step_of_one_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    first = importlib.import_module("plain_pytorch").load(None)[0].lm_head.weight
    whole, accumulated = (
        documented_trainer(tmp_path, batch_size, accumulation).lm_head.weight - first
        for batch_size, accumulation in ((8, 1), (4, 2))
    )
    assert whole.abs().max() > 0
    torch.testing.assert_close(accumulated, whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss", ["simpo", "dpo"])
def test_the_example_learns(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    losses = importlib.import_module("hf_trainer").main(["--steps", "5", "--loss", loss])
    assert len(losses) == 5 and losses[-1] < 0.95 * losses[0]
