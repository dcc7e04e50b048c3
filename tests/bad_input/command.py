"""What a case of bad input is, and the command line that meets it."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml

from fastpref.cli import main

SECONDS = 30  # of processor time, after which a command hangs; a busy machine is nobody's fault
# A run that goes on past its data asks for a GPU next, and there is none: so far, all was well.
PAST_THE_DATA = "training.device: cuda is asked for, but torch finds no GPU; use cpu or auto"
# What a refused run may leave: its lock, and tokens that the next run need not make again.
_LEFT = ("run", "run/lock", "cache", "cache/*")
# An error says what to do: in words such as these, or by naming what is accepted.
_ADVICE = re.compile(
    r"\b(accepted|add|are|check|choose|close|did you mean|end|expected|fix|give|known|leave|look|"
    r"lower|make|mend|merge|must|name|needs|pip|plan|raise|remove|restore|run|see|set|start|supported|"
    r"train|use|wait|write)\b"
)

Rows = list[Any]
Make = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """A broken input and the line that it is refused with.

    says: the line behind `error: `, with `*` for what differs between machines; None where the
        input is odd but legal, and the command ends with exit code 0.
    config: laid over `BASE`, section by section; None takes a key away. Or the YAML itself.
    data: rows, or the bytes of the training file.
    make: whatever else is put into the working folder.
    arguments: of the command line behind `fastpref`.
    """

    name: str
    says: str | None
    config: dict[str, Any] | str | bytes = field(default_factory=dict)
    data: Rows | bytes | None = None
    file: str = "pairs.jsonl"
    make: Make | None = None
    arguments: tuple[str, ...] = ("train", "c.yaml", "--dry-run")
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


BASE: dict[str, Any] = {
    "model": {"path": "llama", "dtype": "float32"},
    "data": {"train": "pairs.jsonl", "max_length": 64, "cache": "cache"},
    "loss": {"name": "dpo"},
    "training": {"device": "cpu", "batch_size": 4, "checkpoint_every": None, "output_dir": "run"},
}


def laid_over(base: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    made = {section: dict(values) for section, values in base.items()}
    for name, value in config.items():
        if isinstance(value, dict) and name in ("model", "data", "training"):
            made[name] = {**made[name], **value}
        else:
            made[name] = value
    return {
        name: {k: v for k, v in value.items() if v is not None}
        if isinstance(value, dict)
        else value
        for name, value in made.items()
    }


class Outcome:
    """Exit code, both outputs, and what became of the files."""

    def __init__(self, code: int, out: str, err: str, changed: list[str]) -> None:
        self.code, self.out, self.err, self.changed = code, out, err, changed

    def check(self, case: Case) -> None:
        """Of a refusal: one line, what to do, nothing written; of a legal input: no error."""
        assert "Traceback" not in self.err + self.out
        if case.says is None:
            assert (self.code, self.err) == (0, ""), self.err
            return
        assert self.code == 2, (self.code, self.err)
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        said = self.err.removeprefix("error: ").rstrip("\n")
        wanted = case.says.replace("[", "[[]")  # to fnmatch a bracket begins a set of characters
        assert fnmatch.fnmatchcase(said, wanted), said
        assert advises(said), said
        assert self.changed == []


def advises(said: str) -> bool:
    return _ADVICE.search(said) is not None


@contextmanager
def limited() -> Iterator[None]:
    """Raise TimeoutError within, after `SECONDS`."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"hangs: {SECONDS} seconds are over")

    usual = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, usual)


class Shell:
    """`fastpref`, as its users call it, in a folder of its own; in this process, to be fast."""

    def __init__(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.folder, self._capsys, self._monkeypatch = folder, capsys, monkeypatch
        monkeypatch.chdir(folder)
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        # Without torch the missing GPU would be found before the data are read.
        monkeypatch.setattr("fastpref.cli.preflight.has_no_gpu", lambda: False)
        monkeypatch.setenv("COLUMNS", "200")

    def prepare(self, case: Case) -> None:
        if isinstance(case.config, dict):
            text = yaml.safe_dump(laid_over(BASE, case.config), allow_unicode=False).encode()
        else:
            text = case.config.encode() if isinstance(case.config, str) else case.config
        (self.folder / "c.yaml").write_bytes(text)
        if isinstance(case.data, bytes):
            (self.folder / case.file).write_bytes(case.data)
        elif case.data is not None:
            lines = "".join(json.dumps(row) + "\n" for row in case.data)
            (self.folder / case.file).write_text(lines)
        if case.make is not None:
            case.make(self.folder)

    def __call__(self, *arguments: str, **environment: str) -> Outcome:
        before = files(self.folder)
        self._capsys.readouterr()
        code = 0
        with self._monkeypatch.context() as patch, limited():
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["fastpref", *arguments])
            try:
                main()
            except SystemExit as stop:
                code = int(stop.code or 0)
        out, err = self._capsys.readouterr()
        after = files(self.folder)
        changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        return Outcome(code, out, err, sorted(changed))

    def meet(self, case: Case) -> Outcome:
        self.prepare(case)
        outcome = self(*case.arguments, **case.environment)
        outcome.check(case)
        return outcome


def files(folder: Path) -> dict[str, bytes | None]:
    """What is in a folder, without what a refused run may leave there; of folders None."""
    found: dict[str, bytes | None] = {}
    for root, folders, names in os.walk(folder):  # not through links: models are shared
        for name in folders + names:
            path = Path(root) / name
            relative = path.relative_to(folder).as_posix()
            if not any(fnmatch.fnmatch(relative, pattern) for pattern in _LEFT):
                found[relative] = path.read_bytes() if path.is_file() else None
    return found
