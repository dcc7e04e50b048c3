"""Reward Calibration and the band monitor in the training loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref import metrics
from fastpref.config import Config, ConfigError
from fastpref.dynamics.band import BAND_METRICS
from fastpref.dynamics.reward_calibration import CALIBRATION_METRICS
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display

MakeConfig = Callable[..., Config]


def run(config: Config, display: Display) -> Trainer:
    trainer = Trainer(config, display)
    trainer.loop([])
    return trainer


def records(config: Config) -> list[dict[str, Any]]:
    lines = metrics.read_records(Path(config.training.output_dir) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in metrics.TIMING_METRICS} for line in lines]


@pytest.mark.parametrize("scope", ["head", "full", "last_adapter"])
@pytest.mark.parametrize("loss", ["dpo", "simpo", "ipo"])
def test_a_calibrated_run_trains_and_logs(
    make_config: MakeConfig, display: Display, loss: str, scope: str
) -> None:
    config = make_config(loss=loss, calibration={"scope": scope}, training__epochs=3)
    run(config, display)
    lines = records(config)
    assert sum(x["loss"] for x in lines[-3:]) < sum(x["loss"] for x in lines[:3])
    for line in lines:
        # IPO's incentives are negative beyond its target: then there is no logarithm to log.
        assert {*BAND_METRICS, *CALIBRATION_METRICS[:3]} - set(line) <= {"band/log_r"}
        assert 0 <= line["band/inside"] <= 1
    assert lines[0]["calibration/factor"] == 1  # there are no averages yet
    assert all(line["calibration/factor"] != 1 for line in lines[1:])


def test_calibration_brings_the_ratio_into_the_band(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    """SimPO's incentives differ by the lengths; calibrated, their mean log-ratio is that of r*."""
    found = {}
    for calibration in (None, "rc"):
        config = make_config(
            loss="simpo", calibration=calibration, monitor={"band_every": 1}, training__epochs=4,
            training__output_dir=str(tmp_path / str(calibration)), optim__lr=1e-5,
        )  # fmt: skip
        run(config, display)
        last = records(config)[-1]
        found[calibration] = abs(last["band/log_r"] - last["band/log_r_star"])
    assert found["rc"] < found[None]


def parameters(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])


def test_micro_batches_change_nothing(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    finals = []
    for tokens in (4096, 30):  # one micro-batch, or a pair at a time
        trainer = run(
            make_config(
                calibration="rc", model__dtype="float64", training__micro_batch_tokens=tokens,
                training__output_dir=str(tmp_path / str(tokens)),
            ),
            display,
        )  # fmt: skip
        assert (len(trainer.plan.step(0)) > 2) == (tokens == 30)
        finals.append(parameters(trainer))
    assert (finals[0] - finals[1]).abs().max() < 1e-9


def test_a_resumed_run_continues_the_averages(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    """Interrupted after step 5, with a checkpoint from step 4 and a window of metrics half full."""
    settings: dict[str, Any] = {
        "calibration": "rc", "training__epochs": 3, "training__checkpoint_every": 2,
        "training__log_every": 3,
    }  # fmt: skip
    whole = make_config(training__output_dir=str(tmp_path / "whole"), **settings)
    expected = parameters(run(whole, display))
    trainer = Trainer(
        make_config(training__output_dir=str(tmp_path / "broken"), **settings), display
    )
    original = trainer._train_step

    def failing(with_entropy: bool) -> Any:
        if trainer.step == 5:
            raise RuntimeError("power cut")
        return original(with_entropy)

    trainer._train_step = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.loop([])
    resumed = make_config(training__output_dir=str(tmp_path / "broken"), resume="auto", **settings)
    assert torch.equal(parameters(run(resumed, display)), expected)
    assert records(resumed) == records(whole)


def test_the_monitor_alone_changes_no_bit(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    finals = []
    for every in (None, 2):
        config = make_config(
            monitor={"band_every": every},
            training__epochs=2,
            training__output_dir=str(tmp_path / f"{every}"),
        )
        finals.append(parameters(run(config, display)))
        measured = [bool(set(BAND_METRICS) & set(line)) for line in records(config)]
        assert measured == [every is not None and k % 2 == 1 for k in range(6)]
    assert torch.equal(*finals)


def test_adapters_are_measured_where_the_head_is_frozen(
    make_config: MakeConfig, display: Display
) -> None:
    config = make_config(calibration="rc", adapter={"name": "lora", "r": 2})
    trainer = Trainer(config, display)
    names = {id(p): name for name, p in trainer.policy.named_parameters()}
    measured = [names[id(p)] for p in trainer.calibration.parameters]
    assert measured and all(".layers.1." in name and "lora" in name for name in measured)
    trainer.loop([])
    assert "calibration/factor" in records(config)[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"monitor": {"band_every": 1}},
            "monitor.band_every: the head of PhiForCausalLM has a bias",
        ),
        ({"calibration": {"scope": "head"}}, "calibration.scope: .*use last_adapter or full"),
    ],
)
def test_a_head_with_a_bias_is_refused(
    make_config: MakeConfig, display: Display, tiny_llama: str, change, message
) -> None:
    phi = {
        "model_type": "phi", "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4,
    }  # fmt: skip
    model = {"init": "random", "config": phi, "tokenizer": tiny_llama, "dtype": "float32"}
    with pytest.raises(ConfigError, match=message):
        Trainer(make_config(model=model, **change), display)


def test_calibration_can_begin_at_a_checkpoint(make_config: MakeConfig, display: Display) -> None:
    settings = {"training__epochs": 1, "training__checkpoint_every": 2}
    run(make_config(**settings), display)
    later = make_config(calibration="rc", resume="auto", training__epochs=2)
    run(later, display)
    assert "calibration/factor" in records(later)[-1]
