"""Objectives from hidden states: padded, packed, shifted, masked, with a reference.

The objectives are on pairs; `test_views` has the other kinds.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from fastpref import fused, losses, ops
from fastpref.dynamics.reward_calibration import RewardCalibration
from fastpref.logps import SequenceLogps
from tests.helpers.dispatch import Inside
from tests.helpers.fused_batches import V, batch, gradients, packed


def expected(objective, hidden, weight, labels, ref_logps=None, preference=None, **head):
    """The definition: every position through the reference op, one sequence at a time."""
    sums = torch.stack(
        [
            ops.linear_logps(h, weight, y, impl="reference", **head).sum()
            for h, y in zip(hidden, labels, strict=True)
        ]
    )
    lengths = (labels != -100).sum(1)
    policy = SequenceLogps.from_sequences(sums, lengths, preference)
    reference = None if ref_logps is None else SequenceLogps.from_sequences(ref_logps, lengths)
    return policy, objective(policy, reference)


@pytest.mark.parametrize("with_mask", [True, False])
def test_shift_pairs_a_hidden_state_with_the_next_label(with_mask):
    hidden, weight, labels = batch()
    mask = torch.ones_like(labels) if with_mask else None
    module = fused.FusedPreferenceLoss("simpo")
    shifted, metrics = module(hidden, weight, labels, attention_mask=mask, shift=True)
    ours, same = module(hidden[:, :-1], weight, labels[:, 1:])
    assert shifted == ours and metrics == same
    assert shifted != module(hidden, weight, labels)[0]


def test_shift_in_a_packed_batch_stops_at_each_sequence():
    hidden, weight, labels = batch(pairs=2, length=4)
    labels = labels.clamp(min=0)  # every token is scored, so that each label that is lost shows
    sizes = [4, 1, 0, 3]  # an empty sequence, and one whose only label nothing predicts
    for first in range(4):  # each of them once at the front
        order = sizes[first:] + sizes[:first]
        kept = torch.arange(4) < torch.tensor(order)[:, None]
        module = fused.FusedPreferenceLoss("simpo")
        ours = module(*_with(packed(hidden, labels, kept), weight), shift=True)[1]
        alone = [
            ops.linear_logps(hidden[s, : n - 1], weight, labels[s, 1:n]).sum() if n else 0.0
            for s, n in enumerate(order)
        ]
        assert ours["logps/chosen"].item() == pytest.approx(float(alone[0] + alone[1]) / 2)
        assert ours["logps/rejected"].item() == pytest.approx(float(alone[2] + alone[3]) / 2)


def _with(parts, weight):
    rows, targets, cu_seqlens = parts
    return rows, weight, targets, cu_seqlens


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(side):
    hidden, weight, labels = batch()
    labels = labels.clamp(min=0)  # every token is scored, so that only the mask can exclude
    module = fused.FusedPreferenceLoss("simpo")
    alone = module(hidden, weight, labels, shift=True)
    more = {"left": (2, 0), "right": (0, 2)}[side]
    pad = torch.nn.functional.pad
    wide = pad(hidden, (0, 0, *more), value=float("nan"))
    mask = pad(torch.ones_like(labels), more)
    ours = module(wide, weight, pad(labels, more, value=3), attention_mask=mask, shift=True)
    assert ours[0] == alone[0] and ours[1] == alone[1]


def test_only_scored_tokens_reach_the_head_and_the_reference_has_no_graph(monkeypatch):
    seen = []
    real = ops.linear_logps
    monkeypatch.setattr(
        ops,
        "linear_logps",
        lambda h, *a, **k: seen.append((len(h), torch.is_grad_enabled())) or real(h, *a, **k),
    )
    hidden, weight, labels = batch()
    module = fused.FusedPreferenceLoss("dpo")
    module(hidden, weight, labels, ref_hidden=hidden, ref_weight=weight)
    scored = int((labels != -100).sum())
    assert seen == [(scored, True), (scored, False)]  # the reference saves nothing for a gradient


class NoSync(Inside):
    """Raises where a value or a shape would be read back from a device."""

    def seen(self, func, args, out):
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        ), func


@pytest.mark.parametrize("shift", [True, False])
def test_a_packed_batch_reads_nothing_back(shift):
    hidden, weight, labels = batch()
    rows, targets, cu_seqlens = packed(hidden, labels)
    rows.requires_grad_()
    module = fused.FusedPreferenceLoss("dpo")
    with NoSync():
        loss, _ = module(rows, weight, targets, cu_seqlens, ref_hidden=rows.detach(),
                         ref_weight=weight, shift=shift)  # fmt: skip
        loss.backward()
        with pytest.raises(AssertionError, match="nonzero"):
            module(hidden, weight, labels, ref_logps=torch.zeros(6))


def test_a_packed_batch_compiles_into_one_dynamic_graph():
    hidden, weight, labels = batch(dtype=torch.float32)
    rows, targets, cu_seqlens = packed(hidden, labels)
    module = fused.FusedPreferenceLoss("dpo", logit_scale=0.5, softcap=4.0)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    ref_logps = -torch.rand(6)
    mine, other = (
        gradients(
            lambda h, w, m=m: m(h, w, targets, cu_seqlens, ref_logps=ref_logps)[0], rows, weight
        )
        for m in (compiled, module)
    )
    torch.testing.assert_close(mine, other)


def test_reference_from_its_hidden_states():
    hidden, weight, labels = batch()
    ref_hidden, ref_weight, _ = batch(seed=1)
    wide = torch.cat([ref_hidden, ref_hidden], 2)  # a reference of another width
    ref_weight = torch.cat([ref_weight, ref_weight], 1).requires_grad_()
    ref_bias = torch.randn(V, dtype=torch.float64)
    given = {"ref_hidden": wide.requires_grad_(), "ref_weight": ref_weight, "ref_bias": ref_bias}
    module = fused.FusedPreferenceLoss("dpo", softcap=4.0, logit_scale=0.5)
    head = {"softcap": 4.0, "logit_scale": 0.5}
    ref = expected(module.loss, wide, ref_weight, labels, torch.zeros(6), bias=ref_bias, **head)[0]
    sums = torch.cat([ref.chosen, ref.rejected]).detach()
    hidden.requires_grad_()
    mine, metrics = module(hidden, weight, labels, **given)
    other, same = module(hidden, weight, labels, ref_logps=sums)
    torch.testing.assert_close(mine, other)
    torch.testing.assert_close(metrics, same)
    mine.backward()
    assert wide.grad is None and ref_weight.grad is None and hidden.grad is not None


def test_policy_equal_to_reference_has_rewards_of_exactly_zero():
    hidden, weight, labels = batch(dtype=torch.float32)
    module = fused.FusedPreferenceLoss("dpo")
    loss, metrics = module(hidden.requires_grad_(), weight.requires_grad_(), labels,
                           ref_hidden=hidden, ref_weight=weight)  # fmt: skip
    assert metrics["rewards/chosen"] == metrics["rewards/margins"] == 0
    assert loss.item() == pytest.approx(0.6931472)


def test_an_objective_without_reference_computes_none(monkeypatch):
    hidden, weight, labels = batch()
    module = fused.FusedPreferenceLoss("simpo")
    calls = []
    real = ops.linear_logps
    monkeypatch.setattr(ops, "linear_logps", lambda *a, **k: calls.append(1) or real(*a, **k))
    module(hidden, weight, labels, ref_hidden=hidden, ref_weight=weight)
    assert calls == [1]


def test_metrics_have_the_names_and_values_that_trainers_log():
    hidden, weight, labels = batch()
    bias = torch.randn(V, dtype=torch.float64)
    ref_logps = -torch.rand(6, dtype=torch.float64)
    preference = torch.tensor([0.7, 0.5, 1.0], dtype=torch.float64)
    objective = losses.build("dpo", beta=0.3)
    loss, metrics = fused.FusedPreferenceLoss(objective)(
        hidden.requires_grad_(), weight, labels, bias=bias, ref_logps=ref_logps,
        preference=preference,
    )  # fmt: skip
    policy, output = expected(objective, hidden, weight, labels, ref_logps, preference, bias=bias)
    margins = output.chosen_rewards - output.rejected_rewards
    torch.testing.assert_close(loss, output.loss.mean())
    torch.testing.assert_close(
        metrics,
        {
            "rewards/chosen": output.chosen_rewards.mean(),
            "rewards/rejected": output.rejected_rewards.mean(),
            "rewards/accuracies": (margins > 0).double().mean(),
            "rewards/margins": margins.mean(),
            "logps/chosen": policy.chosen.detach().mean(),
            "logps/rejected": policy.rejected.detach().mean(),
        },
    )
    assert not any(value.requires_grad for value in metrics.values())


def test_calibration_changes_gradients_and_nothing_else():
    """From the second step on each response has a factor, its partner has the inverse."""
    hidden, weight, labels = batch()
    ref_logps = -torch.rand(6, dtype=torch.float64)
    calibration = RewardCalibration()
    runs = []
    for module in (
        fused.FusedPreferenceLoss("dpo"),
        fused.FusedPreferenceLoss("dpo", calibration, accumulation_steps=2),
    ):
        for _ in range(3):  # the averages begin after the second call
            leaf = hidden.clone().requires_grad_()
            loss, metrics = module(leaf, weight, labels, ref_logps=ref_logps)
            loss.backward()
        runs.append((loss, metrics, leaf.grad))
    (loss, metrics, plain), (same_loss, same_metrics, scaled) = runs
    assert loss == same_loss and metrics == same_metrics
    assert calibration.averages.isfinite().all()
    factors = (scaled / plain)[:3].flatten(1), (scaled / plain)[3:].flatten(1)
    for chosen, rejected in zip(*factors, strict=True):
        a, b = chosen[chosen.isfinite()], rejected[rejected.isfinite()]
        factor = torch.cat([a, 1 / b])  # one factor a response, its inverse for the other
        torch.testing.assert_close(factor, factor[:1].expand_as(factor))
    assert not torch.allclose(scaled, plain)


def test_the_averages_of_a_calibration_are_saved():
    hidden, weight, labels = batch()
    module = fused.FusedPreferenceLoss("simpo", calibration := RewardCalibration())
    module(hidden.requires_grad_(), weight, labels)
    again = fused.FusedPreferenceLoss("simpo", restored := RewardCalibration())
    again.load_state_dict(module.state_dict())
    assert torch.equal(restored.averages, calibration.averages)
    assert calibration.averages.isfinite().all()


def test_calibration_rests_without_gradients_and_in_evaluation():
    hidden, weight, labels = batch()
    module = fused.FusedPreferenceLoss("simpo", calibration := RewardCalibration())
    with torch.no_grad():
        module(hidden, weight, labels)
    module.eval()(hidden.requires_grad_(), weight, labels)
    assert calibration.averages.isnan().all()


@pytest.mark.parametrize("name", ["simpo", "orpo", "sft"])
def test_a_batch_without_scored_tokens_is_finite(name):
    hidden, weight, labels = batch()
    grads = gradients(
        lambda h, w: fused.FusedPreferenceLoss(name)(h, w, labels.fill_(-100))[0], hidden, weight
    )
    assert grads[0].isfinite() and not grads[1].any() and not grads[2].any()


def test_another_ignore_index():
    hidden, weight, labels = batch()
    labels = labels.masked_fill(labels == 0, 1)
    plain = fused.FusedPreferenceLoss("simpo")(hidden, weight, labels)
    zero = labels.masked_fill(labels == -100, 0)
    ours = fused.FusedPreferenceLoss("simpo", ignore_index=0)
    assert ours(hidden, weight, zero) == plain
    rows, targets, cu_seqlens = packed(hidden, zero, torch.ones_like(zero, dtype=torch.bool))
    torch.testing.assert_close(ours(rows, weight, targets, cu_seqlens), plain)


def test_autocast_means_for_the_head_what_it_means_for_a_linear_layer():
    """Tiny, since a CPU multiplies bf16 slowly."""
    hidden, weight, labels = batch(dtype=torch.float32)
    module = fused.FusedPreferenceLoss("simpo")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = module(hidden, weight, labels)
        mixed = module(hidden.bfloat16(), weight, labels)
    half = module(hidden.bfloat16(), weight.bfloat16(), labels)
    assert ours == mixed == half
    with pytest.raises(ValueError, match=r"weight: expected torch.bfloat16 like hidden"):
        module(hidden.bfloat16(), weight, labels)


@pytest.mark.filterwarnings("ignore:divide by zero")  # numpy's, of lanes that are masked
@pytest.mark.parametrize("name", ["dpo", "simpo", "kto_simple", "info_nca"])
def test_the_kernel_of_the_objective_runs_where_the_head_uses_kernels(name, monkeypatch):
    """An objective without one, such as `info_nca`, is evaluated by its PyTorch code."""
    hidden, weight, labels = batch(dtype=torch.float32)
    objective = losses.build(name)
    given = {"ref_logps": torch.linspace(-12.0, -4.0, 6)} if objective.needs_reference else {}
    if isinstance(objective, losses.PointwiseLoss):
        given["desirable"] = torch.arange(6) % 2 == 0
    if isinstance(objective, losses.GroupwiseLoss):
        given |= {"cu_groups": torch.tensor([0, 3, 6]), "scores": torch.linspace(0, 1, 6)}
    kernels, launches = importlib.import_module("fastpref_kernels.losses"), []
    for launcher in ("pair_losses", "response_losses"):
        monkeypatch.setattr(kernels, launcher, _noted(getattr(kernels, launcher), launches))

    def run(impl):
        module = fused.FusedPreferenceLoss(objective, impl=impl)
        return gradients(lambda h, w: module(h, w, labels, **given)[0], hidden, weight)

    plain = run("reference")
    assert not launches
    for ours, expected in zip(run("triton"), plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert launches == ([] if name == "info_nca" else [name])


def _noted(launcher, launches):
    def run(name, *arguments):
        launches.append(name)
        return launcher(name, *arguments)

    return run


HIDDEN, WEIGHT, LABELS = batch()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": HIDDEN[:5], "labels": LABELS[:5]}, r"hidden: expected shape \(2B, L, D\).*\(5"),
        ({"labels": LABELS[:, :3]}, r"labels: expected shape \(6, 5\).*got \(6, 3\)"),
        ({"hidden": HIDDEN[0], "labels": LABELS[0]}, r"hidden: .*\(T, D\) with cu_seqlens"),
        ({"cu_seqlens": torch.arange(7)}, r"hidden: expected a packed \(T, D\)"),
        ({"hidden": HIDDEN[0], "labels": LABELS[0], "cu_seqlens": torch.tensor([0, 5])},
         r"cu_seqlens: expected 2 B \+ 1 offsets"),
        ({"hidden": HIDDEN[0], "labels": LABELS[0], "cu_seqlens": torch.tensor([0, 2, 5]),
          "attention_mask": LABELS}, r"attention_mask: a packed batch has no padding"),
        ({"attention_mask": LABELS[:2]}, r"attention_mask: expected shape \(6, 5\)"),
        ({}, r"ref_logps: dpo needs a reference.*got neither"),
        ({"ref_logps": torch.zeros(6), "ref_hidden": HIDDEN, "ref_weight": WEIGHT}, r"got both"),
        ({"ref_hidden": HIDDEN}, r"ref_weight: got None; pass ref_hidden and ref_weight"),
        ({"ref_logps": torch.zeros(3)}, r"ref_logps: expected shape \(6,\).*got \(3,\)"),
        ({"ref_hidden": HIDDEN[:, :3], "ref_weight": WEIGHT}, r"ref_hidden: expected .*'E'"),
        ({"preference": torch.ones(6), "ref_logps": torch.zeros(6)}, r"preference: expected"),
        ({"weight": WEIGHT[:, :3], "ref_logps": torch.zeros(6)}, r"weight: expected shape \(V, 6"),
    ],
)  # fmt: skip
def test_inputs_that_are_refused(change, message):
    module = fused.FusedPreferenceLoss("dpo")
    with pytest.raises(ValueError, match=message):
        module(**{"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS} | change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kot",), r"name: no objective is called 'kot'"),
        (("kto", RewardCalibration()), r"calibration: kto is not an objective on pairs"),
        ((3,), r"loss: expected an objective or the name of one, got 3"),
        (("dpo", object()), r"calibration: expected a RewardCalibration, got <object"),
    ],
)
def test_modules_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fused.FusedPreferenceLoss(*arguments)


@pytest.mark.parametrize("name", ["dpo", "stapo", "tdpo2", "kto_simple"])
def test_the_plain_pytorch_example_learns(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    found = importlib.import_module("plain_pytorch").main(["--steps", "10", "--loss", name])
    assert len(found) == 10 and found[-1] < 0.9 * found[0]
    assert "accuracy" in capsys.readouterr().out
