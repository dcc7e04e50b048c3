"""Options that wrap objectives: closed forms, limits, and which objective takes which option."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re

import pytest
import torch

from fastpref import losses
from fastpref.logps import SequenceLogps, TokenLogps, segment_sum
from fastpref.losses import anchored, batchwise, margin, normalized, pointwise, token_level
from fastpref.losses.batchwise import AOT, BetaDPO
from fastpref.losses.combined import TokenLevelSum, WeightedSum
from fastpref.losses.groupwise import InfoNCA
from fastpref.losses.margin import BPO, CDPO, DPO, FDPO, IPO, Hinge, Robust
from fastpref.losses.normalized import ORPO, SFT, DPONorm, IPOAvg, SimPO, StaPORef
from fastpref.losses.offset import OF_REWARDS
from fastpref.losses.pointwise import KTO
from fastpref.losses.token_level import TDPO2, TIDPO, TokenLevelLoss, token_incentives
from fastpref.losses.wrappers import (
    OF_MARGIN,
    OPTIONS,
    WPO,
    WRAPPERS,
    FDivergence,
    LabelSmoothing,
    LengthDesensitized,
    TokenWeighted,
    build_with_options,
    config_of,
    ld_weights,
)
from tests.helpers.pairs import (
    assert_close,
    assert_finite,
    assert_matches_differences,
    batch,
    exponential,
    nls,
    outputs,
    rows,
    sigmoid,
)
from tests.helpers.token_pairs import on_meta, plain, responses, token_batch, without

KINDS = {
    kind.name: kind
    for module in (margin, anchored, batchwise, normalized, pointwise, token_level)
    for kind in module.OBJECTIVES
}
PAIRWISE = [o for o in map(losses.build, losses.names()) if isinstance(o, losses.PairwiseLoss)]
SMOOTHABLE = [o for o in PAIRWISE if o.soft_labels and not hasattr(o, "label_smoothing")]
DIVERGENCES = [
    {"f_divergence": "forward_kl"},
    {"f_divergence": "js"},
    {"f_divergence": "alpha"},
    {"f_divergence": "alpha", "f_alpha": 0.2},
]
hard_and_soft = pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)


# Label smoothing


@pytest.mark.parametrize("objective", SMOOTHABLE, ids=repr)
@hard_and_soft
def test_smoothing_mixes_both_orders_of_the_pair(objective, soft):
    policy, reference = batch(soft=soft)
    loss, d_w, d_l = outputs(objective, policy, reference).unbind(1)
    flipped = dataclasses.replace(
        policy.swapped(),
        preference=policy.preference,  # the other order, believed as much
    )
    other, other_w, other_l = outputs(objective, flipped, reference.swapped()).unbind(1)
    expected = torch.stack(
        [0.8 * loss + 0.2 * other, 0.8 * d_w - 0.2 * other_l, 0.8 * d_l - 0.2 * other_w], dim=1
    )
    assert_close(outputs(LabelSmoothing(objective, 0.2), policy, reference), expected, 1e-12)


@hard_and_soft
def test_smoothing_makes_cdpo_of_dpo(soft):
    policy, reference = batch(soft=soft)
    ours = outputs(LabelSmoothing(DPO(beta=0.3), 0.15), policy, reference)
    theirs = outputs(CDPO(beta=0.3, label_smoothing=0.15), policy, reference)
    assert_close(ours, theirs, 1e-12)


def test_no_smoothing_changes_nothing():
    policy, reference = batch()
    ours = outputs(LabelSmoothing(SimPO(), 0.0), policy, reference)
    assert torch.equal(ours, outputs(SimPO(), policy))


@pytest.mark.parametrize("objective", [SimPO(), IPO(), ORPO()], ids=repr)
def test_smoothed_incentives_match_central_differences(objective):
    assert_matches_differences(LabelSmoothing(objective, 0.2), True)


@pytest.mark.parametrize("objective", SMOOTHABLE, ids=repr)
def test_smoothed_losses_are_finite(objective):
    assert_finite(LabelSmoothing(objective, 0.2))


def test_smoothing_keeps_rewards_and_needs():
    policy, reference = batch()
    ours, theirs = LabelSmoothing(IPO(), 0.2)(policy, reference), IPO()(policy, reference)
    assert torch.equal(ours.chosen_rewards, theirs.chosen_rewards)
    assert LabelSmoothing(IPO()).needs_reference and not LabelSmoothing(SimPO()).needs_reference


# f-divergence


def link(divergence, t):
    """g(t) and its derivative."""
    match divergence["f_divergence"]:
        case "js":
            return math.log(2) - nls(t), sigmoid(-t)
        case "forward_kl":
            value, slope = exponential(-t)
            return 1 - value, slope
    power = divergence.get("f_alpha", 0.5) - 1
    value, slope = exponential(power * t)
    return (value - 1) / power, slope


@pytest.mark.parametrize("name", OF_MARGIN)
@every_divergence
def test_a_divergence_replaces_the_log_ratios(name, divergence):
    objective = losses.build(name)
    policy, reference = batch(soft=True, spread=1.0)
    links = [
        (*link(divergence, zw - rw), *link(divergence, zl - rl))
        for zw, zl, rw, rl, *_ in rows(policy, reference)
    ]
    gw, slope_w, gl, slope_l = torch.tensor(links, dtype=torch.float64).unbind(1)
    zeros = torch.zeros_like(gw)
    at_links = (
        dataclasses.replace(policy, chosen=gw, rejected=gl),
        dataclasses.replace(policy, chosen=zeros, rejected=zeros),
    )
    loss, d_w, d_l = outputs(objective, *at_links).unbind(1)
    expected = torch.stack([loss, slope_w * d_w, slope_l * d_l], dim=1)
    wrapped = FDivergence(objective, **divergence)
    assert_close(outputs(wrapped, policy, reference), expected, 1e-10)
    ours, theirs = wrapped(policy, reference), objective(*at_links)
    assert_close(ours.chosen_rewards, theirs.chosen_rewards, 1e-10)
    assert_close(ours.rejected_rewards, theirs.rejected_rewards, 1e-10)


@pytest.mark.parametrize("name", OF_MARGIN)
def test_the_reverse_kl_changes_nothing(name):
    policy, reference = batch(soft=True)
    objective = losses.build(name)
    ours = outputs(FDivergence(objective), policy, reference)
    # z - r is taken before the rest, which can round the margin otherwise.
    assert_close(ours, outputs(objective, policy, reference), 1e-12)


@every_divergence
@hard_and_soft
def test_a_divergence_makes_f_dpo_of_dpo(divergence, soft):
    policy, reference = batch(soft=soft)
    alpha = divergence.get("f_alpha", 0.5)
    same = FDPO(beta=0.3, divergence=divergence["f_divergence"], alpha=alpha)
    ours = FDivergence(DPO(beta=0.3), **divergence)
    assert_close(outputs(ours, policy, reference), outputs(same, policy, reference), 1e-12)


@pytest.mark.parametrize("objective", [IPO(), DPONorm(), IPOAvg(), BPO()], ids=repr)
def test_incentives_of_a_divergence_match_central_differences(objective):
    assert_matches_differences(FDivergence(objective, "js"), True)


@pytest.mark.parametrize("objective", [DPO(), Hinge(), DPONorm(), StaPORef()], ids=repr)
@every_divergence
def test_losses_of_a_divergence_are_finite(objective, divergence):
    assert_finite(FDivergence(objective, **divergence))


def test_a_divergence_is_for_losses_of_the_margin():
    """Found out by moving what the loss must not see: both z and r, both t of a pair."""
    policy, reference = batch()
    policy = dataclasses.replace(policy, rejected_lengths=policy.chosen_lengths)
    g = torch.Generator().manual_seed(1)
    a, b, c = 5 * torch.randn(3, 32, generator=g, dtype=torch.float64)

    def moved(pairs, chosen, rejected):
        return dataclasses.replace(
            pairs, chosen=pairs.chosen + chosen, rejected=pairs.rejected + rejected
        )

    blind = {
        objective.name
        for objective in PAIRWISE
        if objective.needs_reference
        and torch.allclose(
            objective(moved(policy, a + c, b + c), moved(reference, a, b)).loss,
            objective(policy, reference).loss,
        )
    }
    # f_dpo at its default is dpo; beta_dpo looks at the margins of other pairs.
    assert blind == {*OF_MARGIN, "f_dpo", "beta_dpo"}


# Length desensitization


def ld_sequence_logps(logps, cu_seqlens, alpha):
    """z = z_shared + alpha * z_beyond, (2B,)."""
    return segment_sum(ld_weights(logps.detach(), cu_seqlens, alpha) * logps, cu_seqlens)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_tokens_beyond_the_shorter_response_count_alpha_times(alpha):
    policy, _ = token_batch()
    tokens = responses(policy, policy.logps)
    expected = []
    for index, response in enumerate(tokens):
        shared = min(len(response), len(tokens[(index + 6) % 12]))
        expected.append(sum(response[:shared]) + alpha * sum(response[shared:]))
    logps = policy.logps.requires_grad_()
    sums = ld_sequence_logps(logps, policy.cu_seqlens, alpha)
    assert_close(sums, expected, 1e-12)
    (slopes,) = torch.autograd.grad(sums.sum(), logps)
    assert set(slopes.tolist()) <= {1.0, alpha}
    assert (slopes == 1).sum() == (45 if alpha == 1 else 2 * (1 + 5 + 0 + 2 + 0 + 1))


@pytest.mark.parametrize("objective", [DPO(), SimPO(), IPOAvg(), AOT(), SFT()], ids=repr)
def test_alpha_one_is_the_plain_sum(objective):
    policy, reference = token_batch()
    sums = policy.sequences(), reference.sequences()
    ours = LengthDesensitized(objective, 1.0)(policy, reference)
    assert torch.equal(ours.loss, objective(*sums).loss)
    assert torch.equal(ours.chosen_rewards, objective(*sums).chosen_rewards)


@hard_and_soft
@pytest.mark.parametrize("objective", [DPO(), SimPO(), WeightedSum(((DPO(), 1), (SFT(), 2)))])
def test_a_desensitized_objective_sees_the_weighted_sums(objective, soft):
    policy, reference = token_batch(soft, weights=True)
    pairs = []
    for side in (policy, reference):
        logps = ld_sequence_logps(policy.weights * side.logps, policy.cu_seqlens, 0.3)
        pairs.append(SequenceLogps.from_sequences(logps, policy.lengths, side.preference))
    out = LengthDesensitized(objective, 0.3)(policy, reference)
    assert_close(out.loss, objective(*pairs).loss, 1e-12)
    assert_close(out.rejected_rewards, objective(*pairs).rejected_rewards, 1e-12)


# Weighted preference optimization


@pytest.mark.parametrize("kind", ["sampled", "unaligned"])
def test_wpo_weighs_pairs_by_their_likelihood(kind):
    policy, reference = token_batch(weights=True)
    columns = policy.logps, policy.collision_entropy
    means = [
        sum(p + (h if kind == "sampled" else 0) for p, h in zip(z, e, strict=True)) / max(len(z), 1)
        for z, e in zip(*(responses(policy, column) for column in columns), strict=True)
    ]
    omega = [min(1.0, math.exp(sum(both))) for both in zip(means[:6], means[6:], strict=True)]
    assert len(set(omega)) == 6
    wrapped, base = WPO(DPO(), kind), LengthDesensitized(DPO(), 1.0)
    assert_close(wrapped.pair_weights(policy), omega, 1e-12)
    ours, theirs = wrapped(policy, reference), base(policy, reference)
    assert_close(ours.loss, torch.tensor(omega, dtype=torch.float64) * theirs.loss, 1e-12)
    assert torch.equal(ours.chosen_rewards, theirs.chosen_rewards)
    # The weight is a constant: it scales the incentives and has no slope of its own.
    each = torch.tensor(omega, dtype=torch.float64).repeat(2).repeat_interleave(policy.lengths)
    plain_incentives = token_incentives(base, policy, reference)
    assert_close(token_incentives(wrapped, policy, reference), each * plain_incentives, 1e-12)


def test_wpo_weighs_no_pair_more_than_once():
    policy, reference = token_batch()
    likely = dataclasses.replace(policy, collision_entropy=5 - policy.logps)
    as_likely_as_its_own = dataclasses.replace(policy, collision_entropy=-policy.logps)
    plain_loss = DPO()(policy.sequences(), reference.sequences()).loss
    for tokens in (likely, as_likely_as_its_own):
        assert torch.equal(WPO(DPO())(tokens, reference).loss, plain_loss)


@pytest.mark.parametrize("objective", [TDPO2(), TIDPO(), LengthDesensitized(DPO(), 0.3)], ids=repr)
def test_wpo_wraps_token_level_objectives(objective):
    policy, reference = token_batch(True)
    wrapped = WPO(objective)
    expected = wrapped.pair_weights(policy) * objective(policy, reference).loss
    assert torch.equal(wrapped(policy, reference).loss, expected)
    assert wrapped.columns == (*objective.columns, "collision_entropy")


def test_wpo_says_what_it_misses():
    policy, reference = token_batch()
    with pytest.raises(
        ValueError, match=r"collision_entropy: dpo\(wpo=sampled\) needs .*unaligned"
    ):
        WPO(DPO())(without(policy, "collision_entropy"), reference)
    assert WPO(DPO(), "unaligned").columns == ()
    WPO(DPO(), "unaligned")(plain(policy), reference)


# Weights of the data


@hard_and_soft
@pytest.mark.parametrize("objective", [DPO(), SimPO(), WeightedSum(((DPO(), 1), (SFT(), 2)))])
def test_a_weighted_objective_sees_the_weighted_sums(objective, soft):
    policy, reference = token_batch(soft, weights=True)
    pairs = []
    for side in (policy, reference):
        sums = [
            sum(c * x for c, x in zip(*columns, strict=True))
            for columns in zip(
                responses(policy, policy.weights), responses(policy, side.logps), strict=True
            )
        ]
        sums = torch.tensor(sums, dtype=torch.float64)
        pairs.append(SequenceLogps.from_sequences(sums, policy.lengths, side.preference))
    weighted = TokenWeighted(objective)
    ours, theirs = weighted(policy, reference), objective(*pairs)
    for name in ("loss", "chosen_rewards", "rejected_rewards"):
        assert_close(getattr(ours, name), getattr(theirs, name), 1e-12)
    assert (weighted.name, weighted.columns) == (objective.name, ())
    d_w, d_l = losses.incentives(objective, *pairs)
    each = torch.cat([d_w, -d_l]).repeat_interleave(policy.lengths)
    assert_close(token_incentives(weighted, policy, reference), policy.weights * each, 1e-12)


def test_without_weights_of_the_data_the_sums_are_plain():
    policy, reference = token_batch()
    ours = TokenWeighted(SimPO())(policy, reference)
    assert torch.equal(ours.loss, SimPO()(policy.sequences()).loss)


# All wrappers that look at tokens

TOKENWISE = [
    LengthDesensitized(DPO(), 0.3),
    LengthDesensitized(SimPO(), 0.0),
    LengthDesensitized(LabelSmoothing(FDivergence(IPO(), "js"), 0.1), 0.5),
    WPO(DPO()),
    WPO(LengthDesensitized(ORPO(), 0.5), "unaligned"),
    WPO(TDPO2()),
    TokenWeighted(IPOAvg()),
    WPO(TokenWeighted(SimPO())),
]
every_tokenwise = pytest.mark.parametrize("objective", TOKENWISE, ids=lambda o: o.name)


@every_tokenwise
def test_nothing_waits_for_the_device(objective):
    policy, reference = (on_meta(x) for x in token_batch(True, weights=True))
    assert objective(policy, reference).loss.shape == (6,)
    assert token_incentives(objective, policy, reference).shape == policy.logps.shape


@every_tokenwise
def test_everything_is_finite_and_keeps_its_precision(objective):
    for dtype, scale in ((torch.float32, 25.0), (torch.float64, 25.0), (torch.float32, 0.0)):
        policy, reference = token_batch(True, dtype, lengths=([4096, 0, 1], [3000, 4096, 0]))
        policy = dataclasses.replace(policy, logps=scale * policy.logps)
        out = objective(policy, reference)
        incentives = token_incentives(objective, policy, reference)
        for tensor in (out.loss, out.chosen_rewards, out.rejected_rewards, incentives):
            assert tensor.dtype == dtype and tensor.isfinite().all()


@every_tokenwise
def test_a_reference_is_needed_where_the_objective_needs_it(objective):
    policy, reference = token_batch()
    if objective.needs_reference:
        with pytest.raises(ValueError, match=r"reference: .* needs .* got None"):
            objective(policy)
        with pytest.raises(ValueError, match=r"reference: expected 45 tokens"):
            objective(policy, TokenLogps(torch.zeros(0), torch.zeros(1).long()))
    else:
        assert torch.equal(objective(policy).loss, objective(policy, reference).loss)


# Which option applies to what

APPLIES = {
    "f_divergence": set(OF_MARGIN),
    "offset": set(OF_REWARDS),
    "label_smoothing": {o.name for o in PAIRWISE if o.soft_labels},  # or has its own
    "ld_alpha": {o.name for o in PAIRWISE},
    "wpo": {o.name for o in PAIRWISE if o.soft_labels} | {"tdpo1", "tdpo2", "ti_dpo"},
}
VALUES = {
    "f_divergence": "js",
    "offset": 0.5,
    "label_smoothing": 0.2,
    "ld_alpha": 0.3,
    "wpo": True,
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("option", VALUES)
def test_an_option_is_used_or_refused_by_name(name, option):
    kind, value = KINDS[name], VALUES[option]
    own = any(field.name == option for field in dataclasses.fields(kind))
    if own:
        assert build_with_options(kind, {option: value}) == kind(**{option: value})
    elif name in APPLIES[option]:
        built = build_with_options(kind, {option: value})
        assert type(built) in WRAPPERS and built.objective == kind()
        assert getattr(built, option) == ("sampled" if option == "wpo" else value)
    else:
        with pytest.raises(ValueError, match=rf"^{option}: does not apply to {name}, "):
            build_with_options(kind, {option: value})


def test_options_compose_from_the_inside_out():
    parameters = {"wpo": "unaligned", "ld_alpha": 0.5, "label_smoothing": 0.1, "beta": 0.2}
    built = build_with_options(DPO, {**parameters, "f_divergence": "alpha", "f_alpha": 0.3})
    inner = LabelSmoothing(FDivergence(DPO(beta=0.2), "alpha", 0.3), 0.1)
    assert built == WPO(LengthDesensitized(inner, 0.5), "unaligned")
    assert built.name == (
        "dpo(f_divergence=alpha,f_alpha=0.3)(label_smoothing=0.1)(ld_alpha=0.5)(wpo=unaligned)"
    )
    assert isinstance(built, TokenLevelLoss) and built.needs_reference and built.soft_labels
    policy, reference = token_batch(True)
    assert built(policy, reference).loss.isfinite().all()


@pytest.mark.parametrize("kind", [DPO, ORPO, AOT, TDPO2, KTO, InfoNCA], ids=lambda k: k.name)
def test_options_that_change_nothing_wrap_nothing(kind):
    off = {"f_divergence": "reverse_kl", "offset": 0, "label_smoothing": 0, "ld_alpha": 1.0}
    off |= {"wpo": False}
    assert build_with_options(kind, off) == kind(**({"label_smoothing": 0} if kind is AOT else {}))


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        (DPO, {}),
        (SimPO, {"beta": 1.0, "label_smoothing": 0.2}),
        (Robust, {"label_smoothing": 0.2, "f_divergence": "js"}),
        (DPO, {"f_divergence": "alpha", "f_alpha": 0.3, "ld_alpha": 0.0, "wpo": True}),
        (TIDPO, {"lam": 0.2, "wpo": "unaligned"}),
    ],
)
def test_config_of_builds_it_again(kind, parameters):
    built = build_with_options(kind, parameters)
    config = config_of(built)
    if isinstance(built, losses.PairwiseLoss):
        assert config_of(TokenWeighted(built)) == config
    assert config.pop("name") == kind.name
    assert build_with_options(kind, config) == built
    assert {k: v for k, v in parameters.items() if v is not True}.items() <= config.items()


@pytest.mark.parametrize(
    ("kind", "parameters", "message"),
    [
        (DPO, {"gamma": 1}, "^gamma: not a parameter of dpo, which accepts beta; options of many"),
        (anchored.DDRO, {"beta": 1}, "^beta: not a parameter of ddro, which accepts none; "),
        (DPO, {"beta": 0}, "^beta: must be > 0"),
        (DPO, {"offset": -1}, "^offset: must be >= 0, got -1"),
        (DPO, {"offset": 1, "f_divergence": "js"}, r"^f_divergence: does not apply to dpo\(offset"),
        (DPO, {"label_smoothing": 0.5}, r"^label_smoothing: must be >= 0 and < 0\.5, got 0\.5"),
        (DPO, {"label_smoothing": False}, "^label_smoothing: must be a number, got False"),
        (DPO, {"label_smoothing": None}, "^label_smoothing: must be a number, got None"),
        (DPO, {"ld_alpha": 1.1}, r"^ld_alpha: must be >= 0 and <= 1, got 1\.1"),
        (DPO, {"ld_alpha": -0.1}, r"^ld_alpha: must be >= 0, got -0\.1"),
        (DPO, {"ld_alpha": True}, "^ld_alpha: must be a number, got True"),
        (DPO, {"wpo": "greedy"}, "^wpo: must be one of 'sampled', 'unaligned', got 'greedy'"),
        (DPO, {"wpo": 0}, "^wpo: must be one of .*, got 0"),
        (DPO, {"f_divergence": "tv"}, "^f_divergence: must be one of 'reverse_kl', 'forward_kl'"),
        (DPO, {"f_divergence": "js", "f_alpha": 0.3}, "^f_alpha: js has none; .* alpha"),
        (DPO, {"f_divergence": "alpha", "f_alpha": 1}, "^f_alpha: must be > 0 and < 1, got 1"),
        (DPO, {"f_alpha": 0.3}, "^f_alpha: it belongs to f_divergence: alpha"),
        (FDPO, {"f_divergence": "js"}, "^f_divergence: does not apply to f_dpo, .* dpo, cdpo"),
    ],
)
def test_bad_options_are_refused_by_name(kind, parameters, message):
    with pytest.raises(ValueError, match=message):
        build_with_options(kind, parameters)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelSmoothing(CDPO()), "label_smoothing: cdpo has its own; set that"),
        (lambda: LabelSmoothing(FDivergence(Robust())), "label_smoothing: robust.* has its own"),
        (lambda: LabelSmoothing(LabelSmoothing(DPO())), "label_smoothing: .* has its own"),
        (lambda: LabelSmoothing(BetaDPO()), "label_smoothing: does not apply to beta_dpo, whose"),
        (lambda: FDivergence(LabelSmoothing(DPO())), "f_divergence: does not apply to dpo\\(label"),
        (lambda: LengthDesensitized(WPO(DPO())), "ld_alpha: does not apply to dpo\\(wpo"),
        (lambda: WPO(LengthDesensitized(AOT())), "wpo: does not apply to aot\\(ld_alpha=0.5\\), "),
        (lambda: TokenWeighted(TDPO2()), "objective: expected one on pairs of .*, got tdpo2; use"),
        (lambda: WPO(InfoNCA()), "wpo: does not apply to info_nca, which is not one of pairs"),
    ],
)
def test_wrappers_refuse_what_they_cannot_wrap(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_options_are_those_of_the_wrappers():
    fields = [field.name for kind in WRAPPERS for field in dataclasses.fields(kind)]
    assert tuple(name for name in fields if name != "objective") == OPTIONS


@pytest.mark.parametrize(
    "kind", [*WRAPPERS, TokenWeighted, WeightedSum, TokenLevelSum], ids=lambda kind: kind.__name__
)
def test_docstrings_state_loss_incentives_and_source(kind):
    doc = inspect.getdoc(kind)
    assert doc.partition("\n")[0].endswith(".")
    assert re.findall(r"^(\w+): +", doc, flags=re.MULTILINE) == ["loss", "incentives", "source"]
