"""Peak memory of a rank, by part: the fullest of a few moments of a step.

At each moment other things are alive. A step is fullest at one of these:

    forward        the trunk's last forward pass, with autocast's copies of the weights
    head           its log-probs: all activations, a chunk of logits
    head backward  the head's backward pass
    backward       the backward pass of the last block
    next pass      on CPU, where a micro-batch has many passes: the gradients of the first pass wait
                   for those of the others, in addition to those of earlier micro-batches
    end            the backward pass of the first block and the embeddings: all gradients
    update         the optimizer
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

from fastpref.config import Optim, Parallel, ReferenceMode
from fastpref.plan.activation_trace import Trace
from fastpref.plan.head import Head, RewardHead
from fastpref.plan.model_shapes import Shapes
from fastpref.plan.workload import MicroBatch


@dataclass(frozen=True)
class Parts:
    """Bytes of a rank at one moment."""

    weights: int = 0  # sharded and gathered ones
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0  # of the trunk
    head: int = 0  # of its log-probs and their gradient
    reference: int = 0
    checkpoint: int = 0  # the copy that is being written, if it lies in the same memory

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Memory:
    """Bytes that a run needs throughout, and bytes that its passes add."""

    shapes: Shapes
    trace: Trace
    head: Head | RewardHead
    optim: Optim
    parallel: Parallel
    reference: ReferenceMode
    dpo_pg: bool  # two gradients
    checkpoints: bool
    shard: int  # ranks that share one copy of the base
    on_cpu: bool
    recomputed: float  # share of the blocks

    @property
    def offloads(self) -> bool:
        return self.parallel.cpu_offload and self.sharded and not self.on_cpu

    @property
    def sharded(self) -> bool:
        return self.shard > 1

    @cached_property
    def trained_bytes(self) -> int:
        """Trained weights on this rank."""
        s = self.shapes
        return s.adapter * s.adapter_stored if s.adapter else s.base * s.stored // self.shard

    @cached_property
    def weights(self) -> int:
        s = self.shapes
        local = s.base_bytes // self.shard + s.adapter * s.adapter_stored
        if not self.sharded:
            # Of weights in 4 bits, one is unpacked at a time.
            return local + s.largest_linear * s.compute
        # Without resharding all blocks stay gathered; with it this one, and the next is prefetched.
        blocks = s.in_blocks
        if self.parallel.reshard_after_forward:
            blocks = min(2 * s.largest_block, s.in_blocks)
        return (0 if self.offloads else local) + (s.root + blocks) * s.compute

    @cached_property
    def gradients(self) -> int:
        copies = 2 if self.dpo_pg else 1
        return 0 if self.offloads else copies * self.trained_bytes

    @cached_property
    def optimizer(self) -> int:
        return 0 if self.offloads or self._pages else self.optimizer_bytes

    @property
    def _pages(self) -> bool:
        return self.optim.name.startswith("paged")

    @cached_property
    def optimizer_bytes(self) -> int:
        """State of the optimizer, in whichever memory."""
        name = self.optim.name
        if name.endswith("8bit"):  # two bytes a weight, two fp32 scales for 256 of them
            trained = self.shapes.adapter or self.shapes.base // self.shard
            return trained * 2 + trained * 8 // 256
        moments = {"rmsprop": 1, "sgd": int(self.optim.momentum > 0)}
        return self.trained_bytes * moments.get(name, 2)

    @cached_property
    def host_copy(self) -> int:
        """The copy in host memory from which checkpoints are written."""
        return self.trained_bytes + self.optimizer_bytes if self.checkpoints else 0

    def peak(self, batch: MicroBatch, accumulates: bool) -> tuple[str, Parts]:
        """The fullest moment of a micro-batch.

        accumulates: gradients of other micro-batches are in memory already.
        """
        moments = self.moments(batch, accumulates)
        name = max(moments, key=lambda moment: moments[moment].total)
        return name, moments[name]

    def moments(self, batch: MicroBatch, accumulates: bool) -> dict[str, Parts]:
        """Parts at each of the moments above."""
        last = batch[-1]
        base = replace(
            self._throughout(batch),
            gradients=self.gradients if accumulates else 0,
            activations=self._activations(batch),
            head=self._head_saved(batch),
        )
        without_last = replace(base, head=self._head_saved(batch[:-1]))
        moments = {
            "forward": _plus(without_last, activations=self.trace.forward(last.tokens)),
            "head": _plus(base, head=self.head.forward(last)),
            "head backward": _plus(base, head=self.head.backward(last)),
            "backward": _plus(
                without_last,
                gradients=0 if accumulates else self._head_gradient,
                activations=self.trace.backward(last.tokens) + self._reduced,
            ),
            "end": self._end(batch, base),
            "update": replace(self._throughout(()), gradients=self.gradients + self._update_copy),
        }
        if len(batch) > 1:
            moments["next pass"] = self._next_pass(batch, base)
        return moments

    def _next_pass(self, batch: MicroBatch, base: Parts) -> Parts:
        """The second backward pass, while the gradients of the first wait to be added to its."""
        remaining = batch[:-1]
        head = max(self.head.backward(remaining[-1]), self._head_gradient)
        return replace(
            base,
            gradients=base.gradients + self.gradients,
            activations=self._activations(remaining),
            head=self._head_saved(remaining) + head,
        )

    def _end(self, batch: MicroBatch, base: Parts) -> Parts:
        """The first block of the last backward pass, then the embeddings."""
        first = batch[0]
        waiting = base.gradients if len(batch) > 1 else 0
        adds_up = base.gradients > 0 or len(batch) > 1
        block = self._activations((first,)) // self.shapes.blocks
        return replace(
            base,
            gradients=self.gradients + waiting + self._embedding_gradient(adds_up),
            activations=block + round(self.trace.backward(first.tokens)),
            head=0,
        )

    def _throughout(self, batch: MicroBatch) -> Parts:
        return Parts(
            weights=self.weights,
            optimizer=self.optimizer,
            reference=self._reference_bytes(batch),
            checkpoint=self.host_copy if self.on_cpu else 0,
        )

    def _reference_bytes(self, batch: MicroBatch) -> int:
        """A second model, with its hidden states and its cast heads."""
        s = self.shapes
        if self.reference not in ("frozen", "adapter"):
            return 0
        states = sum(p.scored for p in batch) * s.width * s.compute
        if s.stored != s.compute:  # its head is cast for each pass
            states += len(batch) * s.head * s.compute
        return states + (self.weights if self.reference == "frozen" else 0)

    def _activations(self, batch: MicroBatch) -> int:
        return sum(round(self.trace.saved(p.tokens)) for p in batch)

    def _head_saved(self, batch: MicroBatch) -> int:
        return sum(self.head.saved(p) for p in batch)

    @property
    def _head_gradient(self) -> int:
        s = self.shapes
        return s.head * s.stored // self.shard if s.head_is_trained else 0

    @property
    def _reduced(self) -> int:
        """Full gradients of a block, and their copy in fp32 for the reduce-scatter."""
        s = self.shapes
        return s.largest_block * (s.compute + 4) if self.sharded and not s.adapter else 0

    def _embedding_gradient(self, adds_up: bool) -> int:
        """The embeddings' dense gradient, if it is a tensor apart from the parameter's `grad`.

        adds_up: the parameter has a gradient to which this one is added.
        """
        s = self.shapes
        if s.adapter:
            return 0
        if self.sharded:
            return s.root * (s.compute + 4)
        return s.embeddings * s.stored if adds_up or s.tied else 0

    @property
    def _update_copy(self) -> int:
        """RMSprop's square roots, and gradients to which decay is added: of all weights on CUDA."""
        name, decays = self.optim.name, self.optim.weight_decay > 0
        if self.on_cpu or name not in ("rmsprop", "sgd"):
            return 0
        return self.trained_bytes * ((name == "rmsprop") + decays)


def _plus(parts: Parts, **more: float) -> Parts:
    return replace(parts, **{name: getattr(parts, name) + round(n) for name, n in more.items()})
