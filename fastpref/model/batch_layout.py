"""Choice of the layout of groups in a forward pass, and its check on the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastpref import distributed
from fastpref.config import ConfigError, Training
from fastpref.data.batch_plan import Layout, tokens_of
from fastpref.data.dataset import Groups, TokenGroup
from fastpref.model import packed_attention
from fastpref.model.policy import Policy
from fastpref.utils.errors import ModelError
from fastpref.utils.progress import Display


def choose_layout(
    policy: Policy,
    training: Training,
    attn_implementation: str,
    datasets: Sequence[Groups],
    display: Display,
    notes_savings: bool = True,
) -> None:
    """Set `policy.layout` and its attention implementation; note the number of tokens it saves.

    attn_implementation: `model.attn_implementation` of the config.
    datasets: all that the policy will compute; the savings are those of the first.

    Raises ConfigError if the model does not support the layout of the config, and ModelError if it
    computes other hidden states in padded rows than for each sequence alone.
    """
    policy.batch_invariant = training.batch_invariant
    layout = preferred_layout(training, attn_implementation)
    if layout == "packed" and attn_implementation != "flash_attention_2":
        raise ConfigError(
            "training.layout: packed needs model.attn_implementation: flash_attention_2; set it, "
            "or use prefix_shared"
        )
    groups = longest_groups(datasets)
    if layout != "padded" and (reason := _obstacle(policy, layout, datasets, groups)):
        name = type(policy.base).__name__
        if training.layout == layout:
            rows = "shared prompts" if layout == "prefix_shared" else "packed rows"
            raise ConfigError(
                f"training.layout: {name} computes different hidden states for {rows} ({reason}); "
                "use padded"
            )
        display.note(f"note: {name} cannot share prompts; each response has its own row: {reason}")
        layout = "padded"
    use_layout(policy, layout)
    if layout == "padded":
        _check_padding(policy, groups)
    if policy.not_fused and attn_implementation == "auto":
        library = "liger-kernel" if policy.kernels == "liger" else "transformers"
        display.note(f"note: the layers are those of {library}, not fused: {policy.not_fused}")
    if layout != "padded" and notes_savings:
        display.note(_savings(datasets[0], layout))


def longest_groups(datasets: Sequence[Groups]) -> list[TokenGroup]:
    """Groups to compare layouts on: of each data set the one with the longest sequence, and the
    shortest one of all.
    """
    longest = [groups[int(groups.padded_lengths.argmax())] for groups in datasets]
    first = datasets[0]
    return [*longest, first[int(tokens_of(first, "prefix_shared").argmin())]]


def check_after_training(policy: Policy, datasets: Sequence[Groups], display: Display) -> None:
    """Compare the layout of the policy with single sequences again; note a difference.

    The exported model computes single sequences by the layers of transformers.
    """
    groups = longest_groups(datasets)
    of_explicit_blocks = policy.trunk is not None and not policy.rotaries
    packs = policy.layout == "prefix_shared" or of_explicit_blocks
    try:
        error = policy.packing_error(groups) if packs else policy.padding_error(groups)
        # Long rows pass through some layers; the weights of all have changed.
        error = float(np.maximum(error, policy.trunk_error()))  # NaN if one is
    # The model matters more than its check.
    except packed_attention.OUT_OF_MEMORY:
        display.note("note: no memory is left to compare the layout with single sequences again")
        return
    if not distributed.all_ranks(error <= policy.rounding):
        display.note(
            f"warning: after training, hidden states in the layout {policy.layout} differ by "
            f"{error:.2g} from those of single sequences, which the exported model computes; do "
            "not use it, and train again with training.layout=padded"
        )


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


def _obstacle(
    policy: Policy, layout: Layout, datasets: Sequence[Groups], groups: Sequence[TokenGroup]
) -> str:
    """Reason why the policy cannot compute packed rows of these data sets, or empty."""
    longest = max(int(data.padded_lengths.max()) for data in datasets)
    if any(longest > rotary.threshold for rotary in policy.rotaries):
        return "its positions depend on the length of the sequence"
    if policy.trunk is not None:
        error = policy.packing_error(groups)
        if distributed.all_ranks(error <= policy.rounding):
            return ""
        policy.use_transformers(f"its layers differ from transformers' by {error:.2g} on long rows")
    reason = policy.packing_obstacle(groups)
    if not reason and layout == "prefix_shared":
        error = policy.packing_error(groups)
        reason = "" if error <= policy.rounding else f"hidden states differ by {error:.2g}"
    return reason if distributed.all_ranks(not reason) else reason or "so says another rank"


def _check_padding(policy: Policy, groups: Sequence[TokenGroup]) -> None:
    """Raise ModelError if padded rows do not have the hidden states of single sequences."""
    if policy.trunk is not None and not policy.rotaries:
        return
    error = policy.padding_error(groups)
    if not distributed.all_ranks(error <= policy.rounding):
        raise ModelError(
            f"model: {type(policy.base).__name__} computes other hidden states in padded rows "
            f"than for each sequence alone (they differ by {error:.2g}); use another model"
        )


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
