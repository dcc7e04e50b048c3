"""Options of the two kinds of judges, as the command line has them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpref.evaluation.judge.chat_judge import ChatJudge
from fastpref.evaluation.judge.endpoint import Endpoint, OptionNames, on_command_line
from fastpref.evaluation.judge.template import read_template
from fastpref.evaluation.judge.verdicts import Judge
from fastpref.model.generate import require
from fastpref.utils.errors import UserError

# Fields of a request that are not settings of the model.
_RESERVED = ("model", "messages", "stream", "n")


@dataclass(frozen=True)
class ChatOptions:
    """Options of a judge behind an endpoint. names: what messages call them."""

    endpoint: str
    model: str
    api_key_env: str | None = None
    template: Path | None = None
    temperature: float = 0.0
    max_tokens: int = 1024
    seed: int = 0
    body: tuple[str, ...] = ()
    workers: int = 8
    timeout: float = 120.0
    retries: int = 6
    names: OptionNames = on_command_line

    def build(self) -> ChatJudge:
        """Make the judge; raises UserError that names the option."""
        require("temperature", self.temperature, 0 <= self.temperature < float("inf"), ">= 0")
        require("max_tokens", self.max_tokens, self.max_tokens >= 1, "a number >= 1")
        require("workers", self.workers, 1 <= self.workers <= 256, "1 to 256")
        require("timeout", self.timeout, 0 < self.timeout < float("inf"), "seconds > 0")
        require("retries", self.retries, self.retries >= 0, "a number >= 0")
        endpoint = Endpoint(
            self.endpoint,
            self.model,
            self._key(),
            self._body(),
            timeout=self.timeout,
            retries=self.retries,
            names=self.names,
        )
        template = read_template(self.template, self.names("template"))
        return ChatJudge(endpoint, template, self.workers)

    def _key(self) -> str | None:
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            option = self.names("api_key_env")
            raise UserError(
                f"{option}: the environment variable {self.api_key_env} is not set; set it to "
                "the key"
            )
        return key

    def _body(self) -> dict[str, Any]:
        """Fields of the request: those of the options, changed or removed by `body`."""
        option = self.names("body")
        body: dict[str, Any] = {
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }
        for setting in self.body:
            name, equals, text = setting.partition("=")
            if not name or not equals or name in _RESERVED:
                raise UserError(
                    f"{option}: expected FIELD=VALUE such as top_p=0.9, with a field other than "
                    f"{', '.join(_RESERVED)}, got {setting!r}"
                )
            try:
                body[name] = json.loads(text)
            except ValueError:
                body[name] = text
        return {name: value for name, value in body.items() if value is not None}


@dataclass(frozen=True)
class RewardOptions:
    """Options of a judge that is a reward model."""

    reward_model: str
    bradley_terry: bool = False
    batch_size: int = 8
    device: str = "auto"
    dtype: str | None = None

    def build(self) -> Judge:
        """Load the reward model; raises UserError that names the option."""
        # torch and transformers take seconds to import.
        from fastpref.evaluation.judge.pair_model import PairJudge, PairModel, compares_pairs
        from fastpref.evaluation.judge.reward_model import RewardJudge, RewardModel

        require_device(self.device, self.dtype)
        require("batch_size", self.batch_size, self.batch_size >= 1, "a number >= 1")
        if compares_pairs(self.reward_model):
            pair_model = PairModel(self.reward_model, self.device, self.dtype)
            return PairJudge(pair_model, self.batch_size, self.bradley_terry)
        model = RewardModel(self.reward_model, self.device, self.dtype)
        return RewardJudge(model, self.batch_size, self.bradley_terry)


def require_device(device: str, dtype: str | None) -> None:
    """Raise UserError about `--device` or `--dtype` of a reward model."""
    import torch

    from fastpref.evaluation.sample import DTYPES

    require("device", device, device in ("auto", "cpu", "cuda"), "auto, cpu or cuda")
    has_gpu = torch.cuda.is_available() or device != "cuda"
    require("device", device, has_gpu, "cpu, for torch finds no GPU")
    require("dtype", dtype, dtype in (None, *DTYPES), " or ".join(DTYPES))
