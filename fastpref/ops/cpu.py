"""The ops on a CPU: `fastpref.ops.chunked` with its row passes in C++.

The chunks, the GEMMs and the gradients are those of `chunked`; the elementwise work between two
GEMMs is one call into the library built from `csrc/cpu/rows.cpp`. It reads a row of logits from
memory once, where PyTorch reads it in each of half a dozen operations. fp32 inputs only.

A trained head caches the dlogits of every token between forward and backward if they fit
`CACHE_BYTES`: 3 GEMMs instead of 4.

The library is an optional part of the package, built at installation where there is a C++
compiler; `unavailable_reason` says why it cannot be used.
"""

import ctypes
import functools
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastpref.ops import chunked
from fastpref.ops.reference import TokenStats
from fastpref.ops.row_pass import RowPass

LIBRARY = Path(__file__).with_name(f"_rows{sysconfig.get_config_var('EXT_SUFFIX')}")

# The most memory for the cached dlogits of a trained head, divided among the calls that
# `calls_alive` announces; 0 disables the cache. They also take at most CACHE_CHUNKS chunks, so
# that lowering `chunked.CHUNK_BYTES` lowers all memory. A backward pass that recomputes no GEMM is
# 1.4 times as fast (D 64 to 512).
CACHE_BYTES = 2**30
CACHE_CHUNKS = 4
_calls = 1

_VERSION = 1  # of the C signatures below, as the library reports it


@contextmanager
def calls_alive(count: int) -> Iterator[None]:
    """Context manager in which `count` calls of similar size share the cache.

    It is for forward passes that all run before the first backward pass.
    """
    global _calls
    before, _calls = _calls, max(1, count)
    try:
        yield
    finally:
        _calls = before


@functools.cache
def unavailable_reason(device: str) -> str:
    """Reason why the library cannot be used, and what to do about it; empty if it can."""
    if device != "cpu":
        return f"cannot run on {device}; move the inputs"
    remedy = "install a C++ compiler and then fastpref again"
    if not LIBRARY.exists():
        return f"was not built, there is no {LIBRARY.name}; {remedy}"
    try:
        version = _library().fastpref_rows_version()
    except (OSError, AttributeError) as error:
        return f"cannot load {LIBRARY.name} ({error}); {remedy}"
    if version != _VERSION:
        return f"found {LIBRARY.name} of another version of fastpref; {remedy}"
    return ""


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    pointer, integer, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    matrix = (pointer, integer, integer, integer)
    library.fastpref_score_rows.argtypes = (*matrix, *(6 * (pointer,)), threads)
    library.fastpref_score_rows.restype = integer
    library.fastpref_delta_rows.argtypes = (*matrix, *(3 * (pointer,)), threads)
    library.fastpref_delta_rows.restype = None
    return library


def _score(logits: Tensor, labels: Tensor, entropy: bool, scale: float | None) -> TokenStats:
    labels = labels.contiguous()
    rows = len(logits)
    logps, lse, entropies = logits.new_empty(rows), logits.new_empty(rows), logits.new_zeros(rows)
    top1 = torch.empty(rows, dtype=torch.bool)
    out_of_range = _library().fastpref_score_rows(
        *_matrix(logits),
        labels.data_ptr(),
        None if scale is None else ctypes.byref(ctypes.c_float(scale)),
        logps.data_ptr(),
        lse.data_ptr(),
        entropies.data_ptr() if entropy else None,
        top1.data_ptr(),
        torch.get_num_threads(),
    )
    assert not out_of_range, "labels are checked before"
    return TokenStats(logps, lse, entropies, top1)


def _dlogits(logits: Tensor, labels: Tensor, lse: Tensor, row_scale: Tensor) -> None:
    labels, lse, row_scale = labels.contiguous(), lse.contiguous(), row_scale.contiguous()
    _library().fastpref_delta_rows(
        *_matrix(logits),
        labels.data_ptr(),
        lse.data_ptr(),
        row_scale.data_ptr(),
        torch.get_num_threads(),
    )


def _matrix(logits: Tensor) -> tuple[int, int, int, int]:
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    return logits.data_ptr(), logits.shape[0], logits.shape[1], logits.stride(0)


def _caches_dlogits(hidden: Tensor, weight: Tensor) -> bool:
    needed = _calls * hidden.itemsize * hidden.shape[0] * weight.shape[0]
    return needed <= min(CACHE_BYTES, CACHE_CHUNKS * chunked.CHUNK_BYTES)


_ROWS = RowPass(_score, _dlogits, _caches_dlogits)
BACKEND = chunked.Chunked(_ROWS)
