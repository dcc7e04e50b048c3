"""TRL's DPO trainer with liger-kernel's chunked DPO loss.

TRL's own options of liger-kernel replace layers only, and those kernels need a GPU. The loss, which
is plain PyTorch in chunks of one pair, runs everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
from torch import Tensor
from trl import DPOTrainer

_NOT_INPUTS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")


class LigerLossDPOTrainer(DPOTrainer):
    """DPO with a reference model; logs the loss and the rewards of both responses."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Mean loss of a batch of TRL: all chosen rows (B), then all rejected rows (B)."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)[:, 1:]
        rest = {name: value for name, value in inputs.items() if name not in _NOT_INPUTS}
        reference_model: Any = self.ref_model
        with torch.no_grad():
            reference = self._states(reference_model, rest)
        # Compiled for a CPU, it fails on lengths that differ from batch to batch (torch 2.13).
        loss_of = LigerFusedLinearDPOLoss(beta=self.beta, compiled=labels.is_cuda)
        loss, (*_, chosen, rejected) = loss_of(
            model.lm_head.weight,
            self._states(model, rest),
            labels.contiguous(),
            ref_input=reference,
            ref_weight=reference_model.lm_head.weight,
        )
        rewards = {"rewards/chosen": chosen, "rewards/rejected": rejected}
        for name, value in rewards.items():
            self._metrics["train"][name].append(value.mean().item())
        return loss

    @staticmethod
    def _states(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Hidden states (2 B, L - 1, D) at the positions that predict the labels."""
        states: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
        return states[:, :-1].contiguous()
