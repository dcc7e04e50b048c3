"""The forward kernels against fp64, in Triton's interpreter or on a GPU where there is one."""

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from fastpref import ops
from fastpref.ops.backend import Head
from fastpref_kernels.backend import TritonBackend
from fastpref_kernels.common import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter's tile is 16 x 32, its panel two tiles wide.
SHAPES = [
    pytest.param(1, 16, 1, id="one token, one vocabulary entry"),
    pytest.param(17, 33, 101, id="nothing divides a block: four tiles, two panels"),
    pytest.param(16, 32, 128, id="everything does"),
    pytest.param(273, 16, 101, id="18 row blocks: more than share a panel"),
]


def make(T: int, D: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """hidden, weight, labels, bias; logits of standard deviation sqrt(D)."""
    draw = torch.Generator().manual_seed(T + D + V)
    hidden, weight = torch.randn(T, D, generator=draw), torch.randn(V, D, generator=draw)
    labels = torch.randint(V, (T,), generator=draw)
    bias = 3 * torch.randn(V, generator=draw)
    return (
        hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE),
        bias.to(DEVICE, dtype),
    )  # fmt: skip


def token_stats(hidden, weight, labels, bias=None, scale=1.0, softcap=None) -> ops.TokenStats:
    return ops.token_stats(
        hidden, weight, labels, bias=bias, logit_scale=scale, softcap=softcap, impl="triton"
    )


def plain(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, scale: float,
    softcap: float | None, dtype: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    """The statistics in plain PyTorch, computed in dtype; no label may be -100."""
    x = hidden.to(dtype) @ weight.to(dtype).T
    x = scale * (x if bias is None else x + bias.to(dtype))
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    target = x.gather(1, labels[:, None])[:, 0]
    p = x.softmax(1)
    return {
        "logps": target - x.logsumexp(1),
        "lse": x.logsumexp(1),
        "entropy": torch.special.entr(p).sum(1),
        "top1": target >= x.amax(1),
        "size": x[x.isfinite()].abs().max(),
    }


def check(hidden, weight, labels, bias=None, scale=1.0, softcap=None) -> None:
    """Errors within twice those of fp32 PyTorch plus two roundings of the largest logit."""
    got = token_stats(hidden, weight, labels, bias, scale, softcap)
    exact = plain(hidden, weight, labels, bias, scale, softcap, torch.float64)
    torch32 = plain(hidden, weight, labels, bias, scale, softcap, torch.float32)
    rounding = 2 * 2.0**-23 * max(float(exact["size"]), 1.0)
    for name in ("logps", "lse", "entropy"):
        error = (getattr(got, name).double() - exact[name]).abs().max()
        allowed = 2 * (torch32[name].double() - exact[name]).abs().max() + rounding
        assert error <= allowed, f"{name}: {error} > {allowed}"
        assert getattr(got, name).dtype == torch.float32
    assert torch.equal(got.top1, torch32["top1"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "D", "V"), SHAPES)
def test_matches_fp64(T, D, V, dtype) -> None:
    hidden, weight, labels, _ = make(T, D, V, dtype)
    check(hidden, weight, labels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_scale_and_softcap(dtype) -> None:
    hidden, weight, labels, bias = make(17, 33, 101, dtype)
    check(hidden, weight, labels, bias, scale=0.25, softcap=5.0)


@pytest.mark.parametrize("scale", [0.01, 20.0], ids=["flat", "peaked"])
def test_temperature(scale) -> None:
    hidden, weight, labels, _ = make(17, 33, 101)
    check(hidden, weight, labels, scale=scale)


@pytest.mark.parametrize("offset", [-60.0, 60.0])
def test_common_offset_of_all_logits(offset) -> None:
    hidden, weight, labels, bias = make(17, 33, 101)
    check(hidden, weight, labels, bias + offset)


def test_an_almost_certain_label_far_from_zero() -> None:
    """Logits near 1000 are 6e-5 apart in fp32; the log-prob must not be rounded at that size."""
    hidden, weight = torch.zeros(1, 16, device=DEVICE), torch.zeros(101, 16, device=DEVICE)
    hidden[0, 0], weight[:, 0] = 1, 990
    weight[50, 0] = 1000
    got = token_stats(hidden, weight, torch.tensor([50], device=DEVICE)).logps
    exact = -torch.log1p(100 * torch.exp(torch.tensor(-10.0, dtype=torch.float64)))
    assert abs(float(got) - float(exact)) < 1e-7 + 1e-5 * abs(float(exact))


def test_pointers_instead_of_descriptors(monkeypatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETER_GEMM", launch.INTERPRETER_GEMM._replace(tma=False))
    for D in (33, 48):
        check(*make(17, D, 101))


def test_tokens_banned_by_a_bias_of_minus_infinity() -> None:
    hidden, weight, labels, bias = make(5, 16, 101)
    bias[:70] = float("-inf")  # the whole first panel: it has no maximum
    bias[[80, 90]] = float("-inf")
    labels = torch.tensor([70, 71, 79, 99, 100], device=DEVICE)
    got = token_stats(hidden, weight, labels, bias)
    exact = plain(hidden, weight, labels, bias, 1.0, None, torch.float64)
    for name in ("logps", "lse", "entropy"):  # 1e-5: logits of about 10 in fp32
        assert (getattr(got, name) - exact[name]).abs().max() < 1e-5


def test_rows_labeled_minus_100_are_zero_whatever_they_hold() -> None:
    hidden, weight, labels, _ = make(17, 33, 101)
    expected = token_stats(hidden, weight, labels)
    labels[::3] = -100
    hidden[::3] = float("nan")
    got = token_stats(hidden, weight, labels)
    valid = torch.arange(17, device=DEVICE) % 3 != 0
    for exact, values in zip(expected, got, strict=True):
        assert (values[::3] == 0).all()
        assert torch.equal(values[valid], exact[valid])


def test_a_label_out_of_range_is_nan_and_reads_nothing() -> None:
    """The op refuses such labels, but on a GPU only after the kernel has run."""
    hidden, weight, labels, _ = make(3, 16, 101)
    labels[0], labels[1] = 101, -1  # 101 lies inside the last tile, past the vocabulary
    logps = TritonBackend.token_stats(hidden, Head(weight), labels).logps
    assert logps.isnan().tolist() == [True, True, False]


def test_a_token_does_not_depend_on_its_batch() -> None:
    hidden, weight, labels, _ = make(37, 33, 101, torch.bfloat16)
    together = token_stats(hidden, weight, labels)
    # The first row of its tile both times: the interpreter's GEMM may treat others differently.
    alone = token_stats(hidden[32:33], weight, labels[32:33])
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[32:33], b)


def test_layouts_that_the_copy_engine_refuses() -> None:
    hidden, weight, labels, _ = make(9, 24, 70)
    expected = token_stats(hidden, weight, labels)
    layouts = [
        (hidden.T.contiguous().T, weight),  # columns of unit stride
        (hidden, weight.T.contiguous().T),
        (torch.cat([hidden, hidden], 1)[:, :24], weight),  # wider rows
        (torch.cat([hidden[:, :1], hidden], 1)[:, 1:], weight),  # 4 bytes off
        (hidden[:1].expand(9, 24), weight),  # one row for all
    ]
    for h, w in layouts[:-1]:
        for a, b in zip(token_stats(h, w, labels), expected, strict=True):
            assert torch.equal(a, b)
    check(*layouts[-1], labels)


def test_no_tokens() -> None:
    hidden, weight, labels, _ = make(0, 16, 32)
    assert all(len(x) == 0 for x in token_stats(hidden, weight, labels))
