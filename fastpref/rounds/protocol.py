"""Interface of the protocols that servers speak, for the engine and the weights of a round."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, NamedTuple

from fastpref.config import RoundSampling
from fastpref.evaluation.judge.endpoint import post
from fastpref.rounds.sampling import Drawn, Request

PREFIX = "fastpref-"  # begins the names that a run gives to weights


class Weights(NamedTuple):
    """Weights of a round, in a folder that the servers can read.

    name: of the adapter or model at the servers, or the version that they report.
    """

    name: str
    folder: Path
    is_adapter: bool


class Lost(Exception):
    """A server does not have the weights of the round, for example since it was started again."""


class ServerProtocol(ABC):
    """Paths, bodies and answers of one kind of server.

    ends: tokens that end a completion.

    Every call raises `Failure` where another try may succeed, and UserError where none would.
    """

    def __init__(self, options: RoundSampling, ends: AbstractSet[int]) -> None:
        self._options, self._ends = options, ends

    @abstractmethod
    def complete(self, server: str, weights: Weights, request: Request) -> Drawn:
        """Draw one completion; also raises `Lost`, and `Refusal` for a request that is refused."""

    @abstractmethod
    def load(self, server: str, weights: Weights) -> None:
        """Give weights to a server; those that it has stay."""

    @abstractmethod
    def unload(self, server: str, weights: Weights) -> None:
        """Free the place of weights that are not needed any more; also raises `Refusal`."""

    def _sampling_fields(self) -> dict[str, Any]:
        """Options of sampling that all servers know by these names."""
        return {
            "temperature": self._options.temperature,
            "top_p": self._options.top_p,
            # What is not in a request a server may take from the model's generation config.
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": sorted(self._ends),
        }

    def _post(self, address: str, body: dict[str, Any]) -> bytes:
        return post(address, body, self._options.api_key, self._options.timeout)
