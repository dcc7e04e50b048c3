"""The trunk of a model: embeddings, decoder blocks, last norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.attention import Segments
from fastpref.trunk.attention import Positions
from fastpref.trunk.block import Block
from fastpref.trunk.families import (
    check_hooks,
    family_of,
    hook_tables,
    read_block,
    read_norm,
)
from fastpref.trunk.layer import NormModule
from fastpref.trunk.linear import UnknownLayer, copy_adapters
from fastpref.trunk.norm import Norm, rms_norm, rms_norm_backward
from fastpref.utils.first_order import refuse_second_order

# Name under which a layer runs its block: a method of the module, so that FSDP2 can gather the
# layer's weights around it.
BLOCK_METHOD = "explicit_block"


class Trunk:
    """Hidden states of a Hugging Face model, by explicit blocks on its parameters.

    blocks: of the model's layers; `gradient_checkpointing` of a layer says whether its block is
        recomputed in the backward pass.
    """

    def __init__(self, model: Any, blocks: Sequence[Block], norm: NormModule) -> None:
        self.model = model
        self.blocks = {block.module: block for block in blocks}
        self.norm = norm
        self.by_kind = hasattr(model.rotary_emb, "layer_types")
        for layer, block in self.blocks.items():
            setattr(layer, BLOCK_METHOD, _Method(block))
        inner = (part for layer in self.blocks for part in layer.modules())
        parts = dict.fromkeys((model, model.norm, *inner))
        self._hooks = [(part, table) for part in parts for table in hook_tables(part)]

    def __call__(
        self,
        input_ids: Tensor | None,  # (1, P) or (R, L)
        position_ids: Tensor,  # the same shape
        segments: Segments,
        dtype: torch.dtype,
        embeddings: Tensor | None = None,  # (1, P, D) or (R, L, D), instead of ids
    ) -> Tensor:
        """Hidden states (P, D) after the last norm; all computation is in `dtype`.

        Raises RuntimeError if a module that is not called got a hook after it was read.
        """
        self._refuse_hooks()
        if embeddings is None:
            embeddings = self.model.embed_tokens(input_ids)
        embeddings = embeddings.to(dtype)
        # The angles of all rows; Hugging Face computes them in the dtype of the hidden states.
        angles = self._angles(embeddings, position_ids)
        copy_adapters([g for layer in self.model.layers for g in self.blocks[layer].groups], dtype)
        hidden = embeddings.flatten(0, -2)
        for layer in self.model.layers:
            cos, sin = angles[self.blocks[layer].kind if self.by_kind else None]
            hidden = getattr(layer, BLOCK_METHOD)(hidden, Positions(segments, cos, sin))
        weight = self.norm.module.weight
        output: Tensor = _LastNorm.apply(hidden, weight, self.norm.norm)
        return output

    def _refuse_hooks(self) -> None:
        for part, table in self._hooks:
            if any(not _is_of_fsdp(hook) for hook in table.values()):
                raise RuntimeError(
                    f"a hook of {type(part).__name__} was set after the layers were read and would "
                    "not run; set it before, or take transformers' layers (model.kernels=torch)"
                )

    def _angles(
        self, embeddings: Tensor, position_ids: Tensor
    ) -> dict[str | None, tuple[Tensor, Tensor]]:
        rotary = self.model.rotary_emb
        kinds = rotary.layer_types if self.by_kind else [None]
        angles = {}
        for kind in kinds:
            arguments = (position_ids,) if kind is None else (position_ids, kind)
            cos, sin = rotary(embeddings, *arguments)
            rows = cos.expand(*position_ids.shape, -1), sin.expand(*position_ids.shape, -1)
            angles[kind] = rows[0].flatten(0, 1), rows[1].flatten(0, 1)
        return angles


def build_trunk(model: Any) -> Trunk:
    """Read the trunk of a Hugging Face model (without its head), possibly with LoRA adapters.

    Raises UnknownLayer if a part of it is not known.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not layers:
        raise UnknownLayer(f"{type(model).__name__} has no list of decoder layers")
    family = family_of(layers[0])
    check_hooks(model)
    children = {name for name, _ in model.named_children()}
    if children != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        part = min(children ^ {"embed_tokens", "layers", "norm", "rotary_emb"})
        raise UnknownLayer(f"{type(model).__name__} with or without a part {part} is not known")
    return Trunk(model, [read_block(layer) for layer in layers], read_norm(model.norm, family))


def _is_of_fsdp(hook: Any) -> bool:
    """Whether FSDP2 has set a hook; these run around the method of a block."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed")


class _Method:
    """Runs a block, recomputed in the backward pass if its module says so."""

    def __init__(self, block: Block) -> None:
        self.block = block

    def __call__(self, hidden: Tensor, positions: Positions) -> Tensor:
        module: Any = self.block.module
        recompute = module.training and module.gradient_checkpointing
        return self.block(hidden, positions, recompute)


class _LastNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, norm: Norm) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.norm = norm
        return rms_norm(hidden, weight, norm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second_order("the trunk of fastpref", "call the Hugging Face model")
        hidden, weight = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        return *rms_norm_backward(grad, hidden, weight, ctx.norm, needs_weight), None
