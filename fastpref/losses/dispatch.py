"""Evaluation of an objective: by its own PyTorch code, or by its kernel in one launch.

    output = evaluate(objective, policy, reference, reference_point, impl="auto")

A kernel returns the loss of every pair or response and its derivatives in closed form,

    dL/dz_w = -d_w,  dL/dz_l = d_l,  dL/dz = -d,

so the backward pass multiplies them by the gradient of the loss and launches no kernel of its own.
Objectives that wrap or add up others, and those that look at tokens, groups or the whole batch,
have no kernel.

`impl` is "reference", the PyTorch code; "triton", the kernel, or a ValueError that says why not; or
"auto", the kernel for tensors on a CUDA device that fit it, else the PyTorch code. Triton is not
imported before a kernel is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from typing import Any

from fastpref.logps import SequenceLogps, UnpairedLogps
from fastpref.losses import base, registry, token_level
from fastpref.losses.base import LossOutput, PairwiseLoss
from fastpref.losses.kinds import Logps, Objective, Output
from fastpref.losses.pointwise import PointwiseOutput
from fastpref.losses.token_level import TokenLevelLoss
from fastpref.utils.lazy_torch import Tensor, torch

_AUTO_DEVICES = frozenset({"cuda"})  # device types on which "auto" takes a kernel
_METRIC_SUMS = slice(1, 8)  # the entries of the kernel's sums that `LossOutput.metric_sums` has


def evaluate(
    objective: Objective,
    policy: Logps,
    reference: Logps | None = None,
    reference_point: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Output:
    """The result of `objective(policy, reference, reference_point)`, differentiable in the policy.

    A kernel takes fp32 or fp64 log-probs (B,) or (S,), reference and soft labels of the same dtype
    and device, and int32 or int64 lengths. Its values differ from those of the PyTorch code by
    rounding, and a gradient of a gradient raises RuntimeError. Raises ValueError as the objective
    does, and for an `impl` that does not exist or cannot take these arguments.
    """
    if not _uses_kernel(objective, policy, reference, reference_point, impl):
        call: Callable[..., Output] = objective
        return call(policy, reference, reference_point)
    check: Callable[..., None] = objective.check
    check(policy, reference, reference_point)
    # A subclass of a class of torch, which a config that is only checked does not import.
    from fastpref.losses.closed_form import ClosedFormLoss

    if isinstance(policy, SequenceLogps):
        pairs = _pair_losses(objective, policy, reference)
        loss = ClosedFormLoss.apply(
            pairs.loss, (pairs.d_w, pairs.d_l), policy.chosen, policy.rejected
        )
        metric_sums = pairs.metrics[_METRIC_SUMS]
        return LossOutput(loss, pairs.chosen_rewards, pairs.rejected_rewards, metric_sums)
    responses = _response_losses(objective, policy, reference, reference_point)
    loss = ClosedFormLoss.apply(responses.loss, (responses.d,), policy.logps)
    return PointwiseOutput(loss, responses.rewards)


def pair_incentives(
    objective: Objective, policy: Any, reference: Any = None, *, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The incentives of any objective on pairs: d_w, d_l, each (B,), and token weights W (T,).

    With S the gradient of a response's sum_i W_i * log p_i, -grad L is the sum of
    d_w * S_w - d_l * S_l, without the gradient through `policy.kl`. At the level of sequences W is
    None, which means 1; at that of tokens it has mean 1 in each response, a constant. By autograd,
    or by the kernel, as `impl` says.
    """
    assert isinstance(objective, PairwiseLoss | TokenLevelLoss)
    if _uses_kernel(objective, policy, reference, None, impl):
        objective.check(policy, reference, None)
        pairs = _pair_losses(objective, policy, reference)
        return pairs.d_w, pairs.d_l, None
    if isinstance(objective, TokenLevelLoss):
        return token_level.token_pair_incentives(objective, policy, reference)
    return *base.incentives(objective, policy, reference), None


def has_kernel(objective: Objective) -> bool:
    """Whether the loss kernels can evaluate the objective; imports triton."""
    # A subclass or a wrapper may have the name of a registered objective and another loss.
    if registry.BY_NAME.get(objective.name) is not type(objective):
        return False
    kernels = import_module("fastpref_kernels.losses")
    tables = (kernels.PAIR_OBJECTIVES, kernels.RESPONSE_OBJECTIVES)
    return any(objective.name in table for table in tables)


def _pair_losses(objective: Objective, policy: SequenceLogps, reference: Any) -> Any:
    """`PairLosses` of the kernel."""
    return import_module("fastpref_kernels.losses").pair_losses(
        objective.name,
        _hyperparameters(objective),
        policy.chosen,
        policy.rejected,
        None if reference is None else reference.chosen,
        None if reference is None else reference.rejected,
        policy.chosen_lengths,
        policy.rejected_lengths,
        None if policy.preference is None else policy.preference.to(policy.chosen.dtype),
    )


def _response_losses(
    objective: Objective, policy: Any, reference: Any, reference_point: Tensor | None
) -> Any:
    """`ResponseLosses` of the kernel."""
    return import_module("fastpref_kernels.losses").response_losses(
        objective.name,
        _hyperparameters(objective),
        policy.logps,
        reference.logps,
        policy.lengths,
        policy.desirable,
        None if reference_point is None else reference_point.to(policy.logps.device),
    )


def _hyperparameters(objective: Objective) -> dict[str, Any]:
    return {field.name: getattr(objective, field.name) for field in fields(objective)}


def _uses_kernel(
    objective: Objective,
    policy: Logps,
    reference: Logps | None,
    reference_point: Tensor | None,
    impl: str,
) -> bool:
    """Whether `impl` means the kernel. Raises ValueError where it must and cannot be used."""
    logps = policy.chosen if isinstance(policy, SequenceLogps) else policy.logps
    device = logps.device.type
    if impl == "reference":
        return False
    if impl == "auto":
        if device not in _AUTO_DEVICES or not _fits(policy, reference, reference_point):
            return False
        return not _unavailable_reason(device) and has_kernel(objective)
    if impl != "triton":
        raise ValueError(f"impl: expected 'auto', 'reference' or 'triton', got {impl!r}")
    if reason := _unavailable_reason(device):
        raise ValueError(f"impl: 'triton' {reason}, or use impl='auto'")
    if not has_kernel(objective):
        raise ValueError(f"impl: 'triton' has no kernel for {objective.name}; use impl='auto'")
    return True


def _fits(policy: Logps, reference: Logps | None, reference_point: Tensor | None) -> bool:
    """Whether a kernel takes tensors of these dtypes, shapes and devices."""
    if isinstance(policy, SequenceLogps):
        logps = [policy.chosen, policy.rejected]
        lengths = [policy.chosen_lengths, policy.rejected_lengths]
        if isinstance(reference, SequenceLogps):
            logps += [reference.chosen, reference.rejected]
        if policy.preference is not None:
            if policy.preference.requires_grad:  # to which the kernel has no derivative
                return False
            logps.append(policy.preference)
    elif isinstance(policy, UnpairedLogps):
        logps, lengths = [policy.logps], [policy.lengths]
        if isinstance(reference, UnpairedLogps):
            logps.append(reference.logps)
        if reference_point is not None and not reference_point.is_floating_point():
            return False
    else:
        return False
    shape, device, dtype = logps[0].shape, logps[0].device, logps[0].dtype
    return (
        len(shape) == 1
        and dtype in (torch.float32, torch.float64)
        and all(x.dtype == dtype for x in logps)
        and all(x.dtype in (torch.int32, torch.int64) for x in lengths)
        and all(x.shape == shape and x.device == device for x in (*logps, *lengths))
    )


def _unavailable_reason(device: str) -> str:
    """Reason why the kernels cannot run on a type of device; empty if they can."""
    reason: str = import_module("fastpref_kernels").unavailable_reason(device)
    return reason
