"""Any pairwise objective as a module: hidden states and a head's weight in, a scalar loss out."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpref import losses, ops
from fastpref.calibration import RewardCalibration
from fastpref.fused.tokens import ScoredTokens, autocast_operands
from fastpref.logps import SequenceLogps
from fastpref.losses import PairwiseLoss
from fastpref.metrics import PAIR_METRICS, pair_sums
from fastpref.ops import IGNORE_INDEX


class FusedPreferenceLoss(nn.Module):
    """The mean loss of B preference pairs, from hidden states, without their logits.

    loss: an objective, such as `losses.build("simpo", beta=2.5)`, or the name of one.
    calibration: `RewardCalibration()`; its scores are those of the head (`ops.score_geometry`).
    accumulation_steps: training calls per optimizer step; after as many, the calibration takes the
        statistics of all their pairs, on all ranks, into its averages, which `state_dict` holds.
    impl, logit_scale, softcap: as in `ops.linear_logps`.
    ignore_index: the label of what is not scored; -100 means that too, whatever this is.

    Sequences are ordered chosen_0 .. chosen_{B-1}, rejected_0 .. rejected_{B-1}.
    """

    def __init__(
        self,
        loss: PairwiseLoss | str,
        calibration: RewardCalibration | None = None,
        impl: str = "auto",
        logit_scale: float = 1.0,
        softcap: float | None = None,
        ignore_index: int = IGNORE_INDEX,
        accumulation_steps: int = 1,
    ) -> None:
        super().__init__()
        objective = losses.build(loss) if isinstance(loss, str) else loss
        if not isinstance(objective, PairwiseLoss):
            raise ValueError(
                f"loss: expected a pairwise objective or the name of one, got {loss!r}; "
                f"`fastpref losses` lists them"
            )
        if calibration is not None and not isinstance(calibration, RewardCalibration):
            raise ValueError(f"calibration: expected a RewardCalibration, got {calibration!r}")
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps: must be >= 1, got {accumulation_steps}")
        self.loss: PairwiseLoss = objective
        self.calibration = calibration
        self.accumulation_steps = accumulation_steps
        self._statistics: list[Tensor] = []  # of the calls since the last optimizer step
        self.ignore_index = ignore_index
        self.head_options: dict[str, Any] = {
            "logit_scale": logit_scale,
            "softcap": softcap,
            "impl": impl,
        }

    def forward(
        self,
        hidden: Tensor,  # (2B, L, D), or (T, D) with cu_seqlens
        weight: Tensor,  # (V, D)
        labels: Tensor,  # (2B, L) or (T,)
        cu_seqlens: Tensor | None = None,  # (2B + 1,)
        attention_mask: Tensor | None = None,  # (2B, L)
        *,
        bias: Tensor | None = None,  # (V,)
        ref_logps: Tensor | None = None,  # (2B,)
        ref_hidden: Tensor | None = None,  # (2B, L, E) or (T, E)
        ref_weight: Tensor | None = None,  # (V, E)
        ref_bias: Tensor | None = None,  # (V,)
        preference: Tensor | None = None,  # (B,)
        shift: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss (), and metrics of the batch: detached tensors () by the names trainers log.

        `labels[..., t]` is the token that `hidden[..., t]` predicts, the one after position t. With
        `shift`, labels are aligned with the input ids as in Hugging Face models: `labels[..., t]`
        is the token at position t, and hidden states and labels are shifted against each other
        here. Where `attention_mask` is 0 nothing is scored.

        The reference's log-probs are `ref_logps`, summed in nats, or come from its hidden states
        and head, without gradient; an objective without a reference computes none. `preference` is
        a soft label per pair.

        Only scored tokens of a padded batch reach the head; picking them out waits for the device
        of `labels`, so leave those on the CPU to keep a GPU busy. A packed batch is not
        searched: nothing waits, and a token labelled -100 costs as much as a scored one. Under
        autocast the head multiplies in the autocast dtype, as a linear layer does.

        The metrics are `rewards/chosen`, `rewards/rejected`, `rewards/accuracies`,
        `rewards/margins`, and `logps/chosen`, `logps/rejected`, which are sums over tokens.

        Calibration measures the scores of the head: a further pass or two, and on a GPU a wait
        for `cu_seqlens`. It acts in training mode, where gradients are enabled.

        Raises ValueError, naming the argument, for shapes that do not fit together, for a
        reference that is missing or given twice, and for a bias beside a calibration.
        """
        if bias is not None and self.calibration is not None:
            raise ValueError(
                "bias: the scores of a head with a bias are not measured; leave it out"
            )
        _check_shapes(hidden, labels, cu_seqlens, attention_mask)
        options: dict[str, Any] = {"shift": shift, "ignore_index": self.ignore_index}
        if cu_seqlens is None:
            tokens = ScoredTokens.padded(
                labels, hidden.device, attention_mask=attention_mask, **options
            )
        else:
            tokens = ScoredTokens.packed(labels, cu_seqlens, **options)
        rows, weight, bias = autocast_operands(tokens.rows(hidden), weight, bias)
        logps = tokens.logps(rows, weight, bias, **self.head_options)
        policy = SequenceLogps.from_sequences(logps, tokens.lengths, preference)
        reference = None
        if self.loss.needs_reference:
            self._check_reference(logps, hidden, ref_logps, ref_hidden, ref_weight)
            if ref_hidden is not None and ref_weight is not None:
                with torch.no_grad():
                    ref_rows = tokens.rows(ref_hidden)
                    ref_logps = tokens.logps(ref_rows, ref_weight, ref_bias, **self.head_options)
            assert ref_logps is not None
            reference = SequenceLogps.from_sequences(ref_logps.to(logps), tokens.lengths)
        calibrated = policy
        if self.calibration is not None and torch.is_grad_enabled() and self.training:
            calibrated = self._calibrated(self.calibration, policy, reference, rows, weight, tokens)
        output = self.loss(calibrated, reference)
        means = pair_sums(output, policy) / len(policy.chosen)
        metrics = dict(zip(PAIR_METRICS, means.unbind(), strict=True))
        del metrics["loss"]
        return output.loss.mean(), metrics

    def _calibrated(
        self,
        calibration: RewardCalibration,
        policy: SequenceLogps,
        reference: SequenceLogps | None,
        rows: Tensor,  # (T, D)
        weight: Tensor,  # (V, D)
        tokens: ScoredTokens,
    ) -> SequenceLogps:
        geometry = ops.score_geometry(
            rows, weight, tokens.labels, tokens.cu_seqlens, per_pair=True, **self.head_options
        )
        incentives = losses.incentives(self.loss, policy, reference)
        calibration.averages = calibration.averages.to(rows.device)
        made = calibration.calibrate(policy, incentives, geometry)
        self._statistics.append(made.sums)
        if len(self._statistics) == self.accumulation_steps:
            total = torch.stack(self._statistics).sum(0)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(total)
            calibration.update(total)
            self._statistics = []
        return made.policy

    def get_extra_state(self) -> dict[str, Tensor]:
        """The calibration's averages: part of `state_dict`."""
        return {} if self.calibration is None else self.calibration.state_dict()

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        if self.calibration is not None and state:
            self.calibration.load_state_dict(state)

    def extra_repr(self) -> str:
        return repr(self.loss)

    def _check_reference(
        self,
        logps: Tensor,
        hidden: Tensor,
        ref_logps: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
    ) -> None:
        if (ref_hidden is None) != (ref_weight is None):
            name = "ref_weight" if ref_weight is None else "ref_hidden"
            raise ValueError(f"{name}: got None; pass ref_hidden and ref_weight together")
        if (ref_logps is None) == (ref_hidden is None):
            found = "neither" if ref_logps is None else "both"
            raise ValueError(
                f"ref_logps: {self.loss.name} needs a reference, as ref_logps or as ref_hidden "
                f"and ref_weight; got {found}"
            )
        if ref_logps is not None and ref_logps.shape != logps.shape:
            raise ValueError(
                f"ref_logps: expected shape {tuple(logps.shape)}, one sum per sequence, chosen "
                f"first, got {tuple(ref_logps.shape)}"
            )
        if ref_hidden is not None and ref_hidden.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(
                f"ref_hidden: expected shape {(*hidden.shape[:-1], 'E')} for the same tokens as "
                f"hidden, got {tuple(ref_hidden.shape)}"
            )


def _check_shapes(
    hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None, attention_mask: Tensor | None
) -> None:
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels: expected shape {tuple(hidden.shape[:-1])}, one per hidden state, "
            f"got {tuple(labels.shape)}"
        )
    if cu_seqlens is None:
        if hidden.dim() != 3 or len(hidden) == 0 or len(hidden) % 2:
            raise ValueError(
                f"hidden: expected shape (2B, L, D), all chosen and then all rejected sequences, "
                f"or (T, D) with cu_seqlens, got {tuple(hidden.shape)}"
            )
        if attention_mask is not None and attention_mask.shape != labels.shape:
            raise ValueError(
                f"attention_mask: expected shape {tuple(labels.shape)}, "
                f"got {tuple(attention_mask.shape)}"
            )
        return
    if hidden.dim() != 2:
        raise ValueError(
            f"hidden: expected a packed (T, D) with cu_seqlens, got {tuple(hidden.shape)}"
        )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 3 or len(cu_seqlens) % 2 == 0:
        raise ValueError(
            f"cu_seqlens: expected 2 B + 1 offsets, B chosen and then B rejected sequences, "
            f"got shape {tuple(cu_seqlens.shape)}"
        )
    if attention_mask is not None:
        raise ValueError(
            "attention_mask: a packed batch has no padding; label what is not scored -100"
        )
