"""Checks of a reward objective against its data, before the model is loaded."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastpref.config import ConfigError, Model
from fastpref.data.dataset import UNITS
from fastpref.data.streaming import AnyDataset, StreamedGroups
from fastpref.losses import Objective
from fastpref.losses.reward import LabelRegression, PlackettLuce
from fastpref.model.load import model_config, naming_the_model
from fastpref.model.reward_adapter import is_classifier
from fastpref.utils.progress import Display

Counts = np.ndarray[Any, np.dtype[np.int64]]


def check_rewards(loss: Objective, name: str, dataset: AnyDataset, display: Display) -> None:
    """Refuse data that a reward objective cannot learn, and note groups that teach it nothing.

    name: of the data's section, train or eval. Streamed data is not read before training.

    Raises ConfigError.
    """
    if not loss.of_rewards:
        return
    if dataset.has_token_weights:
        raise ConfigError(
            f"loss: {loss.name} has no log-probs of tokens to weigh, and the data has "
            "chosen_weights and rejected_weights; set data.token_weights=false to leave them out"
        )
    if isinstance(dataset, StreamedGroups):
        return
    if isinstance(loss, PlackettLuce):
        _check_order(dataset, display)
    if isinstance(loss, LabelRegression):
        _advise_on_labels(dataset, display)
    if loss.needs_margin:
        _advise_on_negative_margins(dataset, display)
    _check_responses(name, dataset, display)


def advise_on_padding(loss: Objective, model: Model, dataset: AnyDataset, display: Display) -> None:
    """Note a classifier whose padding token ends the sequences: transformers passes over it."""
    if not loss.of_rewards or model.path is None or isinstance(dataset, StreamedGroups):
        return
    with naming_the_model(model):
        config = model_config(model, {})
    if not is_classifier(config):
        return
    groups = (dataset[index] for index in range(min(8, len(dataset))))
    ends = {int(response[-1]) for group in groups for response in group.responses}
    if config.get_text_config().pad_token_id in ends:
        display.note(
            f"note: the padding token of {model.path} ends the sequences. transformers passes over "
            "it and reads the reward of the token before; here and in the export it is read at the "
            "end, so the first rewards are not those of the model itself"
        )


def _check_order(dataset: Any, display: Display) -> None:
    scores, starts = dataset.label_values(), dataset.offsets[:-1]
    is_tied = np.maximum.reduceat(scores, starts) == np.minimum.reduceat(scores, starts)
    tied = int(is_tied.sum())
    if tied == len(dataset):
        raise ConfigError(
            f"loss: plackett_luce learns the order of a group's scores, and no group of "
            f"{dataset.source} has two different ones; use reward_regression, or other data"
        )
    if tied:
        display.note(
            f"note: {tied:,} of {len(dataset):,} groups have no two different scores, so they "
            "have no order to learn"
        )


def _advise_on_labels(dataset: Any, display: Display) -> None:
    desirable = int(dataset.label_values().sum())
    if desirable in (0, len(dataset)):
        missing = "undesirable" if desirable else "desirable"
        display.note(
            f"note: there is no {missing} response; the reward of every response becomes "
            f"{int(desirable > 0)}"
        )


def _advise_on_negative_margins(dataset: Any, display: Display) -> None:
    negative = int((dataset.margin_values() < 0).sum())
    if negative:
        display.note(
            f"note: {negative:,} of {len(dataset):,} margins are negative: the reward of rejected "
            "may be larger there; are chosen and rejected in their columns?"
        )


def _check_responses(name: str, dataset: Any, display: Display) -> None:
    """Note groups of which all responses are equal, as read or after they are cut; refuse all."""
    counts, starts = np.diff(dataset.offsets), dataset.offsets[:-1]
    lengths = dataset.response_lengths
    shortest, longest = (f.reduceat(lengths, starts) for f in (np.minimum, np.maximum))
    candidates = np.flatnonzero((counts > 1) & (shortest == longest))
    equal = [int(index) for index in candidates if _all_equal(dataset[int(index)].responses)]
    if not equal:
        return
    unit = UNITS[dataset.kind]
    if len(equal) == len(dataset):
        raise ConfigError(
            f"data.{name}: the responses of every {unit} of {dataset.source} are equal up to "
            "data.max_length; name other columns, or raise it"
        )
    display.note(
        f"note: {len(equal):,} of {len(dataset):,} {unit}s have equal responses up to "
        f"data.max_length, e.g. row {dataset.row_names(equal[:1])[0]}; they teach nothing, and "
        "rounding decides whether they count as right"
    )


def _all_equal(responses: Any) -> bool:
    return all(np.array_equal(responses[0], response) for response in responses[1:])
