"""One life of a training in a forked process: its end, and the rows that it trained on.

A place is a function that training calls. The life ends when the function is entered or left for
the n-th time, so that every place is tried, however short it lasts; a write of a checkpoint ends
half-way.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed.checkpoint.staging import DefaultStager

from fastpref import cli, metrics
from fastpref.data import dataset
from fastpref.model import export, reference_policy
from fastpref.training import (
    checkpoint,
    checkpoint_files,
    exports,
    forward,
    model_card,
    setup,
    step_gradient,
    trainer,
)

# Places where a life may end: the namespace and the name of the function that training calls.
PLACES: dict[str, tuple[Any, str]] = {
    "tokens: written": (dataset, "_write"),
    "model: loaded": (setup, "load_policy"),
    "reference: taken in": (reference_policy._PartialLogps, "merge"),
    "reference: written": (reference_policy, "save_file"),
    "step: forward": (forward.Forward, "__call__"),
    "step: backward": (step_gradient.Gradient, "backward"),
    "step: gradients complete": (step_gradient.Gradient, "finish"),
    "step: updated": (metrics.Window, "add"),
    "step: metrics written": (metrics.JsonLines, "log"),
    "checkpoint: begun": (checkpoint.Checkpoints, "save"),
    "checkpoint: staged": (DefaultStager, "stage"),
    "checkpoint: half written": (checkpoint_files._ChecksumWriter, "write"),
    "checkpoint: index": (checkpoint_files.CheckpointWriter, "finish"),
    "checkpoint: renamed": (checkpoint, "replace"),
    "checkpoint: dropped": (checkpoint, "discard"),
    "checkpoint: read": (checkpoint, "restore"),
    "export: written": (exports, "export"),
    "export: weights": (export, "_exported_dtype"),
    "export: card": (model_card, "write"),
    "any file: synced": (os, "fsync"),
    "any file: renamed": (os, "replace"),
    "any file: removed": (os, "unlink"),
    "any folder: removed": (shutil, "rmtree"),
}
HOW = ("SIGKILL", "SIGTERM", "Ctrl-C twice")


@dataclass(frozen=True)
class End:
    """End of a life by `how`, when `place` is entered or left for the `count`-th time."""

    how: str
    place: str
    count: int


def live(command: list[str], record: Path, ranks: dict[str, str], end: End | None) -> NoReturn:
    """Run the command line in this forked process, and exit.

    record: file for the rows of each complete step; the output goes to a file next to it. ranks:
    the environment variables of torchrun.
    """
    output = os.open(record.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= ranks
    sys.argv = ["fastpref", "train", *command]
    record_rows(record)
    if end is not None:
        end_at(end)
    code: Any = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    record.with_suffix(".modules").write_text("\n".join(sys.modules))
    os._exit(code if isinstance(code, int) else 0)


def record_rows(path: Path) -> None:
    """Write a line for every complete step: its number and its rows."""
    seen: list[int] = []
    micro_batches, step = setup.DataView.micro_batches, trainer.Trainer._train_step
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noting(self: Any, policy: Any, number: int) -> Any:
        for micro_batch in micro_batches(self, policy, number):
            seen.extend(self.groups[index].row for index in micro_batch.groups)
            yield micro_batch

    def recording(self: Any, with_entropy: bool) -> Any:
        seen.clear()
        tally = step(self, with_entropy)
        os.write(descriptor, (json.dumps({"step": self.step, "rows": seen}) + "\n").encode())
        return tally

    setup.DataView.micro_batches = noting  # type: ignore[method-assign, assignment]
    trainer.Trainer._train_step = recording  # type: ignore[method-assign]


def end_at(end: End, note: Callable[[], None] = lambda: None) -> None:
    """Let this process end at a place; `note` is called before."""
    owner, name = PLACES[end.place]
    function, left = getattr(owner, name), end.count

    def passed() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def ending(*arguments: Any, **options: Any) -> Any:
        if passed():
            if end.place == "checkpoint: half written":
                arguments = _half(function, *arguments)
            note()
            send(end.how)
        result = function(*arguments, **options)
        if passed():
            note()
            send(end.how)
        return result

    setattr(owner, name, ending)


def _half(write: Callable[..., int], file: Any, data: bytes) -> tuple[Any, bytes]:
    """Write half of the data; a life that goes on after a signal writes the rest."""
    write(file, data[: len(data) // 2])
    file.flush()
    return file, data[len(data) // 2 :]


def send(how: str, pid: int | None = None) -> None:
    """The signals of an end, to a process or to this one."""
    numbers = {"SIGKILL": [signal.SIGKILL], "SIGTERM": [signal.SIGTERM]}
    for number in numbers.get(how, [signal.SIGINT] * 2):
        if pid is None and threading.current_thread() is threading.main_thread():
            signal.raise_signal(number)
            continue
        os.kill(pid or os.getpid(), number)
        time.sleep(0.01)  # signals at the same moment arrive as one
