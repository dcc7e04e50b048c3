"""Backward pass of attention over packed rows with shared prompts.

    delta[i] = grad[i]·out[i]                      w_ij = e^(s_ij - lse[i])
    t_ij     = w_ij (grad[i]·value[j] - delta[i]) (1 - (s_ij / softcap)^2)
    dquery[i] = scale sum_j t_ij key[j]
    dkey[j]   = scale sum_i t_ij query[i]          dvalue[j] = sum_i w_ij grad[i]

The kernel of the queries walks the blocks of the forward pass. In that of the keys, a tile of
BLOCK_K keys walks the queries that see it: those of its own segment from the tile on and, for a
prompt, those of all responses of the group, which are one range of rows without a causal mask.
Heads that share a key are summed within a program. No atomics: each sum has a fixed order.

FLOPs: 14 D a head and visible pair; scores and grad·value are computed in both kernels. Memory: the
gradients, and 4 bytes a token and head for delta.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl

from fastpref_kernels.common.attention_tile import (
    LOG2_E,
    blocks_seen,
    dot_over_head,
    dot_over_rows,
    exponent_unit,
    exponentials,
    finish_scores,
    inner_keys,
    keys_seen,
    load_tile,
    outer_block,
    outer_keys,
    reread,
    store_tile,
    visible,
    zero_tile,
)


@triton.jit
def attention_delta_kernel(
    grad,  # (P, H, D)
    out,  # (P, H, D)
    delta,  # (H, P), written
    H,
    P,
    stride_gt,
    stride_gh,
    BLOCK_Q: tl.constexpr,
    SIZE: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    head = tl.program_id(0) % H
    first_row = (tl.program_id(0) // H).to(tl.int64) * BLOCK_Q
    rows = tl.arange(0, BLOCK_Q)
    mask = rows < P - first_row
    grads = load_tile(
        grad + first_row * stride_gt + head * stride_gh, rows, mask, stride_gt, SIZE, FIRST, SECOND
    )
    stride_ot = H * SIZE
    outs = load_tile(
        out + first_row * stride_ot + head * SIZE, rows, mask, stride_ot, SIZE, FIRST, SECOND
    )
    sums = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    for index in tl.static_range(len(grads)):
        sums += tl.sum(grads[index].to(tl.float32) * outs[index].to(tl.float32), axis=1)
    tl.store(delta + head.to(tl.int64) * P + first_row + rows, sums, mask=mask)


@triton.jit
def packed_attention_dq_kernel(
    query,  # (P, H, D)
    key,  # (P, H', D)
    value,  # (P, H', D)
    grad,  # (P, H, D)
    lse,  # (H, P)
    delta,  # (H, P)
    dquery,  # (P, H, D), written
    tiles,  # (N, 5), of the forward pass
    H,
    P,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
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
    grads = load_tile(
        grad + first_row * stride_gt + head * stride_gh, rows, row_mask, stride_gt,
        SIZE, FIRST, SECOND,
    )  # fmt: skip
    statistics = head.to(tl.int64) * P + first_row + rows
    exponent_lse = LOG2_E * tl.load(lse + statistics, mask=row_mask, other=0.0)[:, None]
    deltas = tl.load(delta + statistics, mask=row_mask, other=0.0)[:, None]
    key += (head // HEADS_PER_KEY) * stride_kh
    value += (head // HEADS_PER_KEY) * stride_vh
    unit = exponent_unit(scale, softcap)
    acc = zero_tile(BLOCK_Q, FIRST, SECOND)

    prompt, own = keys_seen(offset, size, prompt_size, window, BLOCK_Q, BLOCK_K)
    inner = prompt[2] - prompt[1] + own[2] - own[1]
    for index in range(0, inner):
        row = inner_keys(index, prompt, own, prompt_start, start, BLOCK_K)
        keys = load_tile(key + row * stride_kt, columns, None, stride_kt, SIZE, FIRST, SECOND)
        values = load_tile(value + row * stride_vt, columns, None, stride_vt, SIZE, FIRST, SECOND)
        scores = finish_scores(dot_over_head(queries, keys, UPCAST), scale, softcap)
        weights = exponentials(scores, unit, exponent_lse)
        grad_weights = dot_over_head(grads, values, UPCAST)
        grad_scores = score_grads(weights, grad_weights - deltas, scores, softcap)
        acc = dot_over_rows(grad_scores, keys, acc, UPCAST)
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
        weights = exponentials(scores, unit, exponent_lse)
        weights = tl.where(seen & mask[None, :], weights, 0.0)
        grad_weights = dot_over_head(grads, values, UPCAST)
        grad_scores = score_grads(weights, grad_weights - deltas, scores, softcap)
        acc = dot_over_rows(grad_scores, keys, acc, UPCAST)

    start, size, offset = reread(tiles)
    stride_dt = H * SIZE
    store_tile(
        dquery + (start + offset).to(tl.int64) * stride_dt + head * SIZE, rows,
        rows < size - offset, stride_dt, acc, scale, SIZE, FIRST,
    )  # fmt: skip


@triton.jit
def packed_attention_dkv_kernel(
    query,  # (P, H, D)
    key,  # (P, H', D)
    value,  # (P, H', D)
    grad,  # (P, H, D)
    lse,  # (H, P)
    delta,  # (H, P)
    dkey,  # (P, H', D), written, or None
    dvalue,  # (P, H', D), written, or None
    # (N, 7): start and size of the segment, offset of the tile, end of the responses that see it,
    # size of the longest of them, their first and last segment
    tiles,
    starts,  # (S + 1,) first row of each segment
    K,  # H'
    P,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
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
    tiles += (tl.program_id(0) // K) * 7
    key_head = tl.program_id(0) % K
    start, size, offset = tl.load(tiles), tl.load(tiles + 1), tl.load(tiles + 2)
    end, longest = tl.load(tiles + 3), tl.load(tiles + 4)
    own_end = start + size

    first_row = (start + offset).to(tl.int64)
    rows, columns = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_Q)
    row_mask = rows < size - offset
    keys = load_tile(
        key + first_row * stride_kt + key_head * stride_kh, rows, row_mask, stride_kt,
        SIZE, FIRST, SECOND,
    )  # fmt: skip
    unit = exponent_unit(scale, softcap)
    values, dkeys, dvalues = (), (), ()
    if dkey is not None:
        values = load_tile(
            value + first_row * stride_vt + key_head * stride_vh, rows, row_mask, stride_vt,
            SIZE, FIRST, SECOND,
        )  # fmt: skip
        dkeys = zero_tile(BLOCK_K, FIRST, SECOND)
    if dvalue is not None:
        dvalues = zero_tile(BLOCK_K, FIRST, SECOND)

    # Rows past the end of a range are loaded as 0 and add nothing, so no mask is needed there.
    responses = tl.cdiv(end - own_end, BLOCK_Q)
    if window is not None:
        responses = tl.where(longest <= window + offset - size, responses, 0)
    own = queries_seen(offset, size, window, BLOCK_Q, BLOCK_K)
    inner_own = own[2] - own[1]
    inner = inner_own + responses
    for index in range(0, inner * HEADS_PER_KEY):
        head, block = key_head * HEADS_PER_KEY + index // inner, index % inner
        in_own = block < inner_own
        row = tl.where(
            in_own, start + (own[1] + block) * BLOCK_Q, own_end + (block - inner_own) * BLOCK_Q
        )
        mask = columns < tl.where(in_own, own_end, end) - row
        dkeys, dvalues = add_queries(
            query, grad, lse, delta, keys, values, dkeys, dvalues, head, row, columns, mask, None,
            P, stride_qt, stride_qh, stride_gt, stride_gh, scale, softcap, unit,
            SIZE, FIRST, SECOND, UPCAST,
        )  # fmt: skip
    start, size, offset = reread(tiles)
    own = queries_seen(offset, size, window, BLOCK_Q, BLOCK_K)
    key_positions = (offset + rows)[:, None]
    outer = own[3] - own[2] + own[1] - own[0]
    for index in range(0, outer * HEADS_PER_KEY):
        head = key_head * HEADS_PER_KEY + index // outer
        first = BLOCK_Q * outer_block(index % outer, own[0], own[1], own[2])
        seen = visible((first + columns)[None, :], key_positions, window)
        dkeys, dvalues = add_queries(
            query, grad, lse, delta, keys, values, dkeys, dvalues, head, start + first, columns,
            columns < size - first, seen,
            P, stride_qt, stride_qh, stride_gt, stride_gh, scale, softcap, unit,
            SIZE, FIRST, SECOND, UPCAST,
        )  # fmt: skip
    if window is not None:
        # Of each response, the queries that the window lets see the last key of the tile.
        start, size, offset = reread(tiles)
        key_positions = (offset + rows)[:, None]
        reach = window + tl.minimum(offset + BLOCK_K, size) - 1 - size
        longest = tl.load(tiles + 4, volatile=True)
        first_response, last_response = tl.load(tiles + 5), tl.load(tiles + 6)
        some_seen = (reach > 0) & (longest > window + offset - size)
        for response in range(first_response, tl.where(some_seen, last_response, first_response)):
            response_start = tl.load(starts + response)
            exist = tl.minimum(tl.load(starts + response + 1) - response_start, reach)
            blocks = tl.cdiv(exist, BLOCK_Q)
            for index in range(0, blocks * HEADS_PER_KEY):
                head = key_head * HEADS_PER_KEY + index // blocks
                first = BLOCK_Q * (index % blocks)
                seen = visible((size + first + columns)[None, :], key_positions, window)
                dkeys, dvalues = add_queries(
                    query, grad, lse, delta, keys, values, dkeys, dvalues, head,
                    response_start + first, columns, columns < exist - first, seen,
                    P, stride_qt, stride_qh, stride_gt, stride_gh, scale, softcap, unit,
                    SIZE, FIRST, SECOND, UPCAST,
                )  # fmt: skip

    start, size, offset = reread(tiles)
    row_mask = rows < size - offset
    stride_dt = K * SIZE
    place = (start + offset).to(tl.int64) * stride_dt + key_head * SIZE
    if dkey is not None:
        store_tile(dkey + place, rows, row_mask, stride_dt, dkeys, scale, SIZE, FIRST)
    if dvalue is not None:
        store_tile(dvalue + place, rows, row_mask, stride_dt, dvalues, 1.0, SIZE, FIRST)


@triton.jit
def queries_seen(offset, size, window, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """`blocks_seen` of a segment's queries by its keys from offset on."""
    last_any, last_all = size, tl.cdiv(size, BLOCK_Q) * BLOCK_Q
    if window is not None:
        last_any = tl.minimum(size, offset + BLOCK_K + window - 1)
        last_all = tl.minimum(last_all, offset + window)
    return blocks_seen(offset, offset + BLOCK_K - 1, last_all, last_any, BLOCK_Q)


@triton.jit
def add_queries(
    query, grad, lse, delta, keys, values, dkeys, dvalues, head, row, columns, mask, seen,
    P, stride_qt, stride_qh, stride_gt, stride_gh, scale, softcap, unit,
    SIZE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values after one more block of queries."""
    row = row.to(tl.int64)
    queries = load_tile(
        query + row * stride_qt + head * stride_qh, columns, mask, stride_qt, SIZE, FIRST, SECOND
    )
    grads = load_tile(
        grad + row * stride_gt + head * stride_gh, columns, mask, stride_gt, SIZE, FIRST, SECOND
    )
    statistics = head.to(tl.int64) * P + row + columns
    exponent_lse = LOG2_E * tl.load(lse + statistics, mask=mask, other=0.0)[None, :]
    scores = finish_scores(dot_over_head(keys, queries, UPCAST), scale, softcap)
    weights = exponentials(scores, unit, exponent_lse)
    if seen is not None:
        weights = tl.where(seen, weights, 0.0)
    if len(dvalues) > 0:
        dvalues = dot_over_rows(weights, grads, dvalues, UPCAST)
    if len(dkeys) > 0:
        deltas = tl.load(delta + statistics, mask=mask, other=0.0)[None, :]
        grad_weights = dot_over_head(values, grads, UPCAST)
        grad_scores = score_grads(weights, grad_weights - deltas, scores, softcap)
        dkeys = dot_over_rows(grad_scores, queries, dkeys, UPCAST)
    return dkeys, dvalues


@triton.jit
def score_grads(weights, differences, scores, softcap):
    """Gradient by scale q·k, from weights and grad·value - delta."""
    grads = weights * differences
    if softcap is not None:
        grads *= 1.0 - scores * scores
    return grads
