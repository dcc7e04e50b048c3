"""Section `rounds` of the config: sampling, scoring and pairing before the steps of each round."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from fastpref.config.fields import (
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    PathName,
    PositiveFloat,
    PositiveInt,
    Section,
)
from fastpref.utils.errors import shown

ReferenceMode = Literal["start", "round", "every", "ema"]


class RoundSampling(Section):
    """Sampling of the completions of a round."""

    engine: Literal["transformers", "server"] = Field(
        "transformers",
        description="`transformers` generates in this process, with the weights in memory; "
        "`server` asks servers, see [rounds](rounds.md).",
    )
    servers: list[Name] = Field(
        [],
        description="With `engine: server`: addresses, such as `http://gpu-1:8000/v1`; with "
        "`protocol: sglang` without `/v1`.",
    )
    protocol: Literal["openai", "sglang"] = Field(
        "openai",
        description="With `engine: server`: `openai` for vLLM, whose OpenAI interface returns "
        "token ids; `sglang` for SGLang's own interface.",
    )
    model: Name | None = Field(
        None,
        description="With `protocol: openai`: name under which the servers have the model. "
        "Default: `model.path`.",
    )
    update_command: Name | None = Field(
        None,
        description="With `protocol: openai`: shell command that gives a server the weights of a "
        "round; `{folder}` and `{server}` are replaced. Default: with an adapter, the adapter is "
        "loaded through `/load_lora_adapter`; full weights need a command. SGLang loads both "
        "without one.",
    )
    api_key_env: Name | None = Field(
        None,
        description="With `engine: server`: environment variable that holds the key of the "
        "servers.",
    )
    samples: PositiveInt = Field(
        4,
        description="Completions of each prompt; 1 is enough for `ppo`, `distillation`, and "
        "`nash_md` with a mixture.",
    )
    temperature: PositiveFloat = Field(1.0, description="Temperature of sampling.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Sample from the likeliest tokens with this total probability."
    )
    max_new_tokens: PositiveInt = Field(256, description="Longest completion, in tokens.")
    batch_size: PositiveInt = Field(
        16, description="Completions generated at a time; with servers, requests at a time."
    )
    seed: NonNegativeInt = Field(0, description="Seed of the samples.")
    timeout: PositiveFloat = Field(
        600.0,
        description="With `engine: server`: seconds without an answer after which a request goes "
        "to another server.",
    )

    @field_validator("servers")
    @classmethod
    def _addresses(cls, value: list[str]) -> list[str]:
        for server in value:
            parts = urlsplit(server)
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise ValueError(
                    f"expected addresses such as http://localhost:8000/v1, got {server!r}"
                )
        return [server.rstrip("/") for server in value]

    @model_validator(mode="after")
    def _servers_where_asked(self) -> RoundSampling:
        if self.engine == "server" and not self.servers:
            raise ValueError("servers: engine: server needs at least one; name their addresses")
        for option in ("servers", "protocol", "model", "update_command", "api_key_env", "timeout"):
            if self.engine != "server" and self._is_set(option):
                raise ValueError(f"{option}: is for engine: server; set that, or remove it")
        return self

    @model_validator(mode="after")
    def _options_of_the_protocol(self) -> RoundSampling:
        if self.protocol != "sglang":
            return self
        for option in ("model", "update_command"):
            if self._is_set(option):
                raise ValueError(f"{option}: SGLang loads the weights of a round itself; remove it")
        for server in self.servers:
            if server.endswith("/v1"):
                raise ValueError(
                    f"servers: protocol: sglang asks the root of a server, got {server!r}; leave "
                    "out /v1"
                )
        return self

    def _is_set(self, option: str) -> bool:
        return bool(getattr(self, option) != type(self).model_fields[option].default)

    @property
    def api_key(self) -> str | None:
        """Key of the servers."""
        return None if self.api_key_env is None else os.environ.get(self.api_key_env)


class RoundJudge(Section):
    """A chat model behind an endpoint, which compares two completions at a time."""

    endpoint: Name = Field(description="Base address, such as `https://api.openai.com/v1`.")
    model: Name = Field(description="Name of the model that judges.")
    api_key_env: Name | None = Field(
        None, description="Environment variable that holds the key of the endpoint."
    )
    template: PathName | None = Field(
        None, description="Text file of the question; default: that of `fastpref judge`."
    )
    temperature: NonNegativeFloat = Field(0.0, description="Temperature of the judge.")
    max_tokens: PositiveInt = Field(1024, description="Longest answer of the judge.")
    seed: NonNegativeInt = Field(0, description="Seed of the judge.")
    body: dict[str, Any] = Field(
        {}, description="Further fields of the request; null removes a field."
    )
    workers: Annotated[int, Field(ge=1, le=256)] = Field(8, description="Questions at a time.")
    timeout: PositiveFloat = Field(120.0, description="Seconds to wait for an answer.")
    retries: NonNegativeInt = Field(6, description="Further tries after a failure.")


class RoundScorer(Section):
    """Source of the scores of completions."""

    reward_model: PathName | None = Field(
        None,
        description="Folder or Hub name of a sequence classifier with one label, or of a model "
        "that compares two answers, such as `llm-blender/PairRM-hf`.",
    )
    function: Name | None = Field(
        None,
        description="`module:function`, which takes prompts and completions and returns a number "
        "for each. Its code is run here.",
    )
    judge: RoundJudge | None = Field(
        None,
        description="A chat model that compares the completions of a prompt pair by pair, in both "
        "orders; a score is the mean preference, see [rounds](rounds.md).",
    )
    missing_eos_penalty: NonNegativeFloat = Field(
        0.0, description="Subtracted from the score of a completion cut at `max_new_tokens`."
    )

    @model_validator(mode="after")
    def _one_source(self) -> RoundScorer:
        sources = (self.reward_model, self.function, self.judge)
        if sum(source is not None for source in sources) != 1:
            raise ValueError("set one of reward_model, function and judge")
        return self


class Rounds(Section):
    """Rounds of sampling, scoring and training; `data.train` holds the prompts."""

    count: PositiveInt = Field(3, description="Number of rounds.")
    prompts: PositiveInt | None = Field(
        None,
        description="Prompts of each round, the next ones of the shuffled `data.train`, over as "
        "many passes as needed; null: all of them.",
    )
    steps: PositiveInt | None = Field(
        None,
        description="Optimizer steps of each round; default: as many as a pass over one pair of "
        "each prompt has.",
    )
    sampling: RoundSampling = Field(RoundSampling(), description="How completions are drawn.")
    scorer: RoundScorer = Field(description="What gives completions their scores.")
    pairs: Literal["best_worst", "best_random", "all"] = Field(
        "best_worst",
        description="Pairs of each prompt: `best_worst`; the best against a `best_random` one of "
        "the worse; or `all` with different scores. Equal scores give no pair. Pointwise "
        "objectives get both responses of a pair with labels, groupwise ones all completions "
        "with scores.",
    )
    min_gap: NonNegativeFloat = Field(0.0, description="Smallest difference of scores in a pair.")
    reference: Literal["start", "round"] | dict[str, Any] = Field(
        "round",
        description="Reference of the objective: the model at the `start` of the run; the policy "
        "at the start of each `round`; `{every: 10}`, the policy as it was at the last step that "
        "10 divides; or `{ema: 0.99}`, the exponential average of the trained weights over the "
        "steps.",
    )
    eval_prompts: PositiveInt = Field(
        64,
        description="Number of prompts of `data.eval`, the first different ones, on which every "
        "round is compared with the start.",
    )

    @field_validator("reference", mode="before")
    @classmethod
    def _known_reference(cls, value: Any) -> Any:
        if value in ("start", "round"):
            return value
        if isinstance(value, dict) and len(value) == 1:
            ((name, number),) = value.items()
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if name == "every" and is_number and number >= 1 and int(number) == number:
                return {"every": int(number)}
            if name == "ema" and is_number and 0 <= number < 1:
                return {"ema": float(number)}
        raise ValueError(
            "must be start, round, {every: STEPS} or {ema: DECAY} with a decay in [0, 1), got "
            f"{shown(value)}"
        )

    @property
    def reference_mode(self) -> ReferenceMode:
        """Name of the mode of `reference`."""
        if isinstance(self.reference, dict):
            return "every" if "every" in self.reference else "ema"
        return self.reference

    def steps_of_round(self, prompts: int, batch_size: int) -> int:
        """Optimizer steps of a round with so many prompts."""
        return self.steps or -(-prompts // batch_size)
