"""A model without weights: from its Hugging Face config, on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from fastpref.config import Adapter, Model
from fastpref.model.layer_kernels import fuse
from fastpref.model.load import check_one_label, model_config, naming_the_model
from fastpref.model.lora import add_adapter
from fastpref.model.policy import Policy
from fastpref.model.pretrained import build_empty
from fastpref.model.quantize import check_quantization
from fastpref.model.recomputation import recompute
from fastpref.model.reward_policy import HEAD, RewardPolicy

# NF4 with double quantization: half a byte, a byte for 64 of them, four bytes for 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Shapes:
    """Numbers of parameters, and the bytes that each of them takes."""

    width: int  # D
    vocabulary: int  # V, rows of the embeddings
    head_rows: int  # V, or 1 of a reward model
    blocks: int
    attention_width: int  # of all heads together
    base: int  # parameters of the base; tied ones count once
    in_blocks: int  # parameters of the base's blocks
    largest_block: int
    quantized: int  # parameters of linear layers in 4 bits
    largest_linear: int  # parameters of the largest such layer
    adapter: int  # parameters of the adapter, and of a head beside it; 0: the base is trained
    tied: bool  # embeddings and head share a weight
    compute: int  # bytes of a number in the forward pass
    stored: int  # bytes of a weight of the base
    adapter_stored: int  # bytes of a weight of the adapter
    can_recompute: bool  # whether the architecture supports it

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
        return self.head_rows * self.width

    @property
    def embeddings(self) -> int:
        return self.vocabulary * self.width

    @property
    def base_bytes(self) -> int:
        return int(self.stored * (self.base - self.quantized) + NF4_BYTES * self.quantized)


def empty_policy(
    model: Model,
    vocabulary: int | None,
    sharded: bool,
    *,
    adapter: Adapter | None,
    recomputed: bool,
    of_rewards: bool = False,
) -> Policy:
    """Build the policy on the meta device, with its adapter, all blocks recomputed or none.

    vocabulary: tokens of the tokenizer, for a random model without `vocab_size`. of_rewards: build
    a `RewardPolicy`. Raises ModelError in one line.
    """
    compute_dtype = getattr(torch, model.dtype)
    stored_dtype = compute_dtype
    if adapter is None and not sharded:  # FSDP gathers weights in the compute dtype
        stored_dtype = torch.promote_types(compute_dtype, torch.float32)
    causal_lm = _empty_model(model, vocabulary, stored_dtype, adapter, of_rewards)
    wrapped: nn.Module = causal_lm
    if adapter is not None:
        causal_lm.requires_grad_(False)
        with init_empty_weights(include_buffers=False):
            wrapped = add_adapter(causal_lm, adapter, False, sharded=sharded, of_rewards=of_rewards)
    policy = RewardPolicy(wrapped, compute_dtype) if of_rewards else Policy(wrapped, compute_dtype)
    if isinstance(policy, RewardPolicy) and adapter is not None:
        policy.train_head()
    if model.kernels in ("auto", "fused"):
        fuse(policy, model, compiled=False)
    if recomputed:
        recompute(policy, "full")
    return policy.train()


def shapes_of(policy: Policy, in_4bit: bool) -> Shapes:
    """Count the parameters of a policy, which may be empty.

    in_4bit: the linear layers of its blocks will be quantized.
    """
    base, compute = policy.base, policy.compute_dtype
    text = base.config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    of_rewards = isinstance(policy, RewardPolicy)
    head: Any = base.get_submodule(HEAD) if of_rewards else base.get_output_embeddings()
    embeddings: Any = base.get_input_embeddings()
    adapter = {id(p): p for p in policy.replicated_parameters()}

    def base_count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if id(p) not in adapter)

    blocks = [base_count(block) for block in policy.blocks()]
    linear: list[int] = []
    if in_4bit:
        linear = [base_count(m) for m in policy.blocks().modules() if type(m) is nn.Linear]
    stored = compute if adapter else torch.promote_types(compute, torch.float32)
    return Shapes(
        width=head.weight.shape[1],
        vocabulary=embeddings.weight.shape[0],
        head_rows=head.weight.shape[0],
        blocks=len(blocks),
        attention_width=heads * (getattr(text, "head_dim", None) or text.hidden_size // heads),
        base=base_count(base),
        in_blocks=sum(blocks),
        largest_block=max(blocks),
        quantized=sum(linear),
        largest_linear=max(linear, default=0),
        adapter=sum(p.numel() for p in adapter.values()),
        tied=head.weight is embeddings.weight,
        compute=compute.itemsize,
        stored=stored.itemsize,
        adapter_stored=max((p.dtype.itemsize for p in adapter.values()), default=0),
        can_recompute=base.supports_gradient_checkpointing,
    )


def _empty_model(
    model: Model,
    vocabulary: int | None,
    dtype: torch.dtype,
    adapter: Adapter | None,
    of_rewards: bool,
) -> Any:
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": model.trust_remote_code}
    if model.attn_implementation == "eager":  # all others save the same activations
        options["attn_implementation"] = "eager"
    with naming_the_model(model):
        config = model_config(model, {} if vocabulary is None else {"vocab_size": vocabulary})
        if model.path is not None:
            quantized = adapter is not None and adapter.quantize is not None
            check_quantization(model.path, config, allow_nf4=quantized)
            config.quantization_config = None
        if of_rewards:
            check_one_label(model, config)
            config.num_labels = 1
        return build_empty(config, options, of_rewards)
