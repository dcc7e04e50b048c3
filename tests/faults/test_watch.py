"""NaN and infinity in a row, a logit, a gradient, on a rank; losses that jump."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from conftest import rows, write_jsonl
from pairs import batch
from runs import told

from fastpref import config as configs
from fastpref import losses, metrics, ranks
from fastpref.config import Config
from fastpref.data.batches import Batch
from fastpref.data.formats import DataError
from fastpref.model import Policy
from fastpref.train import Diverged, Trainer
from fastpref.watch import Spikes

MakeConfig = Callable[..., Config]
BAD = 7  # the pair whose numbers go wrong
ROW = BAD + 1  # as people count


def poison(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """One hidden number of pair BAD, and so its logits, in every forward pass for the gradient."""
    states = Policy.states

    def poisoned(self: Policy, batch: Batch, *arguments: Any) -> torch.Tensor:
        hidden = states(self, batch, *arguments)
        if torch.is_grad_enabled() and 2 * BAD in batch.responses:
            owner = batch.responses.tolist().index(2 * BAD)
            place = batch.positions[batch.cu_seqlens[owner]]
            hidden = hidden.index_put((place, torch.tensor(0)), torch.tensor(value))
        return hidden

    monkeypatch.setattr(Policy, "states", poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss", ["dpo", "simpo", "tdpo2"])
def test_a_logit_that_is_not_finite_stops_the_run_and_names_its_row(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, value: float, loss: str
) -> None:
    config = make_config(loss=loss, training__log_every=3, training__batch_size=6)
    poison(monkeypatch, value)
    with pytest.raises(Diverged, match=rf"loss is \S+ at step [12], rows {ROW} \(all in .*json\)"):
        told(config)
    report = json.loads((Path(config.training.output) / "nonfinite.json").read_text())
    assert report["rows"] == [ROW] and report["metric"] == "loss"


def test_a_gradient_that_is_not_finite_names_the_rows_of_its_step(
    make_config: MakeConfig, display: Any
) -> None:
    trainer = Trainer(make_config(training__batch_size=12), display)
    trainer.trained[3].register_hook(lambda gradient: gradient * math.nan)
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
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    poison(patch, math.nan)
    try:
        with ranks.joined():
            told(configs.load(folder / "config.yaml"))
    except Diverged as error:
        (folder / f"{rank}.txt").write_text(str(error))


def test_what_goes_wrong_on_one_rank_stops_all_and_is_named_by_all(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = make_config(training__batch_size=6, training__max_tokens=160)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    mp.spawn(of_two, (port, tmp_path), nprocs=2)
    said = {(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)}
    assert len(said) == 1 and "loss is nan at step" in said.pop()
    report = json.loads((Path(config.training.output) / "nonfinite.json").read_text())
    assert report["rows"] == [ROW]


def test_a_jump_of_the_loss_is_a_spike_until_it_is_the_usual_one() -> None:
    chance, spikes = random.Random(0), Spikes()
    assert not any(spikes.see(chance.gauss(2.0, 0.1)) for _ in range(500))
    assert spikes.usual == pytest.approx(2.0, abs=0.1)
    assert spikes.see(5.0) and spikes.see(5.0)
    again = Spikes()
    again.restore(json.loads(json.dumps(spikes.state())))
    jumps = [spikes.see(chance.gauss(4.0, 0.1)) for _ in range(500)]
    assert jumps[0] and not any(jumps[100:])
    assert again.see(4.0) and again.state() != spikes.state()


def test_the_first_losses_are_never_spikes() -> None:
    spikes = Spikes()
    assert [spikes.see(loss) for loss in (0.0, 100.0, 1e4)] == [False] * 3


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
    lines = metrics.read(Path(config.training.output) / "metrics.jsonl")
    found = {line["step"]: line["loss/spikes"] for line in lines if "loss/spikes" in line}
    assert list(found) == [24] and list(found[24]) == ["22"]
    assert found[24]["22"] == pytest.approx(50 * math.log(2), rel=0.1)
    assert any(note.startswith("loss spike at step 22: 3") for note in notes)
