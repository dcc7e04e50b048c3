"""Any pairwise objective in TRL's DPO trainer, without its logits.

    class FusedDPOTrainer(FusedDPOMixin, DPOTrainer): ...

    trainer = FusedDPOTrainer(model, args=DPOConfig(...), objective=losses.build("simpo"), ...)

The mixin replaces two public methods, `compute_loss` and `compute_ref_log_probs`, and adds to the
lines of `log`; data, reference model, adapters and the loop stay TRL's. The model is called as it
is, through whatever wraps it, but asked for the logits of one position only; the decoder's last
hidden states are caught on their way to the head by a forward hook.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastpref import losses, ops
from fastpref.calibration import RewardCalibration
from fastpref.fused.loss import FusedPreferenceLoss
from fastpref.fused.tokens import ScoredTokens, autocast_operands
from fastpref.losses import PairwiseLoss
from fastpref.model import Policy

# Options of DPOConfig that the objective takes over, or that are not supported, and their defaults.
_TAKEN_OVER = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "discopop_tau": 0.05,
    "use_weighting": False,
    "ld_alpha": None,
}
_UNSUPPORTED = {"padding_free": False, "torch_compile": False}


class FusedDPOMixin:
    """To be put before `trl.DPOTrainer` among the bases of a trainer.

    objective: a pairwise objective or the name of one; DPO with the config's beta by default.
    calibration, impl: as in `FusedPreferenceLoss`.
    token_metrics: log `entropy`, `mean_token_accuracy` and `logits/*` as TRL does, at the cost of
        one more pass over the head (without gradient); `logits/*` are left out for a model with a
        softcap.

    `rewards/*` are the objective's own. Metrics of pairs and of tokens are means over all of them
    since the last line of the log, where TRL averages the means of batches. Nothing is read from
    the device between two lines, except the number of scored tokens.

    Raises ValueError, naming what it is, for a config, model or set-up that is not supported: the
    options of DPOConfig that choose or change its loss, `padding_free`, `torch_compile`,
    `compute_metrics`, vision-language models, prompt-learning adapters, adapters on the head,
    routers with an auxiliary loss, FSDP, DeepSpeed and other parallelism than DDP.
    """

    args: Any
    model: Any
    ref_model: Any
    accelerator: Any
    processing_class: Any

    def __init__(
        self,
        *args: Any,
        objective: PairwiseLoss | str | None = None,
        calibration: RewardCalibration | None = None,
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
        super().__init__(*args, **kwargs)
        _ = self.fused_loss  # refuse now rather than at the first step

    @cached_property
    def fused_loss(self) -> FusedPreferenceLoss:
        """The loss module, made at first use, after everything unsupported has been refused."""
        objective = self._objective or losses.build("dpo", beta=self.args.beta)
        self._check_setup(objective)
        was_training = self.model.training
        policy = Policy(self.model, self._head(self.model).weight.dtype)
        policy.check_head()
        self.model.train(was_training)
        return FusedPreferenceLoss(
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
        """Mean loss of the batch's pairs."""
        if return_outputs:
            raise ValueError(
                "return_outputs: there are no logits to return; call evaluate() without "
                "compute_metrics, or use DPOTrainer alone"
            )
        reference = None
        if self.fused_loss.loss.needs_reference:
            if self.args.precompute_ref_log_probs:
                pair = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
            else:
                pair = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            reference = torch.cat(pair)
        rows, tokens = self._scored(model, inputs)
        head = self._head(model)
        with self.accelerator.autocast():
            loss, means = self.fused_loss(
                rows, head.weight, tokens.labels, tokens.cu_seqlens, bias=head.bias,
                ref_logps=reference,
            )  # fmt: skip
            pairs = len(tokens.lengths) // 2
            sums = {
                name: torch.stack([pairs * mean, torch.full_like(mean, pairs)])
                for name, mean in means.items()
            }
            if self._token_metrics:
                sums |= self._token_sums(rows, head, tokens)
        self._add(sums, inputs["attention_mask"])
        return loss

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Summed log-probs (B,) of the chosen and of the rejected responses, by the same op."""
        with torch.no_grad(), self._as_reference(), self.accelerator.autocast():
            rows, tokens = self._scored(model, inputs)
            head = self._head(model)
            logps = tokens.logps(rows, head.weight, head.bias, **self.fused_loss.head_options)
        chosen, rejected = logps.chunk(2)
        return chosen, rejected

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last line, over all ranks, to the line."""
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

    def _scored(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ScoredTokens]:
        """Hidden states (T, D) that predict the responses' tokens, and those tokens."""
        hidden = self._hidden(model, inputs).to(self._head(model).weight.device)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, ops.IGNORE_INDEX)
        tokens = ScoredTokens.padded(labels, hidden.device, shift=True)
        return tokens.rows(hidden), tokens

    def _hidden(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Last hidden states (2B, L, D), caught between decoder and head."""
        caught: list[Tensor] = []
        handle = self._causal_lm(model).base_model.register_forward_hook(
            lambda module, arguments, output: caught.append(output.last_hidden_state)
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
        return caught[0]

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """The adapters as TRL wants them for the reference: its copy active, or none."""
        model = self.accelerator.unwrap_model(self.model)
        if self.ref_model is not None or not hasattr(model, "peft_config"):
            yield
            return
        from trl.trainer.utils import use_adapter

        with use_adapter(model, "ref" if "ref" in model.peft_config else None):
            yield

    @torch.no_grad()
    def _token_sums(self, rows: Tensor, head: Any, tokens: ScoredTokens) -> dict[str, Tensor]:
        """Sum and count of TRL's metrics of tokens."""
        rows, weight, bias = autocast_operands(rows, head.weight, head.bias)
        options = self.fused_loss.head_options
        stats = ops.token_stats(rows, weight, tokens.labels, bias=bias, **options)
        index = torch.arange(len(rows), device=rows.device)
        chosen = index < tokens.cu_seqlens[len(tokens.lengths) // 2]
        sums = {
            "entropy": _sum_and_count(stats.entropy, torch.ones_like(chosen)),
            "mean_token_accuracy": _sum_and_count(stats.top1, chosen),
        }
        if options["softcap"] is None:  # the mean logit is linear in the hidden state
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
        kept = self._sums[mode]
        for name, value in sums.items():
            kept[name] = kept[name] + value if name in kept else value

    def _causal_lm(self, model: Any) -> Any:
        """The Hugging Face model inside the wrappers of accelerate and peft."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if hasattr(model, "peft_config") else model

    def _head(self, model: Any) -> Any:
        return self._causal_lm(model).get_output_embeddings()

    def _check_setup(self, objective: Any) -> None:
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
        obstacles = {
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
        for name, found in obstacles.items():
            if found:
                raise ValueError(f"{name}: not supported by {type(self).__name__}; use DPOTrainer")


def _sum_and_count(values: Tensor, counted: Tensor) -> Tensor:
    """Sum and number, (2,) float64, of the values that count."""
    return torch.stack([(values * counted).double().sum(), counted.double().sum()])
