"""Common parts of all objectives: soft labels, reference, incentives, names and parameters."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest
import torch

from fastpref import losses
from fastpref.logps import GroupedLogps, SequenceLogps, TokenLogps, UnpairedLogps
from fastpref.losses import (
    anchored,
    base,
    batchwise,
    groupwise,
    margin,
    normalized,
    on_policy,
    pointwise,
    token_level,
)
from fastpref.losses.margin import DPO, PMO
from fastpref.losses.normalized import SimPO
from tests.helpers.pairs import assert_close, batch
from tests.helpers.token_pairs import token_batch

OBJECTIVES = [
    objective
    for objective in map(losses.build, losses.names())
    if isinstance(objective, losses.PairwiseLoss)
]
NEEDS_REFERENCE = [objective for objective in OBJECTIVES if objective.needs_reference]
REFERENCE_FREE = [objective for objective in OBJECTIVES if not objective.needs_reference]
REFERENCE_FREE.append(PMO(alpha=0.5, beta=0))
every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
every_soft_objective = pytest.mark.parametrize(
    "objective", [objective for objective in OBJECTIVES if objective.soft_labels], ids=repr
)


@every_soft_objective
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_a_soft_label_weighs_both_orders_of_the_pair(objective, p):
    policy, reference = batch()
    forward = objective(policy, reference).loss
    backward = objective(policy.swapped(), reference.swapped()).loss
    soft = objective(batch(soft=p)[0], reference).loss
    torch.testing.assert_close(soft, p * forward + (1 - p) * backward, rtol=1e-14, atol=1e-14)


@every_soft_objective
def test_swapping_the_pair_and_the_label_changes_nothing(objective):
    policy, reference = batch(soft=0.3)
    out = objective(policy, reference)
    swapped = objective(policy.swapped(), reference.swapped())
    torch.testing.assert_close(swapped.loss, out.loss, rtol=1e-14, atol=1e-14)
    assert torch.equal(swapped.chosen_rewards, out.rejected_rewards)
    assert torch.equal(swapped.rejected_rewards, out.chosen_rewards)


@pytest.mark.parametrize("objective", NEEDS_REFERENCE, ids=repr)
def test_a_missing_reference_says_what_to_do(objective):
    policy, _ = batch(pairs=3)
    assert objective.needs_reference
    with pytest.raises(ValueError, match=rf"{objective.name} needs.*`reference: cached`"):
        objective(policy, None)
    one, _ = batch(pairs=1)
    with pytest.raises(ValueError, match=r"reference: expected 3 pairs.*\(1,\)"):
        objective(policy, one)


@pytest.mark.parametrize("objective", REFERENCE_FREE, ids=repr)
def test_a_reference_that_is_not_needed_is_not_read(objective):
    policy, _ = batch(soft=0.3)
    nan = dataclasses.replace(
        policy, chosen=policy.chosen * math.nan, rejected=policy.rejected * math.nan
    )
    assert not objective.needs_reference
    assert torch.equal(objective(policy, nan).loss, objective(policy).loss)


def test_no_gradient_reaches_the_reference():
    policy, reference = batch()
    for side in (policy.chosen, policy.rejected, reference.chosen, reference.rejected):
        side.requires_grad_()
    DPO()(policy, reference).loss.sum().backward()
    assert policy.chosen.grad is not None and policy.rejected.grad is not None
    assert reference.chosen.grad is None and reference.rejected.grad is None


@every_objective
def test_nothing_waits_for_the_device(objective):
    """Meta tensors hold no values, so reading one back, as a host sync would, raises."""
    policy, reference = (
        SequenceLogps.from_sequences(
            torch.empty(8, device="meta"),
            torch.empty(8, dtype=torch.int64, device="meta"),
            torch.empty(4, device="meta") if objective.soft_labels else None,
        )
        for _ in range(2)
    )
    assert objective(policy, reference).loss.shape == (4,)
    assert losses.incentives(objective, policy, reference)[0].shape == (4,)


def test_incentives_work_under_no_grad_and_leave_the_batch_alone():
    policy, reference = batch()
    with torch.no_grad():
        d_w, d_l = losses.incentives(DPO(), policy, reference)
    assert (d_w > 0).all() and torch.equal(d_w, d_l)
    assert not d_w.requires_grad and not policy.chosen.requires_grad


def test_incentives_of_every_kind():
    """Closed forms at t = 0: beta / 2 for DPO; w * y * beta / 4 for KTO; beta * (q - 1/N)."""
    zeros, ones = torch.zeros(2, dtype=torch.float64), torch.ones(2)
    pairs = SequenceLogps(zeros, zeros, ones, ones)
    d_w, d_l = losses.incentives(losses.build("dpo", beta=0.5), pairs, pairs)
    assert d_w.tolist() == d_l.tolist() == [0.25, 0.25]
    single = UnpairedLogps(zeros, ones, torch.tensor([True, False]))
    kto = losses.build("kto", beta=0.5, undesirable_weight=2.0)
    d = losses.incentives(kto, single, single, torch.tensor(0.0))
    assert d.tolist() == [0.125, -0.25]
    scores = torch.tensor([1.0, 0.0])
    group = GroupedLogps(zeros, ones, torch.tensor([0, 2]), scores)
    d = losses.incentives(losses.build("info_nca", beta=0.5), group, group)
    assert d.tolist() == [0.25, -0.25]
    tokens = TokenLogps(zeros, torch.tensor([0, 1, 2]), kl=zeros)
    d = losses.incentives(losses.build("tdpo2", beta=0.5), tokens, tokens)
    assert d.tolist() == [0.25, -0.25]


TOKEN_LEVEL = [
    {"name": "tdpo1"},
    {"name": "tdpo2", "beta": 0.7},
    {"name": "ti_dpo"},
    {"name": "ti_dpo", "weights": "one_minus_p", "beta": 1.0},
    {"name": "simpo", "ld_alpha": 0.3, "wpo": True},
    # Under a hard label tokens of one response pull in both directions.
    [
        {"name": "tdpo2"},
        {"name": "sft", "responses": "both", "average": False, "ld_alpha": 0.2, "weight": 0.2},
    ],
]


@pytest.mark.parametrize("config", TOKEN_LEVEL, ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_pair_incentives_make_the_gradient_of_a_model(config, soft):
    """-grad L of a linear softmax model, against d_w * S_w - d_l * S_l with weighted scores S."""
    objective = losses.from_config(config)
    given, reference = token_batch(soft, weights=True)
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(given.logps.numel(), 4, generator=g, dtype=torch.float64)
    head = torch.randn(9, 4, generator=g, dtype=torch.float64).requires_grad_()
    labels = torch.randint(9, (len(hidden), 1), generator=g)
    logps = (hidden @ head.T).log_softmax(1).gather(1, labels)[:, 0]
    policy = dataclasses.replace(given, logps=logps)
    (gradient,) = torch.autograd.grad(
        objective(policy, reference).loss.sum(), head, retain_graph=True
    )
    d_w, d_l, weights = losses.pair_incentives(objective, policy, reference)
    for response in weights.split(policy.lengths.tolist()):
        assert not len(response) or response.mean().item() == pytest.approx(1, abs=1e-12)
    assert d_l[4] == 0 and d_w[2] == 0  # empty responses
    assert not any(x.requires_grad for x in (d_w, d_l, weights))
    weighted = policy.sequences(weights)
    pull = (d_w * weighted.chosen - d_l * weighted.rejected).sum()
    assert_close(torch.autograd.grad(pull, head)[0], -gradient, 1e-12)


def test_pair_incentives_of_sequences_weigh_tokens_alike():
    policy, reference = batch()
    d_w, d_l, weights = losses.pair_incentives(DPO(), policy, reference)
    assert weights is None
    for ours, theirs in zip((d_w, d_l), losses.incentives(DPO(), policy, reference), strict=True):
        assert torch.equal(ours, theirs)


def test_token_weights_are_one_where_nothing_pulls():
    policy, reference = token_batch(weights=True)
    silent = dataclasses.replace(policy, weights=torch.zeros_like(policy.logps))
    d_w, d_l, weights = losses.pair_incentives(losses.build("tdpo2"), silent, reference)
    assert not d_w.any() and not d_l.any() and (weights == 1).all()


FAMILY = {
    margin: (
        *("dpo", "cdpo", "robust", "ipo", "hinge", "exo_pair", "discopop", "r_dpo", "pmo"),
        *("h_dpo", "bpo", "f_dpo", "chi_po"),
    ),
    anchored: (
        *("dpop", "cal_dpo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"),
        *("ddro", "dil_bce", "dil_ukl", "dil_lsif", "pro_p"),
    ),
    batchwise: ("beta_dpo", "aot", "aot_unpaired"),
    normalized: (
        *("logpi_dpo", "ipo_avg", "dpo_norm", "simpo", "slic_hf", "rrhf", "cpo", "cpo_simpo"),
        *("orpo", "simper", "stapo", "stapo_ref", "sft"),
    ),
    token_level: ("tdpo1", "tdpo2", "ti_dpo"),
    pointwise: ("kto", "kto_simple", "bco", "ddro_unpaired", "pro_b"),
    groupwise: ("info_nca", "nca", "pro_s"),
    on_policy: ("rloo", "nash_md", "gspo"),
}


def test_names_are_listed_module_by_module():
    assert losses.names() == tuple(name for names in FAMILY.values() for name in names)
    assert len(set(losses.names())) == 55
    assert len(losses.names("pairwise")) == 44
    assert losses.names("pointwise") == FAMILY[pointwise]
    assert losses.names("groupwise") == FAMILY[groupwise] + FAMILY[on_policy]


@pytest.mark.parametrize("module", FAMILY, ids=lambda module: module.__name__)
def test_every_objective_of_a_module_is_listed_once(module):
    defined = {
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, base.Loss)
        and value.__module__ == module.__name__
        and "name" in vars(value)  # what only shares code has none
    }
    assert set(module.OBJECTIVES) == defined and len(module.OBJECTIVES) == len(defined)
    assert tuple(objective.name for objective in module.OBJECTIVES) == FAMILY[module]


@pytest.mark.parametrize("name", losses.names())
def test_describe_states_everything(name):
    description = losses.describe(name)
    assert description.name == name
    assert description.summary.endswith(".") and ":" in description.summary
    assert description.kind == losses.build(name).kind
    incentive = {"pairwise": "d_w", "pointwise": "d = ", "groupwise": "d_i = "}[description.kind]
    assert incentive in description.incentives
    for text in (description.formula, description.source, description.use):
        assert text and "\n" not in text
    token_level = isinstance(losses.build(name), losses.TokenLevelLoss)
    assert description.level == ("token" if token_level else "sequence")
    assert losses.build(name, **description.defaults) == losses.build(name)
    assert description.needs_reference == losses.build(name).needs_reference


def test_describe_joins_continued_lines():
    assert losses.describe("pmo").source.endswith("Eq. 5 (anonymous submission, no arXiv id)")
    assert losses.describe("dpo") == losses.Description(
        name="dpo",
        kind="pairwise",
        level="sequence",
        summary="Direct preference optimization: logistic loss on the margin of the implicit "
        "rewards.",
        formula="-LS(u), u = beta * (tw - tl)",
        incentives="d_w = d_l = beta * S(-u)",
        source="Rafailov et al. 2023, Eq. 7, arXiv:2305.18290",
        use="the first choice for pairs with a clear winner; with hard labels its margin has no "
        "finite optimum, and the log-probs of both responses often fall together",
        notes="Rewards are beta * t. A soft label p moves the optimum from infinity to "
        "u = logit(p).",
        defaults={"beta": 0.1},
        needs_reference=True,
    )


def test_defaults():
    assert {name: losses.describe(name).defaults for name in losses.names()} == {
        "dpo": {"beta": 0.1},
        "cdpo": {"beta": 0.1, "label_smoothing": 0.2},
        "robust": {"beta": 0.1, "label_smoothing": 0.1},
        "ipo": {"tau": 0.1},
        "hinge": {"beta": 0.1},
        "exo_pair": {"beta": 0.1, "label_smoothing": 0.001},
        "discopop": {"beta": 0.05, "tau": 0.05},
        "r_dpo": {"beta": 0.1, "alpha": 0.05},
        "pmo": {"alpha": 0.9, "beta": 0.1},
        "h_dpo": {"beta": 0.1, "alpha": 0.9},
        "bpo": {"beta": 0.1, "lam": 1.2, "scale": 4.0, "clip_low": 0.01},
        "f_dpo": {"beta": 0.1, "divergence": "reverse_kl", "alpha": 0.5},
        "chi_po": {"beta": 0.05, "r_max": 10.0},
        "dpop": {"beta": 0.3, "lam": 50.0},
        "cal_dpo": {"beta": 0.001},
        "nca_pair": {"beta": 0.01},
        "bco_pair": {"beta": 0.01},
        "sppo_hard": {"beta": 0.001},
        "apo_zero": {"beta": 0.1},
        "apo_down": {"beta": 0.1},
        "ddro": {},
        "dil_bce": {},
        "dil_ukl": {},
        "dil_lsif": {},
        "pro_p": {"beta": 0.1},
        "beta_dpo": {"beta": 0.1, "alpha": 0.6},
        "aot": {"beta": 0.01, "label_smoothing": 0.0},
        "aot_unpaired": {"beta": 0.01, "label_smoothing": 0.0},
        "logpi_dpo": {"beta": 0.1},
        "ipo_avg": {"tau": 0.1},
        "dpo_norm": {"beta": 5.0},
        "simpo": {"beta": 2.0, "gamma": 1.0},
        "slic_hf": {"delta": 1.0, "lam": 0.1},
        "rrhf": {"lam": 1.0, "average": True},
        "cpo": {"beta": 0.1, "lam": 1.0},
        "cpo_simpo": {"beta": 0.1, "gamma": 0.5, "lam": 1.0},
        "orpo": {"lam": 0.1},
        "simper": {},
        "stapo": {"beta": 2.0, "left_margin": 0.6, "right_margin": 0.8},
        "stapo_ref": {"beta": 0.1, "left_margin": 12.0, "right_margin": 16.0},
        "sft": {"responses": "chosen", "average": True},
        "tdpo1": {"beta": 0.1},
        "tdpo2": {"beta": 0.1, "alpha": 0.5},
        "ti_dpo": {
            **{"beta": 0.1, "lam": 0.7, "weights": "hybrid", "gamma": 0.0, "margin": 0.001},
        },
        "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        "kto_simple": {"desirable_weight": 1.0, "undesirable_weight": 1.0},
        "bco": {"beta": 0.01},
        "ddro_unpaired": {},
        "pro_b": {
            **{"beta": 0.003, "alpha": 2.5},
            **{"desirable_weight": 1.0, "undesirable_weight": 1.0},
        },
        "info_nca": {"beta": 0.01, "tau": 0.0001},
        "nca": {"beta": 0.01, "tau": 0.0001},
        "pro_s": {"beta": 0.003, "alpha": 2.5},
        "rloo": {"beta": 0.05},
        "nash_md": {"beta": 0.1, "mixture": 0.0},
        "gspo": {"epsilon": 0.0003, "epsilon_high": 0.0004, "scale_rewards": "group"},
    }


def test_build_sets_parameters():
    assert losses.build("dpo", beta=0.05) == DPO(beta=0.05) != DPO()
    assert losses.build("simpo", beta=2) == SimPO(beta=2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        losses.build("dpo").beta = 1.0


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("simp", {}, "name: no objective is called 'simp'; known: simpo"),
        ("DPO", {}, "name: no objective is called 'DPO'; known: dpo, "),
        ("zzz", {}, "name: .* known: dpo, cdpo, .*, sft"),
        (None, {}, "name: no objective is called None"),
        ("cdpo", {"gamma": 1.0}, "gamma: not a parameter of cdpo, .* beta, label_smoothing"),
        ("dpo", {"beta": -1.0}, r"beta: must be > 0, got -1\.0"),
        ("dpo", {"beta": 0}, "beta: must be > 0, got 0"),
        ("dpo", {"beta": math.nan}, "beta: must be finite, got nan"),
        ("dpo", {"beta": "1e-1"}, "beta: must be a number, got '1e-1'"),
        ("dpo", {"beta": True}, "beta: must be a number, got True"),
        ("cdpo", {"label_smoothing": 0.5}, r"label_smoothing: must be >= 0 and < 0\.5, got 0\.5"),
        ("cdpo", {"label_smoothing": -0.1}, "label_smoothing: must be >= 0"),
        ("ipo", {"tau": 0.0}, "tau: must be > 0"),
        ("simpo", {"beta": 0.0}, "beta: must be > 0"),
        ("simpo", {"gamma": math.inf}, "gamma: must be finite, got inf"),
        ("cpo", {"lam": -1}, "lam: must be >= 0, got -1"),
        ("pmo", {"alpha": -0.1}, "alpha: must be >= 0"),
        ("pmo", {"beta": -0.1}, "beta: must be >= 0"),
        ("pmo", {"alpha": 0, "beta": 0}, r"alpha: alpha \+ beta must be > 0"),
        ("stapo", {"left_margin": 1.0}, r"left_margin: must be <= right_margin \(0\.8\), got 1\.0"),
        ("stapo", {"right_margin": math.inf}, "right_margin: must be finite"),
        ("robust", {"label_smoothing": 0.5}, r"label_smoothing: must be >= 0 and < 0\.5, got 0\.5"),
        ("exo_pair", {"label_smoothing": 0}, r"label_smoothing: must be > 0 and < 0\.5, got 0"),
        ("discopop", {"tau": 0}, "tau: must be > 0"),
        ("bpo", {"lam": -1}, "lam: must be > -1, got -1"),
        ("bpo", {"clip_low": 1}, "clip_low: must be >= 0 and < 1, got 1"),
        ("f_dpo", {"divergence": "tv"}, "divergence: must be one of 'reverse_kl', 'forward_kl'"),
        ("f_dpo", {"alpha": 0.3}, "alpha: reverse_kl has none; .* divergence: alpha"),
        ("f_dpo", {"divergence": "alpha", "alpha": 1}, "alpha: must be > 0 and < 1, got 1"),
        ("chi_po", {"r_max": 0}, "r_max: must be > 0"),
        (
            "stapo_ref",
            {"left_margin": 17},
            r"left_margin: must be <= right_margin \(16\.0\), got 17",
        ),
        ("ddro", {"beta": 0.1}, "beta: not a parameter of ddro, which accepts none"),
        ("sft", {"responses": "all"}, "responses: must be one of 'chosen', 'both', got 'all'"),
        ("sft", {"average": "no"}, "average: must be one of True, False, got 'no'"),
    ],
)
def test_bad_names_and_parameters_are_refused_by_name(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        losses.build(name, **parameters)


def test_importing_the_losses_loads_nothing_else():
    code = (
        "import sys, fastpref.losses; "
        "print(*sorted(m for m in sys.modules if m.startswith(('fastpref.', 'transformers', "
        "'pydantic', 'torch', 'triton'))))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert loaded == [
        "fastpref.logps",
        "fastpref.losses",
        "fastpref.losses.anchored",
        "fastpref.losses.base",
        "fastpref.losses.batchwise",
        "fastpref.losses.combined",
        "fastpref.losses.dispatch",
        "fastpref.losses.groupwise",
        "fastpref.losses.kinds",
        "fastpref.losses.margin",
        "fastpref.losses.normalized",
        "fastpref.losses.numerics",
        "fastpref.losses.offset",
        "fastpref.losses.on_policy",
        "fastpref.losses.pointwise",
        "fastpref.losses.registry",
        "fastpref.losses.reward",
        "fastpref.losses.rollout",
        "fastpref.losses.token_level",
        "fastpref.losses.wrappers",
        "fastpref.losses.wrapping",
        "fastpref.utils",
        "fastpref.utils.lazy_torch",
        "fastpref.utils.version",
    ]
