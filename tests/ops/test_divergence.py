"""Divergences of two heads against their full logits, in fp64, and their memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.ops import chunked
from fastpref.ops.divergence import linear_divergence
from tests.ops.test_chunked import PeakMemory

T, D, E, V = 13, 5, 7, 37
KINDS = ("forward", "reverse", "jsd")
HEADS: tuple[dict[str, Any], ...] = (
    {},
    {"logit_scale": 0.5, "softcap": 3.0, "teacher_logit_scale": 1.5, "temperature": 2.0},
    {"teacher_softcap": 2.0, "temperature": 0.7},
)


def _tensors(dtype: torch.dtype = torch.float64, tokens: int = T) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "hidden": (tokens, D),
        "weight": (V, D),
        "bias": (V,),
        "teacher_hidden": (tokens, E),
        "teacher_weight": (V, E),
        "teacher_bias": (V,),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def _logps(tensors: dict[str, Tensor], prefix: str, options: dict[str, Any]) -> Tensor:
    hidden, weight, bias = (tensors[f"{prefix}{name}"] for name in ("hidden", "weight", "bias"))
    logits = (hidden @ weight.T + bias) * options.get(f"{prefix}logit_scale", 1.0)
    cap = options.get(f"{prefix}softcap")
    if cap is not None:
        logits = cap * (logits / cap).tanh()
    return (logits / options.get("temperature", 1.0)).log_softmax(1)


def _exact(tensors: dict[str, Tensor], kind: str, beta: float, options: dict[str, Any]) -> Tensor:
    logq, logp = _logps(tensors, "", options), _logps(tensors, "teacher_", options)
    q, p = logq.exp(), logp.exp()
    if kind == "forward":
        return (p * (logp - logq)).sum(1)
    if kind == "reverse":
        return (q * (logq - logp)).sum(1)
    m = beta * p + (1 - beta) * q
    return (beta * p * (logp - m.log()) + (1 - beta) * q * (logq - m.log())).sum(1)


@pytest.mark.parametrize("chunk_bytes", [2**20, 1000])
@pytest.mark.parametrize("options", HEADS, ids=["plain", "student's", "teacher's"])
@pytest.mark.parametrize(("kind", "beta"), [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5),
                                            ("jsd", 0.1)])  # fmt: skip
def test_values_and_gradients_are_those_of_the_full_logits(
    monkeypatch: pytest.MonkeyPatch, kind: Any, beta: float, options: Any, chunk_bytes: int
) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", chunk_bytes)
    tensors = _tensors()
    upstream = torch.linspace(-1, 2, T, dtype=torch.float64)
    trained = [tensors[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    exact = _exact(tensors, kind, beta, options)
    expected = torch.autograd.grad(exact @ upstream, trained)
    ours = linear_divergence(kind=kind, beta=beta, **tensors, **options)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    for gradient, other in zip(
        torch.autograd.grad(ours @ upstream, trained), expected, strict=True
    ):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_trained_has_a_gradient(kind: Any) -> None:
    tensors = _tensors(torch.float32)
    for name in ("hidden", "teacher_hidden", "teacher_weight"):
        tensors[name].requires_grad_()
    linear_divergence(kind=kind, **tensors).sum().backward()
    assert [name for name, x in tensors.items() if x.grad is not None] == ["hidden"]
    tensors = _tensors(torch.float32)
    tensors["bias"].requires_grad_()
    linear_divergence(kind=kind, **tensors).sum().backward()
    bias = tensors["bias"].grad
    exact = {name: x.detach().double() for name, x in tensors.items()}
    exact["bias"].requires_grad_()
    _exact(exact, kind, 0.5, {}).sum().backward()
    assert bias is not None and exact["bias"].grad is not None
    torch.testing.assert_close(bias.double(), exact["bias"].grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_near_its_exact_value(kind: Any) -> None:
    """A student in bf16 may have a teacher in fp32, and no logit is rounded to half."""
    tensors = _tensors(torch.bfloat16)
    exact = _exact({name: x.double() for name, x in tensors.items()}, kind, 0.5, {})
    ours = linear_divergence(kind=kind, **tensors)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    mixed = {name: x.float() if name.startswith("teacher") else x for name, x in tensors.items()}
    torch.testing.assert_close(linear_divergence(kind=kind, **mixed), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_are_at_0_with_gradient_0(kind: Any) -> None:
    tensors = _tensors(torch.float32)
    twin = {"teacher_hidden": tensors["hidden"].clone(), "teacher_weight": tensors["weight"]}
    hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"]
    value = linear_divergence(hidden, weight, **twin, kind=kind)
    value.sum().backward()
    assert hidden.grad is not None
    assert value.abs().max() < 1e-6 and hidden.grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_peaked_and_very_negative_logits_stay_finite(kind: Any) -> None:
    tensors = _tensors(torch.float32)
    tensors["hidden"], tensors["teacher_hidden"] = (
        100 * tensors[name] for name in ("hidden", "teacher_hidden")
    )
    tensors["hidden"].requires_grad_()
    value = linear_divergence(kind=kind, **tensors)
    value.sum().backward()
    assert tensors["hidden"].grad is not None
    assert value.isfinite().all() and tensors["hidden"].grad.isfinite().all()
    assert (value >= -1e-4).all()


def test_no_tokens_give_no_values() -> None:
    tensors = _tensors(tokens=0)
    tensors["weight"].requires_grad_()
    value = linear_divergence(**tensors)
    value.sum().backward()
    assert value.shape == (0,) and tensors["weight"].grad is not None
    assert tensors["weight"].grad.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    """Beyond the gradient of the head, peak memory is one chunk and slices of it."""
    budget = 65536
    monkeypatch.setattr(chunked, "CHUNK_BYTES", budget)
    peaks = []
    for vocabulary in (256, 2048):
        hidden, teacher = (torch.randn(256, 2).requires_grad_(k == 0) for k in range(2))
        weight, other = (torch.randn(vocabulary, 2).requires_grad_(k == 0) for k in range(2))
        upstream = torch.ones(256)
        with PeakMemory(hidden, weight, teacher, other, upstream) as memory:
            linear_divergence(hidden, weight, teacher, other, kind).backward(upstream)
        peaks.append(memory.peak - weight.nbytes)
    # Full logits of both models are 8 times the budget at 256 tokens, and 64 times at 2,048.
    assert max(peaks) <= 1.5 * budget
    assert abs(peaks[1] - peaks[0]) < 0.2 * budget


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "js"}, "kind: expected 'forward', 'reverse' or 'jsd', got 'js'"),
        ({"kind": "jsd", "beta": 1.0}, "beta: expected a number between 0 and 1, got 1.0"),
        ({"temperature": 0.0}, "temperature: expected a number > 0, got 0.0"),
        ({"teacher_hidden": torch.zeros(3, E).double()}, "teacher_hidden: expected 13 rows"),
        ({"teacher_weight": torch.zeros(40, E).double()}, "pass the first 37 rows of both"),
        ({"teacher_bias": torch.zeros(3).double()}, r"teacher_bias: expected shape \(37,\)"),
        (
            {"teacher_hidden": torch.zeros(T, E), "teacher_weight": torch.zeros(V, E)},
            "teacher_hidden: fp64 needs both models in fp64",
        ),
        ({"softcap": -1.0}, "softcap: expected a finite number above 0"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_divergence(**{**_tensors(), **change})
