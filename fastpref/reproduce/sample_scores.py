"""Scores of a trained model's samples on held-out prompts, a value for each sample.

For generated data only, whose utilities are known. `samples/win`: share of the responses of the
data that a sample wins against; the better recipe wins, and a text that is no recipe loses.
`samples/malformed`: 1 if it is no recipe. `samples/tokens`: its length. `samples/entropy`: its
negative log-prob by token, nats, whose mean estimates the entropy of the tokens. `samples/cluster`:
the prompt.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from pathlib import Path

from rich.console import Console

from fastpref.data.prompts import read_prompts
from fastpref.data.synthetic import graded
from fastpref.evaluation.sample import Sampler
from fastpref.model.generate import Sampling
from fastpref.reproduce.claims import EXAMPLES
from fastpref.utils.progress import Display

WIN, MALFORMED, TOKENS, ENTROPY, CLUSTER = (
    f"samples/{name}" for name in ("win", "malformed", "tokens", "entropy", "cluster")
)
_OPPONENTS = 200  # groups
QUICK_SAMPLES = 80  # where samples only show that the machinery works


def score_samples(
    model: Path, held_out: Path, seed: int, count: int = EXAMPLES
) -> dict[str, list[float]]:
    """Score at least `count` samples on held-out prompts; seed: of the generated data."""
    sampler = Sampler(str(model))
    prompts = read_prompts(str(held_out), sampler.tokenizer, duplicates=False)
    n = math.ceil(count / len(prompts))
    sampling = Sampling(n=n, max_new_tokens=56, batch_size=128, engine="transformers")
    samples = sampler.draw(prompts, sampling, Display(Console(quiet=True)))
    qualities = [graded.quality(sample.text, seed) for sample in samples]
    opponents = sorted(
        quality
        for row in graded.groups(_OPPONENTS, seed)
        for text in row["completions"]
        if (quality := graded.quality(text, seed)) is not None
    )
    wins = [0 if q is None else bisect_left(opponents, q) / len(opponents) for q in qualities]
    return {
        WIN: wins,
        MALFORMED: [float(q is None) for q in qualities],
        TOKENS: [float(len(sample.ids)) for sample in samples],
        ENTROPY: [float(f"{-sample.logps / len(sample.ids):.5g}") for sample in samples],
        CLUSTER: [float(k // n) for k in range(len(samples))],
    }
