"""A model without its weights: from its Hugging Face config, on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref import config as configs
from fastpref.config import Config
from fastpref.model.load import checkpoint_activations, without_dropout
from fastpref.model.lora import add_adapter
from fastpref.model.policy import Policy
from fastpref.model.quantize import check_quantization
from fastpref.utils.errors import ModelError, UserError, cannot_load, shown

# NF4 with double quantisation: half a byte, a byte for 64 of them, four bytes for 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Shapes:
    """Numbers of parameters, and what they are kept in, bytes each."""

    width: int  # D
    vocabulary: int  # V, rows of the head
    blocks: int
    attention_width: int  # of all heads together
    base: int  # all parameters of the base; tied ones once
    in_blocks: int  # those of the base's blocks
    largest_block: int
    quantized: int  # those of linear layers in 4 bits
    largest_linear: int  # of those
    adapter: int  # trained beside the base; 0: the base is trained
    tied: bool  # embeddings and head are one
    compute: int  # bytes of a number in the forward pass
    stored: int  # of one of the base's weights
    adapter_stored: int

    @property
    def trained(self) -> int:
        return self.adapter or self.base

    @property
    def head_is_trained(self) -> bool:
        return not self.adapter

    @property
    def root(self) -> int:
        """Parameters of the base outside its blocks."""
        return self.base - self.in_blocks

    @property
    def head(self) -> int:
        return self.vocabulary * self.width

    @property
    def base_bytes(self) -> int:
        return int(self.stored * (self.base - self.quantized) + NF4_BYTES * self.quantized)


def empty_policy(config: Config, vocabulary: int | None, sharded: bool) -> Policy:
    """The policy of a config on the meta device, with its adapter and its checkpointing.

    vocabulary: tokens of the tokenizer, for a random model that leaves their number open. Raises
    ModelError in one line.
    """
    compute = getattr(torch, config.model.dtype)
    wide = config.adapter is None and not sharded  # what FSDP gathers has the compute dtype
    dtype = torch.promote_types(compute, torch.float32) if wide else compute
    model: Any = _empty(config.model, vocabulary, dtype, config.adapter)
    wrapped: nn.Module = model
    if config.adapter is not None:
        model.requires_grad_(False)
        with init_empty_weights(include_buffers=False):
            wrapped = add_adapter(model, config.adapter, False, sharded=sharded)
    policy = Policy(wrapped, compute)
    checkpointing = config.training.activation_checkpointing
    if checkpointing != "off":
        checkpoint_activations(policy, every=1 + (checkpointing == "selective"))
    return policy.train()


def shapes_of(policy: Policy, config: Config) -> Shapes:
    """Counted on a policy that may be empty."""
    base, compute = policy.base, policy.compute_dtype
    text = base.config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    head: Any = base.get_output_embeddings()
    adapter = {id(p): p for p in policy.adapter_parameters()}

    def own(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if id(p) not in adapter)

    blocks = [own(block) for block in policy.blocks()]
    in_4bit = config.adapter is not None and config.adapter.quantize is not None
    linear = [own(m) for m in policy.blocks().modules() if type(m) is nn.Linear] if in_4bit else []
    stored = compute if adapter else torch.promote_types(compute, torch.float32)
    return Shapes(
        width=head.weight.shape[1],
        vocabulary=head.weight.shape[0],
        blocks=len(blocks),
        attention_width=heads * (getattr(text, "head_dim", None) or text.hidden_size // heads),
        base=own(base),
        in_blocks=sum(blocks),
        largest_block=max(blocks),
        quantized=sum(linear),
        largest_linear=max(linear, default=0),
        adapter=sum(p.numel() for p in adapter.values()),
        tied=head.weight is base.get_input_embeddings().weight,
        compute=compute.itemsize,
        stored=stored.itemsize,
        adapter_stored=max((p.dtype.itemsize for p in adapter.values()), default=0),
    )


def _empty(
    model: configs.Model,
    vocabulary: int | None,
    dtype: torch.dtype,
    adapter: configs.Adapter | None,
) -> Any:
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": model.trust_remote_code}
    if model.attn_implementation == "eager":  # the others keep as much as each other
        options["attn_implementation"] = "eager"
    try:
        if model.path is not None:
            config = AutoConfig.from_pretrained(
                model.path, trust_remote_code=model.trust_remote_code
            )
            check_quantization(
                model.path, config, wanted=adapter is not None and adapter.quantize is not None
            )
            config.quantization_config = None
        else:
            values = dict(model.config or {})
            kind = values.pop("model_type")
            known = {} if vocabulary is None else {"vocab_size": vocabulary}
            config = AutoConfig.for_model(kind, **{**known, **values})
        with init_empty_weights(include_buffers=False):
            causal_lm: Any = AutoModelForCausalLM.from_config(without_dropout(config), **options)
        causal_lm.tie_weights()
        return causal_lm
    except UserError:
        raise
    except Exception as error:  # transformers and the Hub raise unrelated types
        raise ModelError(cannot_load("model", model.path or shown(model.config), error)) from None
