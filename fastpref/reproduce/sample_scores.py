"""Scores of a trained model's samples on held-out prompts.

For generated data only, whose utilities are known. `samples/win_rate`: share of wins of the samples
over all responses of the data; the better recipe wins, and a text that is no recipe loses.
`samples/malformed`: share of samples that are no recipe. `samples/tokens`: their mean length.
"""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path
from statistics import fmean

from rich.console import Console

from fastpref.data.prompts import read_prompts
from fastpref.data.synthetic import graded
from fastpref.evaluation.sample import Sampler
from fastpref.model.generate import Sampling
from fastpref.utils.progress import Display

WIN_RATE, MALFORMED, TOKENS = (f"samples/{name}" for name in ("win_rate", "malformed", "tokens"))
_SAMPLING = Sampling(n=2, max_new_tokens=56, batch_size=128, engine="transformers")
_OPPONENTS = 200  # groups


def score_samples(model: Path, held_out: str, seed: int) -> dict[str, float]:
    """Score an exported model on the prompts of a held-out file; seed: of the generated data."""
    sampler = Sampler(str(model))
    prompts = read_prompts(held_out, sampler.tokenizer, duplicates=False)
    samples = sampler.draw(prompts, _SAMPLING, Display(Console(quiet=True)))
    qualities = [graded.quality(sample.text, seed) for sample in samples]
    opponents = sorted(
        quality
        for row in graded.groups(_OPPONENTS, seed)
        for text in row["completions"]
        if (quality := graded.quality(text, seed)) is not None
    )
    wins = [0 if q is None else bisect_left(opponents, q) / len(opponents) for q in qualities]
    return {
        WIN_RATE: fmean(wins),
        MALFORMED: fmean(q is None for q in qualities),
        TOKENS: fmean(len(sample.ids) for sample in samples),
    }
