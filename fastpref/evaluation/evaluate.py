"""`fastpref eval`: metrics of a model on pairs, each with a confidence interval.

Tokens, forward passes and formulas are those of the trainer's evaluations, so metrics of the same
name have the same value. Every metric is a ratio of two sums over pairs: a quantity, and its count
(pairs, responses or tokens). The interval is the percentile bootstrap over pairs: N pairs are drawn
with replacement, the ratio is computed, and the interval holds the middle 95 % of many such ratios.
If all pairs are alike, as with an accuracy of 1, the interval is a point.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from fastpref import config as configs
from fastpref import ops
from fastpref.data.batch_plan import Plan, tokens_of
from fastpref.data.dataset import GroupDataset, load_groups
from fastpref.evaluation.sample import Sampler
from fastpref.metrics import preference as monitors
from fastpref.metrics import share_above
from fastpref.model.batch_layout import choose_layout
from fastpref.model.policy import ForwardOptions, Policy, PolicyOutput, context_length
from fastpref.utils import atomic_files
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display

MICRO_BATCH_TOKENS = 16384  # or the longest pair
RESAMPLES = 2000
LEVEL = 0.95
# Units of the metrics, in the order of the output.
METRICS = {
    "accuracy": "share",
    "accuracy_per_token": "share",
    "margins": "nats",
    "margins_per_token": "nats per token",
    "logps/chosen": "nats",
    "logps/rejected": "nats",
    "preference/accuracy": "share",
    "preference/mean_kl": "nats",
    "preference/pci": "probability",
    "logps/chosen_change": "nats",
    "logps/rejected_change": "nats",
    "rewards/accuracies": "share",
    "rewards/margins": "nats",
    "entropy": "nats per token",
    "lengths/chosen": "tokens",
    "lengths/rejected": "tokens",
    "lengths/chosen_longer": "share",
}
_QUANTILES = {"least": 0.0, "median": 0.5, "p90": 0.9, "most": 1.0}
Ratio = tuple[Tensor, Tensor]  # a quantity and its count for each pair, each (N,) fp64


class Scores(NamedTuple):
    """Sums over the tokens of chosen and rejected responses, each (N, 2) fp64, nats."""

    logps: Tensor
    entropies: Tensor  # of the token distributions


def evaluate(
    model: str,
    data: str,
    display: Display,
    *,
    against: str | None = None,
    max_length: int | None = None,
    max_tokens: int = 16384,
    options: dict[str, Any] | None = None,
    device: str = "auto",
    dtype: str | None = None,
) -> dict[str, Any]:
    """Compute metrics of a model, in the form of the JSON file of `--out`.

    model, against: folder or Hub name, or an adapter's folder; `against` is the reference.
    data: pairs, in any format of the trainer.
    max_length: tokens of prompt and response; None is the trainer's default, or the model's number
        of positions if that is less.
    max_tokens: of one forward pass.
    options: further fields of a config's `data`.

    Raises UserError in one line.
    """
    sampler = Sampler(model, device, dtype)
    fields = {**(options or {}), "max_length": _max_length(max_length, sampler.policy)}
    config = configs.parse(
        {
            "model": {"path": model},
            "data": {"train": data, **fields},
            "loss": "logpi_dpo",  # pairwise, without a reference
            "training": {"micro_batch_tokens": max_tokens},
        }
    )
    groups = load_groups(data, sampler.tokenizer, config.data, "pairwise", "test")
    display.note(f"data: {groups.summary()}")
    policy, reference = score(sampler.policy, groups, config.training, display), None
    tokenizer = sampler.tokenizer
    del sampler  # one model in memory at a time
    if against is not None:
        other = Sampler(against, device, dtype, tokenizer)
        reference = score(other.policy, groups, config.training, display)
    lengths = torch.from_numpy(groups.response_lengths).double().view(-1, 2)
    columns = ratios(policy, lengths, _preference(groups), reference)
    return {
        "model": model,
        "against": against,
        "data": data,
        "pairs": len(groups),
        "counts": groups.counts,
        "interval": f"{LEVEL:.0%} percentile bootstrap, {RESAMPLES:,} resamples of pairs, seed 0",
        "metrics": intervals(columns),
        "lengths": {"chosen": _quantiles(lengths[:, 0]), "rejected": _quantiles(lengths[:, 1])},
    }


@torch.no_grad()
def score(
    policy: Policy, groups: GroupDataset, training: configs.Training, display: Display
) -> Scores:
    """Compute log-probs and entropies of all pairs, in the trainer's layout, order and batches."""
    choose_layout(policy, training, "auto", [groups], display)
    budget, longest = training.micro_batch_tokens, int(tokens_of(groups, policy.layout).max())
    max_tokens = max(MICRO_BATCH_TOKENS, longest) if budget == "auto" else budget
    plan = Plan.of(groups, training.batch_size, max_tokens, layout=policy.layout)
    sums = torch.empty(2, 2 * len(groups), dtype=torch.float64)
    _, bias = policy.head()
    display.phase("evaluate", len(groups))
    done = 0
    for indices in (part for step in plan.epoch() for part in step):
        for batch in policy.batches(groups, indices):
            output: PolicyOutput = policy(batch, ForwardOptions(head=True))
            assert output.head is not None
            of_the_tokens = *output.head, batch.labels
            stats = ops.token_stats(*of_the_tokens, bias=bias, **policy.head_options)
            entropies = ops.segment_sum(stats.entropy, batch.cu_seqlens)
            sums[:, batch.responses.cpu()] = torch.stack([output.logps, entropies]).double().cpu()
        done += len(indices)
        display.advance(done)
    return Scores(*sums.view(2, -1, 2))


def ratios(
    policy: Scores,
    lengths: Tensor,  # (N, 2) fp64, tokens
    preference: Tensor | None = None,  # (N,) fp64, p
    reference: Scores | None = None,
) -> dict[str, Ratio]:
    """METRICS as quantities and counts for each pair; those without their inputs are left out."""
    chosen, rejected = policy.logps.unbind(1)
    chosen_mean, rejected_mean = (policy.logps / lengths).unbind(1)
    means = {
        "accuracy": share_above(chosen, rejected),
        "accuracy_per_token": share_above(chosen_mean, rejected_mean),
        "margins": chosen - rejected,
        "margins_per_token": chosen_mean - rejected_mean,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "lengths/chosen": lengths[:, 0],
        "lengths/rejected": lengths[:, 1],
        "lengths/chosen_longer": lengths[:, 0] > lengths[:, 1],
    }
    if preference is not None:
        monitored = monitors.preferences(chosen - rejected, preference)
        means |= {f"preference/{name}": values for name, values in monitored.items()}
    if reference is not None:
        chosen_change, rejected_change = (policy.logps - reference.logps).unbind(1)
        means |= {
            "logps/chosen_change": chosen_change,
            "logps/rejected_change": rejected_change,
            "rewards/accuracies": share_above(chosen_change, rejected_change),
            "rewards/margins": chosen_change - rejected_change,
        }
    columns = {name: (values.double(), torch.ones_like(chosen)) for name, values in means.items()}
    columns["entropy"] = policy.entropies.sum(1), lengths.sum(1)
    return {name: columns[name] for name in METRICS if name in columns}


def intervals(columns: dict[str, Ratio], resamples: int = RESAMPLES) -> dict[str, dict[str, float]]:
    """Bootstrap `value`, `low` and `high` of each ratio over pairs, with a fixed seed."""
    table = torch.stack([torch.stack(ratio) for ratio in columns.values()]).numpy()  # (K, 2, N)
    pairs, random = table.shape[2], np.random.default_rng(0)
    resampled = np.empty((resamples, len(columns)))
    for k in range(resamples):
        weights = np.bincount(random.integers(pairs, size=pairs), minlength=pairs)
        quantity, count = (table @ weights).T
        resampled[k] = quantity / count
    quantity, count = table.sum(2).T
    values = quantity / count
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {
        name: {"value": float(values[k]), "low": float(low[k]), "high": float(high[k])}
        for k, name in enumerate(columns)
    }


def run(model: str, data: str, out: Path | None, display: Display, **options: Any) -> None:
    """Print the result of `evaluate` as a table, and write it to `out` if that is not None.

    Raises UserError if `out` exists.
    """
    if out is not None and out.exists():
        raise UserError(f"--out: {out} is already there; choose another file")
    result = evaluate(model, data, display, **options)
    display.console.print(table(result))
    if out is not None:
        with atomic_files.replacing(out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        display.note(str(out))


def table(result: dict[str, Any]) -> Table:
    """Metrics and their intervals, for a terminal."""
    table = Table("metric", title=f"{result['pairs']:,} pairs", caption=result["interval"])
    for heading in ("value", f"{LEVEL:.0%} interval", "unit"):
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    for name, metric in result["metrics"].items():
        value, low, high = (f"{metric[key]:.4g}" for key in ("value", "low", "high"))
        table.add_row(name, value, f"{low} to {high}", METRICS[name])
    return table


def _preference(groups: GroupDataset) -> Tensor | None:
    """p of each pair, (N,) fp64; None if the data has no preferences."""
    if not groups.has_preferences:
        return None
    preferences: list[float] = []
    for k in range(len(groups)):
        preferences += groups[k].labels or ()
    return torch.tensor(preferences, dtype=torch.float64)


def _quantiles(values: Tensor) -> dict[str, float]:
    quantiles = np.quantile(values.numpy(), [*_QUANTILES.values()]).tolist()
    return dict(zip(_QUANTILES, quantiles, strict=True))


def _max_length(max_length: int | None, policy: Policy) -> int:
    default = int(configs.Data.model_fields["max_length"].default)
    context = context_length(policy)
    if max_length is not None and context is not None and max_length > context:
        raise UserError(
            f"--max-length: got {max_length:,}, but the model has {context:,} positions; use "
            f"{context:,} or less"
        )
    return max_length or min(default, context or default)
