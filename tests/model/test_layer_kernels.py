"""Choice of the code that computes the layers, and the fall back to transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fastpref.config import Config
from fastpref.model.policy import Policy
from fastpref.trunk import norm
from fastpref.utils.errors import ModelError
from fastpref.utils.progress import Display
from tests.helpers.data import LLAMA
from tests.helpers.policies import policy_of
from tests.helpers.training_runs import records, run

MakeConfig = Callable[..., Config]


def random_model(**values: Any) -> dict[str, Any]:
    return {"init": "random", "config": {**LLAMA, **values}, "dtype": "float32"}


def test_auto_is_fused_where_every_part_is_known(
    make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    policy = policy_of(make_config(), tokenizer)
    assert policy.kernels == "fused" and policy.trunk is not None and not policy.not_fused


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": random_model(model_type="granite")}, "layers of type GraniteDecoderLayer"),
        ({"model__attn_implementation": "eager"}, "model.attn_implementation is eager"),
        ({"training__compile": True}, "training.compile compiles the layers of transformers"),
        ({"adapter": {"name": "lora", "dropout": 0.1}}, "dropout before its adapter"),
        ({"adapter": {"name": "lora", "dora": True}}, "DoRA"),
    ],
)
def test_auto_falls_back_with_a_reason_and_fused_by_name_is_refused(
    make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast, change: Any, reason: str
) -> None:
    config = make_config(**change)
    policy = policy_of(config, tokenizer)
    assert policy.kernels == "torch" and policy.trunk is None and reason in policy.not_fused
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"kernels": "fused"})}
    )
    with pytest.raises(ModelError, match=r"model\.kernels: fused: .*; use auto or torch") as error:
        policy_of(config, tokenizer)
    assert reason in str(error.value)


def test_blocks_that_differ_from_transformers_are_not_used(
    make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the blocks, here norms 1 % too large, shows at the start."""
    right = norm.rms_norm

    def wrong(*arguments: Any) -> torch.Tensor:
        return 1.01 * right(*arguments)

    monkeypatch.setattr("fastpref.trunk.layer.rms_norm", wrong)
    policy = policy_of(make_config(), tokenizer)
    assert policy.kernels == "torch" and policy.trunk is None
    assert policy.not_fused.startswith("its layers differ from transformers' by ")


@pytest.mark.parametrize("adapter", [None, {"name": "lora", "r": 4}])
def test_runs_are_those_of_transformers_layers(
    make_config: MakeConfig, display: Display, tmp_path: Any, adapter: Any
) -> None:
    lines = {}
    for kernels in ("fused", "torch"):
        config = make_config(
            model__kernels=kernels, adapter=adapter, optim__eps=1e-4, training__steps=6,
            training__output_dir=str(tmp_path / kernels),
        )  # fmt: skip
        trainer = run(config, display)
        assert trainer.policy.kernels == kernels
        lines[kernels] = records(config)
    assert lines["fused"][0]["rewards/margins"] == 0.0
    for ours, plain in zip(lines["fused"], lines["torch"], strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)


def test_a_frozen_copy_takes_the_layers_of_the_policy() -> None:
    """`use_transformers` is what `training.setup` calls on it."""
    policy = Policy.__new__(Policy)
    torch.nn.Module.__init__(policy)
    policy.use_transformers("a reason")
    assert (policy.trunk, policy.kernels, policy.not_fused) == (None, "torch", "a reason")
