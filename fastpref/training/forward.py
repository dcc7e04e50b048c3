"""One micro-batch through policy and reference: what the objective of a run sees of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref import losses
from fastpref.config import ConfigError
from fastpref.data.collate import Batch, join
from fastpref.losses import Logps, TokenLevelLoss
from fastpref.model.policy import ForwardOptions, Policy, PolicyOutput
from fastpref.model.reference_policy import Reference
from fastpref.model.token_importance import importance
from fastpref.ops import ScoreGeometry
from fastpref.ops.cpu import calls_alive


class MicroBatchLogps(NamedTuple):
    """A micro-batch of B pairs, S responses or G groups."""

    policy: Logps
    reference: Logps | None
    entropy: Tensor | None  # (2,) sum over tokens, and their number
    geometry: ScoreGeometry | None  # (B,) of the scores of the head's weight


class Forward:
    """Log-probs, and what else an objective wants to know of each token.

    Raises ConfigError for an objective that measures a divergence of heads with a bias.
    """

    def __init__(self, loss: Any, policy: Policy) -> None:
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
        with_geometry: bool = False,
    ) -> MicroBatchLogps:
        """One forward pass for each batch, joined."""
        known = [reference(batch) for batch in batches]
        with calls_alive(len(batches)):
            outputs = [
                self._pass(batch, ref, with_entropy, with_geometry)
                for batch, ref in zip(batches, known, strict=True)
            ]
        views = [self._view(*pass_) for pass_ in zip(batches, outputs, strict=True)]
        ref_views = [
            self._view(batch, ref) for batch, ref in zip(batches, known, strict=True) if ref
        ]
        entropies = [output.entropy for output in outputs if output.entropy is not None]
        geometries = [output.geometry for output in outputs if output.geometry is not None]
        return MicroBatchLogps(
            join(views),
            join(ref_views) if ref_views else None,
            torch.stack(entropies).sum(0) if entropies else None,
            ScoreGeometry(*map(torch.cat, zip(*geometries, strict=True))) if geometries else None,
        )

    def _pass(
        self, batch: Batch, known: PolicyOutput | None, with_entropy: bool, with_geometry: bool
    ) -> PolicyOutput:
        columns: dict[str, Any] = {}
        if "importance" in self._columns:
            columns["importance"] = importance(self._policy, batch)

        def score_weights(output: PolicyOutput) -> Tensor | None:
            view = self._view(batch, output._replace(**columns))
            reference = None if known is None else self._view(batch, known)
            return losses.pair_incentives(self._loss, view, reference)[2]

        output: PolicyOutput = self._policy(
            batch,
            ForwardOptions(
                entropy=with_entropy,
                collision_entropy="collision_entropy" in self._columns,
                reference=known.head if known and "kl" in self._columns else None,
                score_weights=score_weights if with_geometry else None,
            ),
        )
        return output._replace(**columns)

    def _view(self, batch: Batch, output: PolicyOutput) -> Logps:
        if not isinstance(self._loss, TokenLevelLoss):
            return batch.view(output.logps)
        columns = {name: getattr(output, name) for name in self._columns}
        return batch.token_view(output.token_logps, **columns)
