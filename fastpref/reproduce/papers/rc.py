"""Reward Calibration: bands, pathways and displacement with and without it, for nine objectives.

"Towards disentangled preference optimization dynamics" (arXiv:2604.18239): Figures 3 to 8, and the
momenta of Table 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fastpref.dynamics.band import half_band, parameter_geometry
from fastpref.logps import SequenceLogps
from fastpref.reproduce import charts
from fastpref.reproduce.study import BASELINES, Claim, Column, Job, Record, Runs, Study, final, mean
from fastpref.training.trainer import Trainer

INSIDE, LOG_R = "band/inside", "band/log_r"
UP, DOWN = "band/dz_chosen", "band/dz_rejected"
CHOSEN, REJECTED = (f"eval_logps/{side}_change" for side in ("chosen", "rejected"))
ACCURACY = "eval_rewards/accuracies"
# Numbers of the band, measured with the scores of the head and of all parameters.
HEAD_FULL = ("center", "width")
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
MOMENTUM = 0.98  # the paper's
MOMENTA = (0.5, 0.9, 0.999)  # further ones for DPO
MEASURED_PAIRS = 24


def calibrated(label: str, momentum: float = MOMENTUM) -> str:
    """Label of a run with calibration."""
    return f"{label}, RC" if momentum == MOMENTUM else f"{label}, RC {momentum:g}"


def jobs(seed: int, quick: bool) -> list[Job]:
    all_jobs = []
    for label in QUICK if quick else OBJECTIVES:
        loss = OBJECTIVES[label]
        measure = bands if label in ("dpo", "dil_bce") else None
        all_jobs.append(Job(label, seed, {"loss": loss}, measure=measure))
        momenta = (MOMENTUM, *(MOMENTA if label == "dpo" else ()))
        for momentum in momenta[:2] if quick else momenta:
            config = {"loss": loss, "calibration": {"momentum": momentum, "scope": "head"}}
            all_jobs.append(Job(calibrated(label, momentum), seed, config))
    return all_jobs


def bands(trainer: Trainer, job: Job) -> Record:
    """Measure the band of some held-out pairs, by the scores of the head and of all parameters.

    Records the means of log r*, its center, and of −log of the cosine, half of its width, over the
    pairs with two positive cosines, and the correlation of head and all parameters.
    """
    split = trainer.run.eval
    assert split is not None
    sides: dict[str, list[tuple[float, float]]] = {"head": [], "full": []}
    for index in range(min(MEASURED_PAIRS, len(split.groups))):
        batches = trainer.policy.batches(split.groups, [index])
        seen = trainer.forward(batches, split.reference, with_geometry=True)
        assert isinstance(seen.policy, SequenceLogps) and seen.geometry is not None
        for side, geometry in (
            ("head", seen.geometry),
            ("full", parameter_geometry(seen.policy, trainer.parameters)),
        ):
            center = (geometry.rejected_norm / geometry.chosen_norm).log()
            sides[side].append((center.item(), half_band(geometry.cosine).item()))
    head, full = (np.array(sides[side]) for side in ("head", "full"))
    valid = np.isfinite(head).all(1) & np.isfinite(full).all(1)
    record: Record = {"bands/pairs": int(valid.sum())}
    for column, name in enumerate(HEAD_FULL):
        by_head, by_all = head[valid, column], full[valid, column]
        record[f"bands/{name}_head"] = float(by_head.mean())
        record[f"bands/{name}_full"] = float(by_all.mean())
        record[f"bands/{name}_correlation"] = float(np.corrcoef(by_head, by_all)[0, 1])
    return record


def pathway(up: bool, down: bool) -> Any:
    """Share of the steps on a pathway, by their mean predicted changes.

    up: the chosen log-prob rises; down: the rejected log-prob falls.
    """

    def holds(line: Record) -> bool:
        return (line[UP] >= 0) == up and (line[DOWN] <= 0) == down

    return lambda run: run.share(holds, UP)


def _gain(runs: Runs, metric: str, label: str, by_mean: bool = False) -> float:
    """Difference that calibration makes to a metric of an objective."""
    with_rc, without = runs[calibrated(label)], runs[label]
    if by_mean:
        return with_rc.mean(metric) - without.mean(metric)
    return with_rc.last(metric) - without.last(metric)


def _objectives(runs: Runs) -> list[str]:
    return [label for label in OBJECTIVES if label in runs]


CLAIMS = (
    Claim(
        "Uncalibrated DPO, IPO, SimPO and TI-DPO lower the chosen responses",
        "section 5.2, Figures 4 and 7",
        "largest change of the held-out chosen log-prob among them, nats",
        lambda runs: max(runs[label].last(CHOSEN) for label in ENTANGLED if label in runs),
        below=0,
    ),
    Claim(
        "because their ratio dips below the band",
        "section 5.2, Figure 7",
        "mean share of steps with both predicted to fall",
        lambda runs: float(
            np.mean([pathway(False, True)(runs[label]) for label in ENTANGLED if label in runs])
        ),
        above=0.05,
    ),
    Claim(
        "CPO drifts above the band, to both rising",
        "section 3.3, Figure 3",
        "share of steps with both predicted to rise",
        lambda runs: pathway(True, False)(runs["cpo"]),
        above=0.5,
    ),
    Claim(
        "DIL-BCE keeps inside the band by itself",
        "section 3.3, Figure 3",
        "share of pairs inside, in training",
        lambda runs: runs["dil_bce"].mean(INSIDE),
        above=0.9,
    ),
    Claim(
        "Calibration keeps more pairs inside, over all objectives",
        "section 5.2",
        "mean gain of the share inside",
        lambda runs: float(np.mean([_gain(runs, INSIDE, k, True) for k in _objectives(runs)])),
        above=0,
    ),
    Claim(
        "With calibration DPO's chosen log-prob is preserved",
        "section 5.2, Figure 4",
        "change of the held-out chosen log-prob with it − without, nats",
        lambda runs: _gain(runs, CHOSEN, "dpo"),
        above=0,
    ),
    Claim(
        "Calibration does not harm what the objectives learn",
        "section 5.2, Table 4",
        "mean gain of held-out accuracy over all objectives",
        lambda runs: float(np.mean([_gain(runs, ACCURACY, k) for k in _objectives(runs)])),
        above=-0.01,
    ),
    Claim(
        "The momentum hardly matters",
        "Table 3",
        "held-out accuracy of DPO with it, most − least over the momenta",
        lambda runs: float(
            np.ptp([run.last(ACCURACY) for k, run in runs.items() if k.startswith("dpo, RC")])
        ),
        below=0.03,
    ),
    Claim(
        "The scores of the head give the band that those of all parameters give",
        "Figures 5 and 6",
        "correlation of the centers over held-out pairs, the smaller one of DPO and DIL-BCE",
        lambda runs: min(runs[k].last("bands/center_correlation") for k in ("dpo", "dil_bce")),
        above=0.8,
    ),
    Claim(
        "and of the same width",
        "Figures 5 and 6",
        "mean half width by the head ÷ by all, the more uneven one of DPO and DIL-BCE",
        lambda runs: max(
            (
                runs[k].last("bands/width_head") / runs[k].last("bands/width_full")
                for k in ("dpo", "dil_bce")
            ),
            key=lambda ratio: abs(np.log(abs(ratio))),
        ),
        above=0.8,
        below=1.25,
    ),
)


def draw(seeds: Sequence[Runs]) -> Figure:
    figure, axes = charts.panels(4, 2.1)
    rows = [[label, calibrated(label)] for label in _objectives(seeds[0])]
    panels = {
        "pairs inside the band in training (share)": lambda run: run.mean(INSIDE),
        "steps with both log-probs falling (share)": pathway(False, True),
        "held-out accuracy (share)": lambda run: run.last(ACCURACY),
        "change of held-out chosen log-prob (nats)": lambda run: run.last(CHOSEN),
    }
    for axis, (unit, value) in zip(axes, panels.items(), strict=True):
        charts.dots(axis, seeds, rows, value, unit)
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
        "Pairs of generated advice, a Llama that has learned the chosen responses, one epoch of 4 "
        "pairs a step under AdamW. Bands are computed from the scores of the head, for each pair "
        "in every step. `benchmarks/calibration.py --overhead` measures the cost of calibration."
    ),
    jobs=jobs,
    training={
        # Changes are measured from the reference, even if the objective does not need one.
        "reference": "cached",
        "monitor": {"band_every": 1},
        "optim": {"lr": 3e-4},
        "training": {"batch_size": 4, "log_every": 1, "epochs": 1},
    },
    metrics=(INSIDE, LOG_R, UP, DOWN, "band/log_r_star", "band/cosine", CHOSEN, REJECTED, ACCURACY),
    columns=(
        mean("inside the band", INSIDE),
        mean("log r", LOG_R),
        Column("steps both up", pathway(True, False), UP),
        Column("both down", pathway(False, True), UP),
        Column("apart", pathway(True, True), UP),
        final("chosen, nats", CHOSEN, 1),
        final("rejected, nats", REJECTED, 1),
        final("accuracy", ACCURACY),
    ),
    claims=CLAIMS,
    draw=draw,
    caption="Nine objectives with and without calibration; log-probs and accuracy on held-out "
    "pairs. Small dots are seeds.",
)
