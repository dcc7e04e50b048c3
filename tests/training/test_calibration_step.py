"""Reward Calibration and the band monitor in the training loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref import metrics
from fastpref.config import Config, ConfigError
from fastpref.dynamics.band import BAND_METRICS, PAIR_BAND_METRICS
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
@pytest.mark.parametrize("statistics", ["batch", "pairs"])
def test_a_calibrated_run_trains_and_logs(
    make_config: MakeConfig, display: Display, loss: str, scope: str, statistics: str
) -> None:
    calibration = {"scope": scope, "statistics": statistics}
    config = make_config(loss=loss, calibration=calibration, training__epochs=3)
    run(config, display)
    lines = records(config)
    assert sum(x["loss"] for x in lines[-3:]) < sum(x["loss"] for x in lines[:3])
    measured = BAND_METRICS if statistics == "batch" else PAIR_BAND_METRICS
    for line in lines:
        # IPO's incentives are negative beyond its target: then there is no logarithm to log.
        missing = {*measured, *CALIBRATION_METRICS[:3]} - set(line)
        assert missing <= {"band/log_r", "pair_band/log_r"}
        assert 0 <= line[f"{'' if statistics == 'batch' else 'pair_'}band/inside"] <= 1
    assert lines[0]["calibration/factor"] == 1  # there are no averages yet
    for line in lines[1:]:
        # In a step whose mean incentive is not positive the factor of the batch is 1.
        left_out = line["calibration/left_out"] == 1 and statistics == "batch"
        assert (line["calibration/factor"] == 1) == left_out


def test_a_step_with_a_mean_incentive_below_0_is_counted(
    make_config: MakeConfig, display: Display
) -> None:
    """With a high tau IPO's target is near: most pairs pass it, and are drawn back."""
    config = make_config(
        loss={"name": "ipo", "tau": 10.0}, calibration="rc", training__epochs=3, optim__lr=3e-3
    )
    run(config, display)
    left_out = [line["calibration/left_out"] for line in records(config)]
    assert set(left_out) == {0, 1}


@pytest.mark.parametrize("statistics", ["batch", "pairs"])
def test_all_bands_are_measured_where_the_monitor_is_due(
    make_config: MakeConfig, display: Display, statistics: str
) -> None:
    config = make_config(calibration={"statistics": statistics}, monitor={"band_every": 2})
    run(config, display)
    for number, line in enumerate(records(config)):
        due = number % 2 == 1
        assert ("band/inside" in line) == (due or statistics == "batch")
        assert ("pair_band/inside" in line) == (due or statistics == "pairs")


def test_exact_sums_train_as_a_sketch_that_folds_nothing(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    finals = {}
    for sketch_rows in (None, 4096, 16):  # of a vocabulary of 384
        calibration = {"sketch_rows": sketch_rows}
        folder = str(tmp_path / f"{sketch_rows}")
        config = make_config(calibration=calibration, training__output_dir=folder)
        finals[sketch_rows] = parameters(run(config, display))
    assert torch.equal(finals[None], finals[4096])
    assert not torch.equal(finals[None], finals[16])


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


def test_the_number_of_micro_batches_changes_nothing(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    finals = []
    for tokens in (100, 30):  # two micro-batches, or a pair at a time
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
        for names in (BAND_METRICS, PAIR_BAND_METRICS):
            measured = [bool(set(names) & set(line)) for line in records(config)]
            assert measured == [every is not None and k % 2 == 1 for k in range(6)]
    assert torch.equal(*finals)


def test_adapters_are_measured_where_the_head_is_frozen(
    make_config: MakeConfig, display: Display
) -> None:
    config = make_config(calibration="rc", adapter={"name": "lora", "r": 2})
    trainer = Trainer(config, display)
    names = {id(p): name for name, p in trainer.policy.named_parameters()}
    measured = [names[id(p)] for p in trainer.calibration.scope.parameters]
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


def test_a_checkpoint_of_the_other_statistics_is_refused(
    make_config: MakeConfig, display: Display
) -> None:
    settings = {"training__epochs": 1, "training__checkpoint_every": 2}
    run(make_config(calibration="rc", **settings), display)
    other = make_config(calibration={"statistics": "pairs"}, resume="auto", **settings)
    with pytest.raises(ConfigError, match="resume: the averages in the checkpoint are those of"):
        Trainer(other, display)
