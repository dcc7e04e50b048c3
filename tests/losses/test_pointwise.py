"""Pointwise objectives against closed forms, limits and another library; their reference points."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import re

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from fastpref.logps import SequenceLogps, UnpairedLogps
from fastpref.losses import pointwise
from fastpref.losses.anchored import DDRO, APOZero, BCOPair
from fastpref.losses.base import incentives
from fastpref.losses.pointwise import (
    BCO,
    KTO,
    OBJECTIVES,
    PROB,
    DDROUnpaired,
    KTOSimple,
    PointwiseLoss,
    RunningMean,
    pointwise_incentives,
    pooled_mean,
    sum_and_count,
)
from tests.helpers.pairs import assert_close, bell, logit, nls, sigmoid, tangent

VARIANTS = [
    KTO(),
    KTO(beta=0.7, desirable_weight=0.5, undesirable_weight=3.0),
    KTOSimple(),
    KTOSimple(desirable_weight=2.0, undesirable_weight=0.25),
    BCO(),
    BCO(beta=0.8),
    DDROUnpaired(),
    PROB(),
    PROB(beta=0.4, alpha=10.0, desirable_weight=100.0, undesirable_weight=0.5),
]
every_variant = pytest.mark.parametrize("objective", VARIANTS, ids=repr)
POINT = torch.tensor(0.3, dtype=torch.float64)


def fair(x):
    """KL(fair coin || coin of sigmoid(x))."""
    return (nls(x) + nls(-x)) / 2 - math.log(2)


def closed_form(o, z, r, n, desirable, point):
    """Loss and d = -dL/dz of one response, written in plain floats from the derivatives."""
    t, y = z - r, 1 if desirable else -1
    if n == 0:
        return 0.0, 0.0
    if isinstance(o, KTO | KTOSimple | PROB):
        w = o.desirable_weight if desirable else o.undesirable_weight
    match o:
        case KTO():
            v = o.beta * (t - max(0.0, point))
            return w * sigmoid(-y * v), w * y * o.beta * bell(v)
        case KTOSimple():
            return w * sigmoid(-y * t), w * y * bell(t)
        case BCO():
            v = o.beta * t - point
            return nls(y * v), y * o.beta * sigmoid(-y * v)
        case DDROUnpaired() if desirable:
            return math.log(2) - t, 1.0
        case DDROUnpaired():
            loss, slope = tangent(
                lambda t: math.log(2) - math.log(2 - math.exp(t)),
                lambda t: math.exp(t) / (2 - math.exp(t)),
                t,
                math.log(2 - 1e-6),
            )
            return loss, -slope
        case PROB():
            s, v = y / 2, o.beta * t
            loss = -o.beta * s * z + o.alpha * fair(v)
            return w * loss, w * o.beta * (s - o.alpha * (sigmoid(v) - 0.5))


def batch(responses=64, spread=5.0, dtype=torch.float64):
    """Random policy and reference: z around -70 nats, every fifth response empty, mixed labels."""
    g = torch.Generator().manual_seed(0)
    z = -60 - 20 * torch.rand(responses, generator=g, dtype=torch.float64)
    r = z + spread * torch.randn(responses, generator=g, dtype=torch.float64)
    n = torch.randint(1, 40, (responses,), generator=g)
    n[::5] = 0
    label = torch.rand(responses, generator=g) < 0.5
    z, r = z.to(dtype), r.to(dtype)
    return UnpairedLogps(z, n, label), UnpairedLogps(r, n, label)


def one(t, desirable=True, dtype=torch.float64, z=0.0):
    """Policy and reference of one response of one token with log-ratio t."""
    n, label = torch.ones(1, dtype=torch.int64), torch.tensor([desirable])
    return tuple(
        UnpairedLogps(torch.tensor([x], dtype=dtype), n, label) for x in (float(z), float(z - t))
    )


def point_of(objective, point=POINT):
    """The point for an objective that needs one, else None."""
    return point if objective.needs_reference_point else None


def outputs(objective, policy, reference, point=POINT):
    """Loss and d, (S, 2)."""
    point = point_of(objective, point)
    d = pointwise_incentives(objective, policy, reference, point)
    return torch.stack([objective(policy, reference, point).loss, d], dim=1)


def expected_outputs(objective, policy, reference, point):
    columns = (policy.logps, reference.logps, policy.lengths, policy.desirable)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [closed_form(objective, *row, point) for row in rows]


def test_no_objective_is_left_out():
    assert {type(objective) for objective in VARIANTS} == set(OBJECTIVES)
    assert [objective.name for objective in OBJECTIVES] == [
        "kto",
        "kto_simple",
        "bco",
        "ddro_unpaired",
        "pro_b",
    ]
    listed = {
        value
        for value in vars(pointwise).values()
        if isinstance(value, type) and issubclass(value, PointwiseLoss) and "name" in vars(value)
    }
    assert listed == set(OBJECTIVES)


@every_variant
@pytest.mark.parametrize("point", [0.3, -2.0, 0.0])
@pytest.mark.parametrize("spread", [1.0, 5.0])  # 5 reaches into the tails and past DDRO's limit
def test_loss_and_incentives_match_the_closed_form(objective, point, spread):
    policy, reference = batch(spread=spread)
    expected = expected_outputs(objective, policy, reference, point)
    # DDRO's 2 - e^t is 1e-6 at the limit, where fp64 keeps ten of its digits.
    tolerance = 1e-9 if isinstance(objective, DDROUnpaired) else 1e-10
    actual = outputs(objective, policy, reference, torch.tensor(point, dtype=torch.float64))
    assert_close(actual, expected, tolerance)


@every_variant
def test_large_values_are_exact_in_both_precisions(objective):
    # Integers below 2^17 are exact in fp32, so both precisions see the same inputs.
    grid = itertools.product((-1e4, -300, 0, 1, 300, 1e4), (0, 1, 32768), (True, False))
    t, n, label = (torch.tensor(column) for column in zip(*grid, strict=True))
    # fp32: eight units in the last place.
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-10)):
        z = torch.full_like(t, -65536, dtype=dtype)
        policy, reference = UnpairedLogps(z, n, label), UnpairedLogps(z - t.to(dtype), n, label)
        expected = expected_outputs(objective, policy, reference, 0.25)
        actual = outputs(objective, policy, reference, torch.tensor(0.25, dtype=dtype))
        assert actual.dtype == dtype
        assert_close(actual, expected, tolerance)


@every_variant
def test_everything_is_finite_in_fp32(objective):
    near = (0.0, 1e-7, 1e-3, 0.5, math.log(2 - 1e-6), math.log(2), 4.6, 20.5, 88.0, 1e3, 1e4)
    t = torch.tensor([sign * x for x in near for sign in (1, -1)]).repeat(2)
    label = torch.arange(len(t)) < len(near) * 2
    n = torch.ones(len(t))
    policy, reference = (UnpairedLogps(x, n, label) for x in (t - 9e4, torch.full_like(t, -9e4)))
    for point in (0.0, 1e4, -1e4):
        out = objective(policy, reference, point_of(objective, torch.tensor(point)))
        for tensor in (out.loss, out.rewards, outputs(objective, policy, reference)):
            assert tensor.dtype == torch.float32 and tensor.isfinite().all()


@every_variant
def test_an_empty_response_adds_nothing(objective):
    """-7 and -9 with length 0 cannot come from sums of tokens: they show that neither is read."""
    n, label = torch.tensor([0, 3, 0]), torch.tensor([True, True, False])
    policy = UnpairedLogps(torch.tensor([-7.0, -6.0, -7.0], requires_grad=True), n, label)
    out = objective(policy, UnpairedLogps(torch.full((3,), -9.0), n, label), point_of(objective))
    out.loss.sum().backward()
    for tensor in (out.loss, out.rewards, policy.logps.grad):
        assert tensor[1] != 0 and tensor[0] == 0 and tensor[2] == 0


@every_variant
def test_nothing_waits_for_the_device(objective):
    """Meta tensors hold no values, so reading one back, as a host sync would, raises."""
    n, label = (torch.empty(8, dtype=x, device="meta") for x in (torch.int64, torch.bool))
    policy, reference = (UnpairedLogps(torch.empty(8, device="meta"), n, label) for _ in range(2))
    running = RunningMean("meta")
    point = point_of(objective, running.mean)
    sums = sum_and_count(objective(policy, reference, point).rewards, n)
    assert pooled_mean(sums).shape == running.update(sums).shape == ()
    assert objective(policy, reference, point).loss.shape == (8,)
    assert pointwise_incentives(objective, policy, reference, point).shape == (8,)


@every_variant
def test_only_the_policy_gets_a_gradient(objective):
    policy, reference = batch()
    point = POINT.clone().requires_grad_()
    policy.logps.requires_grad_()
    reference.logps.requires_grad_()
    out = objective(policy, reference, point_of(objective, point))
    out.loss.sum().backward()
    assert policy.logps.grad.any() and reference.logps.grad is None and point.grad is None
    assert not out.rewards.requires_grad


def test_incentives_work_under_no_grad_and_leave_the_batch_alone():
    policy, reference = batch()
    with torch.no_grad():
        d = pointwise_incentives(KTOSimple(), policy, reference)
    scored = policy.lengths > 0
    assert torch.equal(d[scored] > 0, policy.desirable[scored])
    assert not d.requires_grad and not policy.logps.requires_grad


@pytest.mark.parametrize(
    ("objective", "beta"),
    [(KTO(beta=0.3), 0.3), (KTOSimple(), 1), (BCO(), 0.01), (DDROUnpaired(), 1), (PROB(), 0.003)],
    ids=repr,
)
def test_rewards(objective, beta):
    policy, reference = batch()
    rewards = objective(policy, reference, point_of(objective)).rewards
    expected = beta * (policy.logps - reference.logps) * (policy.lengths > 0)
    assert_close(rewards, expected, 1e-14)
    assert not objective(
        policy, policy, point_of(objective)
    ).rewards.any()  # exactly, before the first step


@pytest.mark.parametrize("objective", [KTO(), BCO()], ids=repr)
def test_a_missing_reference_point_is_refused(objective):
    policy, reference = batch()
    assert objective.needs_reference_point
    with pytest.raises(ValueError, match=rf"reference_point: {objective.name} needs one, got None"):
        objective(policy, reference)
    with pytest.raises(ValueError, match=r"reference_point: expected shape \(\).*\(1,\)"):
        objective(policy, reference, torch.zeros(1))


@pytest.mark.parametrize("objective", [KTOSimple(), DDROUnpaired(), PROB()], ids=repr)
def test_a_reference_point_that_is_not_needed_is_refused(objective):
    policy, reference = batch()
    assert not objective.needs_reference_point
    with pytest.raises(ValueError, match=rf"reference_point: {objective.name} has none.*leave it"):
        objective(policy, reference, POINT)


@every_variant
def test_a_missing_reference_says_what_to_do(objective):
    policy, _ = batch(responses=3)
    assert objective.needs_reference
    with pytest.raises(ValueError, match=rf"{objective.name} needs.*`reference: cached`"):
        objective(policy, None, point_of(objective))
    with pytest.raises(ValueError, match=r"reference: expected 3 responses.*\(4,\)"):
        objective(policy, batch(responses=4)[1], point_of(objective))


@pytest.mark.parametrize(
    ("objective", "parameters", "message"),
    [
        (PROB, {"alpha": 1.0}, r"alpha: must be > 1, got 1\.0; .* no finite optimum"),
        (PROB, {"alpha": 0.2}, "alpha: must be > 1"),
        (PROB, {"alpha": math.nan}, "alpha: must be finite"),
        (PROB, {"beta": 0}, "beta: must be > 0"),
        (KTO, {"desirable_weight": 0.0}, "desirable_weight: must be > 0"),
        (KTOSimple, {"undesirable_weight": -1.0}, "undesirable_weight: must be > 0"),
        (BCO, {"beta": -0.1}, "beta: must be > 0"),
    ],
)
def test_bad_parameters_are_refused_by_name(objective, parameters, message):
    with pytest.raises(ValueError, match=message):
        objective(**parameters)


def test_defaults():
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    assert [dataclasses.asdict(objective()) for objective in OBJECTIVES] == [
        {"beta": 0.1, **weights},
        weights,
        {"beta": 0.01},
        {},
        {"beta": 0.003, "alpha": 2.5, **weights},
    ]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_the_docstring_states_formulas_and_source(objective):
    doc = inspect.getdoc(objective) or ""
    assert re.match(r"[^\n]+: [^\n]+\.\n", doc)
    for label, start in (("loss", r"\S"), ("incentives", "d = "), ("source", r"\S")):
        assert re.search(rf"^{label}: +{start}", doc, flags=re.MULTILINE)


# Identities.


def as_pairs(objective, pair, policy, reference, point=None):
    """Loss and incentives of desirable beside undesirable, and those of a pairwise objective."""
    sides = {}
    for label in (True, False):
        labelled = torch.full_like(policy.desirable, label)
        same = dataclasses.replace(policy, desirable=labelled)
        sides[label] = outputs(objective, same, reference, point)
    both = SequenceLogps(policy.logps, policy.logps, policy.lengths, policy.lengths)
    anchor = dataclasses.replace(both, chosen=reference.logps, rejected=reference.logps)
    loss, (d_w, d_l) = pair(both, anchor).loss, incentives(pair, both, anchor)
    (ours_w, dz_w), (ours_l, dz_l) = sides[True].unbind(1), sides[False].unbind(1)
    return (ours_w + ours_l, dz_w, -dz_l), (loss, d_w, d_l)


@pytest.mark.parametrize(
    ("objective", "pair"),
    [
        (BCO(beta=0.3), BCOPair(beta=0.3)),
        (KTO(beta=0.3), APOZero(beta=0.3)),
        (KTOSimple(), APOZero(beta=1.0)),
        (DDROUnpaired(), DDRO()),
    ],
    ids=repr,
)
def test_at_point_zero_two_labels_are_the_pairwise_objective(objective, pair):
    policy, reference = batch()
    full = torch.ones_like(policy.lengths)
    policy, reference = (dataclasses.replace(x, lengths=full) for x in (policy, reference))
    zero = torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(*as_pairs(objective, pair, policy, reference, zero), strict=True):
        assert_close(ours, theirs, 1e-12)


def test_kto_simple_is_kto_with_beta_one_at_point_zero():
    policy, reference = batch()
    weights = {"desirable_weight": 2.0, "undesirable_weight": 0.5}
    kto = outputs(KTO(beta=1.0, **weights), policy, reference, torch.zeros(()))
    assert_close(kto, outputs(KTOSimple(**weights), policy, reference), 1e-14)


def test_bco_is_cross_entropy_about_delta():
    policy, reference = batch()
    full = torch.ones_like(policy.lengths)
    policy = dataclasses.replace(policy, lengths=full)
    logits = 0.3 * (policy.logps - reference.logps) - POINT
    expected = binary_cross_entropy_with_logits(logits, policy.desirable.double(), reduction="none")
    assert_close(BCO(beta=0.3)(policy, reference, POINT).loss, expected, 1e-12)


@pytest.mark.parametrize("desirable", [True, False])
@pytest.mark.parametrize("alpha", [1.5, 2.5, 25.0])
def test_pro_b_rests_at_its_optimum(alpha, desirable):
    objective = PROB(beta=0.1, alpha=alpha)
    s = 0.5 if desirable else -0.5
    t = logit(0.5 + s / alpha) / 0.1
    below, here, above = (
        pointwise_incentives(objective, *one(t + step, desirable, z=t + step)).item()
        for step in (-1.0, 0.0, 1.0)
    )
    assert abs(here) < 1e-15 and below > 0 > above


def test_pro_b_rests_at_a_reward_of_0_847_by_default():
    below, above = (pointwise_incentives(PROB(), *one(x / 0.003)).item() for x in (0.847, 0.848))
    assert below > 0 > above


def test_pro_b_betas_and_alphas_that_are_equivalent_for_small_ratios():
    """K(x) is x^2 / 8 there, so alpha * K(beta * t) / beta depends on alpha * beta alone."""
    for alpha, beta in ((2.5, 3e-3), (7.5, 1e-3), (22.5, 1e-3 / 3)):
        objective = PROB(beta=beta, alpha=alpha)
        d = pointwise_incentives(objective, *one(1.0)).item() / beta
        assert d == pytest.approx(0.5 - 7.5e-3 / 4, abs=1e-8)


def test_ddro_continues_in_value_and_slope():
    limit = math.log(2 - 1e-6)
    h = 1e-9  # slope 2e6 and curvature 4e12: over 2h each changes by 4e-3 at most
    (loss, d), (loss_above, d_above) = (
        outputs(DDROUnpaired(), *one(limit + step, desirable=False), None)[0].tolist()
        for step in (-h, h)
    )
    assert abs(loss_above - loss - 2 * h * 1999999) < 1e-4
    assert d_above == pytest.approx(-1999999, rel=1e-6) and d == pytest.approx(d_above, rel=5e-3)
    d_far = pointwise_incentives(DDROUnpaired(), *one(1e4, desirable=False))
    assert d_far.item() == pytest.approx(-1999999, rel=1e-6)


def test_kto_counts_a_negative_point_as_zero():
    policy, reference = batch()
    loss = [KTO()(policy, reference, torch.tensor(point)).loss for point in (-5.0, 0.0, 5.0)]
    assert torch.equal(loss[0], loss[1]) and not torch.equal(loss[1], loss[2])


def test_kto_agrees_with_liger():
    reason = "liger-kernel is not installed"
    module = pytest.importorskip("liger_kernel.chunked_loss.kto_loss", reason=reason)
    policy, reference = batch()
    full = torch.ones_like(policy.lengths)
    policy = dataclasses.replace(policy, lengths=full)
    loss, chosen, rejected = module.LigerFusedLinearKTOFunction.preference_loss_fn(
        policy.logps, policy.desirable, full, reference.logps, beta=0.3, kl=POINT
    )
    out = KTO(beta=0.3)(policy, reference, POINT)
    assert_close(out.loss.mean(), loss, 1e-12)
    assert_close(out.rewards[policy.desirable].sum(), chosen, 1e-12)
    assert_close(out.rewards[~policy.desirable].sum(), rejected, 1e-12)


# Reference points.


def test_sums_of_micro_batches_add_up_to_those_of_the_batch():
    g = torch.Generator().manual_seed(1)
    t, n = torch.randn(7, generator=g), torch.tensor([3, 0, 1, 2, 0, 0, 5])
    t[1] = math.nan  # of an empty response: never read
    whole = pooled_mean(sum_and_count(t, n))
    for sizes in ([1] * 7, [4, 3], [6, 1], [0, 7]):
        parts = zip(t.split(sizes), n.split(sizes), strict=True)
        total = sum(sum_and_count(*part) for part in parts)
        assert_close(pooled_mean(total), whole, 1e-14)
    assert_close(whole, t[n > 0].double().mean(), 1e-14)
    # The mean of the parts' means, of three responses and of one, is another number.
    means = [pooled_mean(sum_and_count(*part)) for part in ((t[:4], n[:4]), (t[4:], n[4:]))]
    assert abs(sum(means) / 2 - whole) > 1e-3


def test_sums_of_one_response_and_of_none():
    one_response = sum_and_count(torch.tensor([2.5]), torch.tensor([4]))
    assert one_response.tolist() == [2.5, 1.0] and pooled_mean(one_response).item() == 2.5
    none = sum_and_count(torch.tensor([2.5]), torch.tensor([0]))
    assert none.tolist() == [0.0, 0.0] and pooled_mean(none).item() == 0.0
    assert sum_and_count(torch.empty(0), torch.empty(0)).tolist() == [0.0, 0.0]


def test_sums_carry_no_gradient():
    t = torch.ones(3, requires_grad=True)
    assert not sum_and_count(t, torch.ones(3)).requires_grad


def test_running_mean_is_that_of_all_rewards_seen():
    g = torch.Generator().manual_seed(2)
    r = 100 + torch.randn(50, generator=g)
    n = torch.randint(0, 3, (50,), generator=g)
    running = RunningMean()
    assert running.update(sum_and_count(r, torch.zeros(50))).item() == 0  # nothing seen so far
    seen = 0
    for size in (1, 4, 20, 25):
        part = slice(seen, seen + size)
        seen += size
        delta = running.update(sum_and_count(r[part], n[part]))
        assert_close(delta, r[:seen][n[:seen] > 0].double().mean().nan_to_num(0.0), 1e-14)
    assert running.count.item() == (n > 0).sum()
    unchanged = running.update(sum_and_count(r, torch.zeros(50)))
    assert torch.equal(unchanged, delta)


def test_running_mean_continues_from_its_state():
    r, n = torch.arange(6.0), torch.ones(6)
    straight, resumed = RunningMean(), RunningMean()
    straight.update(sum_and_count(r[:2], n[:2]))
    state = straight.state_dict()
    resumed.load_state_dict(state)
    for running in (straight, resumed):
        running.update(sum_and_count(r[2:], n[2:]))
    assert torch.equal(straight.mean, resumed.mean) and resumed.mean.item() == 2.5
    assert torch.equal(straight.count, resumed.count) and resumed.count.item() == 6
    # A state that waits to be written stays as it was.
    assert {name: value.item() for name, value in state.items()} == {"count": 2.0, "mean": 0.5}


def test_running_mean_refuses_another_state():
    with pytest.raises(ValueError, match="state: expected count and mean, got mean"):
        RunningMean().load_state_dict({"mean": torch.zeros(())})
    with pytest.raises(ValueError, match="got nothing"):
        RunningMean().load_state_dict({})
