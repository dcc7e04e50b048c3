"""Requests and answers in the protocol of vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpref.config import RoundSampling
from fastpref.rounds.openai_protocol import OpenAIProtocol
from fastpref.rounds.protocol import Lost, Weights
from fastpref.rounds.sampling import Drawn, Request
from fastpref.utils.errors import UserError
from tests.helpers.completion_server import serving

REQUEST = Request((0, 0), [7, 3], 100)
WEIGHTS = Weights("fastpref-1", Path("folder"), is_adapter=True)


def protocol(url: str = "http://localhost:1/v1") -> OpenAIProtocol:
    options = RoundSampling(engine="server", servers=[url], max_new_tokens=8, timeout=5.0)
    return OpenAIProtocol(options, {2})


def test_the_token_that_ended_a_completion_is_added_where_the_server_leaves_it_out() -> None:
    body = b'{"choices": [{"token_ids": [5, 6], "finish_reason": "stop", "stop_reason": null}]}'
    assert protocol().read("x", REQUEST, body) == Drawn((0, 0), [5, 6, 2], True)


def test_nothing_but_the_options_decides_how_tokens_are_drawn() -> None:
    """A server fills in what a request leaves out from the model's generation config."""
    with serving(lambda prompt, seed: [5, 2]) as server:
        server.loaded.append((WEIGHTS.name, "folder"))
        one = protocol(server.url).complete(server.url, WEIGHTS, REQUEST)
    assert one == Drawn((0, 0), [5, 2], True)
    assert server.requests == [
        {
            "model": "fastpref-1", "prompt": [7, 3], "n": 1, "temperature": 1.0, "top_p": 1.0,
            "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "max_tokens": 8, "seed": 100,
            "stop_token_ids": [2], "return_token_ids": True,
        }
    ]  # fmt: skip


def test_an_adapter_is_loaded_before_it_answers() -> None:
    with serving(lambda prompt, seed: [5, 2]) as server:
        speaks = protocol(server.url)
        with pytest.raises(Lost, match="HTTP 404: no such model"):
            speaks.complete(server.url, WEIGHTS, REQUEST)
        speaks.load(server.url, WEIGHTS)
        speaks.complete(server.url, WEIGHTS, REQUEST)
        speaks.unload(server.url, WEIGHTS)
    assert server.loaded == [("fastpref-1", "folder")] and server.unloaded == ["fastpref-1"]


def test_a_server_that_loads_no_adapters() -> None:
    with serving(lambda prompt, seed: [5, 2]) as server:
        address = server.url.removesuffix("/v1")
        server.refuses = "has no such path"
        with pytest.raises(UserError) as caught:
            protocol(address).load(address, WEIGHTS)
        server.refuses = "The adapter has already been loaded."
        protocol(address).load(address, WEIGHTS)
    assert str(caught.value) == (
        f"rounds.sampling.servers: {address} does not load the adapter (HTTP 400: has no such "
        "path); start it with LoRA and runtime updates allowed, or set rounds.sampling."
        "update_command"
    )
