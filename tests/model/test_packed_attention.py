"""Packed rows give the log-probs and gradients of one plain sequence for each response."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref.attention import Segments
from fastpref.data.dataset import TokenGroup
from fastpref.data.packing import PackedRow, pack_groups
from fastpref.model.packed_attention import (
    block_mask,
    packed_attention,
    packing_error,
    register,
)

CPU = torch.device("cpu")
VOCABULARY = 96
# Prompts and responses of one token, up to four responses, longer and shorter than the windows.
SIZES = [(9, 14, 11), (1, 1, 12), (13, 3, 1, 7, 5), (4, 1)]
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**GROUPED, "num_key_value_heads": 1},
    "llama, tied": {**GROUPED, "tie_word_embeddings": True},
    "mistral": {**GROUPED, "sliding_window": 5},
    "qwen2": {**GROUPED, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {**GROUPED, "hidden_size": 48, "num_attention_heads": 6},
    "gemma2": {
        **GROUPED,
        "attn_implementation": "eager",
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 6,
        "sliding_window": 5,
        "layer_types": ALTERNATING,
    },
    "gemma3_text": {**GROUPED, "sliding_window": 5, "layer_types": ALTERNATING},
    "phi3": {**GROUPED, "sliding_window": 4},
    "gpt_neox": COMMON,
    "gpt2": COMMON,
}
# These are in fp64 throughout. The others normalize in fp32, and so does the softmax of Gemma 2.
EXACT = {"gpt_neox", "gpt2"}


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    kind = name.partition(",")[0]
    values = dict(ARCHITECTURES[name])
    implementation = values.pop("attn_implementation", "sdpa")
    config = AutoConfig.for_model(kind, **values)
    for option in ("attn_pdrop", "resid_pdrop", "embd_pdrop"):  # GPT-2's
        setattr(config, option, 0.0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return model.to(dtype).train()


def make_groups(sizes: list[tuple[int, ...]] = SIZES) -> list[TokenGroup]:
    rng = np.random.default_rng(1)
    draw = ([rng.integers(1, VOCABULARY, size).astype(np.int32) for size in p] for p in sizes)
    return [TokenGroup(g, g + 1, prompt, tuple(rs)) for g, (prompt, *rs) in enumerate(draw)]


def members(groups: list[TokenGroup]) -> list[tuple[int, int]]:
    return [(g, k) for g, group in enumerate(groups) for k in range(len(group.responses))]


def plain_logps(model: Any, groups: list[TokenGroup]) -> Tensor:
    """Summed log-prob of every response, each run through the model alone."""
    sums = []
    for g, k in members(groups):
        prompt, response = groups[g].prompt, groups[g].responses[k]
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        logps = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        sums.append(logps.gather(-1, ids[1:, None])[len(prompt) - 1 :].sum())
    return torch.stack(sums)


def packed_logps(model: Any, groups: list[TokenGroup], row: PackedRow) -> Tensor:
    """The same log-probs from the packed row, in the order of `members`."""
    output = model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        use_cache=False,
        segments=row.segments,
    )
    labels = row.input_ids[0, row.label_positions, None]
    logps = output.logits[0, row.predictor_positions].log_softmax(-1).gather(-1, labels)[:, 0]
    lengths = [len(groups[g].responses[k]) for g, k in members(groups)]
    return torch.stack([part.sum() for part in logps.split(lengths)])


def logps_and_gradients(model: Any, logps: Tensor) -> dict[str, Tensor]:
    """A different coefficient for each response, so that errors do not cancel."""
    model.zero_grad()
    (logps * torch.linspace(-1, 2, len(logps), dtype=logps.dtype)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"logps": logps.detach(), **gradients}


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for key, value in expected.items():
        error = (ours[key] - value).norm() / value.norm()
        assert error < tolerance, f"{key}: {error:.1e}"


@pytest.mark.parametrize(
    ("dtype", "checkpointing"),
    [(torch.float64, False), (torch.float64, True), (torch.float32, False)],
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, dtype: torch.dtype, checkpointing: bool) -> None:
    model, groups = build(name, dtype), make_groups()
    expected = logps_and_gradients(model, plain_logps(model, groups))
    model.set_attn_implementation(register())
    if checkpointing:
        # transformers 5.x is renaming the method.
        older = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})
    row = pack_groups(groups, members(groups))
    ours = logps_and_gradients(model, packed_logps(model, groups, row))
    exact = 1e-9 if name in EXACT else 1e-6
    assert_close(ours, expected, exact if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("name", ["gpt_neox", "mistral"])
def test_without_sharing(name: str) -> None:
    model, groups = build(name), make_groups()
    expected = logps_and_gradients(model, plain_logps(model, groups))
    model.set_attn_implementation(register())
    row = pack_groups(groups, members(groups), share=False)
    ours = logps_and_gradients(model, packed_logps(model, groups, row))
    assert_close(ours, expected, 1e-9 if name in EXACT else 1e-6)


@pytest.mark.parametrize(
    "parts",
    [
        ((9, 14 + 11), *SIZES[1:]),  # the second response sees the first
        ((9 + 14, 11), *SIZES[1:]),  # the same, the first taken for a part of the prompt
        (*SIZES[:2], (*SIZES[2], *SIZES[3])),  # the last group sees the prompt of another
        ((9,), (14,), (11,), *SIZES[1:]),  # responses do not see their prompt
    ],
)
def test_other_segments_are_noticed(parts: tuple[tuple[int, ...], ...]) -> None:
    """Each leak changes a log-prob by far more than rounding, so the comparison detects it."""
    model, groups = build("gpt_neox"), make_groups()
    expected = plain_logps(model, groups)
    model.set_attn_implementation(register())
    row = pack_groups(groups, members(groups))._replace(segments=Segments(parts))
    assert (packed_logps(model, groups, row) - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma2", "gpt_neox"])
def test_without_segments_rows_are_padded_sequences(name: str) -> None:
    model = build(name)
    ids = torch.randint(1, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation(register())
    ours = model(input_ids=ids, use_cache=False).logits
    assert (ours - expected).norm() / expected.norm() < 1e-6


def random_heads(rows: int, tokens: int) -> list[Tensor]:
    """Query of six heads, key and value of two."""
    g = torch.Generator().manual_seed(0)
    shapes = [(rows, heads, tokens, 16) for heads in (6, 2, 2)]
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("sizes", [SIZES, [(70, 90, 40), (130, 5)]])
def test_the_block_mask_is_the_attention_by_sequences(
    sizes: list[tuple[int, ...]], window: int | None
) -> None:
    """FlexAttention, here in plain PyTorch, over a row of one block and over one of several."""
    segments = Segments(tuple(sizes))
    inputs = random_heads(1, sum(map(sum, sizes)))
    mask = block_mask(segments, window, CPU)
    flex = flex_attention(*inputs, block_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    ours, _ = packed_attention(
        torch.nn.Module(), *inputs, None, scaling=0.3, sliding_window=window, segments=segments
    )
    torch.testing.assert_close(ours, flex, rtol=0, atol=1e-12)


def test_a_block_mask_is_made_once() -> None:
    segments = Segments(((3, 2, 2),))
    assert block_mask(segments, None, CPU) is block_mask(segments, None, CPU)
    assert block_mask(segments, None, CPU) is not block_mask(segments, 2, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"attention_mask": torch.ones(1, 1, 5, 5)}, "a mask"), ({"dropout": 0.1}, "dropout 0.1")],
)
def test_masks_and_dropout_are_refused(change: dict[str, Any], message: str) -> None:
    options = {"attention_mask": None, **change}
    with pytest.raises(ValueError, match=f"expected no mask and no dropout, got {message}; "):
        packed_attention(torch.nn.Module(), *random_heads(1, 5), **options)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_packing_error_of_a_model_that_can(name: str) -> None:
    model = build(name, torch.float32)
    original = model.config._attn_implementation
    assert packing_error(model, make_groups()) < 1e-5
    assert model.config._attn_implementation == original
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "values", "reason"),
    [
        ("stablelm", GROUPED, "its layers do not pass the segments on"),
        ("mamba", COMMON, "it has no attention"),
        ("falcon", COMMON, "its attention cannot be set"),
        ("doge", GROUPED, "it builds its own mask"),
    ],
)
def test_packing_error_of_a_model_that_cannot(
    kind: str, values: dict[str, Any], reason: str
) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    original = model.config._attn_implementation
    assert packing_error(model, make_groups()) > 0.1, reason
    assert model.config._attn_implementation == original


def test_a_window_shows_only_in_groups_that_are_longer() -> None:
    """The layers of this model do not pass their window to the attention function."""
    values = {**GROUPED, "use_sliding_window": True, "sliding_window": 24}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2_moe", **values))
    assert packing_error(model, make_groups([(9, 14, 11), (1, 1, 12)])) < 1e-4
    assert packing_error(model, make_groups([(9, 14, 11), (1, 1, 25)])) > 0.01
