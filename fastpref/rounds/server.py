"""Samples from servers, which get and return token ids.

Requests go to the server with the fewest open ones. A failure that may pass, and a wait that is too
long, send the request to another server; the server that failed rests, twice as long each time. A
sample is known by its place, so an answer that comes twice counts once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from fastpref.config import RoundSampling
from fastpref.evaluation.judge.endpoint import Failure, Refusal
from fastpref.rounds.protocol import Lost, ServerProtocol, Weights
from fastpref.rounds.sampling import Drawn, Place, Request
from fastpref.utils.errors import UserError

FIRST_REST, LONGEST_REST = 1.0, 60.0  # seconds
RETRIES = 8  # failures of a request, on any servers, before the run ends
_POLL = 0.5  # seconds between two looks at the signals
_RETRY = "check the servers, then run the same command with resume=auto; it continues"


@dataclass
class Server:
    """A server, its open requests, and how long it rests after failures."""

    url: str
    open: int = 0
    failures: int = 0  # in a row
    rests_until: float = 0.0  # by `time.monotonic`
    given: int = 0  # times that it got the weights of the round again
    giving: threading.Lock = field(default_factory=threading.Lock)

    def failed(self, wait: float) -> bool:
        """Let the server rest, at least as long as it asks for.

        Returns whether this is its first failure after a success. Requests that are open together
        fail together, which counts once.
        """
        now = time.monotonic()
        is_new = self.rests_until <= now
        if is_new:
            self.rests_until = now + min(LONGEST_REST, FIRST_REST * 2**self.failures)
            self.failures += 1
        self.rests_until = max(self.rests_until, now + wait)
        return is_new and self.failures == 1


@dataclass
class Task:
    """A request on its way, with what went wrong so far."""

    request: Request
    failures: list[str] = field(default_factory=list)


class ServerEngine:
    """Completions from servers that have the weights of the round.

    give: gives them to one server that has lost them.
    """

    def __init__(
        self,
        options: RoundSampling,
        protocol: ServerProtocol,
        weights: Weights,
        give: Callable[[str], None],
        note: Callable[[str], object],
    ) -> None:
        self._options, self._protocol, self._weights = options, protocol, weights
        self._give, self._note = give, note
        self._servers = [Server(url) for url in options.servers]
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def draw(
        self, requests: Sequence[Request], complete: AbstractSet[Place]
    ) -> Iterator[list[Drawn]]:
        """Yield what has arrived every half a second, possibly nothing; raises UserError."""
        tasks: queue.Queue[Task] = queue.Queue()
        answers: queue.Queue[Drawn | BaseException] = queue.Queue()
        missing = [request for request in requests if request.place not in complete]
        for request in missing:
            tasks.put(Task(request))
        self._stop.clear()
        count = min(len(missing), self._options.batch_size)
        for _ in range(count):
            # Threads of a pool would be waited for at the end of the process.
            threading.Thread(target=self._work, args=(tasks, answers), daemon=True).start()
        left = {request.place for request in missing}
        try:
            while left:
                arrived = _arrived(answers)
                for one in arrived:
                    if isinstance(one, BaseException):
                        raise one
                fresh = {one.place: one for one in arrived if isinstance(one, Drawn)}
                left -= fresh.keys()
                yield list(fresh.values())
        finally:
            self._stop.set()

    def _work(self, tasks: queue.Queue[Task], answers: queue.Queue[Drawn | BaseException]) -> None:
        """Send requests until there are none, in a thread of its own."""
        while not self._stop.is_set():
            try:
                task = tasks.get(timeout=_POLL)
            except queue.Empty:
                continue
            try:
                answer = self._try(task)
            except BaseException as error:  # the thread that draws raises it
                answers.put(error)
                return
            if answer is None:
                tasks.put(task)
            else:
                answers.put(answer)

    def _try(self, task: Task) -> Drawn | None:
        """Send a request once; None after a failure that may pass."""
        server = self._take()
        if server is None:
            return None
        wait, given = 0.0, server.given
        try:
            answer = self._protocol.complete(server.url, self._weights, task.request)
        except Failure as failure:
            reason, wait = str(failure), failure.wait
        except Lost as lost:
            reason, wait = self._give_again(server, given, str(lost))
        except Refusal as refusal:
            raise UserError(
                f"rounds.sampling.servers: {server.url} refused a request ({refusal}); fix "
                "rounds.sampling, or the options of the server"
            ) from None
        else:
            with self._lock:
                server.open -= 1
                server.failures = 0
            return answer
        with self._lock:
            server.open -= 1
            is_first = server.failed(wait)
        task.failures.append(f"{server.url}: {reason}")
        if len(task.failures) > RETRIES:
            raise UserError(
                f"rounds.sampling.servers: a request failed {len(task.failures)} times "
                f"({task.failures[-1]}); {_RETRY}"
            )
        if is_first:
            self._note(f"{task.failures[-1]}; its requests are sent again")
        return None

    def _give_again(self, server: Server, given: int, reason: str) -> tuple[str, float]:
        """Give the weights to a server that has lost them, unless another request just did.

        given: number of times that it had got them again when the request was sent. Returns the
        reason of the failure, and how long the server asks to wait.
        """
        with server.giving:
            if server.given == given and not self._stop.is_set():
                try:
                    self._give(server.url)
                except Failure as failure:
                    return f"{reason}; it does not take them: {failure}", failure.wait
                server.given += 1
        return reason, 0.0

    def _take(self) -> Server | None:
        """The server with the fewest open requests that does not rest; None at the end."""
        while not self._stop.is_set():
            with self._lock:
                now = time.monotonic()
                awake = [server for server in self._servers if server.rests_until <= now]
                if awake:
                    server = min(awake, key=lambda each: each.open)
                    server.open += 1
                    return server
                pause = min(server.rests_until for server in self._servers) - now
            self._stop.wait(min(max(pause, 0.0), _POLL))
        return None


def _arrived(answers: queue.Queue[Any]) -> list[Any]:
    """Items of a queue, after waiting a moment for the first."""
    arrived = []
    try:
        arrived.append(answers.get(timeout=_POLL))
        while True:
            arrived.append(answers.get_nowait())
    except queue.Empty:
        return arrived
