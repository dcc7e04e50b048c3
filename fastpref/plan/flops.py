"""FLOPs of a step, and the time they take on a device.

    time = FLOPs / (attainable · peak) + bytes of the optimizer's update / bandwidth

FLOPs are those of GEMMs: the trunk's as counted on it, 4 W for each pair of tokens that attend
(W: width of all heads), 3.5 times as many if there is a backward pass, and the head's passes.
Communication between ranks is not included.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastpref.plan.devices import Device
from fastpref.plan.memory import Memory
from fastpref.plan.workload import Pass, Step


@dataclass(frozen=True)
class Flops:
    """FLOPs of one rank in a step."""

    trunk: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.trunk + self.attention + self.head


def step_flops(memory: Memory, step: Step, checkpointing: str) -> Flops:
    """Forward and backward, with recomputed blocks and with a reference that runs in each step.

    checkpointing: `training.activation_checkpointing`.
    """
    passes = [p for batch in step for p in batch]
    trace, shapes = memory.trace, memory.shapes
    forwards = 2 if memory.head.runs_reference else 1
    recomputed = {"full": 1.0, "selective": 0.5, "off": 0.0}[checkpointing]
    attention = 4.0 * shapes.attention_width * shapes.blocks * (forwards + recomputed + 2.5)
    return Flops(
        sum(
            forwards * trace.forward_flops(p.tokens) + trace.backward_flops(p.tokens)
            for p in passes
        ),
        sum(attention * p.attended for p in passes),
        sum(memory.head.passes(p) * _head_pass(memory, p) for p in passes),
    )


def reference_flops(memory: Memory, step: Step) -> float:
    """FLOPs of the forward passes that compute a cached reference once."""
    passes = [p for batch in step for p in batch]
    attention = 4.0 * memory.shapes.attention_width * memory.shapes.blocks
    return sum(
        memory.trace.forward_flops(p.tokens) + attention * p.attended + _head_pass(memory, p)
        for p in passes
    )


def seconds(device: Device, flops: float) -> float:
    return flops / (device.attainable * device.flops)


def update_seconds(device: Device, memory: Memory) -> float:
    """The optimizer reads weights, gradients and state, and writes weights and state."""
    moved = 2 * memory.trained_bytes + memory.gradients + 2 * memory.optimizer_bytes
    return moved / device.bandwidth


def _head_pass(memory: Memory, p: Pass) -> float:
    return 2.0 * p.scored * memory.shapes.head
