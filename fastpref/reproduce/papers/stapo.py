"""StaPO: five epochs of one-sided and two-sided objectives on the same pairs.

"Stable preference optimization via two-sided contrastive learning": the gradients of section 3.2,
the logits of Figures 2 and 3, the margins of Table 2, and the epochs of Table 3 and Figure 4.
`stapo_epochs` has the measurements, `stapo_claims` the claims.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fastpref.reproduce import charts
from fastpref.reproduce.papers import stapo_epochs
from fastpref.reproduce.papers.stapo_claims import (
    ABOVE,
    CLAIMS,
    GRID,
    INSIDE,
    LAST,
    LEFT,
    OBJECTIVES,
    PER_TOKEN,
    RIGHT,
    after,
    contrast_by_token,
)
from fastpref.reproduce.papers.stapo_epochs import EPOCHS, LOGIT_EPOCHS, epoch
from fastpref.reproduce.quantities import column, level
from fastpref.reproduce.sizes import Size
from fastpref.reproduce.study import Job, Runs, Study


def jobs(seed: int, size: Size) -> list[Job]:
    theorems = Job("theorems", seed, {}, function=stapo_epochs.theorems)
    if size.model is not None:
        return [theorems, *(_job(seed, label, size) for label in PER_TOKEN)]
    labels = OBJECTIVES if size.quick else OBJECTIVES | GRID
    return [theorems, *(_job(seed, label, size) for label in labels)]


def _job(seed: int, label: str, size: Size) -> Job:
    followed = stapo_epochs.measure_quick if size.quick else stapo_epochs.measure
    measure = stapo_epochs.measure_some if label in GRID else followed
    if size.model is not None:
        quick = stapo_epochs.measure_pretrained_quick
        measure = quick if size.quick else stapo_epochs.measure_pretrained
    return Job(label, seed, {"loss": (OBJECTIVES | GRID)[label]}, measure=measure)


def draw(seeds: Sequence[Runs]) -> Figure:
    figure, axes = charts.panels(6, 1.7)
    labels = [label for label in OBJECTIVES if label in seeds[0]]
    shown = [label for label in (*PER_TOKEN, "dpo") if label in labels]
    for axis, label in zip(axes, shown, strict=False):
        _histograms(axis, seeds, label)
    if f"{epoch(0)}/win" in seeds[0]["stapo"].arrays:
        _by_epoch(axes[3], seeds, labels, "win", "win rate (share)")
        _by_epoch(axes[4], seeds, labels, "entropy", "entropy (nats per token)")
        axes[4].set_xlabel("epochs")
        rows = [[label] for label in ("stapo", *GRID) if label in seeds[0]]
        charts.dots(axes[5], seeds, rows, level(after("win", LAST)), "win rate, epoch 5 (share)")
    looks = [(k, {"color": charts.COLORS[labels.index(k)], "linewidth": 3}) for k in labels]
    shades = [
        (f"Z after epoch {k}", {"color": charts.INK, "linewidth": 1.0 + i})
        for i, k in enumerate(LOGIT_EPOCHS[1:])
    ]
    charts.legend(figure, [*looks, *shades])
    return figure


def _histograms(axis: Any, seeds: Sequence[Runs], label: str) -> None:
    """Shares of pairs by Z after epochs 1, 3 and 5, between the margins shaded."""
    bins = np.linspace(-1, 4, 51)
    color = charts.COLORS[list(OBJECTIVES).index(label)]
    for position, number in enumerate(LOGIT_EPOCHS[1:]):
        values = np.concatenate([contrast_by_token(number)(runs, label) for runs in seeds])
        counts, _ = np.histogram(np.clip(values, bins[0], bins[-1]), bins)
        axis.stairs(counts / len(values), bins, color=color, linewidth=1.0 + position)
    axis.axvspan(LEFT, RIGHT, color=charts.INK, alpha=0.12, linewidth=0)
    axis.set(xlabel="Z (nats per token)", ylabel=f"{label} (share)")


def _by_epoch(
    axis: Any, seeds: Sequence[Runs], labels: Sequence[str], name: str, unit: str
) -> None:
    """Means of samples over the epochs, in a band from the least seed to the largest."""
    for position, label in enumerate(labels):
        values = np.array([[level(after(name, k))(runs, label) for k in EPOCHS] for runs in seeds])
        color = charts.COLORS[position]
        axis.plot(EPOCHS, values.mean(0), color=color, linewidth=1.6)
        axis.fill_between(EPOCHS, values.min(0), values.max(0), color=color, alpha=0.15)
    begin = np.mean([level(after(name, 0))(runs, "stapo") for runs in seeds])
    axis.axhline(begin, color=charts.INK, linestyle=":")
    axis.set_xticks(EPOCHS)
    axis.set_ylabel(unit)


ROWS = {"train": 200, "held_out": 170, "per_prompt": 6}  # 1,200 pairs, 1,020 held-out ones
STUDY = Study(
    name="stapo",
    title="StaPO: five epochs",
    paper="Stable preference optimization via two-sided contrastive learning",
    setting=(
        "Pairs of generated advice whose labels have noise, from a model that has learned the "
        "best responses to other prompts; five epochs of 1,200 pairs, 16 a step, AdamW with a "
        "constant rate, so that each epoch leaves what a shorter run would. The rate is the "
        "largest one of 1e-5, 2e-5, 3e-5 and 1e-4 at which the samples of SimPO and StaPO win "
        "more after one epoch than before, on a seed that is not among these. The text of the "
        "small model falls apart at a Z far below the paper's margins; the margins 0 and 0.2 are "
        "those with the paper's gap, of left margins 0, 0.2 and 0.6, with which samples won most "
        "after five epochs on that seed. The margins of the log-ratios, which the paper does not "
        "state, are those of the reward divided by beta. A sample wins by the utilities that made "
        "the labels, over responses of the data, and loses if it is no recipe; in the paper a "
        "language model decides, over GPT-4."
    ),
    jobs=jobs,
    training={
        "reference": "cached",
        "optim": {"lr": 1e-5, "warmup_steps": 10, "schedule": "constant"},
        "training": {"epochs": LAST, "batch_size": 16},
    },
    metrics=("loss",),
    columns=(
        column("win rate, epoch 1", after("win", 1), 2),
        column("epoch 3", after("win", 3), 2),
        column("epoch 5", after("win", LAST), 2),
        column("malformed, epoch 5", after("malformed", LAST), 2),
        column("entropy, epoch 1", after("entropy", 1), 2),
        column("entropy, epoch 5", after("entropy", LAST), 2),
        column("mean Z, nats per token", contrast_by_token(LAST), 2),
        column("between the margins", INSIDE, 2),
        column("above", ABOVE, 2),
    ),
    claims=CLAIMS,
    draw=draw,
    caption="Histograms of Z on the pairs trained on, after epochs 1, 3 and 5, with the margins "
    "0.6 and 0.8; win rates and entropy of samples over the epochs, those of the start dotted; win "
    "rates by StaPO's margins. Bands and small dots are seeds.",
    by_epoch=True,
    sizes={"cores": ROWS, "cores, pretrained": ROWS},
)
