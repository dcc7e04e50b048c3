"""Opponents of Nash-MD: completions that the mixture of policy and reference draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, ExitStack

import torch

from fastpref.data.pairs import draw_key
from fastpref.data.prompts import Prompt
from fastpref.model.policy import Policy
from fastpref.online.mixture import sample_mixture
from fastpref.rounds.artifacts import RoundFiles, Row
from fastpref.rounds.sampling import (
    Draw,
    Drawn,
    Engine,
    Place,
    Request,
    drawn,
    missing_batches,
    sample,
)
from fastpref.rounds.session import Session

KIND = "opponents"  # name of the file


class MixtureEngine:
    """Policy and reference in memory; a shard is one batch of prompts of similar length.

    around: context manager in which `reference` is the reference.
    """

    def __init__(
        self,
        session: Session,
        mixture: float,
        reference: Policy,
        around: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._session, self._mixture = session, mixture
        self._reference, self._around = reference, around

    def draw(
        self, requests: Sequence[Request], complete: AbstractSet[Place]
    ) -> Iterator[list[Drawn]]:
        policy, ends = self._session.policy, self._session.ends
        options = self._session.rounds.sampling
        was_training = policy.training
        policy.eval()
        for batch in missing_batches(requests, complete, options.batch_size):
            sequences = sample_mixture(
                policy,
                self._reference,
                [request.prompt for request in batch],
                ends,
                mixture=self._mixture,
                max_new_tokens=options.max_new_tokens,
                batch_size=len(batch),
                generator=torch.Generator(policy.device).manual_seed(batch[0].seed),
                around=self._around,
            )
            yield [
                drawn(request.place, tokens, ends)
                for request, tokens in zip(batch, sequences, strict=True)
            ]
        policy.train(was_training)


def draw_opponents(
    session: Session,
    mixture: float,
    files: RoundFiles,
    key: str,
    prompts: Sequence[Prompt],
    check: Callable[[], None],
) -> list[Row]:
    """Read the opponents of a round from their file, or draw them; as many as there are samples.

    check: called after each batch; it may end the run.
    """
    options = session.rounds.sampling
    seed = draw_key(options.seed, KIND, files.number)  # not the random numbers of the samples
    draw = Draw(files, KIND, key, prompts, options.samples, seed)
    with ExitStack() as stack:

        def engine() -> Engine:
            reference, around = stack.enter_context(session.reference.partner())
            return MixtureEngine(session, mixture, reference, around)

        return sample(draw, engine, session.tokenizer, session.display, check)


def preferences(
    scores: Sequence[Sequence[float]], opponents: Sequence[Sequence[float]]
) -> list[list[float]]:
    """Probability of each completion to beat an opponent of its prompt, by rewards.

    The mean of σ(r − r') over the opponents.
    """
    return [
        [float(torch.sigmoid(value - torch.tensor(others, dtype=torch.float64)).mean())
         for value in values]
        for values, others in zip(scores, opponents, strict=True)
    ]  # fmt: skip
