"""Checks of an objective against its data, before the model is loaded."""

from __future__ import annotations

import torch

from fastpref.config import ConfigError
from fastpref.data.streaming import AnyDataset, StreamedGroups
from fastpref.losses import Objective, PairwiseLoss
from fastpref.losses.groupwise import PROS
from fastpref.losses.pointwise import KTO
from fastpref.utils.progress import Display


def check_labels(loss: Objective, dataset: AnyDataset) -> None:
    """Refuse soft labels for an objective that does not take them."""
    if isinstance(loss, PairwiseLoss) and not loss.soft_labels and dataset.has_preferences:
        raise ConfigError(
            f"loss: {loss.name} does not take soft labels, and the data has them; set "
            f"data.soft_labels=false or choose another objective"
        )


def check_margins(loss: Objective, dataset: AnyDataset) -> None:
    """Refuse an objective with margins of the data where a pair has none."""
    if loss.needs_margin and dataset.without_margin:
        raise ConfigError(
            f"loss.offset: {dataset.without_margin:,} of {len(dataset):,} pairs from "
            f"{dataset.source} have no margin; give all of them one in the column margin, or leave "
            "offset out"
        )


def advise_on_margins(loss: Objective, dataset: AnyDataset, display: Display) -> None:
    """Note that a column `margin` is read by no objective without an offset."""
    if not loss.needs_margin and dataset.without_margin < len(dataset):
        display.note(
            f"note: {loss.name} does not use the column margin of the data; loss.offset=1 asks "
            "for these margins, of objectives on the reward margin"
        )


def check_scores(loss: Objective, dataset: AnyDataset) -> None:
    """Refuse an alpha at or below which PRO-S has no optimum for some group."""
    if not isinstance(loss, PROS) or isinstance(dataset, StreamedGroups):
        return
    scores, offsets = torch.tensor(dataset.label_values()), torch.tensor(dataset.offsets)

    def required(first: int, last: int) -> float:
        cu_groups = offsets[first : last + 1]
        part = scores[cu_groups[0] : cu_groups[-1]]
        return loss.required_alpha(part, cu_groups - cu_groups[0]).item()

    size = 64  # the matrices of required_alpha grow with its square
    starts = range(0, len(dataset), size)
    start = max(starts, key=lambda k: required(k, min(k + size, len(dataset))))
    worst = max(range(start, min(start + size, len(dataset))), key=lambda k: required(k, k + 1))
    bound = required(worst, worst + 1)
    if loss.alpha <= bound:
        first, last = dataset.offsets[worst : worst + 2]
        spread = (scores[first:last] - scores[first:last].mean()).abs().max().item()
        row = dataset.row_names([worst])[0]
        raise ConfigError(
            f"loss.alpha: must be > {bound:.4g} for these scores, got {loss.alpha:g}; at or below "
            f"it pro_s has no optimum (row {row} of {dataset.source}, whose "
            f"{last - first} scores lie up to {spread:.4g} from their mean); raise it or scale the "
            "scores down"
        )


def advise_on_weights(loss: Objective, dataset: AnyDataset, display: Display) -> None:
    """Note where the weights of KTO's classes are outside the advised range (see `KTO`)."""
    if not isinstance(loss, KTO) or isinstance(dataset, StreamedGroups):
        return
    desirable = int(dataset.label_values().sum())
    undesirable = len(dataset) - desirable
    if not desirable or not undesirable:
        missing = "undesirable" if desirable else "desirable"
        display.note(f"note: there is no {missing} response; kto is meant for both classes")
        return
    weights = (loss.desirable_weight * desirable, loss.undesirable_weight * undesirable)
    ratio = weights[0] / weights[1]
    if not 1 <= ratio <= 4 / 3:
        low = loss.undesirable_weight * undesirable / desirable
        display.note(
            f"note: desirable responses weigh {ratio:.2f} times as much as undesirable ones; "
            f"between 1 and 1.33 is advised, e.g. loss.desirable_weight from {low:.3g} to "
            f"{low * 4 / 3:.3g}"
        )
