"""Interface of the protocols that servers speak, for the engine and the weights of a round."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

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


class ServerProtocol(Protocol):
    """Paths, bodies and answers of one kind of server.

    Every call raises `Failure` where another try may succeed, and UserError where none would.
    """

    def complete(self, server: str, weights: Weights, request: Request) -> Drawn:
        """Draw one completion; also raises `Lost`, and `Refusal` for a request that is refused."""

    def load(self, server: str, weights: Weights) -> None:
        """Give weights to a server; those that it has stay."""

    def unload(self, server: str, weights: Weights) -> None:
        """Free the place of weights that are not needed any more; also raises `Refusal`."""
