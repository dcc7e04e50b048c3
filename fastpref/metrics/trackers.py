"""Trackers that log metrics: `metrics.jsonl`, and others by name; see docs/trackers.md.

A resumed run goes on in the same run of each tracker, whose name there is in `trackers.json` of the
run directory.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from fastpref import distributed
from fastpref.utils.atomic_files import replacing
from fastpref.utils.errors import UserError, first_line

_PROJECT = "fastpref"  # unless the tracker's own variable names another


class Tracker(Protocol):
    """Destination of metrics records."""

    def log(self, metrics: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """The file `metrics.jsonl`: one JSON object per line, each with its `step`."""

    def __init__(self, path: Path, resume_step: int) -> None:
        # Records after the checkpoint will be written again.
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for record in iter_records(path) if resume_step else ():
                if record["step"] <= resume_step:
                    file.write(json.dumps(record) + "\n")
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: dict[str, Any]) -> None:
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard event files in `tensorboard/` of the run directory."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _missing("tensorboard") from None
        events = folder / "tensorboard"
        _keep_order(events)
        self._writer: Any = SummaryWriter(str(events), purge_step=resume_step + 1)

    def log(self, metrics: dict[str, Any]) -> None:
        for name, value in _numbers(metrics).items():
            self._writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run; WANDB_PROJECT names its project."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        wandb = _import("wandb")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=folder.name,
            id=_name_in("wandb", folder, lambda: uuid.uuid4().hex[:8]),
            dir=folder,
            config=config,
            resume="allow",
        )

    def log(self, metrics: dict[str, Any]) -> None:
        self._run.log(_numbers(metrics), step=metrics["step"])

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """An MLflow run; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say where."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        mlflow = _import("mlflow")
        self._entities = importlib.import_module("mlflow.entities")
        self._client: Any = mlflow.MlflowClient()
        self._id = _name_in("mlflow", folder, lambda: self._begin(folder.name, config))
        self._client.update_run(self._id, status="RUNNING")

    def _begin(self, name: str, config: dict[str, Any]) -> str:
        """Start a run with the fields of a config as its parameters, and return its id."""
        experiment_name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(experiment_name)
        if experiment is None:
            experiment_id = self._client.create_experiment(experiment_name)
        else:
            experiment_id = experiment.experiment_id
        run_id = str(self._client.create_run(experiment_id, run_name=name).info.run_id)
        # The longest value and the most parameters of a request that every store takes.
        params = [
            self._entities.Param(key, str(value)[:500]) for key, value in _fields(config).items()
        ]
        for start in range(0, len(params), 100):
            self._client.log_batch(run_id, params=params[start : start + 100])
        return run_id

    def log(self, metrics: dict[str, Any]) -> None:
        now, step = int(time.time() * 1000), metrics["step"]
        values = [
            # Names have letters, digits and these signs; a source may be called by others.
            self._entities.Metric(re.sub(r"[^\w .:/-]", "_", name), float(value), now, step)
            for name, value in _numbers(metrics).items()
        ]
        self._client.log_batch(self._id, metrics=values)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Trackio:
    """A Trackio run; TRACKIO_PROJECT names its project, and TRACKIO_SPACE_ID a Space."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        trackio = _import("trackio")
        # A name is all that Trackio knows a run by, and other folders may have the same.
        name = _name_in("trackio", folder, lambda: f"{folder.name}-{uuid.uuid4().hex[:8]}")
        self._run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=name,
            space_id=os.environ.get("TRACKIO_SPACE_ID"),
            config=_fields(config),
            resume="allow",
            embed=False,
        )

    def log(self, metrics: dict[str, Any]) -> None:
        self._run.log(_numbers(metrics), step=metrics["step"])

    def close(self) -> None:
        self._run.finish()


class Forgiving:
    """Tracker that ends with a note, and not the run, when it fails, e.g. without a network."""

    def __init__(self, name: str, tracker: Tracker, note: Callable[[str], object]) -> None:
        self._name, self._note = name, note
        self._tracker: Tracker | None = tracker

    def log(self, metrics: dict[str, Any]) -> None:
        if self._tracker is None:
            return
        try:
            self._tracker.log(metrics)
        except Exception as error:  # each package raises types of its own
            self._tracker = None
            self._note(
                f"{self._name} gets no more metrics, which metrics.jsonl has: {first_line(error)}"
            )

    def close(self) -> None:
        if self._tracker is None:
            return
        try:
            self._tracker.close()
        except Exception as error:  # each package raises types of its own
            self._note(f"{self._name} cannot end its run: {first_line(error)}")


def open_trackers(
    folder: Path,
    names: Iterable[str],
    config: dict[str, Any],
    resume_step: int,
    note: Callable[[str], object] = print,
) -> list[Tracker]:
    """Open the metrics file and the trackers of `names`; drop records after `resume_step`.

    note: gets a sentence about a tracker that fails later.

    Only rank 0 logs metrics; the list is empty on other ranks. Raises UserError in one line for a
    tracker that cannot be opened.
    """
    if not distributed.is_main_process():
        return []
    opened: list[Tracker] = [JsonLines(folder / "metrics.jsonl", resume_step)]
    for name in names:
        try:
            opened.append(Forgiving(name, _open(name, folder, config, resume_step), note))
        except Exception as error:  # each package raises types of its own: login, network, quota
            for tracker in opened:
                tracker.close()
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"training.report_to: cannot open {name}: {first_line(error)}; fix it, or remove "
                f"{name}"
            ) from None
    return opened


def _open(name: str, folder: Path, config: dict[str, Any], resume_step: int) -> Tracker:
    if name == "tensorboard":
        return TensorBoard(folder, resume_step)
    openers: dict[str, Callable[[Path, dict[str, Any]], Tracker]]
    openers = {"wandb": WandB, "mlflow": MLflow, "trackio": Trackio}
    return openers[name](folder, config)


def iter_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics file, which may have one line per step of a long run.

    An incomplete last line, left by a crash, is skipped.
    """
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read all records of a metrics file."""
    return list(iter_records(path))


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise _missing(package) from None


def _missing(name: str) -> UserError:
    return UserError(f"training.report_to: {name} is not installed; pip install {name}")


def _name_in(tracker: str, folder: Path, begin: Callable[[], str]) -> str:
    """Name of this run in a tracker; of a new run, what `begin` returns, which is saved."""
    path = folder / "trackers.json"
    names: dict[str, str] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if tracker not in names:
        names[tracker] = begin()
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(names, indent=1), encoding="utf-8")
    return names[tracker]


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Metrics that are numbers, without the step."""
    return {
        name: value
        for name, value in metrics.items()
        if name != "step" and isinstance(value, int | float)
    }


def _fields(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields of a config by their paths, such as `optim.lr`."""
    fields: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            fields |= _fields(value, f"{prefix}{key}.")
        else:
            fields[f"{prefix}{key}"] = value
    return fields


def _keep_order(events: Path) -> None:
    """Let earlier event files sort before the next one, though the clock was set back meanwhile.

    TensorBoard reads them in the order of their names, which begin with the time.
    """
    pattern = re.compile(r"events\.out\.tfevents\.(\d+)\.(.*)")
    files = sorted(path for path in events.glob("events.*") if pattern.fullmatch(path.name))
    times = [int(path.name.split(".")[3]) for path in files]
    if not times or max(times) < int(time.time()):
        return
    for k, path in enumerate(files):
        rest = path.name.split(".", 4)[4]
        path.rename(events / f"events.out.tfevents.{k:010d}.{rest}")
