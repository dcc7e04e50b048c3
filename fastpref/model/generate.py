"""Generate completions of token ids, with transformers or vllm."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastpref.data.tokenize import Ids, chunks
from fastpref.utils.errors import UserError

ENGINES = ("auto", "transformers", "vllm")
Sequences = list[list[int]]
Progress = Callable[[int], None]  # takes the number of completions so far


@dataclass(frozen=True)
class Sampling:
    """Sampling options of the command line; raises UserError that names the option.

    n: completions per prompt.
    temperature: 0 is greedy decoding.
    top_p: sample from the smallest set of most likely tokens with this total probability.
    batch_size: completions generated at a time.
    engine: "auto" is vllm on CUDA if it is installed, otherwise transformers.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    batch_size: int = 8
    seed: int = 0
    engine: str = "auto"

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
    """Raise UserError about an option of the command line unless `holds`."""
    if not holds:
        raise UserError(f"--{name.replace('_', '-')}: expected {expected}, got {value!r}")


def engine(name: str, device: torch.device, adapter: bool) -> str:
    """Return "transformers" or "vllm"; raise UserError if vllm is requested but unavailable."""
    unavailable_reason = ""
    if importlib.util.find_spec("vllm") is None:
        unavailable_reason = "is not installed"
    elif device.type != "cuda":
        unavailable_reason = "needs a GPU"
    elif adapter:
        unavailable_reason = "does not load adapters here"
    if name == "vllm" and unavailable_reason:
        raise UserError(f"--engine: vllm {unavailable_reason}; use --engine transformers")
    return "transformers" if name == "transformers" or unavailable_reason else "vllm"


# Without gradients, but not in inference mode, whose tensors training could not use later.
@torch.no_grad()
def with_transformers(
    model: PreTrainedModel,
    prompts: Sequences,
    ends: set[int],  # end-of-sequence tokens
    sampling: Sampling,
    progress: Progress = lambda count: None,
    synced: bool = False,
) -> Sequences:
    """Generate one completion per prompt; tokens after the first of `ends` are padding.

    synced: let all ranks run as many forward passes as the longest takes, for sharded weights.
    """
    lm: Any = model
    do_sample = sampling.temperature > 0
    options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    generation_config = GenerationConfig(
        do_sample=do_sample,
        **(options if do_sample else {}),
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=0,
    )
    # transformers fills unset options, such as a repetition penalty, from the model's config.
    models_config, lm.generation_config = lm.generation_config, GenerationConfig()
    torch.manual_seed(sampling.seed)
    completions: Sequences = []
    for chunk in chunks(prompts, sampling.batch_size):
        width = max(map(len, chunk))
        # Padding is on the left, where the mask hides it and completions start together.
        padding = [width - len(ids) for ids in chunk]
        ids = [[0] * k + ids for k, ids in zip(padding, chunk, strict=True)]
        mask = [[0] * k + [1] * (width - k) for k in padding]
        output = lm.generate(
            torch.tensor(ids, device=lm.device),
            attention_mask=torch.tensor(mask, device=lm.device),
            generation_config=generation_config,
            synced_gpus=synced,
        )
        completions += output[:, width:].tolist()
        progress(len(completions))
    lm.generation_config = models_config
    return completions


def until_end(tokens: list[int], ends: set[int]) -> Ids:
    """Return the tokens up to the first end token, which is included."""
    last = next((k for k, token in enumerate(tokens) if token in ends), len(tokens))
    return np.asarray(tokens[: last + 1], dtype=np.int32)


def text_after(tokenizer: PreTrainedTokenizerBase, prompt: Ids, ids: Ids) -> str:
    """Decode a completion after its prompt; alone, some tokenizers drop its first space."""
    before, full = (
        tokenizer.decode(
            tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for tokens in (prompt, np.concatenate([prompt, ids]))
    )
    return str(full)[len(before) :]


def with_vllm(
    source: str,
    dtype: str,
    prompts: Sequences,
    ends: set[int],
    sampling: Sampling,
    progress: Progress,
) -> Sequences:
    """Generate one completion per prompt, each with its own seed; vllm forms the batches."""
    import vllm

    llm = vllm.LLM(
        source,
        dtype=dtype,
        max_model_len=max(map(len, prompts)) + sampling.max_new_tokens,
        # The policy that scores the completions needs the rest of the memory.
        gpu_memory_utilization=0.6,
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
