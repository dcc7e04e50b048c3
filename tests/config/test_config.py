"""The config: what is refused and in which words, overrides, and the generated page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastpref.config import Config, ConfigError, load, parse
from fastpref.docgen import config as config_reference

MINIMAL: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "loss": "dpo"}


def changed(path: str, value: Any) -> dict[str, Any]:
    values = yaml.safe_load(yaml.safe_dump(MINIMAL))
    inner = values
    *sections, last = path.split(".")
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optim.lr", -1, "optim.lr: must be > 0, got -1"),
        ("optim.lr", "fast", "optim.lr: must be a number, got 'fast'"),
        ("optim.lr", float("inf"), "optim.lr: must be finite, got inf"),
        ("optim.learning", 1, "optim.learning: unknown key; known: name, lr,"),
        ("optim.wieght_decay", 1, "did you mean weight_decay?"),
        ("trainig", {}, "trainig: unknown key; did you mean training?"),
        ("training.batch_size", 0, "training.batch_size: must be > 0, got 0"),
        ("training.batch_size", 2.5, "training.batch_size: must be a whole number, got 2.5"),
        ("training.epochs", "two", "training.epochs: must be a whole number, got 'two'"),
        ("model.dtype", "fp8", "model.dtype: must be 'bfloat16', 'float32' or 'float64'"),
        ("model.trust_remote_code", "maybe", "model.trust_remote_code: must be true or false"),
        ("model.init", "random", "model.init: random needs config"),
        ("data.max_length", 1, "data.max_length: must be >= 2, got 1"),
        ("data", {}, "data.train: is missing"),
        ("data", 3, "data: must be a mapping, got 3"),
        ("loss", "dop", "objective is called 'dop'; known: "),
        ("loss", {"beta": 1}, "loss: name is missing"),
        ("loss", {"name": "dpo", "beta": -1}, "loss.beta: must be > 0, got -1"),
        ("loss", {"name": "dpo", "gamma": 1}, "loss.gamma: not a parameter of dpo"),
        ("loss", 3, "loss: must be a mapping, got 3"),
        ("loss", [], "loss: expected a list such as [{name: dpo, weight: 0.8}"),
        ("loss", [{"weight": 1}], "loss[0].name: is missing"),
        ("loss", [{"name": "kto"}], "loss[0].name: kto is not an objective on pairs"),
        ("reference", "none", "reference: none, but dpo needs reference log-probs"),
        ("loss", {"name": "kto", "desirable_weight": 0}, "loss.desirable_weight: must be > 0, got"),
        ("loss", {"name": "pro_b", "alpha": 1}, "loss.alpha: must be > 1, got 1"),
        ("reference", "sometimes", "reference: must be 'cached', 'frozen', 'adapter' or 'none'"),
        ("optim.alpha", 0.9, "optim: alpha is not an option of adamw; remove it"),
        ("adapter.rank", 4, "adapter.rank: unknown key; known: name, r, alpha"),
        ("training.eval_every", 5, "training.eval_every: there is nothing to evaluate"),
        (
            "training.report_to",
            ["neptune"],
            "training.report_to.0: must be 'tensorboard', 'wandb', 'mlflow' or 'trackio'",
        ),
    ],
)
def test_an_invalid_field_is_named_in_one_line(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(changed(path, value))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_defaults_and_short_forms() -> None:
    config = parse({**MINIMAL, "adapter": "lora"})
    assert config.loss == {"name": "dpo"}
    assert config.adapter is not None and config.adapter.r == 16
    assert config.reference_mode == "cached"
    assert parse({**MINIMAL, "loss": "simpo"}).reference_mode == "none"
    assert parse({**MINIMAL, "loss": {"name": "pmo", "beta": 0.0}}).reference_mode == "none"


@pytest.mark.parametrize("name", ["kto", "bco", "info_nca", "pro_s"])
def test_objectives_of_every_kind(name: str) -> None:
    config = parse({**MINIMAL, "loss": name})
    assert config.build_loss().name == name and config.reference_mode == "cached"
    with pytest.raises(ConfigError, match=f"reference: none, but {name} needs reference"):
        parse({**MINIMAL, "loss": name, "reference": "none"})


def test_a_reference_that_the_objective_does_not_need_is_measured_against() -> None:
    assert parse({**MINIMAL, "loss": "simpo"}).reference_mode == "none"
    assert parse({**MINIMAL, "loss": "simpo", "reference": "cached"}).reference_mode == "cached"


def test_a_divergence_needs_a_reference_that_runs() -> None:
    tdpo = {**MINIMAL, "loss": "tdpo2"}
    assert parse(tdpo).reference_mode == "frozen"
    assert parse({**tdpo, "adapter": "lora"}).reference_mode == "adapter"
    with pytest.raises(ConfigError, match="reference: cached, but tdpo2 compares whole distribu"):
        parse({**tdpo, "reference": "cached"})
    with pytest.raises(ConfigError, match="reference: adapter, but there is no adapter"):
        parse({**MINIMAL, "reference": "adapter"})
    listed = [{"name": "tdpo1"}, {"name": "sft"}]
    assert parse({**MINIMAL, "loss": listed}).reference_mode == "frozen"


@pytest.mark.parametrize(
    ("loss", "given", "expected"),
    [
        ("simpo", None, (0.6, 0.8)),
        ("dpo", None, (12.0, 16.0)),
        ({"name": "stapo", "left_margin": 0.1}, None, (0.1, 0.8)),
        ("dpo", [1, 2], (1.0, 2.0)),
    ],
)
def test_margins_of_the_contrastive_logit(loss: Any, given: Any, expected: Any) -> None:
    assert parse({**MINIMAL, "loss": loss, "monitor": {"margins": given}}).margins == expected


def test_margins_out_of_order_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"monitor.margins: the first must be <= the second"):
        parse({**MINIMAL, "monitor": {"margins": [2, 1]}})


def test_numbers_and_dates_of_yaml(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    config = load(path, ["loss.beta=1e-1", "optim.lr=.5E-6", "training.output_dir=2025-02-30"])
    assert (config.loss["beta"], config.optim.lr) == (0.1, 5e-7)
    assert config.training.output_dir == "2025-02-30"


def test_the_saved_config_is_resolved(make_config: Callable[..., Config], tmp_path: Path) -> None:
    saved = yaml.safe_load(make_config(loss="cdpo").to_yaml())
    assert saved["loss"] == {"name": "cdpo", "beta": 0.1, "label_smoothing": 0.2}
    assert saved["reference"] == "cached"
    path = tmp_path / "saved.yaml"
    path.write_text(make_config(loss="cdpo").to_yaml())
    changed_config = make_config(loss="cdpo", optim__lr=0.5, resume="auto")
    assert changed_config.differences(path) == ["optim.lr: 0.001 → 0.5"]


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    config = load(path, ["optim.lr=5e-7", "loss.beta=0.05", "training.steps=3", "resume=auto"])
    assert config.optim.lr == 5e-7
    assert config.build_loss().beta == 0.05  # type: ignore[attr-defined]
    assert (config.training.steps, config.resume) == (3, "auto")
    assert load(path, ["loss=ipo"]).loss == {"name": "ipo"}


@pytest.mark.parametrize("override", ["optim.lr", "=3", "optim..lr=1", ".=1"])
def test_an_override_of_another_form_is_refused(tmp_path: Path, override: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError, match=r"must look like section\.key=value"):
        load(path, [override])


def test_an_override_below_a_value_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError, match=r"data\.train is a value"):
        load(path, ["data.train.path=x"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [", "not valid YAML"),
        (b"- a\n- b", "must hold sections"),
        (b"", "must hold sections"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match="cannot read the config"):
        load("no/such.yaml")


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_the_saved_config_reads_back(
    tmp_path: Path, make_config: Callable[..., Config], name: str
) -> None:
    config = make_config(optim__name=name, adapter={"name": "lora", "target_modules": ["q_proj"]})
    path = tmp_path / "saved.yaml"
    path.write_text(config.to_yaml())
    assert load(path).to_yaml() == config.to_yaml()


def test_the_page_of_fields_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == config_reference.markdown(), (
        "run: python -m fastpref.docgen.config > docs/config.md"
    )


def test_every_field_is_described() -> None:
    described = list(config_reference.rows())
    assert len(described) > 40
    assert [row.path for row in described if not row.description.endswith((".", "`"))] == []


@pytest.mark.parametrize("example", sorted((Path(__file__).parents[2] / "examples").glob("*.yaml")))
def test_the_examples_are_valid(example: Path) -> None:
    load(example)


def test_a_weighted_list_of_objectives() -> None:
    base = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}
    items = [{"name": "dpo", "weight": 0.8}, {"name": "sft", "weight": 0.2}]
    made = parse({**base, "loss": items})
    assert made.build_loss().name == "0.8 dpo + 0.2 sft" and made.reference_mode == "cached"
    again = parse(yaml.safe_load(made.to_yaml()))
    assert again.build_loss() == made.build_loss()
    with pytest.raises(ConfigError, match=r"^loss\[1\].weight"):
        parse({**base, "loss": [items[0], {"name": "sft", "weight": -1}]})


def test_options_of_many_objectives() -> None:
    base = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}
    made = parse({**base, "loss": {"name": "ipo", "label_smoothing": 0.1}})
    assert made.build_loss().name == "ipo(label_smoothing=0.1)"
    assert parse(yaml.safe_load(made.to_yaml())).build_loss() == made.build_loss()
    weighted = parse({**base, "loss": {"name": "dpo", "wpo": True}})
    assert weighted.build_loss().name == "dpo(wpo=sampled)"
    assert weighted.reference_mode == "cached"


@pytest.mark.parametrize("section", [{"calibration": "rc"}, {"monitor": {"band_every": 5}}])
def test_calibration_and_band_are_for_pairs(section: dict[str, Any]) -> None:
    base = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}
    assert parse({**base, "loss": "dpo", **section}).build_loss().kind == "pairwise"
    with pytest.raises(ConfigError, match="is for pairwise objectives, and kto is pointwise"):
        parse({**base, "loss": "kto", **section})
