"""PRO: likelihoods and lengths in training, extreme imbalance, and scored responses.

"Proximalized preference optimization for diverse feedback types" (arXiv:2505.23316): the theorems
of sections 3 and 4, Figures 2, 4 and 5, Table 2 (1 % of one label) and Table 3 (two and four scored
responses). `pro_runs` has the runs, `pro_tables` the theorems, `pro_claims` the claims.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fastpref.reproduce import charts
from fastpref.reproduce.papers.pro_claims import CLAIMS, SINCE_FIRST
from fastpref.reproduce.papers.pro_runs import (
    ALPHAS,
    DESIRED,
    METHODS,
    RARE,
    SCORED,
    jobs,
    rare,
    run,
    scored,
)
from fastpref.reproduce.quantities import (
    MALFORMED,
    TOKENS,
    WIN,
    chosen_change,
    column,
    level,
    rejected_change,
)
from fastpref.reproduce.sample_scores import WIN as WIN_NAME
from fastpref.reproduce.study import Runs, Study


def draw(seeds: Sequence[Runs]) -> Figure:
    figure, axes = charts.panels(4, 2.0)
    labels = [label for label in (run(method) for method in METHODS) if label in seeds[0]]
    for axis, side, quantity in (
        (axes[0], "chosen", chosen_change),
        (axes[1], "rejected", rejected_change),
    ):
        charts.dots(axis, seeds, [[k] for k in labels], level(quantity), f"{side}, change (nats)")
    sampled = [run(method) for method in METHODS if run(method) in seeds[0]]
    entries = _imbalance(axes[2], seeds) if rare(DESIRED) in seeds[0] else []
    sampled += [scored(k, n) for k in ("nca", "pro_s") for n in SCORED]
    rows = [[k] for k in sampled if k in seeds[0] and WIN_NAME in seeds[0][k].arrays]
    if rows:
        charts.dots(axes[3], seeds, rows, level(WIN), "win rate (share)")
    charts.legend(figure, entries)
    return figure


def _imbalance(axis: Any, seeds: Sequence[Runs]) -> list[Any]:
    """Win rates with 1 % of a label over alpha, and those of KTO as dotted lines."""
    entries = []
    alphas = [alpha for alpha in ALPHAS if rare(DESIRED, alpha) in seeds[0]]
    for position, label in enumerate(RARE):
        wins = np.array(
            [[level(WIN)(runs, rare(label, alpha)) for alpha in alphas] for runs in seeds]
        )
        look = {"color": charts.COLORS[5 + position], "marker": "o", "markersize": 4}
        axis.plot(alphas, wins.mean(0), **look)
        axis.fill_between(alphas, wins.min(0), wins.max(0), color=look["color"], alpha=0.15)
        dotted = {"color": look["color"], "linestyle": ":"}
        axis.axhline(np.mean([level(WIN)(runs, rare(label)) for runs in seeds]), **dotted)
        entries += [(f"pro_b, {label}", look), (f"kto, {label}", dotted)]
    axis.set(xlabel="alpha of PRO-B", ylabel="win rate (share)")
    return entries


ROWS = {"train": 200, "held_out": 170, "per_prompt": 6}
STUDY = Study(
    name="pro",
    title="PRO: likelihoods, imbalance, scores",
    paper="Proximalized preference optimization for diverse feedback types: a decomposed "
    "perspective on DPO, arXiv:2505.23316",
    setting=(
        "Generated advice, four scored responses to each prompt: as pairs of the best and the "
        "worst, as single labels, as groups of the best and a random one, or as all four. The "
        "start model has learned the best responses to other prompts (SFT). One epoch of 16 "
        "pairs, 16 groups or 32 single responses a step, RMSprop with a constant rate after a "
        "warm-up, as in the paper; the rate, the same for all methods as there, is the largest "
        "one of 1e-5, 2e-5, 3e-5 and 1e-4 at which DPO's samples win more after a third of the "
        "epoch than before, on a seed that is not among these. A sample wins by the utilities "
        "that made the scores, over responses of the data, and loses if it is no recipe; in the "
        "paper a language model decides, over the preferred response of the data. The best runs "
        "over beta are chosen after the runs, for all methods alike."
    ),
    jobs=jobs,
    training={
        "reference": "cached",
        "optim": {"name": "rmsprop", "lr": 2e-5, "warmup_steps": 10, "schedule": "constant"},
        "training": {"epochs": 1, "log_every": 25, "eval_every": None},
    },
    metrics=("loss",),
    columns=(
        column("chosen, nats", chosen_change, 1),
        column("rejected, nats", rejected_change, 1),
        column("win rate", WIN, 2),
        column("since a third", SINCE_FIRST, 2),
        column("malformed", MALFORMED, 2),
        column("tokens of a sample", TOKENS, 1),
    ),
    claims=CLAIMS,
    draw=draw,
    # Its claims are about samples, which are scored on generated data only.
    takes_groups=False,
    caption="Change of held-out log-probs with beta 0.1; win rates of samples with 1 % of a label "
    "left, by alpha, and after other runs. Small dots are seeds.",
    # 1,200 pairs, or 40 steps of 8, and 1,020 held-out pairs.
    sizes={"cores": ROWS, "cores, pretrained": ROWS | {"train": 54}},
)
