"""The clock of a run, by a time that the test sets."""

from __future__ import annotations

import pytest

from fastpref.training import clock as module
from fastpref.training.clock import Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    return time


def test_evaluations_and_pauses_are_no_training(now: list[float]) -> None:
    clock = Clock()
    now[0] += 5
    began = clock.seconds()
    now[0] += 3
    assert clock.evaluated(0, began) == 3
    with clock.pause():
        now[0] += 7
    now[0] += 1
    assert clock.seconds() == 6


@pytest.mark.parametrize(
    ("step", "every", "seconds"),
    [(0, None, 4), (0, 5, 12), (4, 5, 12), (5, 5, 8), (10, 5, 4), (12, 5, 0), (0, 4, 12)],
)
def test_the_evaluations_to_come_take_what_they_took(
    now: list[float], step: int, every: int | None, seconds: float
) -> None:
    """Of a run of 12 steps, in which an evaluation of two sets of data takes 1 and 3 seconds."""
    clock = Clock()
    assert clock.evaluations_left(step, 12, every) == 0
    for taken in (1, 3):
        began = clock.seconds()
        now[0] += taken
        clock.evaluated(0, began)
    assert clock.evaluations_left(step, 12, every) == seconds
