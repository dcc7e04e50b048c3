"""Checks of values: labels inside the vocabulary, offsets inside a packed batch.

Values on a CPU are read at once, and a wrong one raises ValueError. Reading those of a GPU would
wait for it, so the GPU checks them itself (`torch._assert_async`): it prints the same message, and
the next call that waits for it raises RuntimeError. Compiled graphs check, too, since the checks
run in custom ops.
"""

import torch
from torch import Tensor

from fastpref.ops.reference import IGNORE_INDEX


def require_labels_in_range(labels: Tensor, vocabulary: int) -> None:
    """Raise ValueError for a label that is neither -100 nor an entry of the vocabulary."""
    message = f"labels: expected -100 or an index below {vocabulary}, the rows of weight, got "
    remedy = "correct them or set them to -100"
    if labels.device.type != "cpu":
        valid = (labels == IGNORE_INDEX) | ((labels >= 0) & (labels < vocabulary))
        _assert_on_device(valid.all(), f"{message}others; {remedy}")
        return
    values = labels.numpy()  # no op of torch, and so no host sync
    outside = (values < 0) & (values != IGNORE_INDEX) | (values >= vocabulary)
    if outside.any():
        raise ValueError(f"{message}{outside.sum()} of {outside.size} out of range; {remedy}")


def require_offsets_in_range(
    offsets: Tensor, total: int, name: str = "cu_seqlens", items: str = "tokens"
) -> None:
    """Raise ValueError unless the offsets start at 0, never decrease, and end at `total`."""
    message = f"{name}: must rise from 0 to {total}, the number of {items}, got "
    if offsets.device.type != "cpu":
        rises = (offsets[1:] >= offsets[:-1]).all()
        _assert_on_device(rises & (offsets[0] == 0) & (offsets[-1] == total), f"{message}others")
        return
    ends = offsets.numpy()
    falls = (ends[1:] < ends[:-1]).nonzero()[0]
    if ends[0] != 0:
        raise ValueError(f"{message}{ends[0]} as the first")
    if len(falls):
        raise ValueError(f"{message}{ends[falls[0] + 1]} after {ends[falls[0]]}")
    if ends[-1] != total:
        raise ValueError(f"{message}{ends[-1]} as the last")


def _assert_on_device(valid: Tensor, message: str) -> None:
    if valid.is_cuda:
        torch._assert_async(valid, message)
    elif not valid:
        raise ValueError(message)


@torch.library.custom_op("fastpref::labels_in_range", mutates_args=())
def labels_in_range(labels: Tensor, vocabulary: int) -> Tensor:
    """A copy of the labels, checked as by `require_labels_in_range`."""
    require_labels_in_range(labels, vocabulary)
    return labels.clone()


@labels_in_range.register_fake
def _(labels: Tensor, vocabulary: int) -> Tensor:
    return torch.empty_like(labels)


@torch.library.custom_op("fastpref::offsets_in_range", mutates_args=())
def offsets_in_range(
    offsets: Tensor, total: int, name: str = "cu_seqlens", items: str = "tokens"
) -> Tensor:
    """A copy of the offsets, checked as by `require_offsets_in_range`."""
    require_offsets_in_range(offsets, total, name, items)
    return offsets.clone()


@offsets_in_range.register_fake
def _(offsets: Tensor, total: int, name: str = "cu_seqlens", items: str = "tokens") -> Tensor:
    return torch.empty_like(offsets)
