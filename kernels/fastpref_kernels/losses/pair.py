"""Losses, incentives, rewards and metric sums of a whole batch of pairs, in one launch.

    d_w = -dL/dz_w,  d_l = dL/dz_l,  d = -dL/dz,  so that -grad L = d_w s_w - d_l s_l,  or d s

with s the gradient of a response's log-prob: a backward pass needs nothing else of the objective.
The incentives are closed forms, one function per objective, for objectives whose loss of a pair (or
response) depends only on its own log-probs, lengths and label. A soft label p weights the two
orders of a pair, p L(w, l) + (1 - p) L(l, w).

Memory: the results, 5 numbers per pair or 3 per response, and the sums. One program reads the
batch, which is small, block by block, and adds lane by lane in fp64, so results are deterministic.
Multiply and add are not fused, so that equal log-ratios have a margin of exactly 0. Hyperparameters
are fp64 arguments, not constants, so one binary serves every value of beta.
"""

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
    check_vectors,
    hyperparameters,
    padded,
    required,
)
from fastpref_kernels.losses.registry import PAIR_OBJECTIVES, find

PAIR_METRICS = (
    "pairs",
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "d_w",
    "d_l",
    "non_positive",  # pairs one of whose incentives is not positive
)


class PairLosses(NamedTuple):
    """Per pair, (B,) in the dtype of the log-probs; metrics are sums over pairs in fp64."""

    loss: Tensor
    d_w: Tensor
    d_l: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    metrics: Tensor  # (len(PAIR_METRICS),)


# One binary for every batch: batch sizes and the alignment of its halves must not cause recompiles.
@triton.jit(
    do_not_specialize=["B"],
    do_not_specialize_on_alignment=[
        "chosen", "rejected", "ref_chosen", "ref_rejected",
        "chosen_lengths", "rejected_lengths", "preference",
    ],
)  # fmt: skip
def pair_losses_kernel(
    chosen,  # (B,)
    rejected,  # (B,)
    ref_chosen,  # (B,) or None
    ref_rejected,  # (B,) or None
    chosen_lengths,  # (B,)
    rejected_lengths,  # (B,)
    preference,  # (B,) or None
    out,  # (5, B): loss, d_w, d_l, chosen rewards, rejected rewards
    metrics,  # (len(PAIR_METRICS),)
    B,
    p0: tl.float64,
    p1: tl.float64,
    p2: tl.float64,
    p3: tl.float64,
    c0: tl.constexpr,
    c1: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    NUMBERS: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = chosen.dtype.element_ty
    zeros = tl.zeros((BLOCK,), dtype=tl.float64)
    five = (zeros, zeros, zeros, zeros, zeros)
    sums = five + five
    for start in range(0, B, BLOCK):
        pairs = start + tl.arange(0, BLOCK)
        mask = pairs < B
        zw = tl.load(chosen + pairs, mask=mask, other=0.0)
        zl = tl.load(rejected + pairs, mask=mask, other=0.0)
        rw, rl = tl.zeros_like(zw), tl.zeros_like(zl)
        if ref_chosen is not None:
            rw = tl.load(ref_chosen + pairs, mask=mask, other=0.0)
            rl = tl.load(ref_rejected + pairs, mask=mask, other=0.0)
        nw = tl.load(chosen_lengths + pairs, mask=mask, other=0).to(dtype)
        nl = tl.load(rejected_lengths + pairs, mask=mask, other=0).to(dtype)
        numbers = hyperparameters(p0, p1, p2, p3, NUMBERS, dtype)
        loss, d_w, d_l, reward_w, reward_l = OBJECTIVE(
            zw, zl, rw, rl, nw, nl, *numbers, *(c0, c1)[:CHOICES]
        )
        if preference is not None:
            p = tl.load(preference + pairs, mask=mask, other=1.0)
            # In the reversed pair the first response is the rejected one, so signs change.
            back, back_l, back_w, _, _ = OBJECTIVE(
                zl, zw, rl, rw, nl, nw, *numbers, *(c0, c1)[:CHOICES]
            )
            loss = p * loss + (1.0 - p) * back
            d_w = p * d_w - (1.0 - p) * back_w
            d_l = p * d_l - (1.0 - p) * back_l
        tl.store(out + pairs, loss, mask=mask)
        tl.store(out + B + pairs, d_w, mask=mask)
        tl.store(out + 2 * B + pairs, d_l, mask=mask)
        tl.store(out + 3 * B + pairs, reward_w, mask=mask)
        tl.store(out + 4 * B + pairs, reward_l, mask=mask)
        positive = (d_w > 0) & (d_l > 0)
        columns = (
            loss, reward_w, reward_l,
            tl.where(reward_w > reward_l, 1.0, tl.where(reward_w == reward_l, 0.5, 0.0)),
            reward_w - reward_l, zw, zl, d_w, d_l, tl.where(positive, 0.0, 1.0),
        )  # fmt: skip
        sums = added(sums, columns, mask)
    tl.store(metrics, tl.full((), B, tl.float64))
    for i in tl.static_range(len(sums)):
        tl.store(metrics + 1 + i, tl.sum(sums[i], axis=0))


@torch.no_grad()
def pair_losses(
    name: str,
    parameters: Mapping[str, Any],
    chosen: Tensor,  # (B,)
    rejected: Tensor,  # (B,)
    ref_chosen: Tensor | None,  # (B,)
    ref_rejected: Tensor | None,  # (B,)
    chosen_lengths: Tensor,  # (B,)
    rejected_lengths: Tensor,  # (B,)
    preference: Tensor | None = None,  # (B,)
) -> PairLosses:
    """Evaluate the objective `name` on B pairs, with all its hyperparameters in `parameters`.

    Log-probs are summed, in nats, fp32 or fp64, which is also the dtype of the computation; lengths
    are int32 or int64. An objective without a reference ignores one. `preference` is the
    probability that `chosen` is the better response; None means 1.
    Raises ValueError for an unknown objective, wrong hyperparameters, and tensors that do not fit.
    """
    objective = find(PAIR_OBJECTIVES, name)
    numbers, choices = objective.split(parameters)
    if objective.needs_reference(parameters):
        ref_chosen = required("ref_chosen", ref_chosen, name)
        ref_rejected = required("ref_rejected", ref_rejected, name)
    else:
        ref_chosen = ref_rejected = None
    log_probs = {"rejected": rejected, "ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    check_log_probs("chosen", chosen)
    check_vectors("chosen", chosen, {**log_probs, "preference": preference}, (chosen.dtype,))
    check_vectors("chosen", chosen, lengths, LENGTH_DTYPES)

    B = chosen.shape[0]
    out = chosen.new_empty(5, B)
    metrics = chosen.new_empty(len(PAIR_METRICS), dtype=torch.float64)
    tensors = (
        chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, preference,
    )  # fmt: skip
    with launching_on(chosen):
        pair_losses_kernel[(1,)](
            *(None if x is None else x.contiguous() for x in tensors), out, metrics, B,
            *padded(numbers, 4, 0.0), *padded(choices, 2, None),
            OBJECTIVE=objective.function, NUMBERS=len(numbers), CHOICES=len(choices),
            BLOCK=LOSSES.block_t, num_warps=LOSSES.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return PairLosses(out[0], out[1], out[2], out[3], out[4], metrics)
