"""Runs of a grid, one after the other; a grid that was stopped goes on where it stopped.

Runs share what is kept on disk: tokens and reference log-probs, in `data.cache`. Each run reads
its model anew, so that it starts from the same state as a run of its own.
"""

from __future__ import annotations

import gc
import json
import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fastpref import distributed, metrics
from fastpref.config import Config, ConfigError, load
from fastpref.config.grid import Grid, Point
from fastpref.config.yaml_io import flatten, parse_yaml
from fastpref.training import checkpoint_files, run_lock, signals
from fastpref.training.nonfinite import Diverged
from fastpref.training.rank_checks import check_same_config
from fastpref.training.trainer import train
from fastpref.utils.atomic_files import replacing
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display

Status = Literal["waiting", "running", "stopped", "failed", "finished", "diverged"]
# Statuses that a folder has by itself, and that are not run again.
_ENDED: tuple[Status, ...] = ("finished", "diverged")
# Fields without an effect on metrics and weights.
_WITHOUT_EFFECT = (
    "training.output_dir",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.report_to",
    "data.cache",
    "resume",
)


@dataclass
class Outcome:
    """State of one run, and the error that ended it if one did."""

    point: Point
    status: Status
    error: str | None = None


def run(grid: Grid, display: Display, profile: bool = False) -> list[Outcome]:
    """Train all runs that have not ended, and keep `grid.json` in the folder up to date.

    A run that diverges, or that a UserError ends, is recorded and the next one begins; but the
    error of the first run that trains is raised, since it may well be every run's, and so is any
    error on several ranks, which need not have it together. Raises ConfigError before the first
    run if a folder holds another run, and Interrupted after SIGTERM or Ctrl-C.
    """
    if (grid.folder / "metrics.jsonl").exists():
        raise ConfigError(
            f"training.output_dir: {grid.folder} holds a run; choose another folder for a grid"
        )
    check_same_config(point.config for point in grid.points)
    with run_lock.hold(grid.folder), signals.raising():
        outcomes = _earlier_outcomes(grid.points)
        _write(grid.folder, outcomes)
        may_fail = False
        for number, outcome in enumerate(outcomes, 1):
            ended = f": {outcome.status} before" if outcome.status in _ENDED else ""
            display.note(f"run {number} of {len(outcomes)}: {outcome.point.name}{ended}")
            if not ended:
                with _recorded(grid.folder, outcomes, outcome):
                    _train(outcome, display, profile, may_fail)
                may_fail = distributed.world_size() == 1
                _release(outcome.point.config)
    return outcomes


@contextmanager
def _recorded(folder: Path, outcomes: Sequence[Outcome], current: Outcome) -> Iterator[None]:
    """Context manager that writes the status of a run at its begin and end, however it ends."""
    current.status = "running"
    _write(folder, outcomes)
    try:
        yield
    except (signals.Interrupted, KeyboardInterrupt) as stop:
        # A run that a signal reaches in its last step is finished.
        if current.status == "running":
            current.status = "stopped"
        signum = stop.signum if isinstance(stop, signals.Interrupted) else signal.SIGINT
        raise _interrupted(signum, outcomes, current) from None
    finally:
        # An error that is not the user's, such as memory that runs out.
        if current.status == "running":
            current.status = "failed"
        _write(folder, outcomes)


def _train(outcome: Outcome, display: Display, profile: bool, may_fail: bool) -> None:
    """Train one run; raises Interrupted, too, if a signal arrived in its last step.

    may_fail: record a UserError instead of raising it.
    """
    received: list[int] = []
    try:
        train(outcome.point.config, display, profile, received)
        outcome.status = "finished"
    except Diverged as error:
        outcome.status, outcome.error = "diverged", str(error)
        display.note(str(error))
    except UserError as error:
        outcome.status, outcome.error = "failed", str(error)
        if not may_fail:
            raise
        display.note(f"failed: {error}")
    # The ranks must agree: the signal may have reached one of them only.
    if not distributed.all_ranks(not received):
        raise signals.Interrupted(received[0] if received else signal.SIGTERM, "interrupted")


def _interrupted(signum: int, outcomes: Sequence[Outcome], last: Outcome) -> signals.Interrupted:
    """Error that ends the grid; rank 0 says how it continues."""
    count = sum(outcome.status in _ENDED for outcome in outcomes)
    message = (
        f"grid stopped by {signals.describe(signum)} in run {last.point.name}, {count} of "
        f"{len(outcomes)} runs are done; continue with the same command"
    )
    return signals.Interrupted(signum, message if distributed.is_main_process() else "")


def _earlier_outcomes(points: Sequence[Point]) -> list[Outcome]:
    """Find out which runs have ended; the same on all ranks. Raises ConfigError as `run` does."""
    outcomes, refusal = [], None
    for point in points:
        try:
            outcomes.append(_earlier_outcome(point))
        except ConfigError as error:
            refusal = refusal or error
    if not distributed.all_ranks(refusal is None):
        raise refusal or ConfigError(
            "training.output_dir: another rank finds a run that is in the way; look at its error"
        )
    for outcome in outcomes:
        # A rank of another node may not see the folder of rank 0.
        for status in _ENDED:
            if not distributed.all_ranks(outcome.status != status):
                outcome.status = status
    return outcomes


def _earlier_outcome(point: Point) -> Outcome:
    """Read from the folder of a run whether it has ended, and check that it has the same config."""
    folder, divergence = point.folder, point.folder / "nonfinite.json"
    outcome = Outcome(point, "waiting")
    if (folder / "model").exists():
        outcome.status = "finished"
    elif divergence.exists():
        outcome.status = "diverged"
        with suppress(ValueError, OSError, KeyError, TypeError):
            report = json.loads(divergence.read_text(encoding="utf-8"))
            outcome.error = f"{report['metric']} is {report['value']} at step {report['step']}"
    elif not checkpoint_files.complete_steps(folder / "checkpoints"):
        return outcome
    differences = _differences(point.config, load(folder / "config.yaml"))
    if differences:
        raise ConfigError(
            f"training.output_dir: {folder} is of another config ({', '.join(differences)}); "
            "restore it, remove the folder or choose another"
        )
    return outcome


def _differences(config: Config, saved: Config) -> list[str]:
    """Return `field: old → new` for every field with an effect in which a saved config differs."""
    old, new = (flatten(parse_yaml(each.to_yaml())) for each in (saved, config))
    return [
        f"{field}: {old.get(field)} → {new.get(field)}"
        for field in {**old, **new}
        if old.get(field) != new.get(field) and field not in _WITHOUT_EFFECT
    ]


def _release(config: Config) -> None:
    """Free what the last run holds, so that the next one begins as in a process of its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    # Linux resets the peak of the resident memory for this value.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if config.training.compile:
        torch.compiler.reset()  # or the blocks of later models exceed the limit of recompilations


def _write(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Write `grid.json`: values, status and last metrics of every run."""
    if not distributed.is_main_process():
        return
    runs = [
        {
            "name": outcome.point.name,
            "values": outcome.point.values,
            "status": outcome.status,
            "error": outcome.error,
            "metrics": _last_metrics(outcome.point.folder / "metrics.jsonl"),
        }
        for outcome in outcomes
    ]
    text = json.dumps({"keys": list(outcomes[0].point.values), "runs": runs}, indent=1)
    with replacing(folder / "grid.json") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _last_metrics(path: Path) -> dict[str, float]:
    """Last value of every metric that is a finite number; none of a file that is damaged."""
    last: dict[str, float] = {}
    with suppress(ValueError, AttributeError):
        for record in metrics.iter_records(path):
            numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
            last |= {name: value for name, value in numbers.items() if math.isfinite(value)}
    return last
