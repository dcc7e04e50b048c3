"""Blocks whose activations are recomputed in the backward pass."""

from __future__ import annotations

from typing import Any, Literal

from fastpref.model.policy import Policy
from fastpref.utils.errors import ModelError

# `training.activation_checkpointing` without "auto"; a number counts the first blocks.
Recomputation = Literal["full", "selective", "off"] | int


def recomputed(mode: Recomputation, blocks: int) -> list[bool]:
    """Return for each block whether it is recomputed."""
    if mode == "selective":
        return [index % 2 == 0 for index in range(blocks)]
    count = {"full": blocks, "off": 0}[mode] if isinstance(mode, str) else mode
    # The backward pass reaches the first blocks last, when it has freed the activations of others.
    return [index < count for index in range(blocks)]


def recompute(policy: Policy, mode: Recomputation) -> None:
    """Set the blocks that are recomputed; may be called again with another number.

    Raises ModelError for an architecture that does not support it.
    """
    blocks = policy.blocks()
    choice = recomputed(mode, len(blocks))
    causal_lm: Any = policy.base
    if any(choice) and not causal_lm.supports_gradient_checkpointing:
        raise ModelError(
            f"training.activation_checkpointing: {type(causal_lm).__name__} does not support "
            "it; set it to off"
        )
    if any(choice):
        # transformers 5.x is renaming the method; both take torch's checkpoint options first.
        older = causal_lm.gradient_checkpointing_enable
        enable = getattr(causal_lm, "activation_checkpointing_enable", older)
        enable({"use_reentrant": False})
    for block, is_recomputed in zip(blocks, choice, strict=True):
        # Not setattr: transformers warns that it is renaming the attribute.
        vars(block)["gradient_checkpointing"] = is_recomputed
