"""Completions drawn from a model, and their log-probs under it: `fastpref sample`.

The log-probs are those of `Policy`, at temperature 1 and over the whole vocabulary, however the
completions were drawn.
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
from fastpref.data.readers import Row
from fastpref.data.tokenize import chunks
from fastpref.data.tokenizers import load_tokenizer
from fastpref.model.generate import Sampling, engine, require, with_transformers, with_vllm
from fastpref.model.load import load_policy
from fastpref.model.policy import Policy, context_length
from fastpref.training.setup import device_of
from fastpref.utils import atomic_files
from fastpref.utils.errors import ModelError, UserError, first_line
from fastpref.utils.progress import Display

DTYPES = ("bfloat16", "float32", "float64")


class Completion(NamedTuple):
    prompt: Prompt
    ids: Ids  # with the token that ends it
    text: str  # without special tokens
    finished: bool  # False: cut at max_new_tokens
    logps: float  # of `ids`, summed, nats, at temperature 1


class Sampler:
    """A model to draw from and to score with.

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
        on = device_of(device)
        self.source = source
        self.dtype = dtype or ("bfloat16" if on.type == "cuda" else "float32")
        self.is_adapter = is_adapter(source)
        base, own = _base_of(source) if self.is_adapter else (source, None)
        config = configs.parse(
            {
                "model": {"path": base, "tokenizer": own, "dtype": self.dtype},
                "data": {"train": "-"},  # none is read
                "loss": "sft",
                "training": {"activation_checkpointing": False},  # it excludes generation's cache
            }
        )
        named = load_tokenizer(config.model)
        assert named is not None
        if tokenizer is not None and tokenizer.get_vocab() != named.get_vocab():
            raise ModelError(
                f"{source}: its vocabulary is not that of the model it is compared with; the same "
                "tokens must have log-probs under both, so choose models of one family"
            )
        self.tokenizer = tokenizer or named
        policy = load_policy(config, self.tokenizer, on)
        if self.is_adapter:
            policy = _merged(policy, source)
        for parameter in policy.parameters():  # not the buffers: rotary frequencies stay in fp32
            parameter.data = parameter.data.to(policy.compute_dtype)
        self.policy = policy.eval().requires_grad_(False)

    def draw(
        self, prompts: Sequence[Prompt], sampling: Sampling, display: Display
    ) -> list[Completion]:
        """`sampling.n` completions of each prompt, in order; the same ones for the same seed.

        Raises UserError where the longest prompt leaves no room for `max_new_tokens`, or the
        engine is not there.
        """
        self._check_room(prompts, sampling.max_new_tokens)
        wanted = [prompt for prompt in prompts for _ in range(sampling.n)]
        ends = self._ends(prompts)
        display.phase("sample", len(wanted))
        task = ([prompt.ids.tolist() for prompt in wanted], ends, sampling, display.advance)
        if engine(sampling.engine, self.policy.device, self.is_adapter) == "vllm":
            drawn = with_vllm(self.source, self.dtype, *task)
        else:
            drawn = with_transformers(self.policy.base, *task)
        ids = [_until_end(tokens, ends) for tokens in drawn]
        logps = self.logps(wanted, ids, sampling.batch_size, display)
        return [
            Completion(prompt, tokens, self._text(prompt, tokens), int(tokens[-1]) in ends, logp)
            for prompt, tokens, logp in zip(wanted, ids, logps.tolist(), strict=True)
        ]

    @torch.no_grad()
    def logps(
        self, prompts: Sequence[Prompt], responses: Sequence[Ids], batch_size: int, display: Display
    ) -> torch.Tensor:
        """Summed log-probs of one response to each prompt, (N,), nats, fp32 or fp64."""
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
            f"({tokens:,} tokens) end beyond the {context:,} positions that the model knows; "
            f"{advice}"
        )

    def _ends(self, prompts: Sequence[Prompt]) -> set[int]:
        """Tokens that end a completion: the model's, the tokenizer's, the chat template's."""
        generation: Any = self.policy.base.generation_config
        known = generation.eos_token_id
        ends = {*(known if isinstance(known, list) else [known]), self.tokenizer.eos_token_id}
        chat = next((prompt for prompt in prompts if prompt.text.conversational), None)
        if chat is not None:  # the last special token of an answer
            answered = chat.text._replace(responses=(response_to(chat.text.prompt, "Yes."),))
            (row,) = encode([(chat.row, answered)], self.source, self.tokenizer)
            added, answer = self.tokenizer.added_tokens_decoder, row["responses"][0].tolist()
            ends |= {*[t for t in answer if t in added and added[t].special][-1:]}
        return ends - {None}

    def _text(self, prompt: Prompt, ids: Ids) -> str:
        """The completion decoded behind its prompt: alone, some tokenizers drop a first space."""
        before, whole = (
            self.tokenizer.decode(
                tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            for tokens in (prompt.ids, np.concatenate([prompt.ids, ids]))
        )
        return str(whole)[len(before) :]


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
    """Write a line of JSON for each completion to `out`, or to stdout where that is None.

    Raises UserError in one line for what a user can mend, an `out` that exists among it.
    """
    if out is not None and out.exists():
        raise UserError(f"--out: {out} is already there; choose another file")
    sampler = Sampler(model, device, dtype)
    found = read_prompts(prompts, sampler.tokenizer, limit, duplicates)
    drawn = sampler.draw(found, sampling, display)
    lines = "".join(json.dumps(record(each), ensure_ascii=False) + "\n" for each in drawn)
    if out is None:
        sys.stdout.write(lines)
    else:
        with atomic_files.replacing(out) as temporary:
            temporary.write_text(lines, encoding="utf-8")
    tokens = np.mean([len(each.ids) for each in drawn])
    cut = sum(not each.finished for each in drawn)
    display.note(
        f"{len(drawn):,} completions of {len(found):,} prompts, {tokens:.1f} tokens on average, "
        f"{cut:,} cut at {sampling.max_new_tokens:,}"
    )


def record(completion: Completion) -> Row:
    """A row of the output; the completion has the form of its prompt, text or messages."""
    text = completion.prompt.text
    return {
        "prompt": text.prompt,
        **({"tools": text.tools} if text.tools else {}),
        "completion": response_to(text.prompt, completion.text),
        "tokens": len(completion.ids),
        "logps": completion.logps,
        "finished": completion.finished,
    }


def _until_end(tokens: list[int], ends: set[int]) -> Ids:
    """The tokens up to the first that ends a completion, and that one."""
    last = next((k for k, token in enumerate(tokens) if token in ends), len(tokens))
    return np.asarray(tokens[: last + 1], dtype=np.int32)


def is_adapter(source: str) -> bool:
    """Whether a source is the folder of an adapter, as peft writes it."""
    return _description(source).exists()


def _description(source: str) -> Path:
    return Path(os.path.expanduser(source)) / "adapter_config.json"


def _base_of(adapter: str) -> tuple[str, str | None]:
    """The base model of an adapter, and the adapter's folder if a tokenizer is in it."""
    described = _description(adapter)
    try:
        base = json.loads(described.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str):
        raise ModelError(
            f"{described}: names no base_model_name_or_path; restore it as peft wrote it"
        )
    return base, adapter if described.with_name("tokenizer_config.json").exists() else None


def _merged(policy: Policy, adapter: str) -> Policy:
    """The policy with the adapter's update in its weights."""
    import peft

    try:
        wrapped: Any = peft.PeftModel.from_pretrained(policy.base, adapter)
        merged = Policy(wrapped.merge_and_unload(), policy.compute_dtype)
    except Exception as error:  # peft, safetensors and torch raise unrelated types
        raise ModelError(
            f"{adapter}: cannot load the adapter: {first_line(error)}; mend it or name another"
        ) from None
    merged.check_head()
    return merged
