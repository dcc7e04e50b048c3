"""What leaving small blocks of delta out of `delta @ weight` saves, and what it costs.

    python benchmarks/skipped_blocks.py [--out benchmarks/results/skipped-blocks.json]

The Triton kernels can skip blocks of 128 tokens x 64 words whose entries of `onehot - softmax` are
all below a threshold (`fastpref_kernels.linear_logps.SKIP_BELOW`, off by default). How many there
are depends on how peaked a model's predictions are, so this simulates three: word frequencies after
Zipf, in the order of the vocabulary as a tokenizer has them, plus Gaussian evidence of a given
strength for each token and word; labels are drawn from the predictions. The share of blocks that
stay is the share of the product's time that stays, at best; the error is that of the direction
`d logps / d hidden`, relative in the norm, in fp64. It runs in plain PyTorch on any machine.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref.bench.environment import describe

TOKENS, WIDTH, VOCABULARY = 1024, 64, 32768
BLOCK = (128, 64)
THRESHOLDS = (2.0**-8, 2.0**-10, 2.0**-12, 2.0**-14)


def deltas(evidence: float) -> Tensor:
    """onehot - softmax of simulated predictions, (T, V) fp64."""
    g = torch.Generator().manual_seed(0)
    frequency = -torch.arange(1, VOCABULARY + 1, dtype=torch.float64).log()
    noise = torch.randn(TOKENS, VOCABULARY, generator=g, dtype=torch.float64)
    p = (frequency + evidence * noise).softmax(1)
    labels = p.multinomial(1, generator=g)
    return (-p).scatter_add_(1, labels, torch.ones_like(labels, dtype=p.dtype))


def measure(evidence: float) -> list[dict[str, Any]]:
    delta = deltas(evidence)
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(VOCABULARY, WIDTH, generator=g, dtype=torch.float64)
    direction = delta @ weight
    largest = delta.abs().view(TOKENS // BLOCK[0], BLOCK[0], VOCABULARY // BLOCK[1], BLOCK[1])
    largest = largest.amax((1, 3))
    points = []
    for threshold in THRESHOLDS:
        keep = (largest >= threshold).double().repeat_interleave(BLOCK[0], 0)
        walked = (delta * keep.repeat_interleave(BLOCK[1], 1)) @ weight
        points.append(
            {
                "evidence": evidence,
                "top_probability": round(float(-delta.clamp(max=0).amin(1).mean()), 3),
                "threshold": threshold,
                "active_share": round(float(keep.mean()), 4),
                "relative_error": float(f"{(walked - direction).norm() / direction.norm():.3g}"),
            }
        )
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("skipped-blocks.json"))
    arguments = parser.parse_args()
    points = [point for evidence in (2.0, 6.0, 12.0) for point in measure(evidence)]
    for point in points:
        print(*(f"{name} {value:<9.5g}" for name, value in point.items()))
    settings = {"tokens": TOKENS, "width": WIDTH, "vocabulary": VOCABULARY, "block": BLOCK}
    report = {"benchmark": "skipped-blocks", **describe(), "settings": settings, "points": points}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
