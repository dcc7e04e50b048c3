"""DID: the information that preferences encode, with 32 responses; and DPO-PG against DPO.

"Differential information: an information-theoretic perspective on preference optimization"
(arXiv:2505.23761): the energy-based experiment of section 3.5 and Figure 1, the ideal distribution
of rejected responses of section 3.4, and DPO-PG of appendix H.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastpref import losses
from fastpref.logps import SequenceLogps
from fastpref.reproduce import charts
from fastpref.reproduce.study import BASELINES, Claim, Job, Record, Runs, Study, difference, final

TARGET, DID = "js/target", "js/did"
CHOSEN, REJECTED = (f"logps/{side}_change" for side in ("chosen", "rejected"))
ENTROPY, LOSS = "eval_entropy", "eval_loss"
RESPONSES, BETA, EBM_STEPS = 32, 0.5, 1500
TEMPERATURES = {"reinforcing": 1.5, "smoothing": 0.5}  # factors on the reference's logits
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": BETA},
    "r = β log π": {"name": "logpi_dpo", "beta": BETA},
    "ipo": {"name": "ipo", "tau": BETA},
    "simpo": {"name": "simpo", "beta": BETA, "gamma": 0.5},
    "hinge": {"name": "hinge", "beta": BETA},
    "cpo": {"name": "cpo", "beta": BETA, "lam": 1.0},
    "orpo": {"name": "orpo"},
}
REJECTED_FROM = ("the ideal", "uniform", "the reference")


def world(job: Job) -> list[Record]:
    """Train a table of 32 logits on the exact population of pairs, and record its divergences.

    The chosen response is drawn from the reference, the rejected one from the distribution that
    `job.config` names; the ideal one is proportional to ref · (ref / target)^beta. Divergences are
    Jensen–Shannon, nats, of the policy to the target and to the DID q ∝ target / ref.
    """
    generator = torch.Generator().manual_seed(job.seed)
    logits = torch.randn(RESPONSES, generator=generator, dtype=torch.float64)
    factor = TEMPERATURES[job.config["target"]]
    reference, target = logits.log_softmax(0), (factor * logits).log_softmax(0)
    did = (target - reference).log_softmax(0)
    rejected = {
        "the ideal": (reference - BETA * (target - reference)).log_softmax(0),
        "uniform": torch.zeros_like(logits).log_softmax(0),
        "the reference": reference,
    }[job.config["rejected"]]
    loss = losses.build(**job.config["loss"])
    assert isinstance(loss, losses.PairwiseLoss)
    responses = torch.arange(RESPONSES)
    chosen, other = torch.cartesian_prod(responses, responses).unbind(1)
    weights = (reference[chosen] + rejected[other]).exp()
    table = reference.clone().requires_grad_()
    optimizer = torch.optim.RMSprop([table], lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, EBM_STEPS)
    records = []
    for step in range(EBM_STEPS + 1):
        policy = table.log_softmax(0)
        if step % 100 == 0:
            records.append({"step": step, TARGET: js(policy, target), DID: js(policy, did)})
        pairs = [_pairs(logps, chosen, other) for logps in (policy, reference)]
        optimizer.zero_grad()
        (weights * loss(pairs[0], pairs[1] if loss.needs_reference else None).loss).sum().backward()
        torch.nn.utils.clip_grad_norm_([table], 1.0)
        optimizer.step()
        schedule.step()
    records[-1]["did/entropy"] = -(did.exp() * did).sum().item()
    return records


def _pairs(logps: Tensor, chosen: Tensor, rejected: Tensor) -> SequenceLogps:
    ones = torch.ones_like(chosen)
    return SequenceLogps(logps[chosen], logps[rejected], ones, ones)


@torch.no_grad()
def js(p: Tensor, q: Tensor) -> float:
    """Jensen–Shannon divergence of two distributions, given as log-probs; nats."""
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    sides = [(x.exp() * (x - middle)).sum() for x in (p, q)]
    return (sides[0] + sides[1]).item() / 2


def ebm(objective: str, target: str = "reinforcing", rejected: str = "the ideal") -> str:
    """Label of a run of the energy-based experiment."""
    where = "" if rejected == "the ideal" else f", rejected from {rejected}"
    return f"32 responses: {objective}, {target}{where}"


def jobs(seed: int, quick: bool) -> list[Job]:
    worlds = [
        _world(seed, name, target, REJECTED_FROM[0])
        for target in TEMPERATURES
        for name in OBJECTIVES
    ]
    worlds += [_world(seed, "dpo", "reinforcing", rejected) for rejected in REJECTED_FROM[1:]]
    loss = {"loss": BASELINES["dpo"]}
    return [*worlds, Job("dpo", seed, loss), Job("dpo_pg", seed, {**loss, "update": "dpo_pg"})]


def _world(seed: int, objective: str, target: str, rejected: str) -> Job:
    config = {"loss": OBJECTIVES[objective], "target": target, "rejected": rejected}
    return Job(ebm(objective, target, rejected), seed, config, function=world)


def _js(runs: Runs, objective: str, metric: str = TARGET) -> float:
    """The larger divergence of the two targets."""
    return max(runs[ebm(objective, target)].last(metric) for target in TEMPERATURES)


CLAIMS = (
    Claim(
        "DPO learns the target policy where preferences encode the differential information",
        "Theorem 3.4, section 3.5",
        "JS divergence of DPO's policy to the target, nats, the larger of the two targets",
        lambda runs: _js(runs, "dpo"),
        below=1e-4,
    ),
    Claim(
        "The reward β log π learns the DID itself",
        "Theorem 3.3, Figure 1",
        "JS divergence of its policy to q, nats, the larger of the two targets",
        lambda runs: _js(runs, "r = β log π", DID),
        below=1e-4,
    ),
    Claim(
        "Other objectives do not learn the target from the same data",
        "section 3.5",
        "least JS divergence to the target among ipo, simpo, hinge, cpo, orpo, nats",
        lambda runs: min(_js(runs, name) for name in list(OBJECTIVES)[2:]),
        above=1e-3,
    ),
    Claim(
        "Rejected responses must come from the ideal distribution",
        "section 3.4",
        "JS divergence of DPO with others − with the ideal, nats, the smaller one",
        lambda runs: min(
            difference(TARGET, ebm("dpo", rejected=k), ebm("dpo"))(runs) for k in REJECTED_FROM[1:]
        ),
        above=1e-3,
    ),
    Claim(
        "Smoothing targets have a DID of higher entropy than reinforcing ones",
        "Claim 4.1",
        "entropy of q, smoothing − reinforcing, nats",
        difference("did/entropy", ebm("dpo", "smoothing"), ebm("dpo")),
        above=0,
    ),
    Claim(
        "DPO lowers the chosen responses",
        "section 4.2, Figure 2",
        "change of the chosen log-prob in training, nats",
        lambda runs: runs["dpo"].last(CHOSEN),
        below=0,
    ),
    Claim(
        "DPO-PG raises them",
        "appendix H, Figure 8",
        "change of the chosen log-prob in training, nats",
        lambda runs: runs["dpo_pg"].last(CHOSEN),
        above=0,
    ),
    Claim(
        "DPO-PG does not raise the rejected ones",
        "Corollary H.5",
        "change of the rejected log-prob in training, nats",
        lambda runs: runs["dpo_pg"].last(REJECTED),
        below=0,
    ),
    Claim(
        "DPO-PG lowers DPO's loss",
        "Corollary H.5.1, Figure 9",
        "DPO's loss on held-out pairs, at the end − at the start, nats",
        lambda runs: runs["dpo_pg"].last(LOSS) - runs["dpo_pg"].first(LOSS),
        below=0,
    ),
    Claim(
        "DPO-PG reinforces: it leaves a lower entropy than DPO",
        "section 4.3, Table 2",
        "entropy of the tokens, DPO − DPO-PG, nats",
        difference(ENTROPY, "dpo", "dpo_pg"),
        above=0,
    ),
)


def draw(seeds: Sequence[Runs]) -> Figure:
    figure, axes = charts.panels(4, 2.0)
    labels = [ebm(name) for name in OBJECTIVES]
    entries = charts.curves(axes[0], seeds, labels, TARGET, "JS to the target (nats)")
    axes[0].set(yscale="log", xlabel="steps")
    entries = [(name, look) for name, (_, look) in zip(OBJECTIVES, entries, strict=True)]
    both, order = ("dpo", "dpo_pg"), (*OBJECTIVES, "dpo_pg")
    for axis, metric, unit in (
        (axes[1], CHOSEN, "chosen, change (nats)"),
        (axes[2], REJECTED, "rejected, change (nats)"),
        (axes[3], ENTROPY, "entropy (nats per token)"),
    ):
        charts.curves(axis, seeds, both, metric, unit, order)
    axes[3].set_xlabel("optimizer steps")
    charts.legend(figure, [*entries, ("dpo_pg", {"color": charts.COLORS[7], "linewidth": 3})])
    return figure


STUDY = Study(
    name="did",
    title="DID: what preferences encode, and DPO-PG",
    paper="Differential information: an information-theoretic perspective on preference "
    "optimization, arXiv:2505.23761",
    setting=(
        "32 responses whose logits are a table: a reference, a target that sharpens or flattens "
        "it, chosen responses drawn from the reference and rejected ones from the ideal "
        "distribution, all pairs with their exact weights. The second part trains a small Llama on "
        "pairs of generated advice with DPO and with DPO-PG, whose gradient is projected; both use "
        "plain gradient descent, for which the guarantees of DPO-PG hold. The paper does not state "
        "its temperatures, learning rates and number of responses."
    ),
    jobs=jobs,
    training={
        "reference": "cached",
        # RMSprop with alpha 0 and a huge eps is gradient descent, here with a rate of 0.004.
        "optim": {"name": "rmsprop", "lr": 4e5, "alpha": 0.0, "eps": 1e8, "max_grad_norm": None},
        "training": {"steps": 160, "batch_size": 16, "log_every": 10, "eval_every": 20},
    },
    metrics=(CHOSEN, REJECTED, ENTROPY, LOSS, "eval_rewards/accuracies"),
    columns=(
        final("JS to the target, nats", TARGET, 5),
        final("JS to the DID, nats", DID, 5),
        final("chosen, nats", CHOSEN, 1),
        final("rejected, nats", REJECTED, 1),
        final("DPO's loss, held out", LOSS, 3),
        final("entropy, nats", ENTROPY, 3),
    ),
    claims=CLAIMS,
    draw=draw,
    caption="Above: divergence of each objective from the target that sharpens the reference. "
    "Below: DPO and DPO-PG.",
)
