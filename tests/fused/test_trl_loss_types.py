"""Losses of TRL's trainers on fastpref's head: the first step is that of TRL alone."""

from __future__ import annotations

import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

trl = pytest.importorskip("trl")
from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: E402

from fastpref.fused.trl import fused  # noqa: E402
from tests.helpers.data import labelled, rows  # noqa: E402

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
# Losses of TRL, and attributes of its trainer that change them.
CASES = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {"ld_alpha": 0.5},
    "sigmoid bco_pair sft": {"loss_weights": [0.8, 0.2, 1.0]},
    "sigmoid ": {"f_divergence_type": "js_divergence", "beta": 0.3, "use_weighting": True},
    "hinge ": {"f_divergence_type": "alpha_divergence"},
}
PLAIN = {
    "beta": 0.1,
    "label_smoothing": 0.0,
    "loss_weights": [1.0],
    "f_divergence_type": "reverse_kl",
    "use_weighting": False,
    "ld_alpha": None,
}


@pytest.fixture
def make(tmp_path, tiny_llama, tokenizer):
    """A trainer of the tiny Llama, or of another model, four examples to a batch."""

    def make(cls, config_class=trl.DPOConfig, model=tiny_llama, data=None, trainer=None, **config):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args = config_class(
                output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, use_cpu=True,
                bf16=False, report_to=[], max_length=64, seed=3, logging_steps=1,
                **{"save_strategy": "no", "disable_tqdm": True, "max_steps": 1, **config},
            )  # fmt: skip
            return cls(
                model=model() if callable(model) else model, args=args,
                train_dataset=Dataset.from_list(data or rows(8)), processing_class=tokenizer,
                **(trainer() if trainer else {}),
            )  # fmt: skip

    return make


def first_step(trainer):
    """Loss and gradients of the first batch; the policy is another model than the reference."""
    for name, weight in trainer.model.named_parameters():
        if "lm_head" in name or "lora_B" in name:
            torch.manual_seed(0)
            weight.data.add_(0.1 * torch.randn(weight.shape))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    trained = {n: w for n, w in trainer.model.named_parameters() if w.requires_grad}
    grads = torch.autograd.grad(loss, [*trained.values()], allow_unused=True)
    return loss.detach(), dict(zip(trained, grads, strict=True))


def assert_same_step(ours, theirs):
    """To 1e-5 of the loss and of the largest entry of each gradient, fp32.

    Some gradients are 0 but for rounding, which is relative to the largest of all.
    """
    largest = max(g.abs().max().item() for g in theirs[1].values() if g is not None)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        mine = ours[1][name]
        if expected is None:
            assert mine is None, name
            continue
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            mine, expected, rtol=0, atol=1e-5 * scale + 1e-6 * largest, msg=name
        )


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_every_loss_of_dpo_is_that_of_trl(make, lora):
    adapter = (lambda: {"peft_config": LoraConfig(**LORA)}) if lora else None
    classes = fused(trl.DPOTrainer), trl.DPOTrainer
    pair = [make(cls, trainer=adapter, use_weighting=True) for cls in classes]
    for names, options in CASES.items():
        for trainer in pair:
            vars(trainer).update({**PLAIN, **options}, loss_types=names.split())
        assert_same_step(*(first_step(trainer) for trainer in pair))


def test_kto_is_that_of_trl(make):
    ours, theirs = (
        make(cls, trl.KTOConfig, data=labelled(8))
        for cls in (fused(trl.KTOTrainer), trl.KTOTrainer)
    )
    assert_same_step(first_step(ours), first_step(theirs))
    mine, other = (trainer.train() and trainer.state.log_history[0] for trainer in (ours, theirs))
    assert mine.keys() == other.keys()
    for name in mine:
        assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("trainer", "config", "options"),
    [
        (CPOTrainer, CPOConfig, {}),
        (CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0, "alpha": 0.1}),
        (ORPOTrainer, ORPOConfig, {}),
    ],
    ids=["cpo", "alphapo", "orpo"],
)
def test_trainers_without_a_reference_are_those_of_trl(make, tiny_llama, trainer, config, options):
    def model():
        return AutoModelForCausalLM.from_pretrained(tiny_llama)

    ours, theirs = (make(cls, config, model, **options) for cls in (fused(trainer), trainer))
    assert_same_step(first_step(ours), first_step(theirs))
    mine, other = (each.train() and each.state.log_history[0] for each in (ours, theirs))
    assert mine.keys() == other.keys()
    for name in mine:
        assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


def test_an_encoder_and_a_decoder_train_without_a_reference(make):
    def model():
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "t5", vocab_size=384, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
            dropout_rate=0.0,
        )  # fmt: skip
        config.decoder_start_token_id = 2
        return AutoModelForSeq2SeqLM.from_config(config)

    ours, theirs = (make(cls, ORPOConfig, model) for cls in (fused(ORPOTrainer), ORPOTrainer))
    assert_same_step(first_step(ours), first_step(theirs))


def small(kind, **options):
    """A model of an architecture with weights of a standard deviation of 0.2."""
    values = {
        "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 128, "initializer_range": 0.2, "init_std": 0.2,
    }  # fmt: skip

    def build():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values | options))

    return build


OPT = small("opt", word_embed_proj_dim=16, ffn_dim=64, dropout=0.0)
MIXTURE = small("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                head_dim=16, num_key_value_heads=2)  # fmt: skip


@pytest.mark.parametrize("objective", [None, "dpo"], ids=["loss_type", "objective"])
@pytest.mark.parametrize("model", [OPT, MIXTURE], ids=["opt", "mixture"])
def test_other_architectures_train(make, model, objective):
    """OPT calls its decoder, and a mixture of experts has an auxiliary loss."""

    def reference():
        return {"ref_model": model()}

    def ours():
        return {**reference(), "objective": objective}

    mine, other = (
        make(cls, model=model, trainer=arguments)
        for cls, arguments in ((fused(trl.DPOTrainer), ours), (trl.DPOTrainer, reference))
    )
    assert mine.aux_loss_enabled == (model is MIXTURE)
    assert_same_step(first_step(mine), first_step(other))
    mine.train()
    assert ("aux_loss" in mine.state.log_history[0]) == mine.aux_loss_enabled


def test_prompt_learning_trains_with_a_loss_type(make):
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ours, theirs = (
        make(cls, trainer=lambda: {"peft_config": prompts}, gradient_checkpointing=False)
        for cls in (fused(trl.DPOTrainer), trl.DPOTrainer)
    )
    assert_same_step(first_step(ours), first_step(theirs))


@pytest.mark.parametrize(
    ("trainer", "config"), [(trl.DPOTrainer, trl.DPOConfig), (ORPOTrainer, ORPOConfig)]
)
def test_metrics_of_tokens_are_left_out_where_they_are_turned_off(
    make, tiny_llama, trainer, config
):
    ours = make(
        fused(trainer), config, lambda: AutoModelForCausalLM.from_pretrained(tiny_llama),
        trainer=lambda: {"token_metrics": False},
    )  # fmt: skip
    ours.train()
    line = ours.state.log_history[0]
    assert "rewards/margins" in line
    assert not {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"} & line.keys()


def test_the_forward_pass_without_labels_is_that_of_the_model(make):
    trainer = make(fused(trl.DPOTrainer))
    model, ids = trainer.model, torch.arange(5, 15).unsqueeze(0)
    plain = type(model).forward(model, ids).logits
    torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 12)


def test_a_model_of_an_earlier_trainer_gets_the_head_of_the_new_one(make, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for trainer, config in ((trl.DPOTrainer, trl.DPOConfig), (ORPOTrainer, ORPOConfig)):
        ours = make(fused(trainer), config, lambda: model)
        assert ours.policy_head.fields == ours._logged_fields
        assert ours.policy_head is ours.policy_head


def test_fused_takes_trainers_of_trl_only():
    class Mine(trl.DPOTrainer):
        pass

    once = fused(Mine)
    assert once.__name__ == "FusedMine" and issubclass(once, Mine) and fused(once) is once
    with pytest.raises(ValueError, match=r"trainer: expected DPOTrainer, .*got RewardT"):
        fused(trl.RewardTrainer)
    with pytest.raises(ValueError, match=r"trainer: expected DPOTrainer, .*got 3"):
        fused(3)
