"""Explicit blocks equal Hugging Face's layers, values and gradients, for every architecture."""

from __future__ import annotations

from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref.attention import Segments, rows
from fastpref.model import packed_attention
from fastpref.trunk import UnknownLayer, build_trunk
from tests.helpers.exact import ExactlyInFp64

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "llama, gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "llama, scaled angles": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 2.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"hidden_size": 48, "num_attention_heads": 6},
    "phi3": {"sliding_window": 4},
    "phi3, partial": {
        "rope_parameters": {
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.5,
            "rope_type": "default",
        }
    },
    "gemma2": {
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 6,
        "sliding_window": 5,
        "layer_types": ALTERNATING,
    },
    "gemma3_text": {"sliding_window": 5, "layer_types": ALTERNATING},
    "olmo2": {},
    "olmo3": {"sliding_window": 5, "layer_types": ALTERNATING},
}
# Prompts and responses of one token, K of 1, 2 and 4.
PACKED = Segments(((9, 14, 11), (1, 1), (13, 3, 1, 7, 5)))


def model_of(name: str, dtype: torch.dtype = torch.float64, lora: bool = False) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.partition(",")[0], **{**COMMON, **FAMILIES[name]})
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=packed_attention.register()
    )
    for parameter in model.parameters():  # norms of 1, and biases of 0, would hide errors
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    if lora:
        model.requires_grad_(False)
        options = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")
        model = peft.get_peft_model(model, options)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data.normal_(0, 0.1)
    return model.to(dtype)


def trunk_module(model: Any) -> Any:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model


def embeddings(segments: Segments, model: Any, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(1)
    size = trunk_module(model).config.hidden_size
    return torch.randn(1, segments.tokens, size).to(dtype).requires_grad_()


def positions(segments: Segments) -> Tensor:
    return torch.from_numpy(segments.positions)[None]


def expected_hidden(model: Any, inputs: Tensor, segments: Segments) -> Tensor:
    with ExactlyInFp64():
        output = trunk_module(model)(
            inputs_embeds=inputs,
            position_ids=positions(segments),
            use_cache=False,
            segments=segments,
        )
    return output.last_hidden_state[0]


def explicit_hidden(model: Any, inputs: Tensor, segments: Segments) -> Tensor:
    trunk = build_trunk(trunk_module(model))
    with ExactlyInFp64():  # for the rotary angles, which Hugging Face's module computes
        return trunk(None, positions(segments), segments, inputs.dtype, inputs)


def hidden_and_gradients(function, model: Any, inputs: Tensor, segments: Segments) -> dict:
    hidden = function(model, inputs, segments)
    torch.manual_seed(2)
    upstream = torch.randn(hidden.shape).to(hidden.dtype)
    leaves = {"input": inputs} | {
        name: p for name, p in model.named_parameters() if p.requires_grad and "lm_head" not in name
    }
    gradients = torch.autograd.grad(hidden, list(leaves.values()), upstream, allow_unused=True)
    return {"hidden": hidden.detach()} | dict(zip(leaves, gradients, strict=True))


def test_a_second_derivative_is_refused():
    model = model_of("llama")
    inputs = embeddings(PACKED, model, torch.float64)
    hidden = explicit_hidden(model, inputs, PACKED)
    with pytest.raises(RuntimeError, match="the trunk of fastpref: its gradient has no derivative"):
        torch.autograd.grad(hidden.sum(), inputs, create_graph=True)


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("name", FAMILIES)
def test_values_and_gradients_in_fp64(name, lora):
    model = model_of(name, lora=lora)
    inputs = embeddings(PACKED, model, torch.float64)
    expected = hidden_and_gradients(expected_hidden, model, inputs, PACKED)
    ours = hidden_and_gradients(explicit_hidden, model, inputs, PACKED)
    missing = {key for key, value in expected.items() if value is None}
    assert missing <= {key for key in expected if "embed_tokens" in key}
    for key in expected.keys() - missing:
        torch.testing.assert_close(
            ours[key], expected[key], rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("name", FAMILIES)
def test_errors_in_bf16_are_those_of_torch(name, lora):
    """Relative to fp64 of the same rounded weights, at most twice torch's error."""
    model = model_of(name, torch.bfloat16, lora)
    inputs = embeddings(PACKED, model, torch.bfloat16)
    plain = hidden_and_gradients(expected_hidden, model, inputs, PACKED)
    ours = hidden_and_gradients(explicit_hidden, model, inputs, PACKED)
    model = model.double()
    exact = hidden_and_gradients(
        expected_hidden, model, inputs.detach().double().requires_grad_(), PACKED
    )
    for key, value in exact.items():
        if value is not None:
            error, error_of_torch = ((x[key] - value).norm() for x in (ours, plain))
            assert error <= 2 * error_of_torch + 2**-8 * value.norm(), key


def test_padded_rows_are_sequences_of_their_own():
    model = model_of("qwen3")
    size = model.config.hidden_size
    inputs = torch.randn(2, 7, size, dtype=torch.float64)
    trunk = build_trunk(trunk_module(model))
    position_ids = torch.arange(7).expand(2, 7)
    with ExactlyInFp64():
        ours = trunk(None, position_ids, rows(2, 7), torch.float64, inputs).view(2, 7, size)
    for row in range(2):
        alone = expected_hidden(model, inputs[row : row + 1], Segments(((7,),)))
        torch.testing.assert_close(ours[row], alone, rtol=1e-9, atol=1e-9)


def test_blocks_are_recomputed_where_their_module_says_so():
    model = model_of("llama").train()
    inputs = embeddings(PACKED, model, torch.float64)
    plain = hidden_and_gradients(explicit_hidden, model, inputs, PACKED)
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        explicit_hidden(model, inputs, PACKED)
    assert (PACKED.tokens, model.config.intermediate_size) not in kept
    again = hidden_and_gradients(explicit_hidden, model, inputs, PACKED)
    for key, value in plain.items():
        assert value is None or torch.equal(value, again[key]), key


def test_an_adapter_of_zeros_changes_no_bit():
    model = model_of("llama", torch.float32, lora=True)
    inputs = embeddings(PACKED, model, torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    with_adapter = explicit_hidden(model, inputs, PACKED)
    with model.disable_adapter():
        assert torch.equal(explicit_hidden(model, inputs, PACKED), with_adapter)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_pass_of_the_reference_before_the_backward_pass_changes_no_gradient(recompute):
    model = model_of("llama", lora=True).train()
    for layer in trunk_module(model).layers:
        layer.gradient_checkpointing = recompute
    trunk, leaves = (
        build_trunk(trunk_module(model)),
        [p for p in model.parameters() if p.requires_grad],
    )
    inputs = embeddings(PACKED, model, torch.float64)
    gradients = []
    for between in (False, True):
        hidden = trunk(None, positions(PACKED), PACKED, torch.float64, inputs)
        if between:
            with torch.no_grad(), model.disable_adapter():
                trunk(None, positions(PACKED), PACKED, torch.float64, inputs)
        gradients.append(torch.autograd.grad(hidden.square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(a.norm() > 0 for a in gradients[0])


def test_adapters_in_fp32_beside_a_base_in_bf16():
    """The layout of training: masters in fp32, computation in bf16."""
    model = model_of("llama", torch.bfloat16, lora=True)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    inputs = embeddings(PACKED, model, torch.bfloat16)
    ours = hidden_and_gradients(explicit_hidden, model, inputs, PACKED)
    assert {v.dtype for k, v in ours.items() if "lora_" in k} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        plain = hidden_and_gradients(expected_hidden, model, inputs, PACKED)
    inputs = inputs.detach().double().requires_grad_()
    exact = hidden_and_gradients(expected_hidden, model.double(), inputs, PACKED)
    for key, value in exact.items():
        error, error_of_torch = ((x[key] - value).norm() for x in (ours, plain))
        assert error <= 2 * error_of_torch, key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: layer.register_forward_hook(lambda *_: None), "a hook of LlamaDecoderLayer"),
        (lambda layer: layer.mlp.register_forward_pre_hook(lambda *_: None), "a hook of LlamaMLP"),
        (lambda layer: setattr(layer.mlp, "forward", layer.mlp.forward), "was replaced"),
        (lambda layer: setattr(layer, "extra", nn.Linear(2, 2)), "a part extra is not known"),
        (lambda layer: setattr(layer.mlp, "act_fn", nn.ReLU()), "the activation ReLU"),
        (lambda layer: setattr(layer, "input_layernorm", nn.LayerNorm(8)), "the norm LayerNorm"),
        (lambda layer: setattr(layer.self_attn, "attention_dropout", 0.1), "dropout"),
        (lambda layer: setattr(layer.mlp, "up_proj", nn.Conv1d(1, 1, 1)), "up_proj is a Conv1d"),
    ],
)
def test_what_is_unknown_in_a_layer_is_named(change, message):
    model = model_of("llama")
    change(model.model.layers[1])
    with pytest.raises(UnknownLayer, match=message):
        build_trunk(model.model)


@pytest.mark.parametrize("part", ["", "norm"])
def test_a_hook_outside_of_the_layers_is_named(part):
    model = model_of("llama").model
    model.get_submodule(part).register_forward_hook(lambda *_: None)
    with pytest.raises(UnknownLayer, match=r"a hook of Llama(Model|RMSNorm) would not run"):
        build_trunk(model)


@pytest.mark.parametrize("part", ["", "norm", "layers.0", "layers.1.mlp.up_proj.lora_A.default"])
def test_a_hook_that_is_set_later_stops_the_next_pass(part):
    model = model_of("llama", lora=True)
    base = model.get_base_model().model
    trunk = build_trunk(base)
    inputs = embeddings(PACKED, model, torch.float64)
    trunk(None, positions(PACKED), PACKED, torch.float64, inputs)
    handle = base.get_submodule(part).register_forward_hook(partial(print, end=""))
    with pytest.raises(RuntimeError, match=r"a hook of \w+ was set after the layers were read"):
        trunk(None, positions(PACKED), PACKED, torch.float64, inputs)
    handle.remove()
    trunk(None, positions(PACKED), PACKED, torch.float64, inputs)


@pytest.mark.parametrize("part", ["", "self_attn", "mlp", "input_layernorm", "self_attn.q_norm"])
def test_a_class_with_another_forward_pass_is_named(part, monkeypatch):
    """Whether it was derived, or patched: its gradient may differ where its values do not."""
    model = model_of("qwen3").model
    kind = type(model.layers[1].get_submodule(part))
    message = f"the forward pass of (Other)?{kind.__name__} is one of {__name__}"

    def forward(self, *arguments, **options):
        return kind.forward(self, *arguments, **options)

    other = type(f"Other{kind.__name__}", (kind,), {"forward": forward})
    if part:
        model.layers[1].get_submodule(part).__class__ = other
        with pytest.raises(UnknownLayer, match=message):
            build_trunk(model)
    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(UnknownLayer, match=message):
        build_trunk(model_of("qwen3").model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_dropout": 0.1}, "dropout"),
        ({"lora_bias": True}, "bias"),
    ],
)
def test_adapters_beyond_plain_lora_are_named(options, message):
    model = model_of("llama, biases")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], **options)
    wrapped = peft.get_peft_model(model, adapter)
    with pytest.raises(UnknownLayer, match=message):
        build_trunk(trunk_module(wrapped))


def test_other_architectures_are_named():
    config = AutoConfig.for_model(
        "gpt_neox",
        hidden_size=8,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=8,
        vocab_size=9,
    )
    with pytest.raises(UnknownLayer, match="GPTNeoXLayer"):
        build_trunk(AutoModelForCausalLM.from_config(config).base_model)
