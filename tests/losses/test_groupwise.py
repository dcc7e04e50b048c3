"""Groupwise objectives against closed forms, limits and the pairwise objectives they contain."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import re

import pytest
import torch

from fastpref.logps import GroupedLogps, SequenceLogps, UnpairedLogps
from fastpref.losses import groupwise
from fastpref.losses.anchored import PROP, NCAPair
from fastpref.losses.base import incentives
from fastpref.losses.groupwise import (
    NCA,
    OBJECTIVES,
    PROS,
    GroupwiseLoss,
    InfoNCA,
    groupwise_incentives,
)
from fastpref.losses.margin import DPO
from fastpref.losses.pointwise import PROB
from tests.helpers.pairs import assert_close, nls, sigmoid

VARIANTS = [
    InfoNCA(),
    InfoNCA(beta=0.7, tau=0.5),
    NCA(),
    NCA(beta=0.7, tau=0.5),
    PROS(),
    PROS(beta=0.7, alpha=20.0),
]
every_variant = pytest.mark.parametrize("objective", VARIANTS, ids=repr)
SIZES = (3, 1, 0, 5, 2, 0, 4)  # groups of one response and of none, in the middle and beside others


def fair(x):
    """KL(fair coin || coin of sigmoid(x))."""
    return (nls(x) + nls(-x)) / 2 - math.log(2)


def softmax(values):
    weights = [math.exp(value - max(values)) for value in values]
    return [weight / sum(weights) for weight in weights]


def log_softmax(values):
    top = max(values)
    total = top + math.log(sum(math.exp(value - top) for value in values))
    return [value - total for value in values]


def closed_form(o, z, r, scores):
    """Loss of one group and d_i = -dL/dz_i, in plain floats from the derivatives."""
    n, x = len(z), [o.beta * (a - b) for a, b in zip(z, r, strict=True)]
    if n == 0:
        return 0.0, []
    if isinstance(o, PROS):
        c = [score - sum(scores) / n for score in scores]
        a = 2 * o.alpha / (n * (n + 1))
        everyone = [0.0, *x]  # the first is the response for all others
        pairs = sum(fair(everyone[i] - everyone[j]) for i in range(n + 1) for j in range(i))
        loss = -o.beta / n * sum(ci * zi for ci, zi in zip(c, z, strict=True)) + a * pairs
        pulls = [sum(sigmoid(xi - xj) - 0.5 for xj in everyone) for xi in x]
        return loss, [o.beta * (ci / n - a * pull) for ci, pull in zip(c, pulls, strict=True)]
    q = softmax([score / o.tau for score in scores])
    if isinstance(o, InfoNCA):
        loss = -sum(qi * li for qi, li in zip(q, log_softmax(x), strict=True))
        return loss, [o.beta * (qi - pi) for qi, pi in zip(q, softmax(x), strict=True)]
    terms = list(zip(q, x, strict=True))
    return sum(qi * nls(xi) + nls(-xi) / n for qi, xi in terms), [
        o.beta * (qi * sigmoid(-xi) - sigmoid(xi) / n) for qi, xi in terms
    ]


def batch(sizes=SIZES, spread=5.0, dtype=torch.float64, offsets=torch.int64):
    """Random policy and reference of groups of the given sizes, with scores in [0, 1]."""
    g = torch.Generator().manual_seed(0)
    responses = sum(sizes)
    z = -60 - 20 * torch.rand(responses, generator=g, dtype=torch.float64)
    r = z + spread * torch.randn(responses, generator=g, dtype=torch.float64)
    n = torch.randint(1, 40, (responses,), generator=g)
    scores = torch.rand(responses, generator=g, dtype=torch.float64).to(dtype)
    cu = torch.tensor([0, *sizes]).cumsum(0).to(offsets)
    return tuple(GroupedLogps(x.to(dtype), n, cu, scores) for x in (z, r))


def group_of(t, scores, z=None):
    """One group with the given log-ratios."""
    t, scores = (torch.tensor(x, dtype=torch.float64) for x in (t, scores))
    z = t if z is None else torch.tensor(z, dtype=torch.float64)
    n, cu = torch.ones(len(t)), torch.tensor([0, len(t)])
    return GroupedLogps(z, n, cu, scores), GroupedLogps(z - t, n, cu, scores)


def split(policy, reference):
    """(z, r, scores) of each group, as lists."""
    cu = policy.cu_groups.tolist()
    columns = [x.tolist() for x in (policy.logps, reference.logps, policy.scores)]
    return [tuple(column[start:end] for column in columns) for start, end in itertools.pairwise(cu)]


def assert_matches(objective, policy, reference, tolerance):
    expected = [closed_form(objective, *group) for group in split(policy, reference)]
    out, d = objective(policy, reference), groupwise_incentives(objective, policy, reference)
    assert out.loss.dtype == d.dtype == out.rewards.dtype == policy.logps.dtype
    assert_close(out.loss, [loss for loss, _ in expected], tolerance)
    assert_close(d, [di for _, group in expected for di in group], tolerance)


def test_no_objective_is_left_out():
    assert {type(objective) for objective in VARIANTS} == set(OBJECTIVES)
    assert [objective.name for objective in OBJECTIVES] == ["info_nca", "nca", "pro_s"]
    listed = {
        value
        for value in vars(groupwise).values()
        if isinstance(value, type) and issubclass(value, GroupwiseLoss) and "name" in vars(value)
    }
    assert listed == set(OBJECTIVES)


@every_variant
@pytest.mark.parametrize("offsets", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("spread", [1.0, 5.0, 50.0])  # 50 reaches far into the tails
def test_loss_and_incentives_match_the_closed_form(objective, spread, offsets):
    # fp64 on values up to 1e2: 1e-10 leaves room for another order of the operations.
    assert_matches(objective, *batch(spread=spread, offsets=offsets), 1e-10)


@every_variant
def test_one_group_and_groups_of_one(objective):
    for sizes in ((7,), (1,), (1, 1, 1), (0, 6), (6, 0)):
        assert_matches(objective, *batch(sizes=sizes), 1e-10)


@every_variant
def test_a_batch_without_responses_or_groups(objective):
    for sizes, groups in (((), 0), ((0, 0), 2)):
        policy, reference = batch(sizes=sizes)
        out = objective(policy, reference)
        assert out.loss.tolist() == [0.0] * groups and out.rewards.shape == (0,)
        assert groupwise_incentives(objective, policy, reference).shape == (0,)


@every_variant
def test_groups_do_not_touch_each_other(objective):
    """Each group alone gives what it gives beside others."""
    policy, reference = batch()
    out, d = objective(policy, reference), groupwise_incentives(objective, policy, reference)
    cu = policy.cu_groups.tolist()
    for g, (start, end) in enumerate(itertools.pairwise(cu)):
        alone = [
            GroupedLogps(
                x.logps[start:end],
                x.lengths[start:end],
                torch.tensor([0, end - start]),
                x.scores[start:end],
            )
            for x in (policy, reference)
        ]
        # Sums over rows of other lengths may round otherwise.
        assert_close(objective(*alone).loss, out.loss[g : g + 1], 1e-13)
        assert_close(groupwise_incentives(objective, *alone), d[start:end], 1e-13)


@every_variant
def test_large_values_match_the_closed_form_in_both_precisions(objective):
    # Integers below 2^17 are exact in fp32, and so are the scores: both see the same inputs.
    t = [1e4, -1e4, 0.0, 300.0, -300.0, 1.0, 1e4, 1e4, -1e4, -1e4, 0.0]
    scores = [0.0, 1.0, 0.5, 0.25, 0.75, 0.5, 0.0, 1.0, 1.0, 0.0, 0.5]
    cu = torch.tensor([0, 6, 7, 9, 11])
    # fp32: eight units in the last place.
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-10)):
        n, s = torch.ones(len(t)), torch.tensor(scores, dtype=dtype)
        z = torch.full_like(s, -65536)
        ratios = torch.tensor(t, dtype=dtype)
        policy, reference = GroupedLogps(z, n, cu, s), GroupedLogps(z - ratios, n, cu, s)
        assert_matches(objective, policy, reference, tolerance)


@every_variant
def test_everything_is_finite_in_fp32(objective):
    near = [0.0, 1e-7, 0.5, 20.5, 88.0, 1e3, 1e4]
    t = torch.tensor([sign * x for x in near for sign in (1, -1)])
    # Scores at both ends, equal and far apart: at tau 1e-4 a difference of 1e6 is 1e10.
    for scores in (torch.zeros(len(t)), torch.arange(len(t)) * 1e5, -t):
        for cu in ([0, 14], [0, 1, 3, 3, 14]):
            n = torch.ones(len(t))
            policy, reference = (
                GroupedLogps(z, n, torch.tensor(cu), scores)
                for z in (t - 9e4, torch.full_like(t, -9e4))
            )
            out = objective(policy, reference)
            for x in (out.loss, out.rewards, groupwise_incentives(objective, policy, reference)):
                assert x.dtype == torch.float32 and x.isfinite().all()


@every_variant
def test_nothing_waits_for_the_device(objective):
    """Meta tensors hold no values, so reading one back, as a host sync would, raises."""
    n, cu = (torch.empty(size, dtype=torch.int64, device="meta") for size in (8, 4))
    policy, reference = (
        GroupedLogps(torch.empty(8, device="meta"), n, cu, torch.empty(8, device="meta"))
        for _ in range(2)
    )
    out = objective(policy, reference)
    assert out.loss.shape == (3,) and out.rewards.shape == (8,)
    assert groupwise_incentives(objective, policy, reference).shape == (8,)
    assert PROS.required_alpha(policy.scores, cu).shape == ()


@every_variant
def test_only_the_policy_gets_a_gradient(objective):
    policy, reference = batch()
    policy.logps.requires_grad_()
    reference.logps.requires_grad_()
    out = objective(policy, reference)
    out.loss.sum().backward()
    assert policy.logps.grad.any() and reference.logps.grad is None
    assert not out.rewards.requires_grad
    assert_close(out.rewards, objective.beta * (policy.logps - reference.logps).detach(), 1e-14)
    assert not objective(policy, policy).rewards.any()  # exactly, before the first step


def test_incentives_work_under_no_grad_and_leave_the_batch_alone():
    policy, reference = batch()
    with torch.no_grad():
        d = groupwise_incentives(InfoNCA(), policy, reference)
    assert d.any() and not d.requires_grad and not policy.logps.requires_grad


@every_variant
def test_a_missing_reference_says_what_to_do(objective):
    policy, _ = batch()
    assert objective.needs_reference
    with pytest.raises(ValueError, match=rf"{objective.name} needs.*`reference: cached`"):
        objective(policy, None)
    with pytest.raises(ValueError, match=r"reference: expected 15 responses.*\(2,\)"):
        objective(policy, batch(sizes=(2,))[1])


@pytest.mark.parametrize(
    ("objective", "parameters", "message"),
    [
        (InfoNCA, {"tau": 0.0}, "tau: must be > 0"),
        (NCA, {"beta": -1.0}, "beta: must be > 0"),
        (PROS, {"alpha": 0}, "alpha: must be > 0"),
        (PROS, {"alpha": math.inf}, "alpha: must be finite"),
    ],
)
def test_bad_parameters_are_refused_by_name(objective, parameters, message):
    with pytest.raises(ValueError, match=message):
        objective(**parameters)


def test_defaults():
    assert [dataclasses.asdict(objective()) for objective in OBJECTIVES] == [
        {"beta": 0.01, "tau": 1e-4},
        {"beta": 0.01, "tau": 1e-4},
        {"beta": 0.003, "alpha": 2.5},
    ]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_the_docstring_states_formulas_and_source(objective):
    doc = inspect.getdoc(objective) or ""
    assert re.match(r"[^\n]+: [^\n]+\.\n", doc)
    for label, start in (("loss", r"\S"), ("incentives", "d_i = "), ("source", r"\S")):
        assert re.search(rf"^{label}: +{start}", doc, flags=re.MULTILINE)


# Identities.


def as_pairs(policy, reference):
    """Groups of two as pairs whose first response is the chosen one."""
    return tuple(
        SequenceLogps(x.logps[::2], x.logps[1::2], x.lengths[::2], x.lengths[1::2])
        for x in (policy, reference)
    )


def two_each(pairs=16, gap=1.0):
    """Groups of two whose first response scores better by `gap`."""
    policy, reference = batch(sizes=(2,) * pairs)
    scores = torch.tensor([gap, 0.0], dtype=torch.float64).repeat(pairs)
    return tuple(dataclasses.replace(x, scores=scores) for x in (policy, reference))


@pytest.mark.parametrize(
    ("objective", "pair", "gap"),
    [
        (InfoNCA(beta=0.3), DPO(beta=0.3), 1.0),  # tau 1e-4: e^-10000 is 0, q one-hot
        (NCA(beta=0.3), NCAPair(beta=0.3), 1.0),
        (PROS(beta=0.3, alpha=0.75), PROP(beta=0.3), 0.5),
    ],
    ids=repr,
)
def test_two_responses_are_the_pairwise_objective(objective, pair, gap):
    policy, reference = two_each(gap=gap)
    d_w, d_l = incentives(pair, *as_pairs(policy, reference))
    d = groupwise_incentives(objective, policy, reference)
    assert_close(d[::2], d_w, 1e-12)
    assert_close(-d[1::2], d_l, 1e-12)
    if not isinstance(objective, PROS):  # whose loss differs by a constant
        assert_close(
            objective(policy, reference).loss, pair(*as_pairs(policy, reference)).loss, 1e-12
        )


def test_info_nca_with_a_soft_label_is_dpo_with_one():
    policy, reference = two_each(gap=0.4)
    pairs, anchor = as_pairs(policy, reference)
    p = torch.full_like(pairs.chosen, sigmoid(0.4 / 0.5))
    soft = DPO(beta=0.3)(dataclasses.replace(pairs, preference=p), anchor).loss
    assert_close(InfoNCA(beta=0.3, tau=0.5)(policy, reference).loss, soft, 1e-12)


@pytest.mark.parametrize("n", [2, 4, 5])
def test_pro_s_at_the_theorems_alpha_is_dpo_with_augmented_labels(n):
    """Guo et al., Theorem 4.3: alpha = 1/eta^2 gives the gradient of DPO on all pairs of the n
    responses and the one for all others, in which a pair with the latter has label 1/2.

    There the pull has weight alpha / (n + 1)^2 per pair, in `pro_s` 2 alpha / (n (n + 1)).
    """
    beta, eta = 0.3, n / (n + 1)
    policy, reference = batch(sizes=(n,), spread=2.0)
    g = torch.Generator().manual_seed(3)
    upper = torch.rand(n, n, generator=g, dtype=torch.float64).triu(1)
    label = upper + (1 - upper.T).tril(-1) + torch.eye(n, dtype=torch.float64) / 2
    score = label.mean(1) - 0.5  # mean preference over the group, minus one half: mean zero
    policy = dataclasses.replace(policy, scores=score)
    d = groupwise_incentives(PROS(beta=beta, alpha=eta / 2 / eta**2), policy, reference)

    augmented = torch.full((n + 1, n + 1), 0.5, dtype=torch.float64)
    augmented[:n, :n] = label
    z = policy.logps.clone().requires_grad_()
    x = torch.cat([beta * (z - reference.logps), z.new_zeros(1)])
    pairwise = augmented * torch.nn.functional.logsigmoid(x[:, None] - x)
    loss = -pairwise.sum() / (n + 1) ** 2 / eta**2
    (gradient,) = torch.autograd.grad(loss, z)
    assert_close(d, -gradient, 1e-14)


@pytest.mark.parametrize("alpha", [1.5, 2.5])
def test_pro_s_of_one_response_is_the_pull_of_pro_b(alpha):
    policy, reference = batch(sizes=(1,) * 8)
    d = groupwise_incentives(PROS(beta=0.3, alpha=alpha), policy, reference)
    x = (0.3 * (policy.logps - reference.logps)).tolist()
    assert_close(d, [-0.3 * alpha * (sigmoid(xi) - 0.5) for xi in x], 1e-14)
    # The two labels of pro_b pull apart by as much as each other.
    both = []
    for label in (True, False):
        labels = torch.full((8,), label)
        unpaired = [UnpairedLogps(x.logps, x.lengths, labels) for x in (policy, reference)]
        both.append(PROB(beta=0.3, alpha=alpha)(*unpaired).loss)
    assert_close(PROS(beta=0.3, alpha=alpha)(policy, reference).loss, sum(both) / 2, 1e-14)


def test_nca_rests_where_the_reward_is_log_of_n_q():
    scores = [0.0, 0.3, 0.5]
    q = softmax([score / 0.5 for score in scores])
    t = [math.log(3 * qi) / 0.2 for qi in q]
    d = groupwise_incentives(NCA(beta=0.2, tau=0.5), *group_of(t, scores))
    assert d.abs().max() < 1e-15


def test_info_nca_rests_where_rewards_are_scores_over_tau():
    scores = [0.0, 0.3, 0.5]
    t = [score / 0.5 / 0.2 + 7.0 for score in scores]  # up to a constant
    d = groupwise_incentives(InfoNCA(beta=0.2, tau=0.5), *group_of(t, scores))
    assert d.abs().max() < 1e-15


@pytest.mark.parametrize("objective", [InfoNCA(), NCA()], ids=repr)
def test_equal_scores_share_the_label_whatever_their_size(objective):
    """fp32 scores of 8.5 are 85000 over tau, where neighbors differ by 0.008."""
    policy, reference = batch(sizes=(4,), dtype=torch.float32)
    high = dataclasses.replace(policy, scores=torch.full((4,), 8.5))
    zero = dataclasses.replace(policy, scores=torch.zeros(4))
    assert torch.equal(objective(high, reference).loss, objective(zero, reference).loss)


@every_variant
def test_a_constant_added_to_the_scores_changes_nothing(objective):
    policy, reference = batch()
    moved = dataclasses.replace(policy, scores=policy.scores + 1.0)
    # Scores over tau are 1e4, of which fp64 rounds differences by 1e-12 and more.
    assert_close(objective(moved, reference).loss, objective(policy, reference).loss, 1e-10)


def test_required_alpha():
    scores = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 9.0], dtype=torch.float64)
    cu = torch.tensor([0, 2, 2, 5, 6])
    # 3 * 1/2 / 2 for two, 4 * 2/3 / 3 for three, and nothing for a single response.
    assert PROS.required_alpha(scores, cu).item() == pytest.approx(8 / 9)
    assert PROS.required_alpha(scores, torch.tensor([0, 2])).item() == pytest.approx(0.75)
    assert PROS.required_alpha(scores[5:], torch.tensor([0, 1])).item() == 0
    assert PROS.required_alpha(scores[:0], torch.tensor([0, 0])).item() == 0
    assert PROS.required_alpha(scores[:0], torch.tensor([0])).item() == 0
    # Of four, the one low score alone, or both high scores together.
    low = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert PROS.required_alpha(low, torch.tensor([0, 4])).item() == pytest.approx(0.9375)
    halves = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    assert PROS.required_alpha(halves, torch.tensor([0, 4])).item() == pytest.approx(5 / 6)
    assert PROS.required_alpha(3 * halves, torch.tensor([0, 4])).item() == pytest.approx(2.5)


@pytest.mark.parametrize("seed", range(6))
def test_required_alpha_is_the_maximum_over_all_subsets(seed):
    draw = torch.Generator().manual_seed(seed)
    sizes = [1, 2, 5, 4]
    scores = torch.randn(sum(sizes), generator=draw, dtype=torch.float64)
    expected = 0.0
    for group in scores.split(sizes):
        n, centered = len(group), (group - group.mean()).tolist()
        for count in range(1, n + 1):
            for subset in itertools.combinations(centered, count):
                bound = (n + 1) * abs(sum(subset)) / (count * (n + 1 - count))
                expected = max(expected, bound)
    cu_groups = torch.tensor([0, *itertools.accumulate(sizes)])
    assert PROS.required_alpha(scores, cu_groups).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "scores", [(1.0, 1.0, 1.0, 0.0), (0.0, 0.0, 1.0, 1.0), (0.3, -0.2, 1.4), (2.0, 0.0)]
)
def test_pro_s_has_a_minimum_exactly_above_the_required_alpha(scores):
    """The largest reward after many steps is finite above it and grows without limit below."""
    required = PROS.required_alpha(torch.tensor(scores).double(), torch.tensor([0, len(scores)]))

    def minimize(alpha):
        objective, t = PROS(beta=1.0, alpha=alpha), torch.zeros(len(scores), dtype=torch.float64)
        for _ in range(4000):
            policy, reference = group_of(t.tolist(), list(scores))
            d = groupwise_incentives(objective, policy, reference)
            t = t + 4.0 * d
        return t.abs().max().item(), d.abs().max().item()

    farthest, incentive = minimize(1.05 * required.item())
    assert incentive < 1e-6 and farthest < 20
    farthest, incentive = minimize(0.95 * required.item())
    assert incentive > 1e-3 and farthest > 50
