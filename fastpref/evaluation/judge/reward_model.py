"""A reward model as judge: a sequence classifier with one label, on the chat template."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from fastpref.evaluation.judge.answers import Question
from fastpref.evaluation.judge.cache import Cache
from fastpref.evaluation.judge.model_judge import ModelJudge
from fastpref.evaluation.judge.pairs import Pair
from fastpref.evaluation.judge.verdicts import Judged, of_preference
from fastpref.training.setup import device_of
from fastpref.utils.atomic_files import sha256
from fastpref.utils.errors import ModelError, UserError, cannot_load
from fastpref.utils.progress import Display


class RewardModel:
    """A model that scores one answer to a prompt.

    source: folder or Hub name; or the folder of an adapter with a trained head. dtype: None is
        bfloat16 on CUDA and float32 on CPU.
    text: score a text prompt with the answer behind it as plain text with an EOS, as the trainer
        reads such data, instead of as a conversation.
    option: that names the source, for messages.

    Raises ModelError if the source is no reward model with a chat template. A causal language model
    is refused, for its score layer would be random.
    """

    def __init__(
        self,
        source: str,
        device: str = "auto",
        dtype: str | None = None,
        text: bool = False,
        option: str = "--reward-model",
    ) -> None:
        torch_device = device_of(device)
        self.source, self.text, self.option = source, text, option
        self.dtype = dtype or ("bfloat16" if torch_device.type == "cuda" else "float32")
        try:
            base = _base_of_adapter(option, source)
            config = AutoConfig.from_pretrained(base or source)
            if base is not None:
                config.num_labels = 1
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
        except UserError:
            raise
        except Exception as error:  # transformers and the Hub raise unrelated types
            raise ModelError(cannot_load(option, source, error)) from None
        if config.num_labels != 1:
            raise ModelError(
                f"{option}: {source} has {config.num_labels} labels; use a classifier with one, "
                "whose output is the reward"
            )
        if self.tokenizer.chat_template is None and not text:
            raise ModelError(
                f"{option}: {source} has no chat template; use a reward model with one"
            )
        if base is None:
            model = _load(option, source, self.dtype)
        else:
            model = _load_adapter(option, source, base, self.dtype, self.tokenizer.pad_token_id)
        self.model = model.to(torch_device).eval()
        self.fingerprint = fingerprint_of(source, config)

    @property
    def context(self) -> int | None:
        """Largest number of tokens, if the model has one."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return positions if isinstance(positions, int) and positions > 0 else None

    def encode(self, question: Question, answer: str) -> list[int]:
        """Token ids of a prompt and an answer; a text prompt is one message of the user.

        Raises UserError if the chat template fails or the model has too few positions.
        """
        prompt = question.prompt
        if self.text and isinstance(prompt, str):
            return self._checked(question, self._encode_text(prompt, answer))
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [*messages, {"role": "assistant", "content": answer}]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a chat template may raise anything
            raise UserError(
                f"{question.name}: chat template of {self.source} failed: {error}; leave it out"
            ) from None
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._checked(question, ids)

    def _encode_text(self, prompt: str, answer: str) -> list[int]:
        """Token ids as the trainer reads them: behind a BOS or EOS if none is of the prompt."""
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token_id
        special = not (bos and prompt.startswith(bos))
        before, ids = self.tokenizer([prompt, prompt + answer], add_special_tokens=special)[
            "input_ids"
        ]
        opener = eos if bos is None else self.tokenizer.bos_token_id
        if before[:1] != ids[:1] or not before:
            ids = ids if opener is None else [opener, *ids]
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]

    def _checked(self, question: Question, ids: list[int]) -> list[int]:
        """The tokens themselves; raises UserError if the model has too few positions."""
        if self.context is not None and len(ids) > self.context:
            raise UserError(
                f"{question.name}: prompt and answer have {len(ids):,} tokens, and {self.source} "
                f"has {self.context:,} positions; leave it out"
            )
        return ids

    @torch.no_grad()
    def scores(self, sequences: list[list[int]]) -> list[float]:
        """Rewards of a batch of token sequences."""
        pad = self.model.config.pad_token_id
        # A model that names no padding token scores the last token, and takes no batches.
        if pad is None and len(sequences) > 1:
            return [score for ids in sequences for score in self.scores([ids])]
        width = max(map(len, sequences))
        ids = torch.full((len(sequences), width), pad or 0)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        device = self.model.device
        output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
        rewards = output.logits[:, 0].float().cpu()
        if not rewards.isfinite().all():
            raise ModelError(
                f"{self.option}: {self.source} gives rewards that are not finite; fix it"
            )
        return [float(reward) for reward in rewards]


@dataclass(frozen=True)
class RewardJudge(ModelJudge):
    """A reward model that prefers the answer with the higher reward."""

    model: RewardModel

    positional = False

    def judge(self, pairs: list[Pair], cache: Cache, display: Display) -> list[Judged]:
        """Score both answers of every pair; scores in the cache are not computed again."""
        answers = {
            self._key(pair, answer): (pair.question, answer)
            for pair in pairs
            for answer in (pair.a, pair.b)
        }
        pending = [
            (key, self.model.encode(*answer))
            for key, answer in answers.items()
            if key not in cache.records
        ]
        self.compute(pending, len(answers), list, self.model.scores, "reward", cache, display)
        return [self._verdict(pair, cache) for pair in pairs]

    def _verdict(self, pair: Pair, cache: Cache) -> Judged:
        reward_a, reward_b = (
            cache.records[self._key(pair, answer)]["reward"] for answer in (pair.a, pair.b)
        )
        preference = self.preference(reward_a - reward_b)
        return of_preference(pair, preference, f"rewards {reward_a!r} and {reward_b!r}")

    def _key(self, pair: Pair, answer: str) -> str:
        model = self.model
        state = (model.source, model.fingerprint, model.dtype)
        return sha256("reward", *state, pair.question.text, answer)


def _base_of_adapter(option: str, source: str) -> str | None:
    """Model of an adapter's folder; None for a folder or a Hub name of a whole model."""
    file = Path(os.path.expanduser(source)) / "adapter_config.json"
    if not file.is_file() or (file.parent / "config.json").is_file():
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    if "score" not in (config.get("modules_to_save") or ()):
        raise ModelError(
            f"{option}: {source} is an adapter without a trained head (score), which would be "
            "random; use one of fastpref reward"
        )
    return str(config["base_model_name_or_path"])


def _load_adapter(option: str, source: str, base: str, dtype: str, pad: int | None) -> Any:
    """A reward model with its adapter merged."""
    from peft import PeftModel

    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, dtype=getattr(torch, dtype)
        )
        merged: Any = PeftModel.from_pretrained(model, source)
        merged = merged.merge_and_unload()
    except Exception as error:  # transformers, peft and the Hub raise unrelated types
        raise ModelError(cannot_load(option, source, error)) from None
    merged.config.get_text_config().pad_token_id = pad
    return merged


def _load(option: str, source: str, dtype: str) -> Any:
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=getattr(torch, dtype), output_loading_info=True
        )
    except Exception as error:  # transformers, safetensors and the Hub raise unrelated types
        raise ModelError(cannot_load(option, source, error)) from None
    check_complete(option, source, report)
    return model


def check_complete(option: str, source: str, report: dict[str, Any]) -> None:
    """Raise ModelError for weights that the report of transformers says are missing."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{option}: {source} has no weights named {missing[0]}, which would be random; use a "
            "trained reward model"
        )


def fingerprint_of(source: str, config: Any) -> str:
    """State of a folder's files, or the commit of a Hub repository: scores belong to weights."""
    folder = Path(os.path.expanduser(source))
    if not folder.is_dir():
        return str(getattr(config, "_commit_hash", None))
    states = [
        f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}"
        for path in sorted(folder.iterdir())
        if path.is_file()
    ]
    return sha256(*states)
