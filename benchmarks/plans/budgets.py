"""Check the automatic memory settings against exhaustive search, on simulated devices.

    python -m benchmarks.plans.budgets --out benchmarks/results/budgets.json    # some minutes

Random mixtures of lengths, models and batch sizes are planned for devices of 24, 40, 80 and 141 GB.
The planner's memory and time decide on both sides; the search sees the real steps of an epoch, the
choice only bounds of them. Every mixture must satisfy two claims: no step of three epochs exceeds
the device, and the mean step is at most 5 % slower than the best of all micro-batches and numbers
of recomputed blocks. The exit code is 1 if one does not.
"""

from __future__ import annotations

import argparse
import sys
import time
from bisect import bisect_left
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.end_to_end.presets import llama
from fastpref import config as configs
from fastpref.plan import flops
from fastpref.plan.budget import token_ladder
from fastpref.plan.devices import Device
from fastpref.plan.predict import Predictor, Setup
from fastpref.plan.workload import GroupLengths, Step, StepBounds, step_bounds, steps_of
from fastpref.utils import environment, result_json

MIXTURES = 200
SLOWER = 1.05
SEARCHED = 16  # sizes of micro-batches between the smallest and the largest
# Peaks and bandwidths of 4090, A100, H100 and H200.
DEVICES = tuple(
    Device(f"{gigabytes} GB", tflops * 1e12, 0.45, gbytes * 1e9, gigabytes * 10**9)
    for gigabytes, tflops, gbytes in (
        (24, 165, 1008),
        (40, 312, 1555),
        (80, 989, 3350),
        (141, 989, 4800),
    )
)


_8B = llama(4096, 14336, 32, (32, 8))
_1B = llama(2048, 8192, 16, (32, 8), tie_word_embeddings=True)
MODELS: dict[str, dict[str, Any]] = {
    "8B, LoRA": {"model": _8B, "adapter": {"name": "lora", "r": 16}},
    "8B, QLoRA": {"model": _8B, "adapter": {"name": "lora", "r": 16, "quantize": "nf4"}},
    "1B, all weights": {"model": _1B, "adapter": None},
}


@dataclass(frozen=True)
class Outcome:
    """One mixture: what was chosen, and what the search found."""

    seed: int
    device: str
    model: str
    groups: int
    batch_size: int
    longest: int
    micro_batch_tokens: int
    recomputed_blocks: int
    fits: bool
    fullest: float  # peak of the fullest real step, as a share of the usable memory
    slower: float  # time of a mean step over that of the best; 1 if nothing fits

    @property
    def holds(self) -> bool:
        return (self.fullest <= 1 or not self.fits) and self.slower <= SLOWER


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mixtures", type=int, default=MIXTURES)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    started = time.time()
    outcomes = []
    traces = Predictor(DEVICES[0], None)
    for seed in range(options.mixtures):
        outcomes.append(outcome(seed, traces))
        if not outcomes[-1].holds:
            print(f"does not hold: {outcomes[-1]}")
    summary = summarize(outcomes)
    print(
        f"{summary['mixtures']} mixtures, {summary['fitting']} fit; the fullest step takes "
        f"{summary['fullest']:.3f} of the usable memory; at most {summary['slower']:.1%} slower "
        "than the best"
    )
    if options.out is not None:
        result = {
            "environment": environment.describe(),
            "seconds": time.time() - started,
            "summary": summary,
            "rows": [asdict(o) for o in outcomes],
        }
        options.out.write_text(result_json.dumps(result))
    sys.exit(not all(o.holds for o in outcomes))


def summarize(outcomes: list[Outcome]) -> dict[str, float]:
    """Numbers of mixtures, and the extremes of those that fit."""
    fitting = [o for o in outcomes if o.fits]
    return {
        "mixtures": len(outcomes),
        "fitting": len(fitting),
        "fullest": max(o.fullest for o in fitting),
        "slower": max(o.slower for o in fitting) - 1,
    }


def outcome(seed: int, traces: Predictor) -> Outcome:
    """Draw a mixture and compare the choice with the search; `traces` are shared."""
    random = np.random.default_rng(seed)
    device = DEVICES[seed % len(DEVICES)]
    name = list(MODELS)[int(random.integers(len(MODELS)))]
    setup = Setup(_config(name, int(random.integers(1, 65))), _mixture(random), 1)
    predict = traces.on(device)
    budget = predict.budget(setup, device.usable)
    batch_size = setup.config.training.batch_size
    bounds = step_bounds(batch_size, setup.layout, setup.lengths, 1)
    epochs = [steps(setup, budget.micro_batch_tokens, k) for k in range(3)]
    fullest = max(_peak(predict, setup, steps, budget.recomputed_blocks) for steps in epochs)
    best = _search(predict, setup, bounds)
    slower = 1.0
    if best is not None:
        seconds = _seconds(predict, setup, epochs[0], budget.recomputed_blocks)
        slower = seconds / best if budget.fits else float("inf")
    return Outcome(
        seed,
        device.name,
        name,
        len(setup.lengths),
        batch_size,
        bounds.longest,
        budget.micro_batch_tokens,
        budget.recomputed_blocks,
        budget.fits,
        fullest / device.usable,
        slower,
    )


def _config(model: str, batch_size: int) -> configs.Config:
    return configs.parse(
        {
            "model": {"init": "random", "config": MODELS[model]["model"]},
            "data": {"train": "nowhere.jsonl"},
            "loss": "dpo",
            "adapter": MODELS[model]["adapter"],
            "training": {"batch_size": batch_size},
        }
    )


def _mixture(random: np.random.Generator) -> GroupLengths:
    """Pairs of one to three kinds, each of log-normal lengths, cut at up to 16,384 tokens."""
    count = int(random.integers(8, 200))
    kinds = random.integers(1, 4)
    shares = random.dirichlet(np.ones(kinds))
    of_group = random.choice(kinds, count, p=shares)
    prompts = np.exp(random.uniform(3, 8, kinds)[of_group] + 0.6 * random.standard_normal(count))
    medians = random.uniform(3.5, 7.5, kinds)[of_group].repeat(2)
    responses = np.exp(medians + random.uniform(0.2, 1) * random.standard_normal(2 * count))
    longest = int(2 ** random.uniform(10, 14))
    prompts = prompts.clip(1, longest - 1).astype(np.int64)
    responses = responses.clip(1).astype(np.int64)
    lengths = GroupLengths("pairwise", prompts, responses, np.arange(count + 1) * 2)
    return lengths.truncate(longest)


def steps(setup: Setup, tokens: int, seed: int) -> list[Step]:
    training = setup.config.training.model_copy(update={"seed": seed})
    return steps_of(training, tokens, setup.layout, setup.lengths, 1, one_by_one=False)


def _peak(predict: Predictor, setup: Setup, steps: list[Step], blocks: int) -> int:
    memory = predict.memory(setup, blocks)
    return max(memory.peak(b, len(step) > 1)[1].total for step in steps for b in step)


def _seconds(predict: Predictor, setup: Setup, steps: list[Step], blocks: int) -> float:
    memory = predict.memory(setup, blocks)
    return float(np.mean([flops.step_seconds(predict.device, memory, step) for step in steps]))


def _search(predict: Predictor, setup: Setup, bounds: StepBounds) -> float | None:
    """Seconds of the fastest settings whose real steps fit; None if none do."""
    blocks = range(predict.memory(setup, 0).shapes.blocks + 1)
    best = None
    evenly = np.linspace(bounds.longest, bounds.tokens, SEARCHED).astype(int).tolist()
    for tokens in sorted({*evenly, *token_ladder(bounds)}):
        real = steps(setup, tokens, 0)

        def fits(count: int, candidate: list[Step] = real) -> bool:
            return _peak(predict, setup, candidate, count) <= predict.device.usable

        first = bisect_left(blocks, True, key=fits)
        if first < len(blocks):
            seconds = _seconds(predict, setup, real, first)
            best = seconds if best is None else min(best, seconds)
    return best


if __name__ == "__main__":
    main()
