"""Forward pass of attention over packed rows with shared prompts.

    out[i] = sum_j softmax_j(s_ij) value[j],   s_ij = softcap tanh(scale q_i·k_j / softcap)
    lse[i] = log sum_j e^s_ij                  over the keys j that token i sees

A tile of BLOCK_Q queries belongs to one segment and walks two ranges of keys: the prompt of its
group, then its own segment up to the tile's end. Blocks that all its queries see come first and
need no mask; the prompt's end, the diagonal and the edges of the window follow. This order depends
on the sizes of the segment and of its prompt alone, so equal responses have equal outputs to the
bit. A running maximum and sum rescale the output, as in FlashAttention (arXiv:2205.14135).

FLOPs: 4 D a head and visible pair. Memory: the output, and 4 bytes a token and head.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl

from fastpref_kernels.common.attention_tile import (
    LN_2,
    dot_over_head,
    dot_over_rows,
    exponent_unit,
    exponentials,
    finish_scores,
    inner_keys,
    keys_seen,
    load_tile,
    outer_keys,
    reread,
    store_tile,
    visible,
    zero_tile,
)


@triton.jit
def packed_attention_fwd_kernel(
    query,  # (P, H, D)
    key,  # (P, H', D)
    value,  # (P, H', D)
    out,  # (P, H, D), written
    lse,  # (H, P), written
    # (N, 5): start and size of the segment, offset of the tile, start and size of the prompt
    tiles,
    H,
    P,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    scale,
    softcap,
    window,
    HEADS_PER_KEY: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SIZE: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tiles += (tl.program_id(0) // H) * 5
    head = tl.program_id(0) % H
    start, size, offset = tl.load(tiles), tl.load(tiles + 1), tl.load(tiles + 2)
    prompt_start, prompt_size = tl.load(tiles + 3), tl.load(tiles + 4)

    first_row = (start + offset).to(tl.int64)
    rows, columns = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    row_mask = rows < size - offset
    queries = load_tile(
        query + first_row * stride_qt + head * stride_qh, rows, row_mask, stride_qt,
        SIZE, FIRST, SECOND,
    )  # fmt: skip
    key += (head // HEADS_PER_KEY) * stride_kh
    value += (head // HEADS_PER_KEY) * stride_vh
    unit = exponent_unit(scale, softcap)
    running_max = tl.full((BLOCK_Q,), -1e30, dtype=tl.float32)  # finite: -inf - -inf would be NaN
    running_sum = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    acc = zero_tile(BLOCK_Q, FIRST, SECOND)

    prompt, own = keys_seen(offset, size, prompt_size, window, BLOCK_Q, BLOCK_K)
    inner = prompt[2] - prompt[1] + own[2] - own[1]
    for index in range(0, inner):
        row = inner_keys(index, prompt, own, prompt_start, start, BLOCK_K)
        keys = load_tile(key + row * stride_kt, columns, None, stride_kt, SIZE, FIRST, SECOND)
        values = load_tile(value + row * stride_vt, columns, None, stride_vt, SIZE, FIRST, SECOND)
        scores = finish_scores(dot_over_head(queries, keys, UPCAST), scale, softcap)
        acc, running_max, running_sum = attend(
            scores, values, acc, running_max, running_sum, unit, UPCAST
        )
    start, size, offset = reread(tiles)
    prompt_start, prompt_size = tl.load(tiles + 3, volatile=True), tl.load(tiles + 4, volatile=True)
    query_positions = prompt_size + offset + rows
    prompt, own = keys_seen(offset, size, prompt_size, window, BLOCK_Q, BLOCK_K)
    outer = prompt[3] - prompt[2] + prompt[1] - prompt[0] + own[3] - own[2] + own[1] - own[0]
    for index in range(0, outer):
        row, exist, position = outer_keys(
            index, prompt, own, prompt_start, prompt_size, start, size, BLOCK_K
        )
        mask = columns < exist
        seen = visible(query_positions[:, None], position + columns[None, :], window)
        keys = load_tile(key + row * stride_kt, columns, mask, stride_kt, SIZE, FIRST, SECOND)
        values = load_tile(value + row * stride_vt, columns, mask, stride_vt, SIZE, FIRST, SECOND)
        scores = finish_scores(dot_over_head(queries, keys, UPCAST), scale, softcap)
        scores = tl.where(seen & mask[None, :], scores, float("-inf"))
        acc, running_max, running_sum = attend(
            scores, values, acc, running_max, running_sum, unit, UPCAST
        )

    start, size, offset = reread(tiles)
    first_row, row_mask = (start + offset).to(tl.int64), rows < size - offset
    stride_ot = H * SIZE
    store_tile(
        out + first_row * stride_ot + head * SIZE, rows, row_mask, stride_ot,
        scaled(acc, 1.0 / running_sum), 1.0, SIZE, FIRST,
    )  # fmt: skip
    natural = (running_max + tl.log2(running_sum)) * LN_2
    tl.store(lse + head.to(tl.int64) * P + first_row + rows, natural, mask=row_mask)


@triton.jit
def attend(scores, values, acc, running_max, running_sum, unit, UPCAST: tl.constexpr):
    """Output, maximum of the exponents and sum of the weights after one more block of keys."""
    new_max = tl.maximum(running_max, tl.max(scores, axis=1) * unit)
    weights = exponentials(scores, unit, new_max[:, None])
    decay = tl.exp2(running_max - new_max)
    acc = dot_over_rows(weights, values, scaled(acc, decay), UPCAST)
    return acc, new_max, running_sum * decay + tl.sum(weights, axis=1)


@triton.jit
def scaled(parts, factors):
    """Each row of a tile times its factor."""
    products = ()
    for index in tl.static_range(len(parts)):
        products += (parts[index] * factors[:, None],)  # type: ignore[assignment]
    return products
