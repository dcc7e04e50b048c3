"""Any objective in TRL's DPO trainer, without its logits.

    class FusedDPOTrainer(FusedDPOMixin, DPOTrainer): ...

    trainer = FusedDPOTrainer(model, args=DPOConfig(...), objective=losses.build("simpo"), ...)

The mixin replaces two public methods, `compute_loss` and `compute_ref_log_probs`, and extends
three: `log` adds metrics, `save_model` and `train` save and restore the averages of a calibration
or of `bco`. Data, reference model, adapters and the loop stay TRL's. The model is called through
its wrappers, with `logits_to_keep=1`; a forward hook on the decoder captures the last hidden states
before the head.

TRL's batches consist of pairs. For an objective on single responses a pair is split into a
desirable and an undesirable one; for one on groups it is a group of two with the scores 1 and 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from fastpref import losses, ops
from fastpref.dynamics.pair_calibration import PairCalibration
from fastpref.dynamics.reward_calibration import RewardCalibration
from fastpref.fused.loss import FusedPreferenceLoss
from fastpref.fused.mismatched import Mismatched
from fastpref.fused.scored_tokens import ScoredTokens, autocast_operands
from fastpref.fused.validation import check_biases, needs_point, token_columns
from fastpref.logps import segment_positions
from fastpref.losses import GroupwiseLoss, Objective, PointwiseLoss, TokenLevelLoss
from fastpref.losses.pointwise import pooled_mean, sum_and_count
from fastpref.model.policy import Policy
from fastpref.model.token_importance import token_importance

# Options of DPOConfig that the objective replaces, and their defaults.
_TAKEN_OVER = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "discopop_tau": 0.05,
    "use_weighting": False,
    "ld_alpha": None,
}
_AVERAGES = "fused_loss.safetensors"  # file name in a checkpoint
_UNSUPPORTED = {"padding_free": False, "torch_compile": False}


class _LossOfTRL(FusedPreferenceLoss):
    """The loss module with the accuracy of TRL, which counts equal rewards as wrong."""

    def metrics(self, output: losses.Output, policy: losses.Logps) -> dict[str, Tensor]:
        metrics = super().metrics(output, policy)
        if isinstance(output, losses.LossOutput):
            above = output.chosen_rewards > output.rejected_rewards
            metrics["rewards/accuracies"] = above.double().mean()
        return metrics


class FusedDPOMixin:
    """Mixin that precedes `trl.DPOTrainer` among the bases of a trainer.

    objective: an objective or the name of one; DPO with the config's beta by default.
    calibration, impl: as in `FusedPreferenceLoss`.
    token_metrics: log `entropy`, `mean_token_accuracy` and `logits/*` as TRL does, at the cost of
        one more pass over the head (without gradient); `logits/*` are left out for a model with a
        softcap.

    KTO's reference point, the mean log-ratio of mismatched responses (`fused.mismatched`) on all
    ranks, costs a further forward pass of policy and reference, without gradient; the importance of
    tokens, for `ti_dpo`, one forward and backward pass of the policy to its embeddings.

    `rewards/*` are the objective's own. Metrics of pairs and of tokens are means over all of them
    since the last line of the log, where TRL averages the means of batches. Between two lines only
    the number of scored tokens and, for KTO, the token ids are read from the device.

    Raises ValueError, naming the option, for a config, model or setup that is not supported: the
    options of DPOConfig that choose or change its loss, `padding_free`, `torch_compile`,
    `compute_metrics`, vision-language models, prompt-learning adapters, adapters on the head,
    routers with an auxiliary loss, FSDP, DeepSpeed and other parallelism than DDP; and for
    `precompute_ref_log_probs` where the objective needs more than sums of the pairs' log-probs.
    """

    args: Any
    model: Any
    ref_model: Any
    accelerator: Any
    processing_class: Any

    def __init__(
        self,
        *args: Any,
        objective: Objective | str | None = None,
        calibration: RewardCalibration | PairCalibration | None = None,
        impl: str = "auto",
        token_metrics: bool = True,
        **kwargs: Any,
    ) -> None:
        self._objective = losses.build(objective) if isinstance(objective, str) else objective
        self._calibration = calibration
        self._impl = impl
        self._token_metrics = token_metrics
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self._num_tokens: Tensor | int = 0
        self._mismatched: dict[str, Mismatched] = {}
        super().__init__(*args, **kwargs)
        # Constructed here so that an unsupported setup is refused before the first step.
        _ = self.fused_loss

    @cached_property
    def fused_loss(self) -> FusedPreferenceLoss:
        """The loss module, constructed at first use, after the checks of the setup."""
        objective = self._objective or losses.build("dpo", beta=self.args.beta)
        self._check_setup(objective)
        was_training = self.model.training
        policy = Policy(self.model, self._head(self.model).weight.dtype)
        policy.check_head()
        self.model.train(was_training)
        check_biases(objective, self._calibration is not None, self._head(self.model).bias, None)
        return _LossOfTRL(
            objective, self._calibration, self._impl, policy.logit_scale, policy.softcap,
            accumulation_steps=self.args.gradient_accumulation_steps,
        )  # fmt: skip

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Mean loss of the batch."""
        if return_outputs:
            raise ValueError(
                "return_outputs: there are no logits to return; call evaluate() without "
                "compute_metrics, or use DPOTrainer alone"
            )
        if isinstance(self.fused_loss.loss, GroupwiseLoss):
            inputs = _group_by_group(inputs)
        count = len(inputs["input_ids"])
        chosen = self._chosen(count, inputs["input_ids"].device)
        given = self._labels(chosen) | self._reference(inputs)
        if needs_point(self.fused_loss.loss):
            given["reference_point"] = self._reference_point(model, inputs)
        if "importance" in token_columns(self.fused_loss.loss):
            given["importance"] = self._importance(model, inputs)
        rows, tokens = self._scored(model, inputs)
        head = self._head(model)
        with self.accelerator.autocast():
            if "importance" in given:
                given["importance"] = tokens.column(given["importance"])
            loss, means = self.fused_loss(
                rows, head.weight, tokens.labels, tokens.cu_seqlens, bias=head.bias, **given
            )
            sums = {
                name: torch.stack([mean, torch.ones_like(mean)]) * (count // 2)
                for name, mean in means.items()
            }
            if self._token_metrics:
                sums |= self._token_sums(rows, head, tokens, chosen)
        self._add(sums, inputs["attention_mask"])
        return loss

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Summed log-probs (B,) of the chosen and of the rejected responses, by the same op."""
        with self._as_reference():
            chosen, rejected = self._sequence_logps(model, inputs)[0].chunk(2)
        return chosen, rejected

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last line, reduced over all ranks, to the logs."""
        mode = "train" if self.model.training else "eval"
        sums, self._sums[mode] = self._sums[mode], {}
        if sums:
            table = torch.stack([*sums.values()])
            totals = self.accelerator.reduce(table, "sum").tolist()
            seen = {name: total / max(n, 1) for name, (total, n) in zip(sums, totals, strict=True)}
            seen["num_tokens"] = int(self.accelerator.reduce(self._num_tokens, "sum"))
            prefix = "eval_" if mode == "eval" else ""
            logs |= {prefix + name: value for name, value in seen.items()}
        super().log(logs, start_time)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and the averages of the loss, if it has any, in the same folder."""
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        averages = self.fused_loss.get_extra_state()
        if averages and self.args.should_save:
            save_file(averages, Path(output_dir or self.args.output_dir) / _AVERAGES)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; the averages of the loss are restored from the checkpoint."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder and (path := Path(folder) / _AVERAGES).exists():
            self.fused_loss.set_extra_state(load_file(path))
        return super().train(resume_from_checkpoint, **kwargs)  # type: ignore[misc]

    def _chosen(self, count: int, device: torch.device) -> Tensor:
        """Whether a sequence is a chosen one, (2B,) bool."""
        index = torch.arange(count, device=device)
        grouped = isinstance(self.fused_loss.loss, GroupwiseLoss)
        return index % 2 == 0 if grouped else index < count // 2

    def _labels(self, chosen: Tensor) -> dict[str, Tensor]:
        """Labels of single responses, or scores and offsets of groups."""
        if isinstance(self.fused_loss.loss, PointwiseLoss):
            return {"desirable": chosen}
        if isinstance(self.fused_loss.loss, GroupwiseLoss):
            offsets = torch.arange(0, len(chosen) + 1, 2, device=chosen.device)
            return {"scores": chosen.float(), "cu_groups": offsets}
        return {}

    def _reference(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The reference's summed log-probs, if TRL has them, or its hidden states and head."""
        if not self.fused_loss.loss.needs_reference:
            return {}
        if self.args.precompute_ref_log_probs:
            pair = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
            grouped = isinstance(self.fused_loss.loss, GroupwiseLoss)
            return {"ref_logps": torch.stack(pair, 1).flatten() if grouped else torch.cat(pair)}
        model = self.ref_model or self.model
        with torch.no_grad(), self._as_reference(), self.accelerator.autocast():
            rows, _ = self._scored(model, inputs)
            head = self._head(model)
        arguments = {"ref_hidden": rows, "ref_weight": head.weight, "ref_bias": head.bias}
        return {name: value for name, value in arguments.items() if value is not None}

    def _reference_point(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """KTO's reference point: mean log-ratio () of mismatched responses, over all ranks."""
        mode = "train" if self.model.training else "eval"
        mismatched = self._mismatched.setdefault(mode, Mismatched(self.args.max_length))
        batch = mismatched.batch(inputs)
        sums = torch.zeros(2, dtype=torch.float64, device=inputs["input_ids"].device)
        if batch is not None:
            # Without DistributedDataParallel, since another rank may have no batch to compute.
            policy, lengths = self._sequence_logps(self.accelerator.unwrap_model(model), batch)
            reference = torch.cat(self.compute_ref_log_probs(self.ref_model or self.model, batch))
            sums = sum_and_count(policy - reference, lengths)
        sums = self.accelerator.reduce(sums, "sum")
        previous = mismatched.point.to(sums.device)
        mismatched.point = torch.where(sums[1] > 0, pooled_mean(sums), previous)
        return mismatched.point

    def _importance(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Importance of each token of the sequences, (2B, L)."""
        with self.accelerator.autocast():
            return token_importance(
                self._causal_lm(model), inputs["input_ids"], inputs["attention_mask"]
            )

    @torch.no_grad()
    def _sequence_logps(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Summed log-probs and lengths of the responses, each (2B,), without gradient."""
        with self.accelerator.autocast():
            rows, tokens = self._scored(model, inputs)
            head = self._head(model)
            logps = tokens.logps(rows, head.weight, head.bias, **self.fused_loss.head_options)
        return logps, tokens.lengths

    def _scored(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ScoredTokens]:
        """Hidden states (T, D) that predict the responses' tokens, and those tokens."""
        hidden = self._hidden(model, inputs).to(self._head(model).weight.device)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, ops.IGNORE_INDEX)
        tokens = ScoredTokens.padded(labels, hidden.device, shift=True)
        return tokens.rows(hidden), tokens

    def _hidden(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Last hidden states (2B, L, D), captured between decoder and head."""
        captured: list[Tensor] = []
        handle = self._causal_lm(model).base_model.register_forward_hook(
            lambda module, arguments, output: captured.append(output.last_hidden_state)
        )
        try:
            model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
                logits_to_keep=1,
            )
        finally:
            handle.remove()
        return captured[0]

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Context manager that activates TRL's reference copy of the adapters, or disables them."""
        model = self.accelerator.unwrap_model(self.model)
        if self.ref_model is not None or not hasattr(model, "peft_config"):
            yield
            return
        from trl.trainer.utils import use_adapter

        with use_adapter(model, "ref" if "ref" in model.peft_config else None):
            yield

    @torch.no_grad()
    def _token_sums(
        self, rows: Tensor, head: Any, tokens: ScoredTokens, chosen_sequences: Tensor
    ) -> dict[str, Tensor]:
        """Sums and counts of TRL's metrics of tokens."""
        rows, weight, bias = autocast_operands(rows, head.weight, head.bias)
        options = self.fused_loss.head_options
        stats = ops.token_stats(rows, weight, tokens.labels, bias=bias, **options)
        segment_ids, _ = segment_positions(tokens.cu_seqlens, len(rows))
        chosen = chosen_sequences.to(rows.device)[segment_ids]
        sums = {
            "entropy": _sum_and_count(stats.entropy, torch.ones_like(chosen)),
            "mean_token_accuracy": _sum_and_count(stats.top1, chosen),
        }
        if options["softcap"] is None:
            # Without a softcap the mean logit is linear in the hidden state.
            mean = (rows * weight.mean(0, dtype=torch.float32)).sum(1)
            if bias is not None:
                mean = mean + bias.mean(dtype=torch.float32)
            mean = options["logit_scale"] * mean
            sums["logits/chosen"] = _sum_and_count(mean, chosen)
            sums["logits/rejected"] = _sum_and_count(mean, ~chosen)
        return sums

    def _add(self, sums: dict[str, Tensor], attention_mask: Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        counted = attention_mask if mode == "train" else attention_mask[:0]
        self._num_tokens = self._num_tokens + counted.sum()
        totals = self._sums[mode]
        for name, value in sums.items():
            totals[name] = totals[name] + value if name in totals else value

    def _causal_lm(self, model: Any) -> Any:
        """The Hugging Face model inside the wrappers of accelerate and peft."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if hasattr(model, "peft_config") else model

    def _head(self, model: Any) -> Any:
        return self._causal_lm(model).get_output_embeddings()

    def _check_setup(self, objective: Objective) -> None:
        for name, default in _TAKEN_OVER.items():
            if getattr(self.args, name, default) != default:
                raise ValueError(
                    f"args.{name}: expected its default {default!r}, got "
                    f"{getattr(self.args, name)!r}; the objective decides, set it there"
                )
        if self.args.beta not in (0.1, getattr(objective, "beta", 0.1)):
            raise ValueError(
                f"args.beta: got {self.args.beta}, but the objective is {objective}; set it there"
            )
        for name, default in _UNSUPPORTED.items():
            if getattr(self.args, name, default) != default:
                raise ValueError(f"args.{name}: not supported; set it to {default}")
        beyond_sums = isinstance(objective, TokenLevelLoss) or needs_point(objective)
        if self.args.precompute_ref_log_probs and objective.needs_reference and beyond_sums:
            raise ValueError(
                f"args.precompute_ref_log_probs: TRL keeps sums of the pairs' log-probs, and "
                f"{objective.name} needs more of the reference; set it to False"
            )
        unsupported = {
            "compute_metrics": getattr(self, "compute_metrics", None) is not None,
            "processing_class (vision-language models)": not isinstance(
                self.processing_class, PreTrainedTokenizerBase
            ),
            "router_aux_loss_coef (auxiliary loss of a router)": getattr(
                self, "aux_loss_enabled", False
            ),
            "FSDP": getattr(self, "is_fsdp_enabled", False),
            "DeepSpeed": getattr(self, "is_deepspeed_enabled", False),
            "parallelism_config": self.accelerator.parallelism_config is not None,
            "prompt learning": any(
                adapter.is_prompt_learning
                for adapter in getattr(self.model, "peft_config", {}).values()
            ),
        }
        for name, present in unsupported.items():
            if present:
                raise ValueError(f"{name}: not supported by {type(self).__name__}; use DPOTrainer")


def _group_by_group(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reorder the sequences of a batch so that each rejected one follows its chosen one."""
    names = ("input_ids", "attention_mask", "completion_mask")
    moved = {n: torch.stack(inputs[n].chunk(2), 1).flatten(0, 1) for n in names}
    return inputs | moved


def _sum_and_count(values: Tensor, counted: Tensor) -> Tensor:
    """Sum of the values where `counted` is true, and their number, (2,) float64."""
    return torch.stack([(values * counted).double().sum(), counted.double().sum()])
