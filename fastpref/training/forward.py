"""Forward passes of a micro-batch through policy and reference, as the objective takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref import losses
from fastpref.config import ConfigError
from fastpref.data.collate import Batch, join
from fastpref.losses import Logps, Objective, TokenLevelLoss
from fastpref.model.policy import NO_SCORES, ForwardOptions, Policy, PolicyOutput, ScoreOptions
from fastpref.model.reference_policy import FirstStepReference, Reference
from fastpref.model.token_importance import importance
from fastpref.ops import ScoreGeometry
from fastpref.ops.cpu import calls_alive


class MicroBatchLogps(NamedTuple):
    """Log-probs of a micro-batch of B pairs, S responses or G groups."""

    policy: Logps
    reference: Logps | None
    entropy: Tensor | None  # (2,) sum over tokens, and their number
    score_sums: Tensor | None  # (2, rows, D) sums over its pairs, `ops.linear_logps_and_scores`
    geometry: ScoreGeometry | None  # (B,) of each pair's scores of the head's weight


class Forward:
    """Compute log-probs, and the columns that a token-level objective needs of each token.

    Raises ConfigError for a divergence of heads with a bias, and for gradients of the objective's
    own on a sharded model.
    """

    def __init__(self, loss: Objective, policy: Policy) -> None:
        self._loss, self._policy = loss, policy
        self._columns = loss.columns if isinstance(loss, TokenLevelLoss) else ()
        if "importance" in self._columns and policy.sharded:
            raise ConfigError(
                f"loss: {loss.name} takes gradients of its own in every forward pass, which a "
                "sharded model does not give; set parallel.shard=1"
            )
        if "kl" in self._columns and policy.base.get_output_embeddings().bias is not None:
            raise ConfigError(
                f"loss: {loss.name} measures a KL divergence, which is not implemented for heads "
                f"with a bias such as that of {type(policy.base).__name__}; choose another "
                "objective"
            )

    def __call__(
        self,
        batches: Sequence[Batch],
        reference: Reference,
        with_entropy: bool = False,
        scores: ScoreOptions = NO_SCORES,
    ) -> MicroBatchLogps:
        """Run one forward pass for each batch and join the results."""
        references = [reference(batch) for batch in batches]
        with calls_alive(len(batches)):
            outputs, score_sums = [], None
            for batch, ref in zip(batches, references, strict=True):
                output = self._pass(batch, ref, with_entropy, scores)
                score_sums = _added(score_sums, output.score_sums)
                outputs.append(output._replace(score_sums=None))
        if isinstance(reference, FirstStepReference):
            references = [
                ref or reference.take(batch, output)
                for batch, ref, output in zip(batches, references, outputs, strict=True)
            ]
        policy_views = [self._view(*pair) for pair in zip(batches, outputs, strict=True)]
        reference_views = [
            self._view(batch, ref) for batch, ref in zip(batches, references, strict=True) if ref
        ]
        entropies = [output.entropy for output in outputs if output.entropy is not None]
        geometries = [output.geometry for output in outputs if output.geometry is not None]
        return MicroBatchLogps(
            join(policy_views),
            join(reference_views) if reference_views else None,
            torch.stack(entropies).sum(0) if entropies else None,
            score_sums,
            ScoreGeometry(*map(torch.cat, zip(*geometries, strict=True))) if geometries else None,
        )

    def _pass(
        self,
        batch: Batch,
        reference: PolicyOutput | None,
        with_entropy: bool,
        scores: ScoreOptions,
    ) -> PolicyOutput:
        columns: dict[str, Any] = {}
        if "importance" in self._columns:
            columns["importance"] = importance(self._policy, batch)

        def token_weights(output: PolicyOutput) -> Tensor | None:
            policy_view = self._view(batch, output._replace(**columns))
            reference_view = None if reference is None else self._view(batch, reference)
            return losses.pair_incentives(self._loss, policy_view, reference_view)[2]

        if isinstance(self._loss, TokenLevelLoss):
            scores = replace(scores, weights=token_weights)
        output: PolicyOutput = self._policy(
            batch,
            ForwardOptions(
                entropy=with_entropy,
                collision_entropy="collision_entropy" in self._columns,
                reference=reference.head if reference and "kl" in self._columns else None,
                scores=scores,
            ),
        )
        return output._replace(**columns)

    def _view(self, batch: Batch, output: PolicyOutput) -> Logps:
        if not isinstance(self._loss, TokenLevelLoss):
            return batch.view(output.logps)
        columns = {name: getattr(output, name) for name in self._columns}
        return batch.token_view(output.token_logps, **columns)


def _added(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """total + more, in place; either may be missing."""
    return more if total is None or more is None else total.add_(more)
