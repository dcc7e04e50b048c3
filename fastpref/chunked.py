"""Token log-probs and statistics in plain PyTorch, never holding more than a chunk of logits.

The logits are those of `fastpref.reference`. Let one pass be 2 T D V FLOPs.

    mode                passes  saved for backward     where
    nothing to train    1       nothing                _score_rows
    head frozen         2       directions (T, D)      _score_rows, then one row scaling
    head trained        4       lse (T,)               _score_rows, _TrainedHead.backward

With a frozen head the direction `d logps[t] / d h_t = (onehot - softmax) @ weight` does not depend
on the upstream gradient, so the forward pass takes it from the logits while they are alive. With a
trained head the backward pass recomputes them for a panel of the vocabulary at a time and all
tokens at once: each row of dW is then one product, summed and rounded once, and no wider copy of
dW exists.

All modes run the same operations on the same chunks to get the log-probs, so that a policy with
gradients and its reference without agree bit for bit.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpref.reference import IGNORE_INDEX, TokenStats, statistics_dtype

# The memory of one chunk (forward) or panel (backward) of logits. On a 2-core CPU anything from 64
# to 512 MiB runs equally fast, within the noise, at vocabularies of 32000 and 128256; a GPU wants
# the rows: 2097 of them and 523.
CHUNK_BYTES = 256 * 2**20

# Temporaries the size of the logits (the slope of a softcap, entropy terms, widened weights) are
# made for a sixteenth of a chunk at a time; on a CPU that also keeps the row passes in its cache.
SLICES = 16

_HALF = (torch.float16, torch.bfloat16)


def linear_logps(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # (T,)
    """Log-prob of each label; gradients as in `fastpref.reference.linear_logps`, once."""
    head = _Head(weight, bias, logit_scale, softcap)
    if torch.is_grad_enabled():
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return _TrainedHead.apply(hidden, weight, labels, bias, logit_scale, softcap)
        if hidden.requires_grad:
            return _FrozenHead.apply(hidden, labels, head)
    return _score_rows(hidden, labels, head).logps


@torch.no_grad()
def token_stats(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> TokenStats:
    """The statistics of `fastpref.reference.token_stats`, in one pass."""
    head = _Head(weight, bias, logit_scale, softcap)
    stats = _score_rows(hidden, labels, head, entropy=True)
    return stats._replace(lse=stats.lse.masked_fill(labels == IGNORE_INDEX, 0.0))


class _Head(NamedTuple):
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: _Head) -> Tensor:
        directions = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        logps = _score_rows(hidden, labels, head, directions=directions).logps
        ctx.save_for_backward(directions, labels)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        directions, labels = ctx.saved_tensors
        gain = upstream.masked_fill(labels == IGNORE_INDEX, 0.0)
        grad = torch.empty_like(directions)
        return torch.mul(directions, gain[:, None], out=grad), None, None


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float | None,
    ) -> Tensor:
        stats = _score_rows(hidden, labels, _Head(weight, bias, logit_scale, softcap))
        ctx.save_for_backward(hidden, weight, labels, bias, stats.lse)
        ctx.logit_scale, ctx.softcap = logit_scale, softcap
        return stats.logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, bias, lse = ctx.saved_tensors
        head = _Head(weight, bias, ctx.logit_scale, ctx.softcap)
        needs_hidden, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
        with torch.autocast(hidden.device.type, enabled=False):
            grads = _head_backward(
                hidden, labels, head, lse, upstream, needs_hidden, needs_weight, needs_bias
            )
        grad_hidden, grad_weight, grad_bias = grads
        return grad_hidden, grad_weight, None, grad_bias, None, None


def _score_rows(
    hidden: Tensor,  # (T, D)
    labels: Tensor,  # (T,)
    head: _Head,
    *,
    directions: Tensor | None = None,  # (T, D), filled with d logps[t] / d h_t
    entropy: bool = False,
) -> TokenStats:
    """Statistics of each token, a chunk at a time; entropy stays 0 unless asked for.

    An ignored token's lse is that of a zero hidden state, so that the backward pass stays finite.
    """
    tokens, vocabulary = len(hidden), len(head.weight)
    ignored = labels == IGNORE_INDEX
    columns = labels.masked_fill(ignored, 0).long()[:, None]
    dtype = statistics_dtype(hidden)
    tiny = torch.finfo(dtype).tiny  # below it x log x counts as 0, at 0 it would be NaN
    chunk = max(1, min(CHUNK_BYTES // (dtype.itemsize * vocabulary), tokens))
    logits = hidden.new_empty(chunk, vocabulary, dtype=dtype)
    logps, lse, entropies = (logits.new_zeros(tokens) for _ in range(3))
    top1 = torch.zeros_like(ignored)

    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _slices(tokens, chunk):
            _project(_kept(hidden[rows], ignored[rows]), head.weight, out=logits[: _size(rows)])
            for part in _slices(_size(rows), -(-chunk // SLICES)):
                z = logits[part]
                t = slice(rows.start + part.start, rows.start + part.stop)
                slope = _finish_logits(z, head, head.bias, directions is not None)
                largest = z.amax(1, keepdim=True)
                target = z.gather(1, columns[t])
                total = z.sub_(largest).exp_().sum(1, keepdim=True)
                log_total = total.log()
                logps[t] = ((target - largest) - log_total).squeeze(1)
                lse[t] = (largest + log_total).squeeze(1)
                top1[t] = (target >= largest).squeeze(1)
                if entropy:
                    terms = z.clamp(min=tiny).log_().mul_(z).sum(1, keepdim=True)
                    entropies[t] = (log_total - terms / total).squeeze(1)
                if directions is not None:
                    _to_delta(z, head.logit_scale / total, columns[t], head.logit_scale, slope)
            if directions is not None:
                sums = logits.new_zeros(_size(rows), hidden.shape[1])
                directions[rows] = _pull_back(logits[: _size(rows)], head.weight, sums)

    return TokenStats(
        logps.masked_fill_(ignored, 0.0), lse, entropies.masked_fill_(ignored, 0.0), top1 & ~ignored
    )


def _head_backward(
    hidden: Tensor,  # (T, D)
    labels: Tensor,  # (T,)
    head: _Head,
    lse: Tensor,  # (T,)
    upstream: Tensor,  # (T,)
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients with respect to hidden, weight and bias, a panel of the vocabulary at a time."""
    (tokens, width), vocabulary = hidden.shape, len(head.weight)
    ignored = labels == IGNORE_INDEX
    kept = _kept(hidden, ignored)
    gain = (upstream * head.logit_scale).masked_fill(ignored, 0.0)[:, None]
    grad_hidden = gain.new_zeros(tokens, width) if needs_hidden else None
    grad_weight = torch.empty_like(head.weight) if needs_weight else None
    grad_bias = torch.empty_like(head.bias) if needs_bias and head.bias is not None else None

    panel = max(1, min(CHUNK_BYTES // (gain.itemsize * max(1, tokens)), vocabulary))
    buffer = gain.new_empty(tokens * panel)
    for columns in _slices(vocabulary, panel):
        z = buffer[: tokens * _size(columns)].view(tokens, _size(columns))
        weight = head.weight[columns]
        bias = None if head.bias is None else head.bias[columns]
        _project(kept, weight, out=z)
        for t in _slices(tokens, max(1, -(-tokens // SLICES))):
            slope = _finish_logits(z[t], head, bias, True)
            z[t].sub_(lse[t, None]).exp_()
            local = labels[t, None].long() - columns.start
            inside = (local >= 0) & (local < _size(columns))
            onehot_gain = gain[t].masked_fill(~inside, 0.0)
            _to_delta(z[t], gain[t], local.masked_fill(~inside, 0), onehot_gain, slope)
        if grad_bias is not None:
            grad_bias[columns] = z.sum(0)
        if grad_weight is not None:
            _outer(z, kept, out=grad_weight[columns])
        if grad_hidden is not None:
            _pull_back(z, weight, grad_hidden)
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def _finish_logits(z: Tensor, head: _Head, bias: Tensor | None, want_slope: bool) -> Tensor | None:
    """Turn products into logits in place; return the slope of the softcap, if there is one."""
    if bias is not None:
        z.add_(bias)
    if head.logit_scale != 1.0:
        z.mul_(head.logit_scale)
    if head.softcap is None:
        return None
    z.div_(head.softcap).tanh_()
    slope = z.square().neg_().add_(1.0) if want_slope else None
    z.mul_(head.softcap)
    return slope


def _to_delta(
    z: Tensor, share: Tensor, columns: Tensor, onehot_gain: Tensor | float, slope: Tensor | None
) -> None:
    """exp(logit - c) -> slope * (onehot_gain * onehot - share * exp(logit - c)), in place."""
    z.mul_(-share)
    z.scatter_(1, columns, z.gather(1, columns) + onehot_gain)
    if slope is not None:
        z.mul_(slope)


def _kept(hidden: Tensor, ignored: Tensor) -> Tensor:
    # Padding rows may hold NaN (attention over nothing); times a zero gradient that is still NaN.
    return hidden.masked_fill(ignored[:, None], 0.0)


def _project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = hidden @ weight.T, unrounded."""
    if hidden.dtype not in _HALF:
        torch.mm(hidden, weight.T, out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = hidden.float()
        for columns in _slices(len(weight), _slice_size(4 * hidden.shape[1])):
            torch.mm(wide, weight[columns].float().T, out=out[:, columns])


def _pull_back(delta: Tensor, weight: Tensor, sums: Tensor) -> Tensor:
    """sums += delta @ weight, with half-precision operands where the device multiplies those."""
    if weight.dtype not in _HALF:
        return sums.addmm_(delta, weight)
    column_bytes = 2 * len(delta) if delta.is_cuda else 4 * weight.shape[1]
    for columns in _slices(len(weight), _slice_size(column_bytes)):
        sums += _mm_half(delta[:, columns], weight[columns], weight.dtype)
    return sums


def _outer(delta: Tensor, hidden: Tensor, out: Tensor) -> None:
    """out = delta.T @ hidden, rounded once."""
    if hidden.dtype not in _HALF:
        torch.mm(delta.T, hidden, out=out)
        return
    for columns in _slices(len(out), _slice_size(2 * len(hidden) + 4 * hidden.shape[1])):
        out[columns] = _mm_half(delta[:, columns].T, hidden, hidden.dtype)


def _mm_half(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 product of `dtype` operands; a CPU multiplies in fp32, which is exact and far faster."""
    if a.is_cuda:
        return torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _slice_size(bytes_each: int) -> int:
    return max(1, CHUNK_BYTES // SLICES // max(1, bytes_each))


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _size(part: slice) -> int:
    return part.stop - part.start
