"""The rounds of one run: prompts → samples → scores → pairs → steps → next.

Every artifact is a file that is named by what determines it, and each round ends with a checkpoint.
A run that was killed anywhere finds the files that are complete, goes on from the newest
checkpoint, and makes the same files again.

All ranks play the same rounds: they share the samples and the steps. Rank 0 alone scores, makes
pairs, and reads and writes the files; the others get its results.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastpref import distributed, metrics
from fastpref.config import ConfigError
from fastpref.data.pairs import Recipe
from fastpref.data.prompts import Prompt
from fastpref.losses.on_policy import NashMD
from fastpref.model.generate import Sampling
from fastpref.rounds import measures, opponents
from fastpref.rounds.artifacts import RoundFiles, Row
from fastpref.rounds.keys import Keys, check_same, prompts_key
from fastpref.rounds.learner import Learner, RoundSamples
from fastpref.rounds.pairing import BUILDS, Pairs, pair
from fastpref.rounds.rank_signals import RankSignals
from fastpref.rounds.sampling import Draw, Engine, MainProcessEngine, TransformersEngine, sample
from fastpref.rounds.scorers import make_scorer
from fastpref.rounds.scoring import Comparer, Scorer, score
from fastpref.rounds.served_weights import ServedWeights
from fastpref.rounds.server import ServerEngine
from fastpref.rounds.session import Session
from fastpref.training import base_weights, checkpoint_files
from fastpref.training.trainer import Trainer
from fastpref.utils.atomic_files import replacing

FILE = "rounds.jsonl"
_INPUTS = "inputs.json"
_EVAL = "eval-"  # prefix of the files of held-out prompts


class Round(NamedTuple):
    """Samples of a round with their scores, and the pairs of these, none for rollouts.

    preferences: for Nash-MD with a mixture, the probability of each sample to beat an opponent.
    """

    samples: list[Row]
    scores: list[list[float]]
    pairs: Pairs
    key: str  # of the pairs, or of the rollouts
    preferences: list[list[float]] | None = None


class Rounds:
    """The rounds of one run, played in order from where its newest checkpoint is."""

    def __init__(
        self,
        session: Session,
        checkpoint: Path | None,
        received: list[int],
        scorer: Callable[[], Scorer | Comparer] | None,
    ) -> None:
        self.session, self.config, self.display = session, session.config, session.display
        self.trainer: Trainer | None = None
        self.checkpoint, self.received = checkpoint, received
        self._signals = RankSignals(received)
        self._current: tuple[int, Round] | None = None
        self.step = 0 if checkpoint is None else checkpoint_files.position(checkpoint)["step"]
        rounds = session.rounds
        is_served = rounds.sampling.engine == "server"
        self._served = ServedWeights(session) if is_served else None
        self._scorer = cache(
            scorer or (lambda: make_scorer(rounds.scorer, self.config.training, self.display))
        )
        self.total_steps = session.steps_per_round * rounds.count
        self._keys = Keys(
            self.config,
            base_weights.fingerprints(self.config),
            session.tokenizer,
            distributed.on_main_process(lambda: self._scorer().fingerprint),
            self.total_steps,
        )
        self._prompt_keys = session.prompt_keys()
        distributed.on_main_process(self._check_inputs)

    def play(self, make_learner: Callable[[Rounds], Learner]) -> Path:
        """Play the rounds that are left, and export the model."""
        rounds, session = self.session.rounds, self.session
        learner = make_learner(self)
        first = -(-self.step // session.steps_per_round)  # 0 before the first step
        self._records: metrics.JsonLines | None = None  # of rank 0
        self._recorded = distributed.on_main_process(self._open_records)
        if self.step == 0:
            self._record(0, {})
        for number in range(max(1, first), rounds.count + 1):
            self.display.note(f"round {number} of {rounds.count}")
            round_ = self.round(number)
            learned = learner.learn(_as_samples(number, round_))
            self.check_signals()
            if number not in self._recorded:
                self._record(number, {**self._metrics(round_), **learned})
        if self._records is not None:
            self._records.close()
        if self._served is not None:
            self._served.close()
        assert self.trainer is not None
        return self.trainer.export()

    def close(self) -> None:
        if self.trainer is not None:
            self.trainer.close()

    def has_taken(self, number: int) -> bool:
        """Whether a step of a round is taken, so that the weights it began with are gone."""
        return self.step > self.first_step(number)

    def files(self, number: int) -> RoundFiles:
        return RoundFiles(self.session.folder, number)

    def first_step(self, number: int) -> int:
        """Steps of the run before a round."""
        return (number - 1) * self.session.steps_per_round

    def check_signals(self) -> None:
        """Raise Interrupted on all ranks if a signal has arrived at any."""
        self._signals.check(self.step)

    def round(self, number: int) -> Round:
        """Samples, scores and pairs of a round, read or made."""
        if self._current is None or self._current[0] != number:
            self._current = number, self._round(number)
        return self._current[1]

    def _round(self, number: int) -> Round:
        session, files = self.session, self.files(number)
        prompts = session.prompts_of(number)
        key = self._keys.samples(
            self._weights(number - 1),
            self._prompt_keys[number - 1],
            session.rounds.sampling.samples,
            session.rounds.sampling.seed + number,
        )
        if self.has_taken(number):
            files.check_is_there("samples", key)
        else:
            distributed.on_main_process(lambda: self._write_prompts(files, prompts, number))
        if isinstance(session.loss, NashMD) and session.loss.of_rollouts:
            return self._against_mixture(files, key, prompts, session.loss.mixture)
        if session.rounds.sampling.samples < 2 and self._is_judged():
            raise ConfigError(
                "rounds.sampling.samples: a scorer of pairs compares the completions of a prompt, "
                "got 1; set 2 or more"
            )
        samples = self._sampled(
            files, "", key, prompts, session.rounds.sampling.samples, number, number - 1
        )
        scores = self._scores_of(files, "", key, samples, None)
        scores_key = self._keys.scores(key)
        if session.loss.of_rollouts:
            return Round(samples, scores, Pairs([], {}), self._keys.rollouts(scores_key))
        recipe = Recipe(
            build=BUILDS[session.rounds.pairs],
            min_gap=session.rounds.min_gap,
            seed=session.rounds.sampling.seed,
        )
        pairs_key = self._keys.pairs(scores_key)
        rows, left_out = distributed.on_main_process(
            lambda: pair(files, pairs_key, samples, scores, recipe)
        )
        return Round(samples, scores, Pairs(rows, left_out), pairs_key)

    def _against_mixture(
        self, files: RoundFiles, key: str, prompts: list[Prompt], mixture: float
    ) -> Round:
        """A round whose samples are compared with those of the mixture of policy and reference."""
        number, options = files.number, self.session.rounds
        count, is_judged = options.sampling.samples, self._is_judged()
        if is_judged and options.scorer.missing_eos_penalty:
            raise ConfigError(
                "rounds.scorer.missing_eos_penalty: would be subtracted from the probabilities "
                "that a scorer of pairs gives nash_md with a mixture; remove it"
            )
        of_opponents = self._keys.opponents(key)
        if self.has_taken(number):
            files.check_is_there(opponents.KIND, of_opponents)
        samples = self._sampled(files, "", key, prompts, count, number, number - 1)
        drawn = opponents.draw_opponents(
            self.session, mixture, files, of_opponents, prompts, self.check_signals
        )
        scores = self._scores_of(files, "", of_opponents, samples, drawn)
        preferences = scores
        if not is_judged:
            theirs = self._scores_of(files, f"{opponents.KIND}-", of_opponents, drawn, None)
            preferences = opponents.preferences(scores, theirs)
        rollouts_key = self._keys.rollouts(self._keys.scores(of_opponents))
        return Round(samples, scores, Pairs([], {}), rollouts_key, preferences)

    def _sampled(
        self,
        files: RoundFiles,
        prefix: str,
        key: str,
        prompts: list[Prompt],
        count: int,
        seed: int,
        weights: int,
    ) -> list[Row]:
        """Completions of prompts by the policy as it is after round `weights`."""
        session = self.session
        draw = Draw(
            files,
            f"{prefix}samples",
            key,
            prompts,
            count,
            session.rounds.sampling.seed + seed,
        )
        engine = partial(self._engine, weights)
        return sample(draw, engine, session.tokenizer, self.display, self.check_signals)

    def _scores_of(
        self,
        files: RoundFiles,
        prefix: str,
        key: str,
        samples: list[Row],
        others: list[Row] | None,
    ) -> list[list[float]]:
        """Scores of completions; a judge compares them with the others, if there are any."""
        return self._signals.on_main_process(
            self.step,
            lambda check: score(
                files,
                f"{prefix}scores",
                self._keys.scores(key),
                samples,
                self._scorer,
                self.session.rounds.scorer.missing_eos_penalty,
                self.display,
                check,
                others,
            ),
        )

    def _is_judged(self) -> bool:
        """Whether the scorer compares completions; it is in the memory of rank 0."""
        return distributed.on_main_process(lambda: isinstance(self._scorer(), Comparer))

    def _write_prompts(self, files: RoundFiles, prompts: list[Prompt], number: int) -> None:
        key = self._prompt_keys[number - 1]
        if not files.path("prompts", key).exists():
            rows = [
                {"row": p.row, "prompt": p.text.prompt, **p.text.template_columns} for p in prompts
            ]
            files.write("prompts", key, rows)

    def _engine(self, weights: int) -> Engine:
        session, options = self.session, self.session.rounds.sampling
        if self._served is not None:
            served = self._served
            served.update(self._weights(weights))
            engine = ServerEngine(
                options, served.protocol, served.weights, served.give, self.display.note
            )
            return MainProcessEngine(engine)
        sampling = Sampling(
            temperature=options.temperature,
            top_p=options.top_p,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            engine="transformers",
        )
        return TransformersEngine(session.policy, session.ends, sampling)

    def _weights(self, number: int) -> str:
        return self._keys.weights(number, self._prompt_keys)

    def _record(self, number: int, values: dict[str, Any]) -> None:
        """Measure the policy after a round, 0 for the start, and write its line."""
        step = number * self.session.steps_per_round
        record = {"round": number, "step": step, **values, **self._evaluation(number)}
        if self._records is not None:
            self._records.log(record)
        self.display.note(_line(record))

    def _open_records(self) -> list[int]:
        """Open the file of the rounds, and return those that it has."""
        path = self.session.folder / FILE
        self._records = metrics.JsonLines(path, self.step)
        return [record["round"] for record in metrics.iter_records(path)]

    def _evaluation(self, number: int) -> dict[str, float]:
        """Metrics on the held-out prompts of the policy as it is after a round."""
        held_out = self.session.prompts.held_out
        if not held_out:
            return {}
        samples, scores = self._held_out(number)
        values = measures.score_metrics(samples, scores)
        result = {
            "eval_reward": values["reward"],
            "eval_length": values["length"],
            "eval_finished": values["finished"],
        }
        if number:
            result["eval_win_rate"] = measures.win_rate(scores, self._held_out(0)[1])
        return result | measures.policy_metrics(
            self.session.policy, self.session.reference, samples
        )

    def _held_out(self, number: int) -> tuple[list[Row], list[list[float]]]:
        """Samples of the held-out prompts after a round, and their scores."""
        prompts, files = self.session.prompts.held_out, self.files(number)
        seed = self.session.rounds.sampling.seed
        key = self._keys.samples(self._weights(number), prompts_key(prompts), 1, seed)
        if self.has_taken(number + 1):
            files.check_is_there(f"{_EVAL}samples", key)
        samples = self._sampled(files, _EVAL, key, prompts, 1, 0, number)
        # A judge compares each round with the start, and the start with itself.
        others = self._held_out(0)[0] if number else samples
        return samples, self._scores_of(files, _EVAL, key, samples, others)

    def _metrics(self, round_: Round) -> dict[str, Any]:
        pairs = round_.pairs.rows
        values = measures.score_metrics(round_.samples, round_.scores)
        values["prompts"] = len(round_.samples)
        if round_.preferences is not None:
            values["preference"] = float(np.mean(round_.preferences))
        if self.session.loss.of_rollouts:
            return values
        gaps = [row["score_chosen"] - row["score_rejected"] for row in pairs]
        return {
            **values,
            "pairs": len(pairs),
            "without_pair": sum(round_.pairs.left_out.values()),
            "score_gap": sum(gaps) / len(gaps) if gaps else 0.0,
        }

    def _check_inputs(self) -> None:
        """Compare what decides the files with what the run began with."""
        path = self.session.folder / "rounds" / _INPUTS
        inputs = json.loads(json.dumps(self._keys.inputs))
        if self.step and path.exists():
            check_same(json.loads(path.read_text(encoding="utf-8")), inputs, path.parent)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(inputs, indent=1) + "\n", encoding="utf-8")


def _as_samples(number: int, round_: Round) -> RoundSamples:
    samples = round_.samples
    return RoundSamples(
        number,
        [row["prompt_tokens"] for row in samples],
        [row["tokens"] for row in samples],
        [row["completions"] for row in samples],
        [row["finished"] for row in samples],
        torch.tensor(round_.preferences or round_.scores, dtype=torch.float64),
    )


def _line(record: dict[str, Any]) -> str:
    """One line about a round for the terminal."""
    names = ("reward", "pairs", "eval_reward", "eval_win_rate", "eval_length", "entropy")
    parts = [f"{name} {record[name]:.4g}" for name in (*names, "kl_to_start") if name in record]
    return f"after round {record['round']}: {', '.join(parts) or 'nothing measured'}"
