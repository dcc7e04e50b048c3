"""The head of a causal language model inside its wrappers, and the check of its logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastpref import ops
from fastpref.fused.head_call import (
    Compute,
    check_alone,
    check_plain,
    leaves_of,
    logits_of,
    replaced_forward,
    through_head,
)
from fastpref.fused.scored_tokens import autocast_operands
from fastpref.model import head_check

# Wrappers, by the names of their classes, that run the forward pass of the module inside.
_PARALLEL_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
_WRAPPERS = {
    **dict.fromkeys(_PARALLEL_WRAPPERS, "module"),
    "OptimizedModule": "_orig_mod",
    "_FabricModule": "_original_module",
}
# Inputs that models of transformers accept without a name in the signature of forward.
_UNNAMED_INPUTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_TOKENS = 8  # that the logits are compared on


class ModelHead:
    """The head of a model, its scale and its cap.

    model: a causal language model of transformers, possibly in the wrappers of peft and of
        distributed training; with `head`, any module that calls this linear layer for its logits.

    Raises ValueError if there is no plain linear head, or a wrapper is not supported.
    """

    def __init__(
        self, model: nn.Module, head: nn.Module | None = None, name: str = "model"
    ) -> None:
        self._base = base_of(model, name)
        self._field, self.kind = name, type(self._base).__name__
        self.of_transformers = head is None
        self.module = self._plain_head(head)
        self.is_checked = False
        self.options: dict[str, Any] = {"logit_scale": 1.0, "softcap": None}
        if self.of_transformers:
            scale, softcap = head_check.head_options(self._base.config)
            self.options = {"logit_scale": scale, "softcap": softcap}

    def _plain_head(self, head: nn.Module | None) -> nn.Linear:
        """The linear layer of the logits, or ValueError."""
        if head is None:
            find: Any = getattr(self._base, "get_output_embeddings", None)
            if find is None or getattr(self._base.config, "is_encoder_decoder", False):
                raise ValueError(
                    f"{self._field}: expected a causal language model of transformers, got "
                    f"{self.kind}; use one, or pass head=, the linear layer of its logits"
                )
            head = find()
        if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
            raise ValueError(
                f"{self._field}: the head of {self.kind} must be a plain linear layer, got "
                f"{_kind(head)}; adapters, quantization and wrappers of the head are not supported"
            )
        if "forward" in vars(head):
            raise ValueError(
                f"{self._field}: another library has replaced the forward pass of the head of "
                f"{self.kind}, such as accelerate for device_map; load the model without it"
            )
        return head

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Raise ValueError for an input that the model ignores without a word."""
        for name in ("logits_to_keep", "num_logits_to_keep"):
            if name in inputs:
                raise ValueError(
                    f"{name}: the loss needs the hidden states of all tokens, and computes no "
                    "logits; leave it out"
                )
        if not self.of_transformers:
            return
        modules = self._base, getattr(self._base, "base_model", self._base)
        known = {name for m in modules for name in inspect.signature(type(m).forward).parameters}
        for name in inputs:
            if name not in known and name not in _UNNAMED_INPUTS:
                raise ValueError(
                    f"{name}: neither an input of {self.kind} nor an argument of the loss; "
                    "leave it out"
                )

    def router_factor(self) -> float:
        """Factor of the auxiliary loss of a mixture of experts."""
        config = self._base.config.get_text_config()
        factor: float | None = getattr(config, "router_aux_loss_coef", None)
        if factor is None:
            raise ValueError(
                f"model: {self.kind} has an auxiliary loss, but no router_aux_loss_coef; set "
                "output_router_logits of its config to False"
            )
        return factor

    def prepare(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Check the wrapper, and the head if it has not been checked."""
        if isinstance(model, nn.DataParallel):
            base_of(model, self._field)
        if self.of_transformers and self._base.get_output_embeddings() is not self.module:
            raise ValueError(
                f"{self._field}: {self.kind} has got another head, such as one with an adapter, "
                "since the loss was made; make the loss of the model as it is now"
            )
        if not self.is_checked:
            self._probe(model, inputs)
            self._compare(model, inputs)

    def run(
        self, model: nn.Module, compute: Compute, inputs: Mapping[str, Any]
    ) -> tuple[Tensor, Any]:
        """Apply `through_head` to the model or a wrapper of it, after `prepare`."""
        self.prepare(model, inputs)
        return through_head(model, self.module, compute, self._complete(inputs))

    def _complete(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"use_cache": False, **inputs} if self.of_transformers else {**inputs}

    @property
    def is_materialized(self) -> bool:
        """Whether the model can run outside of its wrapper, with the weights that it has now."""
        if not self.of_transformers:
            return False
        parameters = [*self._base.parameters()]
        plain = all(type(p) is nn.Parameter and p.numel() and not p.is_meta for p in parameters)
        flash = "flash" in str(getattr(self._base.config, "_attn_implementation", ""))
        return plain and not (flash and parameters[0].device.type == "cpu")

    def check_now(self, model: nn.Module) -> None:
        """Check the head on eight tokens, where the model can run on its own already."""
        gathers = type(model).__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine")
        if gathers or not self.is_materialized:
            return
        device = next(self._base.parameters()).device
        vocabulary = len(self.module.weight)
        ids = torch.arange(1, _TOKENS + 1, device=device).remainder(vocabulary).unsqueeze(0)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inner = unwrapped(model)
        with torch.enable_grad():
            self._check_leaves(inner, inputs)
        before = self._probe(inner, inputs)
        self._compare(inner, inputs)
        other = ids.clone()
        other[0, -1] = (ids[0, -1] + vocabulary // 2) % vocabulary
        after = self._probe(inner, inputs | {"input_ids": other})
        change = (after - before)[:-1].abs().max() / before.abs().max().clamp_min(1e-30)
        half = before.dtype in (torch.float16, torch.bfloat16)
        if not change <= (0.02 if half else 1e-4):
            raise ValueError(
                f"{self._field}: {self.kind} is not causal: another last token changes the hidden "
                f"states of the tokens before it by {change.item():.2g}; set is_decoder in its "
                "config, or use another model"
            )

    @torch.no_grad()
    def _probe(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Hidden states (L, D) of the first sequence; refuses logits that have another part."""
        states: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            states.append(hidden)
            return self._zeros(hidden)

        with evaluating(model), replaced_forward(self.module, keep):
            logits = logits_of(model(**self._complete(inputs)))
        ids = inputs.get("input_ids")
        if len(states) != 1 or (ids is not None and states[0].shape[:-1] != ids.shape):
            raise ValueError(
                f"{self._field}: {self.kind} does not compute its logits by one call of its head "
                "on hidden states (S, L, D); use another model"
            )
        check_alone(model, logits, (*states[0].shape[:-2], 1))
        return states[0][0]

    def _check_leaves(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Refuse logits that parameters outside of the head change, such as a learned scale."""
        leaves: list[Tensor] = []

        def leaf(hidden: Tensor) -> Tensor:
            leaves.append(self._zeros(hidden).requires_grad_())
            return leaves[-1].clone()  # which the model may change in place

        with evaluating(model), replaced_forward(self.module, leaf):
            logits = logits_of(model(**self._complete(inputs)))
        others = [each for each in leaves_of(logits) if all(each is not mine for mine in leaves)]
        if len(leaves) == 1 and logits.shape[:-1] == leaves[0].shape[:-1] and others:
            raise ValueError(
                f"{self._field}: the logits of {self.kind} depend on parameters outside of its "
                "head, such as a learned scale; use another model"
            )

    def _zeros(self, hidden: Tensor) -> Tensor:
        """Logits of one position, in place of those of hidden states (S, L, D)."""
        check_plain(self.module.weight)
        return hidden.new_zeros(*hidden.shape[:-2], 1, len(self.module.weight))

    @torch.no_grad()
    def _compare(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Compare log-probs of the fused head with those of the model's logits, on eight tokens.

        The hidden states of these tokens are also scaled until their logits are large, where a cap
        of the logits shows. Raises ValueError if the log-probs differ or are not finite.
        """
        scales = dict.fromkeys((self.options["logit_scale"], 1.0))
        samples: list[_Sample] = []

        def sample(hidden: Tensor) -> Tensor:
            weight, bias = self.module.weight, self.module.bias
            check_plain(weight)
            rows = hidden[:1, :_TOKENS]
            scale = abs(self.options["logit_scale"])
            largest = nn.functional.linear(rows, weight).abs().max() * scale
            factor = torch.where(largest == 0, 1.0, head_check.LARGE / largest.float())
            rows = torch.cat([rows, rows * factor.to(rows)], 1)
            samples.append(self._sample((rows[0], weight, bias), scales))
            return nn.functional.linear(rows, weight, bias)

        with evaluating(model), replaced_forward(self.module, sample):
            logits = logits_of(model(**self._complete(inputs)))
        self.options["logit_scale"] = self._scale(samples[0], logits[0])
        self.is_checked = True

    def _sample(
        self, head: tuple[Tensor, Tensor, Tensor | None], scales: Iterable[float]
    ) -> _Sample:
        rows, weight, bias = autocast_operands(*head)
        labels = torch.arange(len(rows), device=rows.device).remainder(len(weight))
        options = {"bias": bias, "softcap": self.options["softcap"]}
        logps = {
            scale: ops.linear_logps(rows, weight, labels, logit_scale=scale, **options)
            for scale in scales
        }
        return _Sample(labels, logps, rows.dtype in (torch.float16, torch.bfloat16))

    def _scale(self, sample: _Sample, logits: Tensor) -> float:
        """Scale of the logits (T, V): that of the config, or 1 where it comes before the head."""
        tolerances = head_check.TOLERANCE, head_check.LARGE_TOLERANCE
        errors = []
        for scale, logps in sample.logps.items():
            if not logps.isfinite().all():
                raise ValueError(
                    f"{self._field}: the log-probs of {self.kind} are not finite; look for NaN or "
                    "infinity in its weights"
                )
            parts = zip(logps.chunk(2), logits.chunk(2), sample.labels.chunk(2), strict=True)
            error = [head_check.logp_error(*part) for part in parts]
            allowed = [
                head_check.rounded_tolerance(part, tolerance) if sample.is_half else tolerance
                for part, tolerance in zip(logits.chunk(2), tolerances, strict=True)
            ]
            if all(e <= a for e, a in zip(error, allowed, strict=True)):
                return scale
            errors.append(max(error))
        raise ValueError(
            f"{self._field}: {self.kind} computes its logits in a way that the fused head does not "
            f"know (log-probs differ by {min(errors):.3g}); use another model"
        )


@dataclass(frozen=True)
class _Sample:
    """Log-probs of a few tokens by the fused head, half of them of scaled hidden states."""

    labels: Tensor  # (T,)
    logps: dict[float, Tensor]  # (T,) by the scale of the logits
    is_half: bool  # whether the head multiplies in half precision


def _kind(head: nn.Module | None) -> str:
    """Name of the head's class, after that of its library."""
    if head is None:
        return "none"
    return f"{type(head).__module__.partition('.')[0]}.{type(head).__name__}"


def unwrapped(model: Any) -> Any:
    """The module inside of one wrapper of distributed training, or the model itself."""
    attribute = _WRAPPERS.get(type(model).__name__)
    return model if attribute is None else getattr(model, attribute)


def is_parallel(model: nn.Module) -> bool:
    """Whether a wrapper of distributed training is around the model, or its weights are shards."""
    if DistributedDataParallel._active_ddp_module is not None:
        return True
    classes = {each.__name__ for module in model.modules() for each in type(module).__mro__}
    if not classes.isdisjoint((*_PARALLEL_WRAPPERS, "FSDPModule")):
        return True
    return any(hasattr(p, "ds_id") or type(p) is not nn.Parameter for p in model.parameters())


def base_of(model: Any, name: str = "model") -> Any:
    """The model inside of its wrappers, that of peft included.

    Raises ValueError for DataParallel, whose replicas have other heads, and prompt learning.
    """
    while True:
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                f"{name}: DataParallel is not supported; start one process a device, as torchrun "
                "does, and use DistributedDataParallel"
            )
        inside = unwrapped(model)
        if inside is model:
            break
        model = inside
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        for adapter in model.peft_config.values():
            if adapter.is_prompt_learning:
                raise ValueError(
                    f"{name}: {type(adapter).__name__} puts tokens before the sequences, which "
                    "have no labels; use LoRA"
                )
        model = model.get_base_model()
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager in which all modules of a model are in evaluation mode."""
    # On a CPU bitsandbytes repacks the weights of a layer that runs in evaluation mode, for good.
    modules = [each for each in model.modules() if type(each).__name__ != "Linear4bit"]
    modes = [(module, module.training) for module in modules]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
