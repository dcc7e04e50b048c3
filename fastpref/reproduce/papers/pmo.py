"""PMO: objectives on pairs that differ in meaning alone, with probabilities as preferences.

"A fine-grained analysis of pure semantic preference alignment in large language models": the
trade-off of section 3, the grid of alpha and beta in Table 1, and PCI against KL in appendix D.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import methodcaller

import numpy as np
from matplotlib.figure import Figure

from fastpref.reproduce import charts
from fastpref.reproduce.study import BASELINES, Claim, Job, Runs, Study, difference, final

KL, PCI, ACCURACY = (f"eval_preference/{name}" for name in ("mean_kl", "pci", "accuracy"))
OBJECTIVES = {
    "dpo": BASELINES["dpo"],
    "cdpo": {"name": "cdpo", "beta": 0.1, "label_smoothing": 0.2},
    "ipo": BASELINES["ipo"],
    "simpo": BASELINES["simpo"],
    "cpo": BASELINES["cpo"],
}
GRID = {
    f"pmo {alpha:g}, {beta:g}": {"name": "pmo", "alpha": alpha, "beta": beta}
    for alpha, beta in ((0.05, 0.05), (0.5, 0.0), (0.9, 0.1), (0.95, 0.05), (1.0, 0.0))
}
WEAK, FREE, ANCHORED = "pmo 0.05, 0.05", "pmo 1, 0", ("pmo 0.9, 0.1", "pmo 0.95, 0.05")
LABELS = (*OBJECTIVES, *GRID)


def jobs(seed: int, quick: bool) -> list[Job]:
    training = {"steps": 20 if quick else 60, "eval_every": 20}
    return [
        Job(label, seed, {"loss": loss, "training": training}, "semantic")
        for label, loss in (OBJECTIVES | GRID).items()
    ]


def _of_all(runs: Runs, metric: str) -> list[float]:
    return [runs[label].last(metric) for label in LABELS]


def _correlation(runs: Runs, metric: str) -> float:
    """Correlation of a metric with the KL, over all runs of a seed."""
    return float(np.corrcoef(_of_all(runs, KL), _of_all(runs, metric))[0, 1])


def _mean(runs: Runs, labels: Sequence[str], metric: str) -> float:
    return float(np.mean([runs[label].last(metric) for label in labels]))


def _others_of_grid(runs: Runs, metric: str) -> list[float]:
    return [runs[label].last(metric) for label in GRID if label != WEAK]


CLAIMS = (
    Claim(
        "DPO collapses preferences, PMO does not",
        "section 5.1, Table 1",
        "PCI of PMO (0.9, 0.1) − PCI of DPO",
        difference(PCI, ANCHORED[0], "dpo"),
        above=0,
    ),
    Claim(
        "Objectives without a reference (SimPO, CPO) are nearer to the target than DPO and cDPO",
        "section 3, Figure 2",
        "mean KL of DPO and cDPO − of SimPO and CPO, nats",
        lambda runs: _mean(runs, ("dpo", "cdpo"), KL) - _mean(runs, ("simpo", "cpo"), KL),
        above=0,
    ),
    Claim(
        "What brings DPO far from the target makes it accurate: it beats PMO in accuracy",
        "sections 3 and 5.1",
        "accuracy of DPO − of PMO (0.9, 0.1)",
        difference(ACCURACY, "dpo", ANCHORED[0]),
        above=0,
    ),
    Claim(
        "In the grid, (0.05, 0.05) has the largest KL",
        "Table 1",
        "its KL − the next one, nats",
        lambda runs: runs[WEAK].last(KL) - max(_others_of_grid(runs, KL)),
        above=0,
    ),
    Claim(
        "and the lowest PCI",
        "Table 1",
        "the next PCI − its own",
        lambda runs: min(_others_of_grid(runs, PCI)) - runs[WEAK].last(PCI),
        above=0,
    ),
    Claim(
        "and the highest accuracy",
        "Table 1",
        "its accuracy − the next one",
        lambda runs: runs[WEAK].last(ACCURACY) - max(_others_of_grid(runs, ACCURACY)),
        above=0,
    ),
    Claim(
        "A light reference helps: alpha near 1 with beta 0.05 or 0.1 has a lower KL than (1, 0)",
        "section 5.2, Table 1",
        "KL of (1, 0) − mean of (0.9, 0.1) and (0.95, 0.05), nats",
        lambda runs: runs[FREE].last(KL) - _mean(runs, ANCHORED, KL),
        above=0,
    ),
    Claim(
        "PCI falls as KL rises",
        "appendix D.2: r −0.75 to −0.89",
        "their correlation over the ten runs",
        lambda runs: _correlation(runs, PCI),
        below=-0.5,
    ),
    Claim(
        "Accuracy rises with KL (two of the three backbones)",
        "appendix D.2: r 0.91, 0.59 and 0.01",
        "their correlation over the ten runs",
        lambda runs: _correlation(runs, ACCURACY),
        above=0,
    ),
)


def draw(seeds: Sequence[Runs]) -> Figure:
    figure, axes = charts.panels(4, 2.2)
    units = {
        KL: "mean KL to the target (nats)",
        PCI: "PCI (probability)",
        ACCURACY: "accuracy (share)",
    }
    rows = [[label] for label in LABELS]
    for axis, (metric, unit) in zip(axes, units.items(), strict=False):
        charts.dots(axis, seeds, rows, methodcaller("last", metric), unit)
    kl, pci = (np.array([_of_all(runs, metric) for runs in seeds]).ravel() for metric in (KL, PCI))
    slope, start = np.polyfit(kl, pci, 1)
    line = np.array([kl.min(), kl.max()])
    axes[3].scatter(kl, pci, color=charts.COLORS[0], s=14, linewidths=0)
    axes[3].plot(line, start + slope * line, color=charts.COLORS[1])
    axes[3].set(xlabel=units[KL], ylabel=units[PCI])
    look = {"color": charts.COLORS[1]}
    charts.legend(figure, [(f"all runs: PCI = {start:.2f} − {-slope:.2f} · KL", look)])
    return figure


STUDY = Study(
    name="pmo",
    title="PMO: preference and accuracy",
    paper="A fine-grained analysis of pure semantic preference alignment in large language models",
    setting=(
        "The pure-semantic pairs of `fastpref data pure-semantic`, with their probabilities as "
        "soft labels. A small Llama learns both responses of each pair (SFT), then every "
        "objective trains from there, 32 pairs a step. Measured on pairs whose words were never "
        "compared in training. The paper trains 1 to 1.5 billion parameters on probabilities that "
        "are drawn anew for each pair, so that held-out accuracy is near chance; here words have "
        "utilities, and it can be learned."
    ),
    jobs=jobs,
    training={
        "optim": {"lr": 5e-4, "schedule": "cosine", "warmup_steps": 5},
        "training": {"batch_size": 32, "log_every": 5},
    },
    metrics=(KL, PCI, ACCURACY, "eval_logps/chosen", "eval_logps/rejected"),
    columns=(
        final("mean KL, nats", KL, 3),
        final("PCI", PCI, 3),
        final("accuracy", ACCURACY, 3),
        final("log-prob of chosen, nats", "eval_logps/chosen", 1),
    ),
    claims=CLAIMS,
    draw=draw,
    takes_groups=False,
    caption="Each objective at the end of training on held-out pairs; PMO by alpha and beta. Small "
    "dots are seeds.",
    sft_data="semantic",
    sft_loss={"name": "sft", "responses": "both"},
)
