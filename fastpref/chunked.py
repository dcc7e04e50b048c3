"""Token log-probs and statistics in plain PyTorch, never holding more than a chunk of logits.

The logits are those of `fastpref.reference`. Let one pass be 2 T D V FLOPs.

    mode                passes  saved for backward     where
    nothing to train    1       nothing                _score_rows
    head frozen         2       directions (T, D)      _score_rows, then one row scaling
    head trained        4       lse (T,)               _score_rows, _recomputed_grads
      deltas kept       3       deltas (T, V)          _score_rows, _kept_grads

With a frozen head the direction `d logps[t] / d h_t = (onehot - softmax) @ weight` does not depend
on the upstream gradient, so the forward pass takes it from the logits while they are alive. With a
trained head the backward pass recomputes them for a panel of the vocabulary at a time and all
tokens at once: each row of dW is then one product, summed and rounded once, and no wider copy of
dW exists. An implementation may instead keep the forward pass's `onehot - softmax` where memory
allows.

All modes run the same operations on the same chunks to get the log-probs, so that a policy with
gradients and its reference without agree bit for bit.

What happens to logits between two products is a `RowPass`; `TORCH_ROWS`, the one of this module,
runs anywhere. `fastpref.cpu` brings another.
"""

from collections.abc import Callable, Iterator
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


class RowPass(NamedTuple):
    """The elementwise work on rows of logits, and how much of it may be kept for the backward pass.

    score(z, labels, entropy, gain) returns the statistics of each row of z (entropy 0 unless asked
    for) and, unless gain is None, turns z into gain * (onehot - softmax) in place; without gain, z
    is left in any state. delta(z, labels, lse, gain) does so for columns of known rows, gain (n,):
    z becomes gain * (onehot - exp(z - lse)), where labels outside the columns have no onehot. The
    statistics must not depend on gain or entropy. keeps_deltas(hidden, weight) says whether the
    (T, V) deltas of a trained head stay in memory from forward to backward.
    """

    score: Callable[[Tensor, Tensor, bool, float | None], TokenStats]
    delta: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    keeps_deltas: Callable[[Tensor, Tensor], bool]


def linear_logps(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (T,)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    rows: RowPass | None = None,  # None: TORCH_ROWS
) -> Tensor:  # (T,)
    """Log-prob of each label; gradients as in `fastpref.reference.linear_logps`, once."""
    head = _Head(weight, bias, logit_scale, softcap, rows or TORCH_ROWS)
    if torch.is_grad_enabled():
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return _TrainedHead.apply(hidden, weight, bias, labels, head)
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
    rows: RowPass | None = None,  # None: TORCH_ROWS
) -> TokenStats:
    """The statistics of `fastpref.reference.token_stats`, in one pass."""
    head = _Head(weight, bias, logit_scale, softcap, rows or TORCH_ROWS)
    stats = _score_rows(hidden, labels, head, entropy=True)
    return stats._replace(lse=stats.lse.masked_fill(labels == IGNORE_INDEX, 0.0))


class _Head(NamedTuple):
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None
    rows: RowPass


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
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: _Head
    ) -> Tensor:
        deltas = None
        if head.rows.keeps_deltas(hidden, weight):
            deltas = hidden.new_empty(len(hidden), len(weight), dtype=statistics_dtype(hidden))
        stats = _score_rows(hidden, labels, head, deltas=deltas)
        ctx.save_for_backward(hidden, weight, bias, labels, stats.lse, deltas)
        ctx.options = head[2:]
        return stats.logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, lse, deltas = ctx.saved_tensors
        head = _Head(weight, bias, *ctx.options)
        ignored = labels == IGNORE_INDEX
        gain = upstream.masked_fill(ignored, 0.0)
        grads = _Grads.empty(hidden, head, ctx.needs_input_grad, gain.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            if deltas is None:
                _recomputed_grads(grads, _kept(hidden, ignored), labels, head, lse, gain)
            else:
                _kept_grads(grads, _kept(hidden, ignored), head, deltas, gain)
        grad_hidden = None if grads.hidden is None else grads.hidden.to(hidden.dtype)
        return grad_hidden, grads.weight, grads.bias, None, None


class _Grads(NamedTuple):
    """What a trained head's backward pass fills in, None where nobody asked."""

    hidden: Tensor | None  # (T, D), zeros, in the dtype of the statistics
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)

    @classmethod
    def empty(
        cls, hidden: Tensor, head: _Head, needs: tuple[bool, ...], dtype: torch.dtype
    ) -> "_Grads":
        return cls(
            hidden.new_zeros(hidden.shape, dtype=dtype) if needs[0] else None,
            torch.empty_like(head.weight) if needs[1] else None,
            torch.empty_like(head.bias) if needs[2] and head.bias is not None else None,
        )


def _score_rows(
    hidden: Tensor,  # (T, D)
    labels: Tensor,  # (T,)
    head: _Head,
    *,
    directions: Tensor | None = None,  # (T, D), filled with d logps[t] / d h_t
    deltas: Tensor | None = None,  # (T, V), filled with d logps[t] / d (h_t . w_v)
    entropy: bool = False,
) -> TokenStats:
    """Statistics of each token, a chunk at a time; entropy stays 0 unless asked for.

    An ignored token's lse is that of a zero hidden state, so that the backward pass stays finite.
    """
    tokens, vocabulary = len(hidden), len(head.weight)
    ignored = labels == IGNORE_INDEX
    columns = labels.masked_fill(ignored, 0).long()
    dtype = statistics_dtype(hidden)
    chunk = max(1, min(CHUNK_BYTES // (dtype.itemsize * vocabulary), tokens))
    buffer = hidden.new_empty(chunk if deltas is None else 0, vocabulary, dtype=dtype)
    gain = None if directions is None and deltas is None else head.logit_scale
    logps, lse, entropies = (hidden.new_zeros(tokens, dtype=dtype) for _ in range(3))
    top1 = torch.zeros_like(ignored)

    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _slices(tokens, chunk):
            logits = buffer[: _size(rows)] if deltas is None else deltas[rows]
            _project(_kept(hidden[rows], ignored[rows]), head.weight, out=logits)
            for part in _slices(_size(rows), -(-chunk // SLICES)):
                z = logits[part]
                t = slice(rows.start + part.start, rows.start + part.stop)
                slope = _finish_logits(z, head, head.bias, gain is not None)
                stats = head.rows.score(z, columns[t], entropy, gain)
                logps[t], lse[t], entropies[t], top1[t] = stats
                if slope is not None:
                    z.mul_(slope)
            if directions is not None:
                sums = logits.new_zeros(_size(rows), hidden.shape[1])
                directions[rows] = _pull_back(logits, head.weight, sums)

    return TokenStats(
        logps.masked_fill_(ignored, 0.0), lse, entropies.masked_fill_(ignored, 0.0), top1 & ~ignored
    )


def _recomputed_grads(
    grads: _Grads,
    hidden: Tensor,  # (T, D), zeros where ignored
    labels: Tensor,  # (T,)
    head: _Head,
    lse: Tensor,  # (T,)
    gain: Tensor,  # (T,), zeros where ignored
) -> None:
    """Fill the gradients in a panel of the vocabulary at a time, from logits made again."""
    tokens, vocabulary = len(hidden), len(head.weight)
    gain = gain * head.logit_scale
    panel = max(1, min(CHUNK_BYTES // (gain.itemsize * max(1, tokens)), vocabulary))
    buffer = gain.new_empty(tokens * panel)
    for columns in _slices(vocabulary, panel):
        z = buffer[: tokens * _size(columns)].view(tokens, _size(columns))
        weight = head.weight[columns]
        bias = None if head.bias is None else head.bias[columns]
        _project(hidden, weight, out=z)
        for t in _slices(tokens, max(1, -(-tokens // SLICES))):
            slope = _finish_logits(z[t], head, bias, True)
            head.rows.delta(z[t], labels[t].long() - columns.start, lse[t], gain[t])
            if slope is not None:
                z[t].mul_(slope)
        if grads.bias is not None:
            grads.bias[columns] = z.sum(0)
        if grads.weight is not None:
            _outer(z, hidden, out=grads.weight[columns])
        if grads.hidden is not None:
            _pull_back(z, weight, grads.hidden)


def _kept_grads(
    grads: _Grads,
    hidden: Tensor,  # (T, D), zeros where ignored
    head: _Head,
    deltas: Tensor,  # (T, V)
    gain: Tensor,  # (T,), zeros where ignored
) -> None:
    """Fill the gradients in from the deltas of the forward pass, left as they are.

    Each token's gain scales its row of (T, D) factors, never of the deltas.
    """
    if grads.bias is not None:
        torch.mv(deltas.T, gain, out=grads.bias)
    if grads.weight is not None:
        _outer(deltas, hidden * gain[:, None], out=grads.weight)
    if grads.hidden is not None:
        _pull_back(deltas, head.weight, grads.hidden).mul_(gain[:, None])


def _torch_score(z: Tensor, labels: Tensor, entropy: bool, gain: float | None) -> TokenStats:
    largest = z.amax(1, keepdim=True)
    target = z.gather(1, labels[:, None])
    total = z.sub_(largest).exp_().sum(1, keepdim=True)
    log_total = total.log()
    entropies = torch.zeros_like(total)
    if entropy:
        tiny = torch.finfo(z.dtype).tiny  # below it x log x counts as 0, at 0 it would be NaN
        terms = z.clamp(min=tiny).log_().mul_(z).sum(1, keepdim=True)
        entropies = log_total - terms / total
    if gain is not None:
        z.mul_(-gain / total)
        z.scatter_(1, labels[:, None], z.gather(1, labels[:, None]) + gain)
    logps = (target - largest) - log_total
    columns = logps, largest + log_total, entropies, target >= largest
    return TokenStats(*(x.squeeze(1) for x in columns))


def _torch_delta(z: Tensor, labels: Tensor, lse: Tensor, gain: Tensor) -> None:
    z.sub_(lse[:, None]).exp_().mul_(-gain[:, None])
    outside = (labels < 0) | (labels >= z.shape[1])
    columns = labels.masked_fill(outside, 0)[:, None]
    z.scatter_(1, columns, z.gather(1, columns) + gain.masked_fill(outside, 0.0)[:, None])


TORCH_ROWS = RowPass(_torch_score, _torch_delta, keeps_deltas=lambda hidden, weight: False)


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
