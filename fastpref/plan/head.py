"""What the head's log-probs and their gradient take; see `ops/chunked.py` and docs/kernels.md."""

from __future__ import annotations

from dataclasses import dataclass

from fastpref.config import Config
from fastpref.ops import chunked, cpu
from fastpref.plan.model_shapes import Shapes
from fastpref.plan.workload import Pass

# Of the Triton kernels, which cannot be imported where there is no triton.
TRITON_CACHE_BYTES = 2 << 30


@dataclass(frozen=True)
class Head:
    """Bytes and passes over the head, one pass being 2 T D V FLOPs for T scored tokens."""

    config: Config
    shapes: Shapes
    on_cpu: bool
    sharded: bool

    def kept(self, p: Pass) -> int:
        """Bytes from its forward to its backward pass."""
        s = self.shapes
        if not s.head_is_trained:
            return self._states(p)  # the direction
        cast = s.head * s.compute if self._casts else 0
        return 2 * self._states(p) + cast + (self._deltas(p) if self._keeps_deltas(p) else 0)

    def forward(self, p: Pass) -> int:
        """Bytes while it runs beyond what it keeps: hidden states, and logits, which an entropy
        or score norms need once more."""
        return p.tokens * self.shapes.width * self.shapes.compute + self._states(p) + self._chunk(p)

    def backward(self, p: Pass) -> int:
        """Bytes while its backward pass runs beyond what it kept."""
        s = self.shapes
        states = p.tokens * s.width * s.compute + self._states(p)  # gradients of all, of the scored
        if not s.head_is_trained:
            return states
        work = self._states(p) if self._keeps_deltas(p) else self._chunk(p)
        wide = s.head * s.stored if self._casts else 0
        return s.head * s.compute + max(work, states, wide)

    def passes(self, p: Pass) -> float:
        """Passes of a step over the head, the entropy's and the divergence's included."""
        config, trained = self.config, self.shapes.head_is_trained
        count = 2.0 + 1 / config.training.log_every
        if trained:
            count += 1 if self._keeps_deltas(p) else 2
        if config.calibration is not None:
            count += 2
        if config.reference_mode in ("frozen", "adapter"):
            count += 1
        if "kl" in getattr(config.build_loss(), "columns", ()):
            count += 6 if trained else 3
        return count

    @property
    def _casts(self) -> bool:
        """Whether the weight is kept in more than it is computed in; FSDP casts what it gathers."""
        s = self.shapes
        return s.stored != s.compute and not self.sharded

    def _states(self, p: Pass) -> int:
        """Hidden states of the scored tokens."""
        return p.scored * self.shapes.width * self.shapes.compute

    def _deltas(self, p: Pass) -> int:
        """Logits of all scored tokens, or what becomes of them."""
        size = max(4, self.shapes.compute) if self.on_cpu else self.shapes.compute
        return p.scored * self.shapes.vocabulary * size

    def _chunk(self, p: Pass) -> int:
        return min(chunked.CHUNK_BYTES, self._deltas(p))

    def _keeps_deltas(self, p: Pass) -> bool:
        if not self.on_cpu:
            return self._deltas(p) <= TRITON_CACHE_BYTES
        budget = min(cpu.CACHE_BYTES, cpu.CACHE_CHUNKS * chunked.CHUNK_BYTES)
        return self.shapes.compute == 4 and p.beside * self._deltas(p) <= budget
