"""Any objective on a causal language model as a trainer wraps it: a model in, a scalar loss out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpref import ops
from fastpref.dynamics.pair_calibration import PairCalibration
from fastpref.dynamics.reward_calibration import RewardCalibration
from fastpref.fused import validation
from fastpref.fused.loss import FusedPreferenceLoss
from fastpref.fused.model_head import ModelHead, base_of, evaluating, is_parallel
from fastpref.fused.scored_tokens import ScoredTokens
from fastpref.losses import Objective, TokenLevelLoss
from fastpref.ops import IGNORE_INDEX

_LOSS_ARGUMENTS = (
    "preference",
    "ref_logps",
    "ref_token_logps",
    "token_weights",
    "importance",
    "desirable",
    "reference_point",
    "cu_groups",
    "scores",
)
# Initializations of peft that change weights of the base, so that it is no reference.
_BASE_INITIALIZATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class ModelLoss:
    """The mean loss of an objective, computed in the place of the model's head.

        preference_loss = ModelLoss(model, "dpo", reference=ref_model)
        loss, metrics = preference_loss(model, input_ids=..., attention_mask=..., labels=...)
        loss.backward()

    model: a causal language model of transformers; peft and the wrappers of distributed training
        may be around it already. With `head`, any module.
    objective: an objective, such as `losses.build("simpo", beta=2.5)`, or the name of one.
    reference: a second model; "adapter" for the model of peft with its adapters disabled; None
        where the objective has no reference, or its log-probs are passed to the call. The reference
        is called in evaluation mode and without gradient.
    calibration, impl, ignore_index, accumulation_steps: as in `FusedPreferenceLoss`.
    head: the linear layer that computes the logits, of models that are not of transformers. The
        model is called with all inputs of the call, and returns the logits (S, L, V), alone or
        first.

    The head's weight, bias, scale and cap are those of the model. Log-probs of the fused head are
    compared with those of the model's logits on eight tokens: here, or at the first call where the
    weights are sharded. The call runs the forward pass of the wrapper, so its hooks gather weights
    and reduce gradients as for a loss of the logits. `loss_module` is the `FusedPreferenceLoss`,
    whose `state_dict` has the averages of a calibration and of `bco`.

    Raises ValueError, naming what is not supported: heads that are not a plain linear layer, such
    as those with an adapter, quantized or tensor-parallel ones; logits other than
    `cap(scale * (W h + b))`; DataParallel; prompt learning.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective | str,
        reference: nn.Module | str | None = None,
        calibration: RewardCalibration | PairCalibration | None = None,
        impl: str = "auto",
        *,
        ignore_index: int = IGNORE_INDEX,
        accumulation_steps: int = 1,
        head: nn.Module | None = None,
    ) -> None:
        self.head = ModelHead(model, head)
        self.head.check_now(model)
        self.loss_module = FusedPreferenceLoss(
            objective, calibration, impl, ignore_index=ignore_index,
            accumulation_steps=accumulation_steps, **self.head.options,
        )  # fmt: skip
        self.objective = self.loss_module.loss
        self.reference = reference
        self._is_warned = False
        self._peft_model: Any = None
        self._reference_head = self.head
        if reference == "adapter":
            self._peft_model = _peft_model(model)
        elif isinstance(reference, nn.Module):
            self._reference_head = ModelHead(reference, name="reference")
            if self._reference_head.module is self.head.module:
                raise ValueError(
                    'reference: has the layers of the model itself; use reference="adapter" for a '
                    "model of peft, or a copy"
                )
            self._reference_head.check_now(reference)
        elif reference is not None:
            raise ValueError(f'reference: expected a model or "adapter", got {reference!r}')

    def __call__(
        self,
        model: nn.Module,
        *,
        labels: Tensor,  # (S, L)
        attention_mask: Tensor | None = None,  # (S, L)
        **inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss (), and metrics of the batch: detached tensors () by the names trainers log.

        model: the model of the constructor, in the wrappers that it has now.
        labels: the token at each position, as in Hugging Face models, -100 where it is not scored.
            They are not passed to the model; on the CPU, they keep a GPU busy.
        inputs: `input_ids` (S, L) and further inputs of the model, and the arguments of the
            objective's kind: `preference`, `token_weights`, `importance`, `desirable`,
            `reference_point`, `cu_groups`, `scores`, or `ref_logps` and `ref_token_logps` in place
            of a reference. See `FusedPreferenceLoss`, for the metrics, too.

        The auxiliary loss of a mixture of experts, which the model computes where its config has
        `output_router_logits`, is added with the factor of the config.

        Raises ValueError as `FusedPreferenceLoss` does, and for inputs that the model ignores.
        """
        given = {name: inputs.pop(name) for name in _LOSS_ARGUMENTS if name in inputs}
        self.head.check_inputs(inputs)
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        self.head.prepare(model, inputs)
        given |= self._reference_arguments(model, inputs, labels, given)
        metrics: dict[str, Tensor] = {}

        def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            self.loss_module.to(hidden.device).head_options.update(self.head.options)
            loss, of_batch = self.loss_module(
                hidden, weight, labels, attention_mask=attention_mask, bias=bias, shift=True,
                **given,
            )  # fmt: skip
            metrics.update(of_batch)
            return cast(Tensor, loss)

        self.loss_module.train(model.training)
        loss, output = self.head.run(model, compute, inputs)
        if loss.requires_grad and not self._is_warned:
            self._is_warned = True
            warn_of_lone_ranks(model)
        auxiliary = getattr(output, "aux_loss", None) if self.head.of_transformers else None
        if auxiliary is not None:
            metrics["aux_loss"] = auxiliary.detach()
            loss = loss + self.head.router_factor() * auxiliary.to(loss.device)
        return loss, metrics

    def _reference_arguments(
        self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, given: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Log-probs of the reference, or what a divergence from it is computed of."""
        passed = [name for name in ("ref_logps", "ref_token_logps") if given.get(name) is not None]
        if not self.objective.needs_reference or self.reference is None:
            return {}
        if passed:
            raise ValueError(f"{passed[0]}: passed together with reference=; leave one of them out")
        arguments: dict[str, Tensor] = {}

        def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            logps = self._logps(hidden, weight, bias, labels, inputs.get("attention_mask"))
            arguments.update(logps)
            return hidden.new_zeros(())

        with torch.no_grad(), self._reference_model(model) as reference:
            self._reference_head.run(reference, compute, inputs)
        return arguments

    @contextmanager
    def _reference_model(self, model: nn.Module) -> Iterator[nn.Module]:
        """Context manager of the model that computes the reference's log-probs."""
        if isinstance(self.reference, nn.Module):
            # Trainers put models that they know into training mode, with those inside of them.
            with evaluating(self.reference):
                yield self.reference
            return
        with evaluating(model), without_adapters(self._peft_model):
            yield model

    def _logps(
        self,
        hidden: Tensor,  # (S, L, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        labels: Tensor,  # (S, L)
        attention_mask: Tensor | None,
    ) -> dict[str, Tensor]:
        """Arguments of the loss, computed where the reference calls its head."""
        options = {**self._reference_head.options, "impl": self.loss_module.head_options["impl"]}
        if "kl" in validation.token_columns(self.objective):
            return self._head_copy(hidden, weight, bias)
        validation.check_shapes(self.objective, hidden, labels, None, attention_mask)
        tokens = ScoredTokens.padded(
            labels, hidden.device, attention_mask=attention_mask, shift=True,
            ignore_index=self.loss_module.ignore_index,
        )  # fmt: skip
        logps = tokens.token_logps(tokens.rows(hidden), weight, bias, **options)
        if not isinstance(self.objective, TokenLevelLoss):
            return {"ref_logps": ops.segment_sum(logps, tokens.cu_seqlens)}
        assert tokens.positions is not None
        values = logps.new_zeros(labels.numel()).index_copy(0, tokens.positions, logps)
        # Values stand at the positions of their labels, one after that of the hidden state.
        return {"ref_token_logps": values.roll(1).view(labels.shape)}

    def _head_copy(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """The reference's hidden states and head, for a divergence of the distributions."""
        if self._reference_head.options != self.head.options:
            raise ValueError(
                f"reference: its logits have another scale or cap than those of the model, and "
                f"{self.objective.name} needs a divergence; use a reference of the same kind"
            )
        # After the forward pass of a sharded reference, its weight is gone.
        shards = dist.is_available() and dist.is_initialized()
        arguments = {"ref_hidden": hidden, "ref_weight": weight.clone() if shards else weight}
        return arguments if bias is None else arguments | {"ref_bias": bias.clone()}


def _peft_model(model: nn.Module) -> Any:
    """The model of peft inside of the wrappers, whose adapters can be disabled."""
    base = base_of(model)
    inner: Any = next((m for m in model.modules() if hasattr(m, "disable_adapter")), None)
    if inner is None:
        raise ValueError(
            f'reference: "adapter" needs a model of peft, got {type(base).__name__}; pass a '
            "reference model"
        )
    for config in inner.peft_config.values():
        initialization = str(getattr(config, "init_lora_weights", "")).lower()
        if initialization.startswith(_BASE_INITIALIZATIONS):
            raise ValueError(
                f'reference: "adapter" is no reference, because init_lora_weights='
                f"{initialization!r} changed the weights of the base; pass a reference model"
            )
    return inner


def warn_of_lone_ranks(model: nn.Module) -> None:
    """Warn of several ranks whose gradients nothing seems to average."""
    met = dist.is_available() and dist.is_initialized()
    ranks = dist.get_world_size() if met else int(os.environ.get("WORLD_SIZE", 1))
    if ranks < 2 or is_parallel(model):
        return
    reason = "no wrapper averages their gradients" if met else "they have no process group"
    warnings.warn(
        f"model: {ranks} ranks, but {reason}, and each may train a {type(model).__name__} of its "
        "own; pass the model in DistributedDataParallel, sharded by FSDP2, or as the trainer "
        "wraps it",
        stacklevel=3,
    )


@contextmanager
def without_adapters(peft_model: Any) -> Iterator[None]:
    """Context manager in which the adapters are disabled, and train afterwards as before.

    Raises ValueError if weights of the base train, too.
    """
    # peft changes which parameters require a gradient; FSDP2 may gather them in between.
    flags = [(parameter, parameter.requires_grad) for parameter in peft_model.parameters()]
    try:
        with peft_model.disable_adapter():
            _check_frozen(peft_model, flags)
            _restore(flags)
            yield
    finally:
        _restore(flags)


def _check_frozen(peft_model: Any, flags: list[tuple[nn.Parameter, bool]]) -> None:
    """Raise ValueError for a parameter that trains, and still does without the adapters."""
    names = (name for name, _ in peft_model.named_parameters())
    for name, (parameter, trains) in zip(names, flags, strict=True):
        if trains and parameter.requires_grad:
            raise ValueError(
                f'reference: "adapter" is no reference, because {name} belongs to the base and '
                "trains, too; freeze it, or pass a reference model"
            )


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, requires_grad in flags:
        if parameter.requires_grad != requires_grad:
            parameter.requires_grad_(requires_grad)
