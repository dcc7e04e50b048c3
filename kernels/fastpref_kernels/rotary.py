"""Rotary position embedding of queries and keys, in place, in one launch.

    y = x cos + rotate(x) sin,   rotate([a, b]) = [-b, a]      first R of a head's D numbers
    backward: the rotation by -sin

with halves a and b of R / 2 numbers. A program turns all heads of one token: it reads the token's
angles once, and reads and writes R numbers of each head. Arithmetic is fp32, rounded once.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.common.configs import FP_FUSION, ROTARY
from fastpref_kernels.common.launch import launching_on
from fastpref_kernels.packed_attention import unit_stride


@triton.jit
def rotate_heads(
    heads,  # (H, D) of one token
    c,
    s,
    H,
    stride_h,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column = tl.arange(0, BLOCK_D)[None, :]
    for first in range(0, H, BLOCK):
        head = first + tl.arange(0, BLOCK)[:, None]
        mask = (head < H) & (column < HALF)
        places = heads + head * stride_h + column
        a = tl.load(places, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(places + HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(places, (a * c - b * s).to(heads.dtype.element_ty), mask=mask)
        tl.store(places + HALF, (b * c + a * s).to(heads.dtype.element_ty), mask=mask)


@triton.jit
def rotary_kernel(
    query,  # (P, H, D), rotated in place
    key,  # (P, K, D), rotated in place
    cos,  # (P, 2 HALF)
    sin,  # (P, 2 HALF)
    H,
    K,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_ct,
    stride_st,
    HALF: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)[None, :]
    c = tl.load(cos + token * stride_ct + column, mask=column < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + token * stride_st + column, mask=column < HALF, other=0.0).to(tl.float32)
    if BACKWARD:
        s = -s
    rotate_heads(query + token * stride_qt, c, s, H, stride_qh, HALF, BLOCK, BLOCK_D)
    rotate_heads(key + token * stride_kt, c, s, K, stride_kh, HALF, BLOCK, BLOCK_D)


def rotate(
    query: Tensor,  # (P, H, D)
    key: Tensor,  # (P, H', D)
    cos: Tensor,  # (P, R)
    sin: Tensor,  # (P, R)
    backward: bool = False,
) -> None:
    """Rotate queries and keys in place; turn gradients of the results back if `backward`."""
    dense_query, dense_key, cos, sin = (unit_stride(x) for x in (query, key, cos, sin))
    half = cos.shape[1] // 2
    with launching_on(query):
        rotary_kernel[(len(query),)](
            query=dense_query,
            key=dense_key,
            cos=cos,
            sin=sin,
            H=query.shape[1],
            K=key.shape[1],
            stride_qt=dense_query.stride(0),
            stride_qh=dense_query.stride(1),
            stride_kt=dense_key.stride(0),
            stride_kh=dense_key.stride(1),
            stride_ct=cos.stride(0),
            stride_st=sin.stride(0),
            HALF=half,
            BACKWARD=backward,
            BLOCK=ROTARY.block_t,
            BLOCK_D=triton.next_power_of_2(half),
            num_warps=ROTARY.num_warps,
            enable_fp_fusion=FP_FUSION,
        )
    for x, dense in ((query, dense_query), (key, dense_key)):
        if x is not dense:
            x.copy_(dense)
