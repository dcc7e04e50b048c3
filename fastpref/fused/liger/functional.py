"""The losses as functions, by the names and argument orders of liger-kernel's.

They are those of `liger_kernel.chunked_loss.functional`, and `liger_fused_linear_cross_entropy` of
`liger_kernel.transformers.functional`. Hidden states come before the head's weight, unlike in most
of the classes, and each returns what the class returns. Keywords are accepted, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.fused.liger.base import Aux
from fastpref.fused.liger.cross_entropy import CrossEntropyOutput, FusedLinearCrossEntropyLoss
from fastpref.fused.liger.jsd import FusedLinearJSDLoss
from fastpref.fused.liger.kto import FusedLinearKTOLoss
from fastpref.fused.liger.pairs import (
    FusedLinearCPOLoss,
    FusedLinearDPOLoss,
    FusedLinearORPOLoss,
    FusedLinearSimPOLoss,
)
from fastpref.ops import IGNORE_INDEX


def liger_fused_linear_dpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    beta: float = 0.1,
    compute_nll_loss: bool = False,
    compiled: bool = True,
    use_ref_model: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    alpha: float = 1.0,
) -> tuple[Tensor, Aux]:
    """`FusedLinearDPOLoss` of these options."""
    loss = FusedLinearDPOLoss(
        ignore_index=ignore_index, beta=beta, alpha=alpha, compute_nll_loss=compute_nll_loss,
        use_ref_model=use_ref_model, average_log_prob=average_log_prob, loss_type=loss_type,
        label_smoothing=label_smoothing, discopop_tau=discopop_tau,
    )  # fmt: skip
    return loss.forward(weight, _input, target, bias, ref_input, ref_weight, ref_bias)


def liger_fused_linear_cpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    compute_nll_loss: bool = True,
    compiled: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
) -> tuple[Tensor, Aux]:
    """`FusedLinearCPOLoss` of these options."""
    loss = FusedLinearCPOLoss(
        ignore_index, beta, alpha, label_smoothing, compute_nll_loss,
        average_log_prob=average_log_prob,
    )  # fmt: skip
    return loss.forward(weight, _input, target, bias)


def liger_fused_linear_simpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    compute_nll_loss: bool = False,
    compiled: bool = True,
    gamma: float = 0.5,
    chunk_size: int = 1,
) -> tuple[Tensor, Aux]:
    """`FusedLinearSimPOLoss` of these options; without nll by default, unlike the class."""
    loss = FusedLinearSimPOLoss(
        ignore_index, beta, alpha, label_smoothing, compute_nll_loss, gamma=gamma
    )
    return loss.forward(weight, _input, target, bias)


def liger_fused_linear_orpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    beta: float = 0.1,
    compute_nll_loss: bool = True,
    nll_target: Tensor | None = None,
    compiled: bool = True,
    chunk_size: int = 1,
) -> tuple[Tensor, Aux]:
    """`FusedLinearORPOLoss` of these options."""
    loss = FusedLinearORPOLoss(ignore_index, beta, compute_nll_loss)
    return loss.forward(weight, _input, target, bias, nll_target)


def liger_fused_linear_kto(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    preference_labels: Tensor,
    bias: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    beta: float = 0.1,
    compiled: bool = True,
    use_ref_model: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
) -> tuple[Tensor, Aux]:
    """`FusedLinearKTOLoss` of these options; with a reference by default, unlike the class."""
    loss = FusedLinearKTOLoss(
        ignore_index, beta, use_ref_model=use_ref_model, average_log_prob=average_log_prob
    )
    return loss.forward(
        _input, weight, target, bias, preference_labels, ref_input, ref_weight, ref_bias, kl
    )


def liger_fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    true_labels: Tensor,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5,
    beta: float = 0.5,
    ignore_index: int = IGNORE_INDEX,
    temperature: float = 1.0,
    compiled: bool = True,
    chunk_size: int = 1024,
    return_soft_hard_loss: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`FusedLinearJSDLoss` of these options."""
    loss = FusedLinearJSDLoss(
        weight_hard_loss, weight_soft_loss, beta, ignore_index, temperature,
        return_soft_hard_loss=return_soft_hard_loss,
    )  # fmt: skip
    return loss.forward(
        student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias,
        teacher_bias,
    )  # fmt: skip


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Tensor | CrossEntropyOutput:
    """`FusedLinearCrossEntropyLoss` of these options; `chunk_mem_const` has no effect."""
    loss = FusedLinearCrossEntropyLoss(
        ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap,
        return_z_loss, accum_dtype, use_token_scaling, return_token_accuracy,
        return_predicted_tokens,
    )  # fmt: skip
    return loss.forward(weight, input, target, bias)
