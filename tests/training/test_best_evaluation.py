"""The best evaluation: its checkpoint stays, its weights are exported, and a run stops by it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastpref.config import Config, ConfigError
from fastpref.config.evaluation import HIGHER_IS_BETTER, Evaluation
from fastpref.metrics import PAIR_METRICS
from fastpref.metrics.preference import MONITORS
from fastpref.training.best_evaluation import BestEvaluation
from fastpref.training.checkpoint_files import CheckpointError
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display
from tests.helpers.data import rows, write_jsonl
from tests.helpers.training_runs import lose_power_after, records, run, weights

MakeConfig = Callable[..., Config]


def after(best: BestEvaluation, *values: float, metric: str = "loss") -> list[bool]:
    """Add evaluations of steps 1, 2, …; return whether the run would stop after each."""
    stops = []
    for step, value in enumerate(values, start=1):
        best.add(step, {f"eval_{metric}": value})
        stops.append(best.stops)
    return stops


def test_the_lowest_loss_and_the_highest_accuracy_are_best() -> None:
    loss = BestEvaluation(Evaluation(load_best_model_at_end=True))
    after(loss, 0.7, 0.5, 0.5, 0.6)
    assert (loss.step, loss.value) == (2, 0.5)
    accuracy = BestEvaluation(Evaluation(metric_for_best_model="eval_rewards/accuracies"))
    after(accuracy, 0.7, 0.5, 0.9, 0.8, metric="rewards/accuracies")
    assert (accuracy.step, accuracy.value) == (3, 0.9)


def test_greater_is_better_turns_the_direction() -> None:
    options = Evaluation(metric_for_best_model="loss", greater_is_better=True)
    best = BestEvaluation(options)
    after(best, 0.7, 0.5)
    assert best.step == 1


def test_the_evaluation_before_the_first_step_is_not_compared() -> None:
    best = BestEvaluation(Evaluation(load_best_model_at_end=True))
    best.add(0, {"eval_loss": 0.1})
    after(best, 0.7)
    assert best.step == 1


def test_a_metric_that_is_not_finite_is_never_better() -> None:
    best = BestEvaluation(Evaluation(early_stopping_patience=2, load_best_model_at_end=True))
    assert after(best, float("nan"), 0.5, float("nan"), float("nan")) == [False, False, False, True]
    assert best.step == 2


def test_small_gains_add_up_to_the_threshold() -> None:
    options = Evaluation(early_stopping_patience=2, early_stopping_threshold=0.15)
    stops = after(BestEvaluation(options), 0.9, 0.8, 0.7, 0.65, 0.6)
    assert stops == [False, False, False, False, True]


def test_gains_below_the_threshold_are_none_for_the_stop_but_are_for_the_best() -> None:
    options = Evaluation(
        early_stopping_patience=2, early_stopping_threshold=0.5, load_best_model_at_end=True
    )
    best = BestEvaluation(options)
    assert after(best, 0.9, 0.8, 0.7) == [False, False, True]
    assert best.step == 3


def test_a_saved_state_decides_the_same_unless_it_is_of_another_metric() -> None:
    options = Evaluation(early_stopping_patience=2, load_best_model_at_end=True)
    first, second = BestEvaluation(options), BestEvaluation(options)
    after(first, 0.5, 0.6)
    second.load_state_dict(first.state_dict())
    assert not second.stops and second.step == 1
    second.add(3, {"eval_loss": 0.7})
    assert second.stops
    other = BestEvaluation(Evaluation(metric_for_best_model="rewards/margins"))
    other.load_state_dict(first.state_dict())
    assert other.step is None


def test_a_metric_that_evaluations_lack_is_named_with_those_that_they_have() -> None:
    best = BestEvaluation(Evaluation(metric_for_best_model="preference/pci"))
    with pytest.raises(ConfigError) as error:
        best.add(0, {"step": 0, "eval_loss": 0.7, "eval_entropy": 1.0, "eval_contrast": {}})
    assert str(error.value) == (
        "evaluation.metric_for_best_model: the evaluations have no preference/pci; use one of "
        "loss, entropy"
    )


def test_every_metric_of_evaluations_has_a_direction_or_is_known_to_have_none() -> None:
    assert set(HIGHER_IS_BETTER) == {*PAIR_METRICS, *MONITORS, "entropy"}


@pytest.fixture
def worsening(make_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """Config of a run whose held-out loss rises in every step: its pairs are swapped."""
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows(12)]
    held_out = write_jsonl(tmp_path / "swapped.jsonl", swapped)

    def make(**overrides: Any) -> Config:
        values = {"data__eval": str(held_out), "training__eval_every": 1, "training__epochs": 3}
        return make_config(**values | overrides)

    return make


def test_the_best_weights_are_exported_and_their_checkpoint_is_kept(
    worsening: MakeConfig, display: Display, tmp_path: Path
) -> None:
    one = weights(
        run(worsening(training__steps=1, training__output_dir=f"{tmp_path}/one"), display)
    )
    config = worsening(
        training__steps=4,
        training__checkpoint_every=1,
        training__keep_checkpoints=1,
        evaluation__load_best_model_at_end=True,
    )
    trainer = run(config, display)
    assert trainer.step == 4 and trainer.best.step == 1
    best = weights(trainer)
    assert all(torch.equal(one[name], best[name]) for name in one)
    folders = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert folders == ["step-1", "step-4"]


def test_an_early_stop_is_the_same_after_a_resumption(
    worsening: MakeConfig, tmp_path: Path
) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    options: dict[str, Any] = {
        "training__checkpoint_every": 2,
        "training__log_every": 4,
        "evaluation__early_stopping_patience": 2,
        "evaluation__metric_for_best_model": "loss",
    }
    whole = worsening(**options, training__output_dir=f"{tmp_path}/whole")
    with Display(console) as display:
        assert run(whole, display).step == 3
    text = console.export_text()
    assert "stopped early after step 3 of 9: eval_loss was not better than" in text
    assert "in the last 2 evaluations" in text
    assert "best evaluation: step 1, eval_loss" in text

    silent = Display(Console(quiet=True))
    broken = Trainer(worsening(**options), silent)
    lose_power_after(broken, 2)
    with pytest.raises(RuntimeError, match="power cut"):
        broken.loop([])
    resumed = worsening(**options, resume="auto")
    assert run(resumed, silent).step == 3
    assert records(resumed) == records(whole)
    # The run is over: another resumption takes no step.
    assert run(resumed, silent).step == 3
    assert records(resumed) == records(whole)


def test_a_best_checkpoint_that_is_gone_is_said(
    worsening: MakeConfig, display: Display, tmp_path: Path
) -> None:
    config = worsening(training__steps=2, evaluation__load_best_model_at_end=True)
    trainer = Trainer(config, display)
    trainer.loop([])
    (tmp_path / "run" / "checkpoints" / "step-1").rename(tmp_path / "elsewhere")
    message = "evaluation.load_best_model_at_end: .*step-1: is missing; set it to false and resume="
    with pytest.raises(CheckpointError, match=message):
        trainer.export()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"metric_for_best_model": "accuracy"},
            "evaluation.metric_for_best_model: must be one of loss, rewards.*got 'accuracy'",
        ),
        (
            {"metric_for_best_model": "entropy"},
            "greater_is_better: higher entropy is neither better nor worse in general; set true",
        ),
        (
            {"greater_is_better": True},
            "greater_is_better: is for metric_for_best_model, which is not set; set it too",
        ),
        (
            {"early_stopping_threshold": 0.1},
            "early_stopping_threshold: is for early_stopping_patience, which is not set",
        ),
    ],
)
def test_options_without_a_meaning_are_refused(
    make_config: MakeConfig, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(evaluation=options)


def test_the_metric_of_a_source_has_the_direction_of_the_metric() -> None:
    options = Evaluation(metric_for_best_model="eval_rewards/accuracies/helpful")
    assert options.metric == "rewards/accuracies/helpful" and options.is_higher_better
