"""The first step of a run gives the reference the log-probs that it still needs, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastpref import losses
from fastpref.config import Config
from fastpref.data.dataset import Groups
from fastpref.losses import Objective
from fastpref.model import reference_policy
from fastpref.model.policy import Policy
from fastpref.training import trainer
from fastpref.training.references import gives_reference
from fastpref.training.setup import precompute
from fastpref.utils.progress import Display
from tests.helpers.policies import policy_of
from tests.helpers.training_runs import assert_same, records

MakeConfig = Callable[..., Config]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Groups of each pass of the reference, as they are computed."""
    seen: list[list[int]] = []
    compute, batches = reference_policy._compute, Policy.batches

    def counted(policy: Policy, *arguments: Any) -> None:
        seen.append([])

        def noted(policy: Policy, groups: Groups, indices: list[int]) -> Any:
            seen[-1].extend(indices)
            return batches(policy, groups, indices)

        with monkeypatch.context() as patch:
            patch.setattr(Policy, "batches", noted)
            compute(policy, *arguments)

    monkeypatch.setattr(reference_policy, "_compute", counted)
    return seen


def cache_of(config: Config) -> dict[str, bytes]:
    """Files with reference log-probs, by name."""
    folder = Path(config.data.cache) / "reference"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("change", "left"),
    [
        ({}, 12 - 4),
        ({"adapter": {"name": "lora"}, "training__activation_checkpointing": "full"}, 12 - 4),
        ({"loss": "kto"}, 24 - 4),  # single responses
    ],
    ids=["all weights", "lora", "kto"],
)
def test_a_run_is_the_one_whose_reference_was_computed_before(
    make_config: MakeConfig,
    display: Display,
    tmp_path: Path,
    passes: list[list[int]],
    change: dict[str, Any],
    left: int,
) -> None:
    late = make_config(**change)
    trainer.train(late, display)
    assert len(passes[-1]) == left
    before = make_config(
        **change,
        data__cache=str(tmp_path / "other"),
        training__output_dir=str(tmp_path / "before"),
    )
    precompute(before, display)
    trainer.train(before, display)
    assert records(late)[0].get("rewards/margins", 0.0) == 0.0
    assert_same(tmp_path / "run", tmp_path / "before")
    assert cache_of(late) == cache_of(before)


def test_a_run_that_dies_in_its_first_step_leaves_it_to_the_next(
    make_config: MakeConfig,
    display: Display,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    passes: list[list[int]],
) -> None:
    """One pair of four has gone through the policy; the next run has another order."""

    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(losses, "evaluate", die)
        trainer.train(make_config(training__micro_batch_tokens=64), display)
    (name,) = cache_of(make_config())
    assert name.endswith(".partial")
    run = str(tmp_path / "next")
    again = make_config(training__seed=1, training__output_dir=run)
    trainer.train(again, display)
    assert len(passes[0]) == 8 and set(passes[1]) <= set(range(12)) - set(passes[0])
    whole = make_config(data__cache=str(tmp_path / "other"))
    precompute(whole, display)
    assert cache_of(again) == cache_of(whole)


def test_a_resumed_run_computes_what_is_missing_with_the_model_of_its_start(
    make_config: MakeConfig, display: Display, passes: list[list[int]]
) -> None:
    config = make_config(training__checkpoint_every=1, training__steps=1)
    trainer.train(config, display)
    first = cache_of(config)
    (path,) = (Path(config.data.cache) / "reference").iterdir()
    path.unlink()
    longer = make_config(training__checkpoint_every=1, training__steps=2, resume="auto")
    trainer.train(longer, display)
    assert sorted(passes[-1]) == list(range(12))
    assert cache_of(longer) == first


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"loss": "ti_dpo"}, False),
        ({"model__kernels": "torch"}, False),
        ({"training__batch_invariant": False}, False),
        ({"monitor__band_every": 1}, False),
        ({"calibration": {"name": "rc"}}, False),
    ],
)
def test_only_passes_with_the_same_bits_are_taken(
    make_config: MakeConfig, tokenizer: Any, change: dict[str, Any], expected: bool
) -> None:
    config = make_config(**change)
    policy = policy_of(config, tokenizer)
    policy.batch_invariant = config.training.batch_invariant
    loss: Objective = config.build_loss()
    assert gives_reference(config, policy, loss) is expected
