"""`losses.evaluate`: kernels against the objectives' own PyTorch code and its autograd."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from benchmarks import loss_kernels
from fastpref import losses, metrics
from fastpref.logps import SequenceLogps, TokenLogps, UnpairedLogps
from fastpref.losses import dispatch
from fastpref.losses.margin import DPO
from fastpref.losses.wrappers import TokenWeighted
from fastpref_kernels import losses as kernels
from fastpref_kernels.losses import pair, response
from tests.helpers.pairs import batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAIRS = [
    *(losses.build(name) for name in kernels.PAIR_OBJECTIVES),
    losses.build("pmo", beta=0.0),  # without a reference
    losses.build("sft", responses="both", average=False),
    losses.build("f_dpo", divergence="js", beta=0.3),
]
RESPONSES = [losses.build(name) for name in kernels.RESPONSE_OBJECTIVES]
POINT = torch.tensor(0.7, dtype=torch.float64, device=DEVICE)
WITHOUT_A_KERNEL = [
    losses.build("dpo", label_smoothing=0.1),
    losses.build("dpo", f_divergence="js"),
    losses.from_config([{"name": "dpo"}, {"name": "sft", "weight": 0.2}]),
    losses.build("beta_dpo"),
    losses.build("logpi_dpo"),
]


def moved(side, **changes):
    """The log-probs on the device, in fp64 unless changed."""
    values = {
        field.name: getattr(side, field.name).to(DEVICE)
        for field in dataclasses.fields(side)
        if getattr(side, field.name) is not None
    }
    return type(side)(**(values | changes))


def unpaired(count=7):
    """Policy and reference; the sixth response is empty."""
    policy, reference = map(moved, batch(count))
    lengths = policy.chosen_lengths.clone()
    lengths[5::11] = 0
    desirable = torch.arange(count, device=DEVICE) % 3 > 0
    sides = (policy.chosen, reference.chosen)
    return tuple(UnpairedLogps(logps, lengths, desirable) for logps in sides)


def point_of(objective):
    return POINT if objective.needs_reference_point else None


def weighted_gradients(output, inputs):
    """Gradients of a loss in which every pair or response has another weight and sign."""
    weights = torch.linspace(-1.5, 2.0, output.loss.numel(), dtype=torch.float64, device=DEVICE)
    return torch.autograd.grad((weights * output.loss).sum(), inputs, materialize_grads=True)


def assert_equal_but_for_rounding(ours, exact):
    assert ours.dtype == exact.dtype and ours.shape == exact.shape
    assert ((ours - exact).abs() <= 1e-12 * (1 + exact.abs())).all()


def with_gradient(side, *names):
    return dataclasses.replace(
        side, **{name: getattr(side, name).detach().requires_grad_() for name in names}
    )


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("objective", PAIRS, ids=repr)
def test_pairs_are_those_of_autograd(objective, soft):
    policy, reference = map(moved, batch(7, soft=soft))
    policy = with_gradient(policy, "chosen", "rejected")
    inputs = policy.chosen, policy.rejected
    plain = losses.evaluate(objective, policy, reference, impl="reference")
    ours = losses.evaluate(objective, policy, reference, impl="triton")
    assert isinstance(ours, losses.LossOutput) and ours.loss.requires_grad
    for name in ("loss", "chosen_rewards", "rejected_rewards"):
        assert_equal_but_for_rounding(getattr(ours, name), getattr(plain, name))
    assert not ours.chosen_rewards.requires_grad and not ours.rejected_rewards.requires_grad
    gradients = zip(
        weighted_gradients(ours, inputs), weighted_gradients(plain, inputs), strict=True
    )
    for got, exact in gradients:
        assert_equal_but_for_rounding(got, exact)
    assert not ours.metric_sums.requires_grad
    assert_equal_but_for_rounding(ours.metric_sums, metrics.pair_sums(plain, policy))
    assert plain.metric_sums is None
    incentives = losses.pair_incentives(objective, policy, reference, impl="triton")
    expected = losses.pair_incentives(objective, policy, reference, impl="reference")
    assert incentives[2] is expected[2] is None
    for got, exact in zip(incentives[:2], expected[:2], strict=True):
        assert_equal_but_for_rounding(got, exact)


@pytest.mark.parametrize("objective", RESPONSES, ids=repr)
def test_responses_are_those_of_autograd(objective):
    policy, reference = unpaired()
    policy = with_gradient(policy, "logps")
    arguments = objective, policy, reference, point_of(objective)
    plain = losses.evaluate(*arguments, impl="reference")
    ours = losses.evaluate(*arguments, impl="triton")
    assert isinstance(ours, losses.PointwiseOutput) and not ours.rewards.requires_grad
    assert_equal_but_for_rounding(ours.loss, plain.loss)
    assert_equal_but_for_rounding(ours.rewards, plain.rewards)
    (got,), (exact,) = (weighted_gradients(out, (policy.logps,)) for out in (ours, plain))
    assert_equal_but_for_rounding(got, exact)


def test_one_launch_a_call(monkeypatch):
    """And none in the backward pass."""
    launches = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launches.append(grid)
            return self.kernel[grid]

    monkeypatch.setattr(pair, "pair_losses_kernel", Counted(pair.pair_losses_kernel))
    monkeypatch.setattr(
        response, "response_losses_kernel", Counted(response.response_losses_kernel)
    )
    policy, reference = map(moved, batch(7, soft=True))
    policy = with_gradient(policy, "chosen", "rejected")
    losses.evaluate(losses.build("dpo"), policy, reference, impl="triton").loss.sum().backward()
    assert launches == [(1,)]
    single = with_gradient(unpaired()[0], "logps")
    objective = losses.build("kto")
    losses.evaluate(objective, single, unpaired()[1], POINT, impl="triton").loss.sum().backward()
    assert launches == [(1,), (1,)]


def test_only_one_response_may_carry_a_gradient():
    policy, reference = map(moved, batch(5))
    policy = with_gradient(policy, "rejected")
    losses.evaluate(losses.build("dpo"), policy, reference, impl="triton").loss.sum().backward()
    assert policy.rejected.grad is not None and policy.chosen.grad is None
    with torch.no_grad():
        output = losses.evaluate(losses.build("dpo"), policy, reference, impl="triton")
    assert not output.loss.requires_grad


def test_a_gradient_of_a_gradient_is_refused():
    policy, reference = map(moved, batch(5))
    policy = with_gradient(policy, "chosen")
    output = losses.evaluate(losses.build("dpo"), policy, reference, impl="triton")
    with pytest.raises(RuntimeError, match="no second derivatives; use impl='reference'"):
        torch.autograd.grad(output.loss.sum(), policy.chosen, create_graph=True)


@pytest.mark.parametrize("objective", WITHOUT_A_KERNEL, ids=lambda objective: objective.name)
def test_objectives_without_a_kernel_fall_back_or_are_refused_by_name(objective, monkeypatch):
    monkeypatch.setattr(dispatch, "_AUTO_DEVICES", {DEVICE})
    policy, reference = map(moved, batch(5))
    ours = losses.evaluate(objective, policy, reference)
    assert torch.equal(ours.loss, objective(policy, reference).loss)
    with pytest.raises(ValueError) as refusal:
        losses.evaluate(objective, policy, reference, impl="triton")
    expected = f"impl: 'triton' has no kernel for {objective.name}; use impl='auto'"
    assert str(refusal.value) == expected
    with pytest.raises(ValueError, match="impl: 'triton' has no kernel for"):
        losses.pair_incentives(objective, policy, reference, impl="triton")


def test_a_name_does_not_make_a_kernel():
    """A subclass, or a wrapper that goes by the name of what it wraps, has another loss."""

    class Mine(DPO):
        pass

    tokens = TokenLogps(torch.zeros(4), torch.tensor([0, 2, 4]))
    assert Mine.name == TokenWeighted(DPO()).name == "dpo"
    assert losses.has_kernel(DPO())
    assert not losses.has_kernel(Mine()) and not losses.has_kernel(TokenWeighted(DPO()))
    with pytest.raises(ValueError, match="has no kernel for dpo"):
        losses.evaluate(TokenWeighted(DPO()), tokens, tokens, impl="triton")


def test_auto_takes_the_kernel_where_the_tensors_fit(monkeypatch):
    monkeypatch.setattr(dispatch, "_AUTO_DEVICES", {DEVICE})
    objective = losses.build("dpo")
    policy, reference = map(moved, batch(5, soft=True))

    def took_kernel(policy, reference):
        return losses.evaluate(objective, policy, reference).metric_sums is not None

    assert took_kernel(policy, reference)
    assert not took_kernel(moved(policy, preference=policy.preference.float()), reference)
    forced = losses.evaluate(
        objective, moved(policy, preference=policy.preference.float()), reference, impl="triton"
    )
    assert forced.loss.dtype == torch.float64
    assert not took_kernel(policy, moved(reference, chosen=reference.chosen.float()))
    floats = {"chosen_lengths": policy.chosen_lengths.double()}
    assert not took_kernel(moved(policy, **floats), reference)
    soft = policy.preference.clone().requires_grad_()
    assert not took_kernel(moved(policy, preference=soft), reference)
    single, other = unpaired()
    kto = losses.build("kto")
    plain = losses.evaluate(kto, single, other, POINT.int())
    assert torch.equal(plain.loss, kto(single, other, POINT.int()).loss)


def test_auto_on_a_cpu_never_asks_for_triton(monkeypatch):
    def refuse(name):
        raise AssertionError(f"imported {name}")

    monkeypatch.setattr(dispatch, "import_module", refuse)
    policy, reference = batch(5)
    objective = losses.build("dpo")
    ours, plain = losses.evaluate(objective, policy, reference), objective(policy, reference)
    assert torch.equal(ours.loss, plain.loss) and ours.metric_sums is None
    losses.pair_incentives(objective, policy, reference)
    losses.evaluate(objective, policy, reference, impl="reference")


def test_a_device_that_has_no_kernels_says_why():
    policy, reference = (
        SequenceLogps(*(x.to("meta") for x in (side.chosen, side.rejected)), *[torch.ones(3)] * 2)
        for side in batch(3)
    )
    with pytest.raises(ValueError, match=r"impl: 'triton' cannot run on meta; move.*impl='auto'"):
        losses.evaluate(losses.build("dpo"), policy, reference, impl="triton")


@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
def test_arguments_are_refused_as_by_the_objective(impl):
    policy, reference = map(moved, batch(3))
    objective = losses.build("dpo")
    with pytest.raises(ValueError, match=r"reference: dpo needs.*got None"):
        losses.evaluate(objective, policy, None, impl=impl)
    with pytest.raises(ValueError, match=r"reference: expected 3 pairs.*\(4,\)"):
        losses.evaluate(objective, policy, moved(batch(4)[1]), impl=impl)
    with pytest.raises(ValueError, match=r"reference_point: dpo has none.*leave it out"):
        losses.evaluate(objective, policy, reference, POINT, impl=impl)
    with pytest.raises(ValueError, match="reference_point: kto needs one, got None"):
        losses.evaluate(losses.build("kto"), *unpaired(), impl=impl)


def test_an_unknown_implementation_is_refused():
    policy, reference = batch(3)
    with pytest.raises(ValueError, match="impl: expected 'auto', 'reference' or 'triton', got 'c'"):
        losses.evaluate(losses.build("dpo"), policy, reference, impl="c")


@pytest.mark.parametrize("name", losses.names())
def test_every_objective_takes_a_reference_point_or_refuses_it(name):
    objective = losses.build(name)
    if getattr(objective, "needs_reference_point", False):
        return
    with pytest.raises(ValueError, match=f"reference_point: {name} has none, got.*; leave it out"):
        objective.refuse_reference_point(POINT)
    objective.refuse_reference_point(None)


@pytest.mark.parametrize("name", loss_kernels.LOSSES)
def test_a_kernel_replaces_dozens_of_operations(name):
    """Mean, division of its gradient, and the products with the incentives remain."""
    plain, ours = (
        loss_kernels.operations(loss_kernels.evaluation(name, 32, DEVICE, impl))
        for impl in ("reference", "triton")
    )
    assert ours <= plain - 30
    if name != "kto":  # whose sums for the log are computed by PyTorch
        assert ours <= 8
