"""TRL's DPO trainer on fastpref's head: TRL's losses, or any objective of fastpref.

    class FusedDPOTrainer(FusedDPOMixin, DPOTrainer): ...

    FusedDPOTrainer(model, args=DPOConfig(loss_type=["sigmoid", "sft"], loss_weights=[1, 0.1]), ...)
    FusedDPOTrainer(model, args=DPOConfig(...), objective=losses.build("simpo"), ...)

Without `objective` the loss, its options and its metrics are TRL's, on log-probs of fastpref. With
an objective the loss is that of `FusedPreferenceLoss`. Data, reference model, adapters and the loop
stay TRL's.

TRL's batches consist of pairs. For an objective on single responses a pair is split into a
desirable and an undesirable one; for one on groups it is a group of two with the scores 1 and 0.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint

from fastpref import losses
from fastpref.dynamics.pair_calibration import PairCalibration
from fastpref.dynamics.reward_calibration import RewardCalibration
from fastpref.fused.loss import FusedPreferenceLoss
from fastpref.fused.trl.objective_loss import ObjectiveLoss, PairedLoss
from fastpref.fused.trl.setup import check_objective, objective_of
from fastpref.fused.trl.trainers import FusedHeadMixin
from fastpref.fused.validation import check_biases
from fastpref.losses import Objective

_AVERAGES = "fused_loss.safetensors"  # file name in a checkpoint


class FusedDPOMixin(FusedHeadMixin):
    """Mixin that precedes `trl.DPOTrainer` among the bases of a trainer.

    objective: an objective or the name of one, in place of `DPOConfig.loss_type`. A name is built
        with `DPOConfig.beta`, unless that has its default and the objective another one.
    calibration: as in `FusedPreferenceLoss`, of `objective`, which is DPO by default.
    impl, token_metrics: as in `FusedHeadMixin`.

    For objectives `rewards/*` are the objective's own, and metrics of pairs and of tokens are means
    over all of them since the last line of the log, where TRL averages the means of batches.
    Between two lines only the number of scored tokens and, for KTO, the token ids are read from the
    device. KTO's reference point, the mean log-ratio of mismatched responses (`fused.mismatched`)
    on all ranks, costs a further forward pass of policy and reference, without gradient; the
    importance of tokens, for `ti_dpo`, one forward and backward pass of the policy to its
    embeddings.

    Raises ValueError, naming the option, for a config, model or setup that is not supported: beside
    those of `FusedHeadMixin`, with an objective, the options of DPOConfig that choose or change
    TRL's loss, vision-language models, prompt learning and FSDP; and `precompute_ref_log_probs`
    where the objective needs more than sums of the pairs' log-probs.
    """

    processing_class: Any
    use_weighting: bool

    _logged_fields = ("entropy", "is_top1", "mean_logits")

    def __init__(
        self,
        *args: Any,
        objective: Objective | str | None = None,
        calibration: RewardCalibration | PairCalibration | None = None,
        impl: str = "auto",
        token_metrics: bool = True,
        **kwargs: Any,
    ) -> None:
        if objective is None and calibration is not None:
            objective = "dpo"
        self._objective = objective
        self._calibration = calibration
        if isinstance(objective, str):
            losses.build(objective)  # an unknown name is an error before any model is loaded
        super().__init__(*args, impl=impl, token_metrics=token_metrics, **kwargs)
        _ = self.fused_loss

    @cached_property
    def fused_loss(self) -> FusedPreferenceLoss | None:
        """The loss module of an objective, built at first use, after the checks of the setup."""
        if self._objective is None:
            return None
        objective = objective_of(self._objective, self.args.beta)
        check_objective(self, objective)
        options = self.policy_head.head.options
        bias = self.policy_head.head.module.bias
        check_biases(objective, self._calibration is not None, bias, None)
        return PairedLoss(
            objective, self._calibration, self._impl, **options,
            accumulation_steps=self.args.gradient_accumulation_steps,
        )  # fmt: skip

    @cached_property
    def _objective_loss(self) -> ObjectiveLoss:
        assert self.fused_loss is not None
        return ObjectiveLoss(self, self.fused_loss, self._token_metrics)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean loss of the batch; with `return_outputs` the outputs of one more forward pass."""
        if self.fused_loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self._objective_loss(model, inputs)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**self._objective_loss.model_inputs(inputs))

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Summed log-probs (B,) of the chosen and of the rejected responses, by the same head."""
        chosen, rejected = super().compute_ref_log_probs(model, inputs)
        return chosen, rejected

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last line, reduced over all ranks, to the logs."""
        if self._objective is not None:
            logs |= self._objective_loss.pop_metrics("train" if self.model.training else "eval")
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and the averages of the loss, if it has any, in the same folder."""
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        averages = {} if self.fused_loss is None else self.fused_loss.averages()
        if averages and self.args.should_save:
            save_file(averages, Path(output_dir or self.args.output_dir) / _AVERAGES)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; the averages of the loss are restored from the checkpoint."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if self.fused_loss and folder and (path := Path(folder) / _AVERAGES).exists():
            self.fused_loss.load_averages(load_file(path))
        return super().train(resume_from_checkpoint, **kwargs)  # type: ignore[misc]

    def _needed_fields(self) -> tuple[str, ...]:
        return ("log_sum_sq_probs",) if self.use_weighting else ()
