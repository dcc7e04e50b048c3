"""Servers on this machine that speak the protocol of vLLM: completions of token ids, adapters."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any, Protocol

from tests.helpers.local_server import listening

# Tokens of a completion by the prompt and the seed of its request.
Complete = Callable[[list[int], int], list[int]]
# What happens to the n-th request of a server, from 0: "answer", "die", "slow", "busy", "twice".
Behavior = Callable[[int], str]


class CompletionServer:
    """Address and log of a server."""

    def __init__(self, complete: Complete, behavior: Behavior) -> None:
        self.complete, self.behavior = complete, behavior
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.loaded: list[tuple[str, str]] = []  # names and folders of adapters
        self.unloaded: list[str] = []
        self.refuses = ""  # words with which adapters are refused
        self.url = ""

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, Any, str]:
        """Status, JSON and behavior for a request."""
        with self.lock:
            if path.endswith("/unload_lora_adapter"):
                self.unloaded.append(body["lora_name"])
                return 200, "ok", "answer"
            if path.endswith("/load_lora_adapter") and self.refuses:
                return 400, {"message": self.refuses}, "answer"
            if path.endswith("/load_lora_adapter"):
                self.loaded.append((body["lora_name"], body["lora_path"]))
                return 200, "ok", "answer"
            number = len(self.requests)
            self.requests.append(body)
            if not any(name == body["model"] for name, _ in self.loaded):
                return 404, {"error": {"message": "no such model"}}, "answer"
        behavior = self.behavior(number)
        if behavior == "busy":
            return 503, {"error": {"message": "too busy"}}, behavior
        tokens = self.complete(body["prompt"], body["seed"])[: body["max_tokens"]]
        ended = bool(tokens) and tokens[-1] in body["stop_token_ids"]
        choice = {"token_ids": tokens, "finish_reason": "stop" if ended else "length"}
        choices = [choice] * (2 if behavior == "twice" else 1)
        return 200, {"choices": choices}, behavior


class Log(Protocol):
    """A server's side of the protocol."""

    url: str

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, Any, str]:
        """Status, JSON and behavior for a request."""


@contextmanager
def listening_for(log: Log) -> Iterator[str]:
    """Context manager of a free port of this machine, at which a log responds."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            status, body, behavior = log.respond(self.path, json.loads(data))
            if behavior == "die":  # the connection ends in the middle of an answer
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                self.connection.close()
                return
            if behavior == "slow":
                time.sleep(0.6)
            encoded = json.dumps(body).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(encoded)))
                self.end_headers()
                self.wfile.write(encoded)
            except OSError:  # the client has given up
                return

    with listening(Handler) as address:
        yield address


@contextmanager
def serving(
    complete: Complete, behavior: Behavior = lambda number: "answer"
) -> Iterator[CompletionServer]:
    """Context manager of a server on a free port of this machine."""
    log = CompletionServer(complete, behavior)
    with listening_for(log) as address:
        log.url = f"{address}/v1"
        yield log
