"""A judge as the scorer of rounds: against a chat server on this machine."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastpref.config import Config, RoundScorer, Training
from fastpref.evaluation.comparisons import Group
from fastpref.rounds import loop, sequence
from fastpref.rounds.artifacts import RoundFiles
from fastpref.rounds.scorers import check_scorer, make_scorer
from fastpref.rounds.scoring import Comparer
from fastpref.training import trainer
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display
from tests.helpers.chat_server import Answer, ChatServer, serving
from tests.helpers.round_runs import config_of


def likes_long(a: str, b: str, count: int) -> Answer:
    label = "C" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
    return Answer(f"[[{label}]]")


def likes_the_first(a: str, b: str, count: int) -> Answer:
    return Answer("[[A]]")


def says_nothing_of_x(a: str, b: str, count: int) -> Answer:
    return Answer("Who knows?") if "x" in (a, b) else likes_long(a, b, count)


def comparer(
    server: ChatServer, folder: Path, notes: list[str] | None = None, **more: Any
) -> Comparer:
    display = Display(Console(quiet=True))
    display.note = (notes if notes is not None else []).append  # type: ignore
    options = RoundScorer(judge={"endpoint": server.url, "model": "judge", "retries": 0, **more})
    scorer = make_scorer(options, Training(output_dir=str(folder)), display)
    assert isinstance(scorer, Comparer)
    return scorer


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serving(likes_long) as one:
        yield one


def nothing() -> None:
    pass


def test_a_score_is_the_mean_preference_over_the_others_in_both_orders(
    server: ChatServer, tmp_path: Path
) -> None:
    scorer = comparer(server, tmp_path)
    chat = [{"role": "user", "content": "r"}]
    groups = [Group("q", ["a", "bbb", "cc", "a"]), Group(chat, ["dd", "e"])]
    assert scorer.compare(groups, nothing) == [[0.5 / 3, 1.0, 2 / 3, 0.5 / 3], [1.0, 0.0]]
    assert len(server.requests) == 2 * (3 + 1)  # equal texts are a tie that nobody is asked about


def test_no_pair_is_asked_about_twice_not_even_by_another_process(
    server: ChatServer, tmp_path: Path
) -> None:
    groups = [Group("q", ["a", "bbb", "cc"])]
    first = comparer(server, tmp_path).compare(groups, nothing)
    assert comparer(server, tmp_path).compare(groups, nothing) == first
    assert max(server.asked.values()) == 1


def test_a_bias_for_the_first_place_cancels(tmp_path: Path) -> None:
    with serving(likes_the_first) as server:
        scores = comparer(server, tmp_path).compare([Group("q", ["a", "bbb", "cc"])], nothing)
    assert scores == [[0.5, 0.5, 0.5]]


def test_held_out_completions_are_compared_with_their_opponents_alone(
    server: ChatServer, tmp_path: Path
) -> None:
    groups = [Group("q", ["aa"], ["a"]), Group("q", ["a"], ["bbb"]), Group("q", ["c"], ["c"])]
    assert comparer(server, tmp_path).compare(groups, nothing) == [[1.0], [0.0], [0.5]]


def test_a_pair_without_a_verdict_does_not_count_and_is_noted(tmp_path: Path) -> None:
    notes: list[str] = []
    with serving(says_nothing_of_x) as server:
        groups = [Group("q", ["a", "x", "bb"]), Group("r", ["a", "bb", "ccc"])]
        scores = comparer(server, tmp_path, notes).compare(groups, nothing)
    assert scores == [[0.5, 0.5, 0.5], [0.0, 0.5, 1.0]]
    assert notes == [
        "note: 2 of 6 pairs have no verdict of the judge and do not count; 1 of 2 prompts have no "
        "scores for this"
    ]


def test_a_judge_that_never_has_a_verdict_ends_the_run(tmp_path: Path) -> None:
    with (
        serving(lambda a, b, count: Answer("Who knows?")) as server,
        pytest.raises(
            UserError,
            match=r"rounds.scorer.judge.template: no answer of judge to 1 pairs has",
        ),
    ):
        comparer(server, tmp_path).compare([Group("q", ["a", "b"])], nothing)


def test_errors_of_the_endpoint_name_the_fields_of_the_config(tmp_path: Path) -> None:
    with (
        serving(lambda a, b, count: Answer("no such model", 404)) as server,
        pytest.raises(
            UserError,
            match=r"rounds.scorer.judge.endpoint: .* refused the question .* no such model",
        ),
    ):
        comparer(server, tmp_path).compare([Group("q", ["a", "b"])], nothing)


def test_what_does_not_change_an_answer_does_not_change_the_fingerprint(
    server: ChatServer, tmp_path: Path
) -> None:
    same = comparer(server, tmp_path).fingerprint
    assert comparer(server, tmp_path, workers=2, timeout=5.0).fingerprint == same
    assert comparer(server, tmp_path, temperature=0.5).fingerprint != same
    assert comparer(server, tmp_path, body={"top_p": 0.9}).fingerprint != same


def test_rounds_with_a_judge_are_killed_and_ask_nothing_again(
    server: ChatServer, tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(
        tiny_llama,
        tmp_path,
        resume="auto",
        data={"eval": str(tmp_path / "prompts.jsonl")},
        rounds={"scorer": {"judge": {"endpoint": server.url, "model": "judge"}}, "pairs": "all"},
    )

    def dies(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Trainer, "_train_step", dies)
        loop.run(config, Display(Console(quiet=True)))
    loop.run(config, Display(Console(quiet=True)))
    # Each start asks a question of its own, about no replies.
    assert server.asked.pop(("", "")) == 2 and max(server.asked.values()) == 1
    records = [json.loads(line) for line in (tmp_path / "run" / sequence.FILE).open()]
    assert records[0]["eval_reward"] == 0.5
    assert records[2]["eval_win_rate"] == records[2]["eval_reward"]
    (path,) = RoundFiles(tmp_path / "run", 1).path("scores", "").parent.glob("scores-*.jsonl")
    for line in path.open():
        row = json.loads(line)
        lengths = [len(text) for text in row["completions"]]
        assert row["scores"] == [
            sum((mine > other) + 0.5 * (mine == other) for other in lengths[:k] + lengths[k + 1 :])
            / (len(lengths) - 1)
            for k, mine in enumerate(lengths)
        ]


def test_a_scorer_has_one_source() -> None:
    with pytest.raises(ValueError, match="set one of reward_model, function and judge"):
        RoundScorer(function="a:b", judge={"endpoint": "http://x/v1", "model": "m"})


def refused_at_the_start(config: Config, monkeypatch: pytest.MonkeyPatch) -> str:
    """Error of a run that must end before it loads the policy."""

    def loads(*arguments: Any) -> None:
        raise AssertionError("the policy is loaded")

    monkeypatch.setattr(loop, "Session", loads)
    with pytest.raises(UserError) as caught:
        loop.run(config, Display(Console(quiet=True)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Answer("who are you?", 401), "refused the key (HTTP 401: who are you?); name the "
         "environment variable that holds it with rounds.scorer.judge.api_key_env"),
        (Answer("no such model", 404), "refused the question of a test (HTTP 404: no such model); "
         "fix rounds.scorer.judge.endpoint, rounds.scorer.judge.model or "
         "rounds.scorer.judge.body, or leave the prompt out"),
        (Answer("busy", 503), "failed 1 times (HTTP 503: busy); check that it works, then run the "
         "same command again, it continues"),
    ],
)  # fmt: skip
def test_a_judge_that_cannot_answer_is_refused_before_the_policy_is_loaded(
    answer: Answer, says: str, tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(lambda a, b, count: answer) as server:
        judge = {"endpoint": server.url, "model": "judge", "retries": 0}
        config = config_of(tiny_llama, tmp_path, rounds={"scorer": {"judge": judge}})
        error = refused_at_the_start(config, monkeypatch)
    assert error == f"rounds.scorer.judge.endpoint: {server.url}/chat/completions {says}"
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("scorer", "says"),
    [
        ({"judge": {"endpoint": "http://127.0.0.1:9/v1", "model": "judge", "retries": 0}},
         "rounds.scorer.judge.endpoint: http://127.0.0.1:9/v1/chat/completions failed 1 times "
         "([Errno 111] Connection refused); check"),
        ({"judge": {"endpoint": "http://a/v1", "model": "judge", "api_key_env": "NO_SUCH_KEY"}},
         "rounds.scorer.judge.api_key_env: the environment variable NO_SUCH_KEY is not set; set"),
        ({"judge": {"endpoint": "http://a/v1", "model": "judge", "template": "nowhere.txt"}},
         "rounds.scorer.judge.template: cannot read nowhere.txt ("),
        ({"judge": {"endpoint": "http://a/v1", "model": "judge", "body": {"stream": True}}},
         "rounds.scorer.judge.body: expected FIELD=VALUE such as top_p=0.9, with a field other th"),
        ({"function": "nowhere:f"}, "rounds.scorer.function: cannot import nowhere:f: No module "),
        ({"reward_model": "./nowhere"}, "rounds.scorer.reward_model: cannot load ./nowhere: no s"),
    ],
)  # fmt: skip
def test_a_scorer_that_cannot_work_is_refused_before_the_policy_is_loaded(
    scorer: dict[str, Any], says: str, tiny_llama: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = config_of(tiny_llama, tmp_path, rounds={"scorer": scorer})
    assert refused_at_the_start(config, monkeypatch).startswith(says)


def test_a_judge_that_is_busy_at_the_start_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.0)  # of the waits
    notes: list[str] = []
    display = Display(Console(quiet=True))
    display.note = notes.append  # type: ignore
    answers = [Answer("busy", 503), Answer("busy", 503), Answer("ready")]
    with serving(lambda a, b, count: answers[count - 1]) as server:
        judge = {"endpoint": server.url, "model": "judge", "max_tokens": 64, "body": {"top_p": 0.5}}
        check_scorer(RoundScorer(judge=judge), display)
    assert notes == ["judge: HTTP 503: busy; trying again"] * 2
    (question,) = {json.dumps(request) for request in server.requests}
    options = json.loads(question)
    assert len(options["messages"][0]["content"]) < 80
    assert options["max_tokens"] == 64 and options["top_p"] == 0.5
