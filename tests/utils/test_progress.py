"""Progress output: bar and numbers on a narrow terminal, plain lines elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from fastpref.utils.progress import Display, evaluation

RECORD = {
    "step": 2,
    "loss": 0.5,
    "rewards/margins": 0.25,
    "rewards/accuracies": 0.75,
    "tokens_per_second": 1234.0,
    "peak_memory_gib": 0.5,
}


def shown(terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, color_system=None)
    with Display(console) as display:
        display.phase("train", 4)
        display.advance(2)
        display.metrics(RECORD, seconds_left=61)
    return out.getvalue()


def test_a_narrow_terminal_shows_the_bar_and_the_numbers() -> None:
    text = shown(terminal=True)
    for part in (
        "train",
        "2/4",
        "loss 0.5000  margin +0.250  accuracy 0.75  1,234 tok/s  0.50 GiB",
    ):
        assert part in text


def test_elsewhere_a_line_has_it_all() -> None:
    expected = (
        "step 2/4  loss 0.5000  margin +0.250  accuracy 0.75  1,234 tok/s  0.50 GiB  1.0 min left\n"
    )
    assert shown(terminal=False) == expected


def test_evaluations_have_a_time_of_their_own() -> None:
    out = io.StringIO()
    with Display(Console(file=out, width=80)) as display:
        display.phase("train", 4)
        display.metrics({"step": 2, "loss": 0.5}, seconds_left=61, evaluations_left=3.0)
    assert out.getvalue() == "step 2/4  loss 0.5000  1.0 min + 3 s of evaluation left\n"
    record = {"step": 3, "eval_loss": 0.7, "eval_runtime": 2.5}
    assert evaluation(record) == "eval at step 3  loss 0.7000  2.5 s"


def test_an_evaluation_shows_preference_metrics_where_there_are_targets() -> None:
    record = {"step": 3, "eval_loss": 0.7, "eval_rewards/margins": 0.1}
    hard = evaluation({**record, "eval_rewards/accuracies": 0.5})
    assert hard == "eval at step 3  loss 0.7000  margin +0.100  accuracy 0.500"
    names = {"accuracy": 0.9, "mean_kl": 0.01, "pci": 0.2}
    soft = evaluation({**record, **{f"eval_preference/{k}": v for k, v in names.items()}})
    assert soft.endswith("accuracy 0.900  KL to p 0.010  PCI 0.200")
