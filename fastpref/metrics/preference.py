"""Monitors in addition to losses and rewards: displacement, lengths, preferences and contrast.

Every monitor is a mean over the items below, independent of the micro-batches, and is omitted if
there are none. `fastpref.metrics.pairs` defines chosen and rejected responses for each kind.

| monitor | mean over | of |
|---|---|---|
| `logps/chosen_change`, `logps/rejected_change` | as `logps/*`, with a reference | z − r, nats |
| `lengths/chosen`, `lengths/rejected` | as `logps/*` | tokens of the response |
| `lengths/empty` | responses | 1 for a response without tokens, which trains nothing |
| `preference/accuracy` | pairs with a soft label p | [ph and p on the same side of 1/2]¹ |
| `preference/mean_kl` | the same | KL of Bernoulli(p) to Bernoulli(ph), nats |
| `preference/pci` | the same | min(ph, 1 − ph), the preference collapse index |
| `contrast/mean` | pairs | Z |
| `contrast/below`, `contrast/inside`, `contrast/above` | pairs | [Z there of the two margins] |

An evaluation adds `contrast/histogram` of Z, and `preference/calibration`: sums of ph and of p in
ten bins of ph.

¹ 1/2 where either of them is 1/2.

ph = sigmoid(z_w − z_l) is the policy's probability of preferring `chosen`; PCI is 0 if every pair
is decided and 1/2 if none is. Z is the contrastive logit of StaPO: for an objective with a
reference, the difference of the log-ratios, (z_w − r_w) − (z_l − r_l); otherwise the difference of
the mean log-probs per token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.logps import GroupedLogps, SequenceLogps, TokenLogps, UnpairedLogps, mean_logps
from fastpref.losses import Logps
from fastpref.metrics import best_and_worst, masked_sum

MONITORS = (
    "logps/chosen_change",
    "logps/rejected_change",
    "lengths/chosen",
    "lengths/rejected",
    "lengths/empty",
    "preference/accuracy",
    "preference/mean_kl",
    "preference/pci",
    "contrast/mean",
    "contrast/below",
    "contrast/inside",
    "contrast/above",
)


def monitor_sums(
    policy: Logps,
    reference: Logps | None,
    contrast: Tensor | None,  # (B,) Z of each pair
    margins: tuple[float, float],
) -> Tensor:
    """Sums and counts of MONITORS, (2, 12) fp64, without host sync."""
    logps, lengths, chosen, rejected = _responses(policy)
    every = torch.ones_like(chosen)
    sums = dict.fromkeys(MONITORS, masked_sum(logps[:0], every[:0]))
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        sums[f"lengths/{name}"] = masked_sum(lengths, side)
        if reference is not None:
            change = logps - _responses(reference).logps
            sums[f"logps/{name}_change"] = masked_sum(change, side)
    sums["lengths/empty"] = masked_sum(lengths == 0, every)
    if isinstance(policy, SequenceLogps | TokenLogps) and policy.preference is not None:
        for name, values in preferences(_margins(logps), policy.preference).items():
            sums[f"preference/{name}"] = masked_sum(values, every[: len(values)])
    if contrast is not None:
        below, above = contrast < margins[0], contrast > margins[1]
        columns = {"mean": contrast, "below": below, "inside": ~(below | above), "above": above}
        for name, values in columns.items():
            sums[f"contrast/{name}"] = masked_sum(values, torch.ones_like(below))
    return torch.stack([*sums.values()], dim=1)


def contrastive_logits(policy: Logps, reference: Logps | None, log_ratios: bool) -> Tensor | None:
    """Z of each pair, (B,), without gradient; None for objectives on other kinds of data.

    log_ratios: whether Z is the difference of the log-ratios, which needs a reference.
    """
    if not isinstance(policy, SequenceLogps | TokenLogps):
        return None
    logps, lengths, *_ = _responses(policy)
    if log_ratios:
        assert reference is not None
        logps = logps - _responses(reference).logps
    else:
        logps = mean_logps(logps, lengths)
    chosen, rejected = logps.chunk(2)
    return chosen - rejected


def histogram(values: Tensor, bins: int = 50) -> dict[str, list[float]]:
    """Histogram: `counts` (bins,) and `edges` (bins + 1,) over the range of the finite values."""
    numbers = values.double().cpu().numpy()
    counts, edges = np.histogram(numbers[np.isfinite(numbers)], bins=bins)
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def calibration_sums(policy: Logps, bins: int = 10) -> Tensor:
    """Sums of ph, p and 1 over the pairs with a soft label in each bin of ph, (3, bins) fp64.

    Bin k is [k / bins, (k + 1) / bins); the last bin includes 1.
    """
    logps, *_ = _responses(policy)
    sums = logps.new_zeros(3, bins, dtype=torch.float64)
    if not isinstance(policy, SequenceLogps | TokenLogps) or policy.preference is None:
        return sums
    predicted = _margins(logps).sigmoid()
    columns = torch.stack([predicted, policy.preference.double(), torch.ones_like(predicted)])
    return sums.index_add(1, (predicted * bins).long().clamp(0, bins - 1), columns)


def calibration(sums: Tensor) -> dict[str, list[float]]:
    """Format `calibration_sums` for a metrics record."""
    return dict(zip(("predicted", "target", "count"), sums.tolist(), strict=True))


class _Responses(NamedTuple):
    """Responses of a batch, with the chosen and the rejected ones marked."""

    logps: Tensor  # (S,) without gradient
    lengths: Tensor  # (S,)
    chosen: Tensor  # (S,) bool
    rejected: Tensor  # (S,) bool


def _responses(policy: Logps) -> _Responses:
    """All responses of a batch, with the chosen and the rejected ones marked."""
    if isinstance(policy, TokenLogps):
        policy = policy.sequences()
    if isinstance(policy, SequenceLogps):
        logps = torch.cat([policy.chosen, policy.rejected]).detach()
        lengths = torch.cat([policy.chosen_lengths, policy.rejected_lengths])
        chosen = torch.arange(len(logps), device=logps.device) < len(policy.chosen)
        return _Responses(logps, lengths, chosen, ~chosen)
    if isinstance(policy, UnpairedLogps):
        chosen = policy.desirable
        return _Responses(policy.logps.detach(), policy.lengths, chosen, ~chosen)
    assert isinstance(policy, GroupedLogps)
    best, worst, unequal = best_and_worst(policy)
    none = torch.zeros_like(policy.logps, dtype=torch.bool)
    sides = [none.index_put((index,), unequal, accumulate=True) for index in (best, worst)]
    return _Responses(policy.logps.detach(), policy.lengths, *sides)


def _margins(logps: Tensor) -> Tensor:
    """z_w − z_l of pairs, (B,) fp64, from the log-probs (2B,) of all chosen, then all rejected."""
    chosen, rejected = logps.double().chunk(2)
    return chosen - rejected


def preferences(margin: Tensor, preference: Tensor) -> dict[str, Tensor]:
    """Values of each pair whose means are `preference/*`, each (B,) fp64.

    margin: (B,) fp64, z_w − z_l. preference: (B,), p.
    """
    p, predicted = preference.double(), margin.sigmoid()
    cross_entropy = -p * logsigmoid(margin) - (1 - p) * logsigmoid(-margin)
    entropy = -torch.xlogy(p, p) - torch.xlogy(1 - p, 1 - p)
    return {
        "accuracy": (1 + margin.sign() * (p - 0.5).sign()) / 2,
        "mean_kl": cross_entropy - entropy,
        "pci": torch.minimum(predicted, 1 - predicted),
    }
