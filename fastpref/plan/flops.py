"""FLOPs of a step, and the time they take on a device.

    time = FLOPs / (attainable · peak)
         + (bytes of the weights that the passes read + bytes of the optimizer's update) / bandwidth

and on a GPU at least the time in which the host launches the kernels.

FLOPs are those of GEMMs: the trunk's as counted on it, 4 W for each pair of tokens that attend
(W: width of all heads), 3.5 times as many if there is a backward pass, and the head's passes.
Communication between ranks is not included.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastpref.plan.devices import Device
from fastpref.plan.memory import Memory
from fastpref.plan.workload import Pass, Step

# Kernels of a block's forward and backward pass: benchmarks/results/trunk.json, with LoRA.
LAUNCHES = 68
# Of one kernel, on the host; an estimate, not measured.
LAUNCH_SECONDS = 5e-6


@dataclass(frozen=True)
class Flops:
    """FLOPs of one rank in a step."""

    trunk: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.trunk + self.attention + self.head


def step_flops(memory: Memory, step: Step) -> Flops:
    """Forward and backward, with recomputed blocks and with a reference that runs in each step."""
    passes = [p for batch in step for p in batch]
    trace, shapes = memory.trace, memory.shapes
    forwards = 2 if memory.head.runs_reference else 1
    attention = 4.0 * shapes.attention_width * shapes.blocks * (forwards + memory.recomputed + 2.5)
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


def step_seconds(device: Device, memory: Memory, step: Step) -> float:
    """Time of a step, in which each pass reads all weights and launches all kernels."""
    return seconds_of_passes(device, memory, step_flops(memory, step).total, sum(map(len, step)))


def seconds_of_passes(device: Device, memory: Memory, flops: float, passes: float) -> float:
    """Time of a step of so many FLOPs in so many passes."""
    forwards = 2 if memory.head.runs_reference else 1
    reads = passes * (forwards + 1 + memory.recomputed) * memory.shapes.base_bytes
    busy = seconds(device, flops) + reads / device.bandwidth
    if not device.is_cpu:
        busy = max(busy, passes * memory.shapes.blocks * LAUNCHES * LAUNCH_SECONDS)
    return busy + update_seconds(device, memory)


def update_seconds(device: Device, memory: Memory) -> float:
    """The optimizer reads weights, gradients and state, and writes weights and state."""
    moved = 2 * memory.trained_bytes + memory.gradients + 2 * memory.optimizer_bytes
    return moved / device.bandwidth


def _head_pass(memory: Memory, p: Pass) -> float:
    return 2.0 * p.scored * memory.shapes.head
