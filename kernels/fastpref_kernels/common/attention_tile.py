"""Tiles of queries, keys and values in two parts, and the blocks that a tile walks.

A head of D numbers is held in two parts, the largest power of two and the rest padded to one: 80 is
64 + 16 and 96 is 64 + 32, so that no product is larger than D asks for. One part of 128 would cost
1.6 and 1.33 times the multiplications, registers and shared memory. A product over D is a sum over
the parts; a product that results in D numbers has one result per part.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl

from fastpref_kernels.common.gemm_tile import dot_fp32

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def head_parts(size: int) -> tuple[int, int]:
    """Widths of the parts of a head: powers of two from 16 on, and 0 for no second part."""
    first = 1 << (size.bit_length() - 1)
    if first == size:
        return first, 0
    second = max(16, triton.next_power_of_2(size - first))
    return (2 * first, 0) if second == first else (first, second)


@triton.jit
def load_part(
    base, rows, mask, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr
):
    """Columns FIRST to FIRST + WIDTH of some rows; 0 past column SIZE and where mask is false."""
    columns = FIRST + tl.arange(0, WIDTH)[None, :]
    # 32-bit offsets from a 64-bit base need half the registers of 64-bit pointers.
    pointers = base + (rows[:, None] * stride + columns)
    if FIRST + WIDTH > SIZE:
        inside = columns < SIZE
        if mask is not None:
            inside = inside & mask[:, None]
        part = tl.load(pointers, mask=inside, other=0.0)
    elif mask is not None:
        part = tl.load(pointers, mask=mask[:, None], other=0.0)
    else:
        part = tl.load(pointers)
    return part


@triton.jit
def load_tile(
    base,  # pointer to the first row
    rows,  # (B,) relative to it
    mask,  # (B,) whether a row exists, or None if all do
    stride,
    SIZE: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Rows of SIZE numbers as (B, FIRST) and (B, SECOND)."""
    parts = (load_part(base, rows, mask, stride, 0, FIRST, SIZE),)
    if SECOND > 0:
        parts += (load_part(base, rows, mask, stride, FIRST, SECOND, SIZE),)  # type: ignore[assignment]
    return parts


@triton.jit
def store_tile(base, rows, mask, stride, parts, factor, SIZE: tl.constexpr, FIRST: tl.constexpr):
    """base[rows] = factor * parts where mask is true."""
    for index in tl.static_range(len(parts)):
        columns = index * FIRST + tl.arange(0, parts[index].shape[1])[None, :]
        values = (parts[index] * factor).to(base.dtype.element_ty)
        inside = mask[:, None] & (columns < SIZE)
        tl.store(base + (rows[:, None] * stride + columns), values, mask=inside)


@triton.jit
def zero_tile(ROWS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Accumulators (ROWS, FIRST) and (ROWS, SECOND)."""
    parts = (tl.zeros((ROWS, FIRST), dtype=tl.float32),)
    if SECOND > 0:
        parts += (tl.zeros((ROWS, SECOND), dtype=tl.float32),)  # type: ignore[assignment]
    return parts


@triton.jit
def dot_over_head(a, b, UPCAST: tl.constexpr):
    """a @ b.T, (A, B), of tiles (A, D) and (B, D)."""
    acc = tl.zeros((a[0].shape[0], b[0].shape[0]), dtype=tl.float32)
    for index in tl.static_range(len(a)):
        acc = dot_fp32(a[index], b[index].T, acc, UPCAST)
    return acc


@triton.jit
def dot_over_rows(weights, tile, accumulators, UPCAST: tl.constexpr):
    """accumulators + weights @ tile, (A, D), of weights (A, B) and a tile (B, D)."""
    sums = ()
    for index in tl.static_range(len(tile)):
        part = weights.to(tile[index].dtype)
        total = dot_fp32(part, tile[index], accumulators[index], UPCAST)
        sums += (total,)  # type: ignore[assignment]
    return sums


@triton.jit
def exponent_unit(scale, softcap):
    """Factor from the scores of `finish_scores` to exponents of 2."""
    unit = scale * LOG2_E
    if softcap is not None:
        unit = softcap * LOG2_E
    return unit


@triton.jit
def finish_scores(products, scale, softcap):
    """Scores without their last factor, `exponent_unit`: q·k, or tanh(scale q·k / softcap)."""
    scores = products
    if softcap is not None:
        # An exponential that overflows leaves -1, as it should.
        scores = 2.0 / (1.0 + tl.exp2(products * (-2.0 * LOG2_E * scale / softcap))) - 1.0
    return scores


@triton.jit
def exponentials(scores, unit, subtracted):
    """2^(unit scores - subtracted), with one rounding of the exponent."""
    return tl.exp2(tl.fma(scores, tl.full(scores.shape, unit, tl.float32), -subtracted))


@triton.jit
def blocks_seen(first_any, first_all, last_all, last_any, BLOCK: tl.constexpr):
    """Blocks of a range, (begin, inner_begin, inner_end, end), by what the tile's rows see of it.

    Some row sees elements from first_any on and before last_any; every row, those from first_all on
    and before last_all. Blocks from inner_begin on and before inner_end need no mask.
    """
    end = tl.cdiv(last_any, BLOCK)
    begin = tl.where(first_any < last_any, first_any // BLOCK, end)
    inner_begin = tl.minimum(tl.maximum(tl.cdiv(first_all, BLOCK), begin), end)
    inner_end = tl.minimum(tl.maximum(last_all // BLOCK, inner_begin), end)
    return begin, inner_begin, inner_end, end


@triton.jit
def reread(tiles):
    """Start and size of the segment and offset of a tile, once more.

    Numbers that stayed in registers during a loop would push out others.
    """
    return (
        tl.load(tiles, volatile=True),
        tl.load(tiles + 1, volatile=True),
        tl.load(tiles + 2, volatile=True),
    )


@triton.jit
def outer_block(index, begin, inner_begin, inner_end):
    """The index-th of the blocks that need a mask, from left to right."""
    left = inner_begin - begin
    return tl.where(index < left, begin + index, inner_end + index - left)


@triton.jit
def keys_seen(offset, size, prompt_size, window, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """`blocks_seen` of the prompt and of the own segment, by its queries from offset on."""
    prompt_any, prompt_all, own_any, own_all = 0, 0, 0, 0
    if window is not None:
        prompt_any = tl.maximum(0, prompt_size + offset - window + 1)
        prompt_all = tl.maximum(0, prompt_size + offset + BLOCK_Q - window)
        own_any = tl.maximum(0, offset - window + 1)
        own_all = tl.maximum(0, offset + BLOCK_Q - window)
    prompt = blocks_seen(prompt_any, prompt_all, prompt_size, prompt_size, BLOCK_K)
    own_end = tl.minimum(offset + BLOCK_Q, size)
    return prompt, blocks_seen(own_any, own_all, offset + 1, own_end, BLOCK_K)


@triton.jit
def inner_keys(index, prompt, own, prompt_start, start, BLOCK_K: tl.constexpr):
    """First row of the index-th block of keys that needs no mask, the prompt's first."""
    own_index = index - (prompt[2] - prompt[1])
    return tl.where(
        own_index < 0,
        prompt_start + (prompt[1] + index) * BLOCK_K,
        start + (own[1] + own_index) * BLOCK_K,
    ).to(tl.int64)


@triton.jit
def outer_keys(index, prompt, own, prompt_start, prompt_size, start, size, BLOCK_K: tl.constexpr):
    """The index-th block of keys that needs a mask, the prompt's first.

    Returns its first row, the number of rows of the segment from there on, its first position.
    """
    own_index = index - (prompt[3] - prompt[2] + prompt[1] - prompt[0])
    in_prompt = own_index < 0
    first = BLOCK_K * tl.where(
        in_prompt,
        outer_block(index, prompt[0], prompt[1], prompt[2]),
        outer_block(own_index, own[0], own[1], own[2]),
    )
    row = (tl.where(in_prompt, prompt_start, start) + first).to(tl.int64)
    exist = tl.where(in_prompt, prompt_size, size) - first
    return row, exist, tl.where(in_prompt, 0, prompt_size) + first


@triton.jit
def visible(query_positions, key_positions, window):
    """Whether each query sees each key: tensors that broadcast, of positions in one sequence."""
    seen = key_positions <= query_positions
    if window is not None:
        seen = seen & (query_positions - key_positions < window)
    return seen
