"""PRO: likelihoods in training, extreme imbalance, and scores.

"Proximalized preference optimization for diverse feedback types" (arXiv:2505.23316): Figure 2 and
appendix H, Table 2 (1 % of one label), Table 3 (two and four scored responses).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import methodcaller
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fastpref.reproduce import charts
from fastpref.reproduce.sample_scores import MALFORMED, TOKENS, WIN_RATE
from fastpref.reproduce.study import Claim, Job, Runs, Study, difference, final

CHOSEN, REJECTED = (f"logps/{side}_change" for side in ("chosen", "rejected"))
EVAL_CHOSEN, ACCURACY = "eval_logps/chosen_change", "eval_rewards/accuracies"
BETA = 0.1
ALPHAS = (2.5, 10.0, 17.5, 25.0)
RARE = ("1 % desired", "1 % undesired")
MAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("pairs", {"name": "dpo"}),
    "nca": ("pairs", {"name": "nca_pair"}),
    "pro_p": ("pairs", {"name": "pro_p"}),
    "kto": ("singles", {"name": "kto"}),
    "pro_b": ("singles", {"name": "pro_b"}),
}
PRO, OTHERS = ("pro_p", "pro_b"), ("dpo", "kto", "nca")


def rare(label: str, alpha: float | None = None) -> str:
    """Label of a run with 1 % of a label: of KTO, or of PRO-B with an alpha."""
    return f"kto, {label}" if alpha is None else f"pro_b {alpha:g}, {label}"


def jobs(seed: int, quick: bool) -> list[Job]:
    all_jobs = [_job(seed, label, kind, loss) for label, (kind, loss) in MAIN.items()]
    for label in RARE:
        side = "desirable_weight" if label == RARE[0] else "undesirable_weight"
        all_jobs.append(_job(seed, rare(label), label, {"name": "kto", side: 100.0}))
        for alpha in ALPHAS[::2] if quick else ALPHAS:
            loss = {"name": "pro_b", "alpha": alpha, side: 100.0}
            all_jobs.append(_job(seed, rare(label, alpha), label, loss))
    for count in (2, 4):
        all_jobs.append(_job(seed, f"nca, {count}", f"{count} responses", {"name": "nca"}))
        # The least alpha with an optimum for four scores in [0, 1] is 3.75.
        pro_s = {"name": "pro_s", "alpha": 4.0}
        all_jobs.append(_job(seed, f"pro_s, {count}", f"{count} responses", pro_s))
    return all_jobs


def _job(seed: int, label: str, kind: str, loss: dict[str, Any]) -> Job:
    """A job with 32 responses a batch: as pairs, single or in groups."""
    group_size = {"pairs": 2, "2 responses": 2, "4 responses": 4}.get(kind, 1)
    config = {"loss": {"beta": BETA, **loss}, "training": {"batch_size": 32 // group_size}}
    return Job(label, seed, config, kind, scores_samples=True)


def _wins(runs: Runs, label: str) -> float:
    return runs[label].last(WIN_RATE)


def _tuned(runs: Runs, label: str) -> float:
    """The win rate of the best larger alpha, less that of the default one."""
    wins = [_wins(runs, name) for alpha in ALPHAS[1:] if (name := rare(label, alpha)) in runs]
    return max(wins) - _wins(runs, rare(label, ALPHAS[0]))


CLAIMS = (
    Claim(
        "DPO lowers the responses that it is trained on, the chosen ones too",
        "section 5.1, appendix H",
        "change of the chosen log-prob in training, DPO, nats",
        lambda runs: runs["dpo"].last(CHOSEN),
        below=0,
    ),
    Claim(
        "PRO raises the preferred responses, for pairs and for single labels",
        "section 5.1, Figures 4 and 5",
        "change of the chosen log-prob in training, the smaller one of PRO-P and PRO-B, nats",
        lambda runs: min(runs[label].last(CHOSEN) for label in PRO),
        above=0,
    ),
    Claim(
        "or at least keeps them higher than DPO does",
        "section 5.1",
        "the same − that of DPO, nats",
        lambda runs: min(runs[label].last(CHOSEN) for label in PRO) - runs["dpo"].last(CHOSEN),
        above=0,
    ),
    Claim(
        "Samples of PRO win more often than DPO's",
        "section 5.2, Figure 2",
        "win rate, the lower one of PRO-P and PRO-B − DPO",
        lambda runs: min(_wins(runs, label) for label in PRO) - _wins(runs, "dpo"),
        above=0,
    ),
    Claim(
        "and are at least on a par with the best of DPO, KTO and NCA",
        "section 5.2, Table 1",
        "win rate, the better one of PRO-P and PRO-B − the best of the others",
        lambda runs: max(_wins(runs, k) for k in PRO) - max(_wins(runs, k) for k in OTHERS),
        above=-0.02,
    ),
    Claim(
        "DPO's samples stray from the length of the responses, PRO-P's do not",
        "section 5.1, Figure 2",
        "distance of the mean length from that of PRO-B and PRO-P, DPO, tokens",
        lambda runs: abs(
            runs["dpo"].last(TOKENS) - float(np.mean([runs[k].last(TOKENS) for k in PRO]))
        ),
        above=3,
    ),
    Claim(
        "With 1 % of the desired responses left, a larger alpha rescues PRO-B",
        "section 5.3, Table 2: 5.6 to 57.2 %",
        "win rate of the best larger alpha − of 2.5",
        lambda runs: _tuned(runs, RARE[0]),
        above=0.05,
    ),
    Claim(
        "With 1 % of the undesired ones left it gains little",
        "section 5.3, Table 2: 48.9 to 50.6 %",
        "the same",
        lambda runs: _tuned(runs, RARE[1]),
        above=-0.02,
        below=0.1,
    ),
    Claim(
        "So tuned, PRO-B beats KTO on 1 % of the desired responses",
        "section 5.3: KTO 22.6 %",
        "win rate of the best alpha − of KTO",
        lambda runs: (
            max(_wins(runs, name) for alpha in ALPHAS if (name := rare(RARE[0], alpha)) in runs)
            - _wins(runs, rare(RARE[0]))
        ),
        above=0,
    ),
    Claim(
        "Four scored responses teach more than two, with NCA and with PRO-S",
        "section 5.4, Table 3",
        "gain of the win rate, the smaller one of the two",
        lambda runs: min(_wins(runs, f"{k}, 4") - _wins(runs, f"{k}, 2") for k in ("nca", "pro_s")),
        above=0,
    ),
    Claim(
        "PRO-S does no worse than NCA, which is made for scores",
        "section 5.4, Table 3",
        "win rate with four responses, PRO-S − NCA",
        difference(WIN_RATE, "pro_s, 4", "nca, 4"),
        above=0,
    ),
)


def draw(seeds: Sequence[Runs]) -> Figure:
    figure, axes = charts.panels(4, 2.0)
    entries = charts.curves(axes[0], seeds, tuple(MAIN), CHOSEN, "chosen, change (nats)")
    charts.curves(axes[1], seeds, tuple(MAIN), REJECTED, "rejected, change (nats)")
    axes[1].set_xlabel("optimizer steps")
    alphas = [alpha for alpha in ALPHAS if rare(RARE[0], alpha) in seeds[0]]
    for position, label in enumerate(RARE):
        wins = np.array([[_wins(runs, rare(label, alpha)) for alpha in alphas] for runs in seeds])
        look = {"color": charts.COLORS[5 + position], "marker": "o", "markersize": 4}
        axes[2].plot(alphas, wins.mean(0), **look)
        axes[2].fill_between(alphas, wins.min(0), wins.max(0), color=look["color"], alpha=0.15)
        kto = np.mean([_wins(runs, rare(label)) for runs in seeds])
        axes[2].axhline(kto, color=look["color"], linestyle=":")
        dotted = {"color": look["color"], "linestyle": ":"}
        entries += [(f"pro_b, {label}", look), (f"kto, {label}", dotted)]
    axes[2].set(xlabel="alpha of PRO-B", ylabel="win rate (share)")
    rows = [[label] for label in (*MAIN, "nca, 2", "nca, 4", "pro_s, 2", "pro_s, 4")]
    charts.dots(axes[3], seeds, rows, methodcaller("last", WIN_RATE), "win rate (share)")
    charts.legend(figure, entries)
    return figure


STUDY = Study(
    name="pro",
    title="PRO: likelihoods, imbalance, scores",
    paper="Proximalized preference optimization for diverse feedback types: a decomposed "
    "perspective on DPO, arXiv:2505.23316",
    setting=(
        "Generated advice, four scored responses to a prompt, taken as pairs of the best and the "
        "worst, as single labels, or as groups; 32 responses a step, beta 0.1 throughout. With 1 "
        "% of a label the loss of the rare responses counts a hundredfold, as in the paper. A "
        "sample wins by the utilities that made the scores, over responses of the data, and loses "
        "if it is no recipe; in the paper, a language model decides."
    ),
    jobs=jobs,
    training={
        "reference": "cached",
        "optim": {"name": "rmsprop", "lr": 1e-4, "warmup_steps": 10},
        "training": {"steps": 60, "log_every": 5},
    },
    metrics=(CHOSEN, REJECTED, EVAL_CHOSEN, ACCURACY, "eval_entropy"),
    columns=(
        final("chosen, nats", CHOSEN, 1),
        final("rejected, nats", REJECTED, 1),
        final("held-out chosen, nats", EVAL_CHOSEN, 1),
        final("win rate", WIN_RATE),
        final("malformed", MALFORMED),
        final("tokens of a sample", TOKENS, 1),
    ),
    claims=CLAIMS,
    draw=draw,
    # Its claims are about samples, which are scored on generated data only.
    takes_groups=False,
    caption="Log-probs of the responses trained on over the steps; win rates of samples with 1 % "
    "of a label left, by alpha, and at the end of every other run.",
)
