"""A server on this machine that speaks SGLang's own protocol, in the form of version 0.5."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers.completion_server import Behavior, Complete, listening_for

Answer = dict[str, Any]


class SGLangServer:
    """State and log of a server. `version` is that of its full weights."""

    def __init__(self, complete: Complete, behavior: Behavior) -> None:
        self.complete, self.behavior = complete, behavior
        self.lock = threading.Lock()
        self.requests: list[Answer] = []
        self.version = "default"
        self.adapters: dict[str, str] = {}  # folders of the adapters that are loaded
        self.updates: list[tuple[str, list[str]]] = []  # names, and files of the folders
        self.unloaded: list[str] = []
        self.refuses_weights = False
        self.url = ""

    def restart(self) -> None:
        """Forget the weights, as a new process does."""
        self.version, self.adapters = "default", {}

    def respond(self, path: str, body: Answer) -> tuple[int, Any, str]:
        with self.lock:
            if path == "/generate":
                return self._generate(body)
            if self.refuses_weights:
                return 400, {"success": False, "message": "no such file"}, "answer"
            if path == "/update_weights_from_disk":
                self.version = body["weight_version"]
                self._update(self.version, body["model_path"])
                return 200, {"success": True, "message": "done"}, "answer"
            name = body["lora_name"]
            if path == "/unload_lora_adapter":
                del self.adapters[name]
                self.unloaded.append(name)
                return 200, {"success": True}, "answer"
            assert path == "/load_lora_adapter", path
            if name in self.adapters:
                return 400, {"success": False, "error_message": f"{name} is already loaded"}, ""
            self.adapters[name] = body["lora_path"]
            self._update(name, body["lora_path"])
            return 200, {"success": True}, "answer"

    def _update(self, name: str, folder: str) -> None:
        self.updates.append((name, sorted(path.name for path in Path(folder).iterdir())))

    def _generate(self, body: Answer) -> tuple[int, Any, str]:
        behavior = self.behavior(len(self.requests))
        self.requests.append(body)
        name, options = body.get("lora_path"), body["sampling_params"]
        if name is not None and name not in self.adapters:
            words = f"an adapter that has never been loaded: {name}"
            return 400, {"error": {"message": words}}, "answer"
        if behavior == "busy":
            return 503, {"detail": "the queue is full"}, behavior
        longest = options["max_new_tokens"]
        tokens = self.complete(body["input_ids"], options["sampling_seed"])[:longest]
        reason: Answer = {"type": "length", "length": longest}
        if len(tokens) < longest and tokens[-1] in options["stop_token_ids"]:
            reason = {"type": "stop", "matched": tokens[-1]}
        if behavior == "abort":
            tokens, reason = [], {"type": "abort", "message": "by an operator"}
        answer = {
            "text": "",
            "output_ids": tokens,
            "meta_info": {
                "finish_reason": reason,
                "prompt_tokens": len(body["input_ids"]),
                "completion_tokens": len(tokens),
                "weight_version": self.version,
            },
        }
        return 200, answer, behavior


@contextmanager
def serving(
    complete: Complete, behavior: Behavior = lambda number: "answer"
) -> Iterator[SGLangServer]:
    """Context manager of a server on a free port of this machine."""
    log = SGLangServer(complete, behavior)
    with listening_for(log) as address:
        log.url = address
        yield log
