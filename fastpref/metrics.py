"""What a run measures and where it goes: names, windows of steps, files and trackers.

`logps/*` are summed log-probs in nats; rewards are beta·(log pi − log pi_ref), or beta·log pi for
objectives without a reference. Each metric is a mean over what it counts, whatever the
micro-batches, and is left out where it counts nothing:

| metric | pairs | single responses | groups with unequal scores |
|---|---|---|---|
| `…/chosen` | chosen | desirable | the best, by its score |
| `…/rejected` | rejected | undesirable | the worst |
| `rewards/accuracies` | chosen above rejected | the sign of the label | the best above all worse |
| `rewards/margins` | difference | difference of the two means | difference |

The loss is a mean over all pairs, responses or groups.
"""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastpref import ranks
from fastpref.errors import UserError, first_line
from fastpref.files import replacing
from fastpref.logps import GroupedLogps, SequenceLogps, TokenLogps, UnpairedLogps
from fastpref.losses import GroupwiseOutput, Logps, LossOutput, Output, PointwiseOutput

PAIR_METRICS = (  # of all kinds, where they are counted as stated above
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
TIMING_METRICS = ("tokens_per_second", "peak_memory_gib")  # all else repeats bit for bit on CPU

Metrics = dict[str, float]


def sums_and_counts(output: Output, policy: Logps) -> Tensor:
    """Sums of PAIR_METRICS and how many each is a sum of, (2, 7) fp64, without host sync."""
    if isinstance(output, PointwiseOutput):
        assert isinstance(policy, UnpairedLogps)
        return _response_sums(output, policy)
    if isinstance(output, GroupwiseOutput):
        assert isinstance(policy, GroupedLogps)
        return _group_sums(output, policy)
    if isinstance(policy, TokenLogps):
        policy = policy.sequences()
    assert isinstance(policy, SequenceLogps)
    sums = pair_sums(output, policy)
    return torch.stack([sums, torch.full_like(sums, output.loss.numel())])


def means(sums: Tensor, names: tuple[str, ...] = PAIR_METRICS) -> Metrics:
    """Means of the metrics that were counted; (2, M) sums and counts, with one host sync."""
    found = {name: s / n for name, s, n in zip(names, *sums.tolist(), strict=True) if n}
    sides = ("rewards/chosen", "rewards/rejected")
    if "rewards/margins" not in found and all(side in found for side in sides):
        found["rewards/margins"] = found[sides[0]] - found[sides[1]]
    return found


def pair_sums(output: LossOutput, policy: SequenceLogps) -> Tensor:
    """Sums over pairs of PAIR_METRICS, (7,) fp64, without gradient or host sync."""
    chosen, rejected = output.chosen_rewards, output.rejected_rewards
    columns = (
        output.loss,
        chosen,
        rejected,
        chosen > rejected,
        chosen - rejected,
        policy.chosen,
        policy.rejected,
    )
    return torch.stack([column.detach().double().sum() for column in columns])


def _response_sums(output: PointwiseOutput, policy: UnpairedLogps) -> Tensor:
    good, rewards = policy.desirable, output.rewards
    every = torch.ones_like(good)
    columns = (
        (output.loss, every),
        (rewards, good),
        (rewards, ~good),
        (torch.where(good, rewards, -rewards) > 0, every),
        (rewards, ~every),  # margins are those of the means
        (policy.logps, good),
        (policy.logps, ~good),
    )
    return torch.stack([masked_sum(*column) for column in columns], dim=1)


def _group_sums(output: GroupwiseOutput, policy: GroupedLogps) -> Tensor:
    best, worst, unequal = best_and_worst(policy)
    scores, rewards, logps = policy.scores, output.rewards, policy.logps
    worse = _members(policy) & (scores < scores[best][:, None])
    rival = torch.where(worse, rewards, -math.inf).amax(1)
    columns = (
        (output.loss, torch.ones_like(unequal)),
        (rewards[best], unequal),
        (rewards[worst], unequal),
        (rewards[best] > rival, unequal),
        (rewards[best] - rewards[worst], unequal),
        (logps[best], unequal),
        (logps[worst], unequal),
    )
    return torch.stack([masked_sum(*column) for column in columns], dim=1)


def best_and_worst(policy: GroupedLogps) -> tuple[Tensor, Tensor, Tensor]:
    """Index of the first best and first worst response of each group by its score, (G,), and
    whether the two scores differ, (G,) bool."""
    members, scores = _members(policy), policy.scores
    best = torch.where(members, scores, -math.inf).argmax(1)
    worst = torch.where(members, scores, math.inf).argmin(1)
    return best, worst, scores[best] > scores[worst]


def _members(policy: GroupedLogps) -> Tensor:
    """Whether a response belongs to a group, (G, S) bool."""
    position = torch.arange(policy.logps.numel(), device=policy.logps.device)
    return (policy.cu_groups[:-1, None] <= position) & (position < policy.cu_groups[1:, None])


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the values where the mask is true, and how many they are, (2,) fp64."""
    kept = torch.where(mask, values.detach().double(), 0.0)
    return torch.stack([kept.sum(), mask.double().sum()])


class NonFinite(NamedTuple):
    step: int
    metric: str
    value: float


class Window:
    """Sums of the optimizer steps since the last line of metrics, kept on the device.

    Each rank adds its own. Reading them, which all ranks do at the same steps, adds them up; it is
    the only host sync of the training loop.

    names: the metrics whose sums it keeps; the first is the loss.
    """

    def __init__(self, names: tuple[str, ...] = PAIR_METRICS) -> None:
        self._names = names
        self._steps: list[int] = []
        self._rows: list[Tensor] = []  # each (1 + 2 M,): gradient norm, sums, counts
        self._settled = 0  # so many of the rows are those of all ranks

    def add(self, step: int, grad_norm: Tensor, sums: Tensor) -> None:
        """Take in a step's gradient norm (), the same on all ranks, and sums and counts (2, M)."""
        self._steps.append(step)
        self._rows.append(torch.cat([grad_norm.to(sums).view(1), sums.flatten()]))

    def first_non_finite(self) -> NonFinite | None:
        """The first step with a sum of PAIR_METRICS, or a gradient norm, that is not finite."""
        if not self._rows:
            return None
        for step, row in zip(self._steps, self.state()[1].tolist(), strict=True):
            sums = zip(PAIR_METRICS, row[1:], strict=False)
            for metric, value in (*sums, ("grad_norm", row[0])):
                if not math.isfinite(value):
                    return NonFinite(step, metric, value)
        return None

    def drop_last(self) -> None:
        """Leave out the step that was taken in last, whose rows have been read."""
        steps, rows = self.state()
        self.restore(steps[:-1], rows[:-1])

    def flush(self) -> Metrics:
        """Means over the window and the mean gradient norm, none of no step; empties the window."""
        rows = self.state()[1]
        self.restore([], rows[:0])
        if not len(rows):
            return {}
        return {
            **means(rows[:, 1:].sum(0).view(2, -1), self._names),
            "grad_norm": rows[:, 0].mean().item(),
        }

    def state(self) -> tuple[list[int], Tensor]:
        """Steps and their rows of all ranks on the host, for a checkpoint."""
        if self._settled < len(self._rows):
            own = torch.stack(self._rows[self._settled :])
            totals = ranks.sum_(own.clone())
            totals[:, 0] = own[:, 0]
            self._rows[self._settled :] = totals.cpu()
            self._settled = len(self._rows)
        empty = torch.zeros(0, 1 + 2 * len(self._names), dtype=torch.float64)
        return self._steps, torch.stack(self._rows) if self._rows else empty

    def restore(self, steps: list[int], rows: Tensor) -> None:
        self._steps, self._rows, self._settled = list(steps), list(rows), len(rows)


def mean(sum_and_count: Tensor) -> float:
    """The mean of a (2,) sum and count."""
    total, count = sum_and_count.tolist()
    mean: float = total / count
    return mean


def peak_memory(device: torch.device) -> float:
    """GiB at most so far, of the rank with most: allocated on its GPU, or resident in memory."""
    if device.type == "cuda":
        return ranks.largest(torch.cuda.max_memory_allocated(device) / 2**30)
    return ranks.largest(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


class Tracker(Protocol):
    def log(self, metrics: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`: one object a line, each with its `step`."""

    def __init__(self, path: Path, resume_step: int) -> None:
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as kept:
            for line in lines(path) if resume_step else ():
                if line["step"] <= resume_step:
                    kept.write(json.dumps(line) + "\n")
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: dict[str, Any]) -> None:
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    def __init__(self, folder: Path, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _missing("tensorboard") from None
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def log(self, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if name != "step" and not isinstance(value, dict):
                self._writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise _missing("wandb") from None
        try:
            self._run: Any = wandb.init(
                project="fastpref", name=folder.name, dir=folder, config=config, resume="allow"
            )
        except Exception as error:  # no login, no network, no quota: its own types
            raise UserError(f"training.track: wandb failed: {first_line(error)}") from None

    def log(self, metrics: dict[str, Any]) -> None:
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, dict)}
        self._run.log(numbers, step=metrics["step"])

    def close(self) -> None:
        self._run.finish()


def trackers(
    folder: Path, names: Iterable[str], config: dict[str, Any], resume_step: int
) -> list[Tracker]:
    """The metrics file and whatever else was asked for; lines after `resume_step` are dropped.

    The first rank writes for all.
    """
    if not ranks.is_first():
        return []
    made: list[Tracker] = [JsonLines(folder / "metrics.jsonl", resume_step)]
    for name in names:
        made.append(
            TensorBoard(folder, resume_step) if name == "tensorboard" else WandB(folder, config)
        )
    return made


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, one at a time: there may be as many as a long run has steps.

    A last line that a crash cut short is left out.
    """
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def read(path: Path) -> list[dict[str, Any]]:
    """All `lines` of a metrics file."""
    return list(lines(path))


def _missing(name: str) -> UserError:
    return UserError(f"training.track: {name} is not installed; pip install 'fastpref[track]'")
