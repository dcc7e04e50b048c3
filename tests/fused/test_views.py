"""Objectives of every kind on hidden states, against full logits in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastpref import losses
from fastpref.dynamics.reward_calibration import RewardCalibration
from fastpref.fused import FusedPreferenceLoss
from fastpref.logps import GroupedLogps, SequenceLogps, TokenLogps, UnpairedLogps
from fastpref.losses.pointwise import RunningMean, sum_and_count
from tests.helpers import rank_processes
from tests.helpers.fused_batches import batch, gradients, packed

POINT = torch.tensor(0.7, dtype=torch.float64)
DESIRABLE = torch.tensor([True, False, False, True, True, False])
GROUPS = torch.tensor([0, 1, 4, 4, 6])  # one response, three, none, two
SCORES = torch.tensor([0.3, 0.1, 0.9, 0.4, 0.0, 1.0], dtype=torch.float64)
PREFERENCE = torch.tensor([0.7, 0.5, 1.0], dtype=torch.float64)

OBJECTIVES = [losses.build(name) for name in losses.names()] + [
    losses.build("dpo", ld_alpha=0.3),
    losses.build("simpo", wpo=True),
    losses.build("dpo", ld_alpha=0.5, wpo="unaligned"),
    losses.build("tdpo2", wpo="sampled"),
    losses.build("ti_dpo", weights="one_minus_p"),
]


def per_token(seed):
    return torch.rand(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distributions(hidden, weight, labels, head):
    """Log-probs (T, V) of the scored tokens, by full logits."""
    logits = head["logit_scale"] * hidden[labels != -100] @ weight.T
    return (head["softcap"] * torch.tanh(logits / head["softcap"])).log_softmax(-1)


HEAD = {"logit_scale": 0.8, "softcap": 6.0}


def given_to(objective):
    """The arguments of the objective's kind, as they stand in a padded batch."""
    if isinstance(objective, losses.PointwiseLoss):
        point = {"reference_point": POINT} if objective.name == "kto" else {}
        return {"desirable": DESIRABLE, **point}
    if isinstance(objective, losses.GroupwiseLoss):
        return {"cu_groups": GROUPS, "scores": SCORES}
    given = {"preference": PREFERENCE} if objective.soft_labels else {}
    if isinstance(objective, losses.TokenLevelLoss):
        given["token_weights"] = per_token(1)
        if "importance" in objective.columns:
            given["importance"] = per_token(2)
    return given


def plain(objective, hidden, weight, labels, reference):
    """Policy, reference and their output, from full logits."""
    chosen = labels[labels != -100]
    p, q = (distributions(*model, labels, HEAD) for model in ((hidden, weight), reference))
    z, r = (x.gather(1, chosen[:, None])[:, 0] for x in (p, q.detach()))
    lengths = (labels != -100).sum(1)
    given = given_to(objective)
    if isinstance(objective, losses.TokenLevelLoss):
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        at = {name: x[labels != -100] for name, x in given.items() if name != "preference"}
        policy = TokenLogps(
            z, offsets, given.get("preference"), at["token_weights"],
            (q.exp() * (q - p)).sum(1), at.get("importance"),
            -(2 * p.detach()).exp().sum(1).log(),
        )  # fmt: skip
        known = TokenLogps(r, offsets)
        return policy, known, objective(policy, known)
    sums, known = (torch.stack([y.sum() for y in x.split(lengths.tolist())]) for x in (z, r))
    if isinstance(objective, losses.PointwiseLoss):
        policy = UnpairedLogps(sums, lengths, DESIRABLE)
        known = replace(policy, logps=known)
        point = {"kto": POINT, "bco": 0 * POINT}.get(objective.name)
        return policy, known, objective(policy, known, point)
    if isinstance(objective, losses.GroupwiseLoss):
        policy = GroupedLogps(sums, lengths, GROUPS, SCORES)
        known = replace(policy, logps=known)
        return policy, known, objective(policy, known)
    policy = SequenceLogps.from_sequences(sums, lengths, given.get("preference"))
    known = SequenceLogps.from_sequences(known, lengths)
    return policy, known, objective(policy, known)


def arguments_in(form, objective, hidden, labels, ref_hidden, ref_weight):
    """Labels, reference and the rest as the module takes them, and how to pick hidden states."""
    given = given_to(objective)
    if form == "padded":
        return (lambda h: h), [labels], {"ref_hidden": ref_hidden, "ref_weight": ref_weight} | given
    kept = labels != -100 if form == "packed" else torch.ones_like(labels, dtype=torch.bool)
    rows, targets, cu_seqlens = packed(ref_hidden, labels, kept)
    given |= {n: x[kept] for n, x in given.items() if n in ("token_weights", "importance")}
    reference = {"ref_hidden": rows, "ref_weight": ref_weight}
    return (lambda h: h[kept]), [targets, cu_seqlens], reference | given


@pytest.mark.parametrize("form", ["padded", "packed", "packed with ignored tokens"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_every_objective_equals_full_logits(objective, form):
    """fp64 on both sides, so 1e-9 is all that another order of sums of 100 nats may cost."""
    hidden, weight, labels = batch()
    ref_hidden, ref_weight, _ = batch(seed=1)
    rows, positional, given = arguments_in(form, objective, hidden, labels, ref_hidden, ref_weight)
    module = FusedPreferenceLoss(objective, **HEAD)

    def ours(hidden, weight):
        return module(rows(hidden), weight, *positional, **given)[0]

    def theirs(hidden, weight):
        return plain(objective, hidden, weight, labels, (ref_hidden, ref_weight))[2].loss.mean()

    made, expected = (gradients(run, hidden, weight) for run in (ours, theirs))
    for mine, other in zip(made, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9 * other.abs().max().item())


@pytest.mark.parametrize("name", ["tdpo2", "ti_dpo"])
def test_what_is_given_per_token_is_shifted_with_the_labels(name):
    hidden, weight, labels = batch()
    objective = losses.build(name)
    given = given_to(objective) | {"ref_hidden": hidden + 1, "ref_weight": weight}
    moved = {
        n: torch.nn.functional.pad(x[:, :-1], (1, 0)) if n in ("token_weights", "importance") else x
        for n, x in given.items()
    }
    labels[:, -1] = -100  # which no hidden state predicts once it is shifted
    ahead = torch.nn.functional.pad(labels[:, :-1], (1, 0), value=-100)
    module = FusedPreferenceLoss(objective)
    expected = module(hidden, weight, labels, **given)
    assert module(hidden, weight, ahead, shift=True, **moved) == expected
    kept = torch.ones_like(labels, dtype=torch.bool)
    rows, targets, cu_seqlens = packed(hidden, ahead, kept)
    flat = {n: x.flatten(0, 1) if n in ("token_weights", "importance") else x
            for n, x in moved.items()}  # fmt: skip
    flat["ref_hidden"] = rows + 1
    assert module(rows, weight, targets, cu_seqlens, shift=True, **flat) == expected


def test_reference_log_probs_per_token():
    hidden, weight, labels = batch()
    ref_hidden, ref_weight, _ = batch(seed=1)
    objective = losses.build("dpo", ld_alpha=0.3)
    _, reference, output = plain(objective, hidden, weight, labels, (ref_hidden, ref_weight))
    known = torch.full(labels.shape, torch.nan, dtype=torch.float64)
    known[labels != -100] = reference.logps
    loss, metrics = FusedPreferenceLoss(objective, **HEAD)(
        hidden, weight, labels, ref_token_logps=known, **given_to(objective)
    )
    torch.testing.assert_close(loss, output.loss.mean())
    torch.testing.assert_close(metrics["rewards/chosen"], output.chosen_rewards.mean())


def test_metrics_of_single_responses_and_of_groups():
    hidden, weight, labels = batch()
    reference = batch(seed=1)[:2]
    given = dict(zip(("ref_hidden", "ref_weight"), reference, strict=True))
    for name in ("kto", "nca"):
        objective = losses.build(name)
        policy, _, output = plain(objective, hidden, weight, labels, reference)
        _, metrics = FusedPreferenceLoss(objective, **HEAD)(
            hidden, weight, labels, **given, **given_to(objective)
        )
        rewards, logps = output.rewards, policy.logps
        if name == "kto":
            good, bad = DESIRABLE, ~DESIRABLE
            right = ((rewards > 0) == DESIRABLE).double()
            right[1] = 0.5  # an empty response has reward 0, which is neither
        else:  # groups 1 and 3; that of one response and the empty one have no order
            good, bad = torch.tensor([2, 5]), torch.tensor([1, 4])
            right = torch.stack([rewards[2] > rewards[[1, 3]].max(), rewards[5] > rewards[4]])
        expected = {
            "rewards/chosen": rewards[good].mean(),
            "rewards/rejected": rewards[bad].mean(),
            "rewards/accuracies": right.double().mean(),
            "rewards/margins": rewards[good].mean() - rewards[bad].mean(),
            "logps/chosen": logps[good].mean(),
            "logps/rejected": logps[bad].mean(),
        }
        torch.testing.assert_close(metrics, expected)


def test_bco_compares_with_the_mean_of_the_rewards_of_earlier_steps():
    """Two calls make a step; evaluation takes nothing in; the mean goes on from a state dict."""
    hidden, weight, labels = batch()
    hidden.requires_grad_()
    objective = losses.build("bco", beta=0.2)
    module = FusedPreferenceLoss(objective, accumulation_steps=2)
    mean = RunningMean()
    for step in range(3):
        seen = []
        for part in range(2):
            ref_logps = -torch.rand(6, dtype=torch.float64) * (1 + step + part)
            given = {"ref_logps": ref_logps, "desirable": DESIRABLE}
            with torch.no_grad():
                module(hidden, weight, labels, **given)
            module.eval()(hidden, weight, labels, **given)
            loss, _ = module.train()(hidden, weight, labels, **given)
            logps = _sums(hidden.detach(), weight, labels)
            policy = UnpairedLogps(logps, (labels != -100).sum(1), DESIRABLE)
            output = objective(policy, replace(policy, logps=ref_logps), mean.mean)
            torch.testing.assert_close(loss.detach(), output.loss.mean())
            seen.append(sum_and_count(output.rewards, policy.lengths))
        mean.update(torch.stack(seen).sum(0))
    assert mean.mean != 0
    again = FusedPreferenceLoss("bco")
    again.load_state_dict(module.state_dict())
    torch.testing.assert_close(again.mean_reward.mean, mean.mean)
    assert again.mean_reward.count == 6 * 5  # sequence 1 is empty


def rank_of_two(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(averages_after(rank), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def averages_after(*batches):
    """Averages of two modules after one optimizer step of these batches."""
    steps = {"accumulation_steps": len(batches)}
    modules = (
        FusedPreferenceLoss("bco", **steps),
        FusedPreferenceLoss("dpo", RewardCalibration(), **steps),
    )
    for seed in batches:
        hidden, weight, labels = batch(seed=seed)
        given = {"ref_logps": torch.full((6,), -1.0 - seed, dtype=torch.float64)}
        for module, labelled in zip(modules, ({"desirable": DESIRABLE}, {}), strict=True):
            module(hidden.requires_grad_(), weight, labels, **given, **labelled)
    return [module.averages() for module in modules]


def test_averages_of_two_ranks_are_those_of_one(tmp_path):
    rank_processes.start(rank_of_two, 2, str(tmp_path))
    expected = averages_after(0, 1)
    assert expected[0]["mean"] != 0 and expected[1]["averages"].isfinite().all()
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)


def _sums(hidden, weight, labels):
    at = labels.clamp(min=0)[..., None]
    logps = (hidden @ weight.T).log_softmax(-1).gather(-1, at)[..., 0]
    return logps.masked_fill(labels == -100, 0.0).sum(1)


@pytest.mark.parametrize("options", [{"ld_alpha": 0.3}, {}], ids=["tokens", "sequences"])
def test_calibration_of_tokens_is_that_of_their_pairs(options):
    """After a first step, gradients of chosen tokens are multiplied and those of rejected divided.

    By what factor is worked out with the averages of one step of equal pairs: A = (r* / r)^(1/2).
    """
    hidden, weight, labels = batch(pairs=1, length=6)
    labels = torch.arange(12).view(2, 6) % 5
    labels[1, 4:] = -100
    objective = losses.build("dpo", **options)
    rows = hidden.requires_grad_()
    ref = {"ref_hidden": hidden.detach() + 0.1, "ref_weight": weight}

    def gradient(module):
        loss, _ = module(rows, weight, labels, **ref)
        return torch.autograd.grad(loss, rows)[0]

    plain_gradient = gradient(FusedPreferenceLoss(objective))
    module = FusedPreferenceLoss(objective, RewardCalibration(momentum=0.0))
    torch.testing.assert_close(gradient(module), plain_gradient)  # no averages yet
    ratio = gradient(module) / plain_gradient
    factor = _factor(hidden.detach(), weight, labels, options.get("ld_alpha", 1.0))
    torch.testing.assert_close(ratio[0], torch.full_like(ratio[0], factor))
    torch.testing.assert_close(ratio[1, :4], torch.full_like(ratio[1, :4], 1 / factor))


def _factor(hidden, weight, labels, alpha):
    """A of one pair of 6 and 4 tokens, of which the two beyond count alpha times."""
    weight = weight.clone().requires_grad_()
    logps = (hidden @ weight.T).log_softmax(-1)
    at = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    counts = torch.ones_like(at)
    counts[0, 4:], counts[1, 4:] = alpha, 0.0
    chosen, rejected = (
        torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (counts * at).sum(1)
    )
    # d_w is a mean over the tokens of the response, and the weights of tokens have mean 1.
    mean = counts[0].mean()
    r, r_star = mean, rejected.norm() / (chosen.norm() / mean)
    return (r_star / r).sqrt().item()
