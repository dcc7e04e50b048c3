"""Launch arguments from tensors: the configuration, descriptors or strides."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpref_kernels.common.configs import (
    FP_FUSION,
    INTERPRETER_GEMM,
    GemmConfig,
    gemm_configs,
    pair_configs,
    table_arch,
)

if TYPE_CHECKING:
    from fastpref.ops.backend import Head


@contextmanager
def launching_on(tensor: Tensor) -> Iterator[None]:
    """Context manager that launches on the tensor's device and keeps autocast off the GEMMs."""
    device = torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
    with device, torch.autocast(tensor.device.type, enabled=False):
        yield


def gemm_config(hidden: Tensor) -> GemmConfig:
    """The configuration of every kernel with one head, on this device and for this dtype."""
    return pinned(hidden, gemm_configs)


def pair_config(hidden: Tensor) -> GemmConfig:
    """The configuration of every kernel with two heads."""
    return pinned(hidden, pair_configs)


def pinned(
    hidden: Tensor,
    table: Callable[[int, int], tuple[GemmConfig, ...]],
) -> GemmConfig:
    """The first row of a table for the tensor's device and dtype."""
    if not hidden.is_cuda:
        return INTERPRETER_GEMM
    arch = table_arch(torch.cuda.get_device_capability(hidden.device))
    return table(arch, hidden.element_size())[0]


def dense_rows(x: Tensor) -> Tensor:
    """x itself if the kernels can read it, else a copy that they can read.

    They need rows of unit stride that start on 16 bytes, close enough for 32-bit offsets within a
    tile. The hidden states and heads of models are like that; other tensors pay for one copy.
    """
    step = x.stride(0)
    aligned = step * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    if x.stride(1) == 1 and aligned and x.shape[1] <= step < 2**23:
        return x
    return aligned_rows(x.shape[0], x.shape[1], x).copy_(x)


def operand(name: str, x: Tensor, config: GemmConfig) -> Tensor | TensorDescriptor:
    """A matrix as the kernel takes it: a descriptor of its blocks, or a pointer."""
    return TensorDescriptor.from_tensor(x, config.blocks[name]) if config.tma else x


def operands(hidden: Tensor, weight: Tensor, config: GemmConfig) -> dict[str, Any]:
    """Arguments that all kernels over tiles of the logits share."""
    hidden, weight = dense_rows(hidden), dense_rows(weight)
    return {
        "hidden": operand("hidden", hidden, config),
        "weight": operand("weight", weight, config),
        "T": hidden.shape[0],
        "V": weight.shape[0],
        "D": hidden.shape[1],
        "stride_h": hidden.stride(0),
        "stride_w": weight.stride(0),
        "BLOCK_T": config.block_t,
        "BLOCK_V": config.block_v,
        "BLOCK_D": config.block_d,
        "USE_TMA": config.tma,
        "UPCAST": not hidden.is_cuda,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": FP_FUSION,
    }


def pair_operands(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    config: GemmConfig,
) -> dict[str, Any]:
    """Arguments of `operands`, and those of the reference's head."""
    ref_hidden, ref_weight = dense_rows(ref_hidden), dense_rows(ref_weight)
    return operands(hidden, weight, config) | {
        "ref_hidden": operand("ref_hidden", ref_hidden, config),
        "ref_weight": operand("ref_weight", ref_weight, config),
        "D_REF": ref_hidden.shape[1],
        "stride_rh": ref_hidden.stride(0),
        "stride_rw": ref_weight.stride(0),
    }


def head_scalars(head: "Head") -> dict[str, Any]:
    """Scale and soft cap as kernel arguments."""
    softcap = None if head.softcap is None else float(head.softcap)
    return {"logit_scale": float(head.logit_scale), "softcap": softcap}


def bias_operand(head: "Head") -> Tensor | None:
    """The bias as a kernel argument."""
    return None if head.bias is None else head.bias.contiguous()


def aligned_rows(rows: int, columns: int, like: Tensor) -> Tensor:
    """Uninitialized (rows, columns) matrix whose rows start on 16 bytes, as fast GEMMs need."""
    step = 16 // like.element_size()
    return like.new_empty((rows, triton.cdiv(columns, step) * step))[:, :columns]
