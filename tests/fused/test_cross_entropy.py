"""The replacement of cut-cross-entropy against `torch.nn.functional.cross_entropy` in fp64."""

from __future__ import annotations

import enum
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.fused.cross_entropy import (
    LinearCrossEntropy,
    LinearCrossEntropyImpl,
    compute_z_loss,
    linear_cross_entropy,
)

D, V = 5, 13
CASES = list(itertools.product((None, 2.0), (False, True), (0, True, 3), (-100, 4)))


def _tensors(
    bias: bool = True, ignore_index: int = -100, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor | None]:
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(V, (2, 7), generator=g)
    targets[0, 4:] = ignore_index

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    return {"e": normal(2, 7, D), "c": normal(V, D), "targets": targets,
            "bias": normal(V) if bias else None}  # fmt: skip


def _exact(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    shift: int,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    logits = e @ c.T if bias is None else e @ c.T + bias
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits, targets = logits[:, : 7 - shift], targets[:, shift:]
    loss = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=ignore_index, reduction=reduction
    )
    return loss, logits.logsumexp(2).masked_fill(targets == ignore_index, 0.0)


def _gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return list(torch.autograd.grad((weights * loss).sum(), leaves, retain_graph=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_log_sum_exps_and_gradients_are_those_of_full_logits(reduction: str) -> None:
    for softcap, bias, shift, ignore_index in CASES:
        tensors = _tensors(bias, ignore_index)
        options = dict(softcap=softcap, ignore_index=ignore_index, reduction=reduction)
        leaves = [x for x in tensors.values() if x is not None and x.is_floating_point()]
        exact = _exact(**tensors, **options, shift=int(shift))
        loss, lse = linear_cross_entropy(**tensors, **options, shift=shift, return_lse=True)
        alone = linear_cross_entropy(**tensors, **options, shift=shift)
        pairs = [(loss, exact[0]), (lse, exact[1]), (alone, exact[0])]
        for mine, other in pairs:
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
            both = zip(_gradients(mine, leaves), _gradients(other, leaves), strict=True)
            assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-12) for a, b in both)


def test_gradients_of_a_loss_with_z_loss_agree_with_finite_differences() -> None:
    tensors = _tensors()
    targets = tensors["targets"]

    def total(e: Tensor, c: Tensor, bias: Tensor) -> Tensor:
        loss, lse = linear_cross_entropy(e, c, targets, bias, shift=1, return_lse=True)
        return loss + 0.1 * compute_z_loss(lse, targets, shift=True)

    assert torch.autograd.gradcheck(total, [tensors[name] for name in ("e", "c", "bias")])


def test_z_losses_leave_out_ignored_tokens() -> None:
    lse, targets = torch.tensor([[3.0, 0.0, 1.0]]), torch.tensor([[9, 5, -100, 2]])
    options: dict[str, Any] = {"targets": targets, "shift": 1}
    assert compute_z_loss(lse, **options).item() == 5.0
    assert compute_z_loss(lse, reduction="sum", **options).item() == 10.0
    assert compute_z_loss(lse, reduction="none", **options).tolist() == [[9.0, 0.0, 1.0]]
    assert compute_z_loss(torch.tensor([1.0, 3.0])).item() == 5.0
    with pytest.raises(ValueError, match=r"reduction: expected 'mean', 'sum' or 'none', got 'm'"):
        compute_z_loss(lse, reduction="m")


def test_the_module_does_what_the_function_does() -> None:
    tensors = _tensors()
    options: dict[str, Any] = dict(softcap=3.0, reduction="sum", shift=2, return_lse=True)
    mine, other = (
        LinearCrossEntropy(**options)(**tensors),
        linear_cross_entropy(**tensors, **options),
    )
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    assert LinearCrossEntropy().state_dict() == {}


def test_every_implementation_and_filter_is_accepted_and_changes_nothing() -> None:
    tensors = _tensors(dtype=torch.float32)
    theirs = enum.IntEnum("Theirs", list(LinearCrossEntropyImpl.__members__))
    names = [*LinearCrossEntropyImpl, *theirs, "cce", "torch_compile", "CCE_EXACT"]
    losses = {linear_cross_entropy(**tensors, impl=name).item() for name in names}
    losses |= {
        linear_cross_entropy(**tensors, filter_eps=eps).item() for eps in (None, 0.1, "auto")
    }
    losses.add(
        linear_cross_entropy(
            **tensors,
            accum_e_fp32=True,
            accum_c_fp32=True,
            filter_e_grad=False,
            filter_c_grad=False,
        ).item()
    )
    assert len(losses) == 1


def test_half_precision_is_no_further_from_fp64_than_full_logits() -> None:
    tensors = _tensors(dtype=torch.bfloat16)
    wide = {k: x.detach().double().requires_grad_() if x.is_floating_point() else x
            for k, x in tensors.items()}  # fmt: skip
    options = dict(softcap=None, ignore_index=-100, reduction="mean")
    ours = linear_cross_entropy(**tensors, shift=1, **options)
    full, exact = (_exact(**x, shift=1, **options)[0] for x in (tensors, wide))
    errors = []
    for loss in (ours, full):
        grads = torch.autograd.grad(loss, [tensors[name] for name in ("e", "c", "bias")])
        true = torch.autograd.grad(exact, [wide[name] for name in ("e", "c", "bias")],
                                   retain_graph=True)  # fmt: skip
        errors.append([(a.double() - b).abs().max() for a, b in zip(grads, true, strict=True)])
    assert ours.dtype == torch.float32 and abs(ours.double() - exact) < 1e-6
    assert all(mine <= 1.5 * other + 1e-4 for mine, other in zip(*errors, strict=True))


def test_the_mean_of_no_token_is_nan_as_there_with_gradients_of_zero() -> None:
    tensors = _tensors()
    tensors["targets"] = torch.full_like(tensors["targets"], -100)
    loss = linear_cross_entropy(**tensors)
    loss.backward()
    assert loss.isnan() and tensors["c"].grad.count_nonzero() == 0
    assert linear_cross_entropy(**tensors, reduction="sum").item() == 0


def test_one_row_of_targets_has_one_loss_each() -> None:
    e, c = torch.eye(3), torch.zeros(4, 3)
    losses = linear_cross_entropy(e, c, torch.tensor([0, 1, -100]), reduction="none")
    torch.testing.assert_close(losses, torch.tensor([4.0, 4.0, 1.0]).log())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": 7}, r"shift: expected a number from 0 to 6, got 7"),
        ({"shift": -1}, r"shift: expected a number from 0 to 6, got -1"),
        ({"shift": 1.5}, r"shift: expected a number from 0 to 6, got 1.5"),
        ({"reduction": "avg"}, r"reduction: expected 'mean', 'sum' or 'none', got 'avg'"),
        ({"impl": "triton"}, r"impl: expected one of cce, torch_compile.*got 'triton'"),
        ({"filter_eps": "low"}, r"filter_eps: expected a number, 'auto' or None, got 'low'"),
        ({"vocab_parallel_options": object()}, r"vocab_parallel_options: .* not supported"),
        ({"targets": torch.zeros(2, 6).long()}, r"targets: expected shape \(2, 7\).*e, got"),
        ({"c": torch.zeros(V, 4)}, r"c: expected shape \(V, D\) and e of shape \(\.\.\., D\)"),
        ({"bias": torch.zeros(3)}, r"bias: expected shape \(13,\), one per row of c, got \(3,\)"),
        ({"targets": torch.full((2, 7), V)}, r"labels: expected -100 or an index below 13"),
        ({"targets": torch.zeros(2, 7)}, r"targets: expected int64 or int32, got torch.float32"),
        ({"c": torch.zeros(V, D).half()}, r"c: expected torch.float32 like e, got torch.float16; "),
        ({"softcap": -1.0}, r"softcap: expected a finite number above 0, got -1.0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    tensors = {**_tensors(dtype=torch.float32), **change}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**tensors)
