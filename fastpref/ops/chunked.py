"""The ops in plain PyTorch, never holding more than a chunk of logits: runs on any device.

The logits are those of `fastpref.ops.reference`. One GEMM over the head costs 2 T D V FLOPs.

    linear_logps           GEMMs   saved for backward
    no gradient            1       nothing
    frozen head            2       dlogp_dhidden (T, D)
    trained head           4       dlogp_dhidden (T, D), lse (T,)
      dlogits cached       3       dlogp_dhidden (T, D), dlogits (T, V)

    dlogits       = d logps[t] / d (h_t . w_v) = (onehot - softmax) * logit_scale * softcap's slope
    dlogp_dhidden = d logps[t] / d h_t = dlogits @ weight

`dlogp_dhidden` does not depend on the upstream gradient, so the forward pass computes it from the
logits of the chunk; the backward pass only scales its rows. For a trained head the backward pass
recomputes the logits of all tokens for one panel of the vocabulary at a time: each row of dW is
then one GEMM, summed and rounded once, and no wider copy of dW exists. A `RowPass` may instead
cache the dlogits of the forward pass where memory allows. `linear_kl` works the same way with two
heads: 2 GEMMs for the value, one more for `dkl_dhidden`, 3 more for a trained head.

All modes compute the log-probs by the same operations on the same chunks, so that a policy with
gradients and its reference without agree bit for bit.

A `RowPass` is the elementwise work between two GEMMs: that of `fastpref.ops.row_pass` runs
anywhere, `fastpref.ops.cpu` has another.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpref.ops.backend import Head, ScoreSketch
from fastpref.ops.reference import IGNORE_INDEX, TokenStats, statistics_dtype
from fastpref.ops.row_pass import TORCH_ROWS, RowPass
from fastpref.ops.score_sketch import fold

# The memory of one chunk (forward) or panel (backward) of logits. On a 2-core CPU anything from 64
# to 512 MiB runs equally fast, within the noise, at vocabularies of 32000 and 128256; a GPU needs
# the rows: 2097 and 523 of them.
CHUNK_BYTES = 256 * 2**20

# Temporaries the size of the logits (the slope of a softcap, entropy terms, widened weights) are
# allocated for a sixteenth of a chunk at a time; on a CPU that also keeps the row passes in its
# cache.
SLICES = 16

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Chunked:
    """The backend of a row pass; `fastpref.ops.backend.Backend` documents the methods."""

    row_pass: RowPass

    def new_dlogits_cache(self, hidden: Tensor, weight: Tensor) -> Tensor | None:
        if not self.row_pass.caches_dlogits(hidden, weight):
            return None
        shape = hidden.shape[0], weight.shape[0]
        return hidden.new_empty(shape, dtype=statistics_dtype(hidden))

    def linear_logps_fwd(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        logps: Tensor,
        lse: Tensor,
        dlogp_dhidden: Tensor | None,
        dlogits: Tensor | None,
        row_scale: Tensor | None,
        sketch: ScoreSketch | None = None,
    ) -> None:
        stats = self._score(
            hidden, head, labels, dlogp_dhidden=dlogp_dhidden, dlogits=dlogits, sketch=sketch
        )
        logps.copy_(stats.logps)
        lse.copy_(stats.lse)
        if row_scale is not None:
            row_scale.fill_(1.0)

    def linear_logps_bwd(
        self,
        grad_logps: Tensor,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        lse: Tensor,
        dlogits: Tensor | None,
        row_scale: Tensor | None,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
    ) -> None:
        hidden = _zero_ignored(hidden, labels)
        with torch.autocast(hidden.device.type, enabled=False):
            if dlogits is not None:  # row_scale is 1 here
                if grad_bias is not None:
                    torch.mv(dlogits.T, grad_logps, out=grad_bias)
                if grad_weight is not None:
                    # Scaling the rows of (T, D) is cheaper than scaling those of (T, V).
                    _outer(dlogits, hidden * grad_logps[:, None], out=grad_weight)
                return
            tokens = len(hidden)
            panels = list(_panels(tokens, len(head.weight), grad_logps.itemsize))
            buffer = grad_logps.new_empty(tokens * _size(panels[0]))
            for columns in panels:
                panel = buffer[: tokens * _size(columns)].view(tokens, _size(columns))
                self._fill_grad_logits(panel, hidden, head, labels, lse, grad_logps, columns)
                if grad_bias is not None:
                    grad_bias[columns] = panel.sum(0)
                if grad_weight is not None:
                    _outer(panel, hidden, out=grad_weight[columns])

    def token_stats(self, hidden: Tensor, head: Head, labels: Tensor) -> TokenStats:
        stats = self._score(hidden, head, labels, entropy=True)
        return stats._replace(lse=stats.lse.masked_fill(labels == IGNORE_INDEX, 0.0))

    def dlogits_panel(
        self, hidden: Tensor, head: Head, labels: Tensor, lse: Tensor, columns: slice
    ) -> Tensor:
        unit = (labels != IGNORE_INDEX).to(lse.dtype)
        panel = lse.new_empty(hidden.shape[0], _size(columns))
        self._fill_grad_logits(panel, hidden, head, labels, lse, unit, columns)
        return panel

    def linear_kl_fwd(
        self,
        hidden: Tensor,
        head: Head,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        kl: Tensor,
        lse: Tensor,
        ref_lse: Tensor,
        dkl_dhidden: Tensor | None,
    ) -> None:
        tokens, vocabulary = hidden.shape[0], head.weight.shape[0]
        ref_head = head._replace(weight=ref_weight)
        # Two models' logits share a chunk.
        chunk = max(1, min(CHUNK_BYTES // (2 * kl.itemsize * vocabulary), tokens))
        policy_buffer, ref_buffer = kl.new_empty(2, chunk, vocabulary)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _slices(tokens, chunk):
                logits, ref_logits = policy_buffer[: _size(rows)], ref_buffer[: _size(rows)]
                _project(hidden[rows], head.weight, out=logits)
                _project(ref_hidden[rows], ref_weight, out=ref_logits)
                for part in _slices(_size(rows), -(-chunk // SLICES)):
                    t = slice(rows.start + part.start, rows.start + part.stop)
                    slope = _finish_logits(logits[part], head, dkl_dhidden is not None)
                    _finish_logits(ref_logits[part], ref_head, False)
                    kl[t], lse[t], ref_lse[t] = _kl_rows(logits[part], ref_logits[part])
                    logits[part].mul_(head.logit_scale)
                    if slope is not None:
                        logits[part].mul_(slope)
                if dkl_dhidden is not None:
                    sums = logits.new_zeros(_size(rows), hidden.shape[1])
                    dkl_dhidden[rows] = _pull_back(logits, head.weight, sums)

    def linear_kl_bwd(
        self,
        grad_kl: Tensor,
        hidden: Tensor,
        head: Head,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        lse: Tensor,
        ref_lse: Tensor,
        grad_weight: Tensor,
    ) -> None:
        with torch.autocast(hidden.device.type, enabled=False):
            tokens, ref_head = hidden.shape[0], head._replace(weight=ref_weight)
            panels = list(_panels(tokens, head.weight.shape[0], 2 * grad_kl.itemsize))
            buffer = grad_kl.new_empty(2 * tokens * _size(panels[0]))
            for columns in panels:
                part, ref_part = head.rows(columns), ref_head.rows(columns)
                size = 2 * tokens * _size(columns)
                logits, ref_logits = buffer[:size].view(2, tokens, _size(columns))
                _project(hidden, part.weight, out=logits)
                _project(ref_hidden, ref_part.weight, out=ref_logits)
                for t in _slices(tokens, max(1, -(-tokens // SLICES))):
                    slope = _finish_logits(logits[t], part, True)
                    _finish_logits(ref_logits[t], ref_part, False)
                    p = logits[t].sub_(lse[t, None]).exp_()
                    p.sub_(ref_logits[t].sub_(ref_lse[t, None]).exp_())
                    p.mul_(grad_kl[t, None] * head.logit_scale)
                    if slope is not None:
                        p.mul_(slope)
                _outer(logits, hidden, out=grad_weight[columns])

    def _score(
        self,
        hidden: Tensor,  # (T, D)
        head: Head,
        labels: Tensor,  # (T,)
        *,
        dlogp_dhidden: Tensor | None = None,  # (T, D), written
        dlogits: Tensor | None = None,  # (T, V), written
        sketch: ScoreSketch | None = None,
        entropy: bool = False,
    ) -> TokenStats:
        """Statistics of each token, a chunk at a time; entropy is 0 unless requested.

        An ignored token's lse is that of a zero hidden state, so that the backward pass stays
        finite.
        """
        tokens, vocabulary = hidden.shape[0], head.weight.shape[0]
        ignored = labels == IGNORE_INDEX
        columns = labels.masked_fill(ignored, 0)
        dtype = statistics_dtype(hidden)
        chunk = max(1, min(CHUNK_BYTES // (dtype.itemsize * vocabulary), tokens))
        buffer = hidden.new_empty(chunk if dlogits is None else 0, vocabulary, dtype=dtype)
        trains = dlogp_dhidden is not None or dlogits is not None or sketch is not None
        scale = head.logit_scale if trains else None
        if sketch is not None:
            sketch.sums.zero_()
        logps, lse, entropies = (hidden.new_zeros(tokens, dtype=dtype) for _ in range(3))
        top1 = torch.zeros_like(ignored)

        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _slices(tokens, chunk):
                logits = buffer[: _size(rows)] if dlogits is None else dlogits[rows]
                _project(_zero_ignored(hidden[rows], labels[rows]), head.weight, out=logits)
                for part in _slices(_size(rows), -(-chunk // SLICES)):
                    t = slice(rows.start + part.start, rows.start + part.stop)
                    slope = _finish_logits(logits[part], head, scale is not None)
                    stats = self.row_pass.score(logits[part], columns[t], entropy, scale)
                    logps[t], lse[t], entropies[t], top1[t] = stats
                    if slope is not None:
                        logits[part].mul_(slope)
                if dlogp_dhidden is not None:
                    sums = logits.new_zeros(_size(rows), hidden.shape[1])
                    dlogp_dhidden[rows] = _pull_back(logits, head.weight, sums)
                if sketch is not None:
                    _add_scores(sketch, logits, hidden, labels, rows)

        logps.masked_fill_(ignored, 0.0)
        return TokenStats(logps, lse, entropies.masked_fill_(ignored, 0.0), top1 & ~ignored)

    def _fill_grad_logits(
        self,
        panel: Tensor,  # (T, n), written
        hidden: Tensor,  # (T, D)
        head: Head,
        labels: Tensor,  # (T,)
        lse: Tensor,  # (T,)
        grad_logps: Tensor,  # (T,)
        columns: slice,  # n entries of the vocabulary
    ) -> None:
        """panel = grad_logps * dlogits for some columns, from recomputed logits."""
        head, labels = head.rows(columns), labels - columns.start
        _project(hidden, head.weight, out=panel)
        for t in _slices(len(panel), max(1, -(-len(panel) // SLICES))):
            slope = _finish_logits(panel[t], head, True)
            self.row_pass.dlogits(panel[t], labels[t], lse[t], grad_logps[t] * head.logit_scale)
            if slope is not None:
                panel[t].mul_(slope)


BACKEND = Chunked(TORCH_ROWS)


def _kl_rows(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL, lse and ref_lse of rows of logits; leaves p - q in `logits`."""
    row_max, ref_max = logits.amax(1, keepdim=True), ref_logits.amax(1, keepdim=True)
    logits.sub_(row_max)
    ref_logits.sub_(ref_max)
    q = ref_logits.exp()
    # Divided by the sum at the end: normalized first, its rounding would multiply the whole KL.
    dot = ref_logits.sub_(logits).mul_(q).sum(1, keepdim=True)
    total, ref_total = logits.exp_().sum(1, keepdim=True), q.sum(1, keepdim=True)
    log_total, ref_log_total = total.log(), ref_total.log()
    kl = dot / ref_total - ref_log_total + log_total
    logits.div_(total).sub_(q.div_(ref_total))
    lse, ref_lse = row_max + log_total, ref_max + ref_log_total
    return kl.squeeze(1), lse.squeeze(1), ref_lse.squeeze(1)


def _finish_logits(raw: Tensor, head: Head, want_slope: bool) -> Tensor | None:
    """Turn hidden @ weight.T into logits in place; return the slope of the softcap, if any."""
    if head.bias is not None:
        raw.add_(head.bias)
    if head.logit_scale != 1.0:
        raw.mul_(head.logit_scale)
    if head.softcap is None:
        return None
    raw.div_(head.softcap).tanh_()
    slope = raw.square().neg_().add_(1.0) if want_slope else None
    raw.mul_(head.softcap)
    return slope


def _zero_ignored(hidden: Tensor, labels: Tensor) -> Tensor:
    """hidden with zeros where ignored; not copied on a CPU if no token is ignored."""
    # Padding rows may hold NaN (attention over nothing); times a zero gradient that is still NaN.
    # Reading labels on the CPU waits for no device.
    if hidden.device.type == "cpu" and not (labels.numpy() == IGNORE_INDEX).any():
        return hidden
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


def _pull_back(dlogits: Tensor, weight: Tensor, sums: Tensor) -> Tensor:
    """sums += dlogits @ weight, with half-precision operands where the device multiplies those."""
    if weight.dtype not in _HALF:
        return sums.addmm_(dlogits, weight)
    column_bytes = 2 * len(dlogits) if dlogits.is_cuda else 4 * weight.shape[1]
    for columns in _slices(len(weight), _slice_size(column_bytes)):
        sums += _mm_half(dlogits[:, columns], weight[columns], weight.dtype)
    return sums


def _outer(dlogits: Tensor, hidden: Tensor, out: Tensor) -> None:
    """out = dlogits.T @ hidden, rounded once."""
    if hidden.dtype not in _HALF:
        torch.mm(dlogits.T, hidden, out=out)
        return
    for columns in _slices(len(out), _slice_size(2 * len(hidden) + 4 * hidden.shape[1])):
        out[columns] = _mm_half(dlogits[:, columns].T, hidden, hidden.dtype)


def _add_scores(
    sketch: ScoreSketch,
    dlogits: Tensor,  # (rows, V)
    hidden: Tensor,  # (T, D)
    labels: Tensor,  # (T,)
    rows: slice,  # the tokens of dlogits
) -> None:
    """Add the scores of some tokens to the sums of a sketch."""
    folded = dlogits
    if sketch.signs is not None:
        folded = dlogits.new_empty(len(dlogits), sketch.sums.shape[1])
        for part in _slices(len(dlogits), -(-len(dlogits) // SLICES)):
            fold(dlogits[part], sketch.signs, out=folded[part])
    for sums, tokens in sketch.sides(rows):
        weighted = _zero_ignored(hidden[tokens], labels[tokens])
        if sketch.token_weights is not None:
            weighted = (sketch.token_weights[tokens, None] * weighted).to(hidden.dtype)
        columns = folded[tokens.start - rows.start : tokens.stop - rows.start].T
        if hidden.dtype in _HALF:
            sums += _mm_half(columns, weighted, hidden.dtype)
        else:
            sums.addmm_(columns, weighted)


def _mm_half(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 product of `dtype` operands; a CPU multiplies in fp32, which is exact and far faster."""
    if a.is_cuda:
        return torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _panels(tokens: int, vocabulary: int, itemsize: int) -> Iterator[slice]:
    """Slices of the vocabulary in which all tokens' logits fit one chunk."""
    return _slices(vocabulary, max(1, CHUNK_BYTES // (itemsize * max(1, tokens))))


def _slice_size(item_bytes: int) -> int:
    """Number of items of this size in a slice of a chunk."""
    return max(1, CHUNK_BYTES // SLICES // max(1, item_bytes))


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _size(part: slice) -> int:
    return part.stop - part.start
