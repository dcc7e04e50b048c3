"""A chat endpoint on this machine, which answers as a test says."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.helpers.local_server import listening

_REPLIES = re.compile(r"<reply_a>\n(.*)\n</reply_a>\n\n<reply_b>\n(.*)\n</reply_b>", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """Status, body and headers of a response; `seconds` passes before it is sent."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    finish_reason: str = "stop"
    seconds: float = 0.0

    def encoded(self) -> bytes:
        if self.body is not None:
            return self.body
        if self.status != 200:
            return json.dumps({"error": {"message": self.text}}).encode()
        message = {"role": "assistant", "content": self.text}
        return json.dumps(
            {"choices": [{"message": message, "finish_reason": self.finish_reason}]}
        ).encode()


Rule = Callable[[str, str, int], Answer]  # replies shown as A and B, and how often they were asked


class ChatServer:
    """Address, rule and log of a server."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.lock = rule, threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.asked: Counter[tuple[str, str]] = Counter()
        self.url = ""

    def answer(self, request: dict[str, Any], headers: dict[str, str]) -> Answer:
        match = _REPLIES.search(request["messages"][0]["content"])
        replies = (match[1], match[2]) if match else ("", "")
        with self.lock:
            self.requests.append(request)
            self.headers.append(headers)
            self.asked[replies] += 1
            count = self.asked[replies]
        return self.rule(*replies, count)


@contextmanager
def serving(rule: Rule) -> Iterator[ChatServer]:
    """Context manager of a server on a free port of this machine."""
    log = ChatServer(rule)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            if not self.path.endswith("/v1/chat/completions"):
                answer = Answer("no such path", 404)
            else:
                answer = log.answer(json.loads(data), dict(self.headers))
            time.sleep(answer.seconds)
            encoded = answer.encoded()
            try:
                self.send_response(answer.status)
                for name, value in {**answer.headers, "Content-Length": str(len(encoded))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(encoded)
            except OSError:  # the client has given up or was killed
                pass

    with listening(Handler) as address:
        log.url = f"{address}/v1"
        yield log
