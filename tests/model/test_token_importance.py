"""Gradient attribution against a plain backward pass of each sequence."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref.model.token_importance import token_importance


def model(kind="llama", **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=37, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.2, **options,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).double()


def alone(causal_lm, ids):
    """||dM/dE_t||_1 of one sequence without padding, from the model's own logits."""
    embeddings = causal_lm.get_input_embeddings()(ids[None]).detach().requires_grad_()
    largest = causal_lm(inputs_embeds=embeddings).logits[0, -1].max()
    return torch.autograd.grad(largest, embeddings)[0][0].abs().sum(-1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {}), ("gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8})],
)
def test_it_is_that_of_each_sequence_alone(kind, options):
    """Right-padded rows of 6, 1 and 4 tokens; capped logits are compared by shares only."""
    causal_lm = model(kind, **options)
    ids = torch.randint(37, (3, 6), generator=torch.Generator().manual_seed(1))
    lengths = (6, 1, 4)
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
    importance = token_importance(causal_lm, ids, mask)
    for row, values, length in zip(ids, importance, lengths, strict=True):
        expected = alone(causal_lm, row[:length])
        assert not values[length:].any() and expected.all()
        if options:
            values, expected = values / values.sum(), expected / expected.sum()
        torch.testing.assert_close(values[:length], expected)


def test_parameters_get_no_gradient_and_hooks_are_gone():
    causal_lm = model()
    ids = torch.arange(1, 5)[None]
    with torch.no_grad():
        importance = token_importance(causal_lm, ids, torch.ones_like(ids))
    assert not importance.requires_grad
    assert all(weight.grad is None for weight in causal_lm.parameters())
    assert not causal_lm.get_input_embeddings()._forward_hooks
