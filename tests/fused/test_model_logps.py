"""Log-probs from a model as a trainer wraps it, against plain PyTorch on its logits."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.loops import setting
from fastpref.fused import ModelLogps

SIZES = {
    "vocab_size": setting.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 3.0},
}


def batch() -> dict[str, Tensor]:
    return setting.collate(setting.examples()[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_gradients_are_those_of_the_full_logits(kind: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **KINDS[kind]))
    weights = torch.tensor([1.0, -0.5, 2.0, -3.0])
    gradients = []
    for logps in (
        ModelLogps(model)(model, **batch()),
        setting.sequence_logps(model, batch(), setting.causal_logits),
    ):
        (logps * weights).sum().backward()
        gradients.append([logps, *(parameter.grad for parameter in model.parameters())])
        model.zero_grad()
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_without_gradients_the_result_has_none() -> None:
    model = setting.causal_model()
    with torch.no_grad():
        logps = ModelLogps(model)(model, **batch())
    assert logps.shape == (4,) and not logps.requires_grad


def test_another_index_is_ignored_too() -> None:
    model, columns = setting.causal_model(), batch()
    expected = ModelLogps(model)(model, **columns)
    columns["labels"][columns["labels"] == -100] = -1
    torch.testing.assert_close(ModelLogps(model, ignore_index=-1)(model, **columns), expected)


def test_a_shape_that_does_not_fit_is_an_error() -> None:
    model, columns = setting.causal_model(), batch()
    shorter = columns["labels"][:, 1:]
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(4, 7\), got \(4, 8\)"):
        ModelLogps(model)(model, **columns | {"labels": shorter})
    del columns["attention_mask"]
    with pytest.raises(ValueError, match=r"labels: expected shape \(4, 8\), one per hidden"):
        ModelLogps(model)(model, **columns | {"labels": shorter})


def test_an_input_that_the_model_ignores_is_an_error() -> None:
    model = setting.causal_model()
    with pytest.raises(ValueError, match="ref_logps"):
        ModelLogps(model)(model, **batch(), ref_logps=torch.zeros(4))


def test_ranks_without_a_wrapper_are_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = setting.causal_model()
    sequence_logps = ModelLogps(model)
    with torch.no_grad():
        sequence_logps(model, **batch())
    with pytest.warns(UserWarning, match="2 ranks, but they have no process group"):
        sequence_logps(model, **batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sequence_logps(model, **batch())
