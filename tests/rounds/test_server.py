"""Samples from servers that speak the protocol of vLLM, and that fail."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastpref.config import RoundSampling
from fastpref.rounds import openai_protocol, protocol, server
from fastpref.rounds.openai_protocol import OpenAIProtocol
from fastpref.rounds.protocol import Weights
from fastpref.rounds.sampling import Drawn, Request
from fastpref.utils.errors import UserError
from tests.helpers.completion_server import serving

END = 2


def complete(prompt: list[int], seed: int) -> list[int]:
    """Tokens that depend on the prompt and the seed; two of three completions end."""
    draw = random.Random(f"{prompt} {seed}")
    tokens = [draw.randrange(3, 50) for _ in range(draw.randint(1, 5))]
    return [*tokens, END] if seed % 3 else tokens


WEIGHTS = Weights("weights", Path("folder"), is_adapter=True)
REQUESTS = [Request((k // 3, k % 3), [7, k // 3 + 3], 100 + k) for k in range(15)]


def options(*urls: str, timeout: float = 5.0) -> RoundSampling:
    return RoundSampling(
        engine="server", servers=list(urls), max_new_tokens=8, batch_size=4, timeout=timeout
    )


def engine_of(
    *urls: str,
    timeout: float = 5.0,
    give: Callable[[str], None] = print,
    note: Callable[[str], object] = print,
) -> server.ServerEngine:
    sampling = options(*urls, timeout=timeout)
    return server.ServerEngine(sampling, OpenAIProtocol(sampling, {END}), WEIGHTS, give, note)


def drawn_from(
    *urls: str, timeout: float = 5.0, give: list[str] | None = None, notes: list[str] | None = None
) -> list[Drawn]:
    given = [] if give is None else give
    told = [] if notes is None else notes
    engine = engine_of(*urls, timeout=timeout, give=given.append, note=told.append)
    return [one for shard in engine.draw(REQUESTS, set()) for one in shard]


def expected() -> dict[tuple[int, int], list[int]]:
    return {r.place: complete(r.prompt, r.seed)[:8] for r in REQUESTS}


def test_every_sample_comes_once_though_servers_die_wait_and_answer_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "FIRST_REST", 0.01)
    bad = ["die", "slow", "busy", "answer", "die"]
    notes: list[str] = []
    with (
        serving(complete, lambda n: bad[n] if n < len(bad) else "twice") as first,
        serving(complete, lambda n: "slow" if n == 1 else "twice") as second,
    ):
        for each in (first, second):
            each.loaded.append(("weights", "folder"))
        drawn = drawn_from(first.url, second.url, timeout=0.3, notes=notes)
    assert sorted(one.place for one in drawn) == [r.place for r in REQUESTS]
    assert {one.place: one.tokens for one in drawn} == expected()
    assert all(one.finished == (one.tokens[-1] == END) for one in drawn)
    assert min(len(first.requests), len(second.requests)) > 0
    assert any("its requests are sent again" in note for note in notes)


def test_a_server_that_was_started_again_gets_the_weights_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "FIRST_REST", 0.01)
    with serving(complete) as one:

        class Give(list[str]):
            def append(self, url: str) -> None:
                one.loaded.append(("weights", "folder"))
                super().append(url)

        give = Give()
        drawn = drawn_from(one.url, give=give)
    assert {part.place: part.tokens for part in drawn} == expected()
    assert set(give) == {one.url}


def test_samples_that_are_complete_are_not_asked_for() -> None:
    with serving(complete) as one:
        one.loaded.append(("weights", "folder"))
        engine = engine_of(one.url)
        complete_places = {r.place for r in REQUESTS[:14]}
        drawn = [part for shard in engine.draw(REQUESTS, complete_places) for part in shard]
    assert [part.place for part in drawn] == [REQUESTS[14].place]
    assert len(one.requests) == 1


def test_servers_that_are_lost_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FIRST_REST", 0.0)
    monkeypatch.setattr(server, "RETRIES", 2)
    with serving(complete, lambda n: "busy") as one:
        one.loaded.append(("weights", "folder"))
        with pytest.raises(UserError) as caught:
            drawn_from(one.url)
    assert str(caught.value) == (
        f"rounds.sampling.servers: a request failed 3 times ({one.url}: HTTP 503: too busy); check "
        "the servers, then run the same command with resume=auto; it continues"
    )


def test_an_answer_without_token_ids_is_refused() -> None:
    def text(prompt: list[int], seed: int) -> list[int]:
        return ["some", "text"]  # type: ignore[list-item]

    with serving(text) as one:
        one.loaded.append(("weights", "folder"))
        with pytest.raises(UserError, match="returns no token_ids, and its text would be other"):
            drawn_from(one.url)


def test_a_request_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = openai_protocol.Refusal(400, "too long")

    def refuse(*arguments: object) -> bytes:
        raise refusal

    monkeypatch.setattr(protocol, "post", refuse)
    with pytest.raises(UserError) as caught:
        drawn_from("http://a/v1")
    assert str(caught.value) == (
        "rounds.sampling.servers: http://a/v1 refused a request (HTTP 400: too long); fix "
        "rounds.sampling, or the options of the server"
    )


def test_requests_that_fail_together_are_one_failure() -> None:
    one = server.Server("x")
    assert [one.failed(0.0) for _ in range(16)] == [True] + [False] * 15
    assert one.failures == 1 and one.rests_until < time.monotonic() + 1.1
    one.failed(30.0)  # what the server asks for counts always
    assert one.rests_until > time.monotonic() + 29


def test_one_request_gives_the_weights_for_all_that_missed_them() -> None:
    given: list[str] = []
    engine, one = engine_of("http://a/v1", give=given.append), server.Server("http://a/v1")
    assert [engine._give_again(one, 0, "lost") for _ in range(4)] == [("lost", 0.0)] * 4
    assert given == ["http://a/v1"]
    engine._give_again(one, 1, "lost")
    assert len(given) == 2


def test_weights_that_a_server_does_not_take_are_a_failure_of_it() -> None:
    def fails(url: str) -> None:
        raise openai_protocol.Failure("no answer", 3.0)

    engine, one = engine_of("http://a/v1", give=fails), server.Server("http://a/v1")
    reason = "lost; it does not take them: no answer"
    assert engine._give_again(one, 0, "lost") == (reason, 3.0) and one.given == 0
