"""Token ids that continue token ids, by the generation of transformers or by vllm."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from fastpref.data.tokenize import chunks
from fastpref.utils.errors import UserError

ENGINES = ("auto", "transformers", "vllm")
Sequences = list[list[int]]
Progress = Callable[[int], None]  # completions drawn


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; `temperature` 0 is greedy. Raises UserError naming the option."""

    n: int = 1  # completions of each prompt
    temperature: float = 1.0
    top_p: float = 1.0  # draw from the likeliest tokens that hold this share of the probability
    max_new_tokens: int = 256
    batch_size: int = 8  # completions at a time
    seed: int = 0
    engine: str = "auto"  # vllm where it is installed and on CUDA, else transformers

    def __post_init__(self) -> None:
        for name in ("n", "max_new_tokens", "batch_size"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "a number >= 1")
        require("temperature", self.temperature, 0 <= self.temperature < float("inf"), ">= 0")
        require("top_p", self.top_p, 0 < self.top_p <= 1, "a share in (0, 1]")
        require("seed", self.seed, self.seed >= 0, "a number >= 0")
        require("seed", self.seed, self.seed < 2**32, "a number < 2^32")
        require("engine", self.engine, self.engine in ENGINES, " or ".join(ENGINES))
        if self.temperature == 0 and self.n > 1:
            raise UserError(
                f"--n: greedy completions of a prompt are all the same, got {self.n} of them; "
                "use --n 1 or --temperature > 0"
            )


def require(name: str, value: Any, holds: bool, expected: str) -> None:
    """Raise UserError about an option of the command line unless it holds."""
    if not holds:
        raise UserError(f"--{name.replace('_', '-')}: expected {expected}, got {value!r}")


def engine(name: str, device: torch.device, adapter: bool) -> str:
    """`transformers` or `vllm`; raises UserError where vllm is asked for and cannot be used."""
    obstacle = ""
    if importlib.util.find_spec("vllm") is None:
        obstacle = "is not installed"
    elif device.type != "cuda":
        obstacle = "needs a GPU"
    elif adapter:
        obstacle = "is for whole models here, not for adapters"
    if name == "vllm" and obstacle:
        raise UserError(f"--engine: vllm {obstacle}; use --engine transformers")
    return "transformers" if name == "transformers" or obstacle else "vllm"


@torch.inference_mode()
def with_transformers(
    model: PreTrainedModel,
    prompts: Sequences,
    ends: set[int],  # tokens after which a completion is at its end
    sampling: Sampling,
    progress: Progress,
) -> Sequences:
    """One completion of each prompt; what follows the first of `ends` is padding."""
    lm: Any = model
    draws = sampling.temperature > 0
    options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    ours = GenerationConfig(
        do_sample=draws,
        **(options if draws else {}),
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=0,
    )
    # What a config leaves open, a repetition penalty for one, is taken from the model's own.
    models, lm.generation_config = lm.generation_config, GenerationConfig()
    torch.manual_seed(sampling.seed)
    drawn: Sequences = []
    for chunk in chunks(prompts, sampling.batch_size):
        width = max(map(len, chunk))
        padding = [width - len(ids) for ids in chunk]  # on the left, where no token attends to it
        ids = [[0] * k + ids for k, ids in zip(padding, chunk, strict=True)]
        mask = [[0] * k + [1] * (width - k) for k in padding]
        output = lm.generate(
            torch.tensor(ids, device=lm.device),
            attention_mask=torch.tensor(mask, device=lm.device),
            generation_config=ours,
        )
        drawn += output[:, width:].tolist()
        progress(len(drawn))
    lm.generation_config = models
    return drawn


def with_vllm(
    source: str,
    dtype: str,
    prompts: Sequences,
    ends: set[int],
    sampling: Sampling,
    progress: Progress,
) -> Sequences:
    """One completion of each prompt, of a seed of its own; vllm makes the batches."""
    import vllm

    llm = vllm.LLM(
        source,
        dtype=dtype,
        max_model_len=max(map(len, prompts)) + sampling.max_new_tokens,
        gpu_memory_utilization=0.6,  # the policy, which scores the completions, stays beside it
    )
    parameters = [
        vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=sampling.seed + k,
            stop_token_ids=sorted(ends),
            ignore_eos=True,
            detokenize=False,
        )
        for k in range(len(prompts))
    ]
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    outputs = llm.generate(inputs, parameters, use_tqdm=False)
    progress(len(outputs))
    return [list(output.outputs[0].token_ids) for output in outputs]
