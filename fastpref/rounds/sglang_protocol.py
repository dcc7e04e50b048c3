"""The interface of SGLang: token ids at `/generate`, adapters by name, full weights by version.

A server is given full weights with a version, and says in every answer which one it has. An answer
is taken only if its token ids are what its `meta_info` says of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastpref.evaluation.judge.endpoint import Failure, Refusal
from fastpref.rounds.protocol import PREFIX, Lost, ServerProtocol, Weights
from fastpref.rounds.sampling import Drawn, Request, drawn
from fastpref.utils.errors import UserError

# What SGLang says of an adapter that it does not have, and of one that it has; by versions.
_MISSING = ("not loaded", "never been loaded")
_LOADED = ("already loaded", "already exists")
# Options of adapters with which SGLang would compute something else, or which it refuses.
_NOT_SERVED = (
    *("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias"),
    *("modules_to_save", "target_parameters", "trainable_token_indices"),
)


class SGLangProtocol(ServerProtocol):
    """Requests to SGLang."""

    def complete(self, server: str, weights: Weights, request: Request) -> Drawn:
        body: dict[str, Any] = {
            "input_ids": request.prompt,
            "sampling_params": {
                **self._sampling_fields(),
                "max_new_tokens": self._options.max_new_tokens,
                "sampling_seed": request.seed,
            },
        }
        if weights.is_adapter:
            body["lora_path"] = weights.name
        try:
            data = self._post(f"{server}/generate", body)
        except Refusal as refusal:
            if weights.is_adapter and any(words in str(refusal) for words in _MISSING):
                raise Lost(str(refusal)) from None
            raise
        return self.read(server, weights, request, data)

    def read(self, server: str, weights: Weights, request: Request, data: bytes) -> Drawn:
        """Completion of an answer.

        Raises Failure for a broken answer or a request that the server has aborted, Lost for one
        by other weights, and UserError for tokens that cannot be the completion.
        """
        try:
            answer: Any = json.loads(data)
            info = answer["meta_info"]
            reason = dict(info["finish_reason"])
        except (ValueError, KeyError, TypeError):
            raise Failure("the body is not a completion") from None
        if reason.get("type") == "abort":
            raise Failure(f"the request was aborted ({reason.get('message')})")
        version = info.get("weight_version")
        if not weights.is_adapter and version not in (None, weights.name):
            raise Lost(f"it has the weights {version!r}")
        tokens = answer.get("output_ids")
        problem = self._problem(tokens, info, reason, len(request.prompt))
        if not weights.is_adapter and version is None:
            problem = "it does not say by which weights, as weight_version"
        if weights.is_adapter and str(version).startswith(PREFIX):
            problem = f"the model below the adapter is that of another run, {version}"
        if problem is not None:
            raise UserError(
                f"rounds.sampling.servers: {server} returns an implausible completion ({problem}); "
                "use SGLang 0.5.5 or newer for model.path, with room for "
                "rounds.sampling.max_new_tokens"
            )
        return drawn(request.place, tokens, self._ends)

    def _problem(
        self, tokens: Any, info: dict[str, Any], reason: dict[str, Any], prompt: int
    ) -> str | None:
        """Reason why tokens cannot complete a prompt of `prompt` tokens, None if they can."""
        if not isinstance(tokens, list) or any(type(t) is not int or t < 0 for t in tokens):
            return "it has no list of output_ids"
        longest, last = self._options.max_new_tokens, tokens[-1] if tokens else None
        kind, matched = reason.get("type"), reason.get("matched")
        if info.get("prompt_tokens") != prompt:
            return f"{info.get('prompt_tokens')} of {prompt:,} tokens of the prompt were read"
        # Versions before 0.5.5 return tokens of the prompt as well.
        if info.get("completion_tokens") != len(tokens):
            return f"{len(tokens):,} output_ids, {info.get('completion_tokens')} completion_tokens"
        if len(tokens) > longest:
            return f"{len(tokens):,} tokens, more than max_new_tokens"
        if not self._ends.isdisjoint(tokens[:-1]):
            return "it goes on after an end token"
        if kind == "stop":
            is_end = last in self._ends and matched in (None, last)
            return None if is_end else f"it stopped at {matched!r}, which is no end token"
        if kind == "length":
            # By version, an end token that fills the completion is either kind of finish.
            is_full = len(tokens) == longest or last in self._ends
            return None if is_full else f"it was cut at {len(tokens):,} tokens"
        return f"it finished by {kind!r}"

    def load(self, server: str, weights: Weights) -> None:
        if weights.is_adapter:
            self._load_adapter(server, weights)
            return
        body = {"model_path": str(weights.folder), "weight_version": weights.name}
        try:
            self._post(f"{server}/update_weights_from_disk", body)
        except Refusal as refusal:
            raise UserError(
                f"rounds.sampling.servers: {server} does not load the weights ({refusal}); let it "
                f"read {weights.folder} under this path"
            ) from None

    def _load_adapter(self, server: str, weights: Weights) -> None:
        _check_adapter(weights.folder)
        body = {"lora_name": weights.name, "lora_path": str(weights.folder)}
        try:
            self._post(f"{server}/load_lora_adapter", body)
        except Refusal as refusal:
            if not any(words in str(refusal) for words in _LOADED):
                raise UserError(
                    f"rounds.sampling.servers: {server} does not load the adapter ({refusal}); "
                    "start it with --enable-lora, and a --max-lora-rank and --lora-target-modules "
                    f"that fit, and let it read {weights.folder} under this path"
                ) from None

    def unload(self, server: str, weights: Weights) -> None:
        if weights.is_adapter:
            self._post(f"{server}/unload_lora_adapter", {"lora_name": weights.name})


def _check_adapter(folder: Path) -> None:
    """Raise UserError for an adapter that SGLang would not compute as it was trained."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for name in _NOT_SERVED:
        if config.get(name):
            raise UserError(
                f"rounds.sampling.protocol: SGLang does not compute adapters with {name}; train "
                "one without it, or use vLLM and protocol: openai"
            )
