"""The OpenAI interface as vLLM extends it: token ids at `/completions`, adapters by name."""

from __future__ import annotations

import json
from typing import Any

from fastpref.evaluation.judge.endpoint import Failure, Refusal
from fastpref.rounds.protocol import Lost, ServerProtocol, Weights
from fastpref.rounds.sampling import Drawn, Request, drawn
from fastpref.utils.errors import UserError

_LOADED = "already been loaded"  # what vLLM answers to a name that it has


class OpenAIProtocol(ServerProtocol):
    """Requests to vLLM, and to servers that know the same fields."""

    def complete(self, server: str, weights: Weights, request: Request) -> Drawn:
        body = {
            "model": weights.name,
            "prompt": request.prompt,
            "n": 1,
            **self._sampling_fields(),
            "max_tokens": self._options.max_new_tokens,
            "seed": request.seed,
            "return_token_ids": True,
        }
        try:
            data = self._post(f"{server}/completions", body)
        except Refusal as refusal:
            if refusal.code == 404:
                raise Lost(str(refusal)) from None
            raise
        return self.read(server, request, data)

    def read(self, server: str, request: Request, data: bytes) -> Drawn:
        """Completion of an answer; raises Failure for a broken one."""
        try:
            choice: Any = json.loads(data)["choices"][0]
            reason, stop = choice.get("finish_reason"), choice.get("stop_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise Failure("the body is not a completion") from None
        tokens = choice.get("token_ids")
        is_list = isinstance(tokens, list) and all(type(token) is int for token in tokens)
        if not is_list:
            raise UserError(
                f"rounds.sampling.servers: {server} returns no token_ids, and its text would "
                "be other tokens; use a server that knows return_token_ids, such as vLLM"
            )
        one = drawn(request.place, tokens, self._ends)
        if not one.finished and reason == "stop":
            # Some servers leave out the token that ended the completion.
            end = stop if stop in self._ends else min(self._ends, default=None)
            if end is None:
                raise Failure("a completion ended without an end token")
            one = Drawn(request.place, [*one.tokens, end], finished=True)
        if not one.tokens or len(one.tokens) > self._options.max_new_tokens + 1:
            raise Failure(f"a completion has {len(one.tokens):,} tokens")
        return one

    def load(self, server: str, weights: Weights) -> None:
        body = {"lora_name": weights.name, "lora_path": str(weights.folder)}
        try:
            self._post(f"{server}/load_lora_adapter", body)
        except Refusal as refusal:
            if _LOADED not in str(refusal):
                raise UserError(
                    f"rounds.sampling.servers: {server} does not load the adapter ({refusal}); "
                    "start it with LoRA and runtime updates allowed, or set rounds.sampling."
                    "update_command"
                ) from None

    def unload(self, server: str, weights: Weights) -> None:
        self._post(f"{server}/unload_lora_adapter", {"lora_name": weights.name})
