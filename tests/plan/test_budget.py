"""The automatic memory settings against exhaustive search, and their bounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.plans import budgets
from fastpref import config as configs
from fastpref.config import Config
from fastpref.plan.budget import BATCHWISE_TOKENS, token_ladder
from fastpref.plan.devices import Device
from fastpref.plan.predict import Predictor, Setup
from fastpref.plan.workload import GroupLengths, step_bounds

TINY = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def device(mebibytes: float) -> Device:
    """A device of which a run can use so many MiB."""
    return Device("small", 1e13, 0.5, 1e12, int(mebibytes * 2**20 / 0.95) + 2**30)


def config(**training: Any) -> Config:
    values = {"batch_size": 8, **training}
    return configs.parse(
        {
            "model": {"init": "random", "config": TINY},
            "data": {"train": "nowhere.jsonl"},
            "loss": values.pop("loss", "dpo"),
            "training": values,
        }
    )


@pytest.fixture(scope="module")
def traces() -> Predictor:
    return Predictor(device(1), None)


LENGTHS = GroupLengths.uniform("pairwise", 32, 100, (200, 300))


def budget(traces: Predictor, mebibytes: float, **training: Any) -> Any:
    predict = traces.on(device(mebibytes))
    return predict.budget(Setup(config(**training), LENGTHS, 1), predict.device.usable)


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_against_exhaustive_search(
    monkeypatch: pytest.MonkeyPatch, traces: Predictor, seed: int
) -> None:
    """No step of three epochs exceeds the device, and none of all settings is 5 % faster."""
    monkeypatch.setattr(budgets, "MODELS", {"tiny": {"model": TINY, "adapter": None}})
    sizes = tuple(device(2.0**k) for k in (4, 5, 6, 7))
    monkeypatch.setattr(budgets, "DEVICES", sizes)
    outcome = budgets.outcome(seed, traces)
    assert outcome.holds, outcome


def test_a_choice_that_ignores_memory_does_not_hold(
    monkeypatch: pytest.MonkeyPatch, traces: Predictor
) -> None:
    """The check can fail: with twice the memory in the choice, a step exceeds the device."""
    monkeypatch.setattr(budgets, "MODELS", {"tiny": {"model": TINY, "adapter": None}})
    monkeypatch.setattr(budgets, "DEVICES", (device(32),))
    choose = Predictor.budget
    monkeypatch.setattr(
        Predictor, "budget", lambda self, setup, usable: choose(self, setup, 2 * usable)
    )
    outcomes = [budgets.outcome(seed, traces) for seed in range(6)]
    assert not all(outcome.holds for outcome in outcomes)


def test_less_memory_recomputes_more(traces: Predictor) -> None:
    chosen = [budget(traces, size, micro_batch_tokens=600) for size in (16, 11, 10, 9, 1)]
    counts = [b.recomputed_blocks for b in chosen]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 6
    assert any(0 < count < 6 for count in counts)
    assert [b.fits for b in chosen] == [True] * 4 + [False]


def test_settings_that_are_not_automatic_stay(traces: Predictor) -> None:
    fixed = budget(traces, 1, micro_batch_tokens=1234, activation_checkpointing="off")
    assert (fixed.micro_batch_tokens, fixed.recomputed_blocks) == (1234, 0)
    assert budget(traces, 64, activation_checkpointing="selective").recomputed_blocks == 3
    assert budget(traces, 64, activation_checkpointing=5).recomputed_blocks == 5
    assert budget(traces, 64, micro_batch_tokens=700).micro_batch_tokens == 700


def test_objectives_that_depend_on_the_batch_have_a_fixed_one(traces: Predictor) -> None:
    """Otherwise the free memory would choose the objective."""
    assert budget(traces, 1, loss="beta_dpo").micro_batch_tokens == BATCHWISE_TOKENS
    assert budget(traces, 64, loss="beta_dpo").micro_batch_tokens == BATCHWISE_TOKENS


def test_a_cpu_computes_group_by_group() -> None:
    """More groups a micro-batch would only take more memory."""
    cpu = Device("cpu", 1e11, 0.5, 1e10, 2**32)
    chosen = Predictor(cpu, None).budget(Setup(config(), LENGTHS, 1), 2**32)
    assert (chosen.micro_batch_tokens, chosen.recomputed_blocks) == (600, 0)


def test_the_ladder_ends_with_a_whole_step() -> None:
    bounds = step_bounds(8, "prefix_shared", LENGTHS, 1)
    assert (bounds.longest, bounds.tokens, bounds.groups) == (600, 4800, 8)
    assert token_ladder(bounds) == [600, 768, 1024, 1536, 2048, 3072, 4096, 6144]
    assert token_ladder(bounds._replace(tokens=600)) == [600]


@pytest.mark.parametrize("layout", ["prefix_shared", "packed", "padded"])
def test_bounds_hold_for_every_step(layout: Any) -> None:
    random = np.random.default_rng(0)
    prompts, responses = random.integers(1, 99, 40), random.integers(1, 99, 80)
    lengths = GroupLengths("pairwise", prompts, responses, np.arange(41) * 2)
    bounds = step_bounds(8, layout, lengths, 1)
    for seed in range(3):
        setup = replace(Setup(config(seed=seed), lengths, 1), chosen_layout=layout)
        for step in budgets.steps(setup, 10_000, seed):
            assert sum(p.tokens for batch in step for p in batch) <= bounds.tokens
            for p in (p for batch in step for p in batch):
                assert p.scored <= bounds.scored_share * p.tokens + 1e-9
