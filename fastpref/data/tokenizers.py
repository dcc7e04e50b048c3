"""The tokenizer of a run: the one that its config names, or one trained on the data."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastpref.config import Config, Model
from fastpref.data import bpe
from fastpref.data.formats import read_groups
from fastpref.data.readers import DataError
from fastpref.utils.errors import ModelError, cannot_load


def tokenizer_of(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer that the config names, or one trained on the data."""
    named = load_tokenizer(config.model)
    if named is not None:
        return named
    size = (config.model.config or {}).get("vocab_size")
    if not isinstance(size, int):
        raise ModelError(
            "model.config.vocab_size: is needed to train a tokenizer on the data (or name one "
            "in model.tokenizer)"
        )
    try:
        groups = read_groups(
            config.data.train, config.build_loss().kind, soft_labels=config.data.soft_labels
        )
        return bpe.train(bpe.texts_of(groups), size)
    except DataError:
        raise
    except ValueError as error:
        raise ModelError(f"model.config.{error}") from None


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase | None:
    """The tokenizer named by the config; None where one is to be trained on the data."""
    source = model.tokenizer or model.path
    if source is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers, tokenizers and the Hub raise unrelated types
        field = "tokenizer" if model.tokenizer else "path"
        raise ModelError(cannot_load(f"model.{field}", source, error)) from None
