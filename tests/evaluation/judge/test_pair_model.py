"""Models that compare two answers, in the layout of PairRM."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from transformers import PreTrainedTokenizerFast

from fastpref.config import RoundScorer, Training
from fastpref.evaluation.comparisons import Group
from fastpref.evaluation.judge import pair_model
from fastpref.evaluation.judge.answers import Question
from fastpref.evaluation.judge.cache import open_cache
from fastpref.evaluation.judge.options import RewardOptions
from fastpref.evaluation.judge.pair_model import PairModel
from fastpref.evaluation.judge.pairs import Pair
from fastpref.rounds.scorers import make_scorer
from fastpref.rounds.scoring import Comparer
from fastpref.utils.errors import ModelError, UserError
from fastpref.utils.progress import Display
from tests.helpers.data import write_jsonl
from tests.helpers.pair_models import plain_logit, write_pair_model

Command = Callable[..., CompletedProcess[str]]
TEXTS = ["yes", "no, never, not at all", "tea"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    return write_pair_model(tmp_path_factory.mktemp("pairs") / "model", tokenizer)


def question(prompt: object = "tea?", text: str = "tea?") -> Question:
    return Question(1, prompt, text, None, None, None)


def preference(source: str, a: str, b: str) -> float:
    """Probability that `a` is better, of the mean log-odds over both orders."""
    logit = (plain_logit(source, "tea?", a, b) - plain_logit(source, "tea?", b, a)) / 2
    return 1 / (1 + math.exp(-logit))


def test_log_odds_are_those_of_the_published_layout_in_any_batch(source: str) -> None:
    model = PairModel(source, "cpu")
    orders = list(permutations(TEXTS, 2))
    message = [{"role": "user", "content": "tea?"}]
    prompts = ["tea?", message] * 3
    encoded = [model.encode(question(p), *order) for p, order in zip(prompts, orders, strict=True)]
    expected = [plain_logit(source, "tea?", *order) for order in orders]
    assert model.logits(encoded) == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, expected)) > 0.1
    assert abs(expected[0] + expected[2]) > 1e-2  # the order matters, so both are asked


def test_a_verdict_is_of_both_orders_and_is_computed_once(
    source: str, tmp_path: Path, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [Pair(question(), 0, a, b) for a, b in ((*TEXTS[:2],), ("x", "x"))]
    sharp = RewardOptions(source, device="cpu").build()
    soft = RewardOptions(source, device="cpu", bradley_terry=True).build()
    with open_cache(tmp_path / "answers.jsonl") as cache:
        first, tie = soft.judge(pairs, cache, display)
        assert len(cache.records) == 2
        monkeypatch.setattr(PairModel, "logits", None)  # a call would fail
        again = sharp.judge(pairs, cache, display)[0]
    expected = preference(source, *TEXTS[:2])
    assert first.preference == pytest.approx(expected, abs=1e-5) and tie.preference == 0.5
    assert again.preference == float(expected > 0.5) and again.games == first.games
    logit = plain_logit(source, "tea?", TEXTS[1], TEXTS[0])
    assert first.games[0].label == ("A>B" if logit > 0 else "B>A")


def test_scores_of_files_and_of_rounds_are_mean_preferences(
    fastpref: Command, source: str, tmp_path: Path, display: Display
) -> None:
    data = write_jsonl(
        tmp_path / "d.jsonl",
        [
            {"prompt": "tea?", "completions": TEXTS},
            {"prompt": "tea?", "chosen": "yes", "rejected": "tea"},
        ],
    )
    done = fastpref("score", source, "--data", str(data), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    group, pair = map(json.loads, done.stdout.splitlines())
    expected = [
        sum(preference(source, text, other) for other in TEXTS if other != text) / 2
        for text in TEXTS
    ]
    assert group["scores"] == pytest.approx(expected, abs=1e-5)
    assert pair["chosen_score"] == pytest.approx(preference(source, "yes", "tea"), abs=1e-5)
    assert pair["rejected_score"] == 1 - pair["chosen_score"]
    options = RoundScorer(reward_model=source)
    scorer = make_scorer(options, Training(output_dir=str(tmp_path), device="cpu"), display)
    assert isinstance(scorer, Comparer)
    assert scorer.compare([Group("tea?", TEXTS)], lambda: None) == [group["scores"]]
    assert (tmp_path / "rounds/answers.jsonl").exists()
    pairs = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "tea?", "chosen": "a", "rejected": "b"}])
    done = fastpref("eval", source, "--data", str(pairs), "--out", str(tmp_path / "eval.json"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["accuracy"] == float(preference(source, "a", "b") > 0.5)
    write_jsonl(tmp_path / "one.jsonl", [{"prompt": "tea?", "completion": "yes"}])
    done = fastpref("score", source, "--data", str(tmp_path / "one.jsonl"))
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith(
        "row 1: a model that compares needs 2 responses of a prompt, got 1; use one that scores a "
        "response"
    )


def test_long_texts_are_cut_as_published_with_a_note(
    source: str, tmp_path: Path, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(display, "note", notes.append)
    monkeypatch.setattr(pair_model, "SOURCE_TOKENS", 6)
    monkeypatch.setattr(pair_model, "ALL_TOKENS", 21)
    model = PairModel(source, "cpu")
    whole = model.encode(question("a"), "b", "c")
    cut = model.encode(question("a b c d e f g h"), "b c d e f g h i j k", "c")
    source_place, first, second = cut.places
    assert (whole.is_cut, cut.is_cut) == (False, True)
    assert (first - source_place, second - first) == (6, 7)  # (21 - 6) // 2 for each answer
    long = [Pair(question("a b c d e f g h"), 0, "b c d e f g h i j k", "c")]
    with open_cache(tmp_path / "answers.jsonl") as cache:
        for _ in range(2):
            pair_model.PairJudge(model).judge(long, cache, display)
    assert notes == [
        "note: comparisons of more than 21 tokens are cut, prompts at 6 and answers at half of the "
        "rest"
    ]


@pytest.mark.parametrize(
    ("prompt", "answer", "says"),
    [
        (
            [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "a",
            "has 2 messages, and ",
        ),
        ("tea?", "a <|candidate2|> b", "has <|candidate2|> in its text, which "),
    ],
)
def test_texts_that_the_layout_has_no_place_for(
    source: str, prompt: object, answer: str, says: str
) -> None:
    with pytest.raises(UserError) as caught:
        PairModel(source, "cpu").encode(question(prompt), answer, "b")
    assert says in str(caught.value)


def test_models_of_another_layout(
    source: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    own = write_pair_model(tmp_path / "own", tokenizer, ranker_type="pairranker")
    wrong = write_pair_model(tmp_path / "wrong", tokenizer, cand2_prefix_id=3)
    other = write_pair_model(tmp_path / "other", tokenizer, architectures=["OtherPairRM"])
    headless = write_pair_model(tmp_path / "headless", tokenizer)
    from safetensors.torch import load_file, save_file

    weights = load_file(f"{headless}/model.safetensors")
    weights.pop("head_layer.4.bias")
    save_file(weights, f"{headless}/model.safetensors", {"format": "pt"})
    for folder, says in (
        (own, "is a ranker in llm-blender's own layout; use one in the layout of transformers"),
        (wrong, "has no token <|candidate2|> with the id of its config, 3; use the tokenizer"),
        (other, "compares answers in an unknown layout, OtherPairRM; use one of DebertaV2PairRM"),
        (headless, "has no weights named head_layer.4.bias, which would be random; use a trained"),
    ):
        with pytest.raises(ModelError, match="--reward-model: ") as caught:
            RewardOptions(folder, device="cpu").build()
        assert says in str(caught.value), says
