"""The Disentanglement Band: whether a step lifts the chosen response and lowers the rejected one.

With the incentives d_w, d_l of an objective and the scores s_w, s_l, the gradients of the two
log-probs, gradient flow moves the log-probs of a pair by (Theorem 3.1, arXiv:2604.18239)

    dz_w = d_w |s_w|^2 - d_l <s_w, s_l>        dz_l = d_w <s_w, s_l> - d_l |s_l|^2

and for positive incentives and a cosine rho > 0, dz_w >= 0 >= dz_l if and only if (Eq. 9)

    |log r - log r*| <= -log rho,    r = d_w / d_l,    r* = |s_l| / |s_w|.

With rho <= 0 every positive ratio is inside. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.dynamics.dpo_pg import inner_product
from fastpref.logps import SequenceLogps
from fastpref.ops import ScoreGeometry

BAND_METRICS = (
    "band/log_r",
    "band/log_r_star",
    "band/cosine",
    "band/lower",
    "band/upper",
    "band/inside",
    "band/dz_chosen",
    "band/dz_rejected",
)


# Shares of pairs by their own pathway, and means over pairs.
PAIR_BAND_METRICS = (
    "pair_band/inside",
    "pair_band/both_up",
    "pair_band/both_down",
    "pair_band/crossed",
    "pair_band/log_r",
    "pair_band/log_r_star",
    "pair_band/cosine",
)


class Band(NamedTuple):
    """Position of pairs relative to their band; each (B,) fp64, or () for a batch's mean scores.

    `log_r` is NaN where an incentive is negative. `lower` and `upper` are infinite where the cosine
    is not positive.
    """

    log_r: Tensor  # log(d_w / d_l)
    log_r_star: Tensor  # log(|s_l| / |s_w|), the middle of the band
    cosine: Tensor
    lower: Tensor  # log r* + log rho: below it both log-probs fall
    upper: Tensor  # log r* - log rho: above it both rise
    dz_chosen: Tensor  # first-order change of the log-prob per unit of learning rate
    dz_rejected: Tensor

    @property
    def inside(self) -> Tensor:
        """Whether the chosen log-prob does not fall and the rejected one does not rise, bool.

        The test is on these signs, so it is also valid for incentives that are not positive. For
        positive ones it is `lower <= log_r <= upper`, except for rounding at an edge.
        """
        return (self.dz_chosen >= 0) & (self.dz_rejected <= 0)

    @property
    def pathway(self) -> Tensor:
        """The pathway of Table 2, int64: 1 both rise, 2 both fall, 3 inside the band.

        0: the chosen log-prob falls and the rejected one rises, which requires an incentive that is
        not positive.
        """
        up, down = self.dz_chosen >= 0, self.dz_rejected <= 0
        # A log-prob that does not change is on both sides, and counts as inside.
        return torch.where(up, torch.where(down, 3, 1), torch.where(down, 2, 0))


def band(d_w: Tensor, d_l: Tensor, geometry: ScoreGeometry) -> Band:
    """Band and first-order dynamics of pairs.

    d_w, d_l: (B,) incentives of `losses.incentives`, calibrated or not; or () for a batch whose
        pairs share theirs.
    geometry: of `ops.score_geometry` or `parameter_geometry`; (B,) with `per_pair`, else ().

    The prediction holds for plain gradient descent on the loss of this pair, with respect to the
    parameters of the geometry; it ignores momentum, preconditioning, clipping and the other pairs
    of the step. Source: Eqs. 6 to 11 of arXiv:2604.18239.
    """
    d_w, d_l, chosen, rejected, cosine = (x.detach().double() for x in (d_w, d_l, *geometry))
    product = cosine * chosen * rejected
    log_r_star = rejected.log() - chosen.log()
    half_width = half_band(cosine)
    return Band(
        log_r=d_w.log() - d_l.log(),
        log_r_star=log_r_star,
        cosine=cosine,
        lower=log_r_star - half_width,
        upper=log_r_star + half_width,
        dz_chosen=d_w * chosen.square() - d_l * product,
        dz_rejected=d_w * product - d_l * rejected.square(),
    )


def half_band(cosine: Tensor) -> Tensor:
    """-log rho, half the band's width in log r; infinite where the cosine is not positive."""
    return -cosine.clamp(min=0).log()


def band_sums(batch: Band) -> Tensor:
    """Sums and counts of BAND_METRICS, (16,) fp64, of the bands of batches; add them over steps.

    Values that are NaN or infinite (see `Band`) enter neither sum nor count.
    """
    return _sums_and_counts(*batch[:5], batch.inside.double(), *batch[5:])


def pair_band_sums(pairs: Band) -> Tensor:
    """Sums and counts of PAIR_BAND_METRICS, (14,) fp64; add them over batches and ranks."""
    shares = [(pairs.pathway == number).double() for number in (3, 1, 2, 0)]
    return _sums_and_counts(*shares, *pairs[:3])


def band_metrics(names: Sequence[str], sums: Tensor) -> dict[str, Tensor]:
    """Means by name, each (); NaN where no batch or pair had the value."""
    totals, counts = sums.chunk(2)
    return dict(zip(names, totals / counts, strict=True))


def moving_average(average: Tensor, new: Tensor, momentum: float) -> Tensor:
    """momentum * average + (1 - momentum) * new, entry by entry.

    The first value replaces NaN; a new value that is not finite changes nothing.
    """
    moved = torch.where(average.isnan(), new, average.lerp(new, 1 - momentum))
    return torch.where(new.isfinite(), moved, average)


def _sums_and_counts(*columns: Tensor) -> Tensor:
    values = torch.stack(torch.broadcast_tensors(*columns)).view(len(columns), -1)
    finite = values.isfinite()
    return torch.cat([values.where(finite, 0.0).sum(1), finite.double().sum(1)])


def parameter_scores(policy: SequenceLogps, parameters: Sequence[Tensor]) -> Tensor:
    """Sums of the chosen and of the rejected scores with respect to any parameters, (2, N) fp32.

    N is the number of their elements; fp64 for fp64 parameters. The cost is two backward passes
    down to the lowest of the parameters. The graph is retained, and no `.grad` is written.
    `ops.batch_geometry` turns the sums into norms and a cosine. Raises ValueError as
    `parameter_geometry` does.
    """
    _check_scores(policy, parameters)
    sides = (_score(logps.sum(), parameters) for logps in (policy.chosen, policy.rejected))
    flat = [torch.cat([gradient.flatten() for gradient in side]) for side in sides]
    scores = torch.stack(flat)
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def parameter_geometry(
    policy: SequenceLogps, parameters: Sequence[Tensor], *, per_pair: bool = True
) -> ScoreGeometry:
    """Norms and cosine of the scores with respect to any parameters, by autograd.

        s = gradient of a response's summed log-prob with respect to `parameters`

    As `ops.score_geometry`, which measures the head's weight only: results are (B,) fp64, or () for
    the batch-mean scores, and the cosine is 0 where a norm is 0. The cost is a backward pass, down
    to the lowest of the parameters, for each response, or two in all without `per_pair`; so it is
    meant for the last adapter, and for validation on small models. The graph is retained, and no
    `.grad` is written. A parameter that does not enter the log-probs contributes 0.

    Raises ValueError where `parameters` is empty, or `policy` carries no gradient.
    """
    _check_scores(policy, parameters)
    sides = policy.chosen, policy.rejected
    if per_pair:
        units = list(zip(*(side.unbind() for side in sides), strict=True))
    else:
        units = [(policy.chosen.mean(), policy.rejected.mean())]
    products = []
    for unit in units:
        s_w, s_l = (_score(logps, parameters) for logps in unit)
        products.append(
            torch.stack([inner_product(a, b) for a, b in ((s_w, s_w), (s_l, s_l), (s_w, s_l))])
        )
    chosen, rejected, product = torch.stack(products).unbind(1)
    chosen, rejected = chosen.sqrt(), rejected.sqrt()
    size = chosen * rejected
    cosine = (product / size).masked_fill(size == 0, 0.0).clamp(-1, 1)
    geometry = ScoreGeometry(chosen, rejected, cosine)
    return geometry if per_pair else ScoreGeometry(*(value[0] for value in geometry))


def _check_scores(policy: SequenceLogps, parameters: Sequence[Tensor]) -> None:
    if not parameters:
        raise ValueError("parameters: expected at least one, got none; is anything trained?")
    if not (policy.chosen.requires_grad and policy.rejected.requires_grad):
        raise ValueError(
            "policy: expected log-probs with a gradient, got constants; call it before detaching "
            "them and outside no_grad"
        )


def _score(logps: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    gradients: Any = torch.autograd.grad(
        logps, tuple(parameters), retain_graph=True, materialize_grads=True
    )
    return list(gradients)
