"""Configs of rounds that are refused, each with what to do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastpref import cli, losses
from fastpref import config as configs
from fastpref.config import ConfigError
from fastpref.rounds.artifacts import RoundFiles
from fastpref.rounds.checks import check
from fastpref.rounds.scorers import make_scorer
from fastpref.rounds.scoring import score
from fastpref.rounds.served_weights import _run
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display

SERVER = {"engine": "server", "servers": ["http://localhost:8000/v1"]}
SGLANG = {"engine": "server", "servers": ["http://localhost:30000"], "protocol": "sglang"}
CASES: list[tuple[str, dict[str, Any]]] = [
    (
        "rounds: is missing; fastpref rounds needs a section such as rounds: {count: 3, scorer: "
        "{reward_model: NAME}}",
        {"rounds": None},
    ),
    (
        "rounds.scorer: set one of reward_model, function and judge",
        {"rounds": {"scorer": {"reward_model": "a", "function": "b:c"}}},
    ),
    (
        "rounds.reference: must be start, round, {every: STEPS} or {ema: DECAY} with a decay in "
        "[0, 1), got {'ema': 1}",
        {"rounds": {"reference": {"ema": 1}}},
    ),
    (
        "rounds.sampling: servers: engine: server needs at least one; name their addresses",
        {"rounds": {"sampling": {"engine": "server"}}},
    ),
    (
        "rounds.sampling.servers: expected addresses such as http://localhost:8000/v1, got "
        "'localhost:8000'",
        {"rounds": {"sampling": {"engine": "server", "servers": ["localhost:8000"]}}},
    ),
    (
        "rounds.sampling.timeout: is for engine: server; set that, or remove it",
        {"rounds": {"sampling": {"timeout": 5}}},
    ),
    (
        "rounds.sampling.servers: protocol: sglang asks the root of a server, got "
        "'http://localhost:8000/v1'; leave out /v1",
        {"rounds": {"sampling": {**SERVER, "protocol": "sglang"}}},
    ),
    (
        "rounds.sampling.update_command: SGLang loads the weights of a round itself; remove it",
        {"rounds": {"sampling": {**SGLANG, "update_command": "cp {folder}"}}},
    ),
    (
        "rounds.sampling.model: SGLang loads the weights of a round itself; remove it",
        {"rounds": {"sampling": {**SGLANG, "model": "m"}}},
    ),
    (
        "rounds.sampling.update_command: servers cannot be given full weights without one; set a "
        "command with {folder}, or train an adapter",
        {"rounds": {"sampling": SERVER}},
    ),
    (
        "loss: sft is not for rounds, whose data are scored samples of a round; use another "
        "objective",
        {"loss": "sft"},
    ),
    (
        "rounds.reference: the penalty of rloo has no gradient in the only step of a round if it "
        "pulls to the round's own start; set rounds.reference=start, or raise rounds.steps",
        {"loss": "rloo", "rounds": {"steps": 1}},
    ),
    (
        "rounds.reference: the ratios of gspo are to the policy that sampled, got start; set "
        "rounds.reference=round",
        {"loss": "gspo", "rounds": {"reference": "start"}},
    ),
    (
        "rounds.reference: the penalty of grpo has no gradient in the only step of a round if it "
        "pulls to the round's own start; set rounds.reference=start, or raise rounds.steps",
        {"loss": "grpo", "rounds": {"prompts": 8}, "training": {"batch_size": 8}},
    ),
    (
        "rounds.reference: the penalty of grpo has no gradient if the reference is set to the "
        "policy before every step, got {'every': 1}; set rounds.reference=start",
        {"loss": "grpo", "rounds": {"steps": 2, "reference": {"every": 1}}},
    ),
    (
        "rounds.reference: the KL penalty of ppo is that of the policy which sampled, got ema, to "
        "which it is 0 or nearly so; set rounds.reference=start, or loss.kl_coef=0",
        {"loss": "ppo", "rounds": {"reference": {"ema": 0.9}}},
    ),
    (
        "rounds.reference: grpo has no KL penalty here and no other use of a reference; remove it",
        {"loss": {"name": "grpo", "beta": 0}, "rounds": {"reference": "start"}},
    ),
    (
        "rounds.reference: the opponents of nash_md are drawn from the policy and the reference, "
        "which is the policy at the start of a round; set rounds.reference=start, or "
        "loss.mixture=0",
        {"loss": {"name": "nash_md", "mixture": 0.5}},
    ),
    (
        "rounds.sampling.temperature: the opponents of nash_md are drawn in this process, at "
        "temperature 1, got 0.7; remove it, or set loss.mixture=0",
        {
            "loss": {"name": "nash_md", "mixture": 0.5},
            "rounds": {"reference": "start", "sampling": {"temperature": 0.7}},
        },
    ),
    (
        "rounds.sampling.samples: grpo compares the completions of a prompt, got 1; set 2 or more",
        {"loss": "grpo", "rounds": {"sampling": {"samples": 1}, "reference": "start"}},
    ),
    (
        "reference: frozen, but distillation has a teacher and no reference; remove it",
        {"loss": {"name": "distillation", "teacher": "t"}, "reference": "frozen"},
    ),
    (
        "loss.teacher: is missing; name the folder or Hub name of a model with the same tokens",
        {"loss": "distillation"},
    ),
    (
        "rounds.min_gap: ppo learns from all completions and has no pairs; remove it",
        {"loss": {"name": "ppo", "kl_coef": 0}, "rounds": {"min_gap": 0.5}},
    ),
    (
        "loss: ppo learns from samples that the policy draws; add a section rounds and use "
        "fastpref rounds, or choose another objective",
        {"loss": "ppo", "rounds": None},
    ),
    (
        "training.epochs: rounds have steps and evaluations of their own, rounds.steps and "
        "rounds.eval_prompts; remove it",
        {"training": {"epochs": 2}},
    ),
    (
        "model.tokenizer: rounds train no tokenizer on prompts; name one, or set model.path",
        {"model": {"init": "random", "config": {"model_type": "llama"}}},
    ),
    (
        "reference: cached, but rounds.reference: ema changes the reference within a round; remove "
        "reference",
        {"reference": "cached", "rounds": {"reference": {"ema": 0.9}}},
    ),
    (
        "data.train: rounds read the prompts of one source; write them into one file",
        {"data": {"train": ["a.jsonl", "b.jsonl"]}},
    ),
    (
        "data.columns: is for preference data, and rounds read prompts; remove it",
        {"data": {"train": "a.jsonl", "columns": {"prompt": "question"}}},
    ),
]


def parsed(sections: dict[str, Any]) -> configs.Config:
    values: dict[str, Any] = {
        "model": {"path": "m"},
        "data": {"train": "p.jsonl"},
        "loss": "dpo",
        **sections,
    }
    rounds = sections.get("rounds", {})
    if rounds is not None:
        values["rounds"] = {"scorer": {"function": "m:f"}, **rounds}
    return configs.parse(values)


@pytest.mark.parametrize(("says", "sections"), CASES, ids=lambda value: str(value)[:50])
def test_a_config_that_is_refused(says: str, sections: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(parsed(sections))
    assert str(caught.value) == says


def test_a_config_that_is_written_and_read_again() -> None:
    config = parsed({"rounds": {"reference": {"every": 4}}})
    again = configs.parse(configs.yaml_io.parse_yaml(config.to_yaml()))
    assert again.rounds == config.rounds
    check(again)


@pytest.mark.parametrize("rounds", [{"steps": 1, "reference": "start"}, {"steps": 2}])
@pytest.mark.parametrize("loss", ["nash_md", "grpo"])
def test_a_penalty_that_pulls_somewhere_is_accepted(loss: str, rounds: dict[str, Any]) -> None:
    check(parsed({"loss": loss, "rounds": rounds}))


@pytest.mark.parametrize(
    ("loss", "rounds"),
    [
        ({"name": "ppo"}, {"reference": "start", "steps": 1, "sampling": {"samples": 1}}),
        ({"name": "ppo", "kl_coef": 0}, {}),
        ({"name": "grpo", "beta": 0}, {"steps": 1}),
        ({"name": "grpo"}, {"reference": {"every": 4}}),
        ({"name": "nash_md", "mixture": 1}, {"reference": "start"}),
    ],
    ids=str,
)
def test_objectives_on_rollouts_are_accepted(loss: dict[str, Any], rounds: dict[str, Any]) -> None:
    config = parsed({"loss": loss, "rounds": rounds})
    check(config)
    again = configs.parse(configs.yaml_io.parse_yaml(config.to_yaml()))
    assert again.build_loss() == config.build_loss()
    check(again)


@pytest.mark.parametrize("steps", [1, 4])
def test_ratios_to_the_policy_that_sampled_are_accepted(steps: int) -> None:
    check(parsed({"loss": "gspo", "rounds": {"steps": steps}}))


@pytest.mark.parametrize(
    ("name", "reference"), [("llama-3-8b-lora", "round"), ("llama-3-8b-grpo-lora", "start")]
)
def test_the_examples_are_valid(name: str, reference: str) -> None:
    path = Path(__file__).parents[2] / "examples" / "rounds" / f"{name}.yaml"
    config = configs.load(path)
    check(config)
    assert config.rounds is not None and config.rounds.reference == reference


@pytest.mark.parametrize(
    "environ",
    [
        {"WORLD_SIZE": "2"},
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
         "SLURM_STEP_NODELIST": "node1"},
    ],
    ids=["torchrun", "srun"],
)  # fmt: skip
def test_of_the_objectives_those_on_rollouts_need_one_rank(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, **environ})
    check(parsed({}))
    for loss in ("ppo", "grpo", {"name": "nash_md", "mixture": 0.5}):
        with pytest.raises(ConfigError, match="runs on one rank here, and there are 2; start one"):
            check(parsed({"loss": loss}))


def test_a_number_of_ranks_that_is_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(UserError, match="WORLD_SIZE: must be a whole number"):
        check(parsed({}))


def test_train_refuses_a_config_of_rounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(parsed({}).to_yaml())
    monkeypatch.setattr("sys.argv", ["fastpref", "train", str(path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: rounds: is for fastpref rounds, which samples data; use that command\n"
    )


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_a_dry_run_prints_the_objective(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(parsed({"loss": name, "rounds": {"reference": "start"}}).to_yaml())
    monkeypatch.setattr("sys.argv", ["fastpref", "rounds", str(path), "--dry-run", "loss.clip=0.3"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    printed = configs.parse(configs.yaml_io.parse_yaml(capsys.readouterr().out))
    assert printed.build_loss() == losses.build(name, clip=0.3)
    assert printed.reference_mode == "cached"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([1.0], "rounds.scorer: gave 1 scores for 2 completions; fix it"),
        ([1.0, float("nan")], "rounds.scorer: gave nan for the completion 'b'; fix it"),
    ],
)
def test_scores_that_are_none(values: list[float], says: str, tmp_path: Path) -> None:
    class Broken:
        fingerprint = "broken"

        def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
            return values

    samples = [{"prompt": "p", "completions": ["a", "b"], "finished": [True, True]}]
    with pytest.raises(UserError) as caught:
        score(
            RoundFiles(tmp_path, 1), "scores", "k", samples, Broken, 0.0,
            Display(Console(quiet=True)), lambda: None,
        )  # fmt: skip
    assert str(caught.value) == says


def test_a_cut_completion_has_a_lower_score(tmp_path: Path) -> None:
    class One:
        fingerprint = "one"

        def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
            return [1.0 for _ in completions]

    samples = [{"prompt": "p", "completions": ["a", "b"], "finished": [True, False]}]
    scores = score(
        RoundFiles(tmp_path, 1), "scores", "k", samples, One, 0.25, Display(Console(quiet=True)),
        lambda: None,
    )  # fmt: skip
    assert scores == [[1.0, 0.75]]


def test_an_update_command_that_fails(tmp_path: Path) -> None:
    _run("test {folder} = " + str(tmp_path), tmp_path, "http://a/v1")
    with pytest.raises(UserError) as caught:
        _run("echo no room at {server} >&2; exit 3", tmp_path, "http://a/v1")
    assert str(caught.value) == (
        "rounds.sampling.update_command: failed for http://a/v1 with exit code 3 (no room at "
        "http://a/v1); fix it"
    )


def test_a_scorer_that_cannot_be_made_names_the_field() -> None:
    training, display = configs.Training(), Display(Console(quiet=True))
    with pytest.raises(UserError, match=r"^rounds\.scorer\.function: cannot import no:such"):
        make_scorer(configs.RoundScorer(function="no:such"), training, display)
    scorer = make_scorer(configs.RoundScorer(function="builtins:zip"), training, display)
    assert callable(scorer)
    with pytest.raises(UserError, match=r"^rounds\.scorer\.function: "):
        scorer(["p"], ["c"])
