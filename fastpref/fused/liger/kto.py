"""KTO as in liger-kernel: a loss of single responses."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.fused.liger.base import Aux, FusedLinearLoss, sums_of_logits
from fastpref.ops import IGNORE_INDEX


class FusedLinearKTOLoss(FusedLinearLoss):
    """KTO, as `liger_kernel.chunked_loss.LigerFusedLinearKTOLoss`.

    kl is one number, () or (1,), for all responses. aux: sums over the desirable and over the other
    responses of the log-probs, of all logits, and of the rewards.
    """

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, beta, compiled, average_log_prob, chunk_size)
        self.use_ref_model = use_ref_model

    def forward(
        self,
        _input: Tensor,  # (S, L, D)
        lin_weight: Tensor,  # (V, D)
        target: Tensor,  # (S, L)
        bias: Tensor | None = None,  # (V,)
        preference_labels: Tensor | None = None,  # (S,) bool
        ref_input: Tensor | None = None,  # (S, L, E)
        ref_weight: Tensor | None = None,  # (V, E)
        ref_bias: Tensor | None = None,  # (V,)
        kl: Tensor | None = None,  # () or (1,)
    ) -> tuple[Tensor, Aux]:
        desirable = preference_labels
        if desirable is None or desirable.dtype != torch.bool or len(desirable) != len(_input):
            raise ValueError(
                f"preference_labels: expected bool of shape ({len(_input)},), got {desirable!r}"
            )
        if kl is not None and kl.numel() != 1:
            raise ValueError(f"kl: expected one number, got shape {tuple(kl.shape)}; take its mean")
        logps = self._sequences(_input, lin_weight, target, bias).logps
        reference = self._reference(
            _input, target, ref_input, ref_weight, ref_bias, self.use_ref_model
        )
        log_ratios = logps if reference is None else logps - reference
        shifted = log_ratios if kl is None else log_ratios - kl.detach().reshape(())
        signed = torch.where(desirable, self.beta * shifted, -self.beta * shifted)
        logits = sums_of_logits(_input, lin_weight, bias)
        sums = [_split_sum(x, desirable) for x in (logps, logits, self.beta * log_ratios)]
        aux = tuple(x.detach().to(logps.dtype) for pair in sums for x in pair)
        return (-signed).sigmoid().mean(), aux


def _split_sum(values: Tensor, desirable: Tensor) -> tuple[Tensor, Tensor]:
    """Sums () over the desirable and over the other responses."""
    return torch.where(desirable, values, 0.0).sum(), torch.where(desirable, 0.0, values).sum()
