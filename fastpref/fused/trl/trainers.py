"""The part that the mixins for TRL's trainers share: the heads of policy and reference."""

from __future__ import annotations

from typing import Any

from fastpref.fused.trl.lm_head import FIELDS, TokenHead, install

# Metrics that TRL's trainers log and that need more of the head than log-probs.
TOKEN_METRICS = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")


class FusedHeadMixin:
    """Mixin that precedes a trainer of TRL: log-probs come from fastpref's head.

    impl: as in `ops.linear_logps`.
    token_metrics: log `entropy`, `mean_token_accuracy` and `logits/*` as TRL does, at the cost of
        one more pass over the head (without gradient).

    Loss, metrics, data, reference, adapters and the loop stay TRL's. Raises ValueError at
    construction for a head that is no plain linear layer, for logits that are not
    `cap(scale (W h + b))`, and for `torch_compile`, DeepSpeed, FSDP 1 and other parallelism than
    DDP and FSDP2.
    """

    args: Any
    model: Any
    ref_model: Any
    accelerator: Any

    _logged_fields: tuple[str, ...] = ()  # of the policy's output, for metrics

    def __init__(
        self, *args: Any, impl: str = "auto", token_metrics: bool = True, **kwargs: Any
    ) -> None:
        self._impl = impl
        self._token_metrics = token_metrics
        super().__init__(*args, **kwargs)
        # Here so that an unsupported setup is refused before the first step.
        self._check_setup()
        _ = self.policy_head

    @property
    def policy_head(self) -> TokenHead:
        """The head of the policy; that of the reference is put in place with it."""
        logged = self._logged_fields
        fields = (logged if self._token_metrics else ()) + self._needed_fields()
        zeros = tuple(name for name in logged if name in FIELDS and name not in fields)
        policy = install(self._causal_lm(self.model), fields, zeros, self._impl)
        if getattr(self, "ref_model", None) is not None:
            reference = install(self._causal_lm(self.ref_model), impl=self._impl)
            if not reference.head.is_checked:
                # A sharded or quantized reference cannot run here, but the policy is checked.
                if reference.head.kind != policy.head.kind:
                    raise ValueError(
                        f"ref_model: {reference.head.kind} is sharded or quantized, so its head "
                        f"can only be that of the policy, {policy.head.kind}; use the same class"
                    )
                reference.head.options = dict(policy.head.options)
                reference.head.is_checked = policy.head.is_checked
        return policy

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss on log-probs of fastpref's head."""
        if "input_ids" in inputs:
            self._check_head(model, **{n: inputs[n] for n in ("input_ids", "attention_mask")})
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """Summed log-probs of the reference, as TRL's trainer returns them."""
        _ = self.policy_head
        return super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's metrics without those that are turned off."""
        if not self._token_metrics:
            for metrics in self._logged_metrics().values():
                for name in TOKEN_METRICS:
                    metrics.pop(name, None)
                    metrics.pop(f"eval_{name}", None)
        super().log(logs, start_time)  # type: ignore[misc]

    def _check_setup(self) -> None:
        """Raise ValueError for a way to run the model in which the head has not been tried."""
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)
        unsupported = {
            "args.torch_compile": getattr(self.args, "torch_compile", False),
            "DeepSpeed": getattr(self, "is_deepspeed_enabled", False),
            "FSDP 1": getattr(self, "is_fsdp_enabled", False)
            and getattr(fsdp, "fsdp_version", 1) != 2,
            "parallelism_config": self.accelerator.parallelism_config is not None,
        }
        for name, present in unsupported.items():
            if present:
                raise ValueError(
                    f"{name}: not supported by {type(self).__name__}; use one process, DDP or FSDP2"
                )

    def _logged_metrics(self) -> dict[str, dict[str, Any]]:
        """Metrics that TRL has collected for the next line of the log, by train and eval."""
        metrics: dict[str, dict[str, Any]] = getattr(self, "_metrics", {})
        return metrics

    def _check_head(self, model: Any, **inputs: Any) -> None:
        """Check the wrapper, and the head where it could not be checked at construction."""
        self.policy_head.head.prepare(model, inputs)

    def _needed_fields(self) -> tuple[str, ...]:
        """Fields of the policy's output that the loss needs."""
        return ()

    def _causal_lm(self, model: Any) -> Any:
        """The Hugging Face model inside the wrappers of accelerate and peft."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if hasattr(model, "peft_config") else model
