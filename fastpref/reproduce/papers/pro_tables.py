"""The theorems of the PRO paper on tables of logits, with every response and the hyper response.

z are the log-probs of a policy, r = beta (z − ref) its rewards, c the centered scores of labeled
responses and w their weights in the regularizer:

    L = −beta/n · sum of c_i z_i + alpha/2 · sum over all i, j of w_i w_j K(r_i − r_j)

over all responses (eDPO), or over the labeled ones and a hyper response, which has the probability
of all others together (PRO). K(x) = KL(fair coin || coin of S(x)), S the logistic function.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref import losses
from fastpref.logps import GroupedLogps, SequenceLogps
from fastpref.losses.groupwise import PROS
from fastpref.losses.numerics import from_fair_coin
from fastpref.reproduce.study import Job, Record

RESPONSES, BETA, DRAWS = 7, 0.5, 8
SCORES = (1.0, 0.6, 0.1)  # of the labeled responses, which are the first
N = len(SCORES)
ETA, ALPHA = 0.6, 3.0  # share of the labeled responses in the regularizer, and its strength
SHIFT = 5.0  # nats
_FAR = 400.0  # reward at which the slopes of a loss are those at infinity


def theorems(job: Job) -> list[Record]:
    """The largest deviations from the theorems over drawn tables, in fp64."""
    generator = torch.Generator().manual_seed(job.seed)
    draws = [_deviations(generator) for _ in range(DRAWS)]
    record: Record = {"step": 0}
    for name in draws[0]:
        worst = min if name.endswith("_least") else max
        record[f"theorem/{name}"] = worst(draw[name] for draw in draws)
    return [record]


def _deviations(generator: torch.Generator) -> dict[str, float]:
    reference, policy = _normal(generator, 2, RESPONSES).log_softmax(1)
    unlabeled = _normal(generator, RESPONSES - N).softmax(0)
    return {
        "decomposition": decomposition(reference, policy, generator),
        "pairs": augmented_pairs(reference, policy),
        "shift_dpo": abs(_shifted("dpo")),
        "shift_pro_p_least": _shifted("pro_p"),
        **optima(reference, policy, unlabeled),
        **existence(generator),
    }


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def decomposition(reference: Tensor, policy: Tensor, generator: torch.Generator) -> float:
    """Theorem 3.1: largest difference of the gradients of population DPO and of its two parts."""
    responses = _normal(generator, RESPONSES).softmax(0)
    raw = _normal(generator, RESPONSES, RESPONSES)
    wins = torch.sigmoid(raw - raw.T)  # p(row beats column)
    scores = wins @ responses - 0.5
    pairs = responses[:, None] * responses

    def population(z: Tensor) -> Tensor:
        rewards = BETA * (z - reference)
        return -(pairs * wins * logsigmoid(rewards[:, None] - rewards)).sum()

    def parts(z: Tensor) -> Tensor:
        rewards = BETA * (z - reference)
        optimizer = -BETA * (responses * scores * z).sum()
        return optimizer + (pairs * from_fair_coin(rewards[:, None] - rewards)).sum() / 2

    return _gradient_difference(population, parts, policy)


def augmented_pairs(reference: Tensor, policy: Tensor) -> float:
    """Theorem 4.3: PRO-P against DPO on labeled and pseudo-labeled pairs, as `decomposition`."""
    eta = 2 / 3
    weights = torch.tensor([eta / 2, eta / 2, 1 - eta], dtype=torch.float64)
    wins = torch.full((3, 3), 0.5, dtype=torch.float64)
    wins[0, 1], wins[1, 0] = 1.0, 0.0
    scores = torch.tensor([0.25, -0.25], dtype=torch.float64)

    pro_p = partial(loss, reference, scores, 1 / eta**2, eta, torch.ones_like(scores[:1]))

    def augmented(z: Tensor) -> Tensor:
        rewards = BETA * (with_hyper_response(z, 2) - with_hyper_response(reference, 2))
        likelihoods = logsigmoid(rewards[:, None] - rewards)
        return -(weights[:, None] * weights * wins * likelihoods).sum() / eta**2

    return _gradient_difference(pro_p, augmented, policy)


def _gradient_difference(
    one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], policy: Tensor
) -> float:
    """The largest difference of the gradients in the logits of a policy, relative to the norm."""
    gradients = []
    for function in (one, other):
        logits = policy.clone().requires_grad_()
        gradients.append(torch.autograd.grad(function(logits.log_softmax(0)), logits)[0])
    return float((gradients[0] - gradients[1]).abs().max() / gradients[1].norm())


def with_hyper_response(logps: Tensor, labeled: int) -> Tensor:
    """Log-probs of the labeled responses, and of all others together."""
    return torch.cat([logps[:labeled], logps[labeled:].logsumexp(0, keepdim=True)])


def loss(
    reference: Tensor,
    centered: Tensor,  # scores of the labeled responses
    alpha: float,
    eta: float,  # share of the labeled responses in the regularizer
    unlabeled: Tensor,  # shares of the others among themselves; a single one merges them
    logps: Tensor,
) -> Tensor:
    """eDPO, or PRO with a hyper response for all unlabeled ones."""
    labeled = len(centered)
    weights = torch.cat([torch.full_like(centered, eta / labeled), (1 - eta) * unlabeled])
    optimizer = -BETA / labeled * (centered * logps[:labeled]).sum()
    if len(unlabeled) == 1:
        logps, reference = (with_hyper_response(z, labeled) for z in (logps, reference))
    rewards = BETA * (logps - reference)
    pull = weights[:, None] * weights * from_fair_coin(rewards[:, None] - rewards)
    return optimizer + alpha / 2 * pull.sum()


def minimize(function: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Log-probs at the minimum of a function of them, by L-BFGS over the logits."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=1000,
        tolerance_grad=1e-13,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        value = function(logits.log_softmax(0))
        value.backward()
        return value.item()

    optimizer.step(closure)
    return logits.detach().log_softmax(0)


def optima(reference: Tensor, start: Tensor, unlabeled: Tensor) -> dict[str, float]:
    """Corollary 3.3 and Theorem 4.1 at the minima of eDPO and PRO, nats.

    Ratios are log π − log ref, those of labeled responses less that of the others.
    """
    scores = torch.tensor(SCORES, dtype=torch.float64)
    centered = scores - scores.mean()
    complete, merged = (
        minimize(partial(loss, reference, centered, ALPHA, ETA, shares), start)
        for shares in (unlabeled, torch.ones_like(unlabeled[:1]))
    )
    ratios = complete - reference
    labeled, others = ratios[:N], ratios[N:]
    difference = with_hyper_response(complete, N) - with_hyper_response(merged, N)
    return {
        "unlabeled_spread": float(others.max() - others.min()),
        "preferred_least": float((labeled - others.mean())[centered > 0].min()),
        "dispreferred": float((labeled - others.mean())[centered < 0].max()),
        "hyper": float(difference.abs().max()),
    }


def _shifted(name: str) -> float:
    """Change of a loss if both log-ratios of a pair at the reference fall by SHIFT."""
    objective = losses.build(name, beta=BETA)
    assert isinstance(objective, losses.PairwiseLoss)
    zero, ones = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.long)
    reference, lower = (SequenceLogps(z, z, ones, ones) for z in (zero, zero - SHIFT))
    return float(objective(lower, reference).loss - objective(reference, reference).loss)


def existence(generator: torch.Generator) -> dict[str, float]:
    """Theorem 4.2: slopes of PRO-S far away, with alpha just above and just below its threshold.

    An optimum exists if the loss rises in every direction.
    """
    scores = torch.rand(4, generator=generator, dtype=torch.float64)
    threshold = float(PROS.required_alpha(scores, torch.tensor([0, len(scores)])))
    return {
        "slope_above_least": least_slope(scores, 1.05 * threshold),
        "slope_below": least_slope(scores, 0.95 * threshold),
    }


def least_slope(scores: Tensor, alpha: float) -> float:
    """The least slope of PRO-S far from the reference, in which some rewards rise or fall.

    Directions move one set of responses together: all sets, either way.
    """
    objective, count = PROS(beta=BETA, alpha=alpha), len(scores)
    zero = torch.zeros(count, dtype=torch.float64)
    groups, ones = torch.tensor([0, count]), torch.ones(count, dtype=torch.long)

    def value(rewards: Tensor) -> float:
        policy = GroupedLogps(rewards / BETA, ones, groups, scores)
        return float(objective(policy, GroupedLogps(zero, ones, groups, scores)).loss)

    moves = itertools.product((-1.0, 0.0, 1.0), repeat=count)
    directions = [torch.tensor(move, dtype=torch.float64) for move in moves if any(move)]
    return min((value(2 * _FAR * d) - value(_FAR * d)) / _FAR for d in directions)
