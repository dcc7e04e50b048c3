"""Progress of a command: a progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import IO, Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Bar(Progress):
    """Progress bar with a status line below it, so that narrow terminals show both."""

    status = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.status:
            yield Text(self.status)


class _TimeLeft(TimeRemainingColumn):
    """Time that the phase says is left, else an estimate from its pace."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("left")
        return super().render(task) if left is None else Text(left)


class _Output:
    """Stream that takes no more once nobody reads it: a pipe or a terminal that was closed."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.is_closed = False

    def write(self, text: str) -> int:
        with self._noticing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._noticing():
            self._stream.flush()

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self.is_closed = True
            # Python would fail again when it flushes the stream at its end.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_PLAIN_EVERY = 5.0  # seconds between plain lines of phases other than training


class Display:
    """Display of one phase at a time: `phase("train", total)`, then `advance` and `metrics`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._output = _Output(console.file)
        console.file = self._output  # type: ignore[assignment]
        self._bar: _Bar | None = None
        self._task: TaskID | None = None
        self._name, self._total, self._last = "", 0, 0.0

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._bar = _Bar(
                TextColumn("[bold]{task.description:<10}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                _TimeLeft(),
                console=self.console,
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def is_closed(self) -> bool:
        """Whether nobody reads the output any more; what is printed then is dropped."""
        return self._output.is_closed

    def note(self, text: str) -> None:
        """Print a line of text above the progress bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Start a phase of `total` units, of which `done` are finished."""
        self._name, self._total, self._last = name, total, time.monotonic()
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(name, total=total, completed=done)
            self._bar.status = ""

    def advance(self, done: int) -> None:
        """Set the number of finished units; plain output prints it every few seconds."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)
        elif self._name != "train" and time.monotonic() - self._last > _PLAIN_EVERY:
            self._last = time.monotonic()
            self.note(f"{self._name} {done:,}/{self._total:,}")

    def metrics(
        self,
        record: dict[str, Any],
        seconds_left: float | None = None,
        evaluations_left: float = 0.0,
    ) -> None:
        """Show one record of training metrics.

        seconds_left: of training alone; evaluations_left: seconds of the evaluations to come.
        """
        shown = status(record)
        if self._bar is not None and self._task is not None:
            self._bar.status = shown
            self._bar.update(self._task, left=_left(seconds_left, evaluations_left))
            self._bar.refresh()
        else:
            left = _left(seconds_left, evaluations_left)
            text = f"step {record['step']:,}/{self._total:,}  {shown}"
            self.note(f"{text}  {left} left" if left else text)


def _left(seconds: float | None, evaluations: float) -> str | None:
    if seconds is None:
        return None
    left = format_duration(seconds)
    return f"{left} + {format_duration(evaluations)} of evaluation" if evaluations else left


def status(record: dict[str, Any]) -> str:
    """One line of text with loss, rewards, accuracy, KL, speed and memory of a metrics record."""
    parts = [f"loss {record['loss']:.4f}" if "loss" in record else "all steps skipped"]
    # Margins are missing if all responses have the same label.
    if "rewards/margins" in record:
        parts.append(f"margin {record['rewards/margins']:+.3f}")
    if "rewards/accuracies" in record:
        parts.append(f"accuracy {record['rewards/accuracies']:.2f}")
    if "reward" in record:
        parts.append(f"reward {record['reward']:.3f}")
    if "kl" in record:
        parts.append(f"KL {record['kl']:.3f}")
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:,.0f} tok/s")
    if "peak_memory_gib" in record:
        parts.append(f"{record['peak_memory_gib']:.2f} GiB")
    return "  ".join(parts)


def evaluation(record: dict[str, Any]) -> str:
    """One line of text with the metrics of an evaluation."""
    parts = [f"eval at step {record['step']:,}", f"loss {record['eval_loss']:.4f}"]
    if "eval_rewards/margins" in record:
        parts.append(f"margin {record['eval_rewards/margins']:+.3f}")
    if "eval_preference/mean_kl" in record:
        parts.append(f"accuracy {record['eval_preference/accuracy']:.3f}")
        parts.append(f"KL to p {record['eval_preference/mean_kl']:.3f}")
        parts.append(f"PCI {record['eval_preference/pci']:.3f}")
    elif "eval_rewards/accuracies" in record:
        parts.append(f"accuracy {record['eval_rewards/accuracies']:.3f}")
    if "eval_runtime" in record:
        parts.append(format_duration(record["eval_runtime"]))
    return "  ".join(parts)


def format_duration(seconds: float) -> str:
    """Duration in its largest unit, such as `1.5 h`, `12.0 min` or `0.21 s`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s"


def quiet_libraries() -> None:
    """Silence warnings and progress bars of libraries, which would break the progress display."""
    import logging
    import warnings

    import datasets
    import transformers
    from huggingface_hub.utils import logging as hub

    # torch warns when a single process saves a distributed checkpoint.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    # fastpref raises its own errors for the problems that these libraries warn of.
    warnings.filterwarnings("ignore", module="peft|transformers")
    # bitsandbytes warns of a missing kernel even in runs that quantize nothing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Silences the Hub's retry log.
    hub.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
