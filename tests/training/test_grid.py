"""Runs of a grid: what they share, what ends one of them, and what is not run again."""

from __future__ import annotations

import json
import os
import signal
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastpref import distributed, metrics
from fastpref.config import Config, ConfigError
from fastpref.config.grid import Grid, load_grid
from fastpref.data.readers import DataError
from fastpref.model import reference_policy
from fastpref.training import grid as grids
from fastpref.training import signals
from fastpref.training.trainer import Trainer, train
from fastpref.utils.progress import Display
from tests.helpers import rank_processes
from tests.helpers.data import rows, write_jsonl
from tests.helpers.training_runs import assert_same

MakeConfig = Callable[..., Config]
BETAS = "loss.beta=0.05,0.1,0.2"


@pytest.fixture
def grid_of(make_config: MakeConfig, tmp_path: Path) -> Callable[..., Grid]:
    path = tmp_path / "c.yaml"
    path.write_text(make_config().to_yaml())
    return lambda *items, overrides=(): load_grid(path, overrides, items)


def statuses(outcomes: Sequence[grids.Outcome]) -> dict[str, str]:
    return {outcome.point.name: outcome.status for outcome in outcomes}


def written(grid: Grid) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((grid.folder / "grid.json").read_text())
    return document


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of groups in the passes of the reference, as they are computed."""
    counts: list[int] = []
    compute = reference_policy._compute

    def counted(policy: Any, groups: Any, *arguments: Any) -> None:
        counts.append(len(groups))
        compute(policy, groups, *arguments)

    monkeypatch.setattr(reference_policy, "_compute", counted)
    return counts


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (BETAS, 1),
        ("optim.lr=1e-3,1e-4,1e-5", 1),
        ("training.batch_size=2,3,4", 1),
        ("data.max_length=40,64", 1),
        ("data.max_length=14,16,64", 3),
        ("model.dtype=float32,float64", 2),
        ("data.add_eos=true,false", 2),
    ],
)
def test_the_reference_runs_once_unless_a_key_changes_it(
    grid_of: Callable[..., Grid], display: Display, passes: list[int], item: str, expected: int
) -> None:
    grids.run(grid_of(item, overrides=["training.steps=1"]), display)
    assert passes == [12] * expected


def test_the_reference_runs_again_for_other_data_and_models(
    grid_of: Callable[..., Grid],
    make_config: MakeConfig,
    display: Display,
    passes: list[int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    train(make_config(training__output_dir=str(tmp_path / "sft")), display)
    assert passes.pop() == 12
    write_jsonl(tmp_path / "other.jsonl", rows(13)[1:])
    (tmp_path / "llama").symlink_to(make_config().model.path)
    monkeypatch.chdir(tmp_path)  # short paths make short names of folders
    items = ("data.train=pairs.jsonl,other.jsonl", "model.path=llama,sft/model")
    grids.run(grid_of(*items, overrides=["training.steps=1"]), display)
    # The first model has its log-probs of the first data in the cache already.
    assert passes == [12, 12, 12]


def test_a_run_of_a_grid_is_that_run_alone(
    grid_of: Callable[..., Grid], make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    grid = grid_of("loss.beta=0.05,0.1", "optim.lr=1e-3,1e-2")
    assert set(statuses(grids.run(grid, display)).values()) == {"finished"}
    options = {"loss": {"name": "dpo", "beta": 0.1}, "optim__lr": 1e-2}
    train(make_config(**options, training__output_dir=str(tmp_path / "alone")), display)
    assert_same(grid.folder / "beta=0.1,lr=0.01", tmp_path / "alone")


def test_the_file_of_a_grid_has_values_and_last_metrics(
    grid_of: Callable[..., Grid], display: Display
) -> None:
    grid = grid_of(
        "loss.beta=0.05,0.1", overrides=[f"data.eval={grid_of(BETAS).points[0].config.data.train}"]
    )
    grids.run(grid, display)
    document = written(grid)
    assert document["keys"] == ["loss.beta"]
    second = document["runs"][1]
    assert (second["name"], second["values"]) == ("beta=0.1", {"loss.beta": 0.1})
    assert (second["status"], second["error"]) == ("finished", None)
    lines = metrics.read_records(grid.folder / "beta=0.1" / "metrics.jsonl")
    (evaluation,) = [line for line in lines if "eval_loss" in line and line["step"] == 3]
    assert second["metrics"]["eval_loss"] == evaluation["eval_loss"]
    assert second["metrics"]["step"] == 3
    assert second["metrics"]["loss"] == next(r["loss"] for r in reversed(lines) if "loss" in r)


def test_a_finished_grid_is_not_run_again(
    grid_of: Callable[..., Grid], display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = grids.run(grid_of(BETAS), display)
    monkeypatch.setattr(grids, "train", None)
    assert statuses(grids.run(grid_of(BETAS), display)) == statuses(first)


def test_a_longer_grid_runs_what_is_new(
    grid_of: Callable[..., Grid], display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids.run(grid_of("loss.beta=0.05,0.2"), display)
    trained: list[str] = []

    def recorded(config: Config, *arguments: Any) -> Path:
        trained.append(Path(config.training.output_dir).name)
        return train(config, *arguments)

    monkeypatch.setattr(grids, "train", recorded)
    grids.run(grid_of(BETAS, overrides=["training.checkpoint_every=5"]), display)
    assert trained == ["beta=0.1"]


def test_runs_of_another_config_are_refused_by_name(
    grid_of: Callable[..., Grid], display: Display
) -> None:
    grid = grid_of("loss.beta=0.05,0.1")
    grids.run(grid, display)
    with pytest.raises(ConfigError) as refusal:
        grids.run(grid_of("loss.beta=0.01,0.1", overrides=["optim.lr=0.5"]), display)
    assert str(refusal.value) == (
        f"training.output_dir: {grid.folder}/beta=0.1 is of another config (optim.lr: 0.001 → "
        "0.5); restore it, remove the folder or choose another"
    )
    assert not (grid.folder / "beta=0.01").exists()


def test_a_folder_with_a_run_is_refused(
    grid_of: Callable[..., Grid], make_config: MakeConfig, display: Display
) -> None:
    train(make_config(), display)
    with pytest.raises(ConfigError, match="run holds a run; choose another folder for a grid"):
        grids.run(grid_of(BETAS), display)


def test_a_run_that_diverges_is_recorded_and_the_grid_goes_on(
    grid_of: Callable[..., Grid], display: Display
) -> None:
    grid = grid_of("optim.lr=1e30,1e-3")
    expected = {"lr=1e30": "diverged", "lr=0.001": "finished"}
    assert statuses(grids.run(grid, display)) == expected
    first = written(grid)["runs"][0]
    assert first["status"] == "diverged" and "is nan at step" in first["error"]
    before = (grid.folder / "lr=1e30" / "metrics.jsonl").stat()
    outcomes = grids.run(grid, display)
    assert statuses(outcomes) == expected and "is nan at step" in str(outcomes[0].error)
    assert (grid.folder / "lr=1e30" / "metrics.jsonl").stat() == before


def test_a_run_begins_after_the_last_one_is_closed_and_freed(
    grid_of: Callable[..., Grid], display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A diverged one, too: else its model stays in memory, and its tracker gets later metrics."""
    trainers: list[weakref.ref[Trainer]] = []
    closed: list[str] = []
    initialize, close = Trainer.__init__, Trainer.close

    def begin(trainer: Trainer, config: Config, *arguments: Any) -> None:
        assert [ref() for ref in trainers] == [None] * len(closed)
        trainers.append(weakref.ref(trainer))
        initialize(trainer, config, *arguments)

    def end(trainer: Trainer) -> None:
        closed.append(trainer.run.folder.name)
        close(trainer)

    monkeypatch.setattr(Trainer, "__init__", begin)
    monkeypatch.setattr(Trainer, "close", end)
    grids.run(grid_of("optim.lr=1e30,1e31,1e-3,1e-4"), display)
    assert closed == ["lr=1e30", "lr=1e31", "lr=0.001", "lr=0.0001"]


def test_an_error_of_a_later_run_is_recorded_and_the_grid_goes_on(
    grid_of: Callable[..., Grid], make_config: MakeConfig, display: Display
) -> None:
    grid = grid_of(f"data.train={make_config().data.train},none.jsonl", "loss.beta=0.1,0.2")
    outcomes = grids.run(grid, display)
    assert [outcome.status for outcome in outcomes] == ["finished", "finished", "failed", "failed"]
    assert written(grid)["runs"][2]["error"] == "none.jsonl: no such file; check the path"
    with pytest.raises(DataError, match="no such file"):  # now it is the first one
        grids.run(grid, display)


def test_an_error_of_the_first_run_ends_the_grid(
    grid_of: Callable[..., Grid], display: Display
) -> None:
    grid = grid_of(BETAS, overrides=["data.train=none.jsonl"])
    with pytest.raises(DataError, match="no such file"):
        grids.run(grid, display)
    assert [run["status"] for run in written(grid)["runs"]] == ["failed", "waiting", "waiting"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [2, 3])
def test_a_signal_stops_the_grid_after_the_step_and_it_continues(
    grid_of: Callable[..., Grid],
    display: Display,
    monkeypatch: pytest.MonkeyPatch,
    signum: int,
    step: int,
) -> None:
    """The third step is the last, which a run alone finishes in spite of a signal."""
    grid = grid_of(BETAS)
    take = Trainer._train_step

    def interrupted(trainer: Trainer, **options: Any) -> Any:
        sums = take(trainer, **options)
        if trainer.run.folder.name == "beta=0.1" and trainer.step == step:
            os.kill(os.getpid(), signum)
        return sums

    with monkeypatch.context() as patch, pytest.raises(signals.Interrupted) as stop:
        patch.setattr(Trainer, "_train_step", interrupted)
        grids.run(grid, display)
    count = step - 1
    name = signal.Signals(signum).name
    assert (stop.value.signum, str(stop.value)) == (
        signum,
        f"grid stopped by {name} in run beta=0.1, {count} of 3 runs are done; continue with the "
        "same command",
    )
    last = "finished" if step == 3 else "stopped"
    assert [run["status"] for run in written(grid)["runs"]] == ["finished", last, "waiting"]
    assert set(statuses(grids.run(grid, display)).values()) == {"finished"}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_run_loads_stops_the_grid(
    grid_of: Callable[..., Grid], display: Display, monkeypatch: pytest.MonkeyPatch, signum: int
) -> None:
    grid = grid_of(BETAS)
    monkeypatch.setattr(reference_policy, "_compute", lambda *_: os.kill(os.getpid(), signum))
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(signals.Interrupted, match=r"in run beta=0\.05, 0 of 3 runs are done"):
        grids.run(grid, display)
    assert signal.getsignal(signal.SIGTERM) == handler


def of_two(rank: int, port: int, folder: Path) -> None:
    """Run a grid next to another rank; its first run diverges."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    grid = load_grid(folder / "c.yaml", [], ["optim.lr=1e30,1e-3", "loss.beta=0.1,0.2"])
    with distributed.process_group():
        for _ in range(2):
            outcomes = grids.run(grid, Display(Console(quiet=True)))
    (folder / f"{rank}.json").write_text(json.dumps(statuses(outcomes)))


def test_the_ranks_walk_the_same_list(grid_of: Callable[..., Grid], tmp_path: Path) -> None:
    grid = grid_of(BETAS)
    rank_processes.start(of_two, 2, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (
        first
        == second
        == {
            "lr=1e30,beta=0.1": "diverged",
            "lr=1e30,beta=0.2": "diverged",
            "lr=0.001,beta=0.1": "finished",
            "lr=0.001,beta=0.2": "finished",
        }
    )
    assert [run["name"] for run in written(grid)["runs"]] == list(first)
