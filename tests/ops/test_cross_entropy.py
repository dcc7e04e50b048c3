"""Terms of cross entropies against full logits and ordinary autograd, in fp64, and their memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.ops import chunked
from fastpref.ops.cross_entropy import cross_entropy_terms
from tests.ops.test_chunked import PeakMemory

T, D, V = 11, 5, 17
HEADS: tuple[dict[str, Any], ...] = ({}, {"logit_scale": -0.7, "softcap": 2.0})


def _tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"hidden": (T, D), "weight": (V, D), "bias": (V,)}
    tensors = {
        name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }
    labels = torch.randint(V, (T,), generator=g)
    labels[3] = -100
    class_weights = torch.randn(V, generator=g, dtype=torch.float64)
    return {**tensors, "labels": labels, "class_weights": class_weights}


def _exact(tensors: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, ...]:
    raw = tensors["hidden"] @ tensors["weight"].T + tensors["bias"]
    logits = raw * options.get("logit_scale", 1.0)
    if "softcap" in options:
        logits = options["softcap"] * (logits / options["softcap"]).tanh()
    logp, ignored = logits.log_softmax(1), tensors["labels"] == -100
    values = (
        logp.gather(1, tensors["labels"].masked_fill(ignored, 0)[:, None]).squeeze(1),
        logits.logsumexp(1),
        logp @ tensors["class_weights"],
    )
    predicted = logits.argmax(1).masked_fill(ignored, -1)
    return *(x.masked_fill(ignored, 0.0) for x in values), predicted


def _gradients(terms: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 2, T, dtype=torch.float64)
    total = (weights * (terms[0] + 2 * terms[1].square() - 0.5 * terms[2])).sum()
    return list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("options", HEADS, ids=str)
@pytest.mark.parametrize("chunk_bytes", [2**20, 3 * V * 8])
def test_values_and_gradients_are_those_of_full_logits(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], chunk_bytes: int
) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", chunk_bytes)
    tensors = _tensors()
    leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    terms, exact = cross_entropy_terms(**tensors, **options), _exact(tensors, options)
    for mine, other in zip(terms, exact, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=1e-13)
    for mine, other in zip(_gradients(terms, leaves), _gradients(exact, leaves), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_gradients_agree_with_finite_differences() -> None:
    tensors = _tensors()
    leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight", "bias")]

    def terms(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        changed = {**tensors, "hidden": hidden, "weight": weight, "bias": bias}
        return cross_entropy_terms(**changed, softcap=2.0)[:3]

    assert torch.autograd.gradcheck(terms, leaves)


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_only_what_is_trained_gets_a_gradient(name: str) -> None:
    tensors = _tensors()
    tensors[name].requires_grad_()
    cross_entropy_terms(**tensors).lse.sum().backward()
    gradients = {key: x.grad is not None for key, x in tensors.items()}
    assert gradients == {key: key == name for key in tensors}


def test_half_precision_is_rounded_only_at_the_end() -> None:
    tensors = _tensors(torch.bfloat16)
    wide = {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}
    results = []
    for given in (tensors, wide):
        leaves = [given[name].requires_grad_() for name in ("hidden", "weight", "bias")]
        terms = cross_entropy_terms(**given)
        results.append((terms, _gradients(terms, leaves)))
    (terms, gradients), (exact, exact_gradients) = results
    assert terms.logps.dtype == torch.float32
    for mine, other in zip(terms[:3], exact[:3], strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-6, atol=1e-6)
    for mine, other in zip(gradients, exact_gradients, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.double(), other, rtol=2**-8, atol=1e-5)


def test_nan_in_an_ignored_row_stays_there() -> None:
    tensors = _tensors()
    tensors["hidden"][3] = float("nan")
    leaves = [tensors[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    terms = cross_entropy_terms(**tensors)
    assert all(x.isfinite().all() for x in (*terms, *_gradients(terms, leaves)))
    assert [x[3].item() for x in terms] == [0.0, 0.0, 0.0, -1]


def test_no_tokens_have_no_terms_and_gradients_of_zero() -> None:
    weight = torch.ones(V, D, requires_grad=True)
    terms = cross_entropy_terms(torch.ones(0, D), weight, torch.zeros(0, dtype=torch.int64))
    assert [len(x) for x in terms] == [0, 0, 0, 0]
    terms.lse.sum().backward()
    assert weight.grad is not None and weight.grad.count_nonzero() == 0


def test_derivatives_other_than_the_gradient_are_refused() -> None:
    tensors = _tensors()
    hidden = tensors["hidden"].requires_grad_()

    def total(hidden: Tensor) -> Tensor:
        return cross_entropy_terms(**{**tensors, "hidden": hidden}).logps.sum()

    with pytest.raises(RuntimeError, match="cross_entropy_terms: its gradient has no derivative"):
        torch.autograd.grad(total(hidden), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cross_entropy_terms: has the gradient of torch.autog"):
        torch.func.jvp(total, (hidden.detach(),), (torch.ones(T, D, dtype=torch.float64),))


def test_compiled_as_one_graph_it_is_the_same() -> None:
    tensors = _tensors(torch.float32)
    tensors["hidden"].requires_grad_()
    compiled = torch.compile(cross_entropy_terms, fullgraph=True, dynamic=True, backend="aot_eager")
    mine, other = compiled(**tensors), cross_entropy_terms(**tensors)
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.full((T,), V)}, r"labels: expected -100 or an index below 17"),
        ({"class_weights": torch.ones(V - 1)}, r"class_weights: expected floating .*\(17,\), .*"),
        ({"class_weights": torch.ones(V).long()}, r"class_weights: .* of torch.int64"),
        ({"softcap": 0.0}, r"softcap: expected a finite number above 0, got 0.0"),
        ({"bias": torch.zeros(3, dtype=torch.float64)}, r"bias: expected shape \(17,\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_entropy_terms(**{**_tensors(), **change})


@pytest.mark.parametrize("softcap", [None, 8.0])
def test_peak_memory_is_one_chunk(monkeypatch: pytest.MonkeyPatch, softcap: float | None) -> None:
    tokens, width, vocabulary, budget = 256, 2, 512, 65536  # the logits have 8 times the budget
    monkeypatch.setattr(chunked, "CHUNK_BYTES", budget)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    labels, classes = torch.arange(tokens), torch.ones(vocabulary)
    with PeakMemory(hidden, weight, labels, classes) as memory:
        terms = cross_entropy_terms(hidden, weight, labels, class_weights=classes, softcap=softcap)
        (terms.logps + terms.lse.square() + terms.weighted_logps).sum().backward()
    vectors = 100 * tokens + 4 * 4 * tokens * width + 4 * vocabulary * width
    assert 0.8 * budget <= memory.peak <= budget * (1 + 3 / chunked.SLICES) + vectors
