"""TRL's KTO trainer on fastpref's head."""

from __future__ import annotations

from fastpref.fused.trl.trainers import FusedHeadMixin


class FusedKTOMixin(FusedHeadMixin):
    """Mixin that precedes `trl.KTOTrainer` among the bases of a trainer.

    Every `loss_type` and option of `KTOConfig` is TRL's; the log-probs of policy and reference, of
    responses and mismatched ones, are those of fastpref's head. Arguments and errors as in
    `FusedHeadMixin`.
    """

    _logged_fields = ("entropy", "mean_logits")
