"""Our side of flash-attn: gathered keys, arguments and sums, with a stand-in for its kernels."""

from __future__ import annotations

import importlib.machinery
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastpref.attention import Segments, api, flash, packed_attention, reference
from fastpref.attention.by_segment import Options

GROUPS = [((9, 14, 11),), ((1, 1, 12), (13, 3, 1, 7, 5), (4,)), ((7,), (7,))]
OPTIONS = [{}, {"window": 1}, {"window": 5}, {"window": 20}, {"softcap": 1.5, "scale": 0.7}]


def attend(q, k, v, softmax_scale, window_size, softcap) -> tuple[Tensor, Tensor]:
    """One sequence: causal and window masks are aligned to the ends of queries and keys."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = softmax_scale * torch.einsum("qhd,khd->hqk", q, k)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    left, right = window_size
    ends = torch.arange(len(q))[:, None] + len(k) - len(q)
    keys = torch.arange(len(k))
    seen = (keys <= ends + max(right, 0)) & (keys >= (ends - left if left >= 0 else 0))
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """The signature of flash-attn 2.8."""
    assert causal and return_attn_probs
    parts = []
    for ends in (cu_seqlens_q, cu_seqlens_k):
        assert ends.dtype == torch.int32
    sizes_q, sizes_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert (max(sizes_q), max(sizes_k)) == (max_seqlen_q, max_seqlen_k)
    for one in zip(q.split(sizes_q), k.split(sizes_k), v.split(sizes_k), strict=True):
        parts.append(attend(*one, softmax_scale, window_size, softcap))
    out, lse = zip(*parts, strict=True)
    return torch.cat(out), torch.cat(lse, dim=1), None


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
    alibi_slopes, deterministic, rng_state=None, zero_tensors=False,
):  # fmt: skip
    assert deterministic and dout.is_contiguous() and softmax_lse.shape == q.shape[1::-1]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        again, lse, _ = flash_attn_varlen_func(
            *leaves, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            softmax_scale=softmax_scale, causal=causal, softcap=softcap,
            window_size=(window_size_left, window_size_right), return_attn_probs=True,
        )  # fmt: skip
    torch.testing.assert_close((out, softmax_lse), (again.detach(), lse.detach()))
    for result, grad in zip((dq, dk, dv), torch.autograd.grad(again, leaves, dout), strict=True):
        result.copy_(grad)


@pytest.fixture
def interface(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package flash_attn whose functions compute in plain PyTorch."""
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    interface.flash_attn_varlen_func = flash_attn_varlen_func
    interface._flash_attn_varlen_backward = _flash_attn_varlen_backward
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    flash._package_problem.cache_clear()
    yield interface
    flash._package_problem.cache_clear()


@pytest.fixture
def on_a_cpu(interface: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "unavailable_reason", lambda query, options: "")


@pytest.mark.parametrize("heads", [(1, 1), (4, 2)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_matches_the_definition(groups, options, heads, on_a_cpu) -> None:
    segments = Segments(groups)
    torch.manual_seed(0)
    shapes = [(segments.tokens, count, 8) for count in (heads[0], heads[1], heads[1])]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    grad = torch.randn(shapes[0], dtype=torch.float64)
    ours = packed_attention(*leaves, segments, impl="flash", **options)
    exact = reference.packed_attention(*leaves, segments, **{"scale": 8**-0.5, **options})
    # The sums of a prompt's gradients are fp32, as flash-attn's own.
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-11)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(exact, leaves, grad),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_gathered_keys() -> None:
    segments = Segments(((2, 1, 3), (2,), (1, 1)))
    gather = flash._gather(segments, torch.device("cpu"))
    assert gather.keys.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8, 8, 9]
    assert gather.own.tolist() == [0, 1, 4, 7, 8, 9, 10, 11, 12, 14]
    assert gather.prompts.tolist() == [0, 1, 8]
    assert [(c.rows.tolist(), c.keys.tolist()) for c in gather.copies] == [
        ([0, 1, 2], [2, 3, 13]),
        ([0, 1], [5, 6]),
    ]
    assert gather.cu_seqlens_q.tolist() == [0, 2, 3, 6, 8, 9, 10]
    assert gather.cu_seqlens_k.tolist() == [0, 2, 5, 10, 12, 13, 15]
    assert (gather.max_seqlen_q, gather.max_seqlen_k) == (3, 5)
    assert flash._gather(segments, torch.device("cpu")) is gather


def test_sums_of_many_responses_are_rounded_once() -> None:
    """In bf16, 256 + 1 is 256: eight responses would add nothing if each sum were rounded."""
    segments = Segments(((1, *[1] * 8),))
    gather = flash._gather(segments, torch.device("cpu"))
    grads = torch.ones(len(gather.keys), 1, 1, dtype=torch.bfloat16)
    grads[0] = 256
    assert flash._summed(grads, gather).flatten().tolist() == [264, *[1] * 8]


def fake(device="cuda", dtype=torch.bfloat16, size=128) -> SimpleNamespace:
    """What `unavailable_reason` reads of a query."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(5, 2, size))


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (fake(device="cpu"), "cannot run on cpu"),
        (fake(dtype=torch.float32), "takes float16 and bfloat16, got torch.float32"),
        (fake(size=264), "multiples of 8 up to 256, got 264"),
        (fake(size=100), "multiples of 8 up to 256, got 100"),
    ],
)
def test_inputs_that_it_cannot_take_are_named(query, message, interface, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert message in flash.unavailable_reason(query, Options(1.0))
    assert flash.unavailable_reason(fake(), Options(1.0, window=5, softcap=3.0)) == ""


def reason_anew() -> str:
    """The package is looked at once a process, as each layer asks."""
    flash._package_problem.cache_clear()
    return flash.unavailable_reason(fake(), Options(1.0))


def test_an_old_gpu_and_a_package_that_does_not_fit_are_named(interface, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0" in flash.unavailable_reason(fake(), Options(1.0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    # Version 2.6 had one argument window_size.
    monkeypatch.setattr(interface, "_flash_attn_varlen_backward", lambda dout, window_size: None)
    assert "needs flash-attn 2.8" in reason_anew()
    monkeypatch.delattr(interface, "_flash_attn_varlen_backward")
    assert "does not load" in reason_anew()
    monkeypatch.setattr(flash, "find_spec", lambda name: None)
    assert "not installed; pip install flash-attn" in reason_anew()


def test_parameters_of_a_custom_op() -> None:
    """flash-attn's functions are custom ops of torch, which have no signature of their own."""

    @torch.library.custom_op("fastpref_test::scale", mutates_args=("out",))
    def scale(dout: Tensor, out: Tensor, softcap: float) -> None: ...

    assert flash._parameters(scale) == {"dout", "out", "softcap"}


def test_a_choice_by_name_says_what_is_missing() -> None:
    query = torch.zeros(3, 1, 16)
    with pytest.raises(ValueError, match=r"impl: 'flash' cannot run on cpu.*or use impl='auto'"):
        api.implementation(query, impl="flash")
    assert api.implementation(query) == "by_segment"


def test_on_a_cpu_nothing_is_probed() -> None:
    code = (
        "import sys, torch\n"
        "from fastpref.attention import packed_attention, rows\n"
        "x = torch.zeros(4, 1, 16)\n"
        "packed_attention(x, x, x, rows(1, 4))\n"
        "names = ('triton', 'fastpref_kernels', 'flash_attn', 'fastpref.attention.flash')\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
