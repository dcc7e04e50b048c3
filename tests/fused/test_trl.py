"""TRL's DPO trainer with our head beside itself: the same numbers, step after step."""

from __future__ import annotations

import gc
import importlib
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref import losses

trl = pytest.importorskip("trl")
from fastpref.fused.trl import FusedDPOMixin  # noqa: E402
from fastpref.fused.trl.setup import objective_of  # noqa: E402
from tests.helpers.trl_trainers import FusedDPOTrainer, history, trainers  # noqa: E402

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


@pytest.fixture
def make(tmp_path, tiny_llama, tokenizer):
    """A trainer of the tiny Llama, four pairs to a batch."""
    return trainers(tmp_path, tiny_llama, tokenizer)


def assert_same_history(ours, theirs):
    """Every logged number to 1e-4: fp32 log-probs of 30 nats, summed in another order, ten steps.

    `abs` is for those near 0: the mean logit, and rewards of the first step.
    """
    assert len(ours) == len(theirs) > 1
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - set(TIMES):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("config", "trainer"),
    [
        ({}, None),
        ({"beta": 0.5, "gradient_accumulation_steps": 2, "logging_steps": 3}, None),
        ({"precompute_ref_log_probs": True}, None),
        ({"sync_ref_model": True, "ref_model_sync_steps": 3}, None),
        ({"learning_rate": 1e-2}, lambda: {"peft_config": LoraConfig(**LORA)}),
        ({"gradient_checkpointing": False, "truncation_mode": "keep_end", "max_length": 16}, None),
    ],
    ids=["plain", "accumulation", "precomputed", "synced", "lora", "truncated"],
)
def test_ten_steps_are_those_of_trl(make, config, trainer):
    theirs, ours = (
        make(cls, trainer=trainer, **config) for cls in (trl.DPOTrainer, FusedDPOTrainer)
    )
    lines = history(ours), history(theirs)
    if "precompute_ref_log_probs" in config:  # in the first step margins are rounding errors
        for first, *_ in lines:
            assert abs(first["rewards/margins"]) <= 1e-6
            del first["rewards/accuracies"]
    elif "logging_steps" not in config:
        # By the same op, policy and reference agree to the last bit in the same batch.
        assert lines[0][0]["rewards/margins"] == 0
    assert_same_history(*lines)
    # Adam divides by the gradient's own size: 1e-5 of a weight's total way, 10 steps of lr.
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-3 * ours.args.learning_rate * 10)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_neox", "cohere"])
def test_softcap_tied_and_scaled_heads(make, tokenizer, kind):
    torch.manual_seed(0)
    options = {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.2,
        "max_position_embeddings": 128,
    }
    if kind == "gpt_neox":
        del options["num_key_value_heads"], options["head_dim"]
    if kind == "gemma2":
        options["final_logit_softcapping"] = 2.0  # strong enough to matter
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options))
    folder = str(make(trl.DPOTrainer).args.output_dir) + kind
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    theirs, ours = (
        history(make(cls, folder, max_steps=2)) for cls in (trl.DPOTrainer, FusedDPOTrainer)
    )
    assert_same_history(ours, theirs)


def test_training_on_of_an_adapter_compares_with_its_copy(make, tiny_llama):
    def adapted():
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(**LORA))
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # an adapter that does something
                weight.data.normal_(std=0.1)
        return model

    theirs, ours = (
        make(cls, adapted(), learning_rate=1e-2, max_steps=4)
        for cls in (trl.DPOTrainer, FusedDPOTrainer)
    )
    assert "ref" in ours.model.peft_config
    assert_same_history(history(ours), history(theirs))
    assert ours.state.log_history[0]["rewards/chosen"] == 0
    assert ours.state.log_history[-2]["rewards/margins"] > 0
    ref_adapter = [w for n, w in ours.model.named_parameters() if ".ref." in n]
    assert ref_adapter and not any(w.requires_grad for w in ref_adapter)


def test_a_reference_model_of_ones_own(make, tiny_llama):
    def other():
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        model.lm_head.weight.data.mul_(0.9)
        return {"ref_model": model}

    theirs, ours = (
        history(make(cls, trainer=other, max_steps=2)) for cls in (trl.DPOTrainer, FusedDPOTrainer)
    )
    assert_same_history(ours, theirs)
    assert ours[0]["rewards/chosen"] != 0


@pytest.mark.parametrize("objective", [losses.build("simpo", beta=2.0, gamma=0.5), "stapo"])
def test_other_objectives_train(make, objective):
    trainer = make(
        FusedDPOTrainer,
        trainer=lambda: {"objective": objective, "token_metrics": False},
        max_steps=20,
        learning_rate=3e-3,
    )
    lines = history(trainer)[:-1]
    assert sum(line["loss"] for line in lines[-5:]) < 0.8 * sum(line["loss"] for line in lines[:5])
    assert "entropy" not in lines[0] and "rewards/margins" in lines[0]
    trainer.compute_ref_log_probs = None  # these objectives have no reference to ask for
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_the_head_makes_logits_of_one_position_only(make):
    trainer = make(FusedDPOTrainer, max_steps=1)
    shapes = []
    for model in (trainer.model, trainer.ref_model):
        model.lm_head.register_forward_hook(lambda m, i, output: shapes.append(output.shape[:2]))
    trainer.train()
    assert shapes == [(8, 1)] * 2


def test_evaluation_is_that_of_trl(make):
    theirs, ours = (
        make(cls, per_device_eval_batch_size=3).evaluate()
        for cls in (trl.DPOTrainer, FusedDPOTrainer)
    )
    for result in (ours, theirs):
        for name in TIMES[1:]:
            result.pop(name.replace("train", "eval"))
        result.pop("eval_runtime")
    assert "eval_rewards/margins" in ours
    assert_same_history([ours] * 2, [theirs] * 2)


def test_precomputed_log_probs_are_ours(make, monkeypatch):
    asked = []
    real = FusedDPOMixin.compute_ref_log_probs

    def counted(self, model, batch):
        asked.append(len(batch["input_ids"]))
        return real(self, model, batch)

    monkeypatch.setattr(FusedDPOMixin, "compute_ref_log_probs", counted)
    # Data of its own, since TRL keeps the results of earlier trainers by dataset and model.
    trainer = make(FusedDPOTrainer, precompute_ref_log_probs=True, count=9, max_steps=1)
    assert sum(asked) == 2 * (9 + 6)
    trainer.train()
    assert sum(asked) == 2 * (9 + 6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("trl_dpo", ["--lora", "--lr", "3e-2"]),
        ("trl_dpo", ["--objective", "kto"]),
        ("hf_trainer", []),
    ],
)
def test_the_examples_learn(name, options, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    found = importlib.import_module(name).main(["--steps", "8", *options])
    assert len(found) == 8 and found[-1] < 0.9 * found[0]


@pytest.mark.parametrize("find_unused", [True, False])
def test_a_model_wrapped_for_data_parallel_training(make, tmp_path, find_unused):
    trainer = make(FusedDPOTrainer)
    batch = next(iter(trainer.get_train_dataloader()))
    plain = trainer.compute_loss(trainer.model, batch)
    plain.backward()
    grads = [w.grad.clone() for w in trainer.model.parameters()]
    trainer.model.zero_grad()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )

    def wrapped_loss() -> float:
        # The wrapper must die before its group: the last reference to a gloo group is safe to drop
        # in destroy_process_group alone, elsewhere it can wait for its threads for ever.
        wrapped = torch.nn.parallel.DistributedDataParallel(
            trainer.model, find_unused_parameters=find_unused
        )
        loss = trainer.compute_loss(wrapped, batch)
        loss.backward()
        return loss.item()

    try:
        assert wrapped_loss() == plain.item()
    finally:
        gc.collect()
        torch.distributed.destroy_process_group()
    for weight, grad in zip(trainer.model.parameters(), grads, strict=True):
        torch.testing.assert_close(weight.grad, grad)


def test_bf16_autocast_stays_near_fp32(make):
    """Hidden states of eight bits: log-probs of 30 nats within 2^-7 of those of fp32."""
    half, full = (history(make(FusedDPOTrainer, max_steps=1, bf16=b))[0] for b in (True, False))
    assert half["logps/chosen"] != full["logps/chosen"]
    assert half["logps/chosen"] == pytest.approx(full["logps/chosen"], rel=2**-7)
    assert half["rewards/chosen"] == half["rewards/rejected"] == 0


DPO = {"objective": "dpo"}
PROMPTS = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


@pytest.mark.parametrize(
    ("config", "trainer", "message"),
    [
        ({"loss_type": ["ipo"]}, DPO, r"args.loss_type: expected its default \['sigmoid'\]"),
        ({"label_smoothing": 0.1}, DPO, r"args.label_smoothing: .*objective decides"),
        ({"f_divergence_type": "forward_kl"}, DPO, r"args.f_divergence_type"),
        ({"use_weighting": True}, DPO, r"args.use_weighting"),
        ({"ld_alpha": 0.5}, DPO, r"args.ld_alpha"),
        ({"loss_weights": [2.0]}, DPO, r"args.loss_weights"),
        ({"beta": 0.3}, {"objective": losses.build("simpo")},
         r"args.beta: got 0.3, but the objective is SimPO"),
        ({"beta": 0.3}, {"objective": "ipo"}, r"args.beta: got 0.3, but the objective is"),
        ({}, {"objective": "kot"}, r"name: no objective is called 'kot'"),
        ({}, {"objective": 3}, r"objective: expected an objective or the name of one, got 3"),
        ({}, {"peft_config": LoraConfig(**{**LORA, "modules_to_save": ["lm_head"]})},
         r"model: the head of LlamaForCausalLM must be a plain linear layer"),
        ({}, {**DPO, "peft_config": PROMPTS}, r"prompt learning: not supported"),
        ({"precompute_ref_log_probs": True}, {"objective": "tdpo1"},
         r"args.precompute_ref_log_probs: TRL keeps sums of the pairs' log-probs"),
    ],
)  # fmt: skip
def test_what_is_refused(make, config, trainer, message):
    with pytest.raises(ValueError, match=message):
        make(FusedDPOTrainer, trainer=lambda: trainer, **config)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("is_deepspeed_enabled", r"DeepSpeed: not supported by FusedDPOTrainer; use one process"),
        ("is_fsdp_enabled", r"FSDP 1: not supported by FusedDPOTrainer; .* or FSDP2"),
    ],
)
def test_set_ups_that_are_refused(make, attribute, message):
    trainer = make(FusedDPOTrainer)
    setattr(trainer, attribute, True)
    with pytest.raises(ValueError, match=message):
        trainer._check_setup()


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        (
            "processing_class",
            r"processing_class \(vision-language models\): not supported by Fused",
        ),
        ("is_fsdp_enabled", r"FSDP: not supported by FusedDPOTrainer with objective=; use DPOConf"),
    ],
)
def test_set_ups_that_are_refused_with_an_objective(make, attribute, message):
    trainer = make(FusedDPOTrainer, trainer=lambda: DPO)
    del trainer.fused_loss  # made again at the next use, in a set-up that does not exist here
    setattr(trainer, attribute, True)
    with pytest.raises(ValueError, match=message):
        _ = trainer.fused_loss


def test_a_head_that_is_not_linear_is_refused(make, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="computes its logits in a way that the fused head"):
        make(FusedDPOTrainer, model)


def test_making_a_trainer_leaves_the_mode_of_the_model_alone(make):
    theirs, ours = (make(cls).model.training for cls in (trl.DPOTrainer, FusedDPOTrainer))
    assert ours == theirs


@pytest.mark.parametrize("trainer", [{}, DPO])
def test_outputs_of_a_further_forward_pass_are_returned(make, trainer):
    trainer = make(FusedDPOTrainer, trainer=lambda: trainer)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert loss.requires_grad
    assert outputs.logits.shape == (*batch["input_ids"].shape, len(trainer.model.lm_head.weight))


def test_compute_metrics_sees_the_logits(make):
    shapes = []

    def metrics(prediction):
        shapes.append(prediction.predictions.shape[::2])
        return {"scored": 1.0}

    trainer = make(
        FusedDPOTrainer, trainer=lambda: {**DPO, "compute_metrics": metrics},
        per_device_eval_batch_size=3,
    )  # fmt: skip
    assert trainer.evaluate()["eval_scored"] == 1.0
    assert shapes == [(12, len(trainer.model.lm_head.weight))]


def test_a_named_objective_takes_beta_of_the_config(make):
    trainer = make(FusedDPOTrainer, trainer=lambda: {"objective": "hinge"}, beta=0.3)
    assert trainer.fused_loss.loss == losses.build("hinge", beta=0.3)


def test_the_default_beta_of_the_config_is_not_dropped_without_a_word():
    with pytest.warns(
        UserWarning, match=r"args.beta: 0.1 is the default .*objective is SimPO\(beta="
    ):
        assert objective_of("simpo", 0.1) == losses.build("simpo")
