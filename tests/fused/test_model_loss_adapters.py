"""The base of an adapted model as the reference, where weights of the base train, too."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from fastpref.fused import ModelLoss
from tests.helpers.model_losses import pairs, tiny

LORA = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("trained", "options"),
    [
        ("lm_head.weight", {}),
        ("embed_tokens.weight", {"tie_word_embeddings": True}),
        ("mlp.up_proj.weight", {}),
        ("q_proj.base_layer.bias", {"attention_bias": True}),
    ],
)
def test_weights_of_the_base_that_train_are_refused(trained: str, options: dict[str, Any]) -> None:
    model: Any = get_peft_model(tiny(**options), LoraConfig(**LORA))
    preference_loss = ModelLoss(model, "dpo", reference="adapter")
    for name, parameter in model.named_parameters():
        if name.endswith(trained):
            parameter.requires_grad_(True)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=rf"because .*{trained} belongs to the base and train"):
        preference_loss(model, **pairs())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_copies_of_weights_that_train_leave_the_base_as_it_is() -> None:
    config = LoraConfig(**LORA, modules_to_save=["norm"], trainable_token_indices=[5, 6])
    model: Any = get_peft_model(tiny(), config)
    loss, _ = ModelLoss(model, "dpo", reference="adapter")(model, **pairs())
    loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert any("trainable_tokens_delta" in name for name in trained)
    assert any("norm.modules_to_save" in name for name in trained)
