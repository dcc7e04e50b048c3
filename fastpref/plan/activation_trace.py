"""Bytes and FLOPs of a trunk's passes, counted on tensors without values.

The model's own code runs forward and backward, with its autocast, adapters and checkpointing, on
fake tensors, which have shapes and no values; a dispatch mode adds up the live storages. It runs
with a few blocks and with twice as many, on a short and on a long input. Bytes and FLOPs are linear
in both numbers, so other sizes are interpolated and extrapolated.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastpref.data.batch_plan import Layout
from fastpref.data.collate import Batch, collate
from fastpref.data.dataset import TokenGroup
from fastpref.model.batch_layout import use_layout
from fastpref.model.fsdp import materialize
from fastpref.model.policy import Policy
from fastpref.utils.errors import ModelError, first_line


class Line(NamedTuple):
    """A number as a function of the tokens of a forward pass."""

    constant: float
    per_token: float

    def __call__(self, tokens: int) -> float:
        return self.constant + self.per_token * tokens


@dataclass(frozen=True)
class Trace:
    """Bytes and FLOPs of the trunk's passes; FLOPs exclude the scores of attention."""

    saved: Line  # bytes from the forward to the backward pass
    forward: Line  # peak bytes beyond `saved` during the forward pass
    backward: Line  # peak bytes beyond `saved` during the backward pass, without its gradients
    forward_flops: Line
    backward_flops: Line  # recomputation included

    def mixed(self, other: Trace, share: float) -> Trace:
        """Trace of a model of which a share of the blocks behaves as in `other`."""
        if share in (0, 1):
            return other if share else self

        def mean(a: Line, b: Line) -> Line:
            return Line(*(x + share * (y - x) for x, y in zip(a, b, strict=True)))

        lines = (getattr(self, field.name) for field in fields(self))
        others = (getattr(other, field.name) for field in fields(other))
        mix = Trace(*map(mean, lines, others))
        # The backward pass works on one block at a time, of either kind.
        peak = max(self.backward, other.backward, key=lambda line: line.per_token)
        return replace(mix, backward=peak)


class _Run(NamedTuple):
    saved: float
    forward: float
    backward: float
    forward_flops: float
    backward_flops: float


def trace(policy: Policy, group: Sequence[int], layout: Layout, one_kernel: bool) -> Trace:
    """Trace an empty policy over a group and over one twice as long; the policy loses its blocks.

    group: tokens of the prompt and of each response. one_kernel: attention takes a packed row at
    once; else sequence by sequence, as on CPU. Raises ModelError for a model whose code needs
    values.
    """
    if policy.base.config._attn_implementation != "eager":
        # Packed attention saves as much as flash attention, with segments or without; the code of
        # transformers would build masks, which needs values.
        use_layout(policy, "prefix_shared")
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            materialize(policy, torch.device("cpu"))
            batches = [_batch([n * k for n in group], layout, one_kernel) for k in (1, 2)]
            return _fit(policy, batches)
    except Exception as error:  # a model's own code may raise anything
        raise ModelError(
            f"model: {type(policy.base).__name__} cannot be traced without values: "
            f"{first_line(error)}"
        ) from None


def _fit(policy: Policy, batches: list[Batch]) -> Trace:
    short, long = (batch.input_ids.numel() for batch in batches)
    blocks = policy.blocks()
    count = len(blocks)
    alike = len({sum(p.numel() for p in block.parameters()) for block in blocks}) == 1
    many = min(count, 4) if alike else count
    few = max(1, many // 2)
    runs = {}
    for size in (many, few):
        del blocks[size:]
        runs[size] = [_run(policy, batch) for batch in batches]
    lines = []
    for name in _Run._fields:
        low, high = (getattr(run, name) for run in runs[many])
        # The backward pass works on one block at a time, so its peak is that of any number.
        if name != "backward" and many > few:
            less = [getattr(run, name) for run in runs[few]]
            scale = (count - many) / (many - few)
            low, high = low + scale * (low - less[0]), high + scale * (high - less[1])
        slope = (high - low) / (long - short)
        lines.append(Line(low - slope * short, slope))
    return Trace(*lines)


def _batch(lengths: Sequence[int], layout: Layout, one_kernel: bool) -> Batch:
    prompt, *responses = (np.zeros(length, dtype=np.int32) for length in lengths)
    batch = collate([TokenGroup(0, 1, prompt, tuple(responses))], "groupwise", layout)
    return replace(batch, segments=None) if one_kernel else batch


def _run(policy: Policy, batch: Batch) -> _Run:
    """Run one forward and one backward pass of the trunk, from its embeddings."""
    embeddings = cast(Tensor, policy.base.get_input_embeddings().weight)
    shape = *batch.input_ids.shape, embeddings.shape[1]
    hooks = [
        p.register_post_accumulate_grad_hook(_drop_gradient)
        for p in policy.parameters()
        if p.requires_grad
    ]
    # As in training: tensors in reference cycles live until a collection between steps.
    gc.disable()
    try:
        return _counted(policy, batch, embeddings, shape)
    finally:
        gc.enable()
        for hook in hooks:
            hook.remove()


def _counted(policy: Policy, batch: Batch, embeddings: Tensor, shape: Sequence[int]) -> _Run:
    counter = FlopCounterMode(display=False, custom_mapping=_IN_PLACE)
    with counter as flops, _LiveBytes(policy.parameters()) as live:
        inputs = torch.empty(shape, dtype=embeddings.dtype, requires_grad=embeddings.requires_grad)
        root = policy.hidden_states(batch, inputs).sum()
        saved, forward, forward_flops = live.now, live.peak, flops.get_total_flops()
        live.peak = saved
        root.backward()
        total = flops.get_total_flops()
    return _Run(saved, forward - saved, live.peak - saved, forward_flops, total - forward_flops)


def _addmm_flops(_: Any, a: Sequence[int], b: Sequence[int], *__: Any, **___: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


# Torch's counter does not know the product that is added in place.
_IN_PLACE: dict[Any, Any] = {torch.ops.aten.addmm_: _addmm_flops}


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _LiveBytes(TorchDispatchMode):
    """Bytes of live storages that were allocated inside the context, now and at their peak."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, Any] = {}
        for tensor in existing:
            self._add(tensor.untyped_storage(), size=0)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._add(storage, storage.nbytes())
        return output

    def _add(self, storage: Any, size: int) -> None:
        key = id(storage)
        if key in self._storages:
            return
        self.now += size
        self.peak = max(self.peak, self.now)
        self._storages[key] = weakref.ref(storage, lambda _: self._remove(key, size))

    def _remove(self, key: int, size: int) -> None:
        self.now -= size
        del self._storages[key]
