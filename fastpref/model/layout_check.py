"""Checks of single sequences and padded rows, on the layers that a policy runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastpref.data.collate import collate
from fastpref.data.dataset import TokenGroup
from fastpref.utils.errors import ModelError

if TYPE_CHECKING:
    from fastpref.model.policy import Policy

# Largest relative change of a hidden state that rounding explains where no input has changed:
# experts compute their tokens together, and their number may change.
_UNCHANGED = {torch.bfloat16: 0.02}
_TOKENS = 12


def check_causal(policy: Policy) -> None:
    """Raise ModelError if another last token changes the hidden states of the tokens before it."""
    rows = policy.vocabulary
    ids = torch.arange(1, _TOKENS + 1, device=policy.device).remainder(rows)[None]
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + rows // 2) % rows
    trunk = policy.base.base_model
    before, after = (
        trunk(input_ids=tokens, use_cache=False).last_hidden_state[0, :-1]
        for tokens in (ids, other)
    )
    change = relative_error(after, before)
    if not change <= _UNCHANGED.get(before.dtype, 1e-4):
        raise ModelError(
            f"model: {type(policy.base).__name__} is not causal: another last token changes the "
            f"hidden states of the tokens before it by {change:.2g}; set is_decoder in its "
            "config, or use another model"
        )


def padding_error(policy: Policy, groups: Sequence[TokenGroup]) -> float:
    """`relative_error` of hidden states that predict labels, in padded rows and single ones."""
    padded = _predictors(policy, groups)
    alone = [
        _predictors(policy, [replace(group, responses=(response,))])
        for group in groups
        for response in group.responses
    ]
    return relative_error(padded, torch.cat(alone))


def _predictors(policy: Policy, groups: Sequence[TokenGroup]) -> Tensor:
    """Hidden states (T, D) that predict the labels, in padded rows, group by group."""
    plain = [replace(group, labels=None, token_weights=None, mask=None) for group in groups]
    batch = collate(plain, "pointwise", "padded").to(policy.device)
    return policy.hidden_states(batch).index_select(0, batch.predictor_positions)


def relative_error(states: Tensor, expected: Tensor) -> float:
    """Largest of ‖h_t - h'_t‖ / ‖h'_t‖ of hidden states (T, D).

    In half precision the 0.9 quantile of the tokens: rounding may choose other experts for a token
    that is nearly tied, which changes all of its hidden state. The norm of a padding token's hidden
    state may be 0, and counts as a millionth of the largest.
    """
    wide = torch.promote_types(expected.dtype, torch.float32)
    difference = (states.to(wide) - expected.to(wide)).norm(dim=-1)
    norms = expected.to(wide).norm(dim=-1)
    errors = difference / norms.clamp_min(1e-6 * norms.max().item() or 1.0)
    # A quantile of NaN is NaN.
    return (errors.quantile(0.9) if expected.dtype == torch.bfloat16 else errors.max()).item()
