"""NaN and infinity in a row, a logit, a gradient, on a rank; losses that jump."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import random
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from rich.console import Console

from fastpref import config as configs
from fastpref import distributed, losses, metrics
from fastpref.config import Config
from fastpref.data.collate import Batch
from fastpref.data.readers import DataError
from fastpref.model.policy import Policy
from fastpref.training.anomalies import MOST_SKIPPED, SpikeDetector
from fastpref.training.nonfinite import Diverged
from fastpref.training.signals import Interrupted
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display
from tests.helpers.data import rows, write_jsonl
from tests.helpers.pairs import batch
from tests.helpers.training_runs import assert_same, told

MakeConfig = Callable[..., Config]
BAD = 7  # the pair whose numbers go wrong
ROW = BAD + 1  # as people count


def poison(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """One hidden number of pair BAD, and so its logits, in every forward pass for the gradient."""
    states = Policy.hidden_states

    def poisoned(self: Policy, batch: Batch, *arguments: Any) -> torch.Tensor:
        hidden = states(self, batch, *arguments)
        if torch.is_grad_enabled() and 2 * BAD in batch.responses:
            owner = batch.responses.tolist().index(2 * BAD)
            place = batch.predictor_positions[batch.cu_seqlens[owner]]
            hidden = hidden.index_put((place, torch.tensor(0)), torch.tensor(value))
        return hidden

    monkeypatch.setattr(Policy, "hidden_states", poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss", ["dpo", "simpo", "tdpo2"])
def test_a_logit_that_is_not_finite_stops_the_run_and_names_its_row(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, value: float, loss: str
) -> None:
    config = make_config(loss=loss, training__log_every=3, training__batch_size=6)
    poison(monkeypatch, value)
    with pytest.raises(Diverged, match=rf"loss is \S+ at step [12], rows {ROW} \(all in .*json\)"):
        told(config)
    report = json.loads((Path(config.training.output_dir) / "nonfinite.json").read_text())
    assert report["rows"] == [ROW] and report["metric"] == "loss"


def test_a_gradient_that_is_not_finite_names_the_rows_of_its_step(
    make_config: MakeConfig, display: Any
) -> None:
    trainer = Trainer(make_config(training__batch_size=12), display)
    trainer.parameters[3].register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(Diverged, match=r"grad_norm is nan at step 1, rows (\d+, ){8}… \("):
        trainer.loop([])


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused_with_its_row(
    make_config: MakeConfig, tmp_path: Path, number: float
) -> None:
    records = [dict(row, chosen_weights=[1.0], rejected_weights=[1.0]) for row in rows(3)]
    records[1]["chosen_weights"] = [number]
    path = write_jsonl(tmp_path / "weighted.jsonl", records)
    with pytest.raises(DataError, match=r"row 2.*chosen_weights must be a list of numbers >= 0"):
        told(make_config(data__train=str(path)))


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize(
    "name", [n for n in losses.names("pairwise") if losses.describe(n).level == "sequence"]
)
def test_no_objective_hides_a_nan(name: str, side: str) -> None:
    objective: Any = losses.build(name)
    policy, reference = batch(pairs=6)
    getattr(policy, side)[2] = math.nan
    loss = objective(policy, reference if objective.needs_reference else None).loss
    # Of objectives that look at a whole batch, aot and beta_dpo, the row may be another one.
    assert not loss.isfinite().all() or (name, side) == ("sft", "rejected")  # never looked at


def of_two(rank: int, port: int, folder: Path) -> None:
    """Train beside another rank, and keep what was said at the end."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    poison(patch, math.nan)
    try:
        with distributed.process_group():
            said = told(configs.load(folder / "config.yaml"))
    except Diverged as error:
        said = str(error)
    (folder / f"{rank}.txt").write_text(said)


def on_two_ranks(config: Config, folder: Path) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "config.yaml").write_text(config.to_yaml())
    mp.spawn(of_two, (port, folder), nprocs=2)
    return [(folder / f"{rank}.txt").read_text() for rank in (0, 1)]


def test_what_goes_wrong_on_one_rank_stops_all_and_is_named_by_all(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(training__batch_size=6, training__micro_batch_tokens=160)
    first, second = on_two_ranks(config, tmp_path)
    assert first == second and "loss is nan at step" in first
    report = json.loads((Path(config.training.output_dir) / "nonfinite.json").read_text())
    assert report["rows"] == [ROW]


def test_what_goes_wrong_on_one_rank_is_skipped_by_all(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    options = {"batch_size": 6, "micro_batch_tokens": 160, "nonfinite": "skip"}
    config = make_config(**{f"training__{name}": value for name, value in options.items()})
    first, _ = on_two_ranks(config, tmp_path)
    assert first.count(f"is skipped: loss is nan, rows {ROW}\n") == 1
    lines = metrics.read_records(Path(config.training.output_dir) / "metrics.jsonl")
    assert [line["steps/skipped"] for line in lines if "steps/skipped" in line] in (
        [{"1": [ROW]}],
        [{"2": [ROW]}],
    )
    assert sum(math.isfinite(line.get("loss", math.nan)) for line in lines) == 1


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.parameters]


@pytest.mark.parametrize(
    "sections",
    [
        {"loss": "dpo"},
        {"loss": "bco", "training__batch_size": 8},  # rewards of single responses, with a mean
        {"loss": "dpo", "calibration": "rc", "monitor": {"band_every": 1}},
        {"loss": "dpo", "update": "dpo_pg"},
    ],
    ids=str,
)
def test_a_step_that_is_skipped_leaves_nothing_behind(
    make_config: MakeConfig, display: Any, monkeypatch: pytest.MonkeyPatch, sections: Any
) -> None:
    poison(monkeypatch, math.nan)
    config = make_config(**sections, training__nonfinite="skip", training__epochs=2)
    trainer = Trainer(config, display)
    step, before, after = trainer._train_step, [weights(trainer)], list[Any]()

    def watched(with_entropy: bool) -> Any:
        after.append(step(with_entropy))
        before.append(weights(trainer))
        return after[-1]

    monkeypatch.setattr(trainer, "_train_step", watched)
    trainer.loop([])
    lines = metrics.read_records(Path(config.training.output_dir) / "metrics.jsonl")
    lines = [line for line in lines if "learning_rate" in line]
    skipped = {step: rows for line in lines for step, rows in line.get("steps/skipped", {}).items()}
    assert list(skipped.values()) == [[ROW], [ROW]]  # once an epoch
    assert [str(1 + n) for n, tally in enumerate(after) if tally is None] == list(skipped)
    for n, line in enumerate(lines):
        moved = any(not torch.equal(a, b) for a, b in zip(before[n], before[n + 1], strict=True))
        assert moved is ("loss" in line) is (str(line["step"]) not in skipped)
        numbers = [value for value in line.values() if not isinstance(value, dict)]
        assert all(map(math.isfinite, numbers)), line
    assert not (Path(config.training.output_dir) / "nonfinite.json").exists()


def test_a_skipped_step_is_told_and_survives_a_checkpoint(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that logs every third step; it is stopped behind the one that is skipped."""
    poison(monkeypatch, math.nan)
    common = {"training__nonfinite": "skip", "training__log_every": 3, "training__epochs": 2}
    whole = make_config(**common)
    said = told(whole)
    (step,) = (number for number in (1, 2, 3) if f"step {number} is skipped" in said)
    assert f"step {step} is skipped: loss is nan, rows {ROW}\n" in said
    assert "skipped: 2 of 6 steps\n" in said
    part = make_config(**common, training__output_dir=str(tmp_path / "part"))
    trainer = Trainer(part, Display(Console(file=io.StringIO())))
    one, signals = trainer._train_step, list[int]()

    def stopped(with_entropy: bool) -> Any:
        tally = one(with_entropy)
        if tally is None:
            signals.append(signal.SIGTERM)
        return tally

    monkeypatch.setattr(trainer, "_train_step", stopped)
    with pytest.raises(Interrupted):
        trainer.loop(signals)
    assert "skipped: 2 of 6 steps\n" in told(part.model_copy(update={"resume": "auto"}))
    assert_same(tmp_path / "part", Path(whole.training.output_dir))


def test_too_many_skipped_steps_in_a_row_stop_the_run(
    make_config: MakeConfig, display: Any
) -> None:
    config = make_config(training__nonfinite="skip", training__epochs=9, training__log_every=2)
    trainer = Trainer(config, display)
    step, gone = trainer._train_step, torch.tensor(math.nan)

    def poisoned(with_entropy: bool) -> Any:
        hook = trainer.parameters[3].register_hook(
            lambda g: g if trainer.step in (3, 15) else g * gone
        )
        try:
            return step(with_entropy)
        finally:
            hook.remove()

    trainer._train_step = poisoned  # type: ignore[method-assign]
    said = f"grad_norm is nan at step 14, after {MOST_SKIPPED - 1} that were skipped, rows "
    with pytest.raises(Diverged, match=said):
        trainer.loop([])
    report = json.loads((Path(config.training.output_dir) / "nonfinite.json").read_text())
    assert report["step"] == 14 and report["metric"] == "grad_norm"


def test_a_jump_of_the_loss_is_a_spike_until_it_is_the_usual_one() -> None:
    chance, spikes = random.Random(0), SpikeDetector()
    assert not any(spikes.is_spike(chance.gauss(2.0, 0.1)) for _ in range(500))
    assert spikes.usual == pytest.approx(2.0, abs=0.1)
    assert spikes.is_spike(5.0) and spikes.is_spike(5.0)
    again = SpikeDetector()
    again.load_state_dict(json.loads(json.dumps(spikes.state_dict())))
    jumps = [spikes.is_spike(chance.gauss(4.0, 0.1)) for _ in range(500)]
    assert jumps[0] and not any(jumps[100:])
    assert again.is_spike(4.0) and again.state_dict() != spikes.state_dict()


def test_the_first_losses_are_never_spikes() -> None:
    spikes = SpikeDetector()
    assert [spikes.is_spike(loss) for loss in (0.0, 100.0, 1e4)] == [False] * 3


def test_spikes_are_logged(
    make_config: MakeConfig, display: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(training__steps=24, optim__lr=1e-5, training__log_every=4)
    trainer = Trainer(config, display)
    objective, notes = trainer.loss, list[str]()

    class Jumping(type(objective)):  # type: ignore[misc]
        def __call__(self, *arguments: Any) -> Any:
            output = super().__call__(*arguments)
            jump = 50.0 if trainer.step == 21 else 1.0
            return dataclasses.replace(output, loss=output.loss * jump)

    trainer.loss = Jumping(beta=objective.beta)
    monkeypatch.setattr(display, "note", notes.append)
    trainer.loop([])
    lines = metrics.read_records(Path(config.training.output_dir) / "metrics.jsonl")
    found = {line["step"]: line["loss/spikes"] for line in lines if "loss/spikes" in line}
    assert list(found) == [24] and list(found[24]) == ["22"]
    assert found[24]["22"] == pytest.approx(50 * math.log(2), rel=0.1)
    assert any(note.startswith("loss spike at step 22: 3") for note in notes)
