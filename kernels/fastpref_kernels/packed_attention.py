"""Attention over packed rows with shared prompts: the launches behind `impl="triton"`.

A row is [prompt | response | response | ... | prompt | ...]. Each token sees its segment up to
itself and the prompt of its group. The kernels visit only blocks that hold visible pairs, and those
of the diagonal: `packed_attention_fwd` and `packed_attention_bwd` have formulas and costs.

Importing this module does not import triton.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastpref_kernels import unavailable_reason as device_unavailable_reason

if TYPE_CHECKING:
    from fastpref.attention.by_segment import Options
    from fastpref.attention.segments import Segments
    from fastpref_kernels.common.configs import AttentionConfig, AttentionConfigs

Numbers = NDArray[np.int64]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_SIZE = 256


def unavailable_reason(query: Tensor, options: "Options") -> str:
    """Reason why the kernels cannot take such inputs, and what would help; empty if they can."""
    size = query.shape[-1]
    if reason := device_unavailable_reason(query.device.type):
        return reason
    if query.dtype not in DTYPES:
        return f"takes float16, bfloat16 and float32, got {query.dtype}; cast the inputs"
    if size % 16 or not 16 <= size <= MAX_HEAD_SIZE:
        return f"takes head sizes that are multiples of 16 up to {MAX_HEAD_SIZE}, got {size}"
    if options.scale <= 0:
        return f"takes a positive scale, got {options.scale}"
    return ""


def forward(
    query: Tensor,  # (P, H, D)
    key: Tensor,  # (P, H', D)
    value: Tensor,  # (P, H', D)
    segments: "Segments",
    options: "Options",
) -> tuple[Tensor, Tensor]:
    """Outputs (P, H, D) in the dtype of the query, and log-sum-exps (P, H), fp32."""
    from fastpref_kernels.common.launch import launching_on
    from fastpref_kernels.packed_attention_fwd import packed_attention_fwd_kernel

    tokens, heads, _ = query.shape
    query, key, value = (unit_stride(x) for x in (query, key, value))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=query.device)
    config = _configs(query, options).fwd
    tiles = query_tiles(segments, config.block_q, query.device)
    with launching_on(query):
        packed_attention_fwd_kernel[(len(tiles) * heads,)](
            out=out, lse=lse, tiles=tiles, H=heads, P=tokens,
            **_operands(query, key, value, options, config),
        )  # fmt: skip
    return out, lse.t()


def backward(
    grad: Tensor,  # (P, H, D)
    query: Tensor,  # (P, H, D)
    key: Tensor,  # (P, H', D)
    value: Tensor,  # (P, H', D)
    out: Tensor,  # (P, H, D)
    lse: Tensor,  # (P, H)
    segments: "Segments",
    options: "Options",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous."""
    from fastpref_kernels.common.configs import ATTENTION_DELTA
    from fastpref_kernels.common.launch import launching_on
    from fastpref_kernels.packed_attention_bwd import (
        attention_delta_kernel,
        packed_attention_dkv_kernel,
        packed_attention_dq_kernel,
    )

    tokens, heads, _ = query.shape
    query, key, value, grad = (unit_stride(x) for x in (query, key, value, grad))
    dquery, dkey, dvalue = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    )
    delta = torch.empty((heads, tokens), dtype=torch.float32, device=query.device)
    configs = _configs(query, options)
    statistics = {"lse": lse.t().contiguous(), "delta": delta, "P": tokens}
    upstream = {"grad": grad, "stride_gt": grad.stride(0), "stride_gh": grad.stride(1)}
    tiles = query_tiles(segments, configs.dq.block_q, query.device)
    with launching_on(query):
        blocks = -(-tokens // ATTENTION_DELTA.block_t)
        attention_delta_kernel[(blocks * heads,)](
            out=out.contiguous(), delta=delta, H=heads, P=tokens, BLOCK_Q=ATTENTION_DELTA.block_t,
            num_warps=ATTENTION_DELTA.num_warps, **upstream, **_head(query),
        )  # fmt: skip
        packed_attention_dq_kernel[(len(tiles) * heads,)](
            dquery=dquery, tiles=tiles, H=heads, **statistics, **upstream,
            **_operands(query, key, value, options, configs.dq),
        )  # fmt: skip
        launches: list[tuple[Tensor | None, Tensor | None, AttentionConfig]]
        launches = [(dkey, dvalue, configs.dkv)]
        if configs.dv is not None:
            launches = [(dkey, None, configs.dkv), (None, dvalue, configs.dv)]
        for key_output, value_output, config in launches:
            key_list = key_tiles(segments, config.block_k, query.device)
            packed_attention_dkv_kernel[(len(key_list) * key.shape[1],)](
                dkey=key_output, dvalue=value_output, tiles=key_list, K=key.shape[1],
                starts=segment_starts(segments, query.device), **statistics, **upstream,
                **_operands(query, key, value, options, config),
            )  # fmt: skip
    return dquery, dkey, dvalue


def unit_stride(x: Tensor) -> Tensor:
    """The tensor itself if its last stride is 1, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def query_tiles(segments: "Segments", block: int, device: torch.device) -> Tensor:
    """(N, 5) int32 on the device: a row for each tile of `block` queries, the longest walk first.

    Columns: start and size of the segment, offset of the tile in it, start and size of the prompt,
    whose size is 0 for a tile of a prompt.
    """

    def build() -> Numbers:
        owner, offset = tiled(segments.sizes, block)
        prompt = segments.prompts[owner]
        prompt_size = np.where(prompt == owner, 0, segments.sizes[prompt])
        tiles = [segments.starts[owner], segments.sizes[owner], offset]
        walk = prompt_size + offset
        return _sorted([*tiles, segments.starts[prompt], prompt_size], walk)

    return _cached(segments, ("query tiles", block, device), build)


def key_tiles(segments: "Segments", block: int, device: torch.device) -> Tensor:
    """(N, 7) int32 on the device: a row for each tile of `block` keys, the longest walk first.

    Columns: start and size of the segment, offset of the tile in it, end of the rows of the
    responses that see it, size of the longest of these, the first and after the last of their
    segments.
    """

    def build() -> Numbers:
        owner, offset = tiled(segments.sizes, block)
        count = len(segments.sizes)
        is_prompt = segments.prompts == np.arange(count)
        after = np.searchsorted(segments.prompts, np.arange(count), side="right")
        after = np.where(is_prompt, after, np.arange(1, count + 1))
        ends = (segments.starts + segments.sizes)[after - 1]
        longest = np.zeros(count, np.int64)
        responses = np.flatnonzero(~is_prompt)
        np.maximum.at(longest, segments.prompts[responses], segments.sizes[responses])
        tiles = [segments.starts[owner], segments.sizes[owner], offset]
        walk = (ends - segments.starts)[owner] - offset
        return _sorted([*tiles, ends[owner], longest[owner], owner + 1, after[owner]], walk)

    return _cached(segments, ("key tiles", block, device), build)


def segment_starts(segments: "Segments", device: torch.device) -> Tensor:
    """(S + 1,) int32 on the device: first row of each segment, and the number of rows."""
    return _cached(
        segments, ("starts", device), lambda: np.append(segments.starts, segments.tokens)
    )


def tiled(sizes: Numbers, block: int) -> tuple[Numbers, Numbers]:
    """Segment of each tile, and its offset in the segment, when tiles start with the segments."""
    tiles = -(-sizes // block)
    owner = np.arange(len(sizes)).repeat(tiles)
    index = np.arange(tiles.sum()) - (tiles.cumsum() - tiles).repeat(tiles)
    return owner, index * block


def _sorted(columns: list[Numbers], walk: Numbers) -> Numbers:
    """Rows of a list of tiles: long walks start first, so that no multiprocessor ends late."""
    return np.stack(columns, axis=1)[np.argsort(-walk, kind="stable")]


def _cached(segments: "Segments", key: tuple[Any, ...], build: Callable[[], Numbers]) -> Tensor:
    """A table of the segments on a device, built once; its copy waits for nothing."""
    name = ("fastpref_kernels", *key)
    if name not in segments.cache:
        table = torch.from_numpy(build().astype(np.int32))
        device: torch.device = key[-1]
        if device.type == "cuda":
            table = table.pin_memory()
        segments.cache[name] = table.to(device, non_blocking=True)
    cached: Tensor = segments.cache[name]
    return cached


def _configs(query: Tensor, options: "Options") -> "AttentionConfigs":
    from fastpref_kernels.common import configs

    if not query.is_cuda:
        return configs.INTERPRETER_ATTENTION
    arch = configs.table_arch(torch.cuda.get_device_capability(query.device))
    return configs.attention_configs(
        arch, query.element_size(), query.shape[-1], options.softcap is not None
    )


def _head(query: Tensor) -> dict[str, Any]:
    """Constants of the head size."""
    from fastpref_kernels.common.attention_tile import head_parts
    from fastpref_kernels.common.configs import FP_FUSION

    first, second = head_parts(query.shape[-1])
    return {
        "SIZE": query.shape[-1],
        "FIRST": first,
        "SECOND": second,
        "enable_fp_fusion": FP_FUSION,
    }


def _operands(
    query: Tensor, key: Tensor, value: Tensor, options: "Options", config: "AttentionConfig"
) -> dict[str, Any]:
    """Arguments that the kernels over tiles of scores share."""
    softcap = options.softcap
    return {
        "query": query,
        "key": key,
        "value": value,
        "stride_qt": query.stride(0),
        "stride_qh": query.stride(1),
        "stride_kt": key.stride(0),
        "stride_kh": key.stride(1),
        "stride_vt": value.stride(0),
        "stride_vh": value.stride(1),
        "scale": float(options.scale),
        "softcap": None if softcap is None else float(softcap),
        "window": options.window,
        "HEADS_PER_KEY": query.shape[1] // key.shape[1],
        "BLOCK_Q": config.block_q,
        "BLOCK_K": config.block_k,
        "UPCAST": not query.is_cuda,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **_head(query),
    }
