"""How the groups of a run lie in a forward pass: chosen, checked on the model, and reported."""

from __future__ import annotations

from fastpref.config import Config, ConfigError
from fastpref.data.batch_plan import Layout, tokens_of
from fastpref.data.dataset import Groups
from fastpref.model import packed_attention
from fastpref.model.policy import Policy
from fastpref.utils.progress import Display

# Largest relative difference of a hidden state, packed against alone, that is rounding.
_ROUNDING = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 0.1}


def choose_layout(policy: Policy, config: Config, groups: Groups, display: Display) -> None:
    """Set `policy.layout`, and its attention code with it; say what that saves.

    Raises ConfigError for a layout that the config asks for and the model cannot have.
    """
    policy.batch_invariant = config.training.batch_invariant
    asked, layout = config.training.layout, wanted_layout(config)
    if layout == "packed" and config.model.attn_implementation != "flash_attention_2":
        raise ConfigError(
            "training.layout: packed is for model.attn_implementation: flash_attention_2; set "
            "that, or use prefix_shared"
        )
    if layout == "prefix_shared" and not _can_share(policy, groups):
        name = type(policy.base).__name__
        if asked == "prefix_shared":
            raise ConfigError(
                f"training.layout: {name} gives other hidden states for shared prompts; use padded"
            )
        display.note(f"note: {name} cannot share prompts; each response has a row of its own")
        layout = "padded"
    use_layout(policy, layout)
    if layout != "padded":
        display.note(_savings(groups, layout))


def wanted_layout(config: Config) -> Layout:
    """The layout of a run whose model can have it."""
    if config.training.layout != "auto":
        return config.training.layout
    code = config.model.attn_implementation
    if code == "auto":
        return "prefix_shared"
    return "packed" if code == "flash_attention_2" else "padded"


def use_layout(policy: Policy, layout: Layout) -> None:
    """Set `policy.layout`, and the attention code that it needs."""
    if layout == "prefix_shared":
        policy.base.set_attn_implementation(packed_attention.register())
    policy.layout = layout


def _can_share(policy: Policy, groups: Groups) -> bool:
    """Whether the two longest groups have the hidden states that their sequences have alone."""
    longest = tokens_of(groups, "prefix_shared").argsort(kind="stable")[-2:]
    computed = policy.compute_dtype if policy.sharded else policy.base.dtype  # without autocast
    dtype = str(computed).removeprefix("torch.")
    error = policy.packing_error([groups[int(index)] for index in longest])
    return error <= _ROUNDING[dtype]


def _savings(groups: Groups, layout: Layout) -> str:
    """What a layout leaves out of padded rows, each group padded alone."""
    padded, flat, packed = (
        int(tokens_of(groups, each).sum()) for each in ("padded", "packed", layout)
    )
    shared = (
        f", {(flat - packed) / padded:.0%} by sharing prompts" if layout == "prefix_shared" else ""
    )
    return (
        f"tokens: {packed:,} in packed rows instead of {padded:,}; "
        f"{(padded - flat) / padded:.0%} saved by leaving out padding{shared}"
    )
