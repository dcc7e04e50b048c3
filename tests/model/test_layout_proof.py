"""Models that cannot compute packed rows are known by what their layers are, not by numbers.

Weights have transformers' own standard deviation of 0.02, at which log-probs hide most leaks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref.data.dataset import TokenGroup
from fastpref.model import layout_proof
from fastpref.model.layout_proof import packing_obstacle
from fastpref.model.policy import Policy
from fastpref.utils.errors import ModelError

VOCABULARY, WINDOW, TOLERANCE = 96, 24, 1e-3
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
WINDOWED = ["sliding_attention", "full_attention"]
EXPERTS = {**GROUPED, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}


def groups(*sizes: tuple[int, ...]) -> list[TokenGroup]:
    """Groups of random tokens, by the lengths of prompt and responses."""
    rng = np.random.default_rng(1)
    drawn = ([rng.integers(1, VOCABULARY, n).astype(np.int32) for n in each] for each in sizes)
    return [TokenGroup(g, g + 1, prompt, tuple(rest)) for g, (prompt, *rest) in enumerate(drawn)]


def build(kind: str, **values: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **values)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


LONG, SHORT = (9, 14, 18), (1, 3, 2)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("llama", GROUPED),
        ("gpt2", SMALL),
        ("mistral", {**GROUPED, "sliding_window": 5}),
        ("gemma3_text", {**GROUPED, "sliding_window": 5, "layer_types": WINDOWED}),
        ("mixtral", {**EXPERTS, "sliding_window": 5}),
    ],
)
def test_attention_whose_arguments_are_known_can_be_packed(
    kind: str, values: dict[str, Any]
) -> None:
    model = build(kind, **values).train()
    original = model.config._attn_implementation
    assert packing_obstacle(model, groups(LONG, SHORT), TOLERANCE) == ""
    assert model.config._attn_implementation == original and model.training


def test_compiled_layers_are_read_as_they_are() -> None:
    model = build("llama", **GROUPED)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    assert packing_obstacle(model, groups(LONG, SHORT), TOLERANCE) == ""


@pytest.mark.parametrize(
    ("kind", "values", "reason"),
    [
        ("lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}, layout_proof.OUTSIDE),
        ("bamba", {**GROUPED, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16,
                   "mamba_d_state": 8, "mamba_n_groups": 1}, layout_proof.OUTSIDE),
        ("mamba", SMALL, layout_proof.NO_CALL),
        ("gpt_oss", {**EXPERTS, "sliding_window": 64}, "its attention has an option s_aux, which "
         "packed rows do not know"),
        ("llama4_text", {**EXPERTS, "attention_chunk_size": 16, "intermediate_size_mlp": 48},
         layout_proof.MASK),
        ("doge", GROUPED, layout_proof.MADE_MASK),
        ("deepseek_v3", {**EXPERTS, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16,
                         "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
                         "first_k_dense_replace": 2}, layout_proof.VALUES),
        ("falcon", SMALL, layout_proof.UNSET),
    ],
)  # fmt: skip
def test_what_mixes_positions_in_another_way_is_named(
    kind: str, values: dict[str, Any], reason: str
) -> None:
    model = build(kind, **values)
    original = model.config._attn_implementation
    assert packing_obstacle(model, groups(LONG, SHORT), TOLERANCE) == reason
    assert model.config._attn_implementation == original


def test_a_window_of_the_mask_alone_forbids_sequences_that_are_longer() -> None:
    model = build(
        "qwen2_moe", **EXPERTS, use_sliding_window=True, sliding_window=WINDOW, layer_types=WINDOWED
    )
    assert packing_obstacle(model, groups((9, 14, 15), SHORT), TOLERANCE) == ""
    assert packing_obstacle(model, groups((9, 14, 16), SHORT), TOLERANCE) == layout_proof.WINDOW
    # One response of one group is enough, and so is a group alone.
    assert packing_obstacle(model, groups((2, 30)), TOLERANCE) == layout_proof.WINDOW


def test_a_convolution_of_zeros_is_noticed() -> None:
    """Its weights may grow in training."""
    model = build("lfm2", **GROUPED, layer_types=["conv", "full_attention"])
    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            nn.init.zeros_(module.weight)
    assert packing_obstacle(model, groups(SHORT), TOLERANCE) == layout_proof.OUTSIDE


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize("size", [1e-12, 0.0])
def test_a_leak_of_any_size_is_noticed(shift: int, size: float) -> None:
    model = build("llama", **GROUPED)

    def leak(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return output + size * output.roll(shift, 1)

    model.model.layers[0].mlp.register_forward_hook(leak)
    assert packing_obstacle(model, groups(LONG, SHORT), TOLERANCE) == layout_proof.OUTSIDE


def test_a_statistic_of_the_whole_row_is_noticed() -> None:
    model = build("llama", **GROUPED)
    model.model.layers[1].mlp.register_forward_hook(
        lambda module, inputs, output: output / (1 + 1e-9 * output.abs().amax())
    )
    assert packing_obstacle(model, groups(SHORT), TOLERANCE) == layout_proof.OUTSIDE


def test_positions_of_the_row_instead_of_the_sequence_are_noticed() -> None:
    model = build("llama", **GROUPED)
    rotary = model.model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda x, position_ids: forward(x, torch.arange(position_ids.shape[-1])[None])
    assert packing_obstacle(model, groups(LONG, SHORT), TOLERANCE) == layout_proof.POSITIONS


def test_embeddings_that_come_from_elsewhere_are_noticed() -> None:
    """Otherwise nothing would be poisoned, and nothing would leak."""
    model = build("llama", **GROUPED)
    ids = torch.arange(1, 48)[None]
    other = nn.Embedding(VOCABULARY, 32)
    model.model.layers[0].register_forward_pre_hook(
        lambda module, inputs: (other(ids[:, : inputs[0].shape[1]]), *inputs[1:])
    )
    assert packing_obstacle(model, groups(SHORT), TOLERANCE) == layout_proof.UNREAD


def test_layers_that_fail_give_their_error() -> None:
    model = build("llama", **GROUPED)
    del model.model.norm.weight
    reason = packing_obstacle(model, groups(SHORT), TOLERANCE)
    assert reason.startswith("its layers cannot take a packed row (AttributeError: ")


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    model = build("llama", **GROUPED)
    policy = Policy(model, torch.float32)
    policy.check_causal()
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: output + 0.1 * output.roll(-1, 1)
    )
    with pytest.raises(ModelError, match="LlamaForCausalLM is not causal: another last token"):
        policy.check_causal()


def test_padded_rows_are_compared_with_single_sequences() -> None:
    model = build("llama", **GROUPED)
    policy = Policy(model, torch.float32)
    assert policy.padding_error(groups(LONG, SHORT)) < 1e-6
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: output * (1 + 0.1 * output.shape[1])
    )
    assert policy.padding_error(groups(LONG, SHORT)) > 1e-3
