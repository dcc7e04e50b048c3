"""Signals and a closed output end a run after its step, with a checkpoint."""

from __future__ import annotations

import errno
import io
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from rich.console import Console

from fastpref.config import Config
from fastpref.training import signals
from fastpref.training.signals import Interrupted
from fastpref.training.trainer import Trainer, train
from fastpref.utils.progress import Display
from tests.helpers.training_runs import records, run

MakeConfig = Callable[..., Config]
WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(autouse=True)
def _no_nohup() -> Iterator[None]:
    """The default action of SIGHUP, which is ignored where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, *WARNINGS])
def test_a_signal_is_kept_and_said(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with signals.collecting() as received:
        signal.raise_signal(number)
    assert received == [number] and signal.getsignal(number) == before
    assert capfd.readouterr().err.strip() == (
        f"{number.name}: the run ends after this step, with a checkpoint; a second Ctrl-C or "
        "SIGTERM ends it at once"
    )


def test_a_closing_terminal_may_send_its_signal_twice(capfd: pytest.CaptureFixture[str]) -> None:
    with signals.collecting() as received:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
    assert received == [signal.SIGHUP]
    assert capfd.readouterr().err.count("the run ends") == 1


def test_a_second_ctrl_c_ends_at_once_and_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), signals.collecting() as received:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert received == [signal.SIGINT]
    assert capfd.readouterr().err.endswith(
        "ended before the checkpoint of this step; resume=auto continues from the last one\n"
    )


def test_the_command_says_that_it_was_interrupted(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    fastpref: Callable[..., CompletedProcess[str]],
) -> None:
    def interrupted(trainer: Trainer, with_entropy: bool) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    (tmp_path / "c.yaml").write_text(make_config().to_yaml())
    done = fastpref("train", str(tmp_path / "c.yaml"))
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_nohup_keeps_a_run_alive() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.raising(), signals.collecting() as received:
            signal.raise_signal(signal.SIGHUP)
        assert received == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", WARNINGS)
def test_a_grid_is_stopped_by_each(number: signal.Signals) -> None:
    with pytest.raises(Interrupted) as stop, signals.raising():
        signal.raise_signal(number)
    assert stop.value.signum == number


def closed() -> Display:
    """A display whose output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return Display(Console(file=os.fdopen(writer, "w")))


def test_a_closed_output_stops_a_run_with_a_checkpoint(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    whole, config = make_config(training__output_dir=str(tmp_path / "whole")), make_config()
    run(whole, display)
    message = (
        r"stopped by SIGPIPE \(the output was closed\) after step 1; continue with resume=auto"
    )
    with pytest.raises(Interrupted, match=message) as stop:
        train(config, closed())
    assert stop.value.signum == 13
    run(make_config(resume="auto"), display)
    assert records(config) == records(whole)


def test_other_errors_of_the_output_are_raised() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        Display(Console(file=Full())).note("a line")
