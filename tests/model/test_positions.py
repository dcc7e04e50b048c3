"""A response's log-prob does not depend on its batch, whatever its rotary positions depend on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref.config import Config, ConfigError
from fastpref.data.collate import collate
from fastpref.data.dataset import TokenGroup
from fastpref.model.policy import Policy
from fastpref.model.positions import context_length_of
from fastpref.trunk import build_trunk
from fastpref.utils.progress import Display
from tests.helpers.training_runs import records, run

SHORT = 24  # length up to which the positions are those of short sequences
VALUES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
    "initializer_range": 0.3,
}  # fmt: skip
LONGROPE = {
    **VALUES, "max_position_embeddings": 128, "original_max_position_embeddings": SHORT,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10_000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 4.0, 6.0, 8.0],
    },
}  # fmt: skip
DYNAMIC = {
    **VALUES, "max_position_embeddings": SHORT, "head_dim": 8,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
}  # fmt: skip
KINDS = {"phi3, LongRoPE": ("phi3", LONGROPE), "llama, dynamic": ("llama", DYNAMIC)}


def build(name: str) -> Any:
    torch.manual_seed(0)
    kind, values = KINDS[name]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values)).eval()


def make_groups(*sizes: tuple[int, ...]) -> list[TokenGroup]:
    rng = np.random.default_rng(0)
    drawn = ([rng.integers(1, 96, n).astype(np.int32) for n in each] for each in sizes)
    return [TokenGroup(g, g + 1, prompt, tuple(rest)) for g, (prompt, *rest) in enumerate(drawn)]


def plain_logps(model: Any, groups: list[TokenGroup]) -> Tensor:
    """Of each response by a fresh model: dynamic scaling remembers the longest sequence."""
    sums = []
    for prompt, response in ((g.prompt, r) for g in groups for r in g.responses):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        logps = copy.deepcopy(model)(input_ids=ids).logits[0, :-1].log_softmax(-1)
        sums.append(logps.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum())
    return torch.stack(sums)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_each_row_has_the_table_of_its_own_length(name: str, fused: bool) -> None:
    """Both sides of the threshold in one pass, up to its very edge, in any order."""
    model = build(name)
    groups = make_groups((4, 30, 3), (9, 15, 16), (1, 23, 24), (2, 5, 90))
    expected = plain_logps(model, groups)
    policy = Policy(model, torch.float32)
    if fused:
        policy.trunk = build_trunk(model.model)
    for order in (groups, groups[::-1]):
        ours = policy(collate(order, "pointwise")).logps
        wanted = expected if order is groups else expected.view(-1, 2).flip(0).flatten()
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=3e-5)


@torch.no_grad()
def test_the_tables_differ_by_far_more_than_rounding() -> None:
    model = build("phi3, LongRoPE")
    groups = make_groups((4, 30, 3))
    policy = Policy(model, torch.float32)
    right = policy(collate(groups, "pointwise")).logps
    policy.rotaries = []
    assert (policy(collate(groups, "pointwise")).logps - right).abs().max() > 0.1


@pytest.mark.parametrize("words", [2, 40])
def test_rewards_without_an_update_are_zero_in_every_epoch(
    make_config: Callable[..., Config], display: Display, tmp_path: Path, words: int
) -> None:
    """Pairs are batched otherwise in each epoch; prompts are shared if no sequence is long."""
    rows = [
        {"prompt": f"ask {k}", "chosen": " tea" * (1 + words * k // 8), "rejected": " no" * (1 + k)}
        for k in range(8)
    ]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {**LONGROPE, "model_type": "phi3", "original_max_position_embeddings": 32}
    values["rope_parameters"] = {
        **LONGROPE["rope_parameters"], "original_max_position_embeddings": 32,
    }  # type: ignore[dict-item]  # fmt: skip
    config = make_config(
        model={"init": "random", "config": {**values, "vocab_size": 384}, "dtype": "float32"},
        data__train=str(data), training__epochs=3, training__steps=None, training__batch_size=4,
        training__log_every=1, training__batch_invariant=False, optim__lr=1e-30,
    )  # fmt: skip
    run(config, display)
    lines = records(config)
    assert len(lines) == 6
    for line in lines:
        assert abs(line["rewards/chosen"]) < 1e-5 and abs(line["rewards/rejected"]) < 1e-5


def test_prompts_are_not_shared_where_positions_depend_on_the_length(
    make_config: Callable[..., Config], display: Display
) -> None:
    config = make_config(
        model={"init": "random", "dtype": "float32", "config": {
            **DYNAMIC, "model_type": "llama", "vocab_size": 384, "max_position_embeddings": 12}},
        training__layout="prefix_shared",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="its positions depend on the length of the sequence"):
        run(config, display)


@pytest.mark.parametrize(
    ("entries", "positions"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024}, 1024),
        ({}, None),
        # Qwen's YaRN beside the original number of positions; DeepSeek's beside the extended one.
        ({"max_position_embeddings": 32768, "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
         131_072),
        ({"max_position_embeddings": 163_840, "rope_parameters": {
            "rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}},
         163_840),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}},
         16_384),
        ({"max_position_embeddings": 131_072, "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}},
         131_072),
        ({"max_position_embeddings": 4096, "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "factor": 9.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0}}}, 32_768),
        ({"max_position_embeddings": 64, "rope_parameters": {"rope_type": "default"}}, 64),
    ],
)  # fmt: skip
def test_a_factor_extends_the_positions(entries: dict[str, Any], positions: int | None) -> None:
    config = SimpleNamespace(**entries)
    config.get_text_config = lambda: config
    assert context_length_of(config) == positions
