"""The client of a chat endpoint, against a server on this machine."""

from __future__ import annotations

import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.message import Message
from email.utils import format_datetime
from typing import Any

import pytest

from fastpref.evaluation.judge.endpoint import Endpoint, Stopped, retry_after
from fastpref.evaluation.judge.template import Reply
from fastpref.utils.errors import UserError
from tests.helpers.chat_server import Answer, ChatServer, serving


def endpoint(server: ChatServer, **options: Any) -> Endpoint:
    return Endpoint(server.url, "test", **{"first_wait": 0.01, "timeout": 5.0, **options})


def test_a_question_is_one_message_with_the_fields_of_the_body() -> None:
    with serving(lambda a, b, count: Answer("[[A]]")) as server:
        client = endpoint(server, key="secret", body={"temperature": 0.0, "seed": 3})
        assert client.ask("Which?", "row 1") == Reply("[[A]]", "stop")
        (request,), (headers,) = server.requests, server.headers
    assert request == {
        "model": "test",
        "messages": [{"role": "user", "content": "Which?"}],
        "temperature": 0.0,
        "seed": 3,
    }
    assert headers["Authorization"] == "Bearer secret"
    assert "secret" not in repr(client)


def test_without_a_key_none_is_sent() -> None:
    with serving(lambda a, b, count: Answer("x")) as server:
        endpoint(server).ask("Which?", "row 1")
        assert "Authorization" not in server.headers[0]


def test_a_base_and_a_full_address_are_the_same() -> None:
    bases = ("http://h/v1", "http://h/v1/", "http://h/v1/chat/completions")
    assert {Endpoint(base, "m").address for base in bases} == {"http://h/v1/chat/completions"}
    for url in ("h/v1", "file:///etc/passwd", "", "http://"):
        with pytest.raises(UserError, match="--endpoint: expected a URL such as http://localhost"):
            Endpoint(url, "m")


@pytest.mark.parametrize(
    "failure",
    [
        Answer("slow down", 429),
        Answer("slow down", 429, {"Retry-After": "0"}),
        Answer("no", 500),
        Answer("no", 502),
        Answer("no", 503),
        Answer("no", 408),
        Answer(body=b"<html>"),
        Answer(body=b'{"choices": []}'),
        Answer(body=b"[]"),
        Answer(body=b""),
        Answer("late", seconds=1.0),
    ],
    ids=lambda answer: f"{answer.status} {answer.body!r} {answer.seconds}",
)
def test_what_may_pass_is_tried_again(failure: Answer) -> None:
    with serving(lambda a, b, count: failure if count < 3 else Answer("ok")) as server:
        reasons: list[str] = []
        client = endpoint(server, timeout=0.3 if failure.seconds else 5.0)
        assert client.ask("Which?", "row 1", note=reasons.append) == Reply("ok", "stop")
        assert server.asked.total() == 3 and len(reasons) == 2


def test_a_refusal_without_content_is_an_empty_answer() -> None:
    body = b'{"choices": [{"message": {"content": null}, "finish_reason": "content_filter"}]}'
    with serving(lambda a, b, count: Answer(body=body)) as server:
        assert endpoint(server).ask("Which?", "row 1") == Reply("", "content_filter")


def test_the_wait_grows_and_is_at_least_what_the_server_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []

    def wait(self: threading.Event, timeout: float | None = None) -> bool:
        waits.append(timeout or 0.0)
        return False

    def rule(a: str, b: str, count: int) -> Answer:
        return Answer("no", 429, {"Retry-After": "7"}) if count == 3 else Answer("no", 503)

    with serving(rule) as server:
        client = endpoint(server, first_wait=1.0, retries=8)
        with monkeypatch.context() as patch, pytest.raises(UserError, match="failed 9 times"):
            patch.setattr(threading.Event, "wait", wait)
            client.ask("Which?", "row 1")
    waits = [seconds for seconds in waits if seconds >= 0.5]
    bounds = [(0.5, 1), (1, 2), (7, 7), (4, 8), (8, 16), (16, 32), (30, 60), (30, 60)]
    assert len(waits) == len(bounds)
    assert all(low <= seconds <= high for seconds, (low, high) in zip(waits, bounds, strict=True))
    assert len(set(waits)) > 5


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('{"error": {"message": "no  such\\nmodel"}}', "no such model"),
        ('{"object": "error", "message": "no such model"}', "no such model"),
        ('{"success": false, "error_message": "no such model"}', "no such model"),
        ('{"detail": "no such model"}', "no such model"),
        ('{"error": "no such model"}', '{"error": "no such model"}'),
        ('{"error": {}, "message": 1}', '{"error": {}, "message": 1}'),
        ("[1]", "[1]"),
        ("", "Not Found"),
    ],
)
def test_the_words_of_an_error_in_every_form(body: str, says: str) -> None:
    with serving(lambda a, b, count: Answer(status=404, body=body.encode())) as server:
        client = endpoint(server, names=lambda option: f"judge.{option}")
        with pytest.raises(UserError) as caught:
            client.ask("Which?", "row 1")
    assert str(caught.value) == (
        f"judge.endpoint: {server.url}/chat/completions refused the question of row 1 (HTTP 404: "
        f"{says}); fix judge.endpoint, judge.model or judge.body, or leave the prompt out"
    )


def test_retry_after_is_seconds_or_a_date() -> None:
    def header(value: str | None) -> float:
        message = Message()
        if value is not None:
            message["Retry-After"] = value
        return retry_after(message)

    assert header("12") == 12 and header("0.5") == 0.5
    assert header(None) == header("soon") == header("-3") == 0
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert 85 <= header(later) <= 91
    assert header("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_too_long_a_wait_stops_the_run() -> None:
    with serving(lambda a, b, count: Answer("quota", 429, {"Retry-After": "3600"})) as server:
        with pytest.raises(UserError, match=r"asks to wait 3,600 seconds \(HTTP 429: quota\); run"):
            endpoint(server).ask("Which?", "row 1")
        assert server.asked.total() == 1


def test_a_server_that_keeps_failing_is_named_with_its_reason() -> None:
    with serving(lambda a, b, count: Answer("overloaded", 503)) as server:
        message = r"/v1/chat/completions failed 3 times \(HTTP 503: overloaded\); check that it"
        with pytest.raises(UserError, match=message):
            endpoint(server, retries=2).ask("Which?", "row 1")
        assert server.asked.total() == 3
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = Endpoint(
            f"http://127.0.0.1:{unused.getsockname()[1]}/v1", "m", retries=1, first_wait=0.01
        )
        with pytest.raises(UserError, match=r"failed 2 times \(.*refused"):
            closed.ask("Which?", "row 1")


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_not_tried_again_and_not_shown(status: int) -> None:
    with serving(lambda a, b, count: Answer("bad key sk-1 here", status)) as server:
        message = rf"refused the key \(HTTP {status}: bad key … here\); name the environment vari"
        with pytest.raises(UserError, match=message):
            endpoint(server, key="sk-1").ask("Which?", "row 1")
        assert server.asked.total() == 1


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_refused_question_is_named(status: int) -> None:
    with serving(lambda a, b, count: Answer("too long", status)) as server:
        message = rf"refused the question of row 12 \(tea\) \(HTTP {status}: too long\); fix --endp"
        with pytest.raises(UserError, match=message):
            endpoint(server).ask("Which?", "row 12 (tea)")
        assert server.asked.total() == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_with_the_key(status: int) -> None:
    with serving(lambda a, b, count: Answer("ok")) as other:
        moved = Answer("moved", status, {"Location": f"{other.url}/chat/completions"})
        refusal = pytest.raises(UserError, match=f"HTTP {status}")
        with serving(lambda a, b, count: moved) as server, refusal:
            endpoint(server, key="secret").ask("Which?", "row 1")
        assert other.asked.total() == 0


def test_a_stopped_run_does_not_wait() -> None:
    with serving(lambda a, b, count: Answer("no", 503)) as server:
        stop = threading.Event()
        stop.set()
        start = time.monotonic()
        with pytest.raises(Stopped):
            endpoint(server, first_wait=60.0).ask("Which?", "row 1", stop)
        assert time.monotonic() - start < 10
