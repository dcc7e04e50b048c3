"""Log-probs of the kernels, called through the public op, against fp64 autograd in every mode."""

import os
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.helpers.dispatch import Inside

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from fastpref import ops
from fastpref_kernels import linear_logps as module
from fastpref_kernels.common import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
linear_logps = partial(ops.linear_logps, impl="triton")
CACHED, RECOMPUTED = 1 << 30, 0  # bytes for dlogits
cached_and_recomputed = pytest.mark.parametrize("cache_bytes", [CACHED, RECOMPUTED], indirect=True)
# Unit roundoffs. Beyond twice the error of fp32 PyTorch on the same inputs, a gradient may carry
# four independent roundings to its dtype, which add as squares to two units in the norm: two of
# dlogits, one of dlogits @ weight, one of the scaled row.
ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture
def cache_bytes(request, monkeypatch) -> None:
    monkeypatch.setattr(module, "CACHE_BYTES", request.param)


def chunks_of(rows: int, monkeypatch) -> None:
    """Set the rows of dlogits in a chunk; the byte budget can only set multiples of 128."""
    monkeypatch.setattr(module, "rows_per_chunk", lambda width, element_size: rows)


def make(T: int, D: int, V: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Leaves that require a gradient, and labels; logits of standard deviation sqrt(D)."""
    draw = torch.Generator().manual_seed(T + D + V)
    leaves = {
        "hidden": torch.randn(T, D, generator=draw),
        "weight": torch.randn(V, D, generator=draw),
        "bias": 3 * torch.randn(V, generator=draw),
    }
    labels = torch.randint(V, (T,), generator=draw).to(DEVICE)
    return {k: v.to(DEVICE, dtype).requires_grad_() for k, v in leaves.items()} | {"labels": labels}


def plain(
    inputs: dict[str, Tensor], upstream: Tensor, scale: float, softcap: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Log-probs and gradients of plain PyTorch in dtype."""
    leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in inputs.items() if k != "labels"}
    x = leaves["hidden"] @ leaves["weight"].T
    x = scale * (x + leaves["bias"] if "bias" in leaves else x)
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    labels = inputs["labels"]
    logps = x.log_softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    logps = torch.where(labels == -100, 0.0, logps)
    logps.backward(upstream.to(dtype))
    return logps.detach().double(), {k: v.grad.double() for k, v in leaves.items()}


def check(inputs: dict[str, Tensor], *, scale=1.0, softcap=None) -> None:
    """Values and gradients (relative error in the norm) for a random upstream gradient."""
    draw = torch.Generator().manual_seed(1)
    upstream = torch.randn(len(inputs["labels"]), generator=draw).to(DEVICE)
    logps = linear_logps(**inputs, logit_scale=scale, softcap=softcap)
    logps.backward(upstream)
    exact, gradients = plain(inputs, upstream, scale, softcap, torch.float64)
    torch32, gradients32 = plain(inputs, upstream, scale, softcap, torch.float32)
    assert logps.dtype == torch.float32
    # dlogits is computed from the log-sum-exp: its rounding is a relative error of every p.
    lse = ops.token_stats(**inputs, logit_scale=scale, softcap=softcap, impl="triton").lse
    roundings = 2 * ROUNDOFF[inputs["hidden"].dtype] + float(lse.abs().max()) * 2**-24
    # 1e-5: a logit of 60 is held in fp32 to 2e-6, and a log-prob is a difference of two.
    assert (logps - exact).abs().max() <= 2 * (torch32 - exact).abs().max() + 1e-5
    for name, gradient in gradients.items():
        got, size = inputs[name].grad, gradient.norm()
        assert got.dtype == inputs[name].dtype
        allowed = 2 * (gradients32[name] - gradient).norm() + roundings * size
        error = (got.double() - gradient).norm()
        assert error <= allowed, f"{name}: {error / size}, allowed {allowed / size}"
        inputs[name].grad = None


@pytest.mark.parametrize("dtype", ROUNDOFF)
@cached_and_recomputed
def test_matches_fp64_where_nothing_divides_a_block(dtype, cache_bytes, monkeypatch) -> None:
    chunks_of(7, monkeypatch)
    check(make(17, 33, 101, dtype))


@cached_and_recomputed
def test_scale_and_softcap(cache_bytes) -> None:
    inputs = make(17, 33, 101)
    check(inputs, scale=0.25, softcap=5.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softcap_in_half_precision(dtype) -> None:
    check(make(17, 33, 101, dtype), scale=0.25, softcap=5.0)


@cached_and_recomputed
def test_one_token_and_no_bias(cache_bytes) -> None:
    inputs = make(1, 16, 40)
    del inputs["bias"]
    check(inputs)


def test_a_vocabulary_of_one_has_no_gradient() -> None:
    inputs = make(3, 16, 1)
    logps = linear_logps(**inputs)
    logps.sum().backward()
    assert (logps == 0).all() and (inputs["hidden"].grad == 0).all()


@pytest.mark.parametrize("offset", [-60.0, 60.0])
def test_common_offset_of_all_logits(offset) -> None:
    inputs = make(9, 16, 70)
    inputs["bias"] = (inputs["bias"].detach() + offset).requires_grad_()
    check(inputs)


@pytest.mark.parametrize("scale", [0.01, 3.0], ids=["flat", "peaked"])
def test_temperature(scale) -> None:
    check(make(9, 16, 70), scale=scale)


def test_an_almost_certain_label_keeps_its_gradient() -> None:
    """1 - p must not be computed from a rounded p: with p = 1 - 2^-12 in bf16 it would be 0."""
    inputs = make(4, 16, 40, torch.bfloat16)
    del inputs["bias"]
    with torch.no_grad():
        inputs["weight"].mul_(0.1)
        inputs["weight"][7] = 0
        inputs["weight"][7, 0] = 2.5
        inputs["hidden"].mul_(0.1)
        inputs["hidden"][:, 0] = 5
    inputs["labels"].fill_(7)
    check(inputs)


@cached_and_recomputed
def test_pointers_instead_of_descriptors(cache_bytes, monkeypatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETER_GEMM", launch.INTERPRETER_GEMM._replace(tma=False))
    check(make(17, 33, 101))


@pytest.mark.parametrize("cache_bytes", [RECOMPUTED], indirect=True)
def test_panels_of_the_vocabulary(cache_bytes, monkeypatch) -> None:
    # The smallest panels have 128 columns: two whole ones and a remainder.
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    check(make(9, 16, 300))


def test_chunks_change_no_bit_and_equal_the_forward_kernel(monkeypatch) -> None:
    """A policy in training scores the same log-probs, to the last bit, as a reference."""
    # Multiples of the tile: within one, the interpreter's GEMM may treat rows differently.
    inputs = make(37, 33, 101, torch.bfloat16)
    logps = []
    for rows in (16, 32, 64):
        chunks_of(rows, monkeypatch)
        logps.append(linear_logps(**inputs))
    frozen = {k: v.detach() for k, v in inputs.items()}
    logps += [linear_logps(**frozen), ops.token_stats(**frozen, impl="triton").logps]
    for other in logps[1:]:
        assert torch.equal(logps[0], other)


@cached_and_recomputed
def test_rows_labeled_minus_100_give_nothing_whatever_they_hold(cache_bytes) -> None:
    inputs = make(17, 33, 101)
    inputs["labels"][::3] = -100
    check(inputs)
    with torch.no_grad():
        inputs["hidden"][::3] = float("nan")
    linear_logps(**inputs).sum().backward()
    for name in ("hidden", "weight", "bias"):
        assert inputs[name].grad.isfinite().all()
    assert (inputs["hidden"].grad[::3] == 0).all()


@cached_and_recomputed
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")])
def test_frozen_tensors_get_no_gradient(trained, cache_bytes) -> None:
    inputs = make(9, 16, 70)
    everything = {k: v.grad for k, v in run(inputs).items() if k != "labels"}
    for name in ("hidden", "weight", "bias"):
        inputs[name] = inputs[name].detach().requires_grad_(name in trained)
    for name, tensor in run(inputs).items():
        if name in trained:  # with a frozen body one sum may have another order
            assert torch.allclose(tensor.grad, everything[name], rtol=0, atol=1e-5)
        else:
            assert tensor.grad is None


def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs after a backward pass of a non-uniform upstream gradient."""
    logps = linear_logps(**inputs)
    logps.backward(torch.linspace(-1, 2, len(logps), device=DEVICE))
    return inputs


def test_a_frozen_head_allocates_nothing_of_its_size(monkeypatch) -> None:
    chunks_of(4, monkeypatch)
    inputs = make(9, 16, 300)
    frozen = {k: v.detach() for k, v in inputs.items()} | {"hidden": inputs["hidden"]}
    seen: list[torch.Size] = []

    class Watch(Inside):
        def seen(self, func, args, out):
            seen.extend(x.shape for x in (out if isinstance(out, tuple | list) else (out,)))

    logps = linear_logps(**frozen)
    with Watch():
        logps.sum().backward()
    assert seen and all(300 not in shape for shape in seen)


@cached_and_recomputed
def test_no_tokens(cache_bytes) -> None:
    inputs = make(0, 16, 32)
    linear_logps(**inputs).sum().backward()
    assert (inputs["weight"].grad == 0).all() and inputs["hidden"].grad.shape == (0, 16)


def test_backward_twice_and_inside_autocast() -> None:
    inputs = make(5, 16, 40)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        logps = linear_logps(**inputs)
        logps.sum().backward(retain_graph=True)
    once = inputs["weight"].grad.clone()
    logps.sum().backward()
    assert torch.equal(inputs["weight"].grad, 2 * once)
    assert torch.equal(logps, linear_logps(**inputs))
    linear_logps(**inputs).mul_(2).sum().backward()  # the caller may overwrite the result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_slope_of_a_softcap_at_a_label_far_below_the_rest(dtype) -> None:
    """40 nats below, its exponential underflows in fp16, but its entry of dlogits is near 1."""
    inputs = make(4, 16, 40, dtype)
    del inputs["bias"]
    with torch.no_grad():
        logits = inputs["hidden"].float() @ inputs["weight"].float().T
        inputs["labels"].copy_(logits.argmin(1))
    check(inputs, scale=3.0, softcap=30.0)


def test_a_sequence_of_3000_tokens_an_empty_one_and_one_of_1() -> None:
    """Sums over a response are as accurate as its tokens, whatever its length."""
    inputs = make(3001, 16, 40)
    offsets = torch.tensor([0, 3000, 3000, 3001], device=DEVICE)
    upstream = torch.tensor([0.5, 3.0, -2.0], device=DEVICE)
    sums = ops.segment_sum(linear_logps(**inputs), offsets)
    sums.backward(upstream)
    per_token = torch.cat([upstream[:1].expand(3000), upstream[2:]])
    exact, gradients = plain(inputs, per_token, 1.0, None, torch.float64)
    expected = torch.stack([exact[:3000].sum(), exact.new_zeros(()), exact[3000]])
    # Errors of 3000 tokens, 1e-6 each, add up like a random walk to 6e-5; the sum adds 2^-24.
    assert (sums - expected).abs().max() <= 2e-4 + 2**-24 * expected.abs().max()
    for name, gradient in gradients.items():
        error = (inputs[name].grad.double() - gradient).norm() / gradient.norm()
        assert error <= 1e-5, name
