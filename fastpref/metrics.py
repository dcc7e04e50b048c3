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
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastpref.errors import UserError, first_line
from fastpref.files import replacing
from fastpref.logps import GroupedLogps, SequenceLogps, UnpairedLogps
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
PREFERENCE_METRICS = ("preference/accuracy", "preference/mean_kl", "preference/pci")
TIMING_METRICS = ("tokens_per_second", "peak_memory_gib")  # all else repeats bit for bit on CPU

Metrics = dict[str, float]


def sums_and_counts(output: Output, policy: Logps, soft_labels: bool = False) -> Tensor:
    """Sums of PAIR_METRICS and how many each is a sum of, (2, 7) fp64, without host sync.

    With `soft_labels`, for pairs, PREFERENCE_METRICS follow: (2, 10).
    """
    if isinstance(output, PointwiseOutput):
        assert isinstance(policy, UnpairedLogps)
        return _response_sums(output, policy)
    if isinstance(output, GroupwiseOutput):
        assert isinstance(policy, GroupedLogps)
        return _group_sums(output, policy)
    assert isinstance(policy, SequenceLogps)
    sums = pair_sums(output, policy)
    if soft_labels:
        sums = torch.cat([sums, preference_sums(policy)])
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
    return torch.stack([_masked(*column) for column in columns], dim=1)


def _group_sums(output: GroupwiseOutput, policy: GroupedLogps) -> Tensor:
    position = torch.arange(policy.logps.numel(), device=policy.logps.device)
    members = (policy.cu_groups[:-1, None] <= position) & (position < policy.cu_groups[1:, None])
    best = torch.where(members, policy.scores, -math.inf).argmax(1)
    worst = torch.where(members, policy.scores, math.inf).argmin(1)
    scores, rewards, logps = policy.scores, output.rewards, policy.logps
    unequal = scores[best] > scores[worst]
    worse = members & (scores < scores[best][:, None])
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
    return torch.stack([_masked(*column) for column in columns], dim=1)


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the values where the mask is true, and how many they are, (2,) fp64."""
    kept = torch.where(mask, values.detach().double(), 0.0)
    return torch.stack([kept.sum(), mask.double().sum()])


def preference_sums(policy: SequenceLogps) -> Tensor:
    """Sums over pairs of PREFERENCE_METRICS, (3,) fp64; needs `policy.preference`.

    With ph = sigmoid(z_w − z_l), the policy's own probability of preferring `chosen`, and p the
    target: accuracy is the share of pairs where both lie on the same side of 1/2, mean KL that of
    Bernoulli(p) to Bernoulli(ph) in nats, and PCI (preference collapse index) the mean of
    min(ph, 1 − ph): 0 when every pair is decided, 1/2 when none is.
    """
    assert policy.preference is not None
    p = policy.preference.double()
    margin = (policy.chosen - policy.rejected).detach().double()
    predicted = margin.sigmoid()
    cross_entropy = -p * torch.nn.functional.logsigmoid(margin) - (
        1 - p
    ) * torch.nn.functional.logsigmoid(-margin)
    entropy = -torch.xlogy(p, p) - torch.xlogy(1 - p, 1 - p)
    accurate = ((predicted > 0.5) == (p > 0.5)).double()
    collapse = torch.minimum(predicted, 1 - predicted)
    return torch.stack([accurate.sum(), (cross_entropy - entropy).sum(), collapse.sum()])


class NonFinite(NamedTuple):
    step: int
    metric: str
    value: float


_WIDTH = 1 + 2 * len(PAIR_METRICS)


class Window:
    """Sums of the optimizer steps since the last line of metrics, kept on the device.

    Reading them is the only host sync of the training loop.
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._rows: list[Tensor] = []  # each (_WIDTH,): gradient norm, sums, counts

    def add(self, step: int, grad_norm: Tensor, sums: Tensor) -> None:
        """Take in a step's gradient norm () and its `sums_and_counts` (2, 7)."""
        self._steps.append(step)
        self._rows.append(torch.cat([grad_norm.to(sums).view(1), sums.flatten()]))

    def first_non_finite(self) -> NonFinite | None:
        """The first step whose loss or gradient norm is NaN or infinite."""
        if not self._rows:
            return None
        for step, row in zip(self._steps, self.state()[1].tolist(), strict=True):
            for metric, value in (("loss", row[1]), ("grad_norm", row[0])):
                if not math.isfinite(value):
                    return NonFinite(step, metric, value)
        return None

    def flush(self) -> Metrics:
        """Means over the window and the mean gradient norm; empties the window."""
        rows = self.state()[1]
        self._steps, self._rows = [], []
        return {**means(rows[:, 1:].sum(0).view(2, -1)), "grad_norm": rows[:, 0].mean().item()}

    def state(self) -> tuple[list[int], Tensor]:
        """Steps and their rows on the host, for a checkpoint."""
        empty = torch.zeros(0, _WIDTH, dtype=torch.float64)
        return self._steps, torch.stack([row.cpu() for row in self._rows]) if self._rows else empty

    def restore(self, steps: list[int], rows: Tensor) -> None:
        self._steps, self._rows = list(steps), list(rows)


def mean(sum_and_count: Tensor | None) -> float | None:
    """The mean of a (2,) sum and count; None stays None."""
    if sum_and_count is None:
        return None
    total, count = sum_and_count.tolist()
    return total / count


def peak_memory(device: torch.device) -> float:
    """GiB at most so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Tracker(Protocol):
    def log(self, metrics: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`: one object a line, each with its `step`."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [line for line in read(path) if line["step"] <= resume_step] if resume_step else []
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
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
            if name != "step":
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
        self._run.log(metrics, step=metrics["step"])

    def close(self) -> None:
        self._run.finish()


def trackers(
    folder: Path, names: Iterable[str], config: dict[str, Any], resume_step: int
) -> list[Tracker]:
    """The metrics file and whatever else was asked for; lines after `resume_step` are dropped."""
    made: list[Tracker] = [JsonLines(folder / "metrics.jsonl", resume_step)]
    for name in names:
        made.append(
            TensorBoard(folder, resume_step) if name == "tensorboard" else WandB(folder, config)
        )
    return made


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a crash cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _missing(name: str) -> UserError:
    return UserError(f"training.track: {name} is not installed; pip install 'fastpref[track]'")
