"""The ops on a CPU: `fastpref.ops.chunked` with its row passes in C++.

The chunks, the products and the gradients are those of `chunked`; what lies between two
products is one call into the library built from `csrc/cpu/rows.cpp`, which reads a row of logits
from memory once where PyTorch reads it in each of half a dozen operations. fp32 inputs only.

A trained head keeps its deltas, `onehot - softmax` of every token, between forward and backward if
they fit `CACHE_BYTES`: 3 products instead of 4.

Labels outside the vocabulary are a ValueError here: the library would read past a row.

The library is an optional part of the package, built when it is installed where there is a C++
compiler; `missing` says what keeps it from being used.
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

LIBRARY = Path(__file__).with_name(f"_rows{sysconfig.get_config_var('EXT_SUFFIX')}")

# The most memory that a trained head's deltas may take from forward to backward, over as many calls
# as `calls_alive` says; 0 never keeps them. They take no more than CACHE_CHUNKS chunks either, so
# that lowering `chunked.CHUNK_BYTES` lowers all memory. A backward pass without products to repeat
# is 1.4 times as fast (D 64 to 512).
CACHE_BYTES = 2**30
CACHE_CHUNKS = 4
_calls = 1

_VERSION = 1  # of the signatures below, as the library reports it


@contextmanager
def calls_alive(count: int) -> Iterator[None]:
    """Within, `count` calls of about one size await their backward pass and share the cache."""
    global _calls
    before, _calls = _calls, max(1, count)
    try:
        yield
    finally:
        _calls = before


@functools.cache
def missing(device: str) -> str:
    """What keeps the library from being used and what to do about it; empty if nothing does."""
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


def _score(z: Tensor, labels: Tensor, entropy: bool, gain: float | None) -> TokenStats:
    labels = labels.contiguous()
    logps, lse, entropies = z.new_empty(len(z)), z.new_empty(len(z)), z.new_zeros(len(z))
    top1 = torch.empty(len(z), dtype=torch.bool)
    strangers = _library().fastpref_score_rows(
        *_matrix(z),
        labels.data_ptr(),
        None if gain is None else ctypes.byref(ctypes.c_float(gain)),
        logps.data_ptr(),
        lse.data_ptr(),
        entropies.data_ptr() if entropy else None,
        top1.data_ptr(),
        torch.get_num_threads(),
    )
    if strangers:
        raise ValueError(
            f"labels: expected -100 or an index below {z.shape[1]}, the rows of weight; "
            f"{strangers} of {len(z)} are neither, correct or ignore them"
        )
    return TokenStats(logps, lse, entropies, top1)


def _delta(z: Tensor, labels: Tensor, lse: Tensor, gain: Tensor) -> None:
    labels, lse, gain = labels.contiguous(), lse.contiguous(), gain.contiguous()
    _library().fastpref_delta_rows(
        *_matrix(z), labels.data_ptr(), lse.data_ptr(), gain.data_ptr(), torch.get_num_threads()
    )


def _matrix(z: Tensor) -> tuple[int, int, int, int]:
    assert z.dtype == torch.float32 and z.stride(1) == 1
    return z.data_ptr(), z.shape[0], z.shape[1], z.stride(0)


def _keeps_deltas(hidden: Tensor, weight: Tensor) -> bool:
    deltas = _calls * hidden.itemsize * hidden.shape[0] * weight.shape[0]
    return deltas <= min(CACHE_BYTES, CACHE_CHUNKS * chunked.CHUNK_BYTES)


_ROWS = chunked.RowPass(_score, _delta, _keeps_deltas)
BACKEND = chunked.Chunked(_ROWS)
