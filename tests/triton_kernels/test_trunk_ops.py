"""The trunk's elementwise kernels against its PyTorch code in fp64, and a whole block."""

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from fastpref.trunk import dispatch, gated, norm, rotary
from fastpref.trunk.norm import Norm
from fastpref_kernels import rms_norm, trunk
from tests.trunk.test_blocks import (
    COMMON,
    FAMILIES,
    PACKED,
    embeddings,
    explicit_hidden,
    hidden_and_gradients,
    model_of,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.bfloat16, torch.float16)
FP32 = 1e-6  # relative error in the norm
NORM = Norm(1e-6, 0.0)


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan() -> Iterator[None]:
    """Every output must be written: torch fills new tensors with NaN under this setting."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels on the CPU, too, except for fp64, which only PyTorch computes."""
    force(monkeypatch, trunk)


def force(monkeypatch: pytest.MonkeyPatch, implementation: Any) -> None:
    for module in (norm, rotary, gated):
        monkeypatch.setattr(
            module,
            "kernels_for",
            lambda x: None if x.dtype == torch.float64 else implementation,
        )


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def check(function: Callable[..., list[Tensor]], tensors: list[Tensor], *options: Any) -> None:
    """In fp32 rounding alone; in half precision at most twice the error of PyTorch's code."""
    exact = function(*(x.double() for x in tensors), *options)
    ours = function(*tensors, *options)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == tensors[0].dtype and a.shape == b.shape
        assert error(a, b) <= FP32
    for dtype in HALF:
        rounded = [x.to(dtype) for x in tensors]
        exact = function(*(x.double() for x in rounded), *options)
        ours = function(*rounded, *options)
        with pytest.MonkeyPatch.context() as patch:
            force(patch, None)
            plain = function(*rounded, *options)
        for a, b, c in zip(ours, plain, exact, strict=True):
            assert a.dtype == dtype
            assert error(a, c) <= 2 * error(b, c) + torch.finfo(dtype).eps


def normalized(grad: Tensor, x: Tensor, weight: Tensor, residual: Tensor, options) -> list[Tensor]:
    """Values, gradient with residual and without, gradient of the weight."""
    grad_x, no_gradient = norm.rms_norm_backward(grad, x, weight, options, False, residual)
    alone, grad_weight = norm.rms_norm_backward(grad, x, weight, options, True)
    both, again = norm.rms_norm_backward(grad, x, weight, options, True, residual)
    assert no_gradient is None and grad_weight is not None and again is not None
    assert torch.equal(grad_weight, again) and torch.equal(both, grad_x)
    return [norm.rms_norm(x, weight, options), grad_x, alone, grad_weight]


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(
    "shape", [(1, 9), (7, 30), (3, 576), (37, 3, 24), (2, 5, 128), (3, 2100)], ids=str
)
def test_rms_norm(kernels: None, shape: tuple[int, ...], offset: float) -> None:
    grad, x, residual = (draw(*shape) * scale for scale in (1.0, 3.0, 0.5))
    check(normalized, [grad, x.flip(0), draw(shape[-1]), residual], Norm(1e-5, offset))


def test_norms_of_the_widest_rows(kernels: None) -> None:
    """Sums of the weight's gradient have a launch of their own."""
    width = rms_norm.MAX_WIDTH
    check(normalized, [draw(2, width), draw(2, width).flip(0), draw(width), draw(2, width)], NORM)
    assert width == 16384
    x, weight = draw(2, width + 1), draw(width + 1)
    wide = norm.rms_norm(x.double(), weight.double(), NORM)
    assert error(norm.rms_norm(x, weight, NORM), wide) <= FP32  # by PyTorch


def added(
    x: Tensor, update: Tensor, first: Tensor, second: Tensor, constants: Norm
) -> list[Tensor]:
    """Residual sums and their norms, with each norm alone and with both."""
    norms = [(first, constants), (second, Norm(1e-6, 1 - constants.offset))]
    results = []
    for before, after in ((None, norms[1]), (norms[0], None), norms):
        copy = update.clone()
        total, normal = norm.residual_rms_norm(x, copy, before, after)
        assert torch.equal(copy, total if before is None else update)
        assert total.is_contiguous() and normal.is_contiguous()
        if after is None:
            assert normal is total
        else:
            # The backward pass computes this norm again from the total.
            assert error(norm.rms_norm(total, *after), normal.double()) <= FP32
        results += [total, normal]
    return results


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 9), (7, 30), (3, 576), (2, 2100), (2, 16384)], ids=str)
def test_norms_at_a_residual_addition(kernels: None, shape: tuple[int, int], offset: float) -> None:
    x, update = draw(*shape), 3 * draw(*shape).flip(0)
    weights = draw(shape[1]), draw(shape[1]).flip(0) + 1
    check(added, [x, update, *weights], Norm(1e-5, offset))


def test_a_residual_of_other_strides(kernels: None) -> None:
    update, weight = draw(9, 24), draw(24)
    joined, transposed = draw(9, 3, 24)[:, 1], draw(24, 9).t()
    for x, y in ((joined, update), (transposed, update), (update, transposed)):
        strided = norm.residual_rms_norm(x, y.clone(), None, (weight, NORM))
        dense = norm.residual_rms_norm(x.contiguous(), y.contiguous(), None, (weight, NORM))
        assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


def test_a_residual_addition_without_norms_or_too_wide(kernels: None) -> None:
    x, update, width = draw(3, 8), draw(3, 8).flip(0), rms_norm.MAX_WIDTH + 1
    expected = x + update
    total, same = norm.residual_rms_norm(x, update, None, None)
    assert torch.equal(total, expected) and same is total and total is update
    x, update, weight = draw(2, width), draw(2, width).flip(0), draw(width)
    exact = norm.residual_rms_norm(x.double(), update.double(), None, (weight.double(), NORM))
    ours = norm.residual_rms_norm(x, update, None, (weight, NORM))  # by PyTorch
    assert all(error(a, b) <= FP32 for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("programs", [3, 256])  # of 11 tiles each, and 33 of one
def test_partial_sums_of_programs(
    kernels: None, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rms_norm, "NORM_PROGRAMS", programs)
    grad, x, residual = draw(150, 7, 16), draw(150, 7, 16).flip(0), draw(150, 7, 16)
    check(normalized, [grad, x, draw(16), residual], NORM)


def test_norms_of_views_of_a_joined_projection(kernels: None) -> None:
    joined, weight = draw(9, 6, 24), draw(24)
    query, key = joined.split((4, 2), dim=1)
    heads_first = draw(4, 9, 24).transpose(0, 1)
    transposed = draw(9, 24, 4).transpose(1, 2)
    for x in (query, key, heads_first, transposed):
        grad = draw(*x.shape).transpose(0, 1).contiguous().transpose(0, 1)
        residual = torch.ones((), device=DEVICE).expand(x.shape)
        strided = normalized(grad, x, weight, residual, NORM)
        dense = normalized(grad.contiguous(), x.contiguous(), weight, residual.contiguous(), NORM)
        for a, b in zip(strided, dense, strict=True):
            assert a.is_contiguous() and torch.equal(a, b)


def test_a_weight_in_fp32_beside_half_precision(kernels: None) -> None:
    x, weight = draw(5, 64).bfloat16(), draw(64)
    out = norm.rms_norm(x, weight, NORM)
    _, grad_weight = norm.rms_norm_backward(x, x, weight, NORM, True)
    assert grad_weight is not None
    assert (out.dtype, grad_weight.dtype) == (torch.bfloat16, torch.float32)
    _, exact = norm.rms_norm_backward(x.double(), x.double(), weight.double(), NORM, True)
    assert exact is not None and error(grad_weight, exact) <= FP32


def test_rows_do_not_depend_on_their_number(kernels: None) -> None:
    """A policy must equal its reference to the bit, whatever else is in the batch."""
    x, weight = draw(33, 72), draw(72)
    whole = norm.rms_norm(x, weight, NORM)
    for rows in (1, 16, 32):
        assert torch.equal(norm.rms_norm(x[:rows], weight, NORM), whole[:rows])


def rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    results = []
    for function in (rotary.rotate, rotary.rotate_backward):
        pair = query.clone(), key.clone()
        function(*pair, cos, sin)
        results += pair
    return results


@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "half"),
    [(1, 1, 2, 1), (9, 3, 20, 10), (4, 2, 20, 5), (33, 17, 8, 4), (2, 1, 128, 64)],
)
def test_rotary(kernels: None, heads: int, key_heads: int, size: int, half: int) -> None:
    angles = draw(5, half)
    cos, sin = (torch.cat([x, x], dim=1) for x in (angles.cos(), angles.sin()))
    check(rotated, [draw(5, heads, size), draw(5, key_heads, size), cos, sin])


def test_rotation_of_a_joined_projection_touches_nothing_else(kernels: None) -> None:
    joined = draw(7, 4 + 2 + 2, 12)
    angles = draw(7, 4)
    cos, sin = torch.cat([angles.cos()] * 2, 1), torch.cat([angles.sin()] * 2, 1)
    expected = joined.double()
    for x in (expected, joined):
        query, key, _ = x.split((4, 2, 2), dim=1)
        rotary.rotate(query, key, cos.to(x.dtype), sin.to(x.dtype))
    assert error(joined, expected) <= FP32
    before = draw(7, 4 + 2 + 2, 12)
    assert torch.equal(joined[:, 6:], before[:, 6:])  # values
    assert torch.equal(joined[:, :, 8:], before[:, :, 8:])  # beyond the rotated numbers


def test_rotation_in_place_where_numbers_of_a_head_are_apart(kernels: None) -> None:
    angles = draw(5, 4)
    cos, sin = torch.cat([angles.cos()] * 2, 1), torch.cat([angles.sin()] * 2, 1)
    apart, dense = draw(5, 8, 3).transpose(1, 2), draw(5, 8, 3).transpose(1, 2).contiguous()
    rotary.rotate(apart, draw(5, 1, 8), cos, sin)
    rotary.rotate(dense, draw(5, 1, 8), cos, sin)
    assert torch.equal(apart, dense)


def test_angles_in_fp32_beside_half_precision(kernels: None) -> None:
    query, key = draw(5, 2, 8).bfloat16(), draw(5, 1, 8).bfloat16()
    angles = draw(5, 4)
    cos, sin = torch.cat([angles.cos()] * 2, 1), torch.cat([angles.sin()] * 2, 1)
    exact = [query.double(), key.double()]
    rotary.rotate(*exact, cos.double(), sin.double())
    rotary.rotate(query, key, cos, sin)
    assert error(query, exact[0]) <= 2**-8 and error(key, exact[1]) <= 2**-8


def products(grad: Tensor, gate: Tensor, up: Tensor, activation: Any) -> list[Tensor]:
    product = gated.gated(gate, up, activation)
    return [product, *gated.gated_backward(grad.clone(), gate, up, activation)]


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 48), (3, 1025)], ids=str)
def test_gated(kernels: None, shape: tuple[int, int], activation: str) -> None:
    grad, gate, up = draw(*shape), 3 * draw(*shape).flip(0), draw(*shape) + 1
    check(products, [grad, gate, up], activation)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_of_any_size(kernels: None, activation: str) -> None:
    """Exponentials of both signs stay finite; a small gate keeps its digits."""
    gate = torch.tensor([[-2e4, -90.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 90.0, 2e4]], device=DEVICE)
    ones = torch.ones_like(gate)
    ours = products(ones, gate, ones, activation)
    exact = products(ones.double(), gate.double(), ones.double(), activation)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=5e-6, atol=1e-30)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_halves_of_a_joined_projection(kernels: None, activation: str) -> None:
    gate, up = draw(7, 2 * 50).chunk(2, dim=-1)
    transposed = draw(50, 7).t()
    for grad, x, y in [(draw(7, 50), gate, up), (transposed, transposed, up)]:
        strided = products(grad, x, y, activation)
        dense = products(*(z.contiguous() for z in (grad, x, y)), activation)
        for a, b in zip(strided, dense, strict=True):
            assert torch.equal(a, b)


def test_gradients_that_share_memory_are_not_overwritten(kernels: None) -> None:
    gate, up, row = draw(7, 50), draw(7, 50) + 1, draw(1, 50)
    shared = gated.gated_backward(row.expand(7, 50), gate, up, "silu")
    dense = gated.gated_backward(row.repeat(7, 1), gate, up, "silu")
    assert torch.equal(row, draw(1, 50))
    assert all(torch.equal(a, b) for a, b in zip(shared, dense, strict=True))


def test_kernels_run_on_cuda_alone_and_not_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.kernels_for(torch.zeros(2)) is None
    monkeypatch.setattr(dispatch, "_kernels", lambda: trunk)
    on_a_gpu = [SimpleNamespace(is_cuda=True, dtype=x) for x in (*HALF, torch.float32)]
    assert all(dispatch.kernels_for(x) is trunk for x in on_a_gpu)
    assert dispatch.kernels_for(SimpleNamespace(is_cuda=True, dtype=torch.float64)) is None
    assert dispatch.kernels_for(torch.zeros(2)) is None


@pytest.mark.skipif(DEVICE == "cuda", reason="tests a machine without a GPU")
def test_without_a_gpu_there_are_no_kernels() -> None:
    assert dispatch._kernels() is None


@pytest.mark.skipif(DEVICE == "cuda", reason="the models of this test are on the CPU")
@pytest.mark.parametrize(
    ("name", "lora"),
    [("llama", True), ("qwen3", False), ("gemma2", False), ("phi3", True), ("olmo2", False)],
)
def test_whole_blocks(name: str, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, against the PyTorch code."""
    torch.use_deterministic_algorithms(False)  # Hugging Face's layers have no part in this test
    monkeypatch.setitem(COMMON, "num_hidden_layers", 1)
    changes = {"layer_types": ["sliding_attention"]} if "layer_types" in FAMILIES[name] else {}
    monkeypatch.setitem(FAMILIES, name, {**FAMILIES[name], **changes})
    model = model_of(name, torch.float32, lora)
    inputs = embeddings(PACKED, model, torch.float32)
    plain = hidden_and_gradients(explicit_hidden, model, inputs, PACKED)
    force(monkeypatch, trunk)
    ours = hidden_and_gradients(explicit_hidden, model, inputs, PACKED)
    for key, value in plain.items():
        if value is not None:
            assert error(ours[key], value.double()) <= 1e-5, key
