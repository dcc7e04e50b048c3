"""StaPO: five epochs of one-sided and two-sided objectives on the same pairs.

"Stable preference optimization via two-sided contrastive learning": the histograms of Figure 2, the
curves of Figure 3, the epochs of Table 3 and Figure 4, and the margins of Table 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from fastpref.reproduce import charts
from fastpref.reproduce.sample_scores import MALFORMED, WIN_RATE
from fastpref.reproduce.study import BASELINES, Claim, Job, Runs, Study, difference, final

INSIDE, ABOVE, Z = (f"contrast/{name}" for name in ("inside", "above", "mean"))
ENTROPY, ACCURACY = "eval_entropy", "eval_rewards/accuracies"
EPOCHS = 5
OBJECTIVES = {
    "simpo": BASELINES["simpo"],
    "stapo": {"name": "stapo", "left_margin": 0.6, "right_margin": 0.8},
    "dpo": BASELINES["dpo"],
    "stapo, Z of DPO": {"name": "stapo_ref", "left_margin": 12.0, "right_margin": 16.0},
}
GRID = {
    f"stapo {left:g} to {right:g}": {"name": "stapo", "left_margin": left, "right_margin": right}
    for left, right in ((0.2, 0.4), (0.4, 0.6), (0.8, 1.0), (0.4, 1.0), (0.6, 1.2))
}


def jobs(seed: int, quick: bool) -> list[Job]:
    losses = OBJECTIVES if quick else OBJECTIVES | GRID
    return [Job(label, seed, {"loss": loss}, scores_samples=True) for label, loss in losses.items()]


def _moved(runs: Runs, label: str) -> float:
    """Distance of the final entropy of the policy from its initial entropy."""
    return abs(runs[label].last(ENTROPY) - runs[label].first(ENTROPY))


def _lost(runs: Runs, label: str) -> float:
    """Held-out accuracy of the best epoch, less that of the last one."""
    accuracies = runs[label].series(ACCURACY)[1]
    return max(accuracies) - accuracies[-1]


CLAIMS = (
    Claim(
        "SimPO drives the contrastive logit past its margin, StaPO holds it",
        "section 4.1, Figure 2",
        "share of pairs trained on above 0.8, SimPO − StaPO, in the last epoch",
        difference(ABOVE, "simpo", "stapo"),
        above=0,
    ),
    Claim(
        "With StaPO more of the logits lie between the margins",
        "section 4.1, Figure 2",
        "share of pairs trained on from 0.6 to 0.8, StaPO − SimPO, in the last epoch",
        difference(INSIDE, "stapo", "simpo"),
        above=0,
    ),
    Claim(
        "StaPO's gap of mean log-probs rises to between its margins and stays (0.63 in the paper)",
        "section 4.1, Figure 3",
        "mean Z of the pairs trained on, in the last epoch, nats per token",
        lambda runs: runs["stapo"].last(Z),
        above=0.5,
        below=0.8,
    ),
    Claim(
        "The gaps of SimPO and DPO go on growing",
        "section 4.1, Figure 3",
        "growth of Z in the last epoch, the smaller one of the two, nats (per token)",
        lambda runs: min(np.diff(runs[label].series(Z)[1])[-1] for label in ("simpo", "dpo")),
        above=0,
    ),
    Claim(
        "Both log-probs fall in training, the rejected one faster",
        "section 4.1, Figure 3",
        "fall of the rejected − fall of the chosen one, StaPO, nats; both fall",
        lambda runs: (
            runs["stapo"].last("logps/chosen_change") - runs["stapo"].last("logps/rejected_change")
            if runs["stapo"].last("logps/chosen_change") < 0
            else -1.0
        ),
        above=0,
    ),
    Claim(
        "StaPO keeps the token entropy, SimPO does not",
        "section 4.5, Figure 4",
        "change of entropy over five epochs, either way, SimPO − StaPO, nats",
        lambda runs: _moved(runs, "simpo") - _moved(runs, "stapo"),
        above=0,
    ),
    Claim(
        "SimPO deteriorates after its best epoch, StaPO less",
        "section 4.5, Figure 4",
        "loss of held-out accuracy since the best epoch, SimPO − StaPO",
        lambda runs: _lost(runs, "simpo") - _lost(runs, "stapo"),
        above=0,
    ),
    Claim(
        "After five epochs StaPO's samples win more often than SimPO's",
        "Table 3",
        "win rate of samples, StaPO − SimPO",
        difference(WIN_RATE, "stapo", "simpo"),
        above=0,
    ),
    Claim(
        "And with the Z of DPO than DPO's",
        "Table 3",
        "win rate of samples, StaPO with the Z of DPO − DPO",
        difference(WIN_RATE, "stapo, Z of DPO", "dpo"),
        above=0,
    ),
    Claim(
        "StaPO is robust to its margins",
        "Table 2: win rates 58 to 62 after five epochs",
        "held-out accuracy, most − least over the grid of margins",
        lambda runs: float(
            np.ptp([runs[label].last(ACCURACY) for label in runs if label in ("stapo", *GRID)])
        ),
        below=0.05,
    ),
)


def draw(seeds: Sequence[Runs]) -> Figure:
    figure, axes = charts.panels(5, 1.8)
    per_token, log_ratio = ("simpo", "stapo"), ("dpo", "stapo, Z of DPO")
    labels = (*per_token, *log_ratio)
    entries = charts.curves(axes[0], seeds, labels, INSIDE, "between margins (share)")
    charts.curves(axes[1], seeds, per_token, Z, "Z (nats per token)")
    charts.curves(axes[2], seeds, log_ratio, Z, "Z of DPO (nats)", labels)
    charts.curves(axes[3], seeds, labels, ENTROPY, "entropy (nats per token)")
    charts.curves(axes[4], seeds, labels, ACCURACY, "held-out accuracy (share)")
    for axis, margins in ((axes[1], (0.6, 0.8)), (axes[2], (12, 16))):
        axis.axhspan(*margins, color=charts.INK, alpha=0.12, linewidth=0)
    axes[4].set_xlabel("optimizer steps, five epochs")
    band = {"color": charts.INK, "alpha": 0.25, "linewidth": 6}
    charts.legend(figure, [*entries, ("between the margins", band)])
    return figure


STUDY = Study(
    name="stapo",
    title="StaPO: five epochs",
    paper="Stable preference optimization via two-sided contrastive learning",
    setting=(
        "Pairs of generated advice whose labels have noise, five epochs, 16 pairs a step. The "
        "margins of the log-ratios, which the paper does not state, are those of the reward "
        "divided by beta. In the paper a language model decides wins on benchmarks; here a "
        "sample wins by the utilities that made the labels, over responses of the data, and loses "
        "if it is no recipe."
    ),
    jobs=jobs,
    training={
        "reference": "cached",
        "optim": {"lr": 3e-4, "warmup_steps": 10},
        "training": {"epochs": EPOCHS, "batch_size": 16},
    },
    metrics=(
        INSIDE,
        ABOVE,
        Z,
        ENTROPY,
        ACCURACY,
        "logps/chosen_change",
        "logps/rejected_change",
        "eval_logps/chosen_change",
        "eval_contrast/inside",
    ),
    columns=(
        final("between the margins", INSIDE),
        final("above", ABOVE),
        final("mean Z, nats", Z),
        final("chosen, nats", "logps/chosen_change", 1),
        final("rejected, nats", "logps/rejected_change", 1),
        final("entropy, nats", ENTROPY),
        final("held-out accuracy", ACCURACY),
        final("win rate", WIN_RATE),
        final("malformed", MALFORMED),
    ),
    claims=CLAIMS,
    draw=draw,
    caption="Over the epochs, mean of the seeds in a band from the least to the most. Margins: 0.6 "
    "to 0.8 nats per token, with the Z of DPO 12 to 16 nats.",
    by_epoch=True,
)
