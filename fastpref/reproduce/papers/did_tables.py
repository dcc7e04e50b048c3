"""The energy-based experiment of the DID paper: tables of 32 logits, from samples and exactly.

theta ~ N(0, 1) are the logits of the reference, f · theta those of the target, and
theta − β (f − 1) theta those of the ideal distribution of rejected responses (Eq. 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref.reproduce.logit_tables import Pairs, all_pairs, always, draw, js, train
from fastpref.reproduce.study import Job, Record

RESPONSES, BETA, BATCH = 32, 0.5, 64
LR = 0.02
EXACT_TABLES, EXACT_STEPS, EXACT_LR = 8, 600, 0.1
FACTORS = {"reinforcing": 1.5, "smoothing": 0.5}  # of the target's logits
TARGETS = tuple(FACTORS)
REJECTED_FROM = ("the ideal", "uniform", "the reference")
TARGET, DID = "target", "did"
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": BETA},
    "r = β log π": {"name": "logpi_dpo", "beta": BETA},
    "ipo": {"name": "ipo", "tau": BETA},
    "simpo": {"name": "simpo", "beta": BETA, "gamma": 0.5},
    "hinge": {"name": "hinge", "beta": BETA},
    "cpo": {"name": "cpo", "beta": BETA, "lam": 1.0},
    "orpo": {"name": "orpo"},
}


def distributions(logits: Tensor, target: str, rejected: str) -> dict[str, Tensor]:
    """Log-probs of the reference, the target, the DID q ∝ target / ref, and rejected responses."""
    extra = (FACTORS[target] - 1) * logits
    sources = {
        "the ideal": logits - BETA * extra,
        "uniform": torch.zeros_like(logits),
        "the reference": logits,
    }
    tables = {
        "reference": logits,
        TARGET: logits + extra,
        DID: extra,
        "rejected": sources[rejected],
    }
    return {name: table.log_softmax(1) for name, table in tables.items()}


def train_worlds(job: Job) -> list[Record]:
    """Train `worlds` tables on drawn pairs and record the divergences of each, nats."""
    generator = torch.Generator().manual_seed(job.seed)
    logits = torch.randn(job.config["worlds"], RESPONSES, generator=generator)
    known = distributions(logits, job.config["target"], job.config["rejected"])
    policy = train(
        known["reference"],
        OBJECTIVES[job.config["objective"]],
        lambda _: Pairs(*(draw(known[k], BATCH, generator) for k in ("reference", "rejected"))),
        job.config["steps"],
        LR,
    )
    return [{f"worlds/{name}": js(policy, known[name]).tolist() for name in (TARGET, DID)}]


def exact_population(job: Job) -> list[Record]:
    """Train on all pairs with their exact weights, and record the largest divergence, nats."""
    generator = torch.Generator().manual_seed(job.seed)
    logits = torch.randn(EXACT_TABLES, RESPONSES, generator=generator, dtype=torch.float64)
    record: Record = {"step": EXACT_STEPS}
    for objective, goal in (("dpo", TARGET), ("r = β log π", DID)):
        divergences = []
        for target in TARGETS:
            known = distributions(logits, target, REJECTED_FROM[0])
            chosen, rejected = all_pairs(RESPONSES, EXACT_TABLES)
            weights = known["reference"].gather(1, chosen) + known["rejected"].gather(1, rejected)
            population = Pairs(chosen, rejected, weights.exp())
            policy = train(
                known["reference"], OBJECTIVES[objective], always(population), EXACT_STEPS, EXACT_LR
            )
            divergences.append(js(policy, known[goal]).max().item())
        record[f"exact/{objective}/{goal}"] = max(divergences)
    return [record]
