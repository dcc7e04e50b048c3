"""Caps of the logits are read under any name, and an unknown one is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref.model import head_check
from fastpref.model.policy import Policy
from fastpref.utils.errors import ModelError

LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "cap"),
    [
        ({"final_logit_softcapping": 30.0}, 30.0),
        ({"logits_soft_cap": 20.0}, 20.0),
        ({"output_logit_soft_cap": 15}, 15.0),
        ({"final_logit_softcapping": None}, None),
        ({"attn_logit_softcapping": 50.0, "router_logits_soft_cap": 5.0}, None),
        ({"gate_soft_cap": 15.0, "use_logit_cap": True}, None),
    ],
)
def test_names_of_the_cap(entries: dict[str, Any], cap: float | None) -> None:
    config = SimpleNamespace(model_type="other", **entries)
    config.get_text_config = lambda: config
    assert head_check.head_options(config) == (1.0, cap)


@pytest.mark.parametrize(
    ("kind", "entries", "scale"),
    [
        ("cohere2", {"logit_scale": 0.25}, 0.25),
        ("granitemoe", {"logits_scaling": 4.0}, 0.25),
        ("minicpm3", {"logits_scaling": 16.0}, 0.0625),
        ("hyperclovax", {"logits_scaling": 0.125}, 0.125),
        ("falcon_h1", {"lm_head_multiplier": 2.0}, 2.0),
        ("llama", {"logits_scaling": 4.0}, 1.0),
    ],
)
def test_names_of_the_scale(kind: str, entries: dict[str, Any], scale: float) -> None:
    config = SimpleNamespace(model_type=kind, **entries)
    config.get_text_config = lambda: config
    assert head_check.head_options(config) == (scale, None)


def policy_of(kind: str, **values: Any) -> Policy:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**LLAMA, **values})
    return Policy(AutoModelForCausalLM.from_config(config, dtype=torch.float32), torch.float32)


@pytest.mark.parametrize("kind", ["recurrent_gemma", "xlstm"])
def test_caps_of_these_models_are_known_and_checked(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest logit of these weights is far below the cap of 30."""
    values = {"num_heads": 4, "num_hidden_layers": 3} if kind == "recurrent_gemma" else {}
    policy = policy_of(kind, **values)
    assert policy.softcap == 30.0
    policy.check_head()
    policy.softcap = None
    with pytest.raises(ModelError, match="computes its logits in a way"):
        policy.check_head()


@pytest.mark.parametrize("cap", [5.0, 300.0, 10_000.0])
def test_a_cap_that_no_config_names_is_refused(cap: float) -> None:
    policy = policy_of("llama")
    policy.check_head()

    def capped(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return cap * (output / cap).tanh()

    policy.base.lm_head.register_forward_hook(capped)
    with pytest.raises(ModelError, match="LlamaForCausalLM computes its logits in a way"):
        policy.check_head()


def test_a_model_whose_decoder_has_another_name_is_refused() -> None:
    with pytest.raises(ModelError, match="Llama4ForCausalLM does not give its hidden states apart"):
        policy_of("llama4_text", num_local_experts=2, intermediate_size_mlp=48)
