"""The rates, scores and tables of `benchmarks/rounds/`."""

from __future__ import annotations

import math

import pytest

from benchmarks.rounds import demo, real_model
from benchmarks.rounds.demo import ANSWERS, WORST, TrueUtility, difference, outcome
from benchmarks.rounds.real_model import helpful_form
from fastpref.data.synthetic import pure_semantic


def test_a_rate_is_the_mean_probability_by_the_utilities() -> None:
    assert demo.preferred([0.0, math.log(3)], [0.0, 0.0]) == pytest.approx([0.5, 0.75])
    assert outcome([0.0, math.log(3), WORST, WORST], [0.0, 0.0, WORST, WORST]) == pytest.approx(
        {
            "true_preference_rate": (0.5 + 0.75 + 0.5 + 0.5) / 4,
            "mean_utility": (math.log(3) - 10) / 4,
            "other_form": 0.5,
        }
    )


def test_the_error_of_a_difference_is_over_prompts_not_over_answers() -> None:
    offline = [0.5] * (3 * ANSWERS)
    in_rounds = [0.5] * ANSWERS + [0.6] * ANSWERS + [0.7] * ANSWERS
    one = difference(offline, in_rounds)
    assert one == pytest.approx({"value": 0.1, "standard_error": 0.1 / math.sqrt(3)})
    assert not demo._wins({"difference": one})
    assert demo._wins({"difference": {"value": 0.1, "standard_error": 0.049}})


@pytest.mark.parametrize(
    ("points", "text"),
    [
        (1.0, ""),  # no apology
        (2.0, " ".join(["word"] * 20)),
        (3.0, " ".join(["word"] * 60) + ". "),
        (2.5, " ".join(["word"] * 10) + "!"),
        (2.5, " ".join(["word"] * 90) + "?"),
        (2.0, " ".join(["word"] * 19) + " sorry."),
        (2.0, " ".join(["word"] * 300) + "."),
        (2 + 1 / 3, "- one " + " ".join(["word"] * 20)),
        (4.0, "\n".join(f"{n}) " + " ".join(["word"] * 6) for n in range(4)) + "."),
    ],
)
def test_the_form_of_an_answer(points: float, text: str) -> None:
    assert helpful_form(text) == pytest.approx(points)


def test_an_answer_in_another_form_is_worse_than_every_word() -> None:
    scorer = TrueUtility(7)
    noun, words = next(iter(pure_semantic.SETS.items()))
    question, answer = pure_semantic.TEMPLATES[0]
    prompt = f"User: {question.format(noun=noun)}\nAssistant:"
    utilities = pure_semantic.utilities(7)
    right = answer.format(word=words[0])
    assert scorer([prompt] * 2, [right, f"{right}!"]) == [utilities[words[0]], WORST]
    assert min(utilities.values()) > WORST


def test_tables_show_the_better_offline_setting_and_a_minus() -> None:
    row = {"true_preference_rate": 0.7, "mean_utility": 0.84}
    seed = {
        "seed": 20,
        "models": [
            {"method": "start", **row},
            {"method": "offline_dpo", **row, "true_preference_rate": 0.6},
            {"method": "offline_dpo", **row},
            {"method": "rounds", **row, "true_preference_rate": 0.68, "mean_utility": 1.0},
        ],
        "difference": {"value": -0.02, "standard_error": 0.004},
    }
    assert demo.demo_table({"demo": {"seeds": [seed]}}).splitlines()[-1] == (
        "| 20 | 0.700 (0.84) | 0.680 (1.00) | −0.020 ± 0.004 |"
    )
    tried = {"method": "rounds", "lr": 2e-3, "sft_weight": 1.0, "samples": 8, "pairs": "all"}
    tuning = {"settings": [{**tried, "mean": 0.75, "rates": [0.7, 0.8]}]}
    assert demo.tuning_table({"tuning": tuning}).splitlines()[-1] == (
        "| three rounds | 0.002 | 1 | 8, all | 0.750 | 0.700 to 0.800 |"
    )
    measured = {"eval_reward": 2.186, "eval_length": 59.6, "eval_finished": 0.1, "kl_to_start": 0.0}
    lines = [{"round": 0, **measured}, {"round": 1, **measured}]
    assert real_model.model_table({"real_model": {"rounds": lines}}).splitlines()[-2:] == [
        "| start | 2.19 | 60 | 0.10 | 0.0 |",
        "| 1 | 2.19 | 60 | 0.10 | 0.0 |",
    ]
