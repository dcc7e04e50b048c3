"""PMO: objectives on pairs that differ in meaning alone, with probabilities as preferences.

"A fine-grained analysis of pure semantic preference alignment in large language models": the
propositions of section 4, the trade-off of sections 3 and 5, the grid of alpha and beta in Table 1,
and the correlations of appendix D.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from fastpref.reproduce import charts, logit_tables
from fastpref.reproduce.claims import Claim
from fastpref.reproduce.logit_tables import Pairs, always
from fastpref.reproduce.papers import pmo_online
from fastpref.reproduce.papers.pmo_online import NASH_LABEL, PPO_LABEL
from fastpref.reproduce.quantities import (
    Quantity,
    accuracy,
    chosen_change,
    column,
    contrast,
    difference,
    kl,
    level,
    pci,
    statistic,
)
from fastpref.reproduce.sizes import Size
from fastpref.reproduce.study import BASELINES, Job, Record, Runs, Study

OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": BASELINES["dpo"],
    "cdpo": {"name": "cdpo", "beta": 0.1, "label_smoothing": 0.2},
    "ipo": BASELINES["ipo"],
    "simpo": BASELINES["simpo"],
    "cpo": BASELINES["cpo"],
}
GRID: dict[str, dict[str, Any]] = {
    f"pmo {alpha:g}, {beta:g}": {"name": "pmo", "alpha": alpha, "beta": beta}
    for alpha, beta in ((0.05, 0.05), (0.5, 0.0), (0.9, 0.1), (0.95, 0.05), (1.0, 0.0))
}
WEAK, HALF, FREE, ANCHORED = (
    "pmo 0.05, 0.05",
    "pmo 0.5, 0",
    "pmo 1, 0",
    ("pmo 0.9, 0.1", "pmo 0.95, 0.05"),
)
LABELS = (*OBJECTIVES, *GRID)
# Pairs whose words have utilities, so that the preferences of held-out pairs can be learned.
UTILITIES = "semantic, utilities"
LEARNABLE = {f"{label}, utilities": label for label in ("dpo", ANCHORED[0])}
# Of a pretrained model, whose steps take seconds.
FEW = ("dpo", ANCHORED[0])


def jobs(seed: int, size: Size) -> list[Job]:
    training: dict[str, Any] = {"steps": 20 if size.quick else 300, "eval_every": None}
    shared: dict[str, Any] = {"training": training}
    if size.model is not None:
        training |= {"steps": 5 if size.quick else 40, "batch_size": 8}
        # A cached reference would compute all rows, of which few are trained on.
        shared["reference"] = "frozen"
    losses = OBJECTIVES | GRID
    labels = LABELS if size.model is None else FEW
    semantic = [Job(label, seed, {"loss": losses[label], **shared}, "semantic") for label in labels]
    if size.model is None:
        semantic += [
            Job(
                label,
                seed,
                {"loss": losses[objective], **shared},
                UTILITIES,
                held_out=UTILITIES,
            )
            for label, objective in LEARNABLE.items()
        ]
        # The loss of the config is not used; this one has no reference to prepare.
        unused = {"loss": OBJECTIVES["simpo"], **shared}
        semantic += [
            Job(label, seed, unused, "semantic", learn=pmo_online.learn)
            for label in pmo_online.LABELS
        ]
    functions = {"optima": optima, pmo_online.OPTIMA: pmo_online.optima}
    exact = [Job(label, seed, {}, "semantic", function=f) for label, f in functions.items()]
    return [*semantic, *exact]


RESPONSES, TABLES, OPTIMUM_STEPS, OPTIMUM_LR = 8, 4, 600, 0.2


def optima(job: Job) -> list[Record]:
    """Divergence of trained tables from the optimal policies of Propositions 4.1 and 4.2.

    Rewards and the logits of the reference are drawn from N(0, 1); the population of pairs has the
    probabilities of Bradley and Terry. Recorded is the largest Jensen–Shannon divergence, nats.
    """
    generator = torch.Generator().manual_seed(job.seed)
    rewards, logits = torch.randn(
        2, TABLES, RESPONSES, generator=generator, dtype=torch.float64
    ).unbind(0)
    reference = logits.log_softmax(1)
    chosen, rejected = logit_tables.all_pairs(RESPONSES, TABLES)
    preference = torch.sigmoid(rewards.gather(1, chosen) - rewards.gather(1, rejected))
    population = Pairs(chosen, rejected, preference=preference)
    losses = {"simpo": {"name": "simpo", "beta": 1.0, "gamma": 0.0}, **GRID}
    record: Record = {"step": OPTIMUM_STEPS}
    for label, loss in losses.items():
        policy = logit_tables.train(reference, loss, always(population), OPTIMUM_STEPS, OPTIMUM_LR)
        alpha, beta = (loss["alpha"], loss["beta"]) if label in GRID else (1.0, 0.0)
        exact = ((beta * reference + rewards) / (alpha + beta)).log_softmax(1)
        record[f"optimum/{label}"] = logit_tables.js(policy, exact).max().item()
    return [record]


def _correlation(table: np.ndarray) -> float:
    return float(np.corrcoef(table)[0, 1])


def _others_of_grid() -> list[str]:
    return [label for label in GRID if label != WEAK]


def _lead(quantity: Quantity, sign: int) -> Any:
    """Lead of WEAK over the next run of the grid: the largest if sign is 1, the least if −1."""

    def lead(table: np.ndarray) -> float:
        weak, *others = sign * table[0]
        return float(weak - max(others))

    return statistic(lead, (quantity,), (WEAK, *_others_of_grid()))


HELD_OUT = (
    "soft labels with a probability drawn for each pair, one start model a seed, measured on "
    "1,050 held-out pairs of other words"
)
LEARNABLE_PAIRS = (
    "as above, but words have utilities, so that held-out preferences can be learned; not in the "
    "paper"
)
ON_POLICY = (
    "as above, but a reward model is trained on the soft labels, and PPO (KL coefficient 0.1) and "
    "Nash-MD (beta 0.1, mixture 0.5) on 64 responses a step that the policy samples"
)
ONLINE_TABLE = (
    "tables of 32 logits on 256 sampled responses a step, with drawn rewards; Nash-MD against "
    "itself and against the mixture"
)
TABLE = "tables of 8 logits on the population of pairs with the probabilities of drawn rewards"
CLAIMS = (
    Claim(
        "The optimum of SimPO with beta 1 per response and gamma 0 has the target's probabilities",
        "Proposition 4.1",
        "JS divergence of the trained policy from the closed form, nats",
        lambda runs: runs["optima"].last("optimum/simpo"),
        below=1e-8,
        kind="theorem",
        protocol=TABLE,
    ),
    Claim(
        "PMO's optimum is ref^(β/(α+β)) · exp(r/(α+β)), normalized",
        "Proposition 4.2",
        "JS divergence of the trained policy from the closed form, the largest of the grid, nats",
        lambda runs: max(runs["optima"].last(f"optimum/{label}") for label in GRID),
        below=1e-8,
        kind="theorem",
        protocol=TABLE,
    ),
    Claim(
        "DPO collapses preferences, PMO does not",
        "section 5.1, Table 1: 0.07 to 0.10",
        "PCI of PMO (0.9, 0.1) − of DPO",
        difference(pci, ANCHORED[0], "dpo"),
        above=0.05,
        protocol=HELD_OUT,
    ),
    Claim(
        "and DPO is farther from the target",
        "section 5.1, Table 1: 2 to 8 nats",
        "mean KL of DPO − of PMO (0.9, 0.1), nats",
        difference(kl, "dpo", ANCHORED[0]),
        above=0.5,
        protocol=HELD_OUT,
    ),
    Claim(
        "SimPO, which has no reference, is nearer to the target than DPO",
        "section 3, Figure 2",
        "mean KL of DPO − of SimPO, nats",
        difference(kl, "dpo", "simpo"),
        above=0.5,
        protocol=HELD_OUT,
    ),
    Claim(
        "and SimPO and CPO are nearer than DPO and cDPO",
        "section 3, Figure 2",
        "mean KL of DPO and cDPO − of SimPO and CPO, nats",
        contrast(kl, {"dpo": 0.5, "cdpo": 0.5, "simpo": -0.5, "cpo": -0.5}),
        above=0.5,
        protocol=HELD_OUT,
    ),
    Claim(
        "DPO pays for accuracy with distance from the target: it is more accurate than PMO",
        "sections 3 and 5.1: 0.02 to 0.10, with an error of 0.08",
        "accuracy of DPO − of PMO (0.9, 0.1)",
        difference(accuracy, "dpo", ANCHORED[0]),
        above=0.03,
        protocol=HELD_OUT,
    ),
    Claim(
        "It is more accurate where held-out preferences can be learned",
        "sections 3 and 5.1",
        "accuracy of DPO − of PMO (0.9, 0.1)",
        difference(accuracy, "dpo, utilities", f"{ANCHORED[0]}, utilities"),
        above=0.03,
        protocol=LEARNABLE_PAIRS,
    ),
    Claim(
        "In the grid, (0.05, 0.05) has the largest KL",
        "Table 1: by 1.9 to 4.5 nats",
        "its KL − the next one, nats",
        _lead(kl, 1),
        above=0.5,
        protocol=HELD_OUT,
    ),
    Claim(
        "and the lowest PCI",
        "Table 1: by 0.05 to 0.06",
        "the next PCI − its own",
        _lead(pci, -1),
        above=0.02,
        protocol=HELD_OUT,
    ),
    Claim(
        "and the highest accuracy",
        "Table 1: by 0.06 to 0.11, with an error of 0.08",
        "its accuracy − the next one",
        _lead(accuracy, 1),
        above=0.03,
        protocol=HELD_OUT,
    ),
    Claim(
        "A light reference helps: alpha near 1 with beta 0.05 or 0.1 is nearer than (1, 0)",
        "section 5.3, Table 1: by 0.3 to 0.8 nats",
        "KL of (1, 0) − mean of (0.9, 0.1) and (0.95, 0.05), nats",
        contrast(kl, {FREE: 1.0, ANCHORED[0]: -0.5, ANCHORED[1]: -0.5}),
        above=0.1,
        protocol=HELD_OUT,
    ),
    Claim(
        "and nearer than (0.5, 0)",
        "section 5.3, Table 1: by 0.1 to 2.2 nats",
        "KL of (0.5, 0) − mean of (0.9, 0.1) and (0.95, 0.05), nats",
        contrast(kl, {HALF: 1.0, ANCHORED[0]: -0.5, ANCHORED[1]: -0.5}),
        above=0.1,
        protocol=HELD_OUT,
    ),
    Claim(
        "PCI falls as KL rises",
        "appendix D.2: r −0.75 to −0.89",
        "their correlation over the ten runs",
        statistic(_correlation, (kl, pci), LABELS),
        below=-0.5,
        protocol=HELD_OUT,
    ),
    Claim(
        "Accuracy rises with KL",
        "appendix D.2: r 0.91, 0.59 and 0.01",
        "their correlation over the ten runs",
        statistic(_correlation, (kl, accuracy), LABELS),
        above=0.5,
        protocol=HELD_OUT,
    ),
    Claim(
        "PPO and Nash-MD reach the optimal policy of RLHF and the equilibrium of the game",
        "appendix B.1",
        "JS divergence of policies trained on samples from the exact ones, the largest, nats",
        lambda runs: max(runs[pmo_online.OPTIMA].last(k) for k in pmo_online.OPTIMA_METRICS),
        below=1e-2,
        kind="theorem",
        protocol=ONLINE_TABLE,
    ),
    Claim(
        "On-policy algorithms are nearer to the target than DPO",
        "section 5.2: by 3.0 nats on Gemma and 6.0 on Llama",
        "mean KL of DPO − mean of PPO and Nash-MD, nats",
        contrast(kl, {"dpo": 1.0, PPO_LABEL: -0.5, NASH_LABEL: -0.5}),
        above=0.5,
        protocol=ON_POLICY,
    ),
    Claim(
        "and collapse preferences less",
        "section 5.2: 0.09 on Gemma",
        "mean PCI of PPO and Nash-MD − of DPO",
        contrast(pci, {"dpo": -1.0, PPO_LABEL: 0.5, NASH_LABEL: 0.5}),
        above=0.05,
        protocol=ON_POLICY,
    ),
    Claim(
        "They are nearer than the offline objectives are on average",
        "section 5.2",
        "mean KL of DPO, cDPO, IPO, SimPO and CPO − mean of PPO and Nash-MD, nats",
        contrast(
            kl, {PPO_LABEL: -0.5, NASH_LABEL: -0.5} | dict.fromkeys(OBJECTIVES, 1 / len(OBJECTIVES))
        ),
        above=0.1,
        protocol=ON_POLICY,
    ),
    Claim(
        "Nash-MD is nearer than PPO",
        "section 5.2, appendix D.1: on Qwen, and as near as PPO on Gemma",
        "mean KL of PPO − of Nash-MD, nats",
        difference(kl, PPO_LABEL, NASH_LABEL),
        above=0.1,
        protocol=ON_POLICY,
    ),
    Claim(
        "On benchmarks PMO is comparable with DPO, CPO and SimPO",
        "section 6, Figure 4, Tables 2 and 3",
        untested="needs models of 1 to 1.5 billion parameters that can answer the benchmarks",
    ),
)


def draw(seeds: Sequence[Runs]) -> Figure:
    figure, axes = charts.panels(4, 2.2)
    units = {
        "mean KL to the target (nats)": kl,
        "PCI (probability)": pci,
        "accuracy (share)": accuracy,
    }
    labels = [label for label in (*LABELS, *pmo_online.LABELS) if label in seeds[0]]
    rows = [[label] for label in labels]
    for axis, (unit, quantity) in zip(axes, units.items(), strict=False):
        charts.dots(axis, seeds, rows, level(quantity), unit)
    distances, indices = (
        np.array([[level(quantity)(runs, label) for label in labels] for runs in seeds]).ravel()
        for quantity in (kl, pci)
    )
    slope, start = np.polyfit(distances, indices, 1)
    line = np.array([distances.min(), distances.max()])
    axes[3].scatter(distances, indices, color=charts.COLORS[0], s=14, linewidths=0)
    axes[3].plot(line, start + slope * line, color=charts.COLORS[1])
    axes[3].set(xlabel="mean KL to the target (nats)", ylabel="PCI (probability)")
    look = {"color": charts.COLORS[1]}
    equation = f"all runs: PCI = {start:.2f} − {-slope:.2f} · KL"
    charts.legend(figure, [(equation, look)])
    return figure


STUDY = Study(
    name="pmo",
    title="PMO: preference and accuracy",
    paper="A fine-grained analysis of pure semantic preference alignment in large language models",
    setting=(
        "The pure-semantic pairs of `fastpref data pure-semantic --independent`: each pair has a "
        "probability of its own, as in the paper, so the preferences of held-out pairs cannot be "
        "predicted, and the expected accuracy is 1/2 for every objective. A small Llama learns the "
        "words from other sentences, and the sentences with other words; from there every "
        "objective trains 300 steps of 32 pairs with the probabilities as soft labels. The paper "
        "trains models of 1 to 1.5 billion parameters and tests on 72 or 74 pairs, so that an "
        "accuracy there has a standard error of 0.06; it does not state how its baselines use the "
        "probabilities, nor the learning rates."
    ),
    jobs=jobs,
    training={
        "optim": {"lr": 5e-4, "schedule": "cosine", "warmup_steps": 5},
        "training": {"batch_size": 32, "log_every": 5},
    },
    metrics=("loss",),
    columns=(
        column("mean KL, nats", kl),
        column("PCI", pci),
        column("accuracy", accuracy),
        column("chosen, change in nats", chosen_change, 1),
    ),
    claims=CLAIMS,
    draw=draw,
    takes_groups=False,
    caption="Each objective at the end of training on held-out pairs; PMO by alpha and beta. Small "
    "dots are seeds.",
    sft_data="semantic",
    sft_loss={"name": "sft", "responses": "both"},
    sft_steps=300,
    model_lr=5e-5,
    held_out="semantic",
)
