"""Leaving small blocks of delta out: what is left out, what it costs, and that it is off."""

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from fastpref_kernels import configs, launch
from fastpref_kernels import linear_logps as module

from fastpref import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def peaked(dtype: torch.dtype, T: int = 150, D: int = 20, V: int = 300) -> tuple[Tensor, ...]:
    """Five likely words per 40 tokens of a passage, the rest at e^-12 and below; two row blocks."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.zeros(T, D)
    passages = torch.arange(T) // 40
    hidden[torch.arange(T), passages] = 1.0
    weight = torch.randn(V, D, generator=draw)
    labels = 60 * passages + torch.randint(5, (T,), generator=draw)
    for passage in range(4):
        weight[60 * passage : 60 * passage + 5, passage] += 18.0
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE)


def direction(hidden: Tensor, weight: Tensor, labels: Tensor, impl: str = "triton") -> Tensor:
    """The gradient of the summed log-probs."""
    hidden = hidden.detach().requires_grad_()
    ops.linear_logps(hidden, weight, labels, impl=impl).sum().backward()
    assert hidden.grad is not None
    return hidden.grad.double()


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_threshold_below_everything_leaves_nothing_out(monkeypatch, dtype, tma) -> None:
    for name in ("INTERPRETER_GEMM", "INTERPRETER_SKIP"):
        monkeypatch.setattr(launch, name, getattr(launch, name)._replace(tma=tma))
    inputs = peaked(dtype)
    exact = direction(*(x.double() if x.is_floating_point() else x for x in inputs), "reference")
    whole = direction(*inputs)
    monkeypatch.setattr(module, "SKIP_BELOW", 1e-30)
    walked = direction(*inputs)
    # 300 terms in another order move an fp32 sum by some units, and a bf16 entry by one at most.
    assert (walked - whole).norm() <= 4 * torch.finfo(dtype).eps * whole.norm()
    assert (walked - exact).norm() <= 2 * (whole - exact).norm() + 2**-20 * exact.norm()


def test_blocks_below_the_threshold_are_left_out(monkeypatch) -> None:
    hidden, weight, labels = peaked(torch.float32)
    monkeypatch.setattr(module, "SKIP_BELOW", 2.0**-12)
    seen: list[Tensor] = []
    real = module.active_mm
    monkeypatch.setattr(
        module, "active_mm", lambda *args: (seen.append(args[2].clone()), real(*args))
    )
    walked = direction(hidden, weight, labels)
    monkeypatch.setattr(module, "SKIP_BELOW", 0.0)
    whole = direction(hidden, weight, labels)
    (active,) = seen  # one chunk
    columns = launch.gemm_config(hidden).block_e
    delta = torch.nn.functional.one_hot(labels, len(weight)) - (hidden @ weight.T).softmax(1)
    for r, flags in enumerate(active.tolist()):
        for c, flag in enumerate(flags):
            block = delta[64 * r : 64 * (r + 1), columns * c : columns * (c + 1)]
            assert bool(flag) == (block.numel() > 0 and bool(block.abs().max() >= 2.0**-12))
    assert 0 < active.float().mean() < 0.3
    # What is left out has less than 2^-12 in each of 300 entries, and far less in most.
    assert 0 < (walked - whole).norm() / whole.norm() < 1e-3


def test_nothing_is_left_out_unless_asked_for() -> None:
    assert module.SKIP_BELOW == 0


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("size", [2, 4])
def test_the_product_walks_the_blocks_that_were_flagged(arch, size) -> None:
    for row in configs.skip_configs(arch, size):
        assert row.block_d == configs.gemm_configs(arch, size)[0].block_e
        assert row.block_t == 2 * configs.DELTA.block_t
