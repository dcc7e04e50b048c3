"""Fused losses against the plain-PyTorch objectives, whose incentives come from autograd."""

import dataclasses
import itertools
import math
import os

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.pairs import batch, extremes

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from fastpref import losses, metrics
from fastpref.logps import SequenceLogps, UnpairedLogps
from fastpref.losses import anchored, normalized, pointwise
from fastpref_kernels.common import numerics
from fastpref_kernels.losses import (
    PAIR_METRICS,
    PAIR_OBJECTIVES,
    RESPONSE_METRICS,
    RESPONSE_OBJECTIVES,
    PairLosses,
    ResponseLosses,
    pair,
    pair_losses,
    response,
    response_losses,
)
from fastpref_kernels.losses import anchored as objectives_anchored
from fastpref_kernels.losses import normalized as objectives_normalized

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# The loss of a pair depends on its batch, its group, or its tokens.
NOT_ALONE = {"beta_dpo", "aot", "aot_unpaired", "tdpo1", "tdpo2", "ti_dpo"}
NOT_ALONE |= {"info_nca", "nca", "pro_s", "rloo", "nash_md", "gspo"}
OF_ANOTHER = {"logpi_dpo"}  # its kernel is that of `pmo`, with beta = 0

# Beside the defaults: every hyperparameter at another value, and at its special ones.
OTHERS: dict[str, list[dict]] = {
    "dpo": [{"beta": 0.7}],
    "cdpo": [{"beta": 0.3, "label_smoothing": 0.05}, {"label_smoothing": 0.0}],
    "robust": [{"beta": 0.3, "label_smoothing": 0.4}, {"label_smoothing": 0.0}],
    "ipo": [{"tau": 0.02}],
    "hinge": [{"beta": 0.02}],
    "exo_pair": [{"beta": 0.5, "label_smoothing": 0.2}],
    "discopop": [{"beta": 0.3, "tau": 0.5}, {"beta": 0.7, "tau": 3.0}],
    "r_dpo": [{"beta": 0.05, "alpha": 0.5}, {"alpha": 0.0}],
    "pmo": [{"alpha": 0.05, "beta": 0.3}, {"beta": 0.0}, {"alpha": 0.0}],
    "h_dpo": [{"beta": 0.3, "alpha": 1.2}, {"alpha": 1.0}],
    "bpo": [
        {"beta": 0.5, "lam": -0.5, "scale": 2.0, "clip_low": 0.025},
        {"lam": 0.0, "scale": 1.0},
        {"lam": 1.0, "clip_low": 0.0, "beta": 0.9},
    ],
    "f_dpo": [
        {"divergence": "forward_kl", "beta": 0.3},
        {"divergence": "js"},
        {"divergence": "alpha"},
        {"divergence": "alpha", "alpha": 0.2, "beta": 0.3},
    ],
    "chi_po": [{"beta": 0.005, "r_max": 0.3}],
    "ipo_avg": [{"tau": 0.5}],
    "dpo_norm": [{"beta": 0.3}],
    "simpo": [{"beta": 10.0, "gamma": -3.0}],
    "slic_hf": [{"delta": 10.0, "lam": 0.7}, {"delta": 0.0, "lam": 0.0}],
    "rrhf": [{"lam": 0.01}, {"lam": 0.3, "average": False}],
    "cpo": [{"beta": 0.4, "lam": 0.0}],
    "cpo_simpo": [{"beta": 2.0, "gamma": -0.3, "lam": 0.2}],
    "orpo": [{"lam": 2.0}],
    "simper": [],
    "stapo": [{"beta": 0.7, "left_margin": -1.0, "right_margin": 2.5}],
    "stapo_ref": [{"beta": 0.7, "left_margin": -1.0, "right_margin": 2.5}],
    "sft": [
        {"responses": responses, "average": average}
        for responses, average in (("chosen", False), ("both", True), ("both", False))
    ],
    "dpop": [{"beta": 0.05, "lam": 2.0}, {"lam": 0.0}],
    "cal_dpo": [{"beta": 0.1}],
    "nca_pair": [{"beta": 0.3}],
    "bco_pair": [{"beta": 0.3}],
    "sppo_hard": [{"beta": 0.1}],
    "apo_zero": [{"beta": 0.4}],
    "apo_down": [{"beta": 0.4}],
    "ddro": [],
    "dil_bce": [],
    "dil_ukl": [],
    "dil_lsif": [],
    "pro_p": [{"beta": 0.4}],
}
RESPONSE_OTHERS: dict[str, list[dict]] = {
    "kto": [{"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.3}],
    "kto_simple": [{"desirable_weight": 1.5, "undesirable_weight": 0.3}],
    "bco": [{"beta": 0.3}],
    "ddro_unpaired": [],
    "pro_b": [{"beta": 0.1, "alpha": 7.5, "desirable_weight": 2.0, "undesirable_weight": 0.3}],
}
RESPONSE_CLASSES = {objective.name: objective for objective in pointwise.OBJECTIVES}

CASES = [losses.build(name, **x) for name, others in OTHERS.items() for x in ({}, *others)]
RESPONSE_CASES = [
    RESPONSE_CLASSES[name](**x) for name, others in RESPONSE_OTHERS.items() for x in ({}, *others)
]
every_case = pytest.mark.parametrize("objective", CASES, ids=repr)
every_objective = pytest.mark.parametrize("name", OTHERS)
every_response_case = pytest.mark.parametrize("objective", RESPONSE_CASES, ids=repr)

# Pairs, or responses: one lane, some lanes, and a block of 256 that is half full; the last once
# within a nat or two of the reference and once far beyond most of the limits.
SIZES_AND_SPREADS = ((1, 1.0), (7, 5.0), (130, 1.0), (130, 5.0))
# clip_low = 0 of `bpo` means no limit, -log 0; only numpy, under the interpreter, finds it odd.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log")


def parameters(objective) -> dict:
    return {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}


def moved(logps: SequenceLogps, dtype: torch.dtype = torch.float64) -> SequenceLogps:
    """The same pairs on the device, log-probs and labels in the dtype."""
    values = {field.name: getattr(logps, field.name) for field in dataclasses.fields(logps)}
    return SequenceLogps(
        **{
            name: x if x is None else x.to(DEVICE, torch.int64 if "lengths" in name else dtype)
            for name, x in values.items()
        }
    )


def fused(objective, policy: SequenceLogps, reference: SequenceLogps | None) -> PairLosses:
    return pair_losses(
        objective.name,
        parameters(objective),
        policy.chosen,
        policy.rejected,
        None if reference is None else reference.chosen,
        None if reference is None else reference.rejected,
        policy.chosen_lengths,
        policy.rejected_lengths,
        policy.preference,
    )


def plain(objective, policy: SequenceLogps, reference: SequenceLogps) -> list[Tensor]:
    """Loss, d_w, d_l and the rewards, as the first five fields of `PairLosses`."""
    out = objective(policy, reference)
    d_w, d_l = losses.incentives(objective, policy, reference)
    return [out.loss, d_w, d_l, out.chosen_rewards, out.rejected_rewards]


def assert_equal_but_for_rounding(got, expected) -> None:
    """fp64 to 1e-12 of the magnitude: thousands of units in the last place, as no formula needs."""
    for value, exact in zip(got, expected, strict=False):
        assert value.dtype == torch.float64 and value.shape == exact.shape
        assert value.isfinite().all()
        assert ((value - exact).abs() <= 1e-12 * (1 + exact.abs())).all()


def assert_rounded(got, single, exact) -> None:
    """fp32: at most twice PyTorch's error in fp32, or what an exponential of e^20 may lose.

    A GPU takes e^x as a power of two: rounding x log2(e), up to 29 here, costs 20 units in the last
    place; 32 leave room for the sums around it.
    """
    for value, theirs, truth in zip(got, single, exact, strict=False):
        assert value.dtype == torch.float32
        slack = 32 * 2**-24 * (1 + truth.abs())
        assert ((value - truth).abs() <= 2 * (theirs - truth).abs() + slack).all()


@every_case
def test_pairs_match_autograd(objective) -> None:
    for (B, spread), soft in itertools.product(SIZES_AND_SPREADS, (False, True)):
        policy, reference = map(moved, batch(B, seed=B, soft=soft, spread=spread))
        assert_equal_but_for_rounding(
            fused(objective, policy, reference), plain(objective, policy, reference)
        )


@every_case
def test_pairs_in_single_precision(objective) -> None:
    for soft in (False, True):
        policy, reference = (moved(x, torch.float32) for x in batch(130, soft=soft))
        assert_rounded(
            fused(objective, policy, reference),
            plain(objective, policy, reference),
            plain(objective, moved(policy), moved(reference)),
        )


# Every 61st of the 16384 pairs meets every ratio, length and size on both sides.
@every_case
def test_extreme_pairs(objective) -> None:
    """Log-ratios of up to 1e4 nats, sums of 1e5, empty responses and 32k tokens."""
    for p in (None, 0.3):
        policy, reference = (
            SequenceLogps(*(None if x is None else x[::61] for x in dataclasses.astuple(side)))
            for side in extremes(torch.float64, p)
        )
        policy, reference = moved(policy), moved(reference)
        assert_equal_but_for_rounding(
            fused(objective, policy, reference), plain(objective, policy, reference)
        )
    single = fused(objective, moved(policy, torch.float32), moved(reference, torch.float32))
    assert all(x.isfinite().all() for x in single)


@pytest.mark.parametrize("soft", [False, True])
def test_rrhf_of_sums_has_the_kernel_of_slic_hf_without_its_margin(soft) -> None:
    policy = moved(batch(130, soft=soft)[0])
    rrhf = fused(losses.build("rrhf", lam=0.3, average=False), policy, None)
    slic_hf = fused(losses.build("slic_hf", delta=0.0, lam=0.3), policy, None)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(rrhf, slic_hf, strict=True))


def test_the_extremes_cover_the_grid() -> None:
    policy, reference = extremes(torch.float64)
    for whole in (
        policy.chosen - reference.chosen, policy.rejected - reference.rejected,
        policy.chosen_lengths, policy.rejected_lengths,
    ):  # fmt: skip
        assert set(whole[::61].tolist()) == set(whole.tolist())


@every_objective
def test_sums_of_pairs(name) -> None:
    policy, reference = (moved(x, torch.float32) for x in batch(300, soft=True))  # two blocks
    out = fused(losses.build(name), policy, reference)
    columns = losses.LossOutput(out.loss, out.chosen_rewards, out.rejected_rewards)
    positive = (out.d_w > 0) & (out.d_l > 0)
    own = [out.d_w.double().sum(), out.d_l.double().sum(), (~positive).double().sum()]
    pairs = out.metrics.new_tensor([300.0])
    expected = torch.cat([pairs, metrics.pair_sums(columns, policy), torch.stack(own)])
    assert out.metrics.dtype == torch.float64 and out.metrics.shape == expected.shape
    # Another order of 300 terms in fp64, which may cancel and are as large as e^20.
    largest = max(x.abs().max().item() for x in (*out[:5], policy.chosen, policy.rejected))
    assert ((out.metrics - expected).abs() <= 300 * 2**-52 * (1 + 300 * largest)).all()
    assert torch.equal(out.metrics[[0, 4, -1]], expected[[0, 4, -1]])  # counts are exact
    assert 0 < out.metrics[4] < 300


def test_sums_are_named_as_the_trainer_names_them() -> None:
    assert PAIR_METRICS[1:8] == metrics.PAIR_METRICS
    assert PAIR_METRICS[0] == "pairs" and PAIR_METRICS[8:] == ("d_w", "d_l", "non_positive")


def test_half_of_the_equal_rewards_count_as_right() -> None:
    policy, _ = map(moved, batch(3))
    policy = dataclasses.replace(policy, rejected=policy.chosen)
    out = fused(losses.build("dpo"), policy, policy)
    assert out.metrics[PAIR_METRICS.index("rewards/accuracies")] == len(policy.chosen) / 2
    assert (out.chosen_rewards == 0).all() and (out.rejected_rewards == 0).all()


@pytest.mark.parametrize("u", [1.0, 4.0, 5.0, 7.0, 10.0, 13.0, 20.0, 80.0])
def test_small_losses_keep_their_digits(u) -> None:
    """log(1 + e^-u) of fp32 numbers, where 1 + e^-u is 1 from u = 17 on."""
    zero, one = torch.zeros(2, device=DEVICE), torch.ones(2, dtype=torch.int64, device=DEVICE)
    reference = SequenceLogps(zero, zero, one, one)
    policy = dataclasses.replace(reference, chosen=zero + u)
    out = fused(losses.build("dpo", beta=1.0), policy, reference)
    for got, exact in ((out.loss, math.log1p(math.exp(-u))), (out.d_w, 1 / (1 + math.exp(u)))):
        # A GPU loses u units of 2^-24 in e^-u.
        assert ((got.double() - exact).abs() <= (8 + u) * 2**-24 * exact).all()


def test_every_objective_of_single_pairs_and_responses_has_a_kernel() -> None:
    without = NOT_ALONE | OF_ANOTHER
    assert set(losses.names()) - without - set(RESPONSE_OBJECTIVES) == set(PAIR_OBJECTIVES)
    assert set(RESPONSE_OBJECTIVES) == set(RESPONSE_CLASSES)
    assert set(PAIR_OBJECTIVES) == set(OTHERS) and set(RESPONSE_OBJECTIVES) == set(RESPONSE_OTHERS)


@pytest.mark.parametrize("objective", CASES + RESPONSE_CASES, ids=repr)
def test_hyperparameters_are_those_of_the_objective(objective) -> None:
    kernel = {**PAIR_OBJECTIVES, **RESPONSE_OBJECTIVES}[objective.name]
    assert set(kernel.hyperparameters) == set(parameters(objective))
    assert kernel.needs_reference(parameters(objective)) == objective.needs_reference
    assert kernel.point == getattr(objective, "needs_reference_point", False)


@pytest.mark.parametrize("cases", [CASES, RESPONSE_CASES], ids=["pairs", "responses"])
def test_every_hyperparameter_is_varied(cases) -> None:
    """So that one that the kernel dropped would show."""
    for name, alike in itertools.groupby(cases, lambda objective: objective.name):
        seen = [parameters(objective) for objective in alike]
        for parameter in seen[0]:
            assert len({values[parameter] for values in seen}) > 1, (name, parameter)


def test_limits_are_those_of_the_objectives() -> None:
    assert numerics.EXP_LIMIT.value == losses.numerics.EXP_LIMIT
    assert objectives_normalized.ODDS_LIMIT.value == normalized.ODDS_LIMIT
    for module in (anchored, pointwise):
        assert math.log(module.DDRO_RATIO_LIMIT / 2) == objectives_anchored.DDRO_LIMIT.value


@every_objective
def test_no_pairs(name) -> None:
    policy, reference = map(moved, batch(0, soft=True))
    out = fused(losses.build(name), policy, reference)
    assert all(x.shape == (0,) for x in out[:5])
    assert (out.metrics == 0).all()


@every_objective
def test_a_log_prob_that_is_not_a_number_shows(name) -> None:
    policy, reference = map(moved, batch(7))
    policy.chosen[3] = float("nan")
    out = fused(losses.build(name), policy, reference)
    assert out.loss.isnan().tolist() == [False] * 3 + [True] + [False] * 3
    assert out.metrics[PAIR_METRICS.index("loss")].isnan()


def test_strides_and_int32_lengths() -> None:
    objective = losses.build("simpo")
    policy, reference = map(moved, batch(7, soft=True))
    strided = dataclasses.replace(
        policy,
        **{
            field.name: torch.stack([getattr(policy, field.name)] * 3, dim=1)[:, 1]
            for field in dataclasses.fields(policy)
            if getattr(policy, field.name) is not None
        },
    )
    short = dataclasses.replace(
        strided,
        chosen_lengths=strided.chosen_lengths.int(),
        rejected_lengths=strided.rejected_lengths.int(),
    )
    assert not short.chosen.is_contiguous()
    for got, expected in zip(
        fused(objective, short, None), fused(objective, policy, reference), strict=True
    ):
        assert torch.equal(got, expected)


def test_one_launch_and_nothing_else(monkeypatch) -> None:
    """On contiguous tensors PyTorch only allocates and takes views."""
    policy, reference = map(moved, batch(7, soft=True))
    grids, seen = [], []

    class Launches:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **options: None

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    unpaired = (policy.chosen, reference.chosen, policy.chosen_lengths, policy.chosen > -70)
    monkeypatch.setattr(pair, "pair_losses_kernel", Launches())
    monkeypatch.setattr(response, "response_losses_kernel", Launches())
    with Watch():
        fused(losses.build("dpo"), policy, reference)
        response_losses("kto_simple", parameters(RESPONSE_CLASSES["kto_simple"]()), *unpaired)
    assert grids == [(1,), (1,)]
    assert seen.count("new_empty") == 4  # the results and the sums of both
    assert set(seen) <= {"new_empty", "select", "detach", "view"}


def responses(S: int, spread: float = 3.0) -> tuple[UnpairedLogps, UnpairedLogps]:
    """Responses of which every eleventh is empty and two in three are desirable."""
    policy, reference = map(moved, batch(S, seed=S, spread=spread))
    lengths = policy.chosen_lengths.clone()
    lengths[5::11] = 0
    desirable = torch.arange(S, device=DEVICE) % 3 > 0
    return (
        UnpairedLogps(policy.chosen, lengths, desirable),
        UnpairedLogps(reference.chosen, lengths, desirable),
    )


def fused_responses(objective, policy, reference, point) -> ResponseLosses:
    return response_losses(
        objective.name,
        parameters(objective),
        policy.logps,
        reference.logps,
        policy.lengths,
        policy.desirable,
        point,
    )


def plain_responses(objective, policy, reference, point) -> list[Tensor]:
    """Loss, d and rewards, as the first three fields of `ResponseLosses`."""
    point = point if objective.needs_reference_point else None
    out = objective(policy, reference, point)
    return [
        out.loss, pointwise.pointwise_incentives(objective, policy, reference, point), out.rewards
    ]  # fmt: skip


@every_response_case
def test_responses_match_autograd(objective) -> None:
    for (S, spread), at in itertools.product(SIZES_AND_SPREADS, (-0.4, 1.3)):
        policy, reference = responses(S, spread)
        point = torch.tensor(at, dtype=torch.float64, device=DEVICE)
        arguments = objective, policy, reference, point
        assert_equal_but_for_rounding(fused_responses(*arguments), plain_responses(*arguments))


@every_response_case
def test_responses_in_single_precision(objective) -> None:
    single = [
        dataclasses.replace(side, logps=side.logps.float()) for side in responses(130, spread=5.0)
    ]
    double = [dataclasses.replace(side, logps=side.logps.double()) for side in single]
    point = torch.tensor(0.7, dtype=torch.float64, device=DEVICE)  # as `RunningMean` has it
    assert_rounded(
        fused_responses(objective, *single, point),
        plain_responses(objective, *single, point),
        plain_responses(objective, *double, point),
    )


@every_response_case
def test_extreme_responses(objective) -> None:
    """As for pairs; the sides of a pair serve as a desirable and an undesirable response."""
    policy, reference = (moved(side) for side in extremes(torch.float64))
    logps, lengths, ref = (
        torch.cat([a[::61], b[::61]])
        for a, b in (
            (policy.chosen, policy.rejected),
            (policy.chosen_lengths, policy.rejected_lengths),
            (reference.chosen, reference.rejected),
        )
    )
    desirable = torch.arange(len(logps), device=DEVICE) * 2 < len(logps)
    point = torch.tensor(0.7, dtype=torch.float64, device=DEVICE)
    sides = UnpairedLogps(logps, lengths, desirable), UnpairedLogps(ref, lengths, desirable)
    assert_equal_but_for_rounding(
        fused_responses(objective, *sides, point), plain_responses(objective, *sides, point)
    )
    single = [dataclasses.replace(side, logps=side.logps.float()) for side in sides]
    assert all(x.isfinite().all() for x in fused_responses(objective, *single, point))


@every_response_case
def test_sums_of_responses(objective) -> None:
    point = torch.tensor(0.7, dtype=torch.float64, device=DEVICE)
    for S in (0, 7, 600):
        policy, reference = responses(S)
        loss, d, rewards, sums = fused_responses(objective, policy, reference, point)
        good, bad = policy.desirable, ~policy.desirable
        wrong = ~(torch.where(good, d, -d) > 0)
        columns = [torch.ones_like(loss), good, loss]
        columns += [x[side] for x in (rewards, policy.logps, d) for side in (good, bad)]
        expected = torch.stack([column.double().sum() for column in (*columns, wrong)])
        assert sums.shape == expected.shape == (len(RESPONSE_METRICS),)
        # Another order of fp64 sums of up to 600 numbers.
        assert ((sums - expected).abs() <= 1e-12 * (1 + expected.abs())).all()


def of(**changes) -> dict:
    """The arguments of a valid call for three pairs, with some of them changed."""
    z, n = torch.zeros(3, device=DEVICE), torch.ones(3, dtype=torch.int64, device=DEVICE)
    valid = {"name": "dpo", "parameters": {"beta": 0.1}, "chosen": z, "rejected": z}
    valid |= {"ref_chosen": z, "ref_rejected": z, "chosen_lengths": n, "rejected_lengths": n}
    return valid | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "aot"}, "name: there is no kernel for 'aot'"),
        ({"parameters": {}}, "parameters: expected beta, got none"),
        ({"parameters": {"beta": 0.1, "tau": 1.0}}, "parameters: expected beta, got beta, tau"),
        ({"parameters": {"beta": math.nan}}, "parameters: beta must be a finite number, got nan"),
        ({"parameters": {"beta": "0.1"}}, "parameters: beta must be a finite number, got '0.1'"),
        (
            {"name": "f_dpo", "parameters": {"beta": 0.1, "alpha": 0.5, "divergence": "kl"}},
            "parameters: divergence must be one of 'reverse_kl', .*, got 'kl'",
        ),
        ({"ref_rejected": None}, "ref_rejected: dpo needs it, got None"),
        ({"chosen": torch.zeros(3, 1)}, r"chosen: expected one log-prob each, got \(3, 1\)"),
        ({"chosen": torch.zeros(3).half()}, "chosen: expected float32 or float64, got .*float16"),
        ({"rejected": torch.zeros(2)}, r"rejected: expected \(3,\) like chosen, got \(2,\)"),
        ({"ref_chosen": torch.zeros(3).double()}, "ref_chosen: expected float32, got .*float64"),
        ({"preference": torch.zeros(3).long()}, "preference: expected float32, got .*int64"),
        ({"chosen_lengths": torch.zeros(3)}, "chosen_lengths: expected int32 or int64, got"),
        ({"rejected": torch.zeros(3, device="meta")}, "rejected: expected device .*, got meta"),
    ],
)
def test_a_wrong_argument_is_named(changes, message) -> None:
    changes = {
        name: x.to(DEVICE) if isinstance(x, Tensor) and x.device.type == "cpu" else x
        for name, x in changes.items()
    }
    with pytest.raises(ValueError, match=message):
        pair_losses(**of(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "dpo"}, "name: there is no kernel for 'dpo', only for kto"),
        ({"reference": None}, "reference: bco needs it, got None"),
        ({"desirable": torch.ones(3)}, "desirable: expected bool, got .*float32"),
        ({"reference_point": None}, "reference_point: bco needs it, got None"),
        ({"reference_point": torch.zeros(1)}, r"reference_point: expected one .* got \(1,\)"),
    ],
)
def test_a_wrong_argument_of_responses_is_named(changes, message) -> None:
    z = torch.zeros(3, device=DEVICE)
    valid = {"name": "bco", "parameters": {"beta": 0.1}, "logps": z, "reference": z}
    valid |= {"lengths": z.long(), "desirable": z > 0, "reference_point": z.sum()}
    changes = {n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        response_losses(**(valid | changes))
