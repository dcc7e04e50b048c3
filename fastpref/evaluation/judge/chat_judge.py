"""A chat model as judge: every pair is asked in both orders, several questions at a time."""

from __future__ import annotations

import itertools
import json
import queue
import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastpref.evaluation.judge.cache import Cache
from fastpref.evaluation.judge.endpoint import Endpoint
from fastpref.evaluation.judge.pairs import Pair
from fastpref.evaluation.judge.template import Reply, fill, verdict
from fastpref.evaluation.judge.verdicts import Game, Judged, of_games, of_preference
from fastpref.utils.atomic_files import sha256
from fastpref.utils.progress import Display


class _Question(NamedTuple):
    key: str
    text: str
    name: str


@dataclass(frozen=True)
class ChatJudge:
    """A chat model that is asked about every pair in both orders."""

    endpoint: Endpoint
    template: str
    workers: int = 8  # questions at a time

    positional = True

    @property
    def name(self) -> str:
        return self.endpoint.model

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the answers."""
        return {"model": self.name, "body": self.endpoint.body, "template": self.template}

    def judge(self, pairs: list[Pair], cache: Cache, display: Display) -> list[Judged]:
        """Ask about all pairs except those of identical answers, which are ties.

        Answers in the cache are not asked for again, and new ones are added to it one by one.

        Raises UserError if the endpoint fails; the cache then holds all answers so far.
        """
        asked = [self._questions(pair) for pair in pairs]
        distinct = {
            question.key: question
            for pair, questions in zip(pairs, asked, strict=True)
            for question in questions
            if not pair.is_identical
        }
        pending = [question for key, question in distinct.items() if key not in cache.records]
        display.phase("judge", len(distinct), len(distinct) - len(pending))
        _ask(pending, self.endpoint, cache, self.workers, display, len(distinct) - len(pending))
        return [
            of_preference(pair, 0.5)
            if pair.is_identical
            else of_games(pair, (_game(cache, questions[0]), _game(cache, questions[1])))
            for pair, questions in zip(pairs, asked, strict=True)
        ]

    def _questions(self, pair: Pair) -> tuple[_Question, _Question]:
        """Questions with the baseline's answer first, and with the model's answer first."""
        return self._question(pair, pair.b, pair.a), self._question(pair, pair.a, pair.b)

    def _question(self, pair: Pair, first: str, second: str) -> _Question:
        prompt = pair.question.text
        body = json.dumps(self.endpoint.body, sort_keys=True)
        return _Question(
            sha256("chat", self.name, body, self.template, prompt, first, second),
            fill(self.template, prompt, first, second),
            pair.question.name,
        )


def _ask(
    questions: list[_Question],
    endpoint: Endpoint,
    cache: Cache,
    workers: int,
    display: Display,
    done: int,
) -> None:
    """Ask `workers` questions at a time, and add each answer to the cache before the next question.

    After a failure no question is begun, but answers to those under way are kept.
    done: number of answers that the cache already has, for the display.
    """
    tasks: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[_Question, Reply | Exception]] = queue.SimpleQueue()
    stop = threading.Event()
    reasons: set[str] = set()

    def note(reason: str) -> None:
        if reason not in reasons:
            reasons.add(reason)
            display.note(f"judge: {reason}; trying again")

    def work() -> None:
        while (question := tasks.get()) is not None:
            try:
                results.put((question, endpoint.ask(question.text, question.name, stop, note)))
            except Exception as error:  # raised in the main thread
                results.put((question, error))

    waiting = iter(questions)
    under_way = min(workers, len(questions))
    for question in itertools.islice(waiting, under_way):
        tasks.put(question)
        # Daemons do not keep an interrupted process alive.
        threading.Thread(target=work, daemon=True).start()
    failure: Exception | None = None
    while under_way:
        question, reply = results.get()
        if isinstance(reply, Reply):
            cache.add(question.key, {"model": endpoint.model, **reply._asdict()})
            done += 1
            display.advance(done)
        elif failure is None:
            failure = reply
            stop.set()
        # A worker gets its next question after its answer is on disk: a kill loses no more answers
        # than there are workers.
        following = None if failure else next(waiting, None)
        tasks.put(following)
        under_way -= following is None
    if failure is not None:
        raise failure


def _game(cache: Cache, question: _Question) -> Game:
    record = cache.records[question.key]
    reply = Reply(record["text"], record["finish_reason"])
    return Game(verdict(reply), reply.text)
