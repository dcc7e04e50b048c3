"""Trackers by name: what they get, that a resumed run goes on in the same run, and failures."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fastpref import metrics
from fastpref.utils.errors import UserError
from tests.helpers import tracker_packages

CONFIG: dict[str, Any] = {"optim": {"lr": 1e-6}, "adapter": None, "long": "x" * 900}
NAMES = ("wandb", "mlflow", "trackio")


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> dict[str, tracker_packages.Store]:
    return tracker_packages.install(monkeypatch)


def log(folder: Path, name: str, steps: list[int], resume_step: int = 0) -> list[str]:
    """Log some steps in a run directory; return the notes."""
    folder.mkdir(exist_ok=True)
    notes: list[str] = []
    trackers = metrics.open_trackers(folder, [name], CONFIG, resume_step, notes.append)
    for step in steps:
        for tracker in trackers:
            tracker.log({"step": step, "loss": 1 / step, "loss/spikes": {"1": 2.0}})
    for tracker in trackers:
        tracker.close()
    return notes


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_goes_on_in_the_same_run(
    stores: dict[str, tracker_packages.Store], tmp_path: Path, name: str
) -> None:
    store = stores[name]
    log(tmp_path / "run", name, [1, 2])
    log(tmp_path / "run", name, [3], resume_step=2)
    assert [*store.metrics.values()] == [
        [(1, {"loss": 1.0}), (2, {"loss": 0.5}), (3, {"loss": 1 / 3})]
    ]
    assert [*store.status.values()] == ["FINISHED"]


@pytest.mark.parametrize("name", NAMES)
def test_folders_of_the_same_name_are_runs_of_their_own(
    stores: dict[str, tracker_packages.Store], tmp_path: Path, name: str
) -> None:
    for home in ("a", "b"):
        (tmp_path / home).mkdir()
        log(tmp_path / home / "run", name, [1])
    assert len(stores[name].metrics) == 2


def test_a_run_has_its_name_its_config_and_the_project_that_a_variable_names(
    stores: dict[str, tracker_packages.Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        log(tmp_path / "run", name, [1])
    (wandb,) = stores["wandb"].settings.values()
    (mlflow,) = stores["mlflow"].settings.values()
    ((trackio_name, trackio),) = stores["trackio"].settings.items()
    assert (wandb["project"], wandb["name"], wandb["config"]) == ("fastpref", "run", CONFIG)
    assert mlflow["name"] == "run"
    assert mlflow["params"] == {"optim.lr": "1e-06", "adapter": "None", "long": "x" * 500}
    assert trackio["project"] == "fastpref" and trackio_name.startswith("run-")
    assert trackio["config"] == {"optim.lr": 1e-6, "adapter": None, "long": "x" * 900}
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    log(tmp_path / "other", "wandb", [1])
    assert [run["project"] for run in stores["wandb"].settings.values()] == ["fastpref", "theirs"]


@pytest.mark.parametrize("name", NAMES)
def test_a_network_that_breaks_ends_the_tracker_and_not_the_run(
    stores: dict[str, tracker_packages.Store], tmp_path: Path, name: str
) -> None:
    stores[name].fails_at = 2
    notes = log(tmp_path / "run", name, [1, 2, 3])
    assert notes == [f"{name} gets no more metrics, which metrics.jsonl has: no route to host"]
    assert [step for step, _ in next(iter(stores[name].metrics.values()))] == [1]
    assert len(metrics.read_records(tmp_path / "run" / "metrics.jsonl")) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_that_cannot_be_opened_is_one_line(
    stores: dict[str, tracker_packages.Store],
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("log in first\nsee the manual")

    part = {"wandb": "init", "trackio": "init", "mlflow": "MlflowClient"}[name]
    monkeypatch.setattr(sys.modules[name], part, refuse)
    with pytest.raises(UserError) as error:
        log(tmp_path / "run", name, [1])
    message = f"training.report_to: cannot open {name}: log in first; fix it, or remove {name}"
    assert str(error.value) == message


@pytest.mark.parametrize("name", NAMES)
def test_trackers_that_are_not_installed_say_how_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    message = f"training.report_to: {name} is not installed; pip install {name}"
    with pytest.raises(UserError, match=message):
        metrics.open_trackers(tmp_path, [name], {}, 0)


def test_tensorboard_shows_the_resumed_steps_though_the_clock_was_set_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log(tmp_path, "tensorboard", [1, 2, 3])
    events = tmp_path / "tensorboard"
    (file,) = events.iterdir()
    file.rename(events / re.sub(r"tfevents\.\d+", "tfevents.9999999999", file.name))
    log(tmp_path, "tensorboard", [3, 4], resume_step=2)
    shown = EventAccumulator(str(events)).Reload()
    assert [event.step for event in shown.Scalars("loss")] == [1, 2, 3, 4]
