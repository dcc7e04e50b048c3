"""Token-level objectives against closed forms per token, differences, limits and bad input."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from itertools import chain

import pytest
import torch

from fastpref.logps import TokenLogps
from fastpref.losses.margin import DPO
from fastpref.losses.normalized import DPONorm
from fastpref.losses.token_level import (
    OBJECTIVES,
    TDPO1,
    TDPO2,
    TIDPO,
    TokenAnchors,
    token_incentives,
)
from tests.helpers.pairs import assert_close, nls, sigmoid
from tests.helpers.token_pairs import on_meta, plain, responses, token_batch, without

CASES = [
    TDPO1(),
    TDPO1(beta=0.7),
    TDPO2(),
    TDPO2(beta=0.5, alpha=1.3),
    TIDPO(),
    TIDPO(beta=0.6, lam=1.0),
    TIDPO(lam=0),
    TIDPO(beta=2.0, weights="one_minus_p"),
]
every_case = pytest.mark.parametrize("objective", CASES, ids=repr)
hard_and_soft = pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
with_weights = pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])


def shares(values):
    total = sum(values)
    return [v / total if total else 1 / len(values) for v in values]


def weights_of(o, logps, importance):
    """Factors of the log-ratios of a response's tokens, without the weights of the data."""
    n = len(logps)
    if not isinstance(o, TIDPO) or n == 0:
        return [1.0] * n
    if o.weights == "one_minus_p":
        return shares([1 - math.exp(x) for x in logps])
    prior = shares([math.exp(-((((i - (n - 1) / 2) / (n / 4)) ** 2) / 2)) for i in range(n)])
    return [
        n * (o.lam * a + (1 - o.lam) * b) for a, b in zip(shares(importance), prior, strict=True)
    ]


def table(o, policy, reference):
    """Weights, weighted log-ratio and KL of each response."""
    ones = torch.ones_like(policy.logps)
    data = policy.weights if policy.weights is not None else ones
    columns = (policy.logps, reference.logps, data, policy.importance, policy.kl)
    rows = []
    for z, r, c, i, kl in zip(*(responses(policy, column) for column in columns), strict=True):
        w = [a * b for a, b in zip(weights_of(o, z, i), c, strict=True)]
        ratio = sum(a * (b - d) for a, b, d in zip(w, z, r, strict=True))
        rows.append((w, ratio, sum(kl)))
    return rows


def of_order(o, first, second):
    """Loss, the incentive on both weighted sums, and -dL/dD of both, the first being better."""
    (_, t1, d1), (_, t2, d2) = first, second
    match o:
        case TDPO2():
            v, on_first, on_second = t1 - t2 - o.alpha * (d2 - d1), 0.0, -o.alpha
        case TDPO1():
            v, on_first, on_second = t1 - t2 - (d2 - d1), 1.0, -1.0
        case _:
            v, on_first, on_second = t1 - t2, 0.0, 0.0
    d = o.beta * sigmoid(-o.beta * v)
    return nls(o.beta * v), d, d * on_first, d * on_second


def expected_outputs(o, policy, reference):
    """Losses (B,), -dL/dlogps (T,) and -dL/dkl (T,) by the closed forms."""
    rows, pairs = table(o, policy, reference), policy.pairs
    labels = [1.0] * pairs if policy.preference is None else policy.preference.tolist()
    losses, on_logps, on_kl = [], [None] * 2 * pairs, [None] * 2 * pairs
    for b, p in enumerate(labels):
        w, l = rows[b], rows[pairs + b]  # noqa: E741
        loss, d, kw, kl = of_order(o, w, l)
        other_loss, other_d, other_kl, other_kw = of_order(o, l, w)
        losses.append(p * loss + (1 - p) * other_loss)
        d = p * d - (1 - p) * other_d
        on_logps[b], on_logps[pairs + b] = [d * x for x in w[0]], [-d * x for x in l[0]]
        on_kl[b] = [p * kw + (1 - p) * other_kw] * len(w[0])
        on_kl[pairs + b] = [p * kl + (1 - p) * other_kl] * len(l[0])
    return losses, list(chain(*on_logps)), list(chain(*on_kl))


def gradients(objective, policy, reference, **more):
    """Losses, and minus their gradients on log-probs and KL (0 where there is none)."""
    policy = dataclasses.replace(
        policy,
        logps=policy.logps.detach().requires_grad_(),
        kl=policy.kl.detach().requires_grad_(),
    )
    loss = objective(policy, reference, **more).loss
    pulls = torch.autograd.grad(loss.sum(), (policy.logps, policy.kl), materialize_grads=True)
    return loss.detach(), -pulls[0], -pulls[1]


def test_no_objective_is_left_out():
    assert {type(objective) for objective in CASES} == set(OBJECTIVES)
    assert [objective.name for objective in OBJECTIVES] == ["tdpo1", "tdpo2", "ti_dpo"]


@every_case
@hard_and_soft
@with_weights
def test_loss_and_incentives_match_the_closed_form(objective, soft, weights):
    policy, reference = token_batch(soft, weights=weights)
    expected = expected_outputs(objective, policy, reference)
    # fp64 on values up to 100: 1e-10 leaves room for another order of the operations.
    for ours, theirs in zip(gradients(objective, policy, reference), expected, strict=True):
        assert_close(ours, theirs, 1e-10)
    assert_close(token_incentives(objective, policy, reference), expected[1], 1e-10)


# Weights that depend on the policy but are held fixed have no slope to compare with.
SMOOTH = [o for o in CASES if getattr(o, "weights", None) != "one_minus_p"]


@pytest.mark.parametrize("objective", SMOOTH, ids=repr)
@hard_and_soft
def test_incentives_match_central_differences(objective, soft):
    policy, reference = token_batch(soft, weights=True)
    incentives = token_incentives(objective, policy, reference)
    h = 1e-4  # truncation is h^2/6 times a third derivative of about 1, rounding 1e-15 / h
    for token in range(policy.logps.numel()):
        step = torch.zeros_like(policy.logps)
        step[token] = h
        up, down = (
            objective(dataclasses.replace(policy, logps=policy.logps + s), reference).loss.sum()
            for s in (step, -step)
        )
        assert abs((down - up) / (2 * h) - incentives[token]) < 1e-8


@pytest.mark.parametrize(
    ("objective", "soft"),
    [(TDPO1(beta=0.7), False), (TDPO1(beta=0.7), True), (TDPO2(beta=0.5), False)],
    ids=["tdpo1", "tdpo1-soft", "tdpo2"],
)
def test_the_gradient_through_kl_matches_central_differences(objective, soft):
    policy, reference = token_batch(soft)
    _, _, on_kl = gradients(objective, policy, reference)
    rejected = int(policy.cu_seqlens[policy.pairs])
    if isinstance(objective, TDPO2):  # held fixed in the chosen response: no slope to compare with
        assert not on_kl[:rejected].any() and (on_kl[rejected:] < 0).all()
    h = 1e-4
    for token in range(rejected if isinstance(objective, TDPO2) else 0, policy.kl.numel()):
        step = torch.zeros_like(policy.kl)
        step[token] = h
        up, down = (
            objective(dataclasses.replace(policy, kl=policy.kl + s), reference).loss.sum()
            for s in (step, -step)
        )
        assert abs((down - up) / (2 * h) - on_kl[token]) < 1e-8


@hard_and_soft
@pytest.mark.parametrize(
    ("objective", "columns", "same"),
    [
        (TDPO1(beta=0.3), {"kl": 0.0}, DPO(beta=0.3)),
        (TDPO2(beta=0.3), {"kl": 0.0}, DPO(beta=0.3)),
        (TDPO2(beta=0.3, alpha=0), {}, DPO(beta=0.3)),
        (TIDPO(beta=0.3, lam=1), {"importance": 0.7}, DPO(beta=0.3)),
        (TIDPO(beta=0.3, lam=1), {"importance": 0.0}, DPO(beta=0.3)),
        # Equal probabilities weigh all tokens the same, of which this takes the average.
        (TIDPO(beta=3.0, weights="one_minus_p"), {"logps": -0.4}, DPONorm(beta=3.0)),
        (TIDPO(beta=3.0, weights="one_minus_p"), {"logps": 0.0}, DPONorm(beta=3.0)),
    ],
    ids=repr,
)
def test_special_cases(objective, columns, same, soft):
    policy, reference = token_batch(soft)
    changes = {name: torch.full_like(policy.logps, value) for name, value in columns.items()}
    policy = dataclasses.replace(policy, **changes)
    ours, theirs = objective(policy, reference), same(policy.sequences(), reference.sequences())
    for name in ("loss", "chosen_rewards", "rejected_rewards"):
        assert_close(getattr(ours, name), getattr(theirs, name), 1e-12)


@pytest.mark.parametrize("objective", CASES, ids=repr)
def test_weights_of_one_change_nothing_and_weights_of_zero_leave_tokens_out(objective):
    policy, reference = token_batch()
    ones = dataclasses.replace(policy, weights=torch.ones_like(policy.logps))
    assert torch.equal(objective(ones, reference).loss, objective(policy, reference).loss)
    half = torch.arange(policy.logps.numel()) % 2
    weighted = dataclasses.replace(policy, weights=half.to(policy.logps))
    incentives = token_incentives(objective, weighted, reference)
    assert not incentives[half == 0].any() and incentives[half == 1].all()


@pytest.mark.parametrize("lam", [0, 0.3, 1])
def test_ti_dpo_weights_have_mean_one(lam):
    policy, _ = token_batch()
    weights = responses(policy, TIDPO(lam=lam).token_weights(policy))
    for response in weights:
        assert not response or sum(response) / len(response) == pytest.approx(1, abs=1e-14)
    prior = responses(policy, TIDPO(lam=0).token_weights(policy))[5]  # eleven tokens
    assert prior == pytest.approx(prior[::-1], abs=1e-14) and prior[5] == max(prior)
    # Five tokens from the middle of eleven are 5 / (11 / 4) = 1.82 widths away.
    assert prior[0] / prior[5] == pytest.approx(math.exp(-((20 / 11) ** 2) / 2))


def test_ti_dpo_weights_carry_no_gradient():
    policy, _ = token_batch()
    policy.logps.requires_grad_()
    policy.importance.requires_grad_()
    for objective in (TIDPO(), TIDPO(weights="one_minus_p")):
        assert not objective.token_weights(policy).requires_grad


def test_rewards_leave_the_kl_out_and_carry_no_gradient():
    policy, reference = token_batch()
    policy.logps.requires_grad_()
    for objective in (TDPO1(), TDPO2()):
        out = objective(policy, reference)
        t = policy.sequences().chosen - reference.sequences().chosen
        assert_close(out.chosen_rewards, 0.1 * t.detach(), 1e-14)
        assert not out.chosen_rewards.requires_grad and not out.rejected_rewards.requires_grad


def anchors_for(seed=3):
    """Shorter and longer than the responses, and one that is empty."""
    sizes = torch.tensor([2, 5, 4, 0, 9, 3])
    g = torch.Generator().manual_seed(seed)
    ratios = torch.randn(int(sizes.sum()), generator=g, dtype=torch.float64)
    return TokenAnchors(ratios, torch.cat([torch.zeros(1).long(), sizes.cumsum(0)]))


@hard_and_soft
def test_the_triplet_term_matches_the_closed_form(soft):
    policy, reference = token_batch(soft)
    anchors, lengths = anchors_for(), [2, 5, 4, 0, 9, 3]
    base, objective = TIDPO(), TIDPO(gamma=0.2, margin=0.5)
    ratios = responses(policy, policy.logps - reference.logps)
    samples = [part.tolist() for part in anchors.log_ratios.split(lengths)]

    def distance(a, b):
        longest = max(len(a), len(b))
        a, b = ([*x, *[0.0] * (longest - len(x))] for x in (a, b))
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    added = []
    for b, a in enumerate(samples):
        w, l = distance(a, ratios[b]), distance(a, ratios[6 + b])  # noqa: E741
        p = 1.0 if policy.preference is None else policy.preference[b].item()
        added.append(0.2 * (p * max(0, w - l + 0.5) + (1 - p) * max(0, l - w + 0.5)))
    assert 0 < sum(x > 0 for x in added) <= 6 and (soft or 0.0 in added)
    ours = objective(policy, reference, anchors=anchors).loss - base(policy, reference).loss
    assert_close(ours, added, 1e-10)


def test_the_triplet_term_pulls_as_its_slope():
    policy, reference = token_batch()
    anchors, objective = anchors_for(), TIDPO(gamma=0.2, margin=0.5)
    _, on_logps, _ = gradients(objective, policy, reference, anchors=anchors)
    h = 1e-5  # quadratic apart from a smooth term, so truncation is below rounding, 1e-10
    for token in range(policy.logps.numel()):
        step = torch.zeros_like(policy.logps)
        step[token] = h
        up, down = (
            objective(
                dataclasses.replace(policy, logps=policy.logps + s), reference, anchors=anchors
            )
            for s in (step, -step)
        )
        slope = (down.loss.sum() - up.loss.sum()) / (2 * h)
        assert abs(slope - on_logps[token]) < 1e-8


def test_the_triplet_term_reaches_the_anchors():
    policy, reference = token_batch()
    anchors = anchors_for()
    anchors.log_ratios.requires_grad_()
    TIDPO(gamma=0.2)(policy, reference, anchors=anchors).loss.sum().backward()
    assert anchors.log_ratios.grad.any()


def test_no_gradient_reaches_the_reference():
    policy, reference = token_batch()
    policy.logps.requires_grad_()
    reference.logps.requires_grad_()
    for objective in CASES:
        objective(policy, reference).loss.sum().backward()
    assert policy.logps.grad is not None and reference.logps.grad is None


@every_case
def test_everything_is_finite_and_keeps_its_precision(objective):
    # Four thousand tokens of up to 100 nats, log-ratios of 1e4 nats in sum, certain tokens (0).
    for dtype, scale in ((torch.float32, 25.0), (torch.float64, 25.0), (torch.float32, 0.0)):
        policy, reference = token_batch(True, dtype, lengths=([4096, 0, 1], [3000, 4096, 0]))
        policy = dataclasses.replace(
            policy,
            logps=scale * policy.logps,
            kl=scale * policy.kl,
            importance=policy.importance * 1e-30,
            weights=torch.ones_like(policy.logps),
        )
        out = objective(policy, reference)
        incentives = token_incentives(objective, policy, reference)
        for tensor in (out.loss, out.chosen_rewards, out.rejected_rewards, incentives):
            assert tensor.dtype == dtype and tensor.isfinite().all()


def test_fp32_agrees_with_fp64():
    for objective in CASES:
        (low, low_reference), (high, high_reference) = (
            token_batch(True, dtype, weights=True) for dtype in (torch.float32, torch.float64)
        )
        ours, theirs = objective(low, low_reference), objective(high, high_reference)
        assert_close(ours.loss.double(), theirs.loss, 1e-5)  # inputs rounded at 6e-8, sums of 10


@every_case
def test_nothing_waits_for_the_device(objective):
    policy, reference = (on_meta(x) for x in token_batch(True, weights=True))
    assert objective(policy, reference).loss.shape == (6,)
    assert token_incentives(objective, policy, reference).shape == policy.logps.shape


def test_the_triplet_term_does_not_wait_either():
    policy, reference = (on_meta(x) for x in token_batch())
    anchors = TokenAnchors(*(x.to("meta") for x in dataclasses.astuple(anchors_for())))
    assert TIDPO(gamma=0.1)(policy, reference, anchors=anchors).loss.shape == (6,)


@every_case
def test_a_batch_can_be_empty(objective):
    policy, reference = token_batch(lengths=([], []))
    assert objective(policy, reference).loss.shape == (0,)
    responseless, its_reference = token_batch(lengths=([0], [0]))
    assert objective(responseless, its_reference).loss.item() == pytest.approx(math.log(2))


@every_case
def test_a_batch_is_the_sum_of_its_parts(objective):
    """Micro-batches of several forward passes, joined, give what each gives alone."""
    parts = [token_batch(True, weights=True, seed=s) for s in range(3)]
    whole = objective(*(TokenLogps.cat(side) for side in zip(*parts, strict=True)))
    for name in ("loss", "chosen_rewards", "rejected_rewards"):
        alone = torch.cat([getattr(objective(*part), name) for part in parts])
        assert_close(getattr(whole, name), alone, 1e-14)


@pytest.mark.parametrize(
    ("objective", "column"),
    [(TDPO1(), "kl"), (TDPO2(), "kl"), (TIDPO(), "importance")],
    ids=["tdpo1", "tdpo2", "ti_dpo"],
)
def test_a_missing_column_says_where_it_comes_from(objective, column):
    policy, reference = token_batch()
    assert objective.columns == (column,)
    with pytest.raises(ValueError, match=rf"{column}: {objective.name} needs .*"):
        objective(without(policy, column), reference)


def test_what_is_not_needed_can_be_missing():
    policy, reference = token_batch()
    for objective in (TIDPO(lam=0), TIDPO(weights="one_minus_p")):
        assert objective.columns == ()
        assert torch.equal(
            objective(plain(policy), reference).loss, objective(policy, reference).loss
        )


@every_case
def test_a_missing_or_other_reference_is_named(objective):
    policy, _ = token_batch()
    with pytest.raises(ValueError, match=rf"reference: {objective.name} needs .* got None"):
        objective(policy)
    with pytest.raises(ValueError, match=r"reference: expected 45 tokens.*\(0,\)"):
        objective(policy, TokenLogps(torch.zeros(0), torch.zeros(1).long()))


def test_anchors_are_needed_or_refused():
    policy, reference = token_batch()
    with pytest.raises(ValueError, match="anchors: gamma = 0 leaves them out"):
        TIDPO()(policy, reference, anchors=anchors_for())
    for anchors, got in ((None, "None"), (TokenAnchors(torch.zeros(2), torch.tensor([0, 2])), "1")):
        with pytest.raises(
            ValueError, match=f"anchors: gamma > 0 needs one per pair, 6, got {got}"
        ):
            TIDPO(gamma=0.1)(policy, reference, anchors=anchors)


@pytest.mark.parametrize(
    ("objective", "parameters", "message"),
    [
        (TDPO1, {"beta": 0}, "beta: must be > 0"),
        (TDPO2, {"alpha": -1}, "alpha: must be >= 0"),
        (TIDPO, {"lam": 1.5}, r"lam: must be >= 0 and <= 1, got 1\.5"),
        (TIDPO, {"lam": -0.1}, "lam: must be >= 0"),
        (TIDPO, {"weights": "prior"}, "weights: must be one of 'hybrid', 'one_minus_p'"),
        (TIDPO, {"weights": "one_minus_p", "lam": 0.2}, "lam: one_minus_p has none"),
        (TIDPO, {"gamma": -1}, "gamma: must be >= 0"),
        (TIDPO, {"margin": 1.0}, "margin: gamma = 0 leaves its term out"),
    ],
)
def test_bad_parameters_are_refused_by_name(objective, parameters, message):
    with pytest.raises(ValueError, match=message):
        objective(**parameters)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_docstrings_state_loss_incentives_source_and_use(objective):
    doc = inspect.getdoc(objective)
    assert doc.partition("\n")[0].endswith(".") and ":" in doc.partition("\n")[0]
    assert re.findall(r"^(\w+): +", doc, flags=re.MULTILINE) == [
        "loss",
        "incentives",
        "source",
        "use",
    ]
