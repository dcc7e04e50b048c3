"""Samples and weights in SGLang's own protocol, and answers that cannot be right."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from fastpref.config import RoundSampling
from fastpref.evaluation.judge.endpoint import Failure
from fastpref.rounds import server
from fastpref.rounds.protocol import Lost, Weights
from fastpref.rounds.sampling import Drawn, Request
from fastpref.rounds.sglang_protocol import SGLangProtocol
from fastpref.utils.errors import UserError
from tests.helpers.sglang_server import SGLangServer, serving

END, LONGEST = 2, 8
REQUESTS = [Request((k // 3, k % 3), [7, k // 3 + 3], 100 + k) for k in range(15)]


def complete(prompt: list[int], seed: int) -> list[int]:
    """Tokens that depend on the prompt and the seed; two of three completions end."""
    draw = random.Random(f"{prompt} {seed}")
    tokens = [draw.randrange(3, 50) for _ in range(LONGEST)]
    return [*tokens[: draw.randint(0, 5)], END] if seed % 3 else tokens


@pytest.fixture
def full(tmp_path: Path) -> Weights:
    return Weights("fastpref-1", tmp_path, is_adapter=False)


@pytest.fixture
def adapter(tmp_path: Path) -> Weights:
    (tmp_path / "adapter_config.json").write_text('{"r": 16, "use_dora": false}')
    return Weights("fastpref-2", tmp_path, is_adapter=True)


def options(*urls: str, timeout: float = 5.0) -> RoundSampling:
    return RoundSampling(
        engine="server", protocol="sglang", servers=list(urls), top_p=0.9, max_new_tokens=LONGEST,
        batch_size=4, timeout=timeout,
    )  # fmt: skip


def drawn_from(
    servers: list[SGLangServer], weights: Weights, notes: list[str], timeout: float = 5.0
) -> list[Drawn]:
    sampling = options(*(one.url for one in servers), timeout=timeout)
    protocol = SGLangProtocol(sampling, {END})

    def give(url: str) -> None:
        protocol.load(url, weights)

    for one in servers:
        give(one.url)
    engine = server.ServerEngine(sampling, protocol, weights, give, notes.append)
    return [one for shard in engine.draw(REQUESTS, set()) for one in shard]


def test_every_sample_comes_once_though_servers_die_wait_and_abort(
    full: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "FIRST_REST", 0.01)
    bad = ["die", "slow", "busy", "answer", "abort"]
    notes: list[str] = []
    with (
        serving(complete, lambda n: bad[n] if n < len(bad) else "answer") as first,
        serving(complete, lambda n: "slow" if n == 1 else "answer") as second,
    ):
        drawn = drawn_from([first, second], full, notes, timeout=0.3)
    assert sorted(one.place for one in drawn) == [r.place for r in REQUESTS]
    assert {one.place: one.tokens for one in drawn} == {
        r.place: complete(r.prompt, r.seed) for r in REQUESTS
    }
    assert all(one.finished == (one.tokens[-1] == END) for one in drawn)
    assert any("its requests are sent again" in note for note in notes)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_server_that_was_started_again_gets_the_weights_again(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "FIRST_REST", 0.01)
    weights: Weights = request.getfixturevalue(kind)
    with serving(complete) as one:

        def behavior(number: int) -> str:
            if number == 6:
                one.restart()
            return "answer"

        one.behavior = behavior
        notes: list[str] = []
        drawn = drawn_from([one], weights, notes)
    assert len(drawn) == len(REQUESTS)
    # Requests that miss the weights together have them given once.
    assert [name for name, _ in one.updates] == [weights.name] * 2
    words = {"full": "it has the weights 'default'", "adapter": "HTTP 400: an adapter that has"}
    assert notes[0].startswith(f"{one.url}: {words[kind]}")


def test_the_request_has_everything_that_decides_the_tokens(adapter: Weights) -> None:
    with serving(complete) as one:
        drawn_from([one], adapter, [])
    assert min(one.requests, key=lambda body: body["sampling_params"]["sampling_seed"]) == {
        "input_ids": [7, 3],
        "sampling_params": {
            "max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9, "top_k": -1, "min_p": 0.0,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "stop_token_ids": [2], "sampling_seed": 100,
        },
        "lora_path": "fastpref-2",
    }  # fmt: skip
    assert one.adapters == {"fastpref-2": str(adapter.folder)}


def test_adapters_are_unloaded_and_full_weights_are_not(full: Weights, adapter: Weights) -> None:
    with serving(complete) as one:
        protocol = SGLangProtocol(options(one.url), {END})
        protocol.load(one.url, adapter)
        protocol.load(one.url, adapter)  # it is there already
        protocol.load(one.url, full)
        protocol.unload(one.url, adapter)
        protocol.unload(one.url, full)
    assert one.unloaded == ["fastpref-2"] and one.version == "fastpref-1"


def answer(**changes: Any) -> dict[str, Any]:
    """An answer of three tokens that is right, with changes of it and of its meta_info."""
    info = {
        "finish_reason": {"type": "stop", "matched": END},
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "weight_version": "fastpref-1",
    }
    values = {"output_ids": [5, 6, END], "meta_info": info}
    for name, value in changes.items():
        (values if name in values else info)[name] = value
    return values


def read(body: Any, weights: Weights) -> Drawn:
    protocol = SGLangProtocol(options("http://a"), {END})
    return protocol.read("http://a", weights, REQUESTS[0], json.dumps(body).encode())


FULL = [*range(3, 10), END]  # as long as max_new_tokens
LENGTH = {"finish_reason": {"type": "length", "length": LONGEST}, "completion_tokens": LONGEST}


def test_answers_that_are_right(full: Weights) -> None:
    assert read(answer(), full) == Drawn((0, 0), [5, 6, END], True)
    assert read(answer(output_ids=[*FULL[:-1], 11], **LENGTH), full).finished is False
    # Some versions look at the length before they look at the end token, others after.
    filled = Drawn((0, 0), FULL, True)
    assert read(answer(output_ids=FULL, **LENGTH), full) == filled
    assert read(answer(output_ids=FULL, completion_tokens=LONGEST), full) == filled


@pytest.mark.parametrize(
    ("problem", "changes"),
    [
        ("it has no list of output_ids", {"output_ids": None}),
        ("it has no list of output_ids", {"output_ids": ["a", "b", "c"]}),
        ("it has no list of output_ids", {"output_ids": [5, True, END]}),
        ("it has no list of output_ids", {"output_ids": [5, -1, END]}),
        ("it has no list of output_ids", {"output_ids": [[5], [6], [END]]}),
        ("1 of 2 tokens of the prompt were read", {"prompt_tokens": 1}),
        ("5 output_ids, 3 completion_tokens", {"output_ids": [7, 3, 5, 6, END]}),
        ("3 output_ids, None completion_tokens", {"completion_tokens": None}),
        ("9 tokens, more than max_new_tokens", {"output_ids": [9, *FULL], "completion_tokens": 9}),
        ("it goes on after an end token", {"output_ids": [5, END, END]}),
        ("it stopped at 2, which is no end token", {"output_ids": [5, 6, 7]}),
        ("it stopped at 9, which is no end token", {"finish_reason": {"type": "stop", "matched": 9},
                                                    "output_ids": [5, 6, 9]}),
        ("it stopped at 'NaN happened', which is no end token",
         {"finish_reason": {"type": "stop", "matched": "NaN happened"}}),
        ("it stopped at 2, which is no end token", {"output_ids": [], "completion_tokens": 0}),
        ("it was cut at 3 tokens", {**LENGTH, "output_ids": [5, 6, 7], "completion_tokens": 3}),
        ("it finished by 'tool'", {"finish_reason": {"type": "tool"}}),
        ("it does not say by which weights, as weight_version", {"weight_version": None}),
    ],
)  # fmt: skip
def test_tokens_that_cannot_be_the_completion(
    problem: str, changes: dict[str, Any], full: Weights
) -> None:
    with pytest.raises(UserError) as caught:
        read(answer(**changes), full)
    assert str(caught.value) == (
        f"rounds.sampling.servers: http://a returns an implausible completion ({problem}); use "
        "SGLang 0.5.5 or newer for model.path, with room for rounds.sampling.max_new_tokens"
    )


@pytest.mark.parametrize(
    "body",
    [[], [answer()], "text", 1, None, {}, {"meta_info": 1}, answer(finish_reason=None),
     answer(finish_reason="stop"), answer(meta_info=[1])],
    ids=str,
)  # fmt: skip
def test_a_body_that_is_no_completion_is_asked_for_again(body: Any, full: Weights) -> None:
    with pytest.raises(Failure, match="the body is not a completion"):
        read(body, full)


def test_an_answer_by_other_weights_is_not_taken(full: Weights, adapter: Weights) -> None:
    with pytest.raises(Lost, match="it has the weights 'default'"):
        read(answer(weight_version="default", output_ids=None), full)
    assert read(answer(weight_version="default"), adapter).tokens == [5, 6, END]
    # A run with full weights may have left them on the server.
    with pytest.raises(UserError, match="the model below the adapter is that of another run, fas"):
        read(answer(weight_version="fastpref-0"), adapter)


def test_an_adapter_of_another_kind_is_not_served(adapter: Weights) -> None:
    (adapter.folder / "adapter_config.json").write_text('{"use_rslora": true}')
    with pytest.raises(UserError) as caught:
        SGLangProtocol(options("http://a"), {END}).load("http://a", adapter)
    assert str(caught.value) == (
        "rounds.sampling.protocol: SGLang does not compute adapters with use_rslora; train one "
        "without it, or use vLLM and protocol: openai"
    )


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_weights_that_are_refused(kind: str, request: pytest.FixtureRequest) -> None:
    weights: Weights = request.getfixturevalue(kind)
    with serving(complete) as one:
        one.refuses_weights = True
        with pytest.raises(UserError) as caught:
            SGLangProtocol(options(one.url), {END}).load(one.url, weights)
    says = {
        "full": f"does not load the weights (HTTP 400: no such file); let it read "
        f"{weights.folder} under this path",
        "adapter": "does not load the adapter (HTTP 400: no such file); start it with "
        "--enable-lora, and a --max-lora-rank and --lora-target-modules that fit, and let it read "
        f"{weights.folder} under this path",
    }
    assert str(caught.value) == f"rounds.sampling.servers: {one.url} {says[kind]}"


def test_a_request_that_is_refused_is_not_sent_again(
    full: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = 400, {"error": {"message": "The input is longer than the context"}}, "answer"
    with serving(complete) as one:
        monkeypatch.setattr(one, "_generate", lambda body: refusal)
        with pytest.raises(UserError, match=r"refused a request \(HTTP 400: The input is longer"):
            drawn_from([one], full, [])
