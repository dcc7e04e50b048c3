"""Peak memory of a rank, by part: the fullest of a few moments of a step.

A step is full at one of these moments, of which each has its own sum of what is alive then:

    forward    the trunk's last forward pass, with autocast's copies of the weights
    head       its log-probs: all activations, a chunk of logits
    backward   the head's backward pass, then that of the last block
    next pass  on CPU, where a micro-batch is many passes: the gradients of the first wait for the
               others', beside those of earlier micro-batches
    end        the first block's backward pass and the embeddings': all gradients
    update     the optimizer
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

from fastpref.config import Config
from fastpref.plan.activation_trace import Trace
from fastpref.plan.head import Head
from fastpref.plan.model_shapes import Shapes
from fastpref.plan.workload import MicroBatch


@dataclass(frozen=True)
class Parts:
    """Bytes of a rank at one moment."""

    weights: int = 0  # sharded ones and what is gathered of them
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0  # of the trunk
    head: int = 0  # what its log-probs and their gradient take
    reference: int = 0
    checkpoint: int = 0  # the copy that is being written, where that is in the same memory

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Memory:
    """What a run keeps, and what its passes take on top."""

    config: Config
    shapes: Shapes
    trace: Trace
    shard: int  # ranks that share one copy of the base
    on_cpu: bool

    @cached_property
    def head(self) -> Head:
        return Head(self.config, self.shapes, self.on_cpu, self.sharded)

    @property
    def offloads(self) -> bool:
        return self.config.parallel.cpu_offload and self.sharded and not self.on_cpu

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
        own = s.base_bytes // self.shard + s.adapter * s.adapter_stored
        if not self.sharded:
            return own + s.largest_linear * s.compute  # of 4 bits, one is unpacked at a time
        blocks = min(2 * s.largest_block, s.in_blocks)  # this one, and the next on its way
        gathered = (
            s.root + (blocks if self.config.parallel.reshard_after_forward else s.in_blocks)
        ) * s.compute
        return (0 if self.offloads else own) + gathered

    @cached_property
    def gradients(self) -> int:
        copies = 2 if self.config.update == "dpo_pg" else 1
        return 0 if self.offloads else copies * self.trained_bytes

    @cached_property
    def optimizer(self) -> int:
        return 0 if self.offloads or self._pages else self.optimizer_bytes

    @property
    def _pages(self) -> bool:
        return self.config.optim.name.startswith("paged")

    @cached_property
    def optimizer_bytes(self) -> int:
        """State of the optimizer, wherever it lies."""
        name = self.config.optim.name
        if name.endswith("8bit"):  # two bytes a weight, two fp32 scales for 256 of them
            trained = self.shapes.adapter or self.shapes.base // self.shard
            return trained * 2 + trained * 8 // 256
        return self.trained_bytes * (1 if name == "rmsprop" else 2)

    @cached_property
    def host_copy(self) -> int:
        """The copy in host memory from which checkpoints are written."""
        wanted = self.config.training.checkpoint_every is not None
        return self.trained_bytes + self.optimizer_bytes if wanted else 0

    def peak(self, batch: MicroBatch, accumulates: bool) -> tuple[str, Parts]:
        """The fullest moment of a micro-batch; accumulates: beside the gradients of others."""
        moments = self.moments(batch, accumulates)
        name = max(moments, key=lambda moment: moments[moment].total)
        return name, moments[name]

    def moments(self, batch: MicroBatch, accumulates: bool) -> dict[str, Parts]:
        """Parts at each of the moments above."""
        last = batch[-1]
        base = replace(
            self._always(batch),
            gradients=self.gradients if accumulates else 0,
            activations=self._kept(batch),
            head=self._head_kept(batch),
        )
        without_last = replace(base, head=self._head_kept(batch[:-1]))
        made = {
            "forward": _plus(without_last, activations=self.trace.forward(last.tokens)),
            "head": _plus(base, head=self.head.forward(last)),
            "head backward": _plus(base, head=self.head.backward(last)),
            "backward": _plus(
                without_last,
                gradients=0 if accumulates else self._head_gradient,
                activations=self.trace.backward(last.tokens) + self._reduced,
            ),
            "end": self._end(batch, base),
            "update": replace(self._always(()), gradients=self.gradients + self._update_copy),
        }
        if len(batch) > 1:
            made["next pass"] = self._next_pass(batch, base)
        return made

    def _next_pass(self, batch: MicroBatch, base: Parts) -> Parts:
        """The second pass that goes backward, the first one's gradients waiting for its own."""
        left = batch[:-1]
        head = max(self.head.backward(left[-1]), self._head_gradient)
        return replace(
            base,
            gradients=base.gradients + self.gradients,
            activations=self._kept(left),
            head=self._head_kept(left) + head,
        )

    def _end(self, batch: MicroBatch, base: Parts) -> Parts:
        """The first block of the pass that comes last, then the embeddings."""
        first = batch[0]
        waiting = base.gradients if len(batch) > 1 else 0
        beside_another = base.gradients > 0 or len(batch) > 1
        own = self._kept((first,)) // self.shapes.blocks
        return replace(
            base,
            gradients=self.gradients + waiting + self._embedding_gradient(beside_another),
            activations=own + round(self.trace.backward(first.tokens)),
            head=0,
        )

    def _always(self, batch: MicroBatch) -> Parts:
        return Parts(
            weights=self.weights,
            optimizer=self.optimizer,
            reference=self._reference(batch),
            checkpoint=self.host_copy if self.on_cpu else 0,
        )

    def _reference(self, batch: MicroBatch) -> int:
        """A second model, and the hidden states and heads that it brings."""
        mode, s = self.config.reference_mode, self.shapes
        if mode not in ("frozen", "adapter"):
            return 0
        states = sum(p.scored for p in batch) * s.width * s.compute
        if s.stored != s.compute:  # its head is cast for each pass
            states += len(batch) * s.head * s.compute
        return states + (self.weights if mode == "frozen" else 0)

    def _kept(self, batch: MicroBatch) -> int:
        return sum(round(self.trace.kept(p.tokens)) for p in batch)

    def _head_kept(self, batch: MicroBatch) -> int:
        return sum(self.head.kept(p) for p in batch)

    @property
    def _head_gradient(self) -> int:
        s = self.shapes
        return s.head * s.stored // self.shard if s.head_is_trained else 0

    @property
    def _reduced(self) -> int:
        """A block's gradients whole, and as they are sent, in fp32."""
        s = self.shapes
        return s.largest_block * (s.compute + 4) if self.sharded and not s.adapter else 0

    def _embedding_gradient(self, beside_another: bool) -> int:
        """That of the embeddings, dense, where it does not become the parameter's own."""
        s = self.shapes
        if s.adapter:
            return 0
        if self.sharded:
            return s.root * (s.compute + 4)
        return s.head * s.stored if beside_another or s.tied else 0

    @property
    def _update_copy(self) -> int:
        """RMSprop takes all roots at once on CUDA."""
        roots = self.config.optim.name == "rmsprop" and not self.on_cpu
        return self.trained_bytes if roots else 0


def _plus(parts: Parts, **more: float) -> Parts:
    return replace(parts, **{name: getattr(parts, name) + round(n) for name, n in more.items()})
