"""Attention over a packed row by flash-attn's kernels for sequences of different lengths.

Each prompt and each response is a sequence of queries. The keys of a response are those of its
prompt and its own, gathered: flash-attn aligns the causal mask to the ends of queries and keys. The
gradients of a prompt's keys are summed over its responses in their order, in fp32. Extra memory: a
prompt's keys and values once per response. The kernels run without atomics, so that equal inputs
have equal gradients to the bit.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastpref.attention.by_segment import Options
from fastpref.attention.segments import Segments

MAX_HEAD_SIZE = 256
# Parameters of flash-attn's backward function as of version 2.8, which has no public name.
BACKWARD_PARAMETERS = (
    "dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", "cu_seqlens_q", "cu_seqlens_k",
    "max_seqlen_q", "max_seqlen_k", "dropout_p", "softmax_scale", "causal", "window_size_left",
    "window_size_right", "softcap", "alibi_slopes", "deterministic",
)  # fmt: skip


class Copies(NamedTuple):
    """Copies of prompts in the gathered keys, of one response of each group that has so many.

    rows: (R,) index into `Gather.prompts`. keys: (R,) row of the gathered keys.
    """

    rows: Tensor
    keys: Tensor


class Gather(NamedTuple):
    """Keys of each sequence, prompt and response after one another.

    keys: (K,) row of each gathered key. own: (P,) gathered key of each row in its own segment.
    prompts: (R,) rows of prompts. copies: their keys in the sequences of the first responses, of
    the second, and so on. cu_seqlens, max_seqlen: of queries and of keys.
    """

    keys: Tensor
    own: Tensor
    prompts: Tensor
    copies: tuple[Copies, ...]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def unavailable_reason(query: Tensor, options: Options) -> str:
    """Reason why flash-attn cannot take such inputs, and what would help; empty if it can."""
    if query.device.type != "cuda":
        return f"cannot run on {query.device.type}; move the inputs to a CUDA device"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, got {query.dtype}; cast the inputs"
    size = query.shape[-1]
    if size > MAX_HEAD_SIZE or size % 8:
        return f"takes head sizes that are multiples of 8 up to {MAX_HEAD_SIZE}, got {size}"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or more"
    return _package_problem()


def forward(
    query: Tensor,  # (P, H, D)
    key: Tensor,  # (P, H', D)
    value: Tensor,  # (P, H', D)
    segments: Segments,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Outputs (P, H, D) and log-sum-exps (P, H) of the scores, fp32."""
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    gather = _gather(segments, query.device)
    with torch.no_grad():
        out, lse, _ = flash_attn_varlen_func(
            query,
            key.index_select(0, gather.keys),
            value.index_select(0, gather.keys),
            gather.cu_seqlens_q,
            gather.cu_seqlens_k,
            gather.max_seqlen_q,
            gather.max_seqlen_k,
            softmax_scale=options.scale,
            causal=True,
            window_size=_window(options),
            softcap=options.softcap or 0.0,
            return_attn_probs=True,
        )
    return out, lse.t()


def backward(
    grad: Tensor,  # (P, H, D)
    query: Tensor,  # (P, H, D)
    key: Tensor,  # (P, H', D)
    value: Tensor,  # (P, H', D)
    out: Tensor,  # (P, H, D)
    lse: Tensor,  # (P, H)
    segments: Segments,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    gather = _gather(segments, query.device)
    keys, values = (x.index_select(0, gather.keys) for x in (key, value))
    grads = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, keys, values)
    ]
    left, right = _window(options)
    _flash_attn_varlen_backward(
        dout=grad.contiguous(),
        q=query,
        k=keys,
        v=values,
        out=out,
        softmax_lse=lse.t().contiguous(),
        dq=grads[0],
        dk=grads[1],
        dv=grads[2],
        cu_seqlens_q=gather.cu_seqlens_q,
        cu_seqlens_k=gather.cu_seqlens_k,
        max_seqlen_q=gather.max_seqlen_q,
        max_seqlen_k=gather.max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=options.scale,
        causal=True,
        window_size_left=left,
        window_size_right=right,
        softcap=options.softcap or 0.0,
        alibi_slopes=None,
        deterministic=True,
    )
    return grads[0], _summed(grads[1], gather), _summed(grads[2], gather)


def _summed(grads: Tensor, gather: Gather) -> Tensor:
    """Gradients of the rows' own keys, from those of the gathered ones (K, H', D)."""
    total = grads.index_select(0, gather.own)
    if gather.copies:
        prompts = total.index_select(0, gather.prompts).float()
        for copies in gather.copies:  # no row twice in one of them, so no order is left open
            part = prompts.index_select(0, copies.rows)
            part += grads.index_select(0, copies.keys)
            prompts.index_copy_(0, copies.rows, part)
        total.index_copy_(0, gather.prompts, prompts.to(total.dtype))
    return total


def _window(options: Options) -> tuple[int, int]:
    """Keys before and after its own that a query sees; -1 is all, to which `causal` adds none."""
    return (-1, -1) if options.window is None else (options.window - 1, 0)


@cache
def _package_problem() -> str:
    if find_spec("flash_attn") is None:
        return "needs flash-attn, which is not installed; pip install flash-attn"
    try:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward as function
    except ImportError as error:  # built for another version of torch or CUDA
        return f"needs flash-attn, which does not load ({error}); install it again"
    names = _parameters(function)
    if missing := [name for name in BACKWARD_PARAMETERS if name not in names]:
        return (
            f"needs flash-attn 2.8, and the installed one has no {', '.join(missing)} in "
            f"_flash_attn_varlen_backward; pip install 'flash-attn>=2.8'"
        )
    return ""


def _parameters(function: Any) -> set[str]:
    """Names of a function's parameters; a custom op of torch has them in its `_init_fn`."""
    return set(signature(getattr(function, "_init_fn", function)).parameters)


def _gather(segments: Segments, device: torch.device) -> Gather:
    """The gathered keys of a row, as tensors on a device; made once."""
    name = ("flash", device)
    if name not in segments.cache:
        segments.cache[name] = _build(segments, device)
    gather: Gather = segments.cache[name]
    return gather


def _build(segments: Segments, device: torch.device) -> Gather:
    sizes, starts, prompts = segments.sizes, segments.starts, segments.prompts
    count = np.arange(len(sizes))
    shared = np.where(prompts == count, 0, sizes[prompts])
    ends = (shared + sizes).cumsum()
    first_own = ends - sizes  # of the gathered keys
    keys = [
        part
        for i in count
        for part in (_range(starts[prompts[i]], shared[i]), _range(starts[i], sizes[i]))
    ]
    own = [_range(first_own[i], sizes[i]) for i in count]
    members = np.bincount(prompts, minlength=len(sizes))  # segments of a prompt's group
    copied = [_range(starts[i], sizes[i]) for i in np.flatnonzero(members > 1)]
    place = np.zeros(segments.tokens, np.int64)  # of a row among the prompts that have copies
    if copied:
        place[np.concatenate(copied)] = np.arange(sum(map(len, copied)))

    def on_device(parts: list[NDArray[np.int64]], dtype: type = np.int64) -> Tensor:
        tensor = torch.from_numpy(np.concatenate(parts).astype(dtype))
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    copies = []
    for number in range(1, int(members.max())):
        having = np.flatnonzero(members > number)
        rows = [place[_range(starts[i], sizes[i])] for i in having]
        sources = [_range(first_own[i + number] - sizes[i], sizes[i]) for i in having]
        copies.append(Copies(on_device(rows), on_device(sources)))
    return Gather(
        on_device(keys), on_device(own), on_device(copied or [place[:0]]), tuple(copies),
        on_device([np.append(starts, segments.tokens)], np.int32),
        on_device([np.append(0, ends)], np.int32),
        int(sizes.max()), int((shared + sizes).max()),
    )  # fmt: skip


def _range(start: int, size: int) -> NDArray[np.int64]:
    return np.arange(start, start + size)
