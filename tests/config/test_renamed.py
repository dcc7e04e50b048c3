"""Earlier names of config keys: what they become, what is said, and old runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastpref.config import Config, ConfigError, load, parse
from fastpref.config.renamed import KEYS, SECTIONS, VALUES, renamed

BASE: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}, "loss": "dpo"}
LATER = "; the old name works until the next release"
# A config under the earlier names, what it becomes, and the notes.
RENAMED: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({"training": {"output": "r"}}, {"training": {"output_dir": "r"}},
     ["training.output is now training.output_dir"]),
    ({"training": {"track": ["wandb"]}}, {"training": {"report_to": ["wandb"]}},
     ["training.track is now training.report_to"]),
    ({"training": {"max_tokens": 4096}}, {"training": {"micro_batch_tokens": 4096}},
     ["training.max_tokens is now training.micro_batch_tokens"]),
    ({"training": {"layout": "shared"}}, {"training": {"layout": "prefix_shared"}},
     ["training.layout: shared is now prefix_shared"]),
    ({"training": {"layout": "flat"}}, {"training": {"layout": "packed"}},
     ["training.layout: flat is now packed"]),
    ({"adapter": {"targets": ["q_proj"]}}, {"adapter": {"target_modules": ["q_proj"]}},
     ["adapter.targets is now adapter.target_modules"]),
    ({"update": "projected"}, {"update": "dpo_pg"}, ["update: projected is now dpo_pg"]),
    ({"mesh": {"shard": 2}}, {"parallel": {"shard": 2}}, ["mesh is now parallel"]),
    ({"mesh": {"reshard": False}}, {"parallel": {"reshard_after_forward": False}},
     ["mesh.reshard is now parallel.reshard_after_forward", "mesh is now parallel"]),
    ({"mesh": {"offload": True}}, {"parallel": {"cpu_offload": True}},
     ["mesh.offload is now parallel.cpu_offload", "mesh is now parallel"]),
    ({"mesh": {"shard": 2, "offload": True}, "parallel": {"replicate": 4}},
     {"parallel": {"replicate": 4, "cpu_offload": True, "shard": 2}},
     ["mesh.offload is now parallel.cpu_offload", "mesh is now parallel"]),
    ({"monitor": {"band": 5}}, {"monitor": {"band_every": 5}},
     ["monitor.band is now monitor.band_every"]),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "notes"), RENAMED, ids=lambda value: str(value)[:40])
def test_an_earlier_name_becomes_the_present_one(
    old: dict[str, Any], new: dict[str, Any], notes: list[str]
) -> None:
    before = yaml.safe_dump(old)
    assert renamed(old) == (new, [note + LATER for note in notes])
    assert yaml.safe_dump(old) == before
    assert parse({**BASE, **old}) == parse({**BASE, **new})


def test_every_earlier_name_is_tested() -> None:
    notes = " ".join(note for _, _, notes in RENAMED for note in notes)
    values = [f"{path}: {old}" for path, names in VALUES.items() for old in names]
    for name in (*KEYS, *SECTIONS, *values):
        assert f"{name} is now" in notes


def test_present_names_stay_as_they_are() -> None:
    values = {**BASE, "training": {"layout": "padded"}, "parallel": {"shard": 2}}
    assert renamed(values) == (values, [])


@pytest.mark.parametrize(
    "odd",
    [
        {"training": ["output"]},
        {"training": {"layout": ["shared"]}},
        {"mesh": {"reshard": True}, "parallel": 3},
        {"mesh": {1: 2}},
        {3: {"output": "x"}},
    ],
    ids=str,
)
def test_malformed_values_are_left_to_validation(odd: dict[Any, Any]) -> None:
    with pytest.raises(ConfigError):
        parse({**BASE, **odd})


@pytest.mark.parametrize(
    ("section", "old", "new"),
    [(*old.split("."), new) for old, new in KEYS.items()] + [("mesh", "shard", "parallel.shard")],
)
def test_both_names_at_once_are_refused(section: str, old: str, new: str) -> None:
    new_section, new_key = new.split(".")
    values: dict[str, Any] = {section: {old: 1}}
    values.setdefault(new_section, {})[new_key] = 1
    with pytest.raises(ConfigError) as caught:
        renamed(values)
    path = f"{section}.{old}"
    message = f"{path}: is an earlier name of {new}, and both are set; remove {path}"
    assert str(caught.value) == message


def write(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump({**BASE, **values}))
    return path


def test_an_override_may_have_an_earlier_name(tmp_path: Path) -> None:
    notes: list[str] = []
    config = load(write(tmp_path, {}), ["training.output=x", "mesh.shard=2"], notes.append)
    assert (config.training.output_dir, config.parallel.shard) == ("x", 2)
    said = ["training.output is now training.output_dir", "mesh is now parallel"]
    assert notes == [note + LATER for note in said]
    path = write(tmp_path, {"training": {"output_dir": "y"}})
    message = r"^training\.output: is an earlier name of training\.output_dir, and both are set"
    with pytest.raises(ConfigError, match=message):
        load(path, ["training.output=x"])


def test_the_command_line_prints_a_note_for_each(
    fastpref: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write(tmp_path, {"training": {"output": "r", "track": []}})
    done = fastpref("train", str(path), "monitor.band=3", "--dry-run")
    assert done.returncode == 0 and "output_dir: r" in done.stdout
    assert done.stderr.splitlines() == [
        f"note: {note}{LATER}"
        for note in (
            "training.output is now training.output_dir",
            "training.track is now training.report_to",
            "monitor.band is now monitor.band_every",
        )
    ]
    monkeypatch.setenv("RANK", "1")
    assert fastpref("train", str(path), "--dry-run").stderr == ""


def test_a_saved_config_is_read_without_notes(
    make_config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(adapter={"name": "lora"}, training__layout="prefix_shared")
    saved = yaml.safe_load(config.to_yaml())
    training, parallel = saved["training"], saved.pop("parallel")
    for section, new, old in (
        (training, "output_dir", "output"),
        (training, "report_to", "track"),
        (training, "micro_batch_tokens", "max_tokens"),
        (saved["adapter"], "target_modules", "targets"),
        (saved["monitor"], "band_every", "band"),
        (parallel, "reshard_after_forward", "reshard"),
        (parallel, "cpu_offload", "offload"),
    ):
        section[old] = section.pop(new)
    training["layout"], saved["mesh"] = "shared", parallel
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(saved))
    assert config.differences(path) == []
    assert load(path) == load(write(tmp_path, yaml.safe_load(config.to_yaml())))
    assert capsys.readouterr().err == ""
