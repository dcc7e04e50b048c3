"""delta @ weight without the blocks of delta that hold nothing large: off unless asked for.

    direction_t = sum over blocks k with max |delta_tk| >= threshold of delta_tk @ weight_k

After training, nearly all of a token's probability lies on a few words, and most (rows, columns)
blocks of delta hold entries that bf16 products would round away. A flag for each block comes out of
the pass that forms delta; the active blocks of a row block are listed in order, on the device, and
the product walks the list. What is left out of a row sums, in absolute value, to less than V *
threshold times the largest weight, and in practice to the probability mass of the rare words.

Extra memory: one byte and one index per block. The sum over a row block depends on which rows
share it: within a micro-batch results are deterministic, between two they are not the same bits.
"""

# mypy: allow-untyped-defs
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import DELTA
from .launch import gemm_config, skip_config
from .tiles import dot_fp32


@triton.jit
def active_mm_kernel(
    deltas,  # (T, V): a descriptor or a pointer
    head,  # (V, D)
    blocks,  # (row_blocks, V / BLOCK_D) int32, the active ones of a row block first
    counts,  # (row_blocks,) int32
    direction,  # (T, D), written
    T,
    V,
    D,
    stride_e,
    stride_w,
    stride_b,
    stride_o,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,  # columns of direction
    BLOCK_D: tl.constexpr,  # columns of a block of deltas
    USE_TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row_block = tl.program_id(0)
    row, col = row_block * BLOCK_T, tl.program_id(1) * BLOCK_V
    local_rows, local_cols = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_V)
    es = tl.arange(0, BLOCK_D)
    row_mask, col_mask = local_rows < T - row, local_cols < D - col
    acc = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    for i in range(tl.load(counts + row_block)):
        e = tl.load(blocks + row_block * stride_b + i) * BLOCK_D
        if USE_TMA:
            acc = dot_fp32(deltas.load([row, e]), head.load([e, col]), acc, UPCAST)
        else:
            a = deltas + tl.cast(row, tl.int64) * stride_e + e
            b = head + tl.cast(e, tl.int64) * stride_w + col
            inside = es < V - e
            d = tl.load(
                a + local_rows[:, None].to(tl.int64) * stride_e + es[None, :],
                mask=row_mask[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            w = tl.load(
                b + es[:, None] * stride_w + local_cols[None, :],
                mask=inside[:, None] & col_mask[None, :], other=0.0,
            )  # fmt: skip
            acc = dot_fp32(d, w, acc, UPCAST)
    out = direction + tl.cast(row, tl.int64) * stride_o + col
    tl.store(
        out + local_rows[:, None] * stride_o + local_cols[None, :],
        acc.to(direction.dtype.element_ty),
        mask=row_mask[:, None] & col_mask[None, :],
    )


def active_flags(delta: Tensor, hidden: Tensor) -> Tensor:
    """Room for a flag per block of DELTA.block_t rows and block_e columns, uint8.

    An even number of rows: a row block of the product spans two.
    """
    rows = 2 * triton.cdiv(delta.shape[0], 2 * DELTA.block_t)
    columns = triton.cdiv(delta.shape[1], gemm_config(hidden).block_e)
    return torch.zeros((rows, columns), dtype=torch.uint8, device=delta.device)


def active_mm(
    delta: Tensor,  # (T, V)
    weight: Tensor,  # (V, D)
    active: Tensor,  # (row blocks, column blocks) from `softmax_delta`
    direction: Tensor,  # (T, D), written
) -> None:
    """direction = delta @ weight over the active blocks of delta."""
    (T, V), D = delta.shape, weight.shape[1]
    if T == 0:
        return
    config = skip_config(weight)
    assert config.block_d == gemm_config(weight).block_e  # the blocks whose flags these are
    flags = active.view(active.shape[0] // 2, 2, -1).amax(1)
    blocks = flags.argsort(dim=1, descending=True, stable=True).int()
    left, right = delta, weight
    if config.tma:
        left = TensorDescriptor.from_tensor(delta, config.blocks["deltas"])
        right = TensorDescriptor.from_tensor(weight, config.blocks["head"])
    active_mm_kernel[(flags.shape[0], triton.cdiv(D, config.block_v))](
        left, right, blocks, flags.sum(1, dtype=torch.int32), direction,
        T, V, D, delta.stride(0), weight.stride(0), blocks.stride(0), direction.stride(0),
        BLOCK_T=config.block_t, BLOCK_V=config.block_v, BLOCK_D=config.block_d, USE_TMA=config.tma,
        UPCAST=not delta.is_cuda, num_warps=config.num_warps, num_stages=config.num_stages,
        enable_fp_fusion=True,
    )  # fmt: skip
