"""Configs of other trainers: what is said of their keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastpref.config import Config, ConfigError, inner_section, load, parse
from fastpref.config.foreign import foreign_keys
from fastpref.config.foreign_keys import KEYS, TORCHTITAN, TORCHTITAN_SECTIONS, Counterpart
from tests.bad_input.command import advises

BASE: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "loss": "dpo"}
CONFIGS = sorted((Path(__file__).parent / "foreign").glob("*.yaml"))
OURS = {name: inner_section(field) for name, field in Config.model_fields.items()}


def message(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(values)
    return str(caught.value)


def is_ours(path: str) -> bool:
    section, _, key = path.partition(".")
    inner = OURS[section]
    return not key or section == "loss" or (inner is not None and key in inner.model_fields)


COUNTERPARTS: dict[str, Counterpart] = {
    **{key: counterpart for key, (_, counterpart) in KEYS.items()},
    **TORCHTITAN,
    **TORCHTITAN_SECTIONS,
}


@pytest.mark.parametrize("key", COUNTERPARTS)
def test_a_counterpart_exists_or_its_absence_is_explained(key: str) -> None:
    path, advice = COUNTERPARTS[key]
    assert is_ours(path) if path else advice
    assert not advice.endswith(".") and "\n" not in advice


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_translated_wherever_it_stands(key: str) -> None:
    trainers, counterpart = KEYS[key]
    for values, path in (
        ({**BASE, key: 1}, key),
        ({**BASE, "training": {key: 1}}, f"training.{key}"),
        ({**BASE, "optim": {key: 1}}, f"optim.{key}"),
        ({**BASE, "loss": {"name": "dpo", key: 1}}, f"loss.{key}"),
        ({**BASE, "hyperparameters": {key: 1}}, f"hyperparameters.{key}"),
    ):
        if path in (counterpart.path, "training.batch_size") or is_present(path):
            continue
        said = message(values)
        origin = "torchtitan" if path in TORCHTITAN else trainers
        assert said.startswith(f"{path}: a key of {origin}; ") and advises(said)


def is_present(path: str) -> bool:
    section, _, key = path.partition(".")
    inner = OURS.get(section)
    return inner is not None and key in inner.model_fields


@pytest.mark.parametrize("path", TORCHTITAN)
def test_a_key_of_torchtitan_is_translated(path: str) -> None:
    section, key = path.split(".")
    said = message({**BASE, section: {**BASE.get(section, {}), key: 1}})
    assert said.startswith(f"{path}: a key of torchtitan; ") and advises(said)


@pytest.mark.parametrize("section", TORCHTITAN_SECTIONS)
def test_a_section_of_torchtitan_is_explained(section: str) -> None:
    for values in ({}, {"other": 1}):
        said = message({**BASE, section: values})
        if values or section not in KEYS:
            assert said.startswith(section) and "of torchtitan; there is none here" in said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"learning_rate": 1}, "learning_rate: a key of TRL and axolotl; set optim.lr here"),
        (
            {"gradient_accumulation_steps": 4},
            "gradient_accumulation_steps: a key of TRL and axolotl; there is none here, remove "
            "it: training.batch_size is the whole step, and training.micro_batch_tokens bounds a "
            "micro-batch",
        ),
        (
            {"optim": {"warmup_ratio": 0.1, "learning_rate": 1}},
            "optim.learning_rate: a key of TRL and axolotl; set optim.lr here",
        ),
        (
            {"warmup_ratio": 0.1, "max_prompt_length": 512, "data": {"assistant_only_loss": True}},
            "data.assistant_only_loss: a key of TRL; set data.sft_on here (assistant); also: "
            "warmup_ratio → optim.warmup_ratio, max_prompt_length → data.max_prompt_length",
        ),
        (
            {"optim": "adamw_torch"},
            "optim: must be a mapping, got 'adamw_torch'; set optim.name here (adamw, rmsprop, "
            "sgd, adamw_8bit or paged_adamw_8bit)",
        ),
        (
            {"model": "Qwen/Qwen3-8B"},
            "model: must be a mapping, got 'Qwen/Qwen3-8B'; set model.path here (a folder or a "
            "Hub name)",
        ),
        (
            {"data": [{"path": "a"}]},
            "data: must be a mapping, got [{'path': 'a'}]; set data.train here (one file or Hub "
            "name)",
        ),
        (
            {"adapter": "qlora"},
            "adapter: qlora is a name of axolotl; set adapter.quantize here (adapter: {name: "
            "lora, quantize: nf4})",
        ),
        ({"trainer": {"max_steps": 3}},
         "trainer: a key of other trainers; set training here; also: trainer.max_steps → "
         "training.steps"),
        ({"trainer": "BasicTrainer"}, "trainer: a key of other trainers; set training here"),
        ({"optimizer": "adamw_torch"},
         "optimizer: a key of axolotl; set optim.name here (adamw, rmsprop, sgd, "
         "adamw_8bit or paged_adamw_8bit)"),
        ({"optimizer": {"lr": 1}}, "optimizer.lr: a key of torchtitan; set optim.lr here"),
        (
            {"profiling": {}},
            "profiling: a section of torchtitan; there is none here, remove it: run `fastpref "
            "train --profile`",
        ),
        (
            {"loss": {"name": "dpo", "loss_type": "ipo"}},
            "loss.loss_type: a key of TRL; set loss.name here (sigmoid is dpo; `fastpref losses` "
            "lists names)",
        ),
        (
            {"loss": [{"name": "dpo", "rpo_alpha": 1}]},
            "loss.rpo_alpha: a key of TRL and axolotl; set loss here (a list: [{name: dpo, "
            "weight: 1}, {name: sft, weight: 1}])",
        ),
        (
            {"seed": 1, "lora_r": 8, "adapter": {"name": "lora", "lora_alpha": 16}, "strict": 1},
            "seed: a key of TRL and axolotl; set training.seed here; also: lora_r → adapter.r, "
            "adapter.lora_alpha → adapter.alpha; remove: strict",
        ),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_is_said(values: dict[str, Any], said: str) -> None:
    assert message({**BASE, **values}) == said


def test_parameters_of_objectives_are_ours() -> None:
    assert foreign_keys({"loss": {"name": "cdpo", "beta": 0.1, "label_smoothing": 0.1}}) == []
    assert message({**BASE, "loss": {"name": "simpo", "label_smoothing": 2}}).startswith("loss.")


def test_keys_of_nobody_are_unknown() -> None:
    assert message({**BASE, "extra": {"a": 1}}).startswith("extra: unknown key; ")
    said = message({**BASE, "lr": 1})
    assert said.startswith("lr: unknown key; did you mean optim.lr? known: model, adapter")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_whole_config_is_translated_in_one_line(fastpref: Callable[..., Any], path: Path) -> None:
    done = fastpref("train", str(path), "--dry-run")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    for section, values in yaml.safe_load(path.read_text()).items():
        keys = values if path.stem == "torchtitan" else [""]
        for name in (f"{section}.{key}".rstrip(".") for key in keys):
            # Of torchtitan's [training], steps is a key here, too.
            assert name == "training.steps" or name in done.stderr


def test_foreign_keys_in_an_override(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(BASE))
    with pytest.raises(ConfigError, match=r"^max_steps: a key of TRL and axolotl; set training.st"):
        load(path, ["max_steps=3"])
