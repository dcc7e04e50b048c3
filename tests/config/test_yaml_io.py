"""YAML as versions 1.1 and 1.2 agree on it: numbers, keys that repeat, and what is written."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from fastpref.config import ConfigError, load, parse
from fastpref.config.yaml_io import dump_yaml, parse_document, parse_yaml

BASE = "model: {path: m}\ndata: {train: d.jsonl}\nloss: {name: dpo}\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        (".5", 0.5),
        ("1_000", 1000),
        ("0o17", 15),
        ("0x1F", 31),
        ("0.10", 0.1),
        ("1:30", "1:30"),
        ("'010'", "010"),
        ("2025-01-02", "2025-01-02"),
        ("=", "="),
        ("0", 0),
    ],
)
def test_numbers_are_those_of_version_1_2(text: str, value: Any) -> None:
    assert parse_yaml(text) == value and type(parse_yaml(text)) is type(value)


@pytest.mark.parametrize("text", ["010", "-010", "0900"])
def test_a_leading_zero_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"a\.1: {text} has a leading zero, which is octal to"):
        parse_yaml(f"a: [1, {text}]")


def test_a_key_that_is_there_twice_is_refused_with_its_lines() -> None:
    with pytest.raises(ConfigError, match=r"^optim\.lr: is set twice, in lines 2 and 4; remove"):
        parse_yaml("optim:\n  lr: 1\n  eps: 1\n  lr: 2\n")
    merged = "a: &x {<<: {q: 1}, q: 2}\nb: {<<: *x, q: 3}"
    assert parse_yaml(merged) == {"a": {"q": 2}, "b": {"q": 3}}


def test_keys_without_a_value_are_no_nulls() -> None:
    assert parse_document("a:\nb: null\nc: ''\n") == ({"a": None, "b": None, "c": ""}, ["a"])


def test_text_that_looks_like_a_number_is_written_in_quotes() -> None:
    values = {"a": "1e5", "b": "0o17", "c": "0900", "d": "1:30", "e": 1e-5, "f": "yes", "g": None}
    assert parse_yaml(dump_yaml(values)) == values
    assert yaml.safe_load(dump_yaml(values)) == {**values, "e": 1e-5}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("training: {steps: 010}", "training.steps: 010 has a leading zero, which is octal to"),
        ("training: {steps: 1:30}", "training.steps: must be a whole number, got '1:30'"),
        ("training: {steps: true}", "training.steps: must be a whole number, got 'true'"),
        ("optim: {betas: [true, 0.9]}", "optim.betas.0: must be a number, got 'true'"),
        ("training: {output_dir: 5}", "training.output_dir: must be text, got 5; write it in quo"),
        ("loss: ipo", "loss: is set twice, in lines 3 and 4; remove one of them"),
        ("adapter:", "adapter: is empty; write adapter: lora, or adapter: null for none"),
        ("calibration:", "calibration: is empty; write calibration: rc, or calibration: null"),
    ],
)
def test_a_trap_is_refused_by_name(tmp_path: Any, text: str, says: str) -> None:
    (tmp_path / "c.yaml").write_text(BASE + text + "\n")
    with pytest.raises(ConfigError) as refusal:
        load(tmp_path / "c.yaml")
    assert str(refusal.value).removeprefix(f"{tmp_path}/c.yaml: ").startswith(says)


def test_an_override_with_a_trap_is_refused(tmp_path: Any) -> None:
    (tmp_path / "c.yaml").write_text(BASE + "adapter:\n")
    with pytest.raises(ConfigError, match=r"^override 'training\.steps=010': .* leading zero"):
        load(tmp_path / "c.yaml", ["training.steps=010"])
    assert load(tmp_path / "c.yaml", ["adapter.r=4"]).adapter is not None


def test_words_and_quotes_that_people_write() -> None:
    values: dict[str, Any] = yaml.safe_load(BASE)
    values |= {"adapter": "none", "calibration": False, "resume": True, "optim": None}
    values["loss"]["beta"] = "0.2"
    values["training"] = {
        "track": "tensorboard",
        "steps": "12",
        "eval_every": "none",
        "micro_batch_tokens": "4096",
        "activation_checkpointing": False,
    }
    config = parse(values)
    assert (config.adapter, config.calibration, config.resume) == (None, None, "auto")
    assert config.loss["beta"] == 0.2 and config.optim.lr == 1e-6
    training = config.training
    assert (training.report_to, training.steps, training.eval_every) == (["tensorboard"], 12, None)
    assert (training.micro_batch_tokens, training.activation_checkpointing) == (4096, "off")
    values["training"] = {"report_to": "none"}
    assert parse(values).training.report_to == []


@pytest.mark.parametrize(("section", "key"), [("model", "model.path"), ("data", "data.train")])
def test_a_name_in_place_of_a_section_says_where_it_goes(section: str, key: str) -> None:
    values = yaml.safe_load(BASE)
    with pytest.raises(ConfigError, match=rf"{section}: must be a mapping, .*; set {key} here"):
        parse({**values, section: "NAME"})
