"""Tokenizer of a run: loaded as the config says, or trained on the data."""

from __future__ import annotations

from itertools import chain

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastpref.config import Data, Model
from fastpref.data import bpe
from fastpref.data.formats import RowKind
from fastpref.data.readers import DataError
from fastpref.data.sft import read_rows_of
from fastpref.data.template_source import with_template
from fastpref.utils.errors import ModelError, cannot_load


def tokenizer_of(model: Model, data: Data, rows: RowKind) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the config names, or train one on the data, with its template.

    rows: the kind of its rows, which decides the columns that are read.

    Raises ModelError or DataError.
    """
    tokenizer = load_tokenizer(model)
    if tokenizer is not None:
        return with_template(tokenizer, data)
    size = (model.config or {}).get("vocab_size")
    if not isinstance(size, int):
        raise ModelError(
            "model.config.vocab_size: is needed to train a tokenizer on the data (or name one "
            "in model.tokenizer)"
        )
    if data.streaming:
        raise ModelError(
            "model.tokenizer: is needed with data.streaming, since none is trained on streamed "
            "data; name one"
        )
    try:
        groups = chain.from_iterable(
            read_rows_of(source.location, rows, data.of(source)) for source in data.sources("train")
        )
        return with_template(bpe.train(bpe.texts_of(groups), size), data)
    except DataError:
        raise
    except ValueError as error:
        raise ModelError(f"model.config.{error}") from None


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that the config names; None if it names none."""
    source = model.tokenizer or model.path
    if source is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers, tokenizers and the Hub raise unrelated types
        field = "tokenizer" if model.tokenizer else "path"
        raise ModelError(cannot_load(f"model.{field}", source, error)) from None
