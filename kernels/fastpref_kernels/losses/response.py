"""Losses, incentives, rewards and metric sums of labeled responses, in one launch."""

# mypy: allow-untyped-defs
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref_kernels.common.launch import launching_on
from fastpref_kernels.losses.inputs import (
    LENGTH_DTYPES,
    LOSSES,
    added,
    check_log_probs,
    check_point,
    check_vectors,
    hyperparameters,
    padded,
    required,
)
from fastpref_kernels.losses.registry import RESPONSE_OBJECTIVES, find

RESPONSE_METRICS = (
    "responses",
    "desirable",
    "loss",
    "rewards/desirable",
    "rewards/undesirable",
    "logps/desirable",
    "logps/undesirable",
    "d/desirable",
    "d/undesirable",
    "non_positive",  # responses whose incentive does not have the sign of their label
)


class ResponseLosses(NamedTuple):
    """Per response, (S,) in the dtype of the log-probs; metrics are sums over responses in fp64."""

    loss: Tensor
    d: Tensor
    rewards: Tensor
    metrics: Tensor  # (len(RESPONSE_METRICS),)


@triton.jit(
    do_not_specialize=["S"],
    do_not_specialize_on_alignment=[
        "logps", "reference", "lengths", "desirable", "reference_point",
    ],
)  # fmt: skip
def response_losses_kernel(
    logps,  # (S,)
    reference,  # (S,)
    lengths,  # (S,)
    desirable,  # (S,) uint8
    reference_point,  # () or None
    out,  # (3, S): loss, d, rewards
    metrics,  # (len(RESPONSE_METRICS),)
    S,
    p0: tl.float64,
    p1: tl.float64,
    p2: tl.float64,
    p3: tl.float64,
    OBJECTIVE: tl.constexpr,
    NUMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = logps.dtype.element_ty
    point = tl.zeros((), dtype)
    if reference_point is not None:
        point = tl.load(reference_point).to(dtype)
    zeros = tl.zeros((BLOCK,), dtype=tl.float64)
    three = (zeros, zeros, zeros)
    sums = three + three + three
    for start in range(0, S, BLOCK):
        responses = start + tl.arange(0, BLOCK)
        mask = responses < S
        z = tl.load(logps + responses, mask=mask, other=0.0)
        r = tl.load(reference + responses, mask=mask, other=0.0)
        scored = tl.load(lengths + responses, mask=mask, other=0) > 0
        good = tl.load(desirable + responses, mask=mask, other=0) != 0
        numbers = hyperparameters(p0, p1, p2, p3, NUMBERS, dtype)
        loss, d, reward = OBJECTIVE(z, tl.where(scored, z - r, 0.0), good, point, *numbers)
        loss, d = tl.where(scored, loss, 0.0), tl.where(scored, d, 0.0)
        tl.store(out + responses, loss, mask=mask)
        tl.store(out + S + responses, d, mask=mask)
        tl.store(out + 2 * S + responses, reward, mask=mask)
        along = tl.where(good, d, -d) > 0
        columns = (
            tl.where(good, 1.0, 0.0), loss,
            tl.where(good, reward, 0.0), tl.where(good, 0.0, reward),
            tl.where(good, z, 0.0), tl.where(good, 0.0, z),
            tl.where(good, d, 0.0), tl.where(good, 0.0, d),
            tl.where(along, 0.0, 1.0),
        )  # fmt: skip
        sums = added(sums, columns, mask)
    tl.store(metrics, tl.full((), S, tl.float64))
    for i in tl.static_range(len(sums)):
        tl.store(metrics + 1 + i, tl.sum(sums[i], axis=0))


@torch.no_grad()
def response_losses(
    name: str,
    parameters: Mapping[str, Any],
    logps: Tensor,  # (S,)
    reference: Tensor | None,  # (S,)
    lengths: Tensor,  # (S,)
    desirable: Tensor,  # (S,) bool
    reference_point: Tensor | None = None,  # ()
) -> ResponseLosses:
    """Evaluate the objective `name` on S labeled responses, with all its hyperparameters.

    Dtypes and errors are those of `pair_losses`. `reference_point` is a floating-point number on
    the device; an objective without one ignores it. An empty response gives zeros.
    """
    objective = find(RESPONSE_OBJECTIVES, name)
    numbers, _ = objective.split(parameters)
    check_log_probs("logps", logps)
    reference = required("reference", reference, name)
    check_vectors("logps", logps, {"reference": reference}, (logps.dtype,))
    check_vectors("logps", logps, {"lengths": lengths}, LENGTH_DTYPES)
    check_vectors("logps", logps, {"desirable": desirable}, (torch.bool,))
    if objective.point:
        reference_point = required("reference_point", reference_point, name)
        check_point(logps, reference_point)
    else:
        reference_point = None

    S = logps.shape[0]
    out = logps.new_empty(3, S)
    metrics = logps.new_empty(len(RESPONSE_METRICS), dtype=torch.float64)
    with launching_on(logps):
        response_losses_kernel[(1,)](
            logps.contiguous(), reference.contiguous(), lengths.contiguous(),
            desirable.contiguous().view(torch.uint8), reference_point, out, metrics, S,
            *padded(numbers, 4, 0.0),
            OBJECTIVE=objective.function, NUMBERS=len(numbers),
            BLOCK=LOSSES.block_t, num_warps=LOSSES.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return ResponseLosses(out[0], out[1], out[2], metrics)
