"""Memory and passes of a head and its gradient; see `ops/chunked.py`, docs/kernels.md."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from fastpref.ops import chunked, cpu
from fastpref.plan.model_shapes import Shapes
from fastpref.plan.workload import Pass

# Copied from the Triton kernels, which cannot be imported where triton is not installed.
TRITON_CACHE_BYTES = 2 << 30
TRITON_KL_CHUNK_BYTES = 1 << 30


@dataclass(frozen=True)
class Head:
    """Head of a language model: bytes, and passes of 2 T D V FLOPs for T scored tokens."""

    shapes: Shapes
    on_cpu: bool
    sharded: bool
    log_every: int  # steps from one pass for the entropy to the next
    pair_scores: bool  # of each pair, in every step
    score_rows: int  # of the sketches of the batch's scores; 0 for none
    runs_reference: bool  # in every step, rather than from the cache
    full_kl: bool  # the objective compares whole distributions

    def saved(self, p: Pass) -> int:
        """Bytes from its forward to its backward pass."""
        s = self.shapes
        if not s.head_is_trained:
            return self._states(p)  # dlogp_dhidden
        cast = s.head * s.compute if self._casts else 0
        return 2 * self._states(p) + cast + (self._dlogits(p) if self._caches_dlogits(p) else 0)

    def forward(self, p: Pass) -> int:
        """Bytes during its forward pass beyond `saved`: hidden states and a chunk of logits.

        An entropy or score norms need the logits once more.
        """
        s = self.shapes
        sketches = 2 * 2 * 4 * self.score_rows * s.width  # of the step, and of this pass
        chunk = max(self._chunk(p), self._kl_chunk(p) if self.full_kl else 0)
        return p.tokens * s.width * s.compute + self._states(p) + chunk + sketches

    def backward(self, p: Pass) -> int:
        """Bytes during its backward pass beyond `saved`."""
        s = self.shapes
        # Gradients of all hidden states, and of the scored ones.
        states = p.tokens * s.width * s.compute + self._states(p)
        if not s.head_is_trained:
            return states
        work = self._states(p) if self._caches_dlogits(p) else self._chunk(p)
        wide = s.head * s.stored if self._casts else 0
        return s.head * s.compute + max(work, states, wide)

    def passes(self, p: Pass) -> float:
        """Passes of a step over the head, including those of entropy and divergence."""
        trained = self.shapes.head_is_trained
        count = 2.0 + 1 / self.log_every
        if trained:
            count += 1 if self._caches_dlogits(p) else 2
        if self.pair_scores:
            count += 2
        count += self.score_rows / self.shapes.head_rows
        if self.runs_reference:
            count += 1
        if self.full_kl:
            count += 6 if trained else 3
        return count

    @property
    def _casts(self) -> bool:
        """Whether a forward pass casts the weight; FSDP casts it when it gathers."""
        s = self.shapes
        return s.stored != s.compute and not self.sharded

    def _states(self, p: Pass) -> int:
        """Hidden states of the scored tokens."""
        return p.scored * self.shapes.width * self.shapes.compute

    def _dlogits(self, p: Pass) -> int:
        """Logits of all scored tokens, or their gradients."""
        size = max(4, self.shapes.compute) if self.on_cpu else self.shapes.compute
        return p.scored * self.shapes.head_rows * size

    def _kl_chunk(self, p: Pass) -> int:
        """Logits of both models in fp32, and the gradient of the policy's."""
        if self.on_cpu:
            return self._chunk(p)
        size = p.scored * self.shapes.head_rows * (2 * 4 + self.shapes.compute)
        return min(TRITON_KL_CHUNK_BYTES, size)

    def _chunk(self, p: Pass) -> int:
        return min(chunked.CHUNK_BYTES, self._dlogits(p))

    @property
    def most_cached(self) -> int:
        """Scored tokens of a pass on a GPU up to which gradients of logits are cached."""
        return TRITON_CACHE_BYTES // (self.shapes.head_rows * self.shapes.compute)

    def _caches_dlogits(self, p: Pass) -> bool:
        if not self.on_cpu:
            return self._dlogits(p) <= TRITON_CACHE_BYTES
        budget = min(cpu.CACHE_BYTES, cpu.CACHE_CHUNKS * chunked.CHUNK_BYTES)
        return self.shapes.compute == 4 and p.batch_passes * self._dlogits(p) <= budget


@dataclass(frozen=True)
class RewardHead:
    """Head of a reward model, which reads one hidden state of a response and has one row.

    The scored tokens of its passes are the last ones of their responses. The head computes in fp32.
    """

    shapes: Shapes
    runs_reference: bool = False

    def saved(self, p: Pass) -> int:
        """Bytes from its forward to its backward pass: hidden states, cast to fp32."""
        return self._states(p)

    def forward(self, p: Pass) -> int:
        """Bytes during its forward pass beyond `saved`: hidden states."""
        return p.tokens * self.shapes.width * self.shapes.compute + self._states(p)

    def backward(self, p: Pass) -> int:
        """Bytes during its backward pass beyond `saved`: gradients of all hidden states."""
        return self.forward(p) + self.shapes.head * self.shapes.stored

    def passes(self, p: Pass) -> float:
        """Passes of a step over the head, forward and backward."""
        return 3.0

    @property
    def most_cached(self) -> int:
        """No bound: nothing is computed again."""
        return sys.maxsize

    def _states(self, p: Pass) -> int:
        return p.scored * self.shapes.width * max(4, self.shapes.compute)
