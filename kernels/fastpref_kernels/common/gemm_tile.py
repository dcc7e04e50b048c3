"""One program's (block_t, block_v) tile of the logits, in registers, in fp32.

    x = logit_scale * (hidden @ weight.T + bias),  then, with a soft cap c,  x <- c * tanh(x / c)

Columns beyond the vocabulary are -inf. Operands arrive as TMA descriptors, which clip at the edges,
or as pointers to rows of unit stride. The epilogue of the GEMM runs on one quarter of the tile's
columns after the other: a whole 128 x 256 tile and its exponentials overflow the registers.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl

from fastpref_kernels.common.configs import IGNORE_INDEX as _IGNORE_INDEX

IGNORE_INDEX = tl.constexpr(_IGNORE_INDEX)


@triton.jit
def dot_fp32(a, b, acc, UPCAST: tl.constexpr):
    """acc + a @ b; fp32 operands take three TF32 products, which keep the accuracy of fp32."""
    if UPCAST:  # the interpreter multiplies the bits of bf16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def matmul_tile(
    a,  # (A, D): a descriptor or a pointer
    b,  # (B, D)
    row,
    col,
    A,
    B,
    D,
    stride_a,
    stride_b,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """a[row:, :] @ b[col:, :].T, accumulated in fp32."""
    acc = tl.zeros((BLOCK_A, BLOCK_B), dtype=tl.float32)
    if USE_TMA:
        for d in range(0, D, BLOCK_D):
            acc = dot_fp32(a.load([row, d]), b.load([col, d]).T, acc, UPCAST)
    else:
        # Rows past the end repeat the last one; the caller masks their results. 64-bit bases and
        # 32-bit offsets within the tile need half the registers of 64-bit pointers.
        ds = tl.arange(0, BLOCK_D)
        a_rows = tl.minimum(tl.arange(0, BLOCK_A), A - 1 - row)
        b_rows = tl.minimum(tl.arange(0, BLOCK_B), B - 1 - col)
        a_base = a + tl.cast(row, tl.int64) * stride_a
        b_base = b + tl.cast(col, tl.int64) * stride_b
        a_offsets = a_rows[:, None] * stride_a + ds[None, :]
        b_offsets = b_rows[:, None] * stride_b + ds[None, :]
        for d in range(0, D, BLOCK_D):
            mask = ds[None, :] < D - d
            a_tile = tl.load(a_base + d + a_offsets, mask=mask, other=0.0)
            b_tile = tl.load(b_base + d + b_offsets, mask=mask, other=0.0)
            acc = dot_fp32(a_tile, b_tile.T, acc, UPCAST)
    return acc


@triton.jit
def column_halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile."""
    return x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def column_quarters(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile in four blocks of columns, from left to right."""
    left, right = column_halves(x, ROWS, COLUMNS)
    first, second = column_halves(left, ROWS, COLUMNS // 2)
    third, fourth = column_halves(right, ROWS, COLUMNS // 2)
    return first, second, third, fourth


@triton.jit
def finish_logits(acc, col, bias, V, logit_scale, softcap, BLOCK: tl.constexpr):
    """Logits of the columns from col on: acc with bias, scale and soft cap; -inf past V."""
    local = tl.arange(0, BLOCK)  # relative to col: fewer registers than column numbers
    x = acc
    if bias is not None:
        x += tl.load(bias + col + local, mask=local < V - col, other=0.0).to(tl.float32)[None, :]
    x *= logit_scale
    if softcap is not None:
        x = soft_cap(x, softcap)
    return tl.where(local[None, :] < V - col, x, float("-inf"))


@triton.jit
def soft_cap(x, softcap):
    """c tanh(x / c); an exponential that overflows leaves -1, as it should."""
    return softcap * (2.0 / (1.0 + tl.exp(-2.0 * x / softcap)) - 1.0)


@triton.jit
def cap_slope(x, softcap):
    """Derivative of the soft cap, from the capped logit x."""
    ratio = tl.maximum(x / softcap, -1.0)  # columns past the vocabulary are -inf
    return 1.0 - ratio * ratio


@triton.jit
def chain_rule(grad, logits, logit_scale, softcap):
    """Gradient by hidden @ weight.T from the gradient by the finished logits."""
    grad *= logit_scale
    if softcap is not None:
        grad *= cap_slope(logits, softcap)
    return grad


@triton.jit
def store_columns(out, values, rows, mask, col, V, stride, BLOCK: tl.constexpr):
    """out[rows, col : col + BLOCK] = values where mask allows, none past column V."""
    local = tl.arange(0, BLOCK)
    tl.store(
        out + rows[:, None].to(tl.int64) * stride + (col + local)[None, :],
        values.to(out.dtype.element_ty),
        mask=mask & (local[None, :] < V - col),
    )


@triton.jit
def grouped_tile(pid, rows, panels, GROUP: tl.constexpr):
    """(row block, panel) of a program: GROUP row blocks read the weight together."""
    group = pid // (GROUP * panels)
    first = group * GROUP
    size = tl.minimum(rows - first, GROUP)
    rest = pid % (GROUP * panels)
    return first + rest % size, rest // size
