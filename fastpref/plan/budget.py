"""Choice of the micro-batch and of the recomputed blocks from the memory of a device.

The fastest pair whose fullest possible step fits. Memory grows with both in one direction, so for
each size of a micro-batch the fewest recomputed blocks that fit are found by bisection. The choice
depends on bounds of the steps (`workload.StepBounds`) and not on the order of the data, so it holds
in every epoch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fastpref.plan import flops
from fastpref.plan.devices import Device
from fastpref.plan.memory import Memory
from fastpref.plan.workload import MicroBatch, Pass, StepBounds

# Of objectives in which the loss of a pair depends on the others of its micro-batch.
BATCHWISE_TOKENS = 16384


@dataclass(frozen=True)
class Budget:
    """Memory settings of a run.

    bytes: predicted peak of the fullest step that is possible, 0 if not predicted; fits: whether
    the device has as many.
    """

    micro_batch_tokens: int
    recomputed_blocks: int
    bytes: int = 0
    fits: bool = True


def choose(
    device: Device,
    usable: int,
    bounds: StepBounds,
    memory_of: Callable[[int], Memory],
    token_choices: Sequence[int],
    block_choices: Sequence[int],
    one_by_one: bool,
) -> Budget:
    """Return the fastest budget that fits `usable` bytes, or the smallest one if none does.

    memory_of: memory of a run that recomputes so many blocks.
    token_choices, block_choices: ascending.
    one_by_one: each group has its own forward pass.
    """

    def peak(tokens: int, blocks: int) -> int:
        batches = fullest_batches(bounds, tokens, one_by_one, memory_of(blocks))
        accumulates = tokens < bounds.tokens
        return max(memory_of(blocks).peak(b, accumulates)[1].total for b in batches)

    fastest, seconds = None, float("inf")
    for tokens in token_choices:
        # From the second choice on, more blocks need less memory. One recomputed block can need
        # more than none: its activations come back while those of the others are still alive.
        index = 0
        if peak(tokens, block_choices[0]) > usable:
            index = bisect_left(block_choices, True, 1, key=lambda n: peak(tokens, n) <= usable)
        if index == len(block_choices):
            continue
        blocks = block_choices[index]
        # A step's last micro-batch is half full on average.
        passes = max(1.0, bounds.mean.tokens / tokens + 0.5)
        one = Pass(*(max(1, round(value / passes)) for value in bounds.mean[:3]))
        work = passes * flops.step_flops(memory_of(blocks), [(one,)]).total
        predicted = flops.seconds_of_passes(device, memory_of(blocks), work, passes)
        if predicted < seconds:
            fastest, seconds = Budget(tokens, blocks, peak(tokens, blocks)), predicted
    if fastest is not None:
        return fastest
    tokens, blocks = token_choices[0], block_choices[-1]
    return Budget(tokens, blocks, peak(tokens, blocks), fits=False)


def token_ladder(bounds: StepBounds) -> list[int]:
    """Sizes of micro-batches to choose from: the longest group to a whole step.

    Powers of two and the numbers halfway between them, so that a little more or less free memory
    rarely changes the choice.
    """
    rungs = [bounds.longest]
    for rung in _rungs():
        if rungs[-1] >= bounds.tokens:
            return rungs
        if rung > bounds.longest:
            rungs.append(rung)
    raise AssertionError("unreachable")


def _rungs() -> Iterator[int]:
    rung = 2
    while True:
        yield rung
        yield rung * 3 // 2
        rung *= 2


def fullest_batches(
    bounds: StepBounds, tokens: int, one_by_one: bool, memory: Memory
) -> list[MicroBatch]:
    """Micro-batches of at most `tokens` of which one takes at least as much memory as any other."""
    most = min(tokens, bounds.tokens)
    if one_by_one:
        counts = {1, 2, min(bounds.groups, max(1, most // bounds.shortest))}
        sizes = {count: min(bounds.longest, most // count) for count in counts}
        return [
            (Pass(size, _scored(bounds, size), 0, count),) * count
            for count, size in sizes.items()
            if size
        ]
    # The head caches gradients of logits up to a limit, so fewer scored tokens can take more.
    scored = {_scored(bounds, most), min(_scored(bounds, most), memory.head.most_cached)}
    return [(Pass(most, count, 0),) for count in scored]


def _scored(bounds: StepBounds, tokens: int) -> int:
    return max(1, int(bounds.scored_share * tokens))
