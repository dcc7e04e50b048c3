"""The claims of the PRO paper, with the quantities that decide them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fastpref.reproduce.claims import Claim, Measurement
from fastpref.reproduce.papers.pro_runs import (
    ALPHA,
    BEGIN,
    BETAS,
    DESIRED,
    FIRST,
    FOLLOWED,
    STRONG_BETAS,
    THEOREMS,
    TUNED,
    TUNED_UNDESIRED,
    UNDESIRED,
    rare,
    run,
    scored,
)
from fastpref.reproduce.quantities import (
    TOKENS,
    WIN,
    Quantity,
    Values,
    array,
    chosen_change,
    difference,
    mean_of,
    statistic,
)
from fastpref.reproduce.study import Runs


def _growth(values: Quantity, family: str, holder: str | None = None) -> Quantity:
    """Change of a number of samples since those of a family, which the run `holder` may have."""
    earlier = array(f"{family}/{'tokens' if values is TOKENS else 'win'}")

    def change(runs: Runs, label: str) -> Values:
        return values(runs, label) - earlier(runs, holder or label)

    return Quantity("samples", change)


SINCE_FIRST = _growth(WIN, FIRST)
TOKENS_SINCE_BEGIN = _growth(TOKENS, BEGIN, FOLLOWED[0])


def best_difference(more: Sequence[str], less: Sequence[str]) -> Callable[[Runs], Measurement]:
    """Win rate of the best run among `more`, less that of the best one among `less`."""

    def of(table: np.ndarray) -> float:
        return float(table[0, : len(more)].max() - table[0, len(more) :].max())

    return statistic(of, (WIN,), (*more, *less))


def sweep(*methods: str) -> tuple[str, ...]:
    """Labels of all runs of some methods, over beta."""
    return tuple(run(method, beta) for method in methods for beta in BETAS)


def _theorem(name: str) -> Callable[[Runs], float]:
    return lambda runs: runs[THEOREMS].last(f"theorem/{name}")


TABLES = "drawn tables of 7 responses of which 3 are labeled, in fp64"
ONE_EPOCH = (
    "one epoch of 1,200 pairs from a model that has seen other pairs of other prompts, beta 0.1, "
    "on 1,020 held-out pairs"
)
SAMPLED = "1,020 samples on held-out prompts after one epoch, beta 0.1"
BEST = "1,020 samples on held-out prompts after one epoch, best of beta 0.03, 0.1, 0.3"
ONE_PERCENT = (
    "1,200 labels of one kind and 12 of the other, whose loss counts a hundredfold, one epoch, "
    "beta 0.1; 1,020 samples"
)
GROUPS = "1,200 groups of the same prompts, one epoch of 16 groups a step, beta 0.1; 1,020 samples"
CLAIMS = (
    Claim(
        "DPO's loss has the gradient of an optimizer of scores and a regularizer of all pairs",
        "Theorem 3.1",
        "largest difference of the gradients, relative",
        _theorem("decomposition"),
        below=1e-12,
        kind="theorem",
        protocol=TABLES,
    ),
    Claim(
        "DPO's loss does not change when both log-probs of a pair fall together",
        "section 2",
        "its change when both fall by 5 nats",
        _theorem("shift_dpo"),
        below=1e-12,
        kind="theorem",
        protocol="a pair at the reference",
    ),
    Claim(
        "PRO-P's loss rises",
        "section 4.1",
        "its change when both fall by 5 nats",
        _theorem("shift_pro_p_least"),
        above=0.1,
        kind="theorem",
        protocol="a pair at the reference",
    ),
    Claim(
        "With the complete regularizer all unlabeled responses keep their ratios at the optimum",
        "Corollary 3.3, Eq. 3",
        "spread of log π − log ref over unlabeled responses, nats",
        _theorem("unlabeled_spread"),
        below=1e-5,
        kind="theorem",
        protocol=TABLES,
    ),
    Claim(
        "those of preferred responses are above them",
        "Corollary 3.3, Eq. 4",
        "least log-ratio of a preferred response − of the unlabeled ones, nats",
        _theorem("preferred_least"),
        above=1e-3,
        kind="theorem",
        protocol=TABLES,
    ),
    Claim(
        "and those of dispreferred responses below",
        "Corollary 3.3, Eq. 5",
        "largest log-ratio of a dispreferred response − of the unlabeled ones, nats",
        _theorem("dispreferred"),
        below=-1e-3,
        kind="theorem",
        protocol=TABLES,
    ),
    Claim(
        "With a hyper response in place of all unlabeled ones the optimum is the same",
        "Theorem 4.1",
        "largest difference of log-probs at the optima, nats",
        _theorem("hyper"),
        below=1e-5,
        kind="theorem",
        protocol=TABLES,
    ),
    Claim(
        "PRO has an optimum if alpha exceeds a threshold",
        "Theorem 4.2",
        "least slope of PRO-S far away in any direction, alpha 5 % above the threshold",
        _theorem("slope_above_least"),
        above=1e-5,
        kind="theorem",
        protocol="groups of 4 drawn scores, with the exact threshold of PRO-S",
    ),
    Claim(
        "and PRO-S has none below it",
        "not in the paper, whose threshold is sufficient",
        "the same, alpha 5 % below it",
        _theorem("slope_below"),
        below=-1e-5,
        kind="theorem",
        protocol="groups of 4 drawn scores, with the exact threshold of PRO-S",
    ),
    Claim(
        "PRO-P is DPO with pseudo-labels for the hyper response",
        "Theorem 4.3",
        "largest difference of the gradients, relative",
        _theorem("pairs"),
        below=1e-12,
        kind="theorem",
        protocol=TABLES,
    ),
    Claim(
        "DPO lowers the chosen responses",
        "sections 1 and 5.1, Figure 4",
        "change of the held-out chosen log-prob, nats",
        mean_of(chosen_change, run("dpo")),
        below=-0.5,
        protocol=ONE_EPOCH,
    ),
    *(
        Claim(
            f"{name} raises them",
            "section 5.1, Figures 4 and 5",
            "change of the held-out chosen log-prob, nats",
            mean_of(chosen_change, label),
            above=0.5,
            protocol=ONE_EPOCH,
        )
        for name, label in (
            ("PRO-P", run("pro_p")),
            ("PRO-B", run("pro_b")),
            ("PRO-S", scored("pro_s", 4)),
        )
    ),
    *(
        Claim(
            f"{name} keeps them higher than DPO",
            "section 5.1",
            "change of the held-out chosen log-prob − that of DPO, nats",
            difference(chosen_change, run(method), run("dpo")),
            above=0.5,
            protocol=ONE_EPOCH,
        )
        for name, method in (("PRO-P", "pro_p"), ("PRO-B", "pro_b"))
    ),
    *(
        Claim(
            f"{name}'s samples grow longer",
            f"section 5.1, Figure 2{numbers}",
            "growth of the mean length of samples, tokens",
            mean_of(TOKENS_SINCE_BEGIN, run(method)),
            above=2.0,
            protocol=SAMPLED,
        )
        for name, method, numbers in (("DPO", "dpo", ""), ("KTO", "kto", ": 114 to 236 tokens"))
    ),
    *(
        Claim(
            f"{name}'s samples keep their length",
            "section 5.1, Figure 2",
            "growth of the mean length of samples, tokens",
            mean_of(TOKENS_SINCE_BEGIN, run(method)),
            above=-2.0,
            below=2.0,
            protocol=SAMPLED,
        )
        for name, method in (("PRO-P", "pro_p"), ("PRO-B", "pro_b"))
    ),
    Claim(
        "DPO's win rate falls after the first evaluation",
        "section 5.1, Figure 2",
        "change of the win rate in the last two thirds of the epoch",
        mean_of(SINCE_FIRST, run("dpo")),
        below=-0.05,
        protocol=SAMPLED,
    ),
    *(
        Claim(
            f"{name}'s does not",
            "section 5.1, Figure 2",
            "change of the win rate in the last two thirds of the epoch",
            mean_of(SINCE_FIRST, run(method)),
            above=-0.05,
            protocol=SAMPLED,
        )
        for name, method in (("PRO-P", "pro_p"), ("PRO-B", "pro_b"))
    ),
    *(
        Claim(
            f"{name} wins more often than DPO",
            "section 5.2, Figure 2",
            f"win rate, {name} − DPO",
            best_difference(sweep(method), sweep("dpo")),
            above=0.03,
            protocol=BEST,
        )
        for name, method in (("NCA", "nca"), ("KTO", "kto"), ("PRO-P", "pro_p"), ("PRO-B", "pro_b"))
    ),
    *(
        Claim(
            f"{name} is on a par with the best of DPO, KTO and NCA, or better",
            "section 5.2, Table 1",
            f"win rate, {name} − the best of the others",
            best_difference(sweep(method), sweep("dpo", "kto", "nca")),
            above=-0.05,
            protocol=BEST,
        )
        for name, method in (("PRO-P", "pro_p"), ("PRO-B", "pro_b"))
    ),
    Claim(
        "With 1 % of the desired responses a larger alpha rescues PRO-B",
        "section 5.3, Table 2: 5.6 to 57.2 %",
        "win rate, alpha 17.5 − alpha 2.5",
        difference(WIN, rare(DESIRED, TUNED), rare(DESIRED, ALPHA)),
        above=0.1,
        protocol=ONE_PERCENT,
    ),
    Claim(
        "a larger beta does not",
        "section 5.3",
        "win rate, alpha 17.5 − the best of ten and a hundred times beta",
        best_difference(
            (rare(DESIRED, TUNED),), tuple(rare(DESIRED, ALPHA, beta) for beta in STRONG_BETAS)
        ),
        above=0.05,
        protocol=ONE_PERCENT,
    ),
    Claim(
        "So tuned, PRO-B beats KTO",
        "section 5.3: 57.2 against 22.6 %",
        "win rate, PRO-B with alpha 17.5 − KTO",
        difference(WIN, rare(DESIRED, TUNED), rare(DESIRED)),
        above=0.1,
        protocol=ONE_PERCENT,
    ),
    Claim(
        "and is on a par with PRO-B on all labels, or better",
        "section 5.3: 57.2 against 53.4 %",
        "win rate, alpha 17.5 with 1 % desired − alpha 2.5 with all",
        difference(WIN, rare(DESIRED, TUNED), run("pro_b")),
        above=-0.05,
        protocol=ONE_PERCENT,
    ),
    Claim(
        "With 1 % of the undesired ones alpha 2.5 does well",
        "section 5.3, Table 2: 48.9 against 5.6 %",
        "win rate with 1 % undesired − with 1 % desired, alpha 2.5",
        difference(WIN, rare(UNDESIRED, ALPHA), rare(DESIRED, ALPHA)),
        above=0.1,
        protocol=ONE_PERCENT,
    ),
    Claim(
        "as does KTO",
        "section 5.3: 48.3 against 22.6 %",
        "win rate with 1 % undesired − with 1 % desired, KTO",
        difference(WIN, rare(UNDESIRED), rare(DESIRED)),
        above=0.1,
        protocol=ONE_PERCENT,
    ),
    Claim(
        "and a larger alpha changes little",
        "section 5.3, Table 2: 48.9 to 50.6 %",
        "win rate, alpha 10 − alpha 2.5",
        difference(WIN, rare(UNDESIRED, TUNED_UNDESIRED), rare(UNDESIRED, ALPHA)),
        above=-0.05,
        below=0.05,
        protocol=ONE_PERCENT,
    ),
    *(
        Claim(
            f"{name} learns more from four scored responses than from two",
            "section 5.4, Table 3",
            "win rate, four − the best and a random one",
            difference(WIN, scored(objective, 4), scored(objective, 2)),
            above=0.03,
            protocol=GROUPS,
        )
        for name, objective in (("NCA", "nca"), ("PRO-S", "pro_s"))
    ),
    *(
        Claim(
            f"PRO-S is on a par with NCA on {words} responses, or better",
            "section 5.4, Table 3",
            "win rate, PRO-S − NCA",
            difference(WIN, scored("pro_s", count), scored("nca", count)),
            above=-0.05,
            protocol=GROUPS,
        )
        for words, count in (("two", 2), ("four", 4))
    ),
    Claim(
        "PRO leads on AlpacaEval 2, MT-Bench, ARC, IFEval, TruthfulQA and GPQA",
        "section 5.2, Table 1; section 5.4, Table 3",
        untested="needs models of 7 billion parameters, and a judge for the first two",
    ),
    Claim(
        "KTO deteriorates because its sigmoid saturates",
        "appendix E",
        untested="a hypothesis without a number",
    ),
)
