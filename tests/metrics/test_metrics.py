"""Metric definitions at points with known answers, windows, and metrics files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastpref import losses, metrics
from fastpref.logps import GroupedLogps, SequenceLogps, UnpairedLogps
from fastpref.losses import GroupwiseOutput, PointwiseOutput
from fastpref.metrics.preference import preferences


def logps(margins: list[float], p: list[float]) -> SequenceLogps:
    margin = torch.tensor(margins, dtype=torch.float64)
    ones = torch.ones_like(margin)
    return SequenceLogps(margin - 1, -ones, ones, ones, torch.tensor(p, dtype=torch.float64))


def test_pair_sums_are_sums_over_pairs() -> None:
    policy = logps([1.0, -2.0], [0.9, 0.9])
    output = losses.build("simpo")(policy)
    values = dict(
        zip(metrics.PAIR_METRICS, metrics.pair_sums(output, policy).tolist(), strict=True)
    )
    assert values["loss"] == pytest.approx(output.loss.sum().item())
    assert values["rewards/accuracies"] == 1
    assert values["rewards/margins"] == pytest.approx(2.0 * (1.0 - 2.0))  # beta 2, one token each
    assert values["logps/rejected"] == -2


def test_half_of_the_equal_rewards_count_as_right() -> None:
    values = torch.tensor([1.0, 2.0, 2.0, float("nan")])
    assert metrics.share_above(values, 2.0).tolist() == [0.0, 0.5, 0.5, 0.0]
    assert metrics.share_above(values, values).tolist() == [0.5, 0.5, 0.5, 0.0]
    policy = logps([0.0, 0.0, 1.0], [0.9, 0.5, 0.5])
    sums = metrics.pair_sums(losses.build("simpo")(policy), policy)
    assert sums[metrics.PAIR_METRICS.index("rewards/accuracies")] == 0.5 + 0.5 + 1
    margin, p = torch.tensor([[0.0, 1.0, -1.0, 1.0], [0.9, 0.5, 0.2, 0.2]]).double()
    assert preferences(margin, p)["accuracy"].tolist() == [0.5, 0.5, 1.0, 0.0]


def test_pairs_are_counted_all_alike() -> None:
    policy = logps([1.0, -2.0, 3.0], [0.9, 0.9, 0.2])
    output = losses.build("simpo")(policy)
    sums, counts = metrics.sums_and_counts(output, policy)
    assert torch.equal(sums, metrics.pair_sums(output, policy)) and counts.tolist() == [3] * 7


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def responses(rewards: list[float], desirable: list[bool]) -> torch.Tensor:
    """Sums for responses whose loss is twice and whose log-prob ten times the reward."""
    rewards_ = vector(*rewards)
    labels = torch.tensor(desirable)
    policy = UnpairedLogps(10 * rewards_, torch.ones_like(rewards_), labels)
    return metrics.sums_and_counts(PointwiseOutput(2 * rewards_, rewards_), policy)


def test_responses_are_counted_by_their_class() -> None:
    parts = [responses([1.0, -3.0, 0.0], [True, False, True]), responses([5.0], [False])]
    assert metrics.means(sum(parts, torch.zeros(2, 7))) == {
        "loss": 2 * 3 / 4,
        "rewards/chosen": 0.5,
        "rewards/rejected": 1.0,
        "rewards/accuracies": (2 + 1 / 2) / 4,  # a reward of 0 has no sign
        "rewards/margins": -0.5,
        "logps/chosen": 5.0,
        "logps/rejected": 10.0,
    }


def test_a_class_that_is_missing_has_no_metrics() -> None:
    values = metrics.means(responses([1.0, -3.0], [True, True]))
    assert set(values) == {"loss", "rewards/chosen", "rewards/accuracies", "logps/chosen"}


def test_groups_are_measured_by_their_best_and_worst() -> None:
    """Best above all worse ones; a worse one above the best; equal scores; one; two best."""
    policy = GroupedLogps(
        logps=vector(-1, -2, -3, -4, -5, -6, -7, -8, -9, -10, -11, -12),
        lengths=torch.ones(12),
        cu_groups=torch.tensor([0, 3, 6, 8, 9, 12]),
        scores=vector(0.5, 0.9, 0.1, 3, 2, 1, 7, 7, 4, 1, 1, 0),
    )
    rewards = vector(1, 5, 2, 1, 2, 0, 9, 9, 9, 1, 8, 0.5)
    output = GroupwiseOutput(vector(1, 2, 3, 4, 5), rewards)
    assert metrics.means(metrics.sums_and_counts(output, policy)) == {
        "loss": 3.0,
        "rewards/chosen": (5 + 1 + 1) / 3,
        "rewards/rejected": (2 + 0 + 0.5) / 3,
        "rewards/accuracies": 2 / 3,
        "rewards/margins": (3 + 1 + 0.5) / 3,
        "logps/chosen": (-2 - 4 - 10) / 3,
        "logps/rejected": (-3 - 6 - 12) / 3,
    }


def counted(sums: torch.Tensor, count: int) -> torch.Tensor:
    return torch.stack([sums, torch.full_like(sums, count)])


def test_a_window_weighs_steps_by_their_pairs() -> None:
    window = metrics.Window()
    sums = torch.arange(7, dtype=torch.float64)
    window.add(1, torch.tensor(3.0), counted(sums, 2))
    window.add(2, torch.tensor(5.0), counted(sums, 6))
    means = window.flush()
    assert means["logps/rejected"] == pytest.approx(12 / 8)
    assert means["grad_norm"] == 4
    assert window.state_dict()[0] == [] and window.first_non_finite() is None


@pytest.mark.parametrize(("column", "metric"), enumerate(("grad_norm", *metrics.PAIR_METRICS)))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_window_finds_the_first_step_that_is_not_finite(
    column: int, metric: str, value: float
) -> None:
    window = metrics.Window()
    for step in range(1, 5):
        bad = step >= 3
        norm = torch.tensor(value if bad and column == 0 else 1.0)
        sums = torch.ones(7, dtype=torch.float64)
        if bad and column:
            sums[column - 1] = value
        window.add(step, norm, counted(sums, 2))
    first = window.first_non_finite()
    assert first is not None and (first.step, first.metric) == (3, metric)


def test_a_resumed_file_forgets_later_and_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3)) + '{"step": 4, "lo')
    assert [line["step"] for line in metrics.read_records(path)] == [1, 2, 3]
    lines = metrics.JsonLines(path, resume_step=2)
    lines.log({"step": 3, "loss": 0.1})
    lines.close()
    assert metrics.read_records(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.1}]
