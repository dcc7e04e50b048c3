"""The stand-in for liger-kernel's linear cross entropy against the formula on full logits, in fp64.

liger-kernel itself runs on a CPU only in Triton's interpreter, which takes no softcap and no class
weights: those cases are few.
"""

from __future__ import annotations

import inspect
import os
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastpref.fused import liger
from fastpref.fused.liger.functional import liger_fused_linear_cross_entropy

pytest.importorskip("liger_kernel")

T, D, V = 9, 4, 13


def _tensors(seed: int = 0, bias: bool = True, ignore_index: int = -100) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(V, (T,), generator=g)
    target[:3] = ignore_index

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()

    return {"input": normal(T, D), "weight": normal(V, D), "target": target,
            "bias": normal(V) if bias else None}  # fmt: skip


def _mixture(seed: int) -> dict[str, Any]:
    """Options of a call, each drawn from a few values."""
    draw = random.Random(seed)
    weights = torch.linspace(0.1, 2.0, V, dtype=torch.float64)
    return {
        "ce_weight": draw.choice((None, weights)),
        "ignore_index": draw.choice((-100, 5)),
        "lse_square_scale": draw.choice((0.0, 0.01)),
        "label_smoothing": draw.choice((0.0, 0.1, 1.0)),
        "reduction": draw.choice(("mean", "sum", "none")),
        "softcap": draw.choice((None, 1.5)),
        "return_z_loss": draw.choice((False, True)),
        "accum_dtype": draw.choice((None, torch.float32)),
        "use_token_scaling": draw.choice((False, True)),
        "return_token_accuracy": draw.choice((False, True)),
        "return_predicted_tokens": draw.choice((False, True)),
    }


def _exact(tensors: dict[str, Any], options: dict[str, Any]) -> liger.CrossEntropyOutput:
    logits = tensors["input"] @ tensors["weight"].T
    logits = logits if tensors["bias"] is None else logits + tensors["bias"]
    if options["softcap"] is not None:
        logits = options["softcap"] * (logits / options["softcap"]).tanh()
    target, ignore_index = tensors["target"], options["ignore_index"]
    scored = target != ignore_index
    loss = cross_entropy(
        logits, target, weight=options["ce_weight"], ignore_index=ignore_index, reduction="none",
        label_smoothing=options["label_smoothing"],
    )  # fmt: skip
    z_loss = options["lse_square_scale"] * logits.logsumexp(1).square() * scored
    if options["reduction"] == "mean":
        classes = torch.ones(V) if options["ce_weight"] is None else options["ce_weight"]
        loss, z_loss = loss / classes[target[scored]].sum(), z_loss / scored.sum()
    if options["use_token_scaling"]:
        labels = target.clamp(min=0)[:, None]
        p = logits.detach().softmax(1).gather(1, labels).squeeze(1) * scored
        loss, z_loss = loss * p, z_loss * p
    predicted = logits.argmax(1).masked_fill(~scored, -1)
    correct = ((predicted == target) & scored).float()
    none = options["reduction"] == "none"
    return liger.CrossEntropyOutput(
        (loss + z_loss) if none else (loss + z_loss).sum(),
        z_loss if none else z_loss.sum(),
        correct if none else correct.sum() / scored.sum(),
        predicted,
    )


def _gradients(loss: Tensor, tensors: dict[str, Any]) -> list[Tensor]:
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    leaves = [tensors[name] for name in ("input", "weight", "bias") if tensors[name] is not None]
    return list(torch.autograd.grad((upstream * loss).sum(), leaves))


@pytest.mark.parametrize("seeds", [range(k, 120, 4) for k in range(4)], ids=str)
def test_any_mixture_of_options_gives_the_formula(seeds: range) -> None:
    for seed in seeds:
        options = _mixture(seed)
        tensors = _tensors(seed, bias=bool(seed % 3), ignore_index=options["ignore_index"])
        output = liger_fused_linear_cross_entropy(**tensors, **options)
        exact = _exact(tensors, options)
        wants = [options[f"return_{name}"] for name in ("z_loss", "token_accuracy")]
        wants.append(options["return_predicted_tokens"])
        assert isinstance(output, Tensor) != any(wants)
        if isinstance(output, Tensor):
            output = liger.CrossEntropyOutput(output)
        torch.testing.assert_close(output.loss, exact.loss, rtol=1e-11, atol=1e-11)
        extras = (output.z_loss, output.token_accuracy, output.predicted_tokens)
        exact_extras = (exact.z_loss, exact.token_accuracy, exact.predicted_tokens)
        for want, mine, other in zip(wants, extras, exact_extras, strict=True):
            assert (mine is not None) == want
            if mine is not None:
                assert not mine.requires_grad
                torch.testing.assert_close(mine, other.detach(), rtol=1e-11, atol=1e-11)
        both = (_gradients(x.loss, tensors) for x in (output, exact))
        for mine, other in zip(*both, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-11)


def test_gradients_agree_with_finite_differences() -> None:
    tensors = _tensors()
    options = {"lse_square_scale": 0.1, "label_smoothing": 0.2, "softcap": 2.0}

    def loss(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return liger_fused_linear_cross_entropy(input, weight, tensors["target"], bias, **options)

    assert torch.autograd.gradcheck(loss, [tensors[name] for name in ("input", "weight", "bias")])


@pytest.mark.skipif(
    not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"),
    reason="liger-kernel needs a GPU or Triton's interpreter",
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_liger_itself_returns_the_same(reduction: str) -> None:
    from liger_kernel.transformers import functional

    options: dict[str, Any] = {
        "reduction": reduction, "lse_square_scale": 0.01, "label_smoothing": 0.1,
        "return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True,
    }  # fmt: skip
    results = []
    for function in (liger_fused_linear_cross_entropy, functional.liger_fused_linear_cross_entropy):
        tensors = {
            name: x.detach().float().requires_grad_() if x.is_floating_point() else x
            for name, x in _tensors().items()
        }
        output = function(**tensors, **options)
        results.append([*vars(output).values(), *_gradients(output.loss, tensors)])
    for mine, other in zip(*results, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (liger.FusedLinearCrossEntropyLoss.__init__, "__init__"),
        (liger.FusedLinearCrossEntropyLoss.forward, "forward"),
        (liger_fused_linear_cross_entropy, "function"),
    ],
)
def test_arguments_and_defaults_are_those_of_liger(ours: Any, theirs: str) -> None:
    from liger_kernel.transformers import functional, fused_linear_cross_entropy

    other = functional.liger_fused_linear_cross_entropy
    if theirs != "function":
        other = getattr(fused_linear_cross_entropy.LigerFusedLinearCrossEntropyLoss, theirs)
    mine, other = (inspect.signature(x).parameters.values() for x in (ours, other))
    assert [(p.name, p.default, p.kind) for p in mine] == [
        (p.name, p.default, p.kind) for p in other
    ]


def test_the_loss_of_no_token_is_zero_as_there() -> None:
    tensors = _tensors()
    tensors["target"][:] = -100
    for reduction in ("mean", "sum"):
        output = liger_fused_linear_cross_entropy(
            **tensors, reduction=reduction, ce_weight=torch.ones(V), return_token_accuracy=True
        )
        assert output.loss.item() == 0 and output.token_accuracy.isnan()
        assert [x.count_nonzero().item() for x in _gradients(output.loss, tensors)] == [0, 0, 0]


def test_a_head_is_trained_beside_a_frozen_trunk() -> None:
    """liger-kernel computes no gradient at all there."""
    tensors = _tensors()
    tensors["input"] = tensors["input"].detach()
    liger_fused_linear_cross_entropy(**tensors, lse_square_scale=0.1).backward()
    assert tensors["weight"].grad.abs().max() > 0 and tensors["bias"].grad.abs().max() > 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_under_autocast_the_gradient_of_an_fp32_head_is_not_rounded(smoothing: float) -> None:
    """Operands are those of a linear layer; both ways to the log-probs."""
    tensors = {k: x.detach().float() if x.is_floating_point() else x
               for k, x in _tensors().items()}  # fmt: skip
    rounded = {k: x.bfloat16().double().requires_grad_() if x.is_floating_point() else x
               for k, x in tensors.items()}  # fmt: skip
    for name in ("input", "weight", "bias"):
        tensors[name].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = liger_fused_linear_cross_entropy(**tensors, label_smoothing=smoothing)
    exact = liger_fused_linear_cross_entropy(**rounded, label_smoothing=smoothing)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    _, weight, bias = zip(_gradients(loss, tensors), _gradients(exact, rounded), strict=True)
    for mine, other in (weight, bias):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": 1.1}, r"label_smoothing: expected a number from 0 to 1, got 1.1"),
        ({"reduction": "avg"}, r"reduction: expected 'mean', 'sum' or 'none', got 'avg'"),
        ({"softcap": 0.0}, r"softcap: expected a number above 0 or None, got 0.0"),
        ({"ce_weight": torch.ones(V).long()}, r"ce_weight: expected floating point, got torch.int"),
        (
            {"ce_weight": torch.ones(V + 1)},
            r"ce_weight: expected shape \(13,\), one per row of lin",
        ),
        (
            {"input": torch.zeros(3, 3, D)},
            r"target: expected shape \(3, 3\), one per row of _input",
        ),
        (
            {"input": torch.zeros(3, 3, D).double(), "target": torch.zeros(3, 3).long()},
            r"_input: expected shape \(T, D\), got \(3, 3, 4\); flatten batch and time",
        ),
        ({"target": torch.full((T,), V)}, r"labels: expected -100 or an index below 13"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        liger_fused_linear_cross_entropy(**{**_tensors(), **change})
