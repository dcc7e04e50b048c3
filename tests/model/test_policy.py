"""Log-probs of the policy against plain transformers logits, pair by pair; refused models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fastpref.config import Config
from fastpref.data.collate import collate
from fastpref.data.dataset import TokenGroup, load_groups
from fastpref.data.tokenizers import load_tokenizer
from fastpref.model import head_check
from fastpref.model.policy import ForwardOptions, Policy
from fastpref.utils.errors import ModelError
from tests.helpers.data import LLAMA
from tests.helpers.exact import ExactlyInFp64
from tests.helpers.policies import policy_of

CPU = torch.device("cpu")


def plain_logps(causal_lm: nn.Module, pair: TokenGroup) -> list[float]:
    """Log-softmax over the full fp64 logits of each response, one sequence at a time."""
    values = []
    for response in pair.responses:
        ids = torch.from_numpy(np.concatenate([pair.prompt, response]).astype(np.int64))
        with torch.no_grad(), ExactlyInFp64():
            logits = causal_lm(input_ids=ids[None]).logits[0].double()
        logps = logits.log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]
        values.append(logps[len(pair.prompt) - 1 :].sum().item())
    return values


def hand_made(vocabulary: int) -> list[TokenGroup]:
    """Uneven lengths, one-token responses, a one-token prompt."""
    generator = np.random.default_rng(0)
    sizes = [(5, 7, 3), (1, 1, 9), (12, 1, 1), (3, 20, 2)]
    ids = [[generator.integers(0, vocabulary, n).astype(np.int32) for n in s] for s in sizes]
    return [TokenGroup(i, i, prompt, tuple(both)) for i, (prompt, *both) in enumerate(ids)]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
def test_logps_equal_those_of_plain_logits(
    make_config: Callable[..., Config], dtype: str, tolerance: float
) -> None:
    """Includes prompts that merge with the response, one-token and truncated responses."""
    config = make_config(model__dtype=dtype, data__max_length=14)
    tokenizer = load_tokenizer(config.model)
    assert tokenizer is not None and config.model.path is not None
    policy = policy_of(config, tokenizer, CPU)
    wide = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64)
    dataset = load_groups(config.data.train, tokenizer, config.data)
    assert dataset.counts["chosen_cut"] > 0
    pairs = [*(dataset[i] for i in range(len(dataset))), *hand_made(384)]
    with torch.no_grad():
        ours = policy(collate(pairs)).logps.view(2, -1).T
    expected = torch.tensor([plain_logps(wide, pair) for pair in pairs], dtype=torch.float64)
    assert ours.dtype == getattr(torch, dtype)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=tolerance)


def test_a_merged_token_is_scored(
    make_config: Callable[..., Config], tmp_path: Path, tiny_llama: str
) -> None:
    path = tmp_path / "merge.jsonl"
    path.write_text('{"prompt": "User: tea?\\nAssistant: t", "chosen": "ea", "rejected": "he"}\n')
    config = make_config(model__dtype="float64", data__train=str(path))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    pair = load_groups(str(path), tokenizer, config.data)[0]
    assert len(pair.prompt) < len(tokenizer("User: tea?\nAssistant: t")["input_ids"])
    policy = policy_of(config, tokenizer, CPU)
    with torch.no_grad():
        ours = policy(collate([pair])).logps
    expected = torch.tensor(plain_logps(policy.causal_lm, pair), dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tied llama": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral, window below the sequence": {"model_type": "mistral", "sliding_window": 4},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "phi, bias on the head": {"model_type": "phi", "num_key_value_heads": 4},
    "gemma2, soft-cap": {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 0.5},
    "cohere, logit scale": {"model_type": "cohere", "logit_scale": 0.25},
    "granite, logit divisor": {"model_type": "granite", "logits_scaling": 3.0},
    "gpt_neox": {"model_type": "gpt_neox", "num_key_value_heads": None},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(
    make_config: Callable[..., Config], tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    """Peaked logits (initializer_range 0.5), so that a missing scale or cap shows."""
    values = {**LLAMA, "initializer_range": 0.5, **ARCHITECTURES[name]}
    if values.get("num_key_value_heads", 0) is None:
        del values["num_key_value_heads"]
    config = make_config(model={"init": "random", "config": values, "dtype": "float64"})
    policy = policy_of(config, tokenizer, CPU)
    if policy.base.get_output_embeddings().bias is not None:
        nn.init.normal_(policy.base.get_output_embeddings().bias)
    pairs = hand_made(384)
    with torch.no_grad(), ExactlyInFp64():
        ours = policy(collate(pairs)).logps.view(2, -1).T
    plain = [plain_logps(policy.causal_lm, pair) for pair in pairs]
    expected = torch.tensor(plain, dtype=torch.float64)
    # Gemma 2 runs transformers' eager attention, whose softmax is in fp32 whatever the dtype.
    tolerance = 1e-6 if policy.base.config._attn_implementation == "eager" else 1e-9
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_equal_those_of_plain_logits(
    make_config: Callable[..., Config],
    tokenizer: PreTrainedTokenizerFast,
    tied: bool,
    checkpointing: bool,
) -> None:
    values = {**LLAMA, "initializer_range": 0.3, "tie_word_embeddings": tied}
    config = make_config(
        model={"init": "random", "config": values, "dtype": "float64"},
        training__activation_checkpointing=checkpointing,
    )
    policy = policy_of(config, tokenizer, CPU)
    batch = collate(hand_made(384))
    coefficients = torch.linspace(-1, 2, len(batch.lengths), dtype=torch.float64)
    (policy(batch).logps * coefficients).sum().backward()
    ours = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    policy.eval()  # transformers would recompute its blocks in fp32
    with ExactlyInFp64():
        logits = policy.causal_lm(input_ids=batch.input_ids).logits.flatten(0, 1)
    logits = logits[batch.predictor_positions]
    logps = logits.log_softmax(-1).gather(-1, batch.labels[:, None])[:, 0]
    (logps * coefficients.repeat_interleave(batch.lengths)).sum().backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-9, atol=1e-9)


def test_bf16_keeps_trained_weights_in_fp32(
    make_config: Callable[..., Config], tokenizer: PreTrainedTokenizerFast
) -> None:
    values = {**LLAMA, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = make_config(model={"init": "random", "config": values, "dtype": "bfloat16"})
    policy = policy_of(config, tokenizer, CPU)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    output = policy(collate(hand_made(384)[:1]))
    assert output.logps.dtype == torch.float32
    output.logps.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())


def test_entropy(make_config: Callable[..., Config], tokenizer: PreTrainedTokenizerFast) -> None:
    config = make_config(model__dtype="float64")
    policy = policy_of(config, tokenizer, CPU)
    batch = collate(hand_made(384))
    total, count = policy(batch, ForwardOptions(entropy=True)).entropy.tolist()
    with ExactlyInFp64():
        logits = policy.causal_lm(input_ids=batch.input_ids).logits.flatten(0, 1)
    logits = logits[batch.predictor_positions]
    expected = torch.distributions.Categorical(logits=logits).entropy().sum().item()
    assert count == len(batch.labels)
    assert total == pytest.approx(expected, abs=1e-9)


def test_adapters_train_alone_on_a_frozen_head(
    make_config: Callable[..., Config], tokenizer: PreTrainedTokenizerFast
) -> None:
    policy = policy_of(make_config(adapter={"name": "lora", "r": 2}), tokenizer, CPU)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    policy(collate(hand_made(384))).logps.sum().backward()
    assert policy.base.get_output_embeddings().weight.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"adapter": {"target_modules": ["lm_head"]}},
            "the head of LlamaForCausalLM must be a plain",
        ),
        ({"adapter": {"target_modules": ["no_such"]}}, "adapter.target_modules: cannot load"),
        ({"model": {"path": "no/such/model"}}, "model.path: cannot load no/such/model"),
        ({"model__tokenizer": "no/such/tok"}, "model.tokenizer: cannot load no/such/tok"),
        (
            {"model": {"init": "random", "config": {**LLAMA, "hiden_size": 8}}},
            "model.config.hiden_size: unknown key for llama; did you mean hidden_size?",
        ),
        (
            {"model": {"init": "random", "config": {**LLAMA, "model_type": "lama"}}},
            "model: cannot load",
        ),
        (
            {"model": {"init": "random", "config": {**LLAMA, "vocab_size": 300}}},
            "tokens but the embedding only 300 rows",
        ),
    ],
)
def test_a_model_that_cannot_be_trained(
    make_config: Callable[..., Config],
    tokenizer: PreTrainedTokenizerFast,
    change: dict[str, Any],
    message: str,
) -> None:
    config = make_config(**change)
    with pytest.raises(ModelError) as caught:
        policy_of(config, load_tokenizer(config.model) or tokenizer, CPU)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_head_that_the_op_does_not_know_is_refused(
    make_config: Callable[..., Config],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Simulated by removing the logit scale of Granite from the table."""
    monkeypatch.setattr(head_check, "head_options", lambda config: (1.0, None))
    values = {**LLAMA, "model_type": "granite", "logits_scaling": 3.0, "initializer_range": 0.5}
    config = make_config(model={"init": "random", "config": values, "dtype": "float32"})
    with pytest.raises(ModelError, match="GraniteForCausalLM computes its logits in a way"):
        policy_of(config, tokenizer, CPU)


def test_dropout_of_the_model_is_off(
    make_config: Callable[..., Config], tokenizer: PreTrainedTokenizerFast
) -> None:
    """The same weights must give policy and reference the same log-probs, also in training."""
    values = {"model_type": "gpt2", "vocab_size": 384, "n_embd": 16, "n_layer": 1, "n_head": 2}
    values["resid_pdrop"] = 0.5
    config = make_config(model={"init": "random", "config": values, "dtype": "float32"})
    policy = policy_of(config, tokenizer, CPU)
    assert policy.training
    batch = collate(hand_made(384))
    assert torch.equal(policy(batch).logps, policy(batch).logps)


def test_random_weights_are_a_function_of_the_seed(
    make_config: Callable[..., Config], tokenizer: PreTrainedTokenizerFast
) -> None:
    random = {"init": "random", "config": LLAMA, "dtype": "float32"}
    first, twin, other = (
        policy_of(make_config(model=random, training__seed=seed), tokenizer, CPU)
        for seed in (1, 1, 2)
    )
    weight = "causal_lm.lm_head.weight"
    assert torch.equal(first.state_dict()[weight], twin.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])


def test_the_policy_is_a_module_of_its_model(tiny_llama: str) -> None:
    causal_lm = AutoModelForCausalLM.from_pretrained(tiny_llama)
    policy = Policy(causal_lm, torch.float32)
    assert sum(p.numel() for p in policy.parameters()) == causal_lm.num_parameters()
    assert AutoConfig.from_pretrained(tiny_llama).vocab_size == 384
