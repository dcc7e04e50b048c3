"""Log-probs in the form that an objective takes: pairs, tokens of pairs, responses or groups."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fastpref import ops
from fastpref.fused.scored_tokens import ScoredTokens
from fastpref.fused.validation import Given
from fastpref.logps import GroupedLogps, SequenceLogps, TokenLogps, UnpairedLogps
from fastpref.losses import GroupwiseLoss, Logps, Objective, PointwiseLoss, TokenLevelLoss
from fastpref.ops.bounds import offsets_in_range
from fastpref.ops.checks import check_offsets


def policy_view(
    objective: Objective,
    token_logps: Tensor,  # (T,)
    tokens: ScoredTokens,
    given: Given,
    columns: Given,  # kl and collision_entropy, (T,), where the objective asks for them
) -> Logps:
    """The policy's log-probs as the objective takes them, with its other arguments.

    Raises ValueError, as the classes of `fastpref.logps` do, for a wrong shape or dtype.
    """
    if isinstance(objective, TokenLevelLoss):
        return TokenLogps(
            token_logps,
            tokens.cu_seqlens,
            preference=given["preference"],
            weights=given["token_weights"],
            importance=given["importance"],
            **columns,
        )
    logps = ops.segment_sum(token_logps, tokens.cu_seqlens)
    if isinstance(objective, PointwiseLoss):
        desirable = given["desirable"]
        assert desirable is not None
        return UnpairedLogps(logps, tokens.lengths, desirable)
    if isinstance(objective, GroupwiseLoss):
        cu_groups, scores = given["cu_groups"], given["scores"]
        assert cu_groups is not None and scores is not None
        check_offsets(cu_groups, logps, "cu_groups")
        cu_groups = offsets_in_range(cu_groups, len(logps), "cu_groups", "responses")
        return GroupedLogps(logps, tokens.lengths, cu_groups, scores)
    return SequenceLogps.from_sequences(logps, tokens.lengths, given["preference"])


def reference_view(policy: Logps, logps: Tensor, tokens: ScoredTokens) -> Logps:
    """The reference's log-probs in the form of the policy's: per token (T,), or sums (S,)."""
    if isinstance(policy, TokenLogps):
        return TokenLogps(logps, policy.cu_seqlens)
    if isinstance(policy, SequenceLogps):
        return SequenceLogps.from_sequences(logps, tokens.lengths)
    return replace(policy, logps=logps)
