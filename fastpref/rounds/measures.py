"""Measurements of a round: scores on held-out prompts against the start, entropy, KL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fastpref.data.dataset import TokenGroup
from fastpref.data.tokenize import chunks
from fastpref.losses import Kind
from fastpref.model.policy import ForwardOptions, Policy
from fastpref.rounds.artifacts import Row
from fastpref.rounds.reference import RoundReference

_CHUNK = 8  # completions of a micro-batch


class Completions:
    """The first completion of each prompt, as groups to compute."""

    kind: Kind = "pointwise"

    def __init__(self, samples: Sequence[Row]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> TokenGroup:
        sample = self._samples[index]
        prompt, tokens = (
            np.asarray(ids, dtype=np.int32)
            for ids in (sample["prompt_tokens"], sample["tokens"][0])
        )
        return TokenGroup(index, sample["row"], prompt, (tokens,), (1.0,))


def score_metrics(samples: Sequence[Row], scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """Metrics of scored completions: rewards, lengths in tokens, and the share that is finished."""
    rewards = np.asarray(scores, dtype=np.float64)
    lengths = [len(tokens) for row in samples for tokens in row["tokens"]]
    finished = [flag for row in samples for flag in row["finished"]]
    return {
        "reward": float(rewards.mean()),
        "reward_best": float(rewards.max(axis=1).mean()),
        "reward_std": float(rewards.std(axis=1).mean()),
        "length": float(np.mean(lengths)),
        "finished": float(np.mean(finished)),
    }


def win_rate(scores: Sequence[Sequence[float]], start: Sequence[Sequence[float]]) -> float:
    """Share of prompts whose first completion has a higher score than that of the start; ties ½."""
    new, old = (np.asarray(values, dtype=np.float64)[:, 0] for values in (scores, start))
    return float(((new > old) + 0.5 * (new == old)).mean())


@torch.no_grad()
def policy_metrics(
    policy: Policy, reference: RoundReference, samples: Sequence[Row]
) -> dict[str, float]:
    """Entropy per token, and the KL divergence to the start, nats per completion.

    KL(policy || start) is the sum over the tokens of a completion of the divergence between the
    distributions of the next token, averaged over completions of the policy, at temperature 1. For
    heads with a bias it is the mean of log π - log π_start. It is left out where the start is not
    in memory.
    """
    completions = Completions(samples)
    was_training = policy.training
    policy.eval()
    ours = [
        _outputs(policy(batch, ForwardOptions(entropy=True, head=True)))
        for batch in _batches(policy, completions)
    ]
    entropy, tokens = torch.stack([one.entropy for one in ours]).sum(0).tolist()
    metrics = {"entropy": entropy / tokens}
    has_bias = policy.head()[1] is not None
    with reference.start() as start:
        if start is not None:
            total = 0.0
            for batch, one in zip(_batches(start, completions), ours, strict=True):
                if has_bias:
                    total += float((one.logps - start(batch).logps.double().cpu()).sum())
                    continue
                hidden, weight = one.head
                options = ForwardOptions(reference=(hidden.to(start.device), weight))
                kl = start(batch, options).kl
                total += float(kl.double().sum())
            metrics["kl_to_start"] = total / len(completions)
    policy.train(was_training)
    return metrics


class _Outputs(NamedTuple):
    """Results of the first pass over a batch; the hidden states wait in main memory."""

    entropy: torch.Tensor  # (2,) sum over the tokens and their number
    logps: torch.Tensor  # (B,) nats
    head: tuple[torch.Tensor, torch.Tensor]  # hidden states (T, D) and weight (V, D)


def _outputs(output: Any) -> _Outputs:
    hidden, weight = output.head
    return _Outputs(
        output.entropy.double().cpu(), output.logps.double().cpu(), (hidden.cpu(), weight)
    )


def _batches(policy: Policy, completions: Completions) -> Iterator[Any]:
    for indices in chunks(range(len(completions)), _CHUNK):
        yield from policy.batches(completions, list(indices))
