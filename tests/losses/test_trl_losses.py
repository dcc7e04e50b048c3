"""The losses of TRL 1.16's trainers on the same log-probs as ours: values and gradients.

TRL computes a loss inside a method of its trainer, so a namespace stands in for the trainer and a
function that returns given log-probs for the model. All in fp64, except where TRL cannot; 1e-6
because `exo_pair` and `alpha_divergence` round to fp32 on the way.

Where TRL differs, and which of ours gives its numbers:

    sigmoid         ignores label_smoothing: `dpo`; with it, `cdpo`
    ipo             is the form averaged over tokens: `ipo_avg`; the paper's is `ipo`
    rewards         are beta * t whatever the loss; ours are the objective's, which differ from that
                    for ipo, sft and sigmoid_norm
    sft             is a mean over the chosen tokens of the batch; `sft` one over each response, so
                    they agree where all chosen responses have one length
    use_weighting   has no bound of 1 on the weight of a pair; `wpo` has, as its authors do
    alpha_divergence  caps its exponent at 80
    CPO, ORPO       the nll is a mean over the chosen tokens of the batch, in ORPO also over those
                    of the prompt; `cpo` sums it over the response, `orpo` averages it there
    CPO simpo       smoothes labels with gamma on both sides; `simpo` reverses the pair before
    CPO hinge, ipo  are ours with a reference of zeros; alpha (AlphaPO) has no counterpart
    apo_zero_unpaired  is `kto` at reference point 0, whose rewards it has
    KTO's kl        is the mean over one mismatched response a row; `kto` takes any estimate
"""

from __future__ import annotations

import ast
import math
from collections import defaultdict
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fastpref import losses
from fastpref.logps import SequenceLogps, UnpairedLogps
from fastpref.losses.token_level import TokenLevelLoss
from fastpref.losses.wrappers import ld_weights
from tests.helpers.token_pairs import token_batch

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL announces that trainers are experimental

UNEQUAL = ([1, 5, 3, 7], [4, 5, 6, 2])
EQUAL = ([5, 5, 5, 5], [4, 5, 6, 2])

# TRL's loss_type: our objective, and how to make it from TRL's beta and label_smoothing.
DPO_TYPES = {
    "sigmoid": lambda beta, e: losses.build("dpo", beta=beta),
    "hinge": lambda beta, e: losses.build("hinge", beta=beta),
    "ipo": lambda beta, e: losses.build("ipo_avg", tau=beta),
    "exo_pair": lambda beta, e: losses.build("exo_pair", beta=beta, label_smoothing=e),
    "nca_pair": lambda beta, e: losses.build("nca_pair", beta=beta),
    "robust": lambda beta, e: losses.build("robust", beta=beta, label_smoothing=e),
    "bco_pair": lambda beta, e: losses.build("bco_pair", beta=beta),
    "sppo_hard": lambda beta, e: losses.build("sppo_hard", beta=beta),
    "aot": lambda beta, e: losses.build("aot", beta=beta, label_smoothing=e),
    "aot_unpaired": lambda beta, e: losses.build("aot_unpaired", beta=beta, label_smoothing=e),
    "apo_zero": lambda beta, e: losses.build("apo_zero", beta=beta),
    "apo_down": lambda beta, e: losses.build("apo_down", beta=beta),
    "discopop": lambda beta, e: losses.build("discopop", beta=beta, tau=0.2),
    "sft": lambda beta, e: losses.build("sft"),
    "sigmoid_norm": lambda beta, e: losses.build("dpo_norm", beta=beta),
}
DIVERGENCES = {
    "forward_kl": {"f_divergence": "forward_kl"},
    "js_divergence": {"f_divergence": "js"},
    "alpha_divergence": {"f_divergence": "alpha", "f_alpha": 0.3},
}


def padded(values, policy):
    """(T,) -> (2B, L), 0 beyond the end of a response."""
    parts = values.split(policy.lengths.tolist())
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)


def accelerator():
    same = {"gather": lambda x: x, "gather_for_metrics": lambda x: x}
    return SimpleNamespace(device=torch.device("cpu"), **same)


def model_of(logps, collision_entropy=None):
    """A model whose log-probs (2B, L) are given; one prompt token comes before."""
    nothing = torch.zeros_like(logps)
    squares = nothing if collision_entropy is None else -collision_entropy
    return lambda **inputs: SimpleNamespace(
        log_probs=logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(),
        log_sum_sq_probs=squares,
    )  # fmt: skip


def batch_of(policy):
    scored = padded(torch.ones_like(policy.logps), policy).long()
    mask = torch.nn.functional.pad(scored, (1, 0))
    return {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}


def dpo_of_trl(policy, reference, loss_type, beta=0.1, label_smoothing=0.0, **options):
    """TRL's loss, and its rewards (mean chosen, mean rejected)."""
    settings = {
        "model": SimpleNamespace(training=False), "accelerator": accelerator(),
        "aux_loss_enabled": False, "ld_alpha": None, "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.3, "beta": beta,
        "label_smoothing": label_smoothing, "loss_types": [loss_type], "loss_weights": [1.0],
        "args": SimpleNamespace(discopop_tau=0.2), "use_weighting": False,
        "_metrics": {"eval": defaultdict(list)}, "_total_train_tokens": 0, **options,
    }  # fmt: skip
    trainer = SimpleNamespace(**settings)
    sums = _weighted(reference, trainer.ld_alpha)
    inputs = batch_of(policy) | {
        "ref_chosen_logps": sums.chosen,
        "ref_rejected_logps": sums.rejected,
    }
    model = model_of(padded(policy.logps, policy), padded(policy.collision_entropy, policy))
    loss = trl.DPOTrainer._compute_loss(trainer, model, inputs, False)
    found = trainer._metrics["eval"]
    return loss, [found[f"rewards/{side}"][0] for side in ("chosen", "rejected")]


def _weighted(reference, ld_alpha):
    """The reference's sums, as TRL precomputes them."""
    if ld_alpha is None:
        return reference.sequences()
    return reference.sequences(ld_weights(reference.logps, reference.cu_seqlens, ld_alpha))


def ours(objective, policy, reference):
    if isinstance(objective, TokenLevelLoss):
        return objective(policy, reference)
    return objective(policy.sequences(), reference.sequences())


def assert_same(objective, policy, reference, theirs, tolerance=1e-6):
    """Mean loss and its gradient with respect to the log-probs of the tokens."""
    results = []
    for run in (lambda p: ours(objective, p, reference).loss.mean(), theirs):
        leaf = policy.logps.detach().clone().requires_grad_()
        loss = run(replace(policy, logps=leaf))
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    for mine, other in zip(*results, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * scale)


def test_every_loss_type_of_trl_is_here():
    policy, reference = token_batch(lengths=UNEQUAL)
    with pytest.raises(ValueError, match="Unknown loss type") as refusal:
        dpo_of_trl(policy, reference, "none such")
    listed = str(refusal.value).partition("Should be one of ")[2]
    assert set(ast.literal_eval(listed)) == set(DPO_TYPES)


@pytest.mark.parametrize("loss_type", DPO_TYPES)
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo(loss_type, beta):
    policy, reference = token_batch(lengths=EQUAL if loss_type == "sft" else UNEQUAL)
    smoothing = 0.1 if loss_type in ("exo_pair", "robust", "aot", "aot_unpaired") else 0.0
    objective = DPO_TYPES[loss_type](beta, smoothing)
    assert_same(
        objective, policy, reference,
        lambda p: dpo_of_trl(p, reference, loss_type, beta, smoothing)[0],
    )  # fmt: skip
    if loss_type not in ("ipo", "sft", "sigmoid_norm"):  # whose rewards here are not beta * t
        output = ours(objective, policy, reference)
        _, rewards = dpo_of_trl(policy, reference, loss_type, beta, smoothing)
        for mine in (output.chosen_rewards, output.rejected_rewards):
            assert mine.mean().item() == pytest.approx(rewards.pop(0), rel=1e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "exo_pair", "robust", "discopop"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_dpo_with_another_divergence(loss_type, divergence):
    """TRL's alpha divergence is not for fp64 and computes in fp32: ours, too, then."""
    dtype = torch.float32 if divergence == "alpha_divergence" else torch.float64
    policy, reference = token_batch(lengths=UNEQUAL, dtype=dtype)
    plain = DPO_TYPES[loss_type](0.2, 0.1)
    settings = losses.config_of(plain) | DIVERGENCES[divergence]
    assert_same(
        losses.from_config(settings), policy, reference,
        lambda p: dpo_of_trl(p, reference, loss_type, 0.2, 0.1, f_divergence_type=divergence)[0],
        1e-6 if dtype == torch.float64 else 3e-6,
    )  # fmt: skip


@pytest.mark.parametrize("loss_type", ["sigmoid", "nca_pair", "sigmoid_norm"])
@pytest.mark.parametrize("ld_alpha", [0.0, 0.4])
def test_dpo_with_length_desensitization(loss_type, ld_alpha):
    policy, reference = token_batch(lengths=UNEQUAL)
    settings = losses.config_of(DPO_TYPES[loss_type](0.2, 0.0)) | {"ld_alpha": ld_alpha}
    assert_same(
        losses.from_config(settings), policy, reference,
        lambda p: dpo_of_trl(p, reference, loss_type, 0.2, ld_alpha=ld_alpha)[0],
    )  # fmt: skip


def test_dpo_with_weighted_pairs():
    policy, reference = token_batch(lengths=UNEQUAL)
    objective = losses.build("dpo", wpo=True)
    weighted = lambda p: dpo_of_trl(p, reference, "sigmoid", use_weighting=True)[0]  # noqa: E731
    unlike = replace(policy, collision_entropy=policy.collision_entropy.clamp(max=0.01))
    assert (objective.pair_weights(unlike) < 1).all()
    assert_same(objective, unlike, reference, weighted)
    like = replace(policy, collision_entropy=policy.collision_entropy + 3)  # beyond the bound
    assert weighted(like) > 1.5 * ours(objective, like, reference).loss.mean()


def test_dpo_with_weighted_loss_types():
    policy, reference = token_batch(lengths=EQUAL)
    types = {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    parts = [{"name": n, "weight": w} for n, w in zip(("dpo", "bco_pair", "sft"), (0.8, 0.2, 1.0),
                                                      strict=True)]  # fmt: skip
    parts[1]["beta"] = 0.1
    assert_same(
        losses.from_config(parts), policy, reference,
        lambda p: dpo_of_trl(p, reference, "sigmoid", **types)[0],
    )  # fmt: skip


def test_where_dpo_differs():
    policy, reference = token_batch(lengths=UNEQUAL)
    smoothed, plain = (dpo_of_trl(policy, reference, "sigmoid", label_smoothing=e)[0]
                       for e in (0.3, 0.0))  # fmt: skip
    assert smoothed == plain
    cdpo = ours(losses.build("cdpo", label_smoothing=0.3), policy, reference).loss.mean()
    assert abs(cdpo - plain) > 1e-3
    sft = dpo_of_trl(policy, reference, "sft")[0]
    chosen = policy.logps[: policy.cu_seqlens[policy.pairs]]
    torch.testing.assert_close(sft, -chosen.mean())
    assert abs(ours(losses.build("sft"), policy, reference).loss.mean() - sft) > 1e-2


def kto_of_trl(policy, reference, mismatched, loss_type, beta=0.1, weights=(1.0, 1.0)):
    """TRL's loss of single responses: (S,) log-probs, and log-ratios of mismatched ones."""
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=accelerator(), aux_loss_enabled=False,
        precompute_ref_logps=True, calculate_KL=loss_type == "kto", loss_type=loss_type, beta=beta,
        desirable_weight=weights[0], undesirable_weight=weights[1], _total_train_tokens=0,
        _metrics={"eval": defaultdict(list)}, _compute_kl_logps=lambda model, batch: mismatched,
    )  # fmt: skip
    mask = torch.tensor([[0, 1]]).expand(len(policy.logps), 2)
    inputs = {
        "input_ids": mask, "attention_mask": mask, "completion_mask": mask,
        "label": policy.desirable, "ref_logps": reference.logps,
        "ref_KL_logps": torch.zeros_like(mismatched),
    }  # fmt: skip
    return trl.KTOTrainer._compute_loss(trainer, model_of(policy.logps[:, None]), inputs, False)


@pytest.mark.parametrize("shift", [2.0, -3.0])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(loss_type, shift):
    """`shift` moves the estimate of the divergence above and below 0, where it is cut off."""
    g = torch.Generator().manual_seed(0)
    z, noise = (torch.randn(7, generator=g, dtype=torch.float64) for _ in range(2))
    desirable = torch.tensor([True, False, True, True, False, False, True])
    weights = (1.3, 0.6) if loss_type == "kto" else (1.0, 1.0)
    policy = UnpairedLogps((10 * z - 40).requires_grad_(), torch.full((7,), 9), desirable)
    reference = replace(policy, logps=(policy.logps + 5 * noise).detach())
    mismatched = noise + shift
    options = dict(zip(("desirable_weight", "undesirable_weight"), weights, strict=True))
    point = mismatched.mean() if loss_type == "kto" else torch.zeros(())
    mine = losses.build("kto", beta=0.3, **options)(policy, reference, point).loss.mean()
    other = kto_of_trl(policy, reference, mismatched, loss_type, 0.3, weights)
    torch.testing.assert_close(mine, other, rtol=1e-6, atol=0)
    gradients = (torch.autograd.grad(x, policy.logps)[0] for x in (mine, other))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_every_loss_type_of_kto_is_here():
    (option,) = (field for field in fields(trl.KTOConfig) if field.name == "loss_type")
    assert option.metadata["choices"] == ["kto", "apo_zero_unpaired"]


def unpaired_trainer(name, **settings):
    module = pytest.importorskip(f"trl.experimental.{name.lower()}")
    cls = getattr(module, f"{name}Trainer")
    trainer = SimpleNamespace(
        accelerator=accelerator(), aux_loss_enabled=False, alpha=0.0, label_smoothing=0.0,
        **settings,
    )  # fmt: skip
    for method in ("cpo_loss", "odds_ratio_loss"):
        if hasattr(cls, method):
            setattr(trainer, method, partial(getattr(cls, method), trainer))
    return cls, trainer


def whole_loss(name, policy, nll, averaged, **settings):
    """CPO's or ORPO's loss with its nll, from log-probs of the tokens."""
    cls, trainer = unpaired_trainer(name, **settings)
    pairs = policy.sequences()
    chosen, rejected = pairs.chosen, pairs.rejected
    if averaged:
        chosen, rejected = chosen / pairs.chosen_lengths, rejected / pairs.rejected_lengths
    logits = torch.zeros(1)
    trainer.concatenated_forward = lambda model, batch: (chosen, rejected, logits, logits, nll)
    return cls.get_batch_loss_metrics(trainer, None, {}, "train")[0]


def batch_nll(policy):
    """The mean over all chosen tokens of the batch."""
    return -policy.logps[: policy.cu_seqlens[policy.pairs]].mean()


CPO_TYPES = {  # with a reference of zeros where ours has one
    "sigmoid": (losses.build("cpo", beta=0.3, lam=0), False),
    "hinge": (losses.build("hinge", beta=0.3), False),
    "ipo": (losses.build("ipo_avg", tau=0.3), True),
    "simpo": (losses.build("simpo", beta=0.3, gamma=0.7), True),
}


@pytest.mark.parametrize("loss_type", CPO_TYPES)
def test_cpo(loss_type):
    policy, _ = token_batch(lengths=UNEQUAL)
    objective, averaged = CPO_TYPES[loss_type]
    zeros = replace(policy, logps=torch.zeros_like(policy.logps))
    assert_same(
        objective, policy, zeros,
        lambda p: whole_loss("CPO", p, torch.zeros(()), averaged, loss_type=loss_type, beta=0.3,
                             simpo_gamma=0.7, cpo_alpha=1.0),
    )  # fmt: skip


def test_every_loss_type_of_cpo_is_here():
    policy, _ = token_batch(lengths=UNEQUAL)
    with pytest.raises(ValueError, match="Unknown loss type") as refusal:
        whole_loss("CPO", policy, torch.zeros(()), False, loss_type="?", beta=1.0, cpo_alpha=0.0)
    assert set(ast.literal_eval(str(refusal.value).partition("one of ")[2])) == set(CPO_TYPES)


@pytest.mark.parametrize("averages", [False, True], ids=["cpo", "cpo_simpo"])
def test_cpo_with_its_likelihood(averages):
    """All chosen responses have n = 5 tokens, so the mean over the batch is the sum / n."""
    policy, reference = token_batch(lengths=EQUAL)
    if averages:
        objective = losses.build("cpo_simpo", beta=2.0, gamma=0.7, lam=0.4)
    else:
        objective = losses.build("cpo", beta=2.0, lam=0.4 / 5)
    kind = "simpo" if averages else "sigmoid"
    settings = {"loss_type": kind, "beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.4}
    assert_same(
        objective, policy, reference,
        lambda p: whole_loss("CPO", p, batch_nll(p), averages, **settings),
    )  # fmt: skip
    uneven, _ = token_batch(lengths=UNEQUAL)
    theirs = whole_loss("CPO", uneven, batch_nll(uneven), averages, **settings)
    assert abs(ours(objective, uneven, uneven).loss.mean() - theirs) > 1e-3


def test_orpo():
    policy, reference = token_batch(lengths=EQUAL)
    objective = losses.build("orpo", lam=0.3)
    assert_same(
        objective, policy, reference,
        lambda p: whole_loss("ORPO", p, batch_nll(p), True, beta=0.3).double(), 3e-6,
    )  # fmt: skip
    uneven, _ = token_batch(lengths=UNEQUAL)
    theirs = whole_loss("ORPO", uneven, batch_nll(uneven), True, beta=0.3)
    assert abs(ours(objective, uneven, uneven).loss.mean() - theirs) > 1e-3


def test_label_smoothing_of_simpo_differs_by_its_margin():
    """-(1 - e) LS(u - gamma) - e LS(gamma - u) there, -(1 - e) LS(u - gamma) - e LS(-u - gamma)
    here."""
    pair = SequenceLogps(*(torch.tensor([x], dtype=torch.float64) for x in (-6.0, -9.0)),
                         torch.tensor([3]), torch.tensor([3]))  # fmt: skip
    cls, trainer = unpaired_trainer("CPO", loss_type="simpo", beta=2.0, simpo_gamma=0.7)
    trainer.label_smoothing = 0.2
    theirs = cls.cpo_loss(trainer, pair.chosen / 3, pair.rejected / 3)[0].item()
    mine = losses.build("simpo", beta=2.0, gamma=0.7, label_smoothing=0.2)(pair).loss.item()

    def nls(x):
        return math.log1p(math.exp(-x))

    assert theirs == pytest.approx(0.8 * nls(2 - 0.7) + 0.2 * nls(0.7 - 2))
    assert mine == pytest.approx(0.8 * nls(2 - 0.7) + 0.2 * nls(-2 - 0.7))
