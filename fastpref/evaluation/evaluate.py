"""What a model makes of pairs, each number with an interval: `fastpref eval`.

Tokens, forward passes and formulas are those of the trainer's evaluations, so a metric with a name
of theirs has their value. Every metric is a ratio of two sums over pairs: of a quantity, and of how
much there is of it (pairs, responses or tokens). Its interval is the percentile bootstrap over
pairs: N pairs are drawn with replacement, the ratio is taken, and of many such ratios the middle
95 % are kept. Where all pairs are alike, as with an accuracy of 1, the interval is a point.
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
from fastpref.data.batch_plan import Plan
from fastpref.data.dataset import GroupDataset, load_groups
from fastpref.evaluation.sample import Sampler
from fastpref.metrics import preference as monitors
from fastpref.model.batch_layout import choose_layout
from fastpref.model.policy import ForwardOptions, Policy, PolicyOutput, context_length
from fastpref.utils import atomic_files
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display

RESAMPLES = 2000
LEVEL = 0.95
METRICS = {  # and their units
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
Ratio = tuple[Tensor, Tensor]  # what is summed and how much there is of it, each (N,) fp64


class Scores(NamedTuple):
    """Of the two responses of N pairs, chosen and rejected, each (N, 2) fp64, nats."""

    logps: Tensor  # summed over the tokens of a response
    entropies: Tensor  # of the distributions of its tokens, summed


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
    """Metrics of a model, in the form that `--out` has.

    model, against: folder or Hub name, or an adapter's folder; `against` is the reference.
    data: pairs, in any format of the trainer.
    max_length: tokens of prompt and response; None is the trainer's default, or what the model
        knows if that is less.
    max_tokens: of one forward pass.
    options: further fields of a config's `data`.

    Raises UserError in one line for what a user can mend.
    """
    sampler = Sampler(model, device, dtype)
    given = {**(options or {}), "max_length": _max_length(max_length, sampler.policy)}
    config = configs.parse(
        {
            "model": {"path": model},
            "data": {"train": data, **given},
            "loss": "logpi_dpo",  # of pairs, without a reference
            "training": {"micro_batch_tokens": max_tokens},
        }
    )
    groups = load_groups(data, sampler.tokenizer, config.data, "pairwise", "test")
    display.note(f"data: {groups.summary()}")
    policy, reference = score(sampler.policy, groups, config, display), None
    tokenizer = sampler.tokenizer
    del sampler  # one model in memory at a time
    if against is not None:
        other = Sampler(against, device, dtype, tokenizer)
        reference = score(other.policy, groups, config, display)
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
def score(policy: Policy, groups: GroupDataset, config: configs.Config, display: Display) -> Scores:
    """Log-probs and entropies of all pairs, in the trainer's layout, order and forward passes."""
    choose_layout(policy, config, groups, display)
    t = config.training
    plan = Plan.of(groups, t.batch_size, t.micro_batch_tokens, layout=policy.layout)
    found = torch.empty(2, 2 * len(groups), dtype=torch.float64)
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
            found[:, batch.responses.cpu()] = torch.stack([output.logps, entropies]).double().cpu()
        done += len(indices)
        display.advance(done)
    return Scores(*found.view(2, -1, 2))


def ratios(
    policy: Scores,
    lengths: Tensor,  # (N, 2) fp64, tokens
    preference: Tensor | None = None,  # (N,) fp64, p
    reference: Scores | None = None,
) -> dict[str, Ratio]:
    """METRICS as sums over pairs that are to be divided, without those that lack what they need."""
    chosen, rejected = policy.logps.unbind(1)
    chosen_mean, rejected_mean = (policy.logps / lengths).unbind(1)
    means = {
        "accuracy": chosen > rejected,
        "accuracy_per_token": chosen_mean > rejected_mean,
        "margins": chosen - rejected,
        "margins_per_token": chosen_mean - rejected_mean,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "lengths/chosen": lengths[:, 0],
        "lengths/rejected": lengths[:, 1],
        "lengths/chosen_longer": lengths[:, 0] > lengths[:, 1],
    }
    if preference is not None:
        found = monitors.preferences(chosen - rejected, preference)
        means |= {f"preference/{name}": values for name, values in found.items()}
    if reference is not None:
        chosen_change, rejected_change = (policy.logps - reference.logps).unbind(1)
        means |= {
            "logps/chosen_change": chosen_change,
            "logps/rejected_change": rejected_change,
            "rewards/accuracies": chosen_change > rejected_change,
            "rewards/margins": chosen_change - rejected_change,
        }
    columns = {name: (values.double(), torch.ones_like(chosen)) for name, values in means.items()}
    columns["entropy"] = policy.entropies.sum(1), lengths.sum(1)
    return {name: columns[name] for name in METRICS if name in columns}


def intervals(columns: dict[str, Ratio], resamples: int = RESAMPLES) -> dict[str, dict[str, float]]:
    """`value`, `low` and `high` of each ratio, by the bootstrap over pairs; the same each time."""
    table = torch.stack([torch.stack(ratio) for ratio in columns.values()]).numpy()  # (K, 2, N)
    pairs, random = table.shape[2], np.random.default_rng(0)
    drawn = np.empty((resamples, len(columns)))
    for k in range(resamples):
        weights = np.bincount(random.integers(pairs, size=pairs), minlength=pairs)
        top, bottom = (table @ weights).T
        drawn[k] = top / bottom
    top, bottom = table.sum(2).T
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    numbers = zip((top / bottom).tolist(), low.tolist(), high.tolist(), strict=True)
    return {
        name: dict(zip(("value", "low", "high"), triple, strict=True))
        for name, triple in zip(columns, numbers, strict=True)
    }


def run(model: str, data: str, out: Path | None, display: Display, **options: Any) -> None:
    """Show `evaluate` as a table and write it to `out`, unless that is None or already there."""
    if out is not None and out.exists():
        raise UserError(f"--out: {out} is already there; choose another file")
    result = evaluate(model, data, display, **options)
    display.console.print(table(result))
    if out is not None:
        with atomic_files.replacing(out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        display.note(str(out))


def table(result: dict[str, Any]) -> Table:
    """The metrics and their intervals, for a terminal."""
    made = Table("metric", title=f"{result['pairs']:,} pairs", caption=result["interval"])
    for heading in ("value", f"{LEVEL:.0%} interval", "unit"):
        made.add_column(heading, justify="left" if heading == "unit" else "right")
    for name, found in result["metrics"].items():
        value, low, high = (f"{found[key]:.4g}" for key in ("value", "low", "high"))
        made.add_row(name, value, f"{low} to {high}", METRICS[name])
    return made


def _preference(groups: GroupDataset) -> Tensor | None:
    """p of each pair, (N,) fp64; None where the data has none."""
    if not groups.has_preferences:
        return None
    labels = (groups[k].labels for k in range(len(groups)))
    return torch.tensor([p for each in labels if each for p in each], dtype=torch.float64)


def _quantiles(values: Tensor) -> dict[str, float]:
    found = np.quantile(values.numpy(), [*_QUANTILES.values()]).tolist()
    return dict(zip(_QUANTILES, found, strict=True))


def _max_length(asked: int | None, policy: Policy) -> int:
    usual = int(configs.Data.model_fields["max_length"].default)
    context = context_length(policy)
    if asked is not None and context is not None and asked > context:
        raise UserError(
            f"--max-length: got {asked:,}, but the model knows {context:,} positions; use "
            f"{context:,} or less"
        )
    return asked or min(usual, context or usual)
