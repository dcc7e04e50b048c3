"""Choice of the layout of groups in a forward pass, and its check on the model."""

from __future__ import annotations

from fastpref.config import ConfigError, Training
from fastpref.data.batch_plan import Layout, tokens_of
from fastpref.data.dataset import Groups
from fastpref.model import packed_attention
from fastpref.model.policy import Policy
from fastpref.utils.progress import Display


def choose_layout(
    policy: Policy, training: Training, attn_implementation: str, groups: Groups, display: Display
) -> None:
    """Set `policy.layout` and its attention implementation; note the number of tokens it saves.

    attn_implementation: `model.attn_implementation` of the config. Raises ConfigError if the model
        does not support the layout of the config.
    """
    policy.batch_invariant = training.batch_invariant
    layout = preferred_layout(training, attn_implementation)
    if layout == "packed" and attn_implementation != "flash_attention_2":
        raise ConfigError(
            "training.layout: packed needs model.attn_implementation: flash_attention_2; set it, "
            "or use prefix_shared"
        )
    if layout == "prefix_shared" and not _can_share(policy, groups):
        name = type(policy.base).__name__
        if training.layout == "prefix_shared":
            raise ConfigError(
                f"training.layout: {name} computes different hidden states for shared prompts; "
                "use padded"
            )
        display.note(f"note: {name} cannot share prompts; each response has its own row")
        layout = "padded"
    use_layout(policy, layout)
    if policy.not_fused and attn_implementation == "auto":
        library = "liger-kernel" if policy.kernels == "liger" else "transformers"
        display.note(f"note: the layers are those of {library}, not fused: {policy.not_fused}")
    if layout != "padded":
        display.note(_savings(groups, layout))


def preferred_layout(training: Training, attn_implementation: str) -> Layout:
    """Layout of the config; for "auto" the best one, if the model supports it."""
    if training.layout != "auto":
        return training.layout
    if attn_implementation == "auto":
        return "prefix_shared"
    return "packed" if attn_implementation == "flash_attention_2" else "padded"


def use_layout(policy: Policy, layout: Layout) -> None:
    """Set `policy.layout` and the attention implementation that it needs."""
    if layout == "prefix_shared":
        policy.base.set_attn_implementation(packed_attention.register())
    policy.layout = layout


def _can_share(policy: Policy, groups: Groups) -> bool:
    """Whether packing leaves the hidden states of the two longest groups unchanged."""
    longest = tokens_of(groups, "prefix_shared").argsort(kind="stable")[-2:]
    members = [groups[int(index)] for index in longest]
    error = policy.packing_error(members)
    if policy.trunk is not None and not error <= policy.rounding:
        policy.use_transformers(f"its layers differ from transformers' by {error:.2g} on long rows")
        error = policy.packing_error(members)
    return error <= policy.rounding


def _savings(groups: Groups, layout: Layout) -> str:
    """Message about the tokens that a layout saves, compared with padding each group alone."""
    padded = int(tokens_of(groups, "padded").sum())
    unpadded = int(tokens_of(groups, "packed").sum())
    tokens = int(tokens_of(groups, layout).sum())
    message = (
        f"tokens: {tokens:,} in packed rows instead of {padded:,}; "
        f"{(padded - unpadded) / padded:.0%} saved by leaving out padding"
    )
    if layout == "prefix_shared":
        message += f", {(unpadded - tokens) / padded:.0%} by sharing prompts"
    return message
