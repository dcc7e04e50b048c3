"""Reference log-probs are exact, cached by content, and computed only once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.config import Config, ConfigError
from fastpref.model import reference_policy as module
from fastpref.model.policy import Policy
from fastpref.training.setup import TrainingSetup, precompute, prepare
from fastpref.utils.progress import Display
from tests.helpers.data import rows, write_jsonl


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every time that reference log-probs are computed."""
    calls: list[int] = []
    original = module._compute

    def counting(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(module, "_compute", counting)
    return calls


@pytest.fixture
def ready(
    make_config: Callable[..., Config], display: Display, computed: list[int]
) -> Callable[..., TrainingSetup]:
    return lambda **overrides: prepare(make_config(**overrides), display)


def logps_of(prepared: TrainingSetup) -> torch.Tensor:
    reference = prepared.train.reference
    assert isinstance(reference, module.CachedReference)
    return reference.logps


def test_runs_with_other_settings_share_it(
    ready: Callable[..., TrainingSetup], computed: list[int]
) -> None:
    first = logps_of(ready())
    for other in (
        {"optim__lr": 0.5},
        {"loss": "ipo"},
        {"training__batch_size": 3, "training__seed": 9},
        {"data__soft_labels": False},
        {"training__activation_checkpointing": "full"},
    ):
        assert torch.equal(logps_of(ready(**other)), first)
    assert len(computed) == 1


def test_adapters_of_other_seeds_share_it(
    ready: Callable[..., TrainingSetup], computed: list[int]
) -> None:
    """The output of a new adapter is zero for every seed."""
    adapter = {"name": "lora", "r": 2}
    first = logps_of(ready(adapter=adapter, training__seed=0))
    assert torch.equal(logps_of(ready(adapter=adapter, training__seed=1)), first)
    assert len(computed) == 1


def test_other_weights_tokens_or_arithmetic_do_not(
    ready: Callable[..., TrainingSetup], computed: list[int], tmp_path: Any
) -> None:
    base = logps_of(ready())
    values = {"model_type": "llama", "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 1}
    values |= {"num_attention_heads": 4, "intermediate_size": 32}
    random = {"init": "random", "config": values, "dtype": "float32"}
    ready(model=random)
    ready(model=random, training__seed=1)
    ready(data__max_length=12)
    ready(model__attn_implementation="eager")
    ready(model__kernels="torch")
    other = write_jsonl(tmp_path / "other.jsonl", rows(25)[1:])
    ready(data__train=str(other))
    assert len(computed) == 7
    assert torch.equal(logps_of(ready()), base)
    assert len(computed) == 7


def test_a_crash_while_computing_leaves_nothing(
    ready: Callable[..., TrainingSetup], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "save_file", fail)
        ready()
    assert list((tmp_path / "cache" / "reference").iterdir()) == []
    ready()


def test_log_probs_that_come_with_the_data_are_used(
    ready: Callable[..., TrainingSetup], computed: list[int], tmp_path: Any
) -> None:
    records = [{**r, "ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0} for r in rows(9)]
    path = write_jsonl(tmp_path / "with_logps.jsonl", records)
    logps = logps_of(ready(data__train=str(path)))
    assert logps.tolist() == [-3.0, -4.0] * 9
    assert computed == []


def test_objectives_without_a_reference_compute_none(
    ready: Callable[..., TrainingSetup], computed: list[int]
) -> None:
    assert ready(loss="simpo").train.reference is module.no_reference
    assert computed == []


def test_a_frozen_copy_gives_the_same_log_probs(ready: Callable[..., TrainingSetup]) -> None:
    """Bit-identical in the same forward pass, equal up to rounding in another one."""
    from fastpref.data.collate import collate

    cached, frozen = ready(), ready(reference="frozen")
    dataset = cached.train.groups
    batch = collate([dataset[i] for i in range(5)])
    first, second = (run.train.reference(batch).logps for run in (cached, frozen))
    assert first is not None and second is not None
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)
    with torch.no_grad():
        now = frozen.policy(batch).logps
    assert torch.equal(second, now)


@pytest.mark.parametrize("change", [{}, {"loss": "ti_dpo"}])
def test_a_stopped_computation_goes_on_where_it_was(
    make_config: Callable[..., Config],
    display: Display,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    change: dict[str, Any],
) -> None:
    whole = logps_of(prepare(make_config(**change, data__cache=str(tmp_path / "other")), display))
    seen: list[int] = []
    original = Policy.batches

    def counting(policy: Policy, groups: Any, indices: list[int]) -> Any:
        seen.extend(indices)
        if len(seen) > 8:
            raise KeyboardInterrupt
        return original(policy, groups, indices)

    monkeypatch.setattr(Policy, "batches", counting)
    with pytest.raises(KeyboardInterrupt):
        prepare(make_config(**change), display)
    seen.clear()
    assert torch.equal(logps_of(prepare(make_config(**change), display)), whole)
    assert len(seen) == 4, "of 12 pairs, two steps of 4 were saved"
    files = [path.suffix for path in (tmp_path / "cache" / "reference").iterdir()]
    assert files == [".safetensors"]


def test_precomputing_is_all_that_a_run_needs(
    make_config: Callable[..., Config], display: Display, computed: list[int], tmp_path: Path
) -> None:
    precompute(make_config(), display)
    assert len(computed) == 1 and not (tmp_path / "run").exists()
    prepare(make_config(optim__lr=0.5), display)
    assert len(computed) == 1
    with pytest.raises(ConfigError, match="reference: none keeps no log-probs"):
        precompute(make_config(loss="simpo"), display)
