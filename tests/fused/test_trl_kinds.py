"""Objectives of every kind in TRL's DPO trainer, against full logits in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from fastpref import losses
from fastpref.dynamics.reward_calibration import RewardCalibration
from fastpref.logps import GroupedLogps, SequenceLogps, TokenLogps, UnpairedLogps

pytest.importorskip("trl")
from tests.helpers.trl_trainers import FusedDPOTrainer, history, trainers

NAMES = ["hinge", "kto", "bco", "pro_b", "info_nca", "pro_s", "tdpo2", "ti_dpo"]
OPTIONS = [{"ld_alpha": 0.5}, {"wpo": True}]  # of dpo
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def make(tmp_path, tiny_llama, tokenizer):
    """A trainer of the tiny Llama beside a reference that is another model."""
    made = trainers(tmp_path, tiny_llama, tokenizer)

    def make(objective, **config):
        reference = AutoModelForCausalLM.from_pretrained(tiny_llama)
        reference.lm_head.weight.data.mul_(0.8)
        further = {"objective": objective, "ref_model": reference}
        return made(FusedDPOTrainer, trainer=lambda: further, **config)

    return make


def responses(batch):
    """Token ids of each sequence without padding, and where its response begins."""
    real, scored = batch["attention_mask"].sum(1), batch["completion_mask"].sum(1)
    starts = (real - scored).tolist()
    return [(ids[:n], k) for ids, n, k in zip(batch["input_ids"], real, starts, strict=True)]


def distributions(model, sequences):
    """Log-probs (n, V) at the tokens of each response, from the logits of the sequence alone."""
    return [model(ids[None]).logits[0].log_softmax(-1)[start - 1 : -1] for ids, start in sequences]


def taken(log_p, sequences):
    return [
        p.gather(1, ids[start:, None])[:, 0]
        for p, (ids, start) in zip(log_p, sequences, strict=True)
    ]


def sums(model, sequences):
    return torch.stack([z.sum() for z in taken(distributions(model, sequences), sequences)])


def importance(model, ids, start):
    embeddings = model.get_input_embeddings()(ids[None]).detach().requires_grad_()
    largest = model(inputs_embeds=embeddings).logits[0, -1].max()
    return torch.autograd.grad(largest, embeddings)[0][0].abs().sum(-1)[start:]


def mismatched_mean(model, reference, sequences):
    """Every prompt with both responses of the next pair; no two prompts are alike."""
    pairs = len(sequences) // 2
    moved = []
    for s, (ids, start) in enumerate(sequences):
        other, begin = sequences[s // pairs * pairs + (s + 1) % pairs]
        moved.append((torch.cat([ids[:start], other[begin:]]), start))
    return (sums(model, moved) - sums(reference, moved)).mean().detach()


def plain(objective, model, reference, batch, point=None):
    """The objective's output for a batch of the trainer."""
    sequences = responses(batch)
    pairs = len(sequences) // 2
    p, q = distributions(model, sequences), distributions(reference, sequences)
    z, r = taken(p, sequences), taken([x.detach() for x in q], sequences)
    lengths = torch.tensor([len(x) for x in z])
    if isinstance(objective, losses.TokenLevelLoss):
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        policy = TokenLogps(
            torch.cat(z),
            offsets,
            kl=torch.cat([(b.exp() * (b - a)).sum(1) for a, b in zip(p, q, strict=True)]),
            importance=torch.cat([importance(model, *x) for x in sequences]),
            collision_entropy=torch.cat([-(2 * x.detach()).exp().sum(1).log() for x in p]),
        )
        return objective(policy, TokenLogps(torch.cat(r), offsets))
    z, r = (torch.stack([x.sum() for x in part]) for part in (z, r))
    if isinstance(objective, losses.PointwiseLoss):
        desirable = torch.arange(2 * pairs) < pairs
        policy, known = (UnpairedLogps(x, lengths, desirable) for x in (z, r))
        if objective.name == "kto":
            point = mismatched_mean(model, reference, sequences)
            assert abs(point) > 0.1
        return objective(policy, known, point)
    if isinstance(objective, losses.GroupwiseLoss):
        order = torch.arange(2 * pairs).view(2, pairs).T.flatten()
        rest = torch.arange(0, 2 * pairs + 1, 2), torch.tensor([1.0, 0.0]).repeat(pairs)
        policy, known = (GroupedLogps(x[order], lengths[order], *rest) for x in (z, r))
        return objective(policy, known)
    return objective(*(SequenceLogps.from_sequences(x, lengths) for x in (z, r)))


@pytest.mark.parametrize(
    "objective",
    [losses.build(name) for name in NAMES] + [losses.build("dpo", **o) for o in OPTIONS],
    ids=lambda objective: objective.name,
)
def test_the_first_step_is_that_of_full_logits_and_then_it_trains(make, objective):
    """fp32 log-probs of 50 nats: 1e-5 of the largest entry of a gradient, 1e-5 of the loss."""
    trainer = make(objective, learning_rate=3e-3, max_steps=6, gradient_checkpointing=False)
    batch = next(iter(trainer.get_train_dataloader()))
    model, reference = trainer.model.train(), trainer.ref_model
    weights = dict(model.named_parameters())
    loss = trainer.compute_loss(model, batch)
    point = torch.zeros(()) if objective.name == "bco" else None
    expected = plain(objective, model, reference, batch, point).loss.mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    mine, other = (torch.autograd.grad(x, [*weights.values()]) for x in (loss, expected))
    for name, a, b in zip(weights, mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item(), msg=name)
    lines = history(trainer)[:-1]
    assert lines[0].keys() > {"loss", "rewards/margins", "rewards/accuracies", "logps/chosen"}
    again = trainer.compute_loss(trainer.model, batch)
    after = plain(objective, model, reference, batch, point)
    if objective.name not in ("kto", "bco"):  # whose points have moved
        assert again < loss
        torch.testing.assert_close(again, after.loss.mean(), rtol=1e-4, atol=1e-5)


def test_bco_holds_rewards_against_those_of_the_steps_before(make):
    objective = losses.build("bco", beta=0.1)
    trainer = make(objective, gradient_accumulation_steps=2)
    trainer.model.train()
    batches = [batch for _, batch in zip(range(3), trainer.get_train_dataloader(), strict=False)]
    seen = []
    for number, batch in enumerate(batches):
        point = torch.cat(seen).mean() if number == 2 else torch.zeros(())
        expected = plain(objective, trainer.model, trainer.ref_model, batch, point)
        loss = trainer.compute_loss(trainer.model, batch)
        torch.testing.assert_close(loss, expected.loss.mean(), rtol=1e-5, atol=1e-6)
        seen.append(expected.rewards)
    assert abs(point) > 0.01


def test_kto_with_one_pair_to_a_batch(make):
    """Each prompt meets the responses of the batch before; the first batch's point is 0."""
    objective = losses.build("kto")
    trainer = make(objective, per_device_train_batch_size=1)
    trainer.model.train()
    loader = iter(trainer.get_train_dataloader())
    first, second = next(loader), next(loader)
    model, reference = trainer.model, trainer.ref_model
    for batch in (first, second):
        loss = trainer.compute_loss(model, batch)
        point = torch.zeros(())
        if batch is second:
            moved = [
                (torch.cat([ids[:start], other[begin:]]), start)
                for (ids, start), (other, begin) in zip(
                    responses(second), responses(first), strict=True
                )
            ]
            point = (sums(model, moved) - sums(reference, moved)).mean().detach()
        sequences = responses(batch)
        z, r = sums(model, sequences), sums(reference, sequences)
        lengths = batch["completion_mask"].sum(1)
        policy, known = (UnpairedLogps(x, lengths, torch.tensor([True, False])) for x in (z, r))
        expected = objective(policy, known, point).loss.mean()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert point != 0


@pytest.mark.parametrize("name", ["kto", "tdpo2", "ti_dpo"])
def test_adapters_are_off_for_the_reference(name, tmp_path, tiny_llama, tokenizer):
    """With gradient checkpointing, which is TRL's default."""
    trainer = trainers(tmp_path, tiny_llama, tokenizer)(
        FusedDPOTrainer,
        trainer=lambda: {"objective": name, "peft_config": LoraConfig(**LORA)},
        learning_rate=3e-2,
        max_steps=8,
    )
    lines = history(trainer)[:-1]
    assert lines[0]["rewards/chosen"] == lines[0]["rewards/rejected"] == 0
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize(
    ("objective", "calibration"), [("bco", None), ("ti_dpo", RewardCalibration)]
)
def test_averages_are_resumed(objective, calibration, tmp_path, tiny_llama, tokenizer):
    def trainer():
        further = {"objective": objective, "calibration": calibration and calibration()}
        make = trainers(tmp_path, tiny_llama, tokenizer)
        return make(
            FusedDPOTrainer, trainer=lambda: further, max_steps=4, save_strategy="steps",
            save_steps=2,
        )  # fmt: skip

    straight = trainer()
    lines = history(straight)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    found = [line["loss"] for line in resumed.state.log_history if "loss" in line]
    assert found[-2:] == pytest.approx([line["loss"] for line in lines[2:4]], rel=1e-6)
    states = (t.fused_loss.averages() for t in (straight, resumed))
    torch.testing.assert_close(*states, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("objective", ["kto", "tdpo2", losses.build("dpo", ld_alpha=0.5)])
def test_sums_alone_are_refused_where_they_are_not_enough(make, objective):
    with pytest.raises(ValueError, match=r"args.precompute_ref_log_probs: TRL keeps sums"):
        make(objective, precompute_ref_log_probs=True)


@pytest.mark.parametrize("name", ["bco", "nca"])
def test_precomputed_sums_are_those_of_the_reference(make, name):
    """The pairs are taken apart and put together in the same order as the reference's sums."""
    count = {"bco": 13, "nca": 14}[name]  # data of its own: TRL keeps the results of others
    first, second = (
        history(make(name, count=count, max_steps=2, precompute_ref_log_probs=p))[0]
        for p in (True, False)
    )
    for metric in ("loss", "rewards/chosen", "rewards/rejected"):
        assert first[metric] == pytest.approx(second[metric], rel=1e-5, abs=1e-6)
