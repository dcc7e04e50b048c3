"""A model that compares two answers in one pass, in the published layout of PairRM.

It reads `<|source|>prompt`, `<|candidate1|>answer` and `<|candidate2|>answer`, each with the
special tokens of the tokenizer, and gives the log-odds that the first answer is the better one. The
state of `<|source|>` next to that of each candidate's token goes through one head; the log-odds are
the difference, averaged over the tasks of the head (LLM-Blender, arXiv:2306.02561).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, DebertaV2Model, DebertaV2PreTrainedModel

from fastpref.evaluation.judge.answers import Question
from fastpref.evaluation.judge.cache import Cache
from fastpref.evaluation.judge.model_judge import ModelJudge
from fastpref.evaluation.judge.pairs import Pair
from fastpref.evaluation.judge.reward_model import check_complete, fingerprint_of
from fastpref.evaluation.judge.verdicts import Game, Judged, of_preference
from fastpref.training.setup import device_of
from fastpref.utils.atomic_files import sha256
from fastpref.utils.errors import ModelError, UserError, cannot_load
from fastpref.utils.progress import Display

_ARCHITECTURE = "DebertaV2PairRM"
# Tokens before the prompt and the two answers, and the fields of the config with their ids.
_PREFIXES = {
    "<|source|>": "source_prefix_id",
    "<|candidate1|>": "cand1_prefix_id",
    "<|candidate2|>": "cand2_prefix_id",
}
SOURCE_TOKENS, ALL_TOKENS = 1224, 2048  # longest prompt; prompt and both answers


def compares_pairs(source: str, option: str = "--reward-model") -> bool:
    """Whether a model compares two answers in one pass; False for what cannot be read at all.

    option: that names the source, for messages.

    Raises ModelError for a layout of PairRM that is not known here.
    """
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception:  # the reward model says why, by its name
        return False
    if hasattr(config, "ranker_type"):
        raise ModelError(
            f"{option}: {source} is a ranker in llm-blender's own layout; use one in the layout "
            "of transformers, such as llm-blender/PairRM-hf"
        )
    names = config.architectures or ()
    unknown = [name for name in names if name.endswith("PairRM") and name != _ARCHITECTURE]
    if unknown:
        raise ModelError(
            f"{option}: {source} compares answers in an unknown layout, {unknown[0]}; use one of "
            f"{_ARCHITECTURE}"
        )
    return _ARCHITECTURE in names


class _PairRM(DebertaV2PreTrainedModel):
    """Encoder under a head of two layers; the names of the parameters are the published ones."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.pretrained_model = DebertaV2Model(config)
        size = config.hidden_size
        self.head_layer = nn.Sequential(
            nn.Dropout(0.0),
            nn.Linear(2 * size, size),
            nn.Tanh(),
            nn.Dropout(0.0),
            nn.Linear(size, config.n_tasks),
        )
        self.post_init()

    def forward(
        self,
        ids: Tensor,  # (B, S)
        mask: Tensor,  # (B, S)
        places: Tensor,  # (B, 3), of the prefixes
    ) -> Tensor:
        """Log-odds that the first answer is the better one, (B,)."""
        hidden = self.pretrained_model(input_ids=ids, attention_mask=mask).last_hidden_state
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        source, first, second = hidden[rows, places].unbind(1)
        left = self.head_layer(torch.cat([source, first], dim=-1))
        right = self.head_layer(torch.cat([source, second], dim=-1))
        logits: Tensor = (left - right).mean(-1)
        return logits


class Comparison(NamedTuple):
    """Token ids of a prompt and two answers, and the places of their prefixes."""

    ids: list[int]
    places: tuple[int, int, int]
    is_cut: bool


class PairModel:
    """A model that compares two answers to a prompt.

    source: folder or Hub name. dtype: None is bfloat16 on CUDA and float32 on CPU.
    option: that names the source, for messages.

    Raises ModelError for weights or tokens that are not those of the layout.
    """

    def __init__(
        self,
        source: str,
        device: str = "auto",
        dtype: str | None = None,
        option: str = "--reward-model",
    ) -> None:
        torch_device = device_of(device)
        self.source, self.option = source, option
        self.dtype = dtype or ("bfloat16" if torch_device.type == "cuda" else "float32")
        try:
            config = AutoConfig.from_pretrained(source)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
            for field in (*_PREFIXES.values(), "n_tasks"):
                getattr(config, field)
            loaded: Any = _PairRM.from_pretrained(
                source, config=config, dtype=getattr(torch, self.dtype), output_loading_info=True
            )
            model, report = loaded
        except Exception as error:  # transformers, safetensors and the Hub raise unrelated types
            raise ModelError(cannot_load(option, source, error)) from None
        check_complete(option, source, report)
        self._prefixes = {text: int(getattr(config, name)) for text, name in _PREFIXES.items()}
        for text, number in self._prefixes.items():
            if self.tokenizer.convert_tokens_to_ids(text) != number:
                raise ModelError(
                    f"{option}: {source} has no token {text} with the id of its config, {number}; "
                    "use the tokenizer that the model was trained with"
                )
        self.has_cut = False  # a comparison, of which a note told
        self.model = model.to(torch_device).eval()
        self.fingerprint = fingerprint_of(source, config)

    def encode(self, question: Question, first: str, second: str) -> Comparison:
        """Tokens of a comparison; a long prompt and long answers are cut at their ends.

        Raises UserError for a prompt of several messages, and for texts with the model's prefixes.
        """
        prompt = question.prompt
        if not isinstance(prompt, str):
            if len(prompt) != 1 or prompt[0].get("role") != "user":
                raise UserError(
                    f"{question.name}: has {len(prompt)} messages, and {self.source} compares "
                    "answers to one message of the user; leave it out"
                )
            prompt = question.text
        texts = dict(zip(_PREFIXES, (prompt, first, second), strict=True))
        for text in texts.values():
            for prefix in _PREFIXES:
                if prefix in text:
                    raise UserError(
                        f"{question.name}: has {prefix} in its text, which {self.source} reads as "
                        "a prefix; leave it out"
                    )
        parts: list[list[int]] = []
        is_cut, room = False, SOURCE_TOKENS
        for prefix, text in texts.items():
            part = self.tokenizer(prefix + text)["input_ids"]
            if len(part) > room:
                is_cut = True
                part = self.tokenizer(prefix + text, truncation=True, max_length=room)["input_ids"]
            parts.append(part)
            room = (ALL_TOKENS - len(parts[0])) // 2
        ids = [number for part in parts for number in part]
        source_place, first_place, second_place = map(ids.index, self._prefixes.values())
        return Comparison(ids, (source_place, first_place, second_place), is_cut)

    @torch.no_grad()
    def logits(self, comparisons: list[Comparison]) -> list[float]:
        """Log-odds that the first answer is the better one, for a batch."""
        width = max(len(each.ids) for each in comparisons)
        ids = torch.full((len(comparisons), width), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, each in enumerate(comparisons):
            ids[row, : len(each.ids)] = torch.tensor(each.ids)
            mask[row, : len(each.ids)] = 1
        device = self.model.device
        places = torch.tensor([each.places for each in comparisons])
        logits = self.model(ids.to(device), mask.to(device), places.to(device)).float().cpu()
        if not logits.isfinite().all():
            raise ModelError(
                f"{self.option}: {self.source} gives rewards that are not finite; fix it"
            )
        return [float(logit) for logit in logits]


@dataclass(frozen=True)
class PairJudge(ModelJudge):
    """A model that compares both answers of a pair, in both orders.

    The margin is the mean log-odds of both orders.
    """

    model: PairModel

    positional = True

    def judge(self, pairs: list[Pair], cache: Cache, display: Display) -> list[Judged]:
        """Compare the answers of every pair; log-odds in the cache are not computed again.

        The first comparison that is cut gets a note. Identical answers are a tie.
        """
        asked = {
            self._key(pair, *order): self.model.encode(pair.question, *order)
            for pair in pairs
            if not pair.is_identical
            for order in _orders(pair)
        }
        if not self.model.has_cut and any(comparison.is_cut for comparison in asked.values()):
            self.model.has_cut = True
            display.note(
                f"note: comparisons of more than {ALL_TOKENS:,} tokens are cut, prompts at "
                f"{SOURCE_TOKENS:,} and answers at half of the rest"
            )
        pending = [item for item in asked.items() if item[0] not in cache.records]
        self.compute(
            pending, len(asked), lambda one: one.ids, self.model.logits, "logit", cache, display
        )
        return [self._verdict(pair, cache) for pair in pairs]

    def _verdict(self, pair: Pair, cache: Cache) -> Judged:
        if pair.is_identical:
            return of_preference(pair, 0.5)
        baseline_first, model_first = (
            cache.records[self._key(pair, *order)]["logit"] for order in _orders(pair)
        )
        preference = self.preference((model_first - baseline_first) / 2)
        return Judged(pair, (_game(baseline_first), _game(model_first)), preference)

    def _key(self, pair: Pair, first: str, second: str) -> str:
        model = self.model
        state = (model.source, model.fingerprint, model.dtype)
        return sha256("pair", *state, pair.question.text, first, second)


def _orders(pair: Pair) -> tuple[tuple[str, str], tuple[str, str]]:
    """The answers as they are shown: first the baseline's before, then the model's."""
    return (pair.b, pair.a), (pair.a, pair.b)


def _game(logit: float) -> Game:
    label = "A=B" if logit == 0 else "A>B" if logit > 0 else "B>A"
    return Game(label, f"log-odds {logit!r}")
