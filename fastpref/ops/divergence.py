"""Divergence of a student's token distributions from a teacher's, without the logits in memory.

    forward  KL(p || q) = sum_v p (log p − log q)
    reverse  KL(q || p) = sum_v q (log q − log p)
    jsd      beta KL(p || m) + (1 − beta) KL(q || m),  m = beta p + (1 − beta) q

with p the teacher and q the student. The gradient by the student's logits is q − p for the forward
KL, and q (g − sum_v q g) for the others, with g = log q − log p, or (1 − beta)(log q − log m).

Plain PyTorch on any device, with the chunks of `fastpref.ops.chunked`: the forward pass holds one
chunk of both models' logits and keeps the gradient by the hidden states; the backward pass of a
trained head recomputes both logits for one panel of the vocabulary at a time. GEMMs over the
student's and the teacher's head: 2 for the value, 1 more for the hidden states, 3 more for a
trained head.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastpref.ops import chunked
from fastpref.ops.api import linear_kl
from fastpref.ops.backend import Head
from fastpref.ops.checks import check_device, check_head
from fastpref.ops.reference import statistics_dtype
from fastpref.utils.first_order import refuse_second_order, refuse_transforms

Kind = Literal["forward", "reverse", "jsd"]
_REMEDY = "compute the divergence from the logits"


def linear_divergence(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    teacher_hidden: Tensor,  # (T, E)
    teacher_weight: Tensor,  # (V, E)
    kind: Kind = "reverse",
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
) -> Tensor:  # (T,)
    """Divergence of each token's distributions, nats, differentiable in the student's tensors.

    beta: weight of the teacher in the mixture of "jsd"; 1/2 is the Jensen–Shannon divergence.
        Agarwal et al. 2024, Eq. 1, arXiv:2306.13649.
    temperature: divides the logits of both models.

    The results are fp32, or fp64 for fp64 inputs. On a GPU the forward KL of heads with one scale
    and without biases is `ops.linear_kl`. Gradients are first-order only. Raises ValueError, naming
    the argument, for a wrong kind, shape, dtype, device or number.
    """
    _check_numbers(kind, beta, temperature)
    student = _with_temperature(Head(weight, bias, logit_scale, softcap), temperature)
    teacher = Head(teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap)
    teacher = _with_temperature(teacher, temperature)
    check_head(hidden, student)
    _check_teacher(hidden, student, teacher_hidden, teacher)
    refuse_transforms("linear_divergence", hidden, weight, bias, remedy=_REMEDY)
    plain = bias is None and teacher_bias is None and student[2:] == teacher[2:]
    if kind == "forward" and plain and hidden.is_cuda and hidden.dtype == teacher_hidden.dtype:
        return linear_kl(
            hidden, weight, teacher_hidden, teacher_weight,
            logit_scale=student.logit_scale, softcap=student.softcap,
        )  # fmt: skip
    divergence: Tensor = _LinearDivergence.apply(
        hidden, weight, bias, teacher_hidden.detach(),
        _Heads(student, teacher._replace(weight=teacher_weight.detach())), _Divergence(kind, beta),
    )  # fmt: skip
    return divergence


class _Divergence(NamedTuple):
    kind: Kind
    beta: float


class _Heads(NamedTuple):
    student: Head
    teacher: Head


class _Rows(NamedTuple):
    """Statistics of rows of both models' logits, (n,) each."""

    lse: Tensor
    teacher_lse: Tensor
    center: Tensor  # mean of g under the student, 0 for the forward KL


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        heads: _Heads,
        divergence: _Divergence,
    ) -> Tensor:
        train_hidden, train_weight, train_bias, *_ = ctx.needs_input_grad
        values, rows, dhidden = _forward(hidden, teacher_hidden, heads, divergence, train_hidden)
        trains_head = train_weight or train_bias
        saved = (hidden, weight, bias, teacher_hidden, *rows) if trains_head else (None,) * 7
        ctx.save_for_backward(dhidden, *saved)
        ctx.heads = heads._replace(student=heads.student._replace(weight=weight.detach()))
        ctx.divergence = divergence
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order("linear_divergence", _REMEDY)
        dhidden, hidden, weight, bias, teacher_hidden, *rows = ctx.saved_tensors
        train_hidden, train_weight, train_bias, *_ = ctx.needs_input_grad
        grad_weight = torch.empty_like(weight) if train_weight else None
        grad_bias = torch.empty_like(bias) if train_bias else None
        if train_weight or train_bias:
            _backward_head(
                grad, hidden, teacher_hidden, ctx.heads, ctx.divergence, _Rows(*rows),
                grad_weight, grad_bias,
            )  # fmt: skip
        grad_hidden = None
        if train_hidden:
            grad_hidden = torch.mul(dhidden, grad[:, None], out=torch.empty_like(dhidden))
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _forward(
    hidden: Tensor,
    teacher_hidden: Tensor,
    heads: _Heads,
    divergence: _Divergence,
    train_hidden: bool,
) -> tuple[Tensor, _Rows, Tensor | None]:
    """Divergences, statistics, and the gradient by the hidden states, a chunk of tokens a time."""
    tokens, vocabulary = len(hidden), len(heads.student.weight)
    dtype = statistics_dtype(hidden)
    values, *columns = hidden.new_empty(4, tokens, dtype=dtype).unbind(0)
    stats = _Rows(*columns)
    dhidden = hidden.new_empty(hidden.shape) if train_hidden else None
    # Two models' logits share a chunk.
    chunk = max(1, min(chunked.CHUNK_BYTES // (2 * dtype.itemsize * vocabulary), tokens))
    buffers = hidden.new_empty(2, chunk, vocabulary, dtype=dtype)
    student, teacher = heads
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in chunked._slices(tokens, chunk):
            size = rows.stop - rows.start
            logits, teacher_logits = buffers[:, :size].unbind(0)
            chunked._project(hidden[rows], student.weight, out=logits)
            chunked._project(teacher_hidden[rows], teacher.weight, out=teacher_logits)
            for part in chunked._slices(size, -(-chunk // chunked.SLICES)):
                t = slice(rows.start + part.start, rows.start + part.stop)
                slope = chunked._finish_logits(logits[part], student, train_hidden)
                chunked._finish_logits(teacher_logits[part], teacher, False)
                values[t], of_rows = _score_rows(logits[part], teacher_logits[part], divergence)
                for column, value in zip(stats, of_rows, strict=True):
                    column[t] = value
                _scale(logits[part], student.logit_scale, slope)
            if dhidden is not None:
                sums = logits.new_zeros(size, hidden.shape[1])
                dhidden[rows] = chunked._pull_back(logits, student.weight, sums)
    return values, stats, dhidden


def _backward_head(
    grad: Tensor,  # (T,)
    hidden: Tensor,
    teacher_hidden: Tensor,
    heads: _Heads,
    divergence: _Divergence,
    stats: _Rows,
    grad_weight: Tensor | None,  # (V, D), written
    grad_bias: Tensor | None,  # (V,), written
) -> None:
    """Gradients of the student's head from recomputed logits, a panel of the vocabulary a time."""
    tokens = len(hidden)
    panels = list(chunked._panels(tokens, len(heads.student.weight), 2 * grad.itemsize))
    buffer = grad.new_empty(2 * tokens * (panels[0].stop - panels[0].start))
    with torch.autocast(hidden.device.type, enabled=False):
        for columns in panels:
            student, teacher = (head.rows(columns) for head in heads)
            width = columns.stop - columns.start
            size = 2 * tokens * width
            logits, teacher_logits = buffer[:size].view(2, tokens, width)
            chunked._project(hidden, student.weight, out=logits)
            chunked._project(teacher_hidden, teacher.weight, out=teacher_logits)
            for t in chunked._slices(tokens, max(1, -(-tokens // chunked.SLICES))):
                slope = chunked._finish_logits(logits[t], student, True)
                chunked._finish_logits(teacher_logits[t], teacher, False)
                logq = logits[t].sub_(stats.lse[t, None])
                logp = teacher_logits[t].sub_(stats.teacher_lse[t, None])
                _dlogits(logq, logp, divergence, stats.center[t, None])
                logits[t].mul_(grad[t, None])
                _scale(logits[t], student.logit_scale, slope)
            if grad_bias is not None:
                grad_bias[columns] = logits.sum(0)
            if grad_weight is not None:
                chunked._outer(logits, hidden, out=grad_weight[columns])


def _score_rows(
    logits: Tensor, teacher_logits: Tensor, divergence: _Divergence
) -> tuple[Tensor, _Rows]:
    """Divergence and statistics of rows; leaves the gradient by the logits in `logits`."""
    lse, teacher_lse = (x.logsumexp(1, keepdim=True) for x in (logits, teacher_logits))
    logq, logp = logits.sub_(lse), teacher_logits.sub_(teacher_lse)
    kind, beta = divergence
    center = torch.zeros_like(lse)
    if kind == "forward":
        value = ((logp - logq).mul_(logp.exp())).sum(1)
    else:
        g = _difference(logq, logp, divergence)
        center = g.mul_(logq.exp()).sum(1, keepdim=True)
        value = center.squeeze(1)
    if kind == "jsd":
        to_teacher = _log_mixture(logq, logp, beta).neg_().add_(logp).mul_(logp.exp()).sum(1)
        value = value + beta * to_teacher
    _dlogits(logq, logp, divergence, center)
    return value, _Rows(lse.squeeze(1), teacher_lse.squeeze(1), center.squeeze(1))


def _dlogits(logq: Tensor, logp: Tensor, divergence: _Divergence, center: Tensor) -> None:
    """Replace the student's log-probs by the gradient of the divergence by its logits."""
    if divergence.kind == "forward":
        logq.exp_().sub_(logp.exp())
        return
    g = _difference(logq, logp, divergence).sub_(center)
    logq.exp_().mul_(g)


def _difference(logq: Tensor, logp: Tensor, divergence: _Divergence) -> Tensor:
    """log q − log p of the reverse KL, (1 − beta)(log q − log m) of the JSD."""
    if divergence.kind == "reverse":
        return logq - logp
    mixture = _log_mixture(logq, logp, divergence.beta)
    return mixture.neg_().add_(logq).mul_(1 - divergence.beta)


def _log_mixture(logq: Tensor, logp: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(logq + math.log1p(-beta), logp + math.log(beta))


def _scale(dlogits: Tensor, logit_scale: float, slope: Tensor | None) -> None:
    """Turn the gradient by the logits into that by hidden @ weight.T."""
    if logit_scale != 1.0:
        dlogits.mul_(logit_scale)
    if slope is not None:
        dlogits.mul_(slope)


def _with_temperature(head: Head, temperature: float) -> Head:
    """A head whose logits are those of `head`, divided by the temperature."""
    softcap = None if head.softcap is None else head.softcap / temperature
    return head._replace(logit_scale=head.logit_scale / temperature, softcap=softcap)


def _check_numbers(kind: str, beta: float, temperature: float) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected 'forward', 'reverse' or 'jsd', got {kind!r}")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(
            f"beta: expected a number between 0 and 1, got {beta!r}; "
            "the limits are the kinds 'forward' and 'reverse'"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: expected a number > 0, got {temperature!r}")


def _check_teacher(hidden: Tensor, student: Head, teacher_hidden: Tensor, teacher: Head) -> None:
    check_head(teacher_hidden, teacher._replace(bias=None), prefix="teacher_")
    check_device("teacher_hidden", teacher_hidden, hidden)
    if statistics_dtype(teacher_hidden) != statistics_dtype(hidden):
        raise ValueError(
            f"teacher_hidden: fp64 needs both models in fp64, got {teacher_hidden.dtype} and "
            f"{hidden.dtype} of the student; cast one of them"
        )
    if len(teacher_hidden) != len(hidden):
        raise ValueError(
            f"teacher_hidden: expected {len(hidden)} rows, one for each of hidden, "
            f"got {len(teacher_hidden)}"
        )
    rows, expected = len(teacher.weight), len(student.weight)
    if rows != expected:
        raise ValueError(
            f"teacher_weight: expected the student's vocabulary of {expected} rows, got {rows}; "
            f"if the tokenizers are the same and the rest is padding, pass the first "
            f"{min(rows, expected)} rows of both"
        )
    if teacher.bias is not None and teacher.bias.shape != (rows,):
        raise ValueError(
            f"teacher_bias: expected shape ({rows},), one per row of teacher_weight, "
            f"got {tuple(teacher.bias.shape)}"
        )
