"""Reward Calibration: bands and pathways of batches with and without it, for nine objectives.

"Towards disentangled preference optimization dynamics" (arXiv:2604.18239): Figures 3 to 10, and the
momenta of Table 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fastpref.reproduce import charts
from fastpref.reproduce.claims import Claim, Measurement
from fastpref.reproduce.papers.rc_bands import PAIRS, steps, steps_and_bands
from fastpref.reproduce.quantities import (
    Quantity,
    array,
    chosen_change,
    column,
    contrast,
    difference,
    level,
    margin,
    mean_of,
    rejected_change,
    reward_accuracy,
    statistic,
)
from fastpref.reproduce.sizes import Size
from fastpref.reproduce.study import BASELINES, Job, Runs, Study, mean

OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": BASELINES["dpo"],
    "ipo": BASELINES["ipo"],
    "simpo": BASELINES["simpo"],
    "ti_dpo": {"name": "ti_dpo", "beta": 0.1},
    "cpo": BASELINES["cpo"],
    "ddro": {"name": "ddro"},
    "dil_bce": {"name": "dil_bce"},
    "dil_ukl": {"name": "dil_ukl"},
    "dil_lsif": {"name": "dil_lsif"},
}
QUICK = ("dpo", "cpo", "dil_bce")
ENTANGLED = ("dpo", "ipo", "simpo", "ti_dpo")
MEASURED = ("dpo", "dil_bce")  # whose bands are computed by all parameters, too; Figure 6
MOMENTUM = 0.98  # the paper's
MOMENTA = (0.5, 0.9, 0.95, 0.98, 0.999)  # of Table 3
LONG = 2000  # steps; an average with momentum 0.999 remembers 1,000
INSIDE, BOTH_UP, BOTH_DOWN = map(array, ("steps/inside", "steps/both_up", "steps/both_down"))
OVERLAP, HEAD, ALL = map(array, ("bands/overlap", "bands/head", "bands/all"))


def calibrated(label: str) -> str:
    """Label of a run with calibration."""
    return f"{label}, RC"


def long(momentum: float) -> str:
    """Label of a long run of DPO."""
    return f"dpo, RC {momentum:g}, {LONG:,} steps"


def calibration(momentum: float = MOMENTUM) -> dict[str, Any]:
    return {"momentum": momentum, "scope": "head"}


def jobs(seed: int, size: Size) -> list[Job]:
    all_jobs = []
    for label in QUICK if size.quick else OBJECTIVES:
        loss = OBJECTIVES[label]
        measure = steps_and_bands if label in MEASURED else steps
        all_jobs.append(Job(label, seed, {"loss": loss}, measure=measure))
        config = {"loss": loss, "calibration": calibration()}
        all_jobs.append(Job(calibrated(label), seed, config, measure=steps))
    if size.quick or size.model is not None:
        return all_jobs
    training = {"steps": LONG, "log_every": LONG}
    for momentum in MOMENTA:
        config = {
            "loss": OBJECTIVES["dpo"],
            "calibration": calibration(momentum),
            "monitor": {"band_every": None},
            "training": training,
        }
        all_jobs.append(Job(long(momentum), seed, config))
    return all_jobs


def _largest(quantity: Quantity, labels: Sequence[str]) -> Callable[[Runs], Measurement]:
    """The largest mean of a quantity over runs."""
    return statistic(lambda table: float(table[0].max()), (quantity,), labels)


def _average(quantity: Quantity, labels: Sequence[str]) -> Callable[[Runs], Measurement]:
    """The mean of a quantity over runs."""
    return contrast(quantity, {label: 1 / len(labels) for label in labels})


def _gain(quantity: Quantity, labels: Sequence[str]) -> Callable[[Runs], Measurement]:
    """The mean difference that calibration makes to a quantity."""
    share = 1 / len(labels)
    weights = {calibrated(label): share for label in labels}
    return contrast(quantity, weights | {label: -share for label in labels})


def _width_ratio(label: str) -> Callable[[Runs], Measurement]:
    """Mean half width by the head ÷ by all parameters."""
    return statistic(lambda table: float(table[0, 0] / table[1, 0]), (HEAD, ALL), (label,))


TRAINED = (
    "one epoch of 1,000 pairs, 4 a step, under AdamW; bands of each step's batch by the scores of "
    "the head"
)
HELD_OUT = "one epoch of 1,000 pairs, 4 a step, under AdamW; 1,040 held-out pairs"
BANDS = "batches of 4 training pairs, after an epoch without calibration"
LARGE = "needs trained models of 2.8 to 7 billion parameters and their benchmarks"
EVERY = tuple(OBJECTIVES)
CLAIMS = (
    Claim(
        "Uncalibrated DPO, IPO, SimPO and TI-DPO lower the chosen responses",
        "section 4.3, Figure 4, and C.5, Figures 7 and 9",
        "largest change of the chosen log-prob among them, nats",
        _largest(chosen_change, ENTANGLED),
        below=-0.5,
        protocol=HELD_OUT,
    ),
    Claim(
        "because their ratio dips below the band",
        "C.5, Figure 7",
        "share of steps with both predicted to fall, mean of the four",
        _average(BOTH_DOWN, ENTANGLED),
        above=0.05,
        protocol=TRAINED,
    ),
    Claim(
        "CPO drifts above the band, to both rising",
        "section 4.3, Figure 4, and C.5, Figures 7c and 9e",
        "share of steps with both predicted to rise",
        mean_of(BOTH_UP, "cpo"),
        above=0.5,
        protocol=TRAINED,
    ),
    Claim(
        "DIL-BCE stays inside the band by itself",
        "section 3.2, Figure 3",
        "share of steps inside",
        mean_of(INSIDE, "dil_bce"),
        above=0.9,
        null=0.5,
        protocol=TRAINED,
    ),
    Claim(
        "Calibration keeps more steps inside, over all objectives",
        "section 4.3 and C.5",
        "gain of the share of steps inside, mean of nine",
        _gain(INSIDE, EVERY),
        above=0.05,
        protocol=TRAINED,
    ),
    Claim(
        "and brings CPO to the pathway with the chosen not down and the rejected not up",
        "section 4.3, Figure 4",
        "gain of the share of steps inside",
        difference(INSIDE, calibrated("cpo"), "cpo"),
        above=0.3,
        protocol=TRAINED,
    ),
    Claim(
        "With calibration the entangled objectives preserve the chosen responses",
        "section 4.3, Figure 4",
        "change of the chosen log-prob with it − without, mean of the four, nats",
        _gain(chosen_change, ENTANGLED),
        above=0.5,
        protocol=HELD_OUT,
    ),
    Claim(
        "and CPO suppresses the rejected responses",
        "section 4.3, Figure 4",
        "change of the rejected log-prob with it − without, nats",
        difference(rejected_change, calibrated("cpo"), "cpo"),
        below=-0.5,
        protocol=HELD_OUT,
    ),
    Claim(
        "Calibration preserves the growth of the margin",
        "C.5: typically maintains steady margin growth",
        "accuracy of rewards with it − without, mean of nine",
        _gain(reward_accuracy, EVERY),
        above=-0.03,
        protocol=HELD_OUT,
    ),
    Claim(
        "The momentum hardly matters",
        "section 4.2, Table 3",
        "accuracy of rewards of DPO, most − least over five momenta",
        statistic(
            lambda table: float(np.ptp(table[0])),
            (reward_accuracy,),
            [long(momentum) for momentum in MOMENTA],
        ),
        below=0.05,
        protocol=f"{LONG:,} steps of 4 pairs (8 epochs) under AdamW; 1,040 held-out pairs",
    ),
    *(
        Claim(
            f"The scores of the head give the band of all parameters ({label})",
            "section 4.2 and C.3, Figures 5 and 6",
            "intersection of both bands over their union",
            mean_of(OVERLAP, label),
            above=0.5,
            protocol=BANDS,
        )
        for label in MEASURED
    ),
    *(
        Claim(
            f"and of the same width ({label})",
            "section 4.2 and C.3, Figures 5 and 6",
            "mean half width by the head ÷ by all parameters",
            _width_ratio(label),
            above=0.8,
            below=1.25,
            protocol=BANDS,
        )
        for label in MEASURED
    ),
    Claim(
        "Calibrated models are better on MMLU-Pro, BBH, MUSR, ARC, MATH and GSM8K, DPO on "
        "Mistral-7B by 12 points",
        "section 4.3, Tables 4, 5 and 9",
        untested=LARGE,
    ),
    Claim(
        "DPO with calibration wins 70.56 % against DPO on AlpacaEval 2.0",
        "section 4.3",
        untested=LARGE,
    ),
    Claim(
        "DDRO leaves the band on Pythia-2.8B",
        "section 4.3 and C.5, Figure 10a",
        untested="is about one model of 2.8 billion parameters",
    ),
    Claim(
        "Calibration takes −3 to 37 % of the training time",
        "C.3, Table 8",
        untested="is a property of the authors' program; "
        "`python -m benchmarks.calibration --overhead` measures this one",
    ),
)


def draw(seeds: Sequence[Runs]) -> Figure:
    figure, axes = charts.panels(4, 2.1)
    labels = [label for label in OBJECTIVES if label in seeds[0]]
    rows = [[label, calibrated(label)] for label in labels]
    panels: dict[str, Quantity] = {
        "steps inside the band (share)": INSIDE,
        "steps with both log-probs falling (share)": BOTH_DOWN,
        "accuracy of rewards, held out (share)": reward_accuracy,
        "change of held-out chosen log-prob (nats)": chosen_change,
    }
    for axis, (unit, quantity) in zip(axes, panels.items(), strict=True):
        charts.dots(axis, seeds, rows, level(quantity), unit)
    charts.symlog(axes[-1])
    dot = {"marker": "o", "linestyle": ""}
    looks = [
        (name, {"color": charts.COLORS[k], **dot})
        for k, name in enumerate(("without calibration", "with it"))
    ]
    charts.legend(figure, looks)
    return figure


STUDY = Study(
    name="rc",
    title="Reward Calibration and the band",
    paper="Towards disentangled preference optimization dynamics, arXiv:2604.18239",
    setting=(
        "Pairs of generated advice, and a Llama that has learned to write other advice. All nine "
        "objectives train for one epoch of 4 pairs a step under AdamW, with a constant learning "
        "rate, without calibration and with it (Algorithm 2, momentum 0.98, scores of the head). "
        "A band is that of a step's batch, by the incentives that were applied. The paper trains "
        "models of 0.4 to 7 billion parameters with batches of 32."
    ),
    jobs=jobs,
    training={
        # Changes are measured from the reference, even if the objective does not need one.
        "reference": "cached",
        "monitor": {"band_every": 1},
        "optim": {"lr": 3e-4},
        "training": {"batch_size": PAIRS, "log_every": 1, "epochs": 1},
    },
    metrics=("band/log_r", "band/log_r_star", "band/cosine", "pair_band/inside"),
    columns=(
        column("steps inside", INSIDE, 2),
        column("both up", BOTH_UP, 2),
        column("both down", BOTH_DOWN, 2),
        mean("log r", "band/log_r"),
        mean("cosine", "band/cosine"),
        mean("pairs inside", "pair_band/inside"),
        column("chosen, nats", chosen_change, 1),
        column("rejected, nats", rejected_change, 1),
        column("margin, nats", margin, 1),
        column("accuracy of rewards", reward_accuracy),
    ),
    claims=CLAIMS,
    draw=draw,
    caption="Nine objectives with and without calibration; log-probs and accuracy on held-out "
    "pairs. Small dots are seeds.",
    # 250 steps of 4 pairs in one epoch: 1,000 pairs.
    sizes={"cores": {"warm_up": 90, "train": 250, "held_out": 260, "per_prompt": 4}},
)
