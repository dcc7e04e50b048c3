"""Everything that is ready before the first step: folder, tokens, plan, policy, reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from fastpref import checkpoint
from fastpref.config import Config, ConfigError
from fastpref.data import bpe
from fastpref.data.batches import Plan
from fastpref.data.formats import read_pairs
from fastpref.data.tokens import PairDataset, load_pairs
from fastpref.model import ModelError, Policy, context_length, load_policy, load_tokenizer
from fastpref.progress import Display
from fastpref.reference_logps import Reference, reference_for


@dataclass(frozen=True)
class Pairs:
    """A data set, the order in which it is visited, and its reference log-probs."""

    dataset: PairDataset
    plan: Plan
    reference: Reference


@dataclass(frozen=True)
class Prepared:
    folder: Path
    checkpoint: Path | None  # to continue from
    tokenizer: PreTrainedTokenizerBase
    policy: Policy  # as loaded; not yet restored from the checkpoint
    train: Pairs
    eval: Pairs | None = None


def prepare(config: Config, display: Display) -> Prepared:
    """Load, tokenise and plan; the reference is taken from the policy as it was loaded.

    Raises UserError in one line for anything a user can mend.
    """
    folder = Path(config.training.output)
    found = _claim(folder, config)
    tokenizer = _tokenizer(config)
    train = load_pairs(config.data.train, tokenizer, config.data)
    display.note(f"train: {train.summary()}")
    held_out = None
    if config.data.eval is not None:
        held_out = load_pairs(config.data.eval, tokenizer, config.data, "test")
        display.note(f"eval: {held_out.summary()}")
    _check_labels(config, train, *([] if held_out is None else [held_out]))
    policy = load_policy(config, tokenizer, device_of(config.training.device))
    t, cache = config.training, Path(config.data.cache).expanduser()
    # Every budget is checked before the reference takes its time.
    plans = []
    for dataset, seed in ((train, t.seed), (held_out, None)):
        if dataset is not None:
            _check_context(dataset, policy)
            plans.append((dataset, Plan(dataset.padded_lengths, t.batch_size, t.max_tokens, seed)))
    pairs: list[Pairs] = []
    for dataset, plan in plans:
        if config.reference_mode == "cached":
            display.phase("reference", len(dataset))
        shared = pairs[0].reference if pairs and config.reference_mode == "frozen" else None
        reference = shared or reference_for(
            config.reference_mode, policy, dataset, plan, cache, display
        )
        pairs.append(Pairs(dataset, plan, reference))
    return Prepared(folder, found, tokenizer, policy, *pairs)


def _check_labels(config: Config, *datasets: PairDataset) -> None:
    loss = config.build_loss()
    if not loss.soft_labels and any(dataset.has_preferences for dataset in datasets):
        raise ConfigError(
            f"loss: {loss.name} does not take soft labels, and the data has them; set "
            f"data.soft_labels=false or choose another objective"
        )


def _check_context(dataset: PairDataset, policy: Policy) -> None:
    longest, context = int(dataset.padded_lengths.max()), context_length(policy)
    if context is not None and longest > context:
        raise ConfigError(
            f"data.max_length: the longest response ends at position {longest:,} but the model "
            f"knows {context:,}; set data.max_length={context} or less"
        )


def _claim(folder: Path, config: Config) -> Path | None:
    """Make the run directory and find the checkpoint to continue from, if that is asked for."""
    if config.resume is None and (folder / "metrics.jsonl").exists():
        raise ConfigError(
            f"training.output: {folder} already holds a run; continue it with resume=auto or "
            "choose another folder"
        )
    found = checkpoint.find(folder / "checkpoints", config.resume) if config.resume else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"training.output: {error.filename}: {error.strerror}") from None
    return found


def _tokenizer(config: Config) -> PreTrainedTokenizerBase:
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
        return bpe.train(bpe.texts_of(read_pairs(config.data.train)), size)
    except ValueError as error:
        raise ModelError(f"model.config.{error}") from None


def device_of(name: str) -> torch.device:
    """The device of `training.device`; raises ConfigError for a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("training.device: cuda is asked for, but torch finds no GPU")
    return torch.device(name)
