"""TRL's CPO and ORPO trainers on fastpref's head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref.fused.trl.lm_head import ALL_POSITIONS
from fastpref.fused.trl.trainers import FusedHeadMixin
from fastpref.ops import IGNORE_INDEX

_ALPHA_OF_ORPO = 1.0


class _ReferenceFreeMixin(FusedHeadMixin):
    """The forward pass of TRL's trainers without a reference, which have logits otherwise."""

    _logged_fields = (ALL_POSITIONS,)

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """Return log-probs (B,), mean logits and nll as the trainer of TRL expects them.

        In place of the logits of the chosen and of the rejected sequences, of which TRL logs the
        mean, these are the means (B, L) over the vocabulary.
        """
        trainer: Any = self
        encodes = trainer.is_encoder_decoder
        joined = trainer.concatenated_inputs(
            batch, encodes, padding_value=self._padding_value(), device=self.accelerator.device
        )
        ids, mask, completions = (
            joined[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels")
        )
        completions = completions.to(ids.device)
        pairs = len(batch["chosen_labels"])
        labels = completions
        if not encodes:
            of_nll = self._nll_labels(ids, mask, completions)
            labels = torch.cat([of_nll[:pairs], completions[pairs:]])
        output = self._run(model, ids, mask, completions, labels)
        if not encodes:
            completions, labels = completions[:, 1:], labels[:, 1:]
        scored = completions != IGNORE_INDEX
        logps = (output.log_probs * scored).sum(1)
        if self._averages_logps():
            logps = logps / scored.sum(1)
        count = (labels[:pairs] != IGNORE_INDEX).sum()
        nll = -output.log_probs[:pairs].sum() / count
        if self._nll_factor() == 0:
            nll = torch.zeros_like(nll)
        means = self._mean_logits(output)
        results = logps[:pairs], logps[pairs:], means[:pairs], means[pairs:], nll
        return (*results, output.aux_loss) if trainer.aux_loss_enabled else results

    def _run(
        self, model: Any, ids: Tensor, mask: Tensor, completions: Tensor, labels: Tensor
    ) -> Any:
        """Values per token of the labels, in the first step after a check of the head."""
        trainer: Any = self
        inputs = {"attention_mask": mask}
        further = {"output_router_logits": True} if trainer.aux_loss_enabled else {}
        if not trainer.is_encoder_decoder:
            self._check_head(model, input_ids=ids, **inputs)
            return model(
                input_ids=ids, **inputs, labels=labels, use_cache=False, fused_lm_head=True,
                **further,
            )  # fmt: skip
        inputs["decoder_input_ids"] = trainer._shift_right(completions)
        # The head has no states of the encoder's tokens, so the check gets no ids of them.
        embeddings = self._causal_lm(model).get_input_embeddings()
        self._check_head(model, inputs_embeds=embeddings(ids), **inputs)
        # The decoder's start token stands before the labels already.
        return model(
            input_ids=ids, **inputs, shift_labels=labels, use_cache=False, fused_lm_head=True,
            **further,
        )  # fmt: skip

    def _nll_labels(self, ids: Tensor, mask: Tensor, completions: Tensor) -> Tensor:
        """Labels (2B, L) of the tokens that the nll of the chosen sequences is a mean over."""
        raise NotImplementedError

    def _nll_factor(self) -> float:
        raise NotImplementedError

    def _averages_logps(self) -> bool:
        raise NotImplementedError

    def _padding_value(self) -> int:
        raise NotImplementedError

    def _mean_logits(self, output: Any) -> Tensor:
        """Mean logits (2B, L), or zeros where they are not logged."""
        means: Tensor | None = output.mean_logits
        return torch.zeros_like(output.log_probs) if means is None else means

    def _logged_metrics(self) -> dict[str, dict[str, Any]]:
        metrics: dict[str, dict[str, Any]] = getattr(self, "_stored_metrics", {})
        return metrics


class FusedCPOMixin(_ReferenceFreeMixin):
    """Mixin that precedes `trl.experimental.cpo.CPOTrainer` among the bases of a trainer.

    Every `loss_type` and option of `CPOConfig` is TRL's (CPO, SimPO, AlphaPO, ...), on log-probs of
    fastpref's head. Arguments and errors as in `FusedHeadMixin`.
    """

    loss_type: str
    cpo_alpha: float
    pad_token_id: int

    def _nll_labels(self, ids: Tensor, mask: Tensor, completions: Tensor) -> Tensor:
        return completions

    def _nll_factor(self) -> float:
        return self.cpo_alpha

    def _averages_logps(self) -> bool:
        return self.loss_type in ("ipo", "simpo")

    def _padding_value(self) -> int:
        return self.pad_token_id


class FusedORPOMixin(_ReferenceFreeMixin):
    """Mixin that precedes `trl.experimental.orpo.ORPOTrainer` among the bases of a trainer.

    Its nll is, as in TRL, a mean over the chosen sequences with their prompts. Arguments and errors
    as in `FusedHeadMixin`.
    """

    padding_value: int
    is_encoder_decoder: bool

    def _nll_labels(self, ids: Tensor, mask: Tensor, completions: Tensor) -> Tensor:
        return ids.masked_fill(mask == 0, IGNORE_INDEX)

    def _nll_factor(self) -> float:
        return _ALPHA_OF_ORPO

    def _averages_logps(self) -> bool:
        return True

    def _padding_value(self) -> int:
        return self.padding_value

    def _mean_logits(self, output: Any) -> Tensor:
        means = super()._mean_logits(output)
        return means if self.is_encoder_decoder else means[:, :-1]
