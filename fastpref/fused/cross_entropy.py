"""Replacement of cut-cross-entropy 25.6: same arguments, same results, without the logits.

    from fastpref.fused.cross_entropy import linear_cross_entropy

`impl`, `filter_eps`, `filter_e_grad`, `filter_c_grad`, `accum_e_fp32` and `accum_c_fp32` choose
between speed and precision there. Here they are accepted and have no effect: no gradient is
filtered, and sums are accumulated in fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fastpref.fused.token_terms import TokenTerms, check_operands, token_terms
from fastpref.ops import IGNORE_INDEX

REDUCTIONS = ("mean", "sum", "none")


class LinearCrossEntropyImpl(enum.IntEnum):
    """Names of implementations in cut-cross-entropy: all mean the same here."""

    CCE = enum.auto()
    TORCH_COMPILE = enum.auto()
    CCE_KAHAN_FULL_C = enum.auto()
    CCE_KAHAN_FULL_E = enum.auto()
    CCE_EXACT = enum.auto()
    CCE_KAHAN_FULL_C_FULL_E = enum.auto()
    CCE_KAHAN_FULL = enum.auto()


def linear_cross_entropy(
    e: Tensor,  # (..., D)
    c: Tensor,  # (V, D)
    targets: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: str | LinearCrossEntropyImpl = "cce",
    vocab_parallel_options: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of `softcap * tanh((e @ c.T + bias) / softcap)`, as in cut-cross-entropy.

    e, c: hidden states and the head's weight.
    targets: indices of the vocabulary; -100 is ignored, whatever `ignore_index` is.
    shift: `e[..., t, :]` predicts `targets[..., t + shift]`, 0 <= shift < T; True is 1.
    reduction: "mean" over the scored tokens (NaN without any), "sum", or "none" with a loss for
        each of (..., T - shift), 0 where ignored.
    return_lse: also return the log-sum-exps of the logits, (..., T - shift), 0 where ignored;
        differentiable, for a z-loss such as `compute_z_loss`.

    Raises ValueError, naming the argument, for shapes, dtypes or names that do not fit, and for
    `vocab_parallel_options`, which has no counterpart here.
    """
    _check_options(reduction, filter_eps, impl, vocab_parallel_options)
    check_operands(e, c, targets, bias, ("e", "c", "targets", "bias"))
    length, steps = targets.shape[-1], int(shift)
    if not isinstance(shift, int) or not 0 <= steps < max(1, length):
        raise ValueError(f"shift: expected a number from 0 to {length - 1}, got {shift!r}")
    labels = pad(targets[..., steps:], (0, steps), value=ignore_index) if steps else targets
    terms = token_terms(
        e, c, labels, bias, ignore_index=ignore_index, softcap=softcap, only_logps=not return_lse
    )

    def of_positions(values: Tensor) -> Tensor:
        return terms.spread(values).view(targets.shape)[..., : length - steps]

    loss = of_positions(-terms.logps) if reduction == "none" else _reduced(terms, reduction)
    return loss if terms.rest is None else (loss, of_positions(terms.rest.lse))


def _reduced(terms: TokenTerms, reduction: str) -> Tensor:
    total = -terms.logps.sum()
    return total if reduction == "sum" else total / terms.scored.sum()


class LinearCrossEntropy(nn.Module):
    """`linear_cross_entropy` with its options at construction, as in cut-cross-entropy."""

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        softcap: float | None = None,
        reduction: str = "mean",
        shift: bool | int = 0,
        filter_eps: float | str | None = "auto",
        accum_e_fp32: bool = False,
        accum_c_fp32: bool = False,
        filter_e_grad: bool = True,
        filter_c_grad: bool = True,
        impl: str | LinearCrossEntropyImpl = "cce",
        return_lse: bool = False,
    ) -> None:
        super().__init__()
        _check_options(reduction, filter_eps, impl, None)
        self.ignore_index = ignore_index
        self.softcap = softcap
        self.reduction = reduction
        self.shift = shift
        self.filter_eps = filter_eps
        self.accum_e_fp32 = accum_e_fp32
        self.accum_c_fp32 = accum_c_fp32
        self.filter_e_grad = filter_e_grad
        self.filter_c_grad = filter_c_grad
        self.impl = impl
        self.return_lse = return_lse

    def forward(
        self,
        e: Tensor,  # (..., D)
        c: Tensor,  # (V, D)
        targets: Tensor,  # (...)
        bias: Tensor | None = None,  # (V,)
    ) -> Tensor | tuple[Tensor, Tensor]:
        return linear_cross_entropy(
            e, c, targets, bias, self.ignore_index, self.softcap, self.reduction, self.shift,
            self.return_lse,
        )  # fmt: skip


def compute_z_loss(
    lse: Tensor,  # (..., T - shift)
    targets: Tensor | None = None,  # (..., T)
    shift: bool | int = False,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
) -> Tensor:
    """Square of the log-sum-exps that `linear_cross_entropy` returns, reduced.

    With `targets`, ignored tokens count as 0 and are not part of the mean. Raises ValueError for an
    unknown reduction.
    """
    _check_reduction(reduction)
    squares = lse.square()
    scored = torch.ones_like(lse, dtype=torch.bool)
    if targets is not None:
        scored = targets[..., int(shift) :] != ignore_index
        squares = squares.masked_fill(~scored, 0.0)
    if reduction == "none":
        return squares
    total = squares.sum()
    return total if reduction == "sum" else total / scored.sum()


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")


def _check_options(
    reduction: str,
    filter_eps: float | str | None,
    impl: str | LinearCrossEntropyImpl,
    vocab_parallel_options: Any,
) -> None:
    _check_reduction(reduction)
    if isinstance(filter_eps, str) and filter_eps != "auto":
        raise ValueError(f"filter_eps: expected a number, 'auto' or None, got {filter_eps!r}")
    # An enumeration of cut-cross-entropy itself has the names, too.
    name = impl.lower() if isinstance(impl, str) else getattr(impl, "name", repr(impl)).lower()
    if name.upper() not in LinearCrossEntropyImpl.__members__:
        names = ", ".join(member.lower() for member in LinearCrossEntropyImpl.__members__)
        raise ValueError(f"impl: expected one of {names}, all the same here, got {impl!r}")
    if vocab_parallel_options is not None:
        raise ValueError(
            "vocab_parallel_options: a head that is split over ranks by its vocabulary is not "
            "supported, got options of one; leave them out and pass the whole head"
        )
