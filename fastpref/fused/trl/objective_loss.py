"""The loss of an objective on the batches of TRL's DPO trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastpref import losses, ops
from fastpref.fused.head_call import Compute, through_head
from fastpref.fused.loss import FusedPreferenceLoss
from fastpref.fused.mismatched import Mismatched
from fastpref.fused.scored_tokens import ScoredTokens, autocast_operands
from fastpref.fused.trl.lm_head import token_fields
from fastpref.fused.validation import needs_point, token_columns
from fastpref.logps import segment_positions
from fastpref.losses import GroupwiseLoss, PointwiseLoss, TokenLevelLoss
from fastpref.losses.pointwise import pooled_mean, sum_and_count
from fastpref.model.token_importance import token_importance

Inputs = dict[str, Tensor]
# Entries of TRL's batches that are not inputs of the model.
_OF_LOSS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
_FIELDS = ("entropy", "is_top1", "mean_logits")


class PairedLoss(FusedPreferenceLoss):
    """The loss module with the accuracy of TRL, which counts equal rewards as wrong."""

    def metrics(self, output: losses.Output, policy: losses.Logps) -> dict[str, Tensor]:
        metrics = super().metrics(output, policy)
        if isinstance(output, losses.LossOutput):
            above = output.chosen_rewards > output.rejected_rewards
            metrics["rewards/accuracies"] = above.double().mean()
        return metrics


class ObjectiveLoss:
    """The loss of a batch of pairs, and sums of its metrics.

    trainer: a DPO trainer with fastpref's head.
    token_metrics: whether metrics of tokens are computed.
    """

    def __init__(self, trainer: Any, loss: FusedPreferenceLoss, token_metrics: bool) -> None:
        self.trainer = trainer
        self.loss = loss
        self.token_metrics = token_metrics
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self._num_tokens: Tensor | int = 0
        self._mismatched: dict[str, Mismatched] = {}

    def __call__(self, model: Any, inputs: Inputs) -> Tensor:
        """Mean loss () of the batch; model: as the trainer wraps it."""
        if isinstance(self.loss.loss, GroupwiseLoss):
            inputs = _group_by_group(inputs)
        count = len(inputs["input_ids"])
        chosen = self._chosen(count, inputs["input_ids"].device)
        given = self._labels(chosen) | self._reference(inputs)
        if needs_point(self.loss.loss):
            given["reference_point"] = self._reference_point(model, inputs)
        importance = None
        if "importance" in token_columns(self.loss.loss):
            importance = self._importance(model, inputs)
        sums: dict[str, Tensor] = {}

        def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            tokens = _scored(inputs, hidden)
            rows = tokens.rows(hidden)
            if importance is not None:
                given["importance"] = tokens.column(importance)
            loss, means = self.loss(
                rows, weight, tokens.labels, tokens.cu_seqlens, bias=bias, **given
            )
            for name, mean in means.items():
                sums[name] = torch.stack([mean, torch.ones_like(mean)]) * (count // 2)
            if self.token_metrics:
                sums.update(self._token_sums(rows, (weight, bias), tokens, chosen))
            return loss

        further = {"output_router_logits": True} if self.trainer.aux_loss_enabled else {}
        loss, output = self._through_head(model, compute, self.model_inputs(inputs) | further)
        if further:
            aux_loss = output.aux_loss
            loss = loss + self.trainer.router_aux_loss_coef * aux_loss
            aux_loss = aux_loss.detach().double()
            sums["aux_loss"] = torch.stack([aux_loss, torch.ones_like(aux_loss)]) * (count // 2)
        self._add(sums, inputs["attention_mask"])
        return loss

    def model_inputs(self, inputs: Inputs) -> dict[str, Any]:
        """The entries of a batch that the model takes."""
        taken = {name: value for name, value in inputs.items() if name not in _OF_LOSS}
        return {**taken, "use_cache": False}

    def pop_metrics(self, mode: str) -> dict[str, float]:
        """Means of the metrics since the last call, over all ranks; mode: train or eval."""
        sums, self._sums[mode] = self._sums[mode], {}
        if not sums:
            return {}
        accelerator = self.trainer.accelerator
        totals = accelerator.reduce(torch.stack([*sums.values()]), "sum").tolist()
        means = {name: total / max(n, 1) for name, (total, n) in zip(sums, totals, strict=True)}
        means["num_tokens"] = int(accelerator.reduce(self._num_tokens, "sum"))
        prefix = "eval_" if mode == "eval" else ""
        return {prefix + name: value for name, value in means.items()}

    @property
    def _mode(self) -> str:
        return "train" if self.trainer.model.training else "eval"

    def _chosen(self, count: int, device: torch.device) -> Tensor:
        """Whether a sequence is a chosen one, (2B,) bool."""
        index = torch.arange(count, device=device)
        grouped = isinstance(self.loss.loss, GroupwiseLoss)
        return index % 2 == 0 if grouped else index < count // 2

    def _labels(self, chosen: Tensor) -> dict[str, Tensor]:
        """Labels of single responses, or scores and offsets of groups."""
        if isinstance(self.loss.loss, PointwiseLoss):
            return {"desirable": chosen}
        if isinstance(self.loss.loss, GroupwiseLoss):
            offsets = torch.arange(0, len(chosen) + 1, 2, device=chosen.device)
            return {"scores": chosen.float(), "cu_groups": offsets}
        return {}

    def _reference(self, inputs: Inputs) -> dict[str, Tensor]:
        """The reference's log-probs, or, for a divergence, its hidden states and head."""
        objective = self.loss.loss
        if not objective.needs_reference:
            return {}
        if self.trainer.args.precompute_ref_log_probs:
            pair = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
            grouped = isinstance(objective, GroupwiseLoss)
            return {"ref_logps": torch.stack(pair, 1).flatten() if grouped else torch.cat(pair)}
        if "kl" in token_columns(objective):
            return self._reference_head(inputs)
        per_token = isinstance(objective, TokenLevelLoss)
        with self._as_reference() as model:
            logps = self._logps(model, inputs, per_token)[0]
        return {"ref_token_logps" if per_token else "ref_logps": logps}

    def _reference_head(self, inputs: Inputs) -> dict[str, Tensor]:
        operands: dict[str, Tensor] = {}

        def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            operands["ref_hidden"] = _scored(inputs, hidden).rows(hidden)
            operands["ref_weight"] = weight
            if bias is not None:
                operands["ref_bias"] = bias
            return hidden.new_zeros(())

        with self._as_reference() as model:
            self._through_head(model, compute, self.model_inputs(inputs))
        return operands

    def _reference_point(self, model: Any, inputs: Inputs) -> Tensor:
        """KTO's reference point: mean log-ratio () of mismatched responses, over all ranks."""
        accelerator = self.trainer.accelerator
        empty = Mismatched(self.trainer.args.max_length)
        mismatched = self._mismatched.setdefault(self._mode, empty)
        batch = mismatched.batch(inputs)
        sums = torch.zeros(2, dtype=torch.float64, device=inputs["input_ids"].device)
        if batch is not None:
            # Without DistributedDataParallel, since another rank may have no batch to compute.
            policy, lengths = self._logps(accelerator.unwrap_model(model), batch)
            with self._as_reference() as reference_model:
                reference, _ = self._logps(reference_model, batch)
            sums = sum_and_count(policy - reference, lengths)
        sums = accelerator.reduce(sums, "sum")
        previous = mismatched.point.to(sums.device)
        mismatched.point = torch.where(sums[1] > 0, pooled_mean(sums), previous)
        return mismatched.point

    def _importance(self, model: Any, inputs: Inputs) -> Tensor:
        """Importance of each token of the sequences, (2B, L)."""
        model = self.trainer.accelerator.unwrap_model(model)
        model = model.get_base_model() if hasattr(model, "peft_config") else model
        with self.trainer.accelerator.autocast():
            return token_importance(model, inputs["input_ids"], inputs["attention_mask"])

    @torch.no_grad()
    def _logps(self, model: Any, inputs: Inputs, per_token: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probs without gradient, (T,) or summed (2B,), and lengths (2B,) of the responses."""
        lengths: list[Tensor] = []

        def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            tokens = _scored(inputs, hidden)
            lengths.append(tokens.lengths)
            logps = tokens.token_logps if per_token else tokens.logps
            return logps(tokens.rows(hidden), weight, bias, **self.loss.head_options)

        logps, _ = self._through_head(model, compute, self.model_inputs(inputs))
        return logps, lengths[0]

    def _through_head(
        self, model: Any, compute: Compute, inputs: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        head = self.trainer.accelerator.unwrap_model(model).get_output_embeddings()
        with self.trainer.accelerator.autocast():
            return through_head(model, head, compute, inputs)

    @contextmanager
    def _as_reference(self) -> Iterator[Any]:
        """Context manager of the reference, without gradient.

        It is TRL's reference model, or the policy with TRL's copy of the adapters or none.
        """
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        with torch.no_grad():
            if trainer.ref_model is not None or not hasattr(model, "peft_config"):
                yield trainer.ref_model or trainer.model
                return
            from trl.trainer.utils import use_adapter

            with use_adapter(model, "ref" if "ref" in model.peft_config else None):
                yield trainer.model

    def _token_sums(
        self,
        rows: Tensor,  # (T, D)
        head: tuple[Tensor, Tensor | None],
        tokens: ScoredTokens,
        chosen_sequences: Tensor,  # (2B,) bool
    ) -> dict[str, Tensor]:
        """Sums and counts of TRL's metrics of tokens."""
        rows, weight, bias = autocast_operands(rows.detach(), *head)
        values = token_fields(rows, (weight, bias), tokens.labels, _FIELDS, self.loss.head_options)
        segment_ids, _ = segment_positions(tokens.cu_seqlens, len(rows))
        chosen = chosen_sequences.to(rows.device)[segment_ids]
        return {
            "entropy": _sum_and_count(values["entropy"], torch.ones_like(chosen)),
            "mean_token_accuracy": _sum_and_count(values["is_top1"], chosen),
            "logits/chosen": _sum_and_count(values["mean_logits"], chosen),
            "logits/rejected": _sum_and_count(values["mean_logits"], ~chosen),
        }

    def _add(self, sums: dict[str, Tensor], attention_mask: Tensor) -> None:
        counted = attention_mask if self._mode == "train" else attention_mask[:0]
        self._num_tokens = self._num_tokens + counted.sum()
        totals = self._sums[self._mode]
        for name, value in sums.items():
            totals[name] = totals[name] + value if name in totals else value


def _scored(inputs: Inputs, hidden: Tensor) -> ScoredTokens:
    """The tokens of the responses, for hidden states (2B, L, D)."""
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, ops.IGNORE_INDEX)
    return ScoredTokens.padded(labels, hidden.device, shift=True)


def _group_by_group(inputs: Inputs) -> Inputs:
    """Reorder the sequences of a batch so that each rejected one follows its chosen one."""
    names = [name for name, value in inputs.items() if len(value) == len(inputs["input_ids"])]
    moved = {n: torch.stack(inputs[n].chunk(2), 1).flatten(0, 1) for n in names}
    return inputs | moved


def _sum_and_count(values: Tensor, counted: Tensor) -> Tensor:
    """Sum of the values where `counted` is true, and their number, (2,) float64."""
    return torch.stack([(values * counted).double().sum(), counted.double().sum()])
