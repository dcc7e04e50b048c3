"""Errors of a result against fp64, from the formulas of `fastpref.ops.reference`.

Log-probs are compared for every token. Gradients are compared for SAMPLE tokens and for as many
evenly spaced rows of the head, half of them rows of labels: a full fp64 gradient of the head would
take twice the memory of the head again. KL is compared for SAMPLE tokens, score geometry for the
first pair, attention for the first group.

    dlogp_dhidden_t = weight[y_t] - softmax_t @ weight
    dweight[rows]   = (onehot - softmax)[:, rows].T @ (grad_logps * hidden)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastpref.bench import attention
from fastpref.bench.contestants import completions, dpo
from fastpref.bench.problems import Inputs, Problem
from fastpref.ops import reference

SAMPLE = 256
_CHUNK_BYTES = 256 << 20
Errors = dict[str, float]
ErrorFunction = Callable[[Tensor], Errors]  # of a result; its gradients are in the inputs


def error_function(problem: Problem, inputs: Inputs) -> ErrorFunction:
    """A function that computes the errors of a result, and of the gradients in the inputs.

    logps_max, logps_rms         nats, of the token log-probs (or KL)
    value                        relative, of a scalar or a vector of norms
    grad_hidden, grad_weight     ||result - exact|| / ||exact|| on the sample
    """
    if problem.op == "linear_kl":
        return _kl(inputs)
    if problem.op == "score_geometry":
        return _geometry(problem, inputs)
    if problem.op == "packed_attention":
        return attention.error_function(inputs)
    if problem.op == "dpo_padded":
        return _padded(inputs)
    return _logps(problem, inputs)


def spread(total: int) -> Tensor:
    """At most SAMPLE evenly spaced indices below `total`."""
    return torch.linspace(0, total - 1, min(SAMPLE, total)).round().long()


def _logps(problem: Problem, inputs: Inputs) -> ErrorFunction:
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    wide, labels = weight.double(), inputs.labels
    lse, target = _statistics(hidden, wide, labels)
    logps = target - lse
    tokens = spread(problem.T).to(labels.device)
    rows = torch.cat([labels[tokens[::2]], spread(problem.V)[::2].to(labels.device)]).unique()
    softmax = (hidden[tokens].double() @ wide.T).sub_(lse[tokens, None]).exp_()
    dlogp_dhidden = wide[labels[tokens]] - softmax @ wide
    dlogits = (labels[:, None] == rows).double()
    dlogits -= (hidden.double() @ wide[rows].T).sub_(lse[:, None]).exp_()
    even, dpo_grad_logps = torch.ones_like(logps), _dpo_grad_logps(logps, inputs.cu_seqlens)
    del wide, softmax

    def errors_of(result: Tensor) -> Errors:
        if problem.op == "dpo":
            errors = {"value": _relative(result, dpo(logps, inputs.cu_seqlens))}
            grad_logps = dpo_grad_logps
        elif result.dim():
            errors, grad_logps = _differences(result, logps), inputs.grad_logps.double()
        else:
            errors, grad_logps = {"value": _relative(result, logps.sum())}, even
        if inputs.hidden.grad is not None:
            exact = dlogp_dhidden * grad_logps[tokens, None]
            errors["grad_hidden"] = _relative(inputs.hidden.grad[tokens], exact)
        if inputs.weight.grad is not None:
            exact = dlogits.T @ (grad_logps[:, None] * hidden.double())
            errors["grad_weight"] = _relative(inputs.weight.grad[rows], exact)
        return errors

    return errors_of


def _padded(inputs: Inputs) -> ErrorFunction:
    rows, cu_seqlens = completions(inputs)
    hidden, wide = inputs.hidden.detach()[rows], inputs.weight.detach().double()
    lse, target = _statistics(hidden, wide, inputs.labels[rows])
    logps = target - lse
    tokens = spread(len(rows)).to(rows.device)
    softmax = (hidden[tokens].double() @ wide.T).sub_(lse[tokens, None]).exp_()
    grad_hidden = wide[inputs.labels[rows[tokens]]] - softmax @ wide
    grad_hidden *= _dpo_grad_logps(logps, cu_seqlens)[tokens, None]
    value = dpo(logps, cu_seqlens)

    def errors_of(result: Tensor) -> Errors:
        errors = {"value": _relative(result, value)}
        if inputs.hidden.grad is not None:
            errors["grad_hidden"] = _relative(inputs.hidden.grad[rows[tokens]], grad_hidden)
        return errors

    return errors_of


def _kl(inputs: Inputs) -> ErrorFunction:
    tokens = spread(len(inputs.hidden)).to(inputs.labels.device)
    hidden = inputs.hidden.detach()[tokens].double().requires_grad_()
    weight = inputs.weight.detach().double()
    kl = reference.linear_kl(hidden, weight, inputs.ref_hidden[tokens].double(), weight)
    (grad_hidden,) = torch.autograd.grad(kl @ inputs.grad_logps[tokens].double(), hidden)
    kl = kl.detach()

    def errors_of(result: Tensor) -> Errors:
        errors = _differences(result[tokens], kl)
        if inputs.hidden.grad is not None:
            errors["grad_hidden"] = _relative(inputs.hidden.grad[tokens], grad_hidden)
        return errors

    return errors_of


def _geometry(problem: Problem, inputs: Inputs) -> ErrorFunction:
    """Error function for the first pair."""
    offsets = inputs.cu_seqlens.tolist()
    chosen = slice(0, offsets[1])
    rejected = slice(offsets[problem.pairs], offsets[problem.pairs + 1])
    hidden, labels = (
        torch.cat([x[chosen], x[rejected]]) for x in (inputs.hidden.detach(), inputs.labels)
    )
    ends = [0, chosen.stop, len(labels)]
    exact = torch.stack(
        reference.score_geometry(
            hidden.double(), inputs.weight.detach().double(), labels, labels.new_tensor(ends)
        )
    )
    return lambda result: {"value": _relative(result.view(3, -1)[:, 0], exact)}


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


def _dpo_grad_logps(logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    leaf = logps.clone().requires_grad_()
    (grad,) = torch.autograd.grad(dpo(leaf, cu_seqlens), leaf)
    return grad


def _differences(result: Tensor, exact: Tensor) -> Errors:
    gap = result.double() - exact
    return {"logps_max": float(gap.abs().max()), "logps_rms": float(gap.square().mean().sqrt())}


def _relative(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())
