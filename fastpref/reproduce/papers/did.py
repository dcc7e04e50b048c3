"""DID: the information that preferences encode, in tables of 32 responses; and DPO-PG against DPO.

"Differential information: an information-theoretic perspective on preference optimization"
(arXiv:2505.23761): the energy-based experiment of section 3.5 and Figure 1, the ideal distribution
of rejected responses of section 3.4, displacement and DPO-PG of Figures 2, 8 and 9, and the entropy
of the DID of Table 2. `did_tables` and `did_models` have the functions of the runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fastpref.reproduce import charts
from fastpref.reproduce.claims import Claim, Measurement
from fastpref.reproduce.papers import did_models, did_tables
from fastpref.reproduce.papers.did_tables import DID, OBJECTIVES, REJECTED_FROM, TARGET, TARGETS
from fastpref.reproduce.quantities import (
    Quantity,
    array,
    chosen_change,
    column,
    entropy,
    level,
    margin,
    mean_of,
    rejected_change,
    statistic,
)
from fastpref.reproduce.sizes import Size
from fastpref.reproduce.study import START, Job, Runs, Study, final

BETA = 0.1
DPO: dict[str, Any] = {"loss": {"name": "dpo", "beta": BETA}}
DPO_PG: dict[str, Any] = {**DPO, "update": "dpo_pg"}
MODELS = {"dpo": DPO, "dpo_pg": DPO_PG}
# Policies that stay near the reference, where log π' of the entropy's procedure follows log(π/ref);
# the rate was chosen by this slope, on one seed. The paper's beta is 0.2 to 0.02.
NEAR_LR = 1e-5
NEAR = {
    "dpo, near": DPO,
    "dpo, β 0.02, near": {"loss": {"name": "dpo", "beta": 0.02}},
    "dpo_pg, near": DPO_PG,
}
CHOSEN, REJECTED = (f"logps/{side}_change" for side in ("chosen", "rejected"))
ENTROPY = "eval_entropy"
TO_TARGET, TO_DID = array(f"worlds/{TARGET}"), array(f"worlds/{DID}")
EXACT = "exact population"


def world(objective: str, target: str = TARGETS[0], rejected: str = REJECTED_FROM[0]) -> str:
    """Label of a run of the energy-based experiment."""
    source = "" if rejected == REJECTED_FROM[0] else f", rejected from {rejected}"
    return f"32 responses: {objective}, {target}{source}"


def jobs(seed: int, size: Size) -> list[Job]:
    settings = [(name, target, REJECTED_FROM[0]) for target in TARGETS for name in OBJECTIVES]
    settings += [("dpo", TARGETS[0], rejected) for rejected in REJECTED_FROM[1:]]
    sampled = {"worlds": 32 if size.quick else 1000, "steps": 100 if size.quick else 1500}
    worlds = [
        Job(
            world(*setting),
            seed,
            dict(zip(("objective", "target", "rejected"), setting, strict=True), **sampled),
            function=did_tables.train_worlds,
        )
        for setting in settings
    ]
    exact = Job(EXACT, seed, {}, function=did_tables.exact_population)
    return [*worlds, exact, *_models(seed, size)]


def _models(seed: int, size: Size) -> list[Job]:
    """The jobs of the second part; those of a pretrained model have no entropy, for its cost."""
    shared: dict[str, Any] = {"training": {"steps": 20} if size.quick else {"epochs": 5}}
    if size.model is not None:
        # A cached reference would compute all rows, of which few are trained on.
        steps = {"steps": 5 if size.quick else 20, "batch_size": 8}
        shared = {"training": steps, "reference": "frozen"}
    models = [
        Job(label, seed, config | shared, measure=did_models.gradients)
        for label, config in MODELS.items()
    ]
    if size.model is not None:
        return models
    measure = did_models.few_entropies if size.quick else did_models.entropies
    shared["optim"] = {"lr": NEAR_LR}
    return models + [
        Job(label, seed, config | shared, measure=measure) for label, config in NEAR.items()
    ]


def _dpo_loss(runs: Runs, label: str) -> np.ndarray:
    """DPO's loss of held-out pairs, nats; log 2 at the start."""
    return np.logaddexp(0, -BETA * (margin(runs, label) - margin(runs, START))) - math.log(2)


DPO_LOSS = Quantity("pairs", _dpo_loss)


def _largest(quantity: Quantity, objective: str) -> Callable[[Runs], Measurement]:
    """The mean of a quantity of the worse one of the two targets."""
    labels = [world(objective, target) for target in TARGETS]
    return statistic(lambda table: float(table[0].max()), (quantity,), labels)


def _others(table: np.ndarray) -> float:
    """The least mean of the other objectives, less that of DPO, over both targets."""
    dpo, _, *others = table[0].reshape(len(OBJECTIVES), len(TARGETS))
    return float(min(np.min(other - dpo) for other in others))


def _entropy_difference(of: str) -> Callable[[Runs], Measurement]:
    """The least entropy of DPO, less that of DPO-PG."""
    *dpo, dpo_pg = NEAR

    def value(runs: Runs) -> Measurement:
        least = min(did_models.entropy_of(runs[label], of) for label in dpo)
        subtrahend = did_models.entropy_of(runs[dpo_pg], of)
        error = math.hypot(least.standard_error, subtrahend.standard_error)
        return Measurement(least.value - subtrahend.value, error, min(least.n, subtrahend.n))

    return value


POPULATION = "8 tables of 32 logits, double precision, every pair with its exact weight"
WORLDS = (
    "1,000 tables of 32 logits a seed, in single precision, 1,500 steps of 64 pairs drawn from the "
    "reference and the ideal distribution, RMSprop"
)
ADVICE = (
    "generated advice, five epochs of 16 pairs a step, RMSprop with a constant rate of 2e-4 after "
    "a warm-up; 1,020 held-out pairs"
)
SAMPLED = (
    "the procedure of appendix K (`fastpref did-entropy`) on the trained models, 4 samples of each "
    "of 340 held-out prompts; policies near the reference, at a rate of 1e-5"
)
GRADIENTS = "gradients of 16 held-out pairs, one at a time and together, after training"
CLAIMS = (
    Claim(
        "DPO's optimum is the target where preferences encode the differential information",
        "Theorem 3.4",
        "JS divergence of the policy from the target, the largest, nats",
        lambda runs: runs[EXACT].last(f"exact/dpo/{TARGET}"),
        below=1e-8,
        kind="theorem",
        protocol=POPULATION,
    ),
    Claim(
        "The optimum with the reward β log π is the DID itself",
        "Theorem 3.3",
        "JS divergence of the policy from q, the largest, nats",
        lambda runs: runs[EXACT].last(f"exact/r = β log π/{DID}"),
        below=1e-8,
        kind="theorem",
        protocol=POPULATION,
    ),
    Claim(
        "DPO-PG's direction raises the chosen log-probs",
        "Theorem H.4",
        "least cosine of the direction and the gradient of the chosen log-probs",
        lambda runs: runs["dpo_pg"].last("gradients/chosen"),
        above=0,
        kind="theorem",
        protocol=GRADIENTS,
    ),
    Claim(
        "and does not raise the rejected ones",
        "Theorem H.5",
        "largest cosine of the direction and the gradient of the rejected log-probs",
        lambda runs: runs["dpo_pg"].last("gradients/rejected"),
        below=1e-5,
        kind="theorem",
        protocol=GRADIENTS,
    ),
    Claim(
        "so that it lowers DPO's loss of a pair",
        "Corollary H.5.1",
        "largest cosine of the direction and the gradient of the pair's loss",
        lambda runs: runs["dpo_pg"].last("gradients/loss"),
        below=0,
        kind="theorem",
        protocol=GRADIENTS,
    ),
    Claim(
        "DPO converges to the target from samples",
        "section 3.5, Figure 1",
        "JS divergence of DPO's policy from the target, the worse one of two targets, nats",
        _largest(TO_TARGET, "dpo"),
        below=0.002,
        null=0.01,
        protocol=WORLDS + "; the reference is 0.01 to 0.03 nats away",
    ),
    Claim(
        "and the reward β log π to the DID",
        "section 3.5, Figure 1",
        "JS divergence of the policy from q, the worse one of two targets, nats",
        _largest(TO_DID, "r = β log π"),
        below=0.002,
        null=0.01,
        protocol=WORLDS,
    ),
    Claim(
        "Other objectives do not learn the target from the same pairs",
        "section 3.5, Figure 1",
        "JS divergence from the target, the least of ipo, simpo, hinge, cpo, orpo − DPO's, nats",
        statistic(
            _others,
            (TO_TARGET,),
            [world(name, target) for name in OBJECTIVES for target in TARGETS],
        ),
        above=0.003,
        protocol=WORLDS,
    ),
    Claim(
        "Rejected responses must come from the ideal distribution",
        "section 3.4, Theorem L.1",
        "JS divergence of DPO from the target with uniform rejected responses or the reference's "
        "(the lesser one) − with ideal ones, nats",
        statistic(
            lambda table: float(table[0, 1:].min() - table[0, 0]),
            (TO_TARGET,),
            [world("dpo", rejected=rejected) for rejected in REJECTED_FROM],
        ),
        above=0.003,
        protocol=WORLDS,
    ),
    Claim(
        "A smoothing target has a DID of higher entropy than a reinforcing one",
        "Claim 4.1",
        untested="the tables break its assumption: what is unlikely under a normal reference is "
        "likely under a smoothing DID",
    ),
    Claim(
        "DPO lowers the chosen responses",
        "section 4.3, Figure 2",
        "change of the held-out chosen log-prob, nats",
        mean_of(chosen_change, "dpo"),
        below=-0.5,
        protocol=ADVICE,
    ),
    Claim(
        "DPO-PG raises them",
        "appendix H, Figure 8",
        "change of the held-out chosen log-prob, nats",
        mean_of(chosen_change, "dpo_pg"),
        above=0.5,
        protocol=ADVICE,
    ),
    Claim(
        "DPO-PG does not raise the rejected ones",
        "appendix H, Figure 8",
        "change of the held-out rejected log-prob, nats",
        mean_of(rejected_change, "dpo_pg"),
        below=0.5,
        protocol=ADVICE,
    ),
    Claim(
        "DPO-PG lowers DPO's loss",
        "appendix H, Figure 9",
        "DPO's loss on held-out pairs − log 2, nats",
        mean_of(DPO_LOSS, "dpo_pg"),
        below=-0.02,
        protocol=ADVICE,
    ),
    Claim(
        "DPO-PG learns a DID of lower entropy than DPO",
        "Table 2: 324 against 421 to 651 nats, 264 against 334 to 426",
        "H(q) of DPO (the lesser one of two beta) − of DPO-PG, nats",
        _entropy_difference("did"),
        above=2.0,
        protocol=SAMPLED,
    ),
    Claim(
        "DPO smooths its policy where DPO-PG sharpens it",
        "section 4.3",
        "entropy of the responses of DPO (the lesser one of two beta) − of DPO-PG, nats",
        _entropy_difference("policy"),
        above=1.0,
        protocol=SAMPLED,
    ),
    Claim(
        "Ultra-Feedback and Magpie-Pro encode a DID of high entropy, and DPO earns more reward on "
        "them than β log π",
        "section 3.5, Figure 6, Table 1",
        untested="is about these data sets and models of 7 billion parameters, judged by a reward "
        "model of 27 billion",
    ),
    Claim(
        "A DID of high entropy serves instruction following, one of low entropy knowledge",
        "section 4.3, Figure 3, Table 2",
        untested="needs models of 7 to 9 billion parameters, their benchmarks and a judge",
    ),
)


def draw(seeds: Sequence[Runs]) -> Figure:
    figure, axes = charts.panels(4, 2.0)
    rows = [[world(name, target) for target in TARGETS] for name in OBJECTIVES]
    charts.dots(axes[0], seeds, rows, level(TO_TARGET), "JS divergence from the target (nats)")
    axes[0].set_yticks(range(len(OBJECTIVES)), list(OBJECTIVES))
    axes[0].set_xscale("log")
    labels = tuple(MODELS)
    entries = charts.curves(axes[1], seeds, labels, CHOSEN, "chosen, change (nats)")
    charts.curves(axes[2], seeds, labels, REJECTED, "rejected, change (nats)")
    axes[2].set_xlabel("optimizer steps")
    if rows := [[label] for label in NEAR if label in seeds[0]]:
        charts.dots(axes[3], seeds, rows, _did_entropy, "entropy of the DID (nats)")
    charts.legend(figure, entries)
    return figure


def _did_entropy(runs: Runs, label: str) -> float:
    return runs[label].last("did/entropy")


STUDY = Study(
    name="did",
    title="DID: what preferences encode, and DPO-PG",
    paper="Differential information: an information-theoretic perspective on preference "
    "optimization, arXiv:2505.23761",
    setting=(
        "32 responses whose logits are a table: a reference with normal logits, a target that "
        "sharpens (× 1.5) or flattens (× 0.5) it, chosen responses drawn from the reference and "
        "rejected ones from the ideal distribution. The second part trains a small Llama on pairs "
        "of generated advice with DPO and with DPO-PG, by RMSprop with a constant rate after a "
        "warm-up, five epochs as in the paper; the start model has not seen the chosen responses. "
        "The paper does not state its temperatures and number of responses."
    ),
    jobs=jobs,
    training={
        "optim": {"name": "rmsprop", "lr": 2e-4, "warmup_steps": 20, "schedule": "constant"},
        "training": {"batch_size": 16, "log_every": 5},
        "reference": "cached",
    },
    metrics=(CHOSEN, REJECTED, ENTROPY),
    columns=(
        column("JS to the target, nats", TO_TARGET, 4),
        column("JS to the DID, nats", TO_DID, 4),
        column("chosen, nats", chosen_change, 1),
        column("rejected, nats", rejected_change, 1),
        column("DPO's loss − log 2", DPO_LOSS, 3),
        column("entropy, nats per token", entropy, 2),
        final("H(DID), nats", "did/entropy", 1),
        final("slope of log π′", "did/slope"),
        final("slopes ≥ 0, share", "did/share"),
    ),
    claims=CLAIMS,
    draw=draw,
    model_lr=2e-5,
    caption="Above: divergence of each objective from the target that sharpens the reference, and "
    "from the one that flattens it. Below: DPO and DPO-PG.",
)
