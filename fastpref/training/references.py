"""References of a run by their mode, and what the first step of a run can give them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastpref import distributed
from fastpref.config import Config
from fastpref.data.batch_plan import Plan
from fastpref.data.dataset import Groups
from fastpref.losses import Objective, TokenLevelLoss
from fastpref.model.batch_layout import use_layout
from fastpref.model.policy import Policy
from fastpref.model.reference_policy import (
    AdapterReference,
    FrozenReference,
    Reference,
    cached_reference,
    no_reference,
)
from fastpref.utils.progress import Display

# Takes groups, their plan, and whether the first step of the plan may compute what it needs.
MakeReference = Callable[[Groups, Plan, bool], Reference]


def make_references(
    config: Config,
    policy: Policy,
    loss: Objective,
    load_copy: Callable[[], Policy],
    display: Display,
) -> MakeReference:
    """Return a function that makes the reference of a data set; a frozen copy is shared."""
    mode = config.reference_mode
    if mode == "none":
        return lambda groups, plan, first_step: no_reference
    if mode == "cached":
        cache = Path(config.data.cache).expanduser()
        per_token = isinstance(loss, TokenLevelLoss)
        has_same_bits = gives_reference(config, policy, loss)
        return lambda groups, plan, first_step: cached_reference(
            policy, groups, plan, cache, display, per_token, first_step and has_same_bits
        )
    reference: Reference = AdapterReference(policy)
    if mode == "frozen":
        copy = load_copy()
        use_layout(copy, policy.layout)
        if policy.trunk is None:
            copy.use_transformers(policy.not_fused)
        reference = FrozenReference(copy)
    return lambda groups, plan, first_step: reference


def gives_reference(config: Config, policy: Policy, loss: Objective) -> bool:
    """Whether log-probs of the first step have the bits of a pass of the reference before it.

    The explicit blocks compute the same in training as without gradients, and on one CPU process
    each group has its own pass. Calibration and the band monitor take the log-probs from a pass
    that computes scores, too.
    """
    has_plain_passes = config.calibration is None and config.monitor.band_every is None
    return (
        policy.trunk is not None
        and policy.separates_groups
        and distributed.world_size() == 1
        and has_plain_passes
        and not isinstance(loss, TokenLevelLoss)
    )
