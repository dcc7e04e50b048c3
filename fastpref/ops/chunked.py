"""The ops in plain PyTorch, never holding more than a chunk of logits: runs on any device.

The logits are those of `fastpref.ops.reference`. Let one pass be 2 T D V FLOPs.

    linear_logps           passes  saved for backward
    nothing to train       1       nothing
    head frozen            2       directions (T, D), then scaled by rows
    head trained           4       directions (T, D), lse (T,)
      deltas kept          3       directions (T, D), deltas (T, V)

The direction `d logps[t] / d h_t = (onehot - softmax) @ weight` does not depend on the upstream
gradient, so the forward pass takes it from the logits while they are alive. For a trained head the
backward pass recomputes them for a panel of the vocabulary at a time and all tokens at once: each
row of dW is then one product, summed and rounded once, and no wider copy of dW exists. An
implementation may instead keep the forward pass's `onehot - softmax` where memory allows.
`linear_kl` works the same way with two heads, 2 passes for the value and one more product for the
direction, 3 more for a trained head.

All modes run the same operations on the same chunks to get the log-probs, so that a policy with
gradients and its reference without agree bit for bit.

What happens to logits between two products is a `RowPass`; `TORCH_ROWS`, the one of this module,
runs anywhere. `fastpref.ops.cpu` brings another.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.ops.reference import IGNORE_INDEX, TokenStats, statistics_dtype

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


class _Head(NamedTuple):
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None


@dataclass(frozen=True)
class Chunked:
    """The backend that any row pass makes; see `fastpref.ops.backend.Backend` for the methods."""

    rows: RowPass

    def kept_deltas(self, hidden: Tensor, weight: Tensor) -> Tensor | None:
        if not self.rows.keeps_deltas(hidden, weight):
            return None
        shape = hidden.shape[0], weight.shape[0]
        return hidden.new_empty(shape, dtype=statistics_dtype(hidden))

    def linear_logps_fwd(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float | None,
        logps: Tensor,
        lse: Tensor,
        direction: Tensor | None,
        deltas: Tensor | None,
    ) -> None:
        head = _Head(weight, bias, logit_scale, softcap)
        stats = self._score(hidden, labels, head, direction=direction, deltas=deltas)
        logps.copy_(stats.logps)
        lse.copy_(stats.lse)

    def linear_logps_bwd(
        self,
        gain: Tensor,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float | None,
        lse: Tensor,
        deltas: Tensor | None,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
    ) -> None:
        hidden = _kept(hidden, labels)
        with torch.autocast(hidden.device.type, enabled=False):
            if deltas is not None:  # each token's gain scales its row of the smaller factor
                if grad_bias is not None:
                    torch.mv(deltas.T, gain, out=grad_bias)
                if grad_weight is not None:
                    _outer(deltas, hidden * gain[:, None], out=grad_weight)
                return
            head = _Head(weight, bias, logit_scale, softcap)
            for columns, z in self._delta_panels(hidden, labels, head, lse, gain):
                if grad_bias is not None:
                    grad_bias[columns] = z.sum(0)
                if grad_weight is not None:
                    _outer(z, hidden, out=grad_weight[columns])

    def token_stats(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float | None,
    ) -> TokenStats:
        head = _Head(weight, bias, logit_scale, softcap)
        stats = self._score(hidden, labels, head, entropy=True)
        return stats._replace(lse=stats.lse.masked_fill(labels == IGNORE_INDEX, 0.0))

    def delta_panel(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        logit_scale: float,
        softcap: float | None,
        lse: Tensor,
        first: int,
    ) -> Tensor:
        gain = (labels != IGNORE_INDEX).to(lse.dtype)
        z = lse.new_empty(hidden.shape[0], weight.shape[0])
        self._delta(z, hidden, labels - first, _Head(weight, None, logit_scale, softcap), lse, gain)
        return z

    def linear_kl_fwd(
        self,
        hidden: Tensor,
        weight: Tensor,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        logit_scale: float,
        softcap: float | None,
        kl: Tensor,
        lse: Tensor,
        ref_lse: Tensor,
        direction: Tensor | None,
    ) -> None:
        tokens, vocabulary = hidden.shape[0], weight.shape[0]
        head = _Head(weight, None, logit_scale, softcap)
        ref_head = _Head(ref_weight, None, logit_scale, softcap)
        # Two models' logits share a chunk.
        chunk = max(1, min(CHUNK_BYTES // (2 * kl.itemsize * vocabulary), tokens))
        policy, reference = kl.new_empty(2, chunk, vocabulary)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _slices(tokens, chunk):
                z, y = policy[: _size(rows)], reference[: _size(rows)]
                _project(hidden[rows], weight, out=z)
                _project(ref_hidden[rows], ref_weight, out=y)
                for part in _slices(_size(rows), -(-chunk // SLICES)):
                    t = slice(rows.start + part.start, rows.start + part.stop)
                    slope = _finish_logits(z[part], head, None, direction is not None)
                    _finish_logits(y[part], ref_head, None, False)
                    kl[t], lse[t], ref_lse[t] = _kl_rows(z[part], y[part])
                    z[part].mul_(logit_scale)
                    if slope is not None:
                        z[part].mul_(slope)
                if direction is not None:
                    sums = z.new_zeros(_size(rows), hidden.shape[1])
                    direction[rows] = _pull_back(z, weight, sums)

    def linear_kl_bwd(
        self,
        gain: Tensor,
        hidden: Tensor,
        weight: Tensor,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        logit_scale: float,
        softcap: float | None,
        lse: Tensor,
        ref_lse: Tensor,
        grad_weight: Tensor,
    ) -> None:
        with torch.autocast(hidden.device.type, enabled=False):
            tokens = hidden.shape[0]
            panels = list(_panels(tokens, weight.shape[0], 2 * gain.itemsize))
            buffer = gain.new_empty(2 * tokens * _size(panels[0]))
            for columns in panels:
                head = _Head(weight[columns], None, logit_scale, softcap)
                ref_head = _Head(ref_weight[columns], None, logit_scale, softcap)
                z, y = buffer[: 2 * tokens * _size(columns)].view(2, tokens, _size(columns))
                _project(hidden, head.weight, out=z)
                _project(ref_hidden, ref_head.weight, out=y)
                for t in _slices(len(z), max(1, -(-len(z) // SLICES))):
                    slope = _finish_logits(z[t], head, None, True)
                    _finish_logits(y[t], ref_head, None, False)
                    z[t].sub_(lse[t, None]).exp_().sub_(y[t].sub_(ref_lse[t, None]).exp_())
                    z[t].mul_(gain[t, None] * logit_scale)
                    if slope is not None:
                        z[t].mul_(slope)
                _outer(z, hidden, out=grad_weight[columns])

    def _score(
        self,
        hidden: Tensor,  # (T, D)
        labels: Tensor,  # (T,)
        head: _Head,
        *,
        direction: Tensor | None = None,  # (T, D), filled with d logps[t] / d h_t
        deltas: Tensor | None = None,  # (T, V), filled with d logps[t] / d (h_t . w_v)
        entropy: bool = False,
    ) -> TokenStats:
        """Statistics of each token, a chunk at a time; entropy stays 0 unless asked for.

        An ignored token's lse is that of a zero hidden state, so that the backward pass stays
        finite.
        """
        tokens, vocabulary = hidden.shape[0], head.weight.shape[0]
        ignored = labels == IGNORE_INDEX
        columns = labels.masked_fill(ignored, 0)
        dtype = statistics_dtype(hidden)
        chunk = max(1, min(CHUNK_BYTES // (dtype.itemsize * vocabulary), tokens))
        buffer = hidden.new_empty(chunk if deltas is None else 0, vocabulary, dtype=dtype)
        gain = None if direction is None and deltas is None else head.logit_scale
        logps, lse, entropies = (hidden.new_zeros(tokens, dtype=dtype) for _ in range(3))
        top1 = torch.zeros_like(ignored)

        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _slices(tokens, chunk):
                logits = buffer[: _size(rows)] if deltas is None else deltas[rows]
                _project(_kept(hidden[rows], labels[rows]), head.weight, out=logits)
                for part in _slices(_size(rows), -(-chunk // SLICES)):
                    z = logits[part]
                    t = slice(rows.start + part.start, rows.start + part.stop)
                    slope = _finish_logits(z, head, head.bias, gain is not None)
                    stats = self.rows.score(z, columns[t], entropy, gain)
                    logps[t], lse[t], entropies[t], top1[t] = stats
                    if slope is not None:
                        z.mul_(slope)
                if direction is not None:
                    sums = logits.new_zeros(_size(rows), hidden.shape[1])
                    direction[rows] = _pull_back(logits, head.weight, sums)

        logps.masked_fill_(ignored, 0.0)
        return TokenStats(logps, lse, entropies.masked_fill_(ignored, 0.0), top1 & ~ignored)

    def _delta_panels(
        self,
        hidden: Tensor,  # (T, D), zeros where ignored
        labels: Tensor,  # (T,)
        head: _Head,
        lse: Tensor,  # (T,)
        gain: Tensor,  # (T,), zeros where ignored
    ) -> Iterator[tuple[slice, Tensor]]:
        """Panels of the vocabulary and gain * delta of all tokens there, in one buffer."""
        tokens, vocabulary = hidden.shape[0], head.weight.shape[0]
        panels = list(_panels(tokens, vocabulary, gain.itemsize))
        buffer = gain.new_empty(tokens * _size(panels[0]))
        for columns in panels:
            z = buffer[: tokens * _size(columns)].view(tokens, _size(columns))
            bias = None if head.bias is None else head.bias[columns]
            part = head._replace(weight=head.weight[columns], bias=bias)
            self._delta(z, hidden, labels - columns.start, part, lse, gain)
            yield columns, z

    def _delta(
        self, z: Tensor, hidden: Tensor, labels: Tensor, head: _Head, lse: Tensor, gain: Tensor
    ) -> None:
        """z = gain * delta for some rows of the head, from logits made again."""
        _project(hidden, head.weight, out=z)
        for t in _slices(len(z), max(1, -(-len(z) // SLICES))):
            slope = _finish_logits(z[t], head, head.bias, True)
            self.rows.delta(z[t], labels[t], lse[t], gain[t] * head.logit_scale)
            if slope is not None:
                z[t].mul_(slope)


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
BACKEND = Chunked(TORCH_ROWS)


def _kl_rows(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL and both log-sum-exps of rows of logits, y the reference's; leaves p - q in z."""
    largest, ref_largest = z.amax(1, keepdim=True), y.amax(1, keepdim=True)
    z.sub_(largest)
    y.sub_(ref_largest)
    q = y.exp()
    # Divided by the sum at the end: normalised first, its rounding would multiply the whole KL.
    dot = y.sub_(z).mul_(q).sum(1, keepdim=True)
    total, ref_total = z.exp_().sum(1, keepdim=True), q.sum(1, keepdim=True)
    log_total, ref_log_total = total.log(), ref_total.log()
    kl = dot / ref_total - ref_log_total + log_total
    z.div_(total).sub_(q.div_(ref_total))
    rows = kl, largest + log_total, ref_largest + ref_log_total
    return rows[0].squeeze(1), rows[1].squeeze(1), rows[2].squeeze(1)


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


def _kept(hidden: Tensor, labels: Tensor) -> Tensor:
    """hidden with zeros where ignored; itself, not a copy, on a CPU that sees none ignored."""
    # Padding rows may hold NaN (attention over nothing); times a zero gradient that is still NaN.
    if hidden.device.type == "cpu" and not (labels.numpy() == IGNORE_INDEX).any():
        return hidden  # looking waits for no device here
    return hidden.masked_fill((labels == IGNORE_INDEX)[:, None], 0.0)


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


def _panels(tokens: int, vocabulary: int, itemsize: int) -> Iterator[slice]:
    """Slices of the vocabulary in which all tokens' logits fit one chunk."""
    return _slices(vocabulary, max(1, CHUNK_BYTES // (itemsize * max(1, tokens))))


def _slice_size(bytes_each: int) -> int:
    return max(1, CHUNK_BYTES // SLICES // max(1, bytes_each))


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _size(part: slice) -> int:
    return part.stop - part.start
