"""Whole runs of rounds: files, kills, objectives, servers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.faults.rounds import compare
from fastpref import metrics
from fastpref.rounds import artifacts, sequence
from fastpref.training import trainer
from fastpref.utils.errors import UserError
from tests.helpers import sglang_server
from tests.helpers.completion_server import serving
from tests.helpers.round_runs import Letters, config_of, play


class Killed(BaseException):
    """The process ends here."""


def killed_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, count: int) -> None:
    """Let a function raise at its n-th call."""
    function, calls = getattr(owner, name), 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            raise Killed
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)


def test_a_run_that_is_killed_three_times_makes_the_same_files_and_bits(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = {"eval": str(tmp_path / "prompts.jsonl")}
    whole = config_of(tiny_llama, tmp_path, "whole", data=held_out)
    play(whole)
    places: list[tuple[Any, str, int]] = [
        (artifacts.Shards, "append", 3),  # in the samples of the first round
        (trainer.Trainer, "_train_step", 2),  # within the first round
        (sequence, "score", 3),  # after the samples of the second
    ]
    for owner, name, count in places:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(patch, owner, name, count)
            play(config_of(tiny_llama, tmp_path, "killed", data=held_out, resume="auto"))
    play(config_of(tiny_llama, tmp_path, "killed", data=held_out, resume="auto"))
    assert compare(tmp_path / "killed", tmp_path / "whole") == []
    names = {path.name.rpartition("-")[0] for path in (tmp_path / "whole/rounds/0001").iterdir()}
    assert names == {
        "prompts", "samples", "scores", "pairs", "left-out", "reference", "eval-samples",
        "eval-scores",
    }  # fmt: skip


def test_the_records_and_the_pairs_of_the_rounds(tiny_llama: str, tmp_path: Path) -> None:
    held_out = {"eval": str(tmp_path / "prompts.jsonl")}
    play(config_of(tiny_llama, tmp_path, data=held_out, optim={"lr": 3e-2}))
    records = metrics.read_records(tmp_path / "run" / sequence.FILE)
    assert [(record["round"], record["step"]) for record in records] == [(0, 0), (1, 2), (2, 4)]
    assert records[0]["kl_to_start"] == 0.0 and "eval_win_rate" not in records[0]
    assert records[2]["kl_to_start"] > 0.0
    scores = {
        number: [row["scores"][0] for row in rows_of(tmp_path, number, "eval-scores")]
        for number in (0, 2)
    }
    wins = [
        float(new > old) + 0.5 * (new == old) for old, new in zip(*scores.values(), strict=True)
    ]
    assert records[2]["eval_win_rate"] == pytest.approx(sum(wins) / len(wins))
    assert records[2]["eval_reward"] == pytest.approx(sum(scores[2]) / len(wins))
    lines = metrics.read_records(tmp_path / "run/metrics.jsonl")
    # The reference of a round is the policy at its start, to the last bit.
    assert [line["rewards/margins"] for line in lines if line["step"] in (1, 3)] == [0.0, 0.0]
    samples, pairs = (rows_of(tmp_path, 2, kind) for kind in ("samples", "pairs"))
    assert records[2]["pairs"] == len(pairs) == 6 - records[2]["without_pair"]
    for pair, values in ((p, rows_of(tmp_path, 2, "scores")[p["group"]]["scores"]) for p in pairs):
        chosen, rejected = pair["samples"]
        assert values[chosen] == max(values) > min(values) == values[rejected]
        texts = samples[pair["group"]]["completions"]
        assert (texts[chosen], texts[rejected]) == (pair["chosen"], pair["rejected"])


def rows_of(home: Path, number: int, kind: str) -> list[dict[str, Any]]:
    path = next((home / "run/rounds" / f"{number:04d}").glob(f"{kind}-[0-9a-f]*"))
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "sections",
    [
        {"loss": {"name": "kto"}, "adapter": {"r": 2}},
        {"loss": {"name": "info_nca"}, "optim": {"lr": 1e-3}},
        {"loss": {"name": "gspo", "epsilon": 0.2, "epsilon_high": 0.2}, "optim": {"lr": 1e-3}},
        {"loss": {"name": "tdpo2"}, "adapter": {"r": 2}},
    ],
    ids=lambda sections: str(sections["loss"]["name"]),
)
def test_objectives_of_all_kinds(tiny_llama: str, tmp_path: Path, sections: dict[str, Any]) -> None:
    torch.manual_seed(0)
    folder = play(config_of(tiny_llama, tmp_path, **sections))
    assert (folder / "config.json").is_file()
    lines = metrics.read_records(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["grad_norm"] > 0 for line in lines)


def test_servers_get_the_adapter_of_each_round(tiny_llama: str, tmp_path: Path) -> None:
    def complete(prompt: list[int], seed: int) -> list[int]:
        draw = random.Random(f"{prompt} {seed}")
        return [draw.randrange(10, 300) for _ in range(5)]

    with serving(complete) as first, serving(complete) as second:
        rounds = config_of(tiny_llama, tmp_path).rounds
        assert rounds is not None
        values = rounds.model_dump(mode="json", exclude_unset=True)
        values["sampling"] |= {"engine": "server", "servers": [first.url, second.url]}
        play(config_of(tiny_llama, tmp_path, rounds=values, adapter={"r": 2, "merge": False}))
        requests = [*first.requests, *second.requests]
        assert len(first.loaded) == len(second.loaded) == 2
    assert len(requests) == 2 * 6 * 3
    names = [name for name, _ in first.loaded]
    assert {body["model"] for body in requests} == set(names) and len(set(names)) == 2
    assert first.unloaded == names[:1]
    assert requests[0]["return_token_ids"] is True and requests[0]["max_tokens"] == 5
    samples = next((tmp_path / "run/rounds/0001").glob("samples-*")).read_text().splitlines()
    asked = {tuple(body["prompt"]): body for body in requests}
    for row in map(json.loads, samples):
        assert tuple(row["prompt_tokens"]) in asked


def test_sglang_gets_the_full_weights_of_each_round(tiny_llama: str, tmp_path: Path) -> None:
    def complete(prompt: list[int], seed: int) -> list[int]:
        draw = random.Random(f"{prompt} {seed}")
        return [draw.randrange(10, 300) for _ in range(5)]

    with sglang_server.serving(complete) as one:
        rounds = config_of(tiny_llama, tmp_path).rounds
        assert rounds is not None
        values = rounds.model_dump(mode="json", exclude_unset=True)
        values["sampling"] |= {"engine": "server", "protocol": "sglang", "servers": [one.url]}
        play(config_of(tiny_llama, tmp_path, rounds=values))
    assert len(one.requests) == 2 * 6 * 3 and "lora_path" not in one.requests[0]
    assert len({name for name, _ in one.updates}) == len(one.updates) == 2
    assert all({"config.json", "model.safetensors"} <= set(files) for _, files in one.updates)
    rows = next((tmp_path / "run/rounds/0002").glob("samples-*")).read_text().splitlines()
    for row in map(json.loads, rows):
        asked = [each for each in one.requests if each["input_ids"] == row["prompt_tokens"]]
        drawn = [complete(r["input_ids"], r["sampling_params"]["sampling_seed"]) for r in asked]
        assert all(tokens in drawn for tokens in row["tokens"])


def test_a_scorer_without_preferences_ends_the_run(tiny_llama: str, tmp_path: Path) -> None:
    from rich.console import Console

    from fastpref.rounds import loop
    from fastpref.utils.progress import Display

    class Constant(Letters):
        def __call__(self, prompts: Any, completions: Any) -> list[float]:
            return [1.0 for _ in completions]

    with pytest.raises(UserError) as caught:
        loop.run(config_of(tiny_llama, tmp_path), Display(Console(quiet=True)), scorer=Constant)
    assert str(caught.value) == (
        "rounds: no prompt of round 1 gives a pair (equal scores: 6); use another scorer, more "
        "samples or a higher temperature"
    )


def test_log_probs_of_another_dtype_are_not_the_reference(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed before its first step, and goes on with another option."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, trainer.Trainer, "_train_step", 1)
        play(config_of(tiny_llama, tmp_path))
    play(config_of(tiny_llama, tmp_path, model={"path": tiny_llama, "dtype": "float64"}))
    assert len(list((tmp_path / "run/rounds/0001").glob("reference-*.safetensors"))) == 2
    assert metrics.read_records(tmp_path / "run/metrics.jsonl")[0]["rewards/margins"] == 0.0


def test_what_cannot_be_made_again_is_missed(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, trainer.Trainer, "_train_step", 2)
        play(config_of(tiny_llama, tmp_path))
    resumed: Callable[..., Any] = lambda **sections: play(  # noqa: E731
        config_of(tiny_llama, tmp_path, resume="auto", **sections)
    )
    with pytest.raises(UserError, match=r"the rounds in .* began with other settings .*optim.lr"):
        resumed(optim={"lr": 2e-2})
    samples = next((tmp_path / "run/rounds/0001").glob("samples-*"))
    content = samples.read_text()
    samples.write_text(content[:-9])
    with pytest.raises(UserError, match="is damaged; remove it, and the run makes it again if the"):
        resumed()
    samples.unlink()
    with pytest.raises(UserError, match="is missing, and the weights that it was made with have"):
        resumed()
    samples.write_text(content)
    reference = next((tmp_path / "run/rounds/0001").glob("reference-*"))
    logps = reference.read_bytes()
    reference.write_bytes(logps[:-1] + bytes([logps[-1] ^ 1]))
    with pytest.raises(UserError, match="is damaged, and the weights that it was made with have"):
        resumed()
    reference.write_bytes(logps)
    resumed()
