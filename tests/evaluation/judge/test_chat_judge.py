"""A chat model as judge, through the command line and a server on this machine."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.helpers.chat_server import Answer, ChatServer, serving
from tests.helpers.data import write_jsonl

Command = Callable[..., CompletedProcess[str]]
COUNT = 12


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Answers of `new`, whose k-th has k + 1 words, and of `old`, whose answers have six."""
    new = [{"prompt": f"q{k}", "completion": f"new {k}" + " n" * k} for k in range(COUNT)]
    old = [
        {"prompt": f"q{k}", "completion": f"old {k}" + " o" * 6, "generator": "old"}
        for k in range(COUNT)
    ]
    a, b = write_jsonl(tmp_path / "new.jsonl", new), write_jsonl(tmp_path / "b.jsonl", old)
    return str(a), str(b)


def likes_new(a: str, b: str, count: int) -> Answer:
    return Answer("[[A]]" if a.startswith("new") else "[[B]]")


def likes_long(a: str, b: str, count: int) -> Answer:
    label = "C" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
    return Answer(f"Longer. [[{label}]]")


def judge(
    fastpref: Command, files: tuple[str, str], server: ChatServer, out: Path, *more: str
) -> CompletedProcess[str]:
    options = ("--endpoint", server.url, "--model", "gpt-test", "--out", str(out))
    return fastpref("judge", *files, *options, *more)


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "judge.json").read_text())  # type: ignore[no-any-return]


def annotations(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "annotations.json").read_text())  # type: ignore[no-any-return]


def test_a_judge_with_a_favorite_gives_it_every_pair(
    fastpref: Command, files: tuple[str, str], tmp_path: Path
) -> None:
    with serving(likes_new) as server:
        done = judge(fastpref, files, server, tmp_path / "out", "--workers", "3")
        assert done.returncode == 0, done.stderr
        assert server.asked.total() == 2 * COUNT
    numbers = result(tmp_path / "out")
    assert (numbers["win_rate"], numbers["standard_error"]) == (1.0, 0.0)
    assert (numbers["wins"], numbers["ties"], numbers["losses"]) == (COUNT, 0, 0)
    assert (numbers["consistency"], numbers["first_shown"]) == (1.0, 0.5)
    assert "new against old, 12 prompts" in done.stdout and "100.00 %" in done.stdout


def test_a_judge_that_likes_a_position_gives_half(
    fastpref: Command, files: tuple[str, str], tmp_path: Path
) -> None:
    with serving(lambda a, b, count: Answer("[[A]]")) as server:
        judge(fastpref, files, server, tmp_path / "out")
    numbers = result(tmp_path / "out")
    assert (numbers["win_rate"], numbers["standard_error"]) == (0.5, 0.0)
    assert numbers["length_controlled"]["win_rate"] == pytest.approx(0.5)
    assert (numbers["ties"], numbers["consistency"], numbers["first_shown"]) == (COUNT, 0.0, 1.0)


def test_every_pair_is_asked_in_both_orders_with_the_settings(
    fastpref: Command, files: tuple[str, str], tmp_path: Path
) -> None:
    options = ("--temperature", "0.5", "--body", "max_tokens=null", "--body", "top_p=0.9")
    with serving(likes_new) as server:
        judge(fastpref, files, server, tmp_path / "out", *options, "--body", "effort=low")
        assert set(server.asked.values()) == {1}
        assert {(b, a) for a, b in server.asked} == set(server.asked)
        fields = server.requests[0]
    del fields["messages"]
    assert fields == {
        "model": "gpt-test",
        "temperature": 0.5,
        "seed": 0,
        "top_p": 0.9,
        "effort": "low",
    }


def test_the_files_have_the_forms_of_alpaca_eval_and_arena_hard(
    fastpref: Command, files: tuple[str, str], tmp_path: Path
) -> None:
    with serving(likes_long) as server:
        judge(fastpref, files, server, tmp_path / "out")
    rows = annotations(tmp_path / "out")
    assert rows[8] == {
        "instruction": "q8",
        "output_1": "old 8 o o o o o o",
        "generator_1": "old",
        "output_2": "new 8 n n n n n n n n",
        "generator_2": "new",
        "annotator": "gpt-test",
        "preference": 2.0,
    }
    # Six extra words are a tie; more win, fewer lose.
    preferences = [1.0] * 6 + [1.5] + [2.0] * 3
    assert [row["preference"] for row in rows][:10] == preferences
    with (tmp_path / "out" / "leaderboard.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row[""] == "new" and row["mode"] == "community"
    assert (row["n_wins"], row["n_wins_base"], row["n_draws"], row["n_total"]) == (
        "5",
        "6",
        "1",
        "12",
    )
    assert float(row["win_rate"]) == pytest.approx(100 * 5.5 / 12)
    assert float(row["discrete_win_rate"]) == pytest.approx(100 * 5.5 / 12)
    assert list(row)[-2:] == ["length_controlled_winrate", "lc_standard_error"]
    lines = (tmp_path / "out" / "arena-hard.jsonl").read_text().splitlines()
    games = [json.loads(line) for line in lines]
    assert games[0]["question_id"] == games[0]["uid"] and len(games) == COUNT
    assert (games[0]["model"], games[0]["baseline"]) == ("new", "old")
    # Assistant A is the baseline in the first game, and the model in the second.
    scores = [[game["score"] for game in line["games"]] for line in games]
    assert scores[0] == ["A>B", "B>A"] and scores[6] == ["A=B", "A=B"]
    assert scores[8] == ["B>A", "A>B"]
    assert games[0]["games"][0]["judgment"] == {"answer": "Longer. [[A]]"}


def test_answers_without_a_verdict_are_counted_and_not_guessed(
    fastpref: Command, files: tuple[str, str], tmp_path: Path
) -> None:
    def rule(a: str, b: str, count: int) -> Answer:
        if a.startswith("new 3"):
            return Answer("Hard to say.")
        if b.startswith("new 5") or a.startswith("new 5"):
            return Answer("Both [[A]] and [[B]] have merits.")
        if a.startswith("old 7"):
            return Answer("[[B]]", finish_reason="length")
        return likes_new(a, b, count)

    with serving(rule) as server:
        done = judge(fastpref, files, server, tmp_path / "out")
        assert set(server.asked.values()) == {1}
    numbers = result(tmp_path / "out")
    assert (numbers["unparsable"], numbers["unjudged"], numbers["wins"]) == (4, 3, COUNT - 3)
    assert (numbers["prompts"], numbers["pairs"]) == (COUNT - 3, COUNT)
    assert [row["preference"] for row in annotations(tmp_path / "out")].count(None) == 3
    assert "pairs without a verdict" in done.stdout
    games = (tmp_path / "out" / "arena-hard.jsonl").read_text().splitlines()[3]
    assert [game["score"] for game in json.loads(games)["games"]] == ["B>A", None]


def test_a_judge_that_never_decides_is_refused(
    fastpref: Command, files: tuple[str, str], tmp_path: Path
) -> None:
    with serving(lambda a, b, count: Answer("Hm.")) as server:
        done = judge(fastpref, files, server, tmp_path / "out")
    assert done.returncode == 2
    assert (
        "error: no pair has a verdict in both orders, 24 answers of the judge have" in done.stderr
    )
    assert not (tmp_path / "out" / "judge.json").exists()


def test_identical_answers_are_ties_that_nobody_is_asked_about(
    fastpref: Command, tmp_path: Path
) -> None:
    rows = [{"prompt": f"q{k}", "output": f"new {k}"} for k in range(3)]
    other = [*rows[:2], {"prompt": "q2", "output": "old"}]
    files = (
        str(write_jsonl(tmp_path / "a.jsonl", rows)),
        str(write_jsonl(tmp_path / "b.jsonl", other)),
    )
    with serving(likes_new) as server:
        judge(fastpref, files, server, tmp_path / "out")
        assert server.asked.total() == 2
    numbers = result(tmp_path / "out")
    assert (numbers["identical"], numbers["ties"], numbers["wins"]) == (2, 2, 1)
    assert numbers["win_rate"] == pytest.approx(2 / 3)
    assert numbers["consistency"] == 1.0


def test_the_standard_error_is_over_prompts(fastpref: Command, tmp_path: Path) -> None:
    """Two samples of each of three prompts: means 1, 0.5 and 0; s = 0.5, by √3."""
    new = [{"prompt": f"q{k // 2}", "output": f"new {k}"} for k in range(6)]
    old = [{"prompt": f"q{k // 2}", "output": f"old {k}"} for k in range(6)]
    files = (
        str(write_jsonl(tmp_path / "a.jsonl", new)),
        str(write_jsonl(tmp_path / "b.jsonl", old)),
    )

    def rule(a: str, b: str, count: int) -> Answer:
        prefers_new = int(a.split()[1]) < 3
        return likes_new(a, b, count) if prefers_new else likes_new(b, a, count)

    with serving(rule) as server:
        judge(fastpref, files, server, tmp_path / "out")
    numbers = result(tmp_path / "out")
    assert (numbers["prompts"], numbers["pairs"], numbers["win_rate"]) == (3, 6, 0.5)
    assert numbers["standard_error"] == pytest.approx(0.5 / 3**0.5)


def test_a_second_run_asks_nothing_and_has_the_same_files(
    fastpref: Command, files: tuple[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with serving(likes_long) as server:
        judge(fastpref, files, server, out)
        first = {path.name: path.read_bytes() for path in out.iterdir()}
        assert judge(fastpref, files, server, out).returncode == 0
        assert server.asked.total() == 2 * COUNT
        assert {path.name: path.read_bytes() for path in out.iterdir()} == first
        # The other way around, all answers are known too: only the names change places.
        cache = ("--cache", str(out / "answers.jsonl"))
        judge(fastpref, files[::-1], server, tmp_path / "back", *cache)
        assert server.asked.total() == 2 * COUNT
    assert result(tmp_path / "back")["win_rate"] == pytest.approx(1 - result(out)["win_rate"])


@pytest.mark.parametrize("change", ["--seed 1", "--max-tokens 9", "--template t.txt", "model"])
def test_another_question_is_asked_again(
    fastpref: Command, files: tuple[str, str], tmp_path: Path, change: str
) -> None:
    template = tmp_path / "t.txt"
    template.write_text(
        "{prompt}\n<reply_a>\n{answer_a}\n</reply_a>\n\n<reply_b>\n{answer_b}\n</reply_b>"
    )
    options = [str(template) if word == "t.txt" else word for word in change.split()]
    cache = ("--cache", str(tmp_path / "cache.jsonl"), "--limit", "2")
    with serving(likes_new) as server:
        judge(fastpref, files, server, tmp_path / "one", *cache)
        assert server.asked.total() == 4
        options = ["--model", "other"] if change == "model" else options
        judge(fastpref, files, server, tmp_path / "two", *cache, *options)
        assert server.asked.total() == 8


def test_results_of_other_answers_are_not_overwritten(
    fastpref: Command, files: tuple[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with serving(likes_new) as server:
        judge(fastpref, files, server, out, "--limit", "3")
        before = (out / "judge.json").read_bytes()
        done = judge(fastpref, files, server, out)
        assert done.returncode == 2 and server.asked.total() == 6
    assert "out holds results of other answers or another judge; choose another f" in done.stderr
    assert (out / "judge.json").read_bytes() == before


def test_failures_that_pass_change_no_number(
    fastpref: Command, files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastpref.evaluation.judge.endpoint.LONGEST_WAIT", 0.01)

    def rule(a: str, b: str, count: int) -> Answer:
        statuses = {1: 429, 2: 500, 3: 503}
        return Answer("no", statuses[count]) if count <= 3 else likes_long(a, b, count)

    with serving(rule) as server:
        done = judge(fastpref, files, server, tmp_path / "flaky")
        assert set(server.asked.values()) == {4}
        assert done.stdout.count("trying again") == 3
    with serving(likes_long) as server:
        judge(fastpref, files, server, tmp_path / "steady")
    assert annotations(tmp_path / "flaky") == annotations(tmp_path / "steady")


def test_answers_under_way_are_kept_when_a_question_is_refused(
    fastpref: Command, files: tuple[str, str], tmp_path: Path
) -> None:
    refuse = threading.Event()

    def rule(a: str, b: str, count: int) -> Answer:
        if "new 0" in a:
            return Answer("too long", 400) if not refuse.is_set() else likes_new(a, b, count)
        return Answer(likes_new(a, b, count).text, seconds=0.3)

    out = tmp_path / "out"
    with serving(rule) as server:
        done = judge(fastpref, files, server, out, "--workers", "4")
        assert done.returncode == 2
        assert "refused the question of row 1 (q0) (HTTP 400: too long); fix" in done.stderr
        kept = len((out / "answers.jsonl").read_text().splitlines())
        assert 1 <= kept == server.asked.total() - 1 < 6
        refuse.set()
        assert judge(fastpref, files, server, out).returncode == 0
        assert server.asked.total() == 2 * COUNT + 1
    assert result(out)["win_rate"] == 1.0


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    fastpref: Command, files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-123")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    with serving(likes_new) as server:
        judge(fastpref, files, server, tmp_path / "out", "--api-key-env", "JUDGE_KEY")
        assert {each["Authorization"] for each in server.headers} == {"Bearer sk-123"}
        assert all(b"sk-123" not in path.read_bytes() for path in (tmp_path / "out").iterdir())
        server.headers.clear()
        judge(fastpref, files, server, tmp_path / "none")
        assert not any("Authorization" in each for each in server.headers)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_slow_disk_delays_the_next_question(
    fastpref: Command,
    files: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    out = tmp_path / "out"
    unsaved: list[int] = []

    def rule(a: str, b: str, count: int) -> Answer:
        with lock:
            path = out / "answers.jsonl"
            unsaved.append(server.asked.total() - len(path.read_text().splitlines()))
        return likes_long(a, b, count)

    def write(descriptor: int, data: bytes, write: Callable[[int, bytes], int] = os.write) -> int:
        if data.startswith(b'{"key"'):
            time.sleep(0.1)
        return write(descriptor, data)

    lock = threading.Lock()
    monkeypatch.setattr(os, "write", write)
    with serving(rule) as server:
        assert judge(fastpref, files, server, out, "--workers", str(workers)).returncode == 0
    assert max(unsaved) <= workers


def start(files: tuple[str, str], server: ChatServer, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastpref", "judge", *files, "--endpoint", server.url]
    command += ["--model", "gpt-test", "--out", str(out), "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_and_asks_no_answered_question_again(
    fastpref: Command, files: tuple[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    reached, killed = threading.Event(), threading.Event()

    def rule(a: str, b: str, count: int) -> Answer:
        # The process is killed while it waits for the eighth answer.
        if server.asked.total() == 8 and not killed.is_set():
            reached.set()
            killed.wait(60)
        return likes_long(a, b, count)

    out = tmp_path / "out"
    with serving(rule) as server:
        process = start(files, server, out)
        assert reached.wait(120)
        locked = judge(fastpref, files, server, out)
        assert locked.returncode == 2 and "answers.jsonl is in use by another pr" in locked.stderr
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        killed.set()
        assert process.returncode == (130 if number == signal.SIGINT else -number)
        assert "Traceback" not in errors
        assert len((out / "answers.jsonl").read_text().splitlines()) == 7
        time.sleep(0.05)
        assert judge(fastpref, files, server, out).returncode == 0
        # Only the question without an answer was asked twice.
        assert sorted(server.asked.values()) == [1] * (2 * COUNT - 1) + [2]
    with serving(likes_long) as server:
        judge(fastpref, files, server, tmp_path / "whole")
    for name in ("annotations.json", "leaderboard.csv", "arena-hard.jsonl", "judge.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
