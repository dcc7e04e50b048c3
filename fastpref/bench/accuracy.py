"""Errors of a result against fp64, from the formulas of `fastpref.ops.reference`.

Log-probs are compared for every token. Gradients are compared for SAMPLE tokens and as many rows of
the head, evenly spread, half of them those of labels: a whole fp64 gradient of the head would need
twice its memory again. KL is compared for SAMPLE tokens, the geometry for the first pair.

    direction_t = weight[y_t] - softmax_t @ weight         d logps_t / d hidden_t
    rows        = (onehot - softmax)[:, rows].T @ (g * hidden)      d (g . logps) / d weight[rows]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastpref.bench.contestants import completions, dpo
from fastpref.bench.problems import Inputs, Problem
from fastpref.ops import reference

SAMPLE = 256
_CHUNK_BYTES = 256 << 20
Errors = dict[str, float]
Judge = Callable[[Tensor], Errors]  # of a result, whose gradients lie in the inputs


def judge(problem: Problem, inputs: Inputs) -> Judge:
    """A function that takes a run's result, with its gradients in the inputs, to its errors.

    logps_max, logps_rms         nats, of the token log-probs (or KL)
    value                        of a scalar or a vector of norms, relative
    grad_hidden, grad_weight     ||found - true|| / ||true|| on the sample
    """
    if problem.op == "linear_kl":
        return _kl(inputs)
    if problem.op == "score_geometry":
        return _geometry(problem, inputs)
    if problem.op == "dpo_padded":
        return _padded(inputs)
    return _logps(problem, inputs)


def spread(total: int) -> Tensor:
    """At most SAMPLE indices below `total`, evenly spread."""
    return torch.linspace(0, total - 1, min(SAMPLE, total)).round().long()


def _logps(problem: Problem, inputs: Inputs) -> Judge:
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    wide, labels = weight.double(), inputs.labels
    lse, target = _statistics(hidden, wide, labels)
    logps = target - lse
    tokens = spread(problem.T).to(labels.device)
    rows = torch.cat([labels[tokens[::2]], spread(problem.V)[::2].to(labels.device)]).unique()
    softmax = (hidden[tokens].double() @ wide.T).sub_(lse[tokens, None]).exp_()
    directions = wide[labels[tokens]] - softmax @ wide
    deltas = (labels[:, None] == rows).double()
    deltas -= (hidden.double() @ wide[rows].T).sub_(lse[:, None]).exp_()
    even, dpo_upstream = torch.ones_like(logps), _dpo_upstream(logps, inputs.cu_seqlens)
    del wide, softmax

    def errors(result: Tensor) -> Errors:
        if problem.op == "dpo":
            found, upstream = (
                {"value": _relative(result, dpo(logps, inputs.cu_seqlens))},
                dpo_upstream,
            )
        elif result.dim():
            found, upstream = _differences(result, logps), inputs.upstream.double()
        else:
            found, upstream = {"value": _relative(result, logps.sum())}, even
        if inputs.hidden.grad is not None:
            true = directions * upstream[tokens, None]
            found["grad_hidden"] = _relative(inputs.hidden.grad[tokens], true)
        if inputs.weight.grad is not None:
            true = deltas.T @ (upstream[:, None] * hidden.double())
            found["grad_weight"] = _relative(inputs.weight.grad[rows], true)
        return found

    return errors


def _padded(inputs: Inputs) -> Judge:
    rows, cu_seqlens = completions(inputs)
    hidden, wide = inputs.hidden.detach()[rows], inputs.weight.detach().double()
    lse, target = _statistics(hidden, wide, inputs.labels[rows])
    logps = target - lse
    tokens = spread(len(rows)).to(rows.device)
    softmax = (hidden[tokens].double() @ wide.T).sub_(lse[tokens, None]).exp_()
    true = wide[inputs.labels[rows[tokens]]] - softmax @ wide
    true *= _dpo_upstream(logps, cu_seqlens)[tokens, None]
    value = dpo(logps, cu_seqlens)

    def errors(result: Tensor) -> Errors:
        found = {"value": _relative(result, value)}
        if inputs.hidden.grad is not None:
            found["grad_hidden"] = _relative(inputs.hidden.grad[rows[tokens]], true)
        return found

    return errors


def _kl(inputs: Inputs) -> Judge:
    tokens = spread(len(inputs.hidden)).to(inputs.labels.device)
    hidden = inputs.hidden.detach()[tokens].double().requires_grad_()
    weight = inputs.weight.detach().double()
    kl = reference.linear_kl(hidden, weight, inputs.ref_hidden[tokens].double(), weight)
    (true,) = torch.autograd.grad(kl @ inputs.upstream[tokens].double(), hidden)
    kl = kl.detach()

    def errors(result: Tensor) -> Errors:
        found = _differences(result[tokens], kl)
        if inputs.hidden.grad is not None:
            found["grad_hidden"] = _relative(inputs.hidden.grad[tokens], true)
        return found

    return errors


def _geometry(problem: Problem, inputs: Inputs) -> Judge:
    """The first pair alone."""
    offsets = inputs.cu_seqlens.tolist()
    chosen = slice(0, offsets[1])
    rejected = slice(offsets[problem.pairs], offsets[problem.pairs + 1])
    hidden, labels = (
        torch.cat([x[chosen], x[rejected]]) for x in (inputs.hidden.detach(), inputs.labels)
    )
    ends = [0, chosen.stop, len(labels)]
    true = reference.score_geometry(
        hidden.double(), inputs.weight.detach().double(), labels, labels.new_tensor(ends)
    )
    wanted = torch.stack(true)
    return lambda result: {"value": _relative(result.view(3, -1)[:, 0], wanted)}


def _statistics(hidden: Tensor, wide: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and the label's logit, (T,) fp64 each, a chunk of tokens at a time."""
    rows = max(1, _CHUNK_BYTES // (8 * len(wide)))
    parts = []
    for start in range(0, len(hidden), rows):
        logits = hidden[start : start + rows].double() @ wide.T
        target = logits.gather(1, labels[start : start + rows, None]).squeeze(1)
        parts.append((logits.logsumexp(1), target))
    lse, targets = zip(*parts, strict=True)
    return torch.cat(lse), torch.cat(targets)


def _dpo_upstream(logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    leaf = logps.clone().requires_grad_()
    (grad,) = torch.autograd.grad(dpo(leaf, cu_seqlens), leaf)
    return grad


def _differences(found: Tensor, true: Tensor) -> Errors:
    gap = found.double() - true
    return {"logps_max": float(gap.abs().max()), "logps_rms": float(gap.square().mean().sqrt())}


def _relative(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())
