"""`fastpref sample`: draw completions from a model, and compute their log-probs under it.

The log-probs are those of `Policy`, at temperature 1 and over the whole vocabulary, for any
sampling options.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fastpref import config as configs
from fastpref.data.collate import collate
from fastpref.data.dataset import Ids, TokenGroup
from fastpref.data.prompts import Prompt, encode, read_prompts, response_to
from fastpref.data.readers import Record
from fastpref.data.tokenize import chunks
from fastpref.data.tokenizers import load_tokenizer
from fastpref.model.generate import (
    Sampling,
    engine,
    require,
    text_after,
    until_end,
    with_transformers,
    with_vllm,
)
from fastpref.model.load import load_policy
from fastpref.model.policy import Policy, context_length
from fastpref.training.setup import device_of
from fastpref.utils import atomic_files
from fastpref.utils.errors import ModelError, UserError, first_line
from fastpref.utils.progress import Display

DTYPES = ("bfloat16", "float32", "float64")


class Completion(NamedTuple):
    """A completion that was drawn for a prompt."""

    prompt: Prompt
    ids: Ids  # the end token included
    text: str  # without special tokens
    finished: bool  # False: cut at max_new_tokens
    logps: float  # of `ids`, summed, nats, at temperature 1


class Sampler:
    """A model that draws completions and computes log-probs.

    source: folder or Hub name of a model, or the folder of an adapter (peft), which is merged into
        its base.
    dtype: of weights and arithmetic; None is bfloat16 on CUDA and float32 on CPU.
    tokenizer: to use instead of the model's own; both must have the same vocabulary.

    Raises ModelError in one line for a model or tokenizer that cannot be loaded or does not fit.
    """

    def __init__(
        self,
        source: str,
        device: str = "auto",
        dtype: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        require("device", device, device in ("auto", "cpu", "cuda"), "auto or cpu or cuda")
        require("dtype", dtype, dtype in (None, *DTYPES), " or ".join(DTYPES))
        gpu = torch.cuda.is_available()
        require("device", device, gpu or device != "cuda", "cpu, for torch finds no GPU")
        torch_device = device_of(device)
        self.source = source
        self.dtype = dtype or ("bfloat16" if torch_device.type == "cuda" else "float32")
        self.is_adapter = is_adapter(source)
        base, tokenizer_path = _base_of(source) if self.is_adapter else (source, None)
        values = {"path": base, "tokenizer": tokenizer_path, "dtype": self.dtype}
        settings = configs.parse_section("model", configs.Model, values)
        loaded = load_tokenizer(settings)
        assert loaded is not None
        if tokenizer is not None and tokenizer.get_vocab() != loaded.get_vocab():
            raise ModelError(
                f"{source}: its vocabulary is not that of the model it is compared with; the same "
                "tokens must have log-probs under both, so choose models of one family"
            )
        self.tokenizer = tokenizer or loaded
        # Checkpointing excludes the cache of generation.
        training = configs.Training(activation_checkpointing="off")
        policy = load_policy(settings, self.tokenizer, torch_device, training, configs.Parallel())
        if self.is_adapter:
            policy = _merged(policy, source)
        # Buffers are not cast: rotary frequencies stay in fp32.
        for parameter in policy.parameters():
            parameter.data = parameter.data.to(policy.compute_dtype)
        self.policy = policy.eval().requires_grad_(False)

    def draw(
        self, prompts: Sequence[Prompt], sampling: Sampling, display: Display
    ) -> list[Completion]:
        """Draw `sampling.n` completions of each prompt, in order; the seed determines them.

        Raises UserError if the longest prompt leaves no room for `max_new_tokens`, or if the engine
        is not available.
        """
        self._check_room(prompts, sampling.max_new_tokens)
        repeated = [prompt for prompt in prompts for _ in range(sampling.n)]
        ends = end_tokens(self.policy, self.tokenizer, prompts, self.source)
        display.phase("sample", len(repeated))
        arguments = ([p.ids.tolist() for p in repeated], ends, sampling, display.advance)
        if engine(sampling.engine, self.policy.device, self.is_adapter) == "vllm":
            sequences = with_vllm(self.source, self.dtype, *arguments)
        else:
            sequences = with_transformers(self.policy.base, *arguments)
        completions = [until_end(tokens, ends) for tokens in sequences]
        logps = self.logps(repeated, completions, sampling.batch_size, display)
        return [
            Completion(
                prompt, ids, text_after(self.tokenizer, prompt.ids, ids), int(ids[-1]) in ends, logp
            )
            for prompt, ids, logp in zip(repeated, completions, logps.tolist(), strict=True)
        ]

    @torch.no_grad()
    def logps(
        self, prompts: Sequence[Prompt], responses: Sequence[Ids], batch_size: int, display: Display
    ) -> torch.Tensor:
        """Compute summed log-probs of one response to each prompt, (N,), nats, fp32 or fp64."""
        display.phase("score", len(prompts))
        groups = (
            TokenGroup(k, prompt.row, prompt.ids, (response,))
            for k, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        )
        parts = []
        for chunk in chunks(groups, batch_size):
            batch = collate(chunk, "pointwise").to(self.policy.device)
            parts.append(self.policy(batch).logps)
            display.advance(chunk[-1].index + 1)
        return torch.cat(parts).cpu()

    def _check_room(self, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        longest = max(prompts, key=lambda prompt: len(prompt.ids))
        tokens, context = len(longest.ids), context_length(self.policy)
        if context is None or tokens + max_new_tokens <= context:
            return
        room = context - tokens
        advice = f"use {room:,} or less" if room > 0 else "leave out prompts that long"
        raise UserError(
            f"--max-new-tokens: {max_new_tokens:,} after the prompt of row {longest.row} "
            f"({tokens:,} tokens) end beyond the {context:,} positions of the model; {advice}"
        )


def end_tokens(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], source: str
) -> set[int]:
    """Tokens that end a completion, of the model, the tokenizer and the chat template."""
    generation: Any = policy.base.generation_config
    eos = generation.eos_token_id
    ends = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id}
    chat = next((prompt for prompt in prompts if prompt.text.conversational), None)
    if chat is not None:
        # The chat template ends an answer with its last special token.
        answered = chat.text._replace(responses=(response_to(chat.text.prompt, "Yes."),))
        (row,) = encode([(chat.row, answered)], source, tokenizer)
        added, answer = tokenizer.added_tokens_decoder, row["responses"][0].tolist()
        special = [token for token in answer if token in added and added[token].special]
        ends.update(special[-1:])
    return ends - {None}


def run(
    model: str,
    prompts: str,
    out: Path | None,
    sampling: Sampling,
    display: Display,
    *,
    limit: int | None = None,
    duplicates: bool = False,
    device: str = "auto",
    dtype: str | None = None,
) -> None:
    """Write a line of JSON for each completion to `out`, or to stdout if that is None.

    Raises UserError in one line, e.g. if `out` exists.
    """
    if out is not None and out.exists():
        raise UserError(f"--out: {out} is already there; choose another file")
    sampler = Sampler(model, device, dtype)
    rows = read_prompts(prompts, sampler.tokenizer, limit, duplicates)
    completions = sampler.draw(rows, sampling, display)
    lines = "".join(json.dumps(record(c), ensure_ascii=False) + "\n" for c in completions)
    if out is None:
        sys.stdout.write(lines)
    else:
        with atomic_files.replacing(out) as temporary:
            temporary.write_text(lines, encoding="utf-8")
    tokens = np.mean([len(completion.ids) for completion in completions])
    cut = sum(not completion.finished for completion in completions)
    display.note(
        f"{len(completions):,} completions of {len(rows):,} prompts, {tokens:.1f} tokens on "
        f"average, {cut:,} cut at {sampling.max_new_tokens:,}"
    )


def record(completion: Completion) -> Record:
    """A row of the output; the completion is text or messages, like its prompt."""
    text = completion.prompt.text
    row: Record = {"prompt": text.prompt, **text.template_columns}
    row["completion"] = response_to(text.prompt, completion.text)
    row["tokens"] = len(completion.ids)
    row["logps"] = completion.logps
    row["finished"] = completion.finished
    return row


def is_adapter(source: str) -> bool:
    """Whether a source is the folder of an adapter, as peft writes it."""
    return _adapter_config(source).exists()


def _adapter_config(source: str) -> Path:
    return Path(os.path.expanduser(source)) / "adapter_config.json"


def _base_of(adapter: str) -> tuple[str, str | None]:
    """The base model of an adapter, and the adapter's folder if that holds a tokenizer."""
    path = _adapter_config(adapter)
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str):
        raise ModelError(f"{path}: names no base_model_name_or_path; restore it as peft wrote it")
    return base, adapter if path.with_name("tokenizer_config.json").exists() else None


def _merged(policy: Policy, adapter: str) -> Policy:
    """Merge an adapter into the weights of a policy."""
    import peft

    try:
        wrapped: Any = peft.PeftModel.from_pretrained(policy.base, adapter)
        merged = Policy(wrapped.merge_and_unload(), policy.compute_dtype)
    except Exception as error:  # peft, safetensors and torch raise unrelated types
        raise ModelError(
            f"{adapter}: cannot load the adapter: {first_line(error)}; fix it or use another"
        ) from None
    merged.check_head()
    return merged
