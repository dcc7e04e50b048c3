"""The policy: a Hugging Face causal language model whose head is the fused log-prob op.

`Policy.forward` runs the trunk, keeps the hidden states that predict completion tokens, and hands
them with the head's weight to `fastpref.ops`. Logits in full never exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpref import ops
from fastpref.data.batch_plan import Layout
from fastpref.data.collate import Batch, collate
from fastpref.data.dataset import Groups, TokenGroup
from fastpref.model.packed_attention import packing_error
from fastpref.utils.errors import ModelError


class PolicyOutput(NamedTuple):
    """Results of a forward pass over S responses with T tokens; fp32, fp64 for fp64 models."""

    logps: Tensor  # (S,) summed log-probs of the responses, nats
    token_logps: Tensor  # (T,) those of their tokens
    entropy: Tensor | None = None  # (2,) sum over the tokens of their distributions' entropy, count
    collision_entropy: Tensor | None = None  # (T,) nats
    kl: Tensor | None = None  # (T,) KL(reference || policy) of the distributions, nats
    importance: Tensor | None = None  # (T,) of each token, by `fastpref.model.token_importance`
    geometry: ops.ScoreGeometry | None = None  # (B,) of each pair's scores of the head's weight
    head: tuple[Tensor, Tensor] | None = None  # hidden states (T, D) and weight (V, D)


@dataclass(frozen=True)
class ForwardOptions:
    """What a forward pass brings beside log-probs; no part of it is made unasked.

    entropy: one more pass over the head. collision_entropy: two. kl: two, from the `head` of the
    reference at the same tokens. head: none. score_weights: the geometry, of batches of pairs and
    heads without a bias, one or two; the function says from the output so far how much each token
    counts in the scores, (T,), or None for all alike.
    """

    entropy: bool = False
    collision_entropy: bool = False
    head: bool = False
    reference: tuple[Tensor, Tensor] | None = None
    score_weights: Callable[[PolicyOutput], Tensor | None] | None = None


_NOTHING = ForwardOptions()


class Policy(nn.Module):
    """A causal language model that returns response log-probs."""

    def __init__(self, causal_lm: nn.Module, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.causal_lm = causal_lm  # possibly wrapped by peft
        self.compute_dtype = compute_dtype
        self.layout: Layout = "padded"  # how its batches lie; see `fastpref.model.batch_layout`
        self.batch_invariant = True  # on CPU; see `batches`
        self.sharded = False  # over many ranks; see `fastpref.model.fsdp`
        self.kernels = "torch"  # of its layers; see `fastpref.model.liger`
        self.fresh_adapter = True  # if it has one: it adds zero until it is trained
        base = self.base
        self.logit_scale, self.softcap = _head_options(base.config)
        head = base.get_output_embeddings()
        if type(head) is not nn.Linear:
            kind = "none" if head is None else type(head).__name__
            raise ModelError(
                f"model: the head of {type(base).__name__} must be a plain linear layer, got "
                f"{kind}; adapters or quantisation on the head are not supported"
            )

    @property
    def base(self) -> PreTrainedModel:
        """The Hugging Face model without the adapters' wrapper."""
        unwrap: Any = getattr(self.causal_lm, "get_base_model", None)
        return unwrap() if unwrap is not None else cast(PreTrainedModel, self.causal_lm)

    @property
    def quantized(self) -> bool:
        """Whether the base has linear layers in 4 bits, which every rank must have whole."""
        return bool(getattr(self.base, "is_loaded_in_4bit", False))

    def blocks(self) -> nn.ModuleList:
        """The layers of the trunk."""
        lists = (m for m in self.base.base_model.modules() if isinstance(m, nn.ModuleList))
        return max(lists, key=len)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name: of a sharded model this rank's shards."""
        self.reshard()
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def reshard(self) -> None:
        """Of a sharded model, let go of what a forward pass without a backward pass leaves."""
        if self.sharded:
            cast(Any, self).reshard()

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.named_parameters() if "lora_" in name]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, batch: Batch, asked: ForwardOptions = _NOTHING) -> PolicyOutput:
        """Log-probs of the batch's sequences and of their tokens, and what else is asked for."""
        hidden = self.hidden_states(batch).index_select(0, batch.positions)
        weight, bias = self.head()
        of_the_tokens = hidden, weight, batch.labels
        logps = ops.linear_logps(*of_the_tokens, bias=bias, **self.head_options)
        output = PolicyOutput(ops.segment_sum(logps, batch.cu_seqlens), logps)
        if asked.entropy:
            stats = ops.token_stats(*of_the_tokens, bias=bias, **self.head_options)
            count = stats.entropy.new_tensor(len(batch.labels))
            output = output._replace(entropy=torch.stack([stats.entropy.sum(), count]))
        if asked.collision_entropy:
            spread = ops.collision_entropy(*of_the_tokens, bias=bias, **self.head_options)
            output = output._replace(collision_entropy=spread)
        if asked.reference is not None:
            kl = ops.linear_kl(hidden, weight, *asked.reference, **self.head_options)
            output = output._replace(kl=kl)
        if asked.score_weights is not None:
            geometry = ops.score_geometry(
                *of_the_tokens,
                batch.cu_seqlens,
                token_weights=asked.score_weights(output),
                per_pair=True,
                **self.head_options,
            )
            output = output._replace(geometry=geometry)
        return output._replace(head=(hidden, weight)) if asked.head else output

    def batches(self, groups: Groups, indices: Sequence[int]) -> list[Batch]:
        """The forward passes of a micro-batch, on this device and in the layout of this policy.

        One over all groups on CUDA, and where the model is sharded: ranks gather it together. On
        CPU else, if `batch_invariant`, one for each: a group's log-probs do not depend then, to the
        last bit, on the groups that it happens to meet.
        """
        apart = self.batch_invariant and self.device.type == "cpu" and not self.sharded
        parts = [[index] for index in indices] if apart else [indices]
        return [
            collate([groups[i] for i in part], groups.kind, self.layout).to(self.device)
            for part in parts
        ]

    def hidden_states(self, batch: Batch, embeddings: Tensor | None = None) -> Tensor:
        """Last hidden states (R L, D) of all positions, from `embeddings` (R, L, D) if given."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids}
        if embeddings is not None:
            inputs = {"inputs_embeds": embeddings}
        if batch.packing is not None:
            inputs["position_ids"] = batch.position_ids
            if self.layout == "packed":
                inputs |= batch.packing.varlen_arguments(self.device)
            else:
                inputs["packing"] = batch.packing
        return self._hidden(**inputs).flatten(0, 1)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, D) and bias (V,) of the head, in the compute dtype."""
        head = self.base.get_output_embeddings()
        return self._compute(head.weight), self._compute(head.bias)

    def _hidden(self, **inputs: Any) -> Tensor:
        """Last hidden states (R, L, D) after the final norm, in the compute dtype."""
        with self._autocast():
            hidden = self.base.base_model(use_cache=False, **inputs).last_hidden_state
        return hidden.to(self.compute_dtype)

    def _autocast(self) -> torch.autocast:
        half = self.compute_dtype == torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half)

    def _compute(self, tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.to(self.compute_dtype)

    @property
    def head_options(self) -> dict[str, Any]:
        """Those that `fastpref.ops` take for this model."""
        return {"logit_scale": self.logit_scale, "softcap": self.softcap}

    def packing_error(self, groups: Sequence[TokenGroup]) -> float:
        """`attention.packing_error` of this model."""
        return packing_error(self.base, groups)

    @torch.no_grad()
    def check_head(self) -> None:
        """Refuse a model whose own logits are not what the fused head makes of its hidden states.

        Raises ModelError naming the model. Costs one forward pass over eight tokens.
        """
        rows = self.head()[0].shape[0]
        ids = torch.arange(1, 9, device=self.device).remainder(rows).unsqueeze(0)
        was_training = self.training
        self.eval()
        with self._autocast():
            logits = self.base(input_ids=ids, use_cache=False).logits
        labels = ids.flatten().roll(-1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        expected = logits[0].to(wide).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        hidden = self._hidden(input_ids=ids)[0]
        weight, bias = self.head()
        ours = ops.linear_logps(hidden, weight, labels, bias=bias, **self.head_options)
        self.train(was_training)
        tolerance = 1e-3
        if self.compute_dtype == torch.bfloat16:  # the model's own logits are rounded, to 2^-9
            tolerance = max(0.1, 2**-7 * logits.abs().max().item())
        error = (ours - expected).abs().max().item()
        if not ours.isfinite().all():
            raise ModelError(
                f"model: the log-probs of {type(self.base).__name__} are not finite; look for NaN "
                "or infinity in its weights"
            )
        if not error <= tolerance:
            raise ModelError(
                f"model: {type(self.base).__name__} computes its logits in a way that the fused "
                f"head does not know (log-probs differ by {error:.3g}); this model is not supported"
            )


def _head_options(config: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap) by architecture; `Policy.check_head` proves them."""
    config = config.get_text_config()
    kind = config.model_type
    scale = 1.0
    if kind.startswith("cohere"):
        scale = config.logit_scale
    elif kind.startswith("granite"):
        scale = 1.0 / config.logits_scaling
    elif kind.startswith("falcon_h1"):
        scale = config.lm_head_multiplier
    return scale, getattr(config, "final_logit_softcapping", None)


def context_length(policy: Policy) -> int | None:
    """Positions that the model was made for, or None where its config does not say."""
    config = policy.base.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return None
