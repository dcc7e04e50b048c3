"""Forms in which a config names several sources of data, and what is refused about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastpref import config as configs
from fastpref.config import Config, ConfigError


def parse(train: Any, **data: Any) -> Config:
    return configs.parse({"model": {"path": "m"}, "data": {"train": train, **data}, "loss": "dpo"})


def test_one_path_stays_a_path() -> None:
    data = parse("a.jsonl").data
    assert data.train == "a.jsonl" and data.of(data.sources("train")[0]) == data


@pytest.mark.parametrize(
    ("form", "labels"),
    [
        (["x/a.jsonl", "b.parquet"], ["a", "b"]),
        ([{"path": "a.jsonl", "name": "first"}, "b.jsonl"], ["first", "b"]),
        ({"one": "a.jsonl", "two": {"path": "a.jsonl"}}, ["one", "two"]),
        ({"path": "org/name", "split": "test_prefs"}, ["name-test_prefs"]),
        (["org/name:test", "some file (2).jsonl"], ["name-test", "some-file-2-"]),
    ],
)
def test_forms_of_several_sources(form: Any, labels: list[str]) -> None:
    for field in ("train", "eval"):
        config = parse(**{"train": "t", field: form})
        assert [source.label for source in config.data.sources(field)] == labels  # type: ignore[arg-type]
    again = configs.parse(configs.yaml_io.parse_yaml(config.to_yaml()))
    assert again.data == config.data


def test_settings_of_a_source_replace_those_of_the_data() -> None:
    own = {"path": "org/b", "split": "prefs", "columns": {"prompt": "question"}, "template": "t"}
    data = parse(["a.jsonl", own], columns={"prompt": "q"}, chat_template="chatml").data
    first, second = (data.of(source) for source in data.sources("train"))
    assert (first.train, first.columns, first.chat_template) == (
        "a.jsonl",
        {"prompt": "q"},
        "chatml",
    )
    assert second.train == "org/b:prefs"
    assert (second.columns, second.chat_template) == ({"prompt": "question"}, "t")


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ([], "data.train: must name at least one source, got []"),
        ([{"path": "a", "weigh": 1}], "data.train.0.weigh: unknown key; did you mean weight?"),
        (["a", {"path": "b", "weight": 0}], "data.train.1.weight: must be > 0, got 0"),
        (["a", {"weight": 2}], "data.train.1.path: is missing; set it"),
        (["a", 3], "data.train.1: must be a mapping, got 3"),
        ({"a": 3}, "data.train.0.path: must be text, got 3"),
        (
            [{"path": "a", "name": "x y"}],
            "data.train.0.name: must be letters, digits and any of _ . -, got 'x y'",
        ),
        (
            ["a.jsonl", "other/a.parquet"],
            "data.train: 2 sources are named a; give each a name of its own with name",
        ),
        (
            [{"path": "a", "share": 0.5}, "b"],
            "data.train: some sources have a share; give one to each, or weights to all",
        ),
        (
            [{"path": "a", "share": 0.5}, {"path": "b", "share": 0.6}],
            "data.train: the shares must add up to 1, got 1.1",
        ),
        (
            [{"path": "a", "share": 0.5, "weight": 2}],
            "data.train.0.share: excludes weight; remove one of them",
        ),
    ],
)
def test_sources_that_make_no_mixture_are_refused(train: Any, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(train)
    assert str(error.value).startswith(says)


def test_shares_of_two_digits_may_miss_one_by_rounding() -> None:
    parse([{"path": name, "share": 0.33} for name in "abc"])


def test_a_split_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"split: is for data sets on the Hub, and .* is a file"):
        parse([{"path": str(path), "split": "train"}])


def test_held_out_data_has_no_weights() -> None:
    with pytest.raises(
        ConfigError,
        match=r"data\.eval: b has a weight or share, and held-out data is read whole; remove it",
    ):
        parse("a", eval=["a", {"path": "b", "weight": 2}])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"train": "a", "shuffle_window": 8},
            "data.shuffle_window: is for streaming, and all rows are shuffled otherwise; remove it",
        ),
        (
            {"train": ["a", "b"], "streaming": True},
            "data.streaming: reads one source, and train has a list; write them into one folder, "
            "or remove streaming",
        ),
    ],
)
def test_options_of_streaming_that_have_no_meaning_are_refused(
    options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as error:
        parse(**options)
    assert str(error.value) == says


def test_streaming_runs_its_reference() -> None:
    assert parse("a", streaming=True).reference_mode == "frozen"
    values = {"model": {"path": "m"}, "data": {"train": "a", "streaming": True}, "loss": "dpo"}
    assert configs.parse({**values, "adapter": "lora"}).reference_mode == "adapter"
    assert configs.parse({**values, "loss": "simpo"}).reference_mode == "none"
    with pytest.raises(
        ConfigError,
        match=r"reference: cached, but data.streaming keeps nothing on disk; use reference: "
        r"frozen, or adapter with an adapter",
    ):
        configs.parse({**values, "reference": "cached"})
