"""Configs under examples/: valid, with commands that work, and planned on H100s."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.plans import examples
from fastpref import config as configs
from fastpref import losses
from fastpref.config import Config
from fastpref.config.grid import load_grid
from fastpref.plan.predict import Prediction

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PUBLISHED = examples.paths()  # papers and recipes
PATHS = [*sorted(EXAMPLES.glob("*.yaml")), *PUBLISHED]
# The others take too much: fp32 weights, gradients and moments are 16 bytes a weight.
FIT_ON_ONE = {
    "demo-dpo",
    "demo-pmo",
    "demo-sft",
    "llama-3-8b-lora",
    "llama-3-8b-qlora",
    "pmo-table1",
    "pmo-table3",
    "rc-hh-mistral-7b",
    "rc-mistral-7b",
    "rc-pythia-2.8b",
    "rc-pythia-410m",
    "rc-qwen2.5-7b",
    "zephyr-7b-dpo-qlora",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(EXAMPLES))


def parsed(path: Path) -> Config:
    return configs.parse(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_a_config_is_valid(path: Path) -> None:
    assert parsed(path).build_loss().name in losses.names()


@pytest.mark.parametrize("path", PUBLISHED, ids=name_of)
def test_a_header_says_what_is_reproduced_and_how(path: Path) -> None:
    header = examples.header(path)
    required = {"Reproduces", "Reported", "Missing", "Run"}
    assert required | ({"Source"} if path.parent.name == "recipes" else set()) <= set(header)
    assert str(path.relative_to(ROOT)) in header["Run"][0]
    # The source of a recipe is a repository, a file in it and a commit.
    source = " ".join(header.get("Source", ["https://github.com/a/b, c.d (commit 0123456)"]))
    assert re.match(r"https://github\.com/\S+, .*\.\w+ \(commit [0-9a-f]{7}\)$", source)


@pytest.mark.parametrize("path", PUBLISHED, ids=name_of)
def test_runs_of_different_configs_lie_in_different_folders(path: Path) -> None:
    folder = path.parent.name
    assert parsed(path).training.output_dir == f"runs/{folder}/{path.stem}"


def commands(path: Path) -> Iterator[list[str]]:
    """Arguments of each `fastpref train` in the header of a config."""
    command = re.compile(r"(?:torchrun --nproc-per-node 8 -m )?fastpref train ([^(]+)")
    for line in itertools.chain.from_iterable(examples.header(path).values()):
        if match := command.match(line):
            yield shlex.split(match[1].partition(" with ")[0])


@pytest.mark.parametrize("path", PUBLISHED, ids=name_of)
def test_commands_of_a_header_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    runs = list(commands(path))
    assert runs
    for file, *arguments in runs:
        end = arguments.index("--grid") if "--grid" in arguments else len(arguments)
        if items := arguments[end + 1 :]:
            assert len(load_grid(file, arguments[:end], items).points) > 1
        else:
            configs.load(file, arguments)


@pytest.mark.parametrize("path", PUBLISHED, ids=name_of)
def test_other_objectives_that_a_header_names_are_valid(path: Path) -> None:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    text = " ".join(" ".join(lines) for lines in examples.header(path).values())
    for mapping, name in re.findall(r"\bloss=(?:'(\{.*?\})'|(\w+))", text):
        loss = yaml.safe_load(mapping) if mapping else name
        # Reward Calibration and DPO-PG are for pairs only.
        assert configs.parse({**values, "loss": loss}).build_loss().name in losses.names()


# beta and gamma_beta_ratio, learning rate: the table in the README of princeton-nlp/SimPO.
SIMPO = {
    "simpo-llama-3-8b-instruct": (2.5, 0.55, 1e-6),
    "simpo-llama-3-8b-instruct-v0.2": (10, 0.3, 1e-6),
    "simpo-gemma-2-9b-it": (10, 0.5, 8e-7),
}


@pytest.mark.parametrize("name", SIMPO)
def test_gamma_of_simpo_is_the_ratio_of_its_authors_times_beta(name: str) -> None:
    config = parsed(EXAMPLES / "recipes" / f"{name}.yaml")
    beta, ratio, rate = SIMPO[name]
    assert config.build_loss() == losses.build("simpo", beta=beta, gamma=ratio * beta)
    assert config.optim.lr == rate


# Objective, learning rate and batch of the public recipes, as their sources have them.
RECIPES: dict[str, tuple[dict[str, Any], float, int]] = {
    "olmo3-7b-instruct-dpo": ({"name": "dpo_norm", "beta": 5}, 1e-6, 4 * 8 * 4),
    "olmo3-7b-think-dpo": ({"name": "dpo_norm", "beta": 5}, 8e-8, 4 * 8 * 4),
    "tulu3-8b-dpo": ({"name": "dpo_norm", "beta": 5}, 5e-7, 8 * 16),
    "smollm3-3b-apo": ({"name": "apo_zero", "beta": 0.05}, 1e-6, 2 * 8 * 2),
    "zephyr-7b-dpo": ({"name": "dpo", "beta": 0.01}, 5e-7, 8 * 8 * 2),
    "zephyr-7b-dpo-qlora": ({"name": "dpo", "beta": 0.01}, 5e-6, 4 * 4),
    "orpo-mistral-7b": ({"name": "orpo", "lam": 0.1}, 5e-6, 4 * 8),
    "kto-archangel-llama-7b": ({"name": "kto", "beta": 0.1}, 5e-7, 32),
}


def test_recipes_have_the_settings_of_their_sources() -> None:
    assert {*RECIPES, *SIMPO} == {path.stem for path in PUBLISHED if path.parent.name == "recipes"}
    for name, (loss, rate, batch) in RECIPES.items():
        config = parsed(EXAMPLES / "recipes" / f"{name}.yaml")
        assert config.build_loss() == losses.from_config(loss)
        assert (config.optim.lr, config.training.batch_size) == (rate, batch)


@pytest.fixture(scope="module")
def planned() -> dict[str, dict[int, Prediction]]:
    """Predictions for each config on one H100 and on eight."""
    return {path.stem: by_ranks for path, by_ranks in examples.predict(PATHS).items()}


def share(prediction: Prediction) -> float:
    """Share of the memory that a run can use."""
    return prediction.parts.total / prediction.device.usable


def test_all_configs_fit_on_eight_h100(planned: dict[str, dict[int, Prediction]]) -> None:
    assert [name for name, by_ranks in planned.items() if not by_ranks[8].fits] == []


def test_configs_with_adapters_or_small_models_fit_on_one_h100(
    planned: dict[str, dict[int, Prediction]],
) -> None:
    shares = {name: share(by_ranks[1]) for name, by_ranks in planned.items()}
    assert {name for name, value in shares.items() if value < 0.9} == FIT_ON_ONE
    # SmolLM3's pairs of 49,152 tokens are so close to the limit that either is right.
    assert {name for name, value in shares.items() if 0.9 <= value < 1.1} == {"smollm3-3b-apo"}


def test_the_published_plans_are_those_of_the_present_configs(
    planned: dict[str, dict[int, Prediction]],
) -> None:
    records = json.loads(examples.RESULT.read_text(encoding="utf-8"))["examples"]
    assert [r["config"] for r in records] == [name_of(path) for path in PUBLISHED]
    for record, path in zip(records, PUBLISHED, strict=True):
        for field in ("Reproduces", "Reported", "Missing"):
            text = " ".join(examples.header(path)[field])
            assert record[field.lower()] == text, "run: python -m benchmarks.plans.examples"
        published = [device["total_bytes"] for device in record["devices"].values()]
        present = [prediction.parts.total for prediction in planned[path.stem].values()]
        assert present == pytest.approx(published, rel=0.1), record["config"]
