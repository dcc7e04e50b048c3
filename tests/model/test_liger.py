"""Calls of liger-kernel's patch functions; the kernels themselves need a GPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import liger_kernel.transformers as liger
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fastpref.config import Config
from fastpref.model.liger import use_liger
from fastpref.utils import optional_packages
from fastpref.utils.errors import ModelError
from fastpref.utils.optional_packages import MissingPackage
from tests.helpers.data import LLAMA
from tests.helpers.policies import policy_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # no CUDA device is used
KINDS = ("llama", "qwen3", "gemma2")
ARGUMENTS = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    values = {**LLAMA, "model_type": kind, "num_hidden_layers": 1, "hidden_size": 8}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Patched architectures and the arguments of the calls."""
    patches: list[tuple[str, dict[str, Any]]] = []
    for kind in KINDS:
        original = getattr(liger, f"apply_liger_kernel_to_{kind}")

        def record(_kind: str = kind, _original: Any = original, **options: Any) -> None:
            inspect.signature(_original).bind(**options)
            patches.append((_kind, options))

        monkeypatch.setattr(liger, f"apply_liger_kernel_to_{kind}", record)
    return patches


@pytest.mark.parametrize("kernels", ["auto", "liger"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_without_liger_s_losses(kind: str, kernels: str, calls: list[Any]) -> None:
    model = model_of(kind)
    assert use_liger(model, kernels, CUDA)
    assert calls == [(kind, {"model": model, **ARGUMENTS})]


def test_where_auto_leaves_the_layers_alone(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not use_liger(model_of("llama"), "auto", CPU)
    assert not use_liger(model_of("llama"), "torch", CUDA)
    assert not use_liger(model_of("cohere"), "auto", CUDA)
    assert not use_liger(model_of("llama", torch.float64), "auto", CUDA)
    monkeypatch.setattr(optional_packages, "find_spec", lambda name: None)
    assert not use_liger(model_of("llama"), "auto", CUDA)
    assert calls == []


def test_liger_by_name_is_had_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"model\.kernels: liger runs on CUDA, and this is cpu"):
        use_liger(model_of("llama"), "liger", CPU)
    with pytest.raises(ModelError, match="does not know models of type cohere"):
        use_liger(model_of("cohere"), "liger", CUDA)
    monkeypatch.setattr(optional_packages, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="liger needs liger-kernel; pip install liger-kernel"):
        use_liger(model_of("llama"), "liger", CUDA)


def test_options_of_a_run(
    make_config: Callable[..., Config], tokenizer: PreTrainedTokenizerFast
) -> None:
    assert policy_of(make_config(), tokenizer, CPU).kernels == "fused"
    assert policy_of(make_config(model__kernels="torch"), tokenizer, CPU).kernels == "torch"
    with pytest.raises(ModelError, match=r"model\.kernels: liger runs on CUDA"):
        policy_of(make_config(model__kernels="liger"), tokenizer, CPU)


def test_flash_attention_needs_its_package(
    make_config: Callable[..., Config],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optional_packages, "find_spec", lambda name: None)
    config = make_config(model__attn_implementation="flash_attention_2")
    with pytest.raises(MissingPackage, match="flash_attention_2 needs flash-attn; pip install fl"):
        policy_of(config, tokenizer, CPU)
