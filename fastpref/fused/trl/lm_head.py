"""The head of a model in TRL's trainers: log-probs and metrics of tokens instead of logits.

TRL calls `model(..., labels=labels, fused_lm_head=True)` and reads values per token from the
output. `install` replaces the forward pass of one model; calls without `fused_lm_head` go on to the
forward pass that the model had. The values are computed where the model calls its head, so wrappers
of distributed training see the head used within the forward pass.
"""

from __future__ import annotations

import inspect
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastpref import ops
from fastpref.fused.head_call import through_head
from fastpref.fused.model_head import ModelHead
from fastpref.fused.scored_tokens import autocast_operands, fused_operands

# Values per token besides the log-probs, by their names in TRL's output.
FIELDS = ("entropy", "is_top1", "mean_logits", "log_sum_sq_probs")
# Mean logit of every position, scored or not, which CPOTrainer and ORPOTrainer log.
ALL_POSITIONS = "mean_logits_of_all_positions"
_ROWS = 256  # whose logits are held at a time, for the mean of capped ones


class TokenHead:
    """The head of one model: computes TRL's output from the hidden states.

    model: causal language model of transformers, without wrappers.
    fields: names of the values that the output has besides `log_probs`; the others are None.
    zeros: names of fields that are zeros, for a trainer that reads them and does not log them.
    impl: as in `ops.linear_logps`.

    Raises ValueError if the head is no plain linear layer, and, where the model can run on its own
    already, if log-probs of the head are not those of the model's logits.
    """

    def __init__(
        self,
        model: nn.Module,
        fields: tuple[str, ...] = (),
        zeros: tuple[str, ...] = (),
        impl: str = "auto",
    ) -> None:
        self.fields, self.zeros = fields, zeros
        config: Any = model.config
        base: Any = model
        # The head of an encoder and decoder is checked in the first step, with inputs of both.
        head = base.get_output_embeddings() if config.is_encoder_decoder else None
        self.head = ModelHead(model, head=head)
        self.head.check_now(model)
        self.impl = impl
        self.forward_before = model.forward
        self._router_factor = getattr(config.get_text_config(), "router_aux_loss_coef", 0.0)

    @property
    def options(self) -> dict[str, Any]:
        """Scale and cap of the logits, and the implementation of the ops."""
        return {**self.head.options, "impl": self.impl}

    def forward(
        self,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ) -> Any:
        """The model's forward pass, or, with `fused_lm_head`, values per token."""
        if not fused_lm_head:
            rest = {
                "labels": labels,
                "shift_labels": shift_labels,
                "num_items_in_batch": num_items_in_batch,
            }
            rest = {name: value for name, value in rest.items() if value is not None}
            return self.forward_before(*args, **inputs, **rest)
        values: dict[str, Tensor] = {}

        def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            values.update(self._values(hidden, (weight, bias), labels, shift_labels))
            return values["log_probs"]

        inputs["use_cache"] = False
        log_probs, output = through_head(
            partial(self.forward_before, *args), self.head.module, compute, inputs
        )
        values["log_probs"] = log_probs
        count = values["label_mask"].sum().clamp_min(1)
        divisor = count if num_items_in_batch is None else num_items_in_batch
        aux_loss = _aux_loss(output, inputs, self.head.kind)
        loss = -log_probs.sum() / divisor
        if aux_loss is not None:
            loss = loss + self._router_factor * aux_loss
        return _output_class()(loss=loss, aux_loss=aux_loss, **values)

    def _values(
        self,
        hidden: Tensor,  # (S, L, D)
        head: tuple[Tensor, Tensor | None],
        labels: Tensor | None,  # (S, L) aligned with the tokens
        shift_labels: Tensor | None,  # (S, L) aligned with the hidden states
    ) -> dict[str, Tensor]:
        """Values (S, L - 1), or (S, L) of shifted labels: 0 where the label is -100."""
        if shift_labels is None:
            if labels is None:
                raise ValueError("labels: fused_lm_head needs them; got None")
            states, targets = hidden[:, :-1], labels[:, 1:]
        else:
            states, targets = hidden, shift_labels
        targets = targets.to(hidden.device)
        mask = targets != ops.IGNORE_INDEX
        rows, weight, bias = fused_operands(states[mask], *head)
        scored = targets[mask]
        options = self.options
        logps = ops.linear_logps(rows, weight, scored, bias=bias, **options)
        rows, weight, bias = autocast_operands(rows, weight, bias)
        fields = token_fields(rows, (weight, bias), scored, self.fields, options)
        values = {
            name: column.new_zeros(mask.shape).masked_scatter(mask, column)
            for name, column in {"log_probs": logps, **fields}.items()
        }
        values["label_mask"] = mask
        for name in self.zeros:
            values[name] = torch.zeros_like(mask, dtype=None if name == "is_top1" else logps.dtype)
        if ALL_POSITIONS in self.fields:
            every, weight, bias = autocast_operands(hidden.detach().flatten(0, 1), *head)
            means = mean_logits(every, weight, bias, options)
            values["mean_logits"] = means.view(hidden.shape[:2])
        return values


def install(
    model: nn.Module,
    fields: tuple[str, ...] = (),
    zeros: tuple[str, ...] = (),
    impl: str = "auto",
) -> TokenHead:
    """Replace the forward pass of a model; a head that is in place already is kept.

    One of another trainer, which has other fields, is replaced.
    """
    installed = getattr(model.forward, "token_head", None)
    if isinstance(installed, TokenHead):
        if (installed.fields, installed.zeros, installed.impl) == (fields, zeros, impl):
            return installed
        model.forward = installed.forward_before
    token_head = TokenHead(model, fields, zeros, impl)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return token_head.forward(*args, **kwargs)

    # Trainers and `generate` read the names of the inputs from the signature.
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    forward.token_head = token_head  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)
    return token_head


@torch.no_grad()
def token_fields(
    rows: Tensor,  # (T, D)
    head: tuple[Tensor, Tensor | None],  # weight (V, D) and bias (V,)
    labels: Tensor,  # (T,)
    fields: tuple[str, ...],
    options: dict[str, Any],
) -> dict[str, Tensor]:
    """The named values (T,) of the tokens' distributions, without gradient.

    entropy: nats. is_top1: whether the label has the largest logit; a tie counts. mean_logits: mean
    over the vocabulary. log_sum_sq_probs: log of the sum of squared probabilities.
    """
    weight, bias = head
    values: dict[str, Tensor] = {}
    if "entropy" in fields or "is_top1" in fields:
        stats = ops.token_stats(rows, weight, labels, bias=bias, **options)
        values |= {"entropy": stats.entropy, "is_top1": stats.top1}
    if "mean_logits" in fields:
        values["mean_logits"] = mean_logits(rows, weight, bias, options)
    if "log_sum_sq_probs" in fields:
        values["log_sum_sq_probs"] = -ops.collision_entropy(
            rows, weight, labels, bias=bias, **options
        )
    return {name: value for name, value in values.items() if name in fields}


@torch.no_grad()
def mean_logits(
    rows: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    options: dict[str, Any],
) -> Tensor:  # (T,)
    """Mean logit of each token; of capped logits by slices of a few rows."""
    scale, softcap = options["logit_scale"], options["softcap"]
    if softcap is None:
        # The mean is linear in the hidden state.
        mean = (rows * weight.mean(0, dtype=torch.float32)).sum(1)
        if bias is not None:
            mean = mean + bias.mean(dtype=torch.float32)
        return scale * mean
    means = []
    for part in rows.split(_ROWS):
        logits = scale * nn.functional.linear(part, weight, bias).float()
        means.append((softcap * (logits / softcap).tanh()).mean(1))
    return torch.cat(means)


def _aux_loss(output: Any, inputs: dict[str, Any], kind: str) -> Tensor | None:
    """Auxiliary loss of a mixture of experts, where the call asks for it."""
    aux_loss: Tensor | None = getattr(output, "aux_loss", None)
    if aux_loss is None and inputs.get("output_router_logits"):
        raise ValueError(
            f"output_router_logits: {kind} returns no auxiliary loss of its routers; "
            "set router_aux_loss_coef of the trainer's config to 0"
        )
    return aux_loss


def _output_class() -> Any:
    try:
        from trl.trainer.utils import FusedCausalLMOutput
    except ImportError as error:
        raise ImportError("trl: version 1.16 or newer is needed; pip install -U trl") from error
    return FusedCausalLMOutput
