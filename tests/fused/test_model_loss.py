"""A model in, a loss out: the numbers of full logits, and refusals by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from fastpref import losses
from fastpref.fused import FusedPreferenceLoss, ModelLoss
from fastpref.fused.head_call import through_head
from fastpref.model import head_check
from tests.helpers.model_losses import (
    full_dpo,
    full_logps,
    gradients,
    pairs,
    reference_of,
    tiny,
)

LORA = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Gradients in fp32, to 1e-5 of the largest entry of any."""
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=1e-5 * largest)


def expected(model: Any, reference: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of DPO by full logits."""
    with torch.no_grad():
        ref_logps = full_logps(reference.eval(), pairs())
    loss = full_dpo(full_logps(model, pairs()), ref_logps)
    return loss.detach(), gradients(model, loss)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma2", {"head_dim": 8}),  # caps its logits
        ("cohere", {}),  # scales them
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),  # calls its decoder, not its base
        ("phi", {}),  # has a bias
    ],
)
def test_loss_and_gradients_are_those_of_full_logits(kind: str, options: dict[str, Any]) -> None:
    model = tiny(kind, **options).eval()
    reference = reference_of(model)
    loss, metrics = ModelLoss(model, "dpo", reference=reference)(model, **pairs())
    ours = gradients(model, loss)
    value, theirs = expected(model, reference)
    torch.testing.assert_close(loss.detach(), value, rtol=1e-5, atol=0)
    assert_close(ours, theirs)
    assert metrics["logps/chosen"] < 0 and model.lm_head(torch.zeros(1, 1, 32)).shape[-1] == 384


def test_the_auxiliary_loss_of_experts_is_added() -> None:
    model = tiny("mixtral", num_local_experts=4, output_router_logits=True)
    ref_logps = torch.zeros(4)
    loss, metrics = ModelLoss(model, "dpo")(model, **pairs(), ref_logps=ref_logps)
    ours = gradients(model, loss)
    batch = pairs()
    del batch["labels"]
    auxiliary = model(**batch).aux_loss
    whole = full_dpo(full_logps(model, pairs()), ref_logps) + 0.001 * auxiliary
    torch.testing.assert_close(metrics["aux_loss"], auxiliary.detach())
    assert model.config.router_aux_loss_coef == 0.001
    assert_close(ours, gradients(model, whole))


def test_an_adapter_is_trained_and_its_base_is_the_reference() -> None:
    model = get_peft_model(tiny(), LoraConfig(init_lora_weights=False, lora_dropout=0.0, **LORA))
    trained = [p for p in model.parameters() if p.requires_grad]
    loss, _ = ModelLoss(model, "dpo", reference="adapter")(model, **pairs())
    assert [p for p in model.parameters() if p.requires_grad] == trained
    ours = gradients(model, loss)
    with torch.no_grad(), model.disable_adapter():
        ref_logps = full_logps(model, pairs())
    theirs = full_dpo(full_logps(model, pairs()), ref_logps)
    assert theirs.item() != pytest.approx(0.6931, abs=1e-3)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert_close(ours, gradients(model, theirs))


@pytest.mark.parametrize("objective", [losses.build("dpo", ld_alpha=0.3), losses.build("tdpo2")])
def test_token_level_objectives_see_the_tokens_of_the_reference(objective: Any) -> None:
    model = tiny()
    reference = reference_of(model)
    loss, _ = ModelLoss(model, objective, reference=reference)(model, **pairs())
    ours = gradients(model, loss)
    hidden, ref_hidden = (
        m.model(pairs()["input_ids"], attention_mask=pairs()["attention_mask"]).last_hidden_state
        for m in (model, reference)
    )
    theirs, _ = FusedPreferenceLoss(objective)(
        hidden, model.lm_head.weight, pairs()["labels"], shift=True,
        ref_hidden=ref_hidden.detach(), ref_weight=reference.lm_head.weight.detach(),
    )  # fmt: skip
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert_close(ours, gradients(model, theirs))


class _Detached(nn.Module):
    """Wrapper whose output has lost the graph of the model's logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        return self.model(**inputs).logits.detach() + 0 * self.model.lm_head.weight.sum()


class _Checkpointed(_Detached):
    """Wrapper that checkpoints the call of the whole model, without a graph inside."""

    def forward(self, **inputs: Any) -> Tensor:
        ids = inputs.pop("input_ids")
        logits: Tensor = torch.utils.checkpoint.checkpoint(
            lambda ids: self.model(input_ids=ids, **inputs).logits, ids, use_reentrant=True
        )
        return logits


class Bigrams(nn.Module):
    """A model that is not of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.output = nn.Embedding(384, 16), nn.Linear(16, 384, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.output(self.embedding(tokens))
        return logits.float()


def _checkpointed(reentrant: bool) -> Callable[[Any], Any]:
    def wrap(model: Any) -> Any:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model.train()

    return wrap


@pytest.mark.parametrize(
    "wrap",
    [
        _checkpointed(reentrant=True),
        _checkpointed(reentrant=False),
        lambda model: model.eval(),
    ],
    ids=["reentrant", "checkpointed", "eval"],
)
def test_wrapped_models_have_the_same_gradients(wrap: Callable[[Any], Any]) -> None:
    model = tiny()
    reference = reference_of(model)
    value, theirs = expected(model, reference)
    preference_loss = ModelLoss(model, "dpo", reference=reference)
    wrapper = wrap(model)
    for _ in range(2):
        loss, _ = preference_loss(wrapper, **pairs())
        assert loss.item() == pytest.approx(value.item(), rel=1e-5)
        assert_close(gradients(model, loss), theirs)


def test_gradients_of_a_function_of_losses_are_right_each_time() -> None:
    model = tiny()
    preference_loss = ModelLoss(model, "simpo")
    first, second = (preference_loss(model, **pairs(seed))[0] for seed in (0, 1))
    ours = gradients(model, 3 * first + first * second)
    first, second = (preference_loss(model, **pairs(seed))[0] for seed in (0, 1))
    (first * (3 + second.detach()) + second * first.detach()).backward(retain_graph=True)
    assert_close(ours, {name: p.grad / 2 for name, p in model.named_parameters()})
    with torch.no_grad():
        alone, _ = preference_loss(model, **pairs())
    assert not alone.requires_grad and alone.item() == pytest.approx(first.item(), rel=1e-6)


def test_gradients_of_gradients_pass_through_the_model() -> None:
    model = tiny(attn_implementation="eager")
    inputs = {"input_ids": pairs()["input_ids"]}
    weights = [model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight]

    def penalty(loss: Tensor) -> Tensor:
        slopes = torch.autograd.grad(loss, weights, create_graph=True)
        return loss * sum(slope.square().sum() for slope in slopes)

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return (hidden @ weight.T).tanh().mean()

    loss, _ = through_head(model, model.lm_head, compute, inputs)
    ours = gradients(model, penalty(loss))
    assert_close(ours, gradients(model, penalty(model(**inputs).logits.tanh().mean())))
    loss, _ = ModelLoss(model, "simpo")(model, **pairs())
    with pytest.raises(RuntimeError, match="linear_logps: its gradient has no derivative"):
        penalty(loss)


def test_autocast_reaches_the_head() -> None:
    model = tiny()
    preference_loss = ModelLoss(model, "simpo")
    exact, _ = preference_loss(model, **pairs())
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = preference_loss(model, **pairs())
    assert loss.dtype == torch.float32
    assert 0 < abs(loss.item() - exact.item()) < 0.02


@pytest.mark.parametrize("backend", [None, "eager"])
def test_any_module_with_its_head(backend: str | None) -> None:
    """Compiled, too, also where the model has run before."""
    model, batch = Bigrams(), pairs()
    preference_loss = ModelLoss(model, "simpo", head=model.output)
    wrapper = model if backend is None else torch.compile(model, backend=backend)
    logits = wrapper(batch["input_ids"])
    theirs, _ = FusedPreferenceLoss("simpo")(
        model.embedding(batch["input_ids"]), model.output.weight, batch["labels"], shift=True
    )
    theirs = gradients(model, theirs)
    for _ in range(2):
        loss, _ = preference_loss(wrapper, tokens=batch["input_ids"], labels=batch["labels"])
        assert_close(gradients(model, loss), theirs)
    torch.testing.assert_close(wrapper(batch["input_ids"]), logits)


def test_a_scale_before_the_head_is_told_from_one_after_it(monkeypatch: Any) -> None:
    monkeypatch.setattr(head_check, "head_options", lambda config: (0.25, None))
    assert ModelLoss(tiny(), "simpo").head.options["logit_scale"] == 1.0
    assert (
        ModelLoss(tiny("granite", logits_scaling=4.0), "simpo").head.options["logit_scale"] == 0.25
    )


def test_a_model_without_weights_is_checked_at_the_first_call(monkeypatch: Any) -> None:
    with torch.device("meta"):
        model = tiny()
    preference_loss = ModelLoss(model, "simpo")
    assert not preference_loss.head.is_checked
    model.to_empty(device="cpu")
    model.load_state_dict(tiny().state_dict())
    model.model.rotary_emb = tiny().model.rotary_emb
    preference_loss(model, **pairs())
    assert preference_loss.head.is_checked


def _with_hook(model: Any) -> Any:
    model.lm_head.forward = model.lm_head.forward  # as accelerate's hooks do
    return model


def _lora(**options: Any) -> Any:
    return get_peft_model(tiny(), LoraConfig(**LORA | options))


def _shared(model: Any) -> ModelLoss:
    return ModelLoss(model, "dpo", reference=model)


def _not_finite(model: Any) -> Any:
    nn.init.constant_(model.model.norm.weight, float("nan"))
    return model


def _prompts() -> Any:
    return get_peft_model(tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def _t5() -> Any:
    sizes = {"d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=384, **sizes))


class _Alongside(LlamaForCausalLM):
    """A model with a layer alongside its head, zero at first as a new adapter, or a factor."""

    scales = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        hidden = self.model(kwargs["input_ids"]).last_hidden_state
        output.logits = (
            output.logits * self.factor
            if self.scales
            else (output.logits + self.factor * hidden @ torch.ones(32, 384))
        )
        return output


def _alongside(scales: bool) -> Any:
    model = _Alongside(tiny().config)
    model.scales = scales
    model.factor = nn.Parameter(torch.tensor(float(scales)))
    return model


PEFT = "must be a plain linear layer, got peft"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelLoss(nn.Linear(2, 2), "dpo"), "expected a causal language model of transf"),
        (lambda: ModelLoss(nn.DataParallel(tiny()), "dpo"), "DataParallel is not supported"),
        (lambda: ModelLoss(_lora(target_modules=["lm_head"]), "dpo"), f"{PEFT}.Linear"),
        (lambda: ModelLoss(_lora(modules_to_save=["lm_head"]), "dpo"), f"{PEFT}.ModulesToSave"),
        (lambda: ModelLoss(_with_hook(tiny()), "dpo"), "has replaced the forward pass of the head"),
        (lambda: ModelLoss(_not_finite(tiny()), "dpo"), "LlamaForCausalLM are not finite"),
        (lambda: ModelLoss(_alongside(scales=False), "dpo"), "are not those of its head alone"),
        (lambda: ModelLoss(_alongside(scales=True), "dpo"), "depend on parameters outside of its"),
        (lambda: ModelLoss(_prompts(), "dpo"), "PromptTuningConfig puts tokens before the seq"),
        (lambda: ModelLoss(tiny("bert"), "dpo"), "BertLMHeadModel is not causal"),
        (
            lambda: ModelLoss(_t5(), "dpo"),
            "expected a causal language model of transformers, got T5",
        ),
        (lambda: _shared(tiny()), "reference: has the layers of the model itself"),
        (lambda: ModelLoss(tiny(), "dpo", reference="base"), "expected a model or .adapter., got"),
        (lambda: ModelLoss(tiny(), "dpo", reference="adapter"), "needs a model of peft, got Llama"),
        (
            lambda: ModelLoss(_lora(init_lora_weights="pissa"), "dpo", reference="adapter"),
            "init_lora_weights='pissa' changed the weights of the base",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_at_construction(
    make: Callable[[], Any], message: str
) -> None:
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        warnings.simplefilter("ignore")
        make()


def test_logits_of_another_form_are_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(head_check, "head_options", lambda config: (1.0, 30.0))
    with pytest.raises(ValueError, match="LlamaForCausalLM computes its logits in a way that"):
        ModelLoss(tiny(), "dpo")


@pytest.mark.parametrize(
    ("wrap", "given", "message"),
    [
        (lambda m: m, {}, "ref_logps: dpo needs a reference"),
        (lambda m: m, {"preferences": torch.ones(2)}, "preferences: neither an input of LlamaForC"),
        (lambda m: m, {"logits_to_keep": 1}, "logits_to_keep: the loss needs the hidden states"),
        (lambda m: reference_of(m), {"ref_logps": torch.zeros(4)}, "calls the head 0 times in a"),
        (nn.DataParallel, {"ref_logps": torch.zeros(4)}, "DataParallel is not supported"),
        (_Detached, {"ref_logps": torch.zeros(4)}, "do not depend on its head"),
        (_Checkpointed, {"ref_logps": torch.zeros(4)}, "do not depend on its head"),
    ],
)
def test_what_cannot_be_done_is_refused_in_the_call(
    wrap: Callable[[Any], Any], given: dict[str, Any], message: str
) -> None:
    model = tiny()
    preference_loss = ModelLoss(model, "dpo")
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        warnings.simplefilter("ignore")
        preference_loss(wrap(model), **pairs(), **given)
    assert "forward" not in vars(model.lm_head)


def test_an_adapter_that_comes_to_the_head_later_is_refused() -> None:
    model = tiny()
    preference_loss = ModelLoss(model, "simpo")
    adapted = get_peft_model(model, LoraConfig(**LORA | {"target_modules": ["lm_head"]}))
    with pytest.raises(ValueError, match="model: LlamaForCausalLM has got another head"):
        preference_loss(adapted, **pairs())


def test_precomputed_log_probs_and_a_reference_are_refused_together() -> None:
    model = tiny()
    preference_loss = ModelLoss(model, "dpo", reference=reference_of(model))
    with pytest.raises(ValueError, match="ref_logps: passed together with reference="):
        preference_loss(model, **pairs(), ref_logps=torch.zeros(4))


def test_ranks_without_a_wrapper_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = tiny()
    preference_loss = ModelLoss(model, "simpo")
    with pytest.warns(UserWarning, match="2 ranks, but they have no process group"):
        preference_loss(model, **pairs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preference_loss(model, **pairs())
