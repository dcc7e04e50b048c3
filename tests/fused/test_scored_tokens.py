"""The operands of the head under autocast: as good as those of a linear layer, or better."""

from __future__ import annotations

import pytest
import torch

from fastpref import losses
from fastpref.fused import FusedPreferenceLoss
from fastpref.logps import SequenceLogps
from tests.helpers.fused_batches import V, batch
from tests.helpers.interpreter import round_to_nearest


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
def test_the_gradient_of_an_fp32_head_under_autocast_is_not_rounded(impl, monkeypatch):
    """Nor worse than that of a linear layer, beside fp64 on the operands as autocast rounds them.

    The kernels multiply half-precision gradients of the logits, the others fp32 ones on a CPU.
    """
    if impl == "triton":
        round_to_nearest(monkeypatch)
    hidden, weight, labels = batch(length=40, dtype=torch.float32)
    bias = torch.linspace(-1, 1, V)
    operands = hidden, weight, bias

    def ours(hidden, weight, bias):
        module = FusedPreferenceLoss("simpo", impl=impl)
        return module(hidden, weight, labels, bias=bias)[0]

    def plain(hidden, weight, bias):
        logps = torch.nn.functional.linear(hidden, weight, bias)
        logps = logps.to(torch.promote_types(logps.dtype, torch.float32)).log_softmax(-1)
        logps = logps.gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)
        lengths = (labels != -100).sum(1)
        policy = SequenceLogps.from_sequences(logps.sum(1), lengths)
        return losses.build("simpo")(policy).loss.mean()

    def head_gradients(loss, tensors, autocast):
        leaves = [x.clone().requires_grad_() for x in tensors]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(*leaves)
        value.backward()
        return [leaf.grad for leaf in leaves[1:]]

    rounded = [x.bfloat16().double() for x in operands]
    exact = head_gradients(plain, rounded, autocast=False)
    fused, linear = (head_gradients(loss, operands, autocast=True) for loss in (ours, plain))
    for a, b, expected in zip(fused, linear, exact, strict=True):
        error, allowed = ((x - expected).norm() / expected.norm() for x in (a, b))
        assert a.dtype == torch.float32
        assert error < (allowed if impl == "triton" else 1e-6)
