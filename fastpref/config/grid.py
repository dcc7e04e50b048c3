"""Grid of configs: the Cartesian product of the values of some keys.

A run's name and its folder are made of its values alone, such as `beta=0.05,lr=1e-6`, so that a
grid that gains a value keeps the runs that it has.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from fastpref.config.errors import ConfigError
from fastpref.config.loading import load
from fastpref.config.schema import Config
from fastpref.config.yaml_io import parse_yaml
from fastpref.utils.errors import shown

_LONGEST_NAME = 200  # bytes; file systems allow 255, and temporary names are longer


@dataclass(frozen=True)
class Point:
    """One run of a grid.

    values: by key, of the keys that vary.
    config: the run's own, with `training.output_dir` inside the folder of the grid.
    """

    name: str
    values: dict[str, Any]
    config: Config

    @property
    def folder(self) -> Path:
        """Run directory."""
        return Path(self.config.training.output_dir)


@dataclass(frozen=True)
class Grid:
    """Runs in the order of the product: the values of the last key change fastest."""

    folder: Path
    points: list[Point]


def load_grid(
    path: str | Path,
    overrides: Sequence[str],
    items: Sequence[str],
    note: Callable[[str], object] | None = None,
) -> Grid:
    """Read the configs of all runs of a grid, and validate them.

    overrides: `section.key=value`, of all runs.
    items: `section.key=value,value,…`. One value is an override; lists and text with commas are
        written as in YAML, such as `[0.9,0.95]` and `"a,b"`.
    note: as in `load`, called for the first run only.

    A key is set before the keys inside it, so `loss.beta` applies to every `loss`. Raises
    ConfigError, one line, for a key or value that is there twice, for a key that cannot vary, and
    as `load` does for any of the configs.
    """
    values = _parse(items)
    _check_keys(overrides, list(values))
    varying = {key: options for key, options in values.items() if len(options) > 1}
    if not varying:
        raise ConfigError("--grid: every key has one value; give a key several, as in key=1,2")
    fixed = [*overrides, *(item for item in items if _key(item) not in varying)]
    labels = _labels(list(varying))
    points: list[Point] = []
    for combination in itertools.product(*varying.values()):
        assigned = dict(zip(varying, combination, strict=True))
        assignments = [f"{key}={json.dumps(value)}" for key, value in assigned.items()]
        config = load(path, sorted([*fixed, *assignments], key=_depth), None if points else note)
        name = ",".join(f"{labels[key]}={value_text(value)}" for key, value in assigned.items())
        points.append(Point(name, assigned, config))
    _check_uploads(points)
    return _in_one_folder(points)


def value_text(value: Any) -> str:
    """Text of a value that is a safe part of a file name; different values have different texts."""
    if isinstance(value, str):
        return quote(value, safe="", errors="replace")
    if isinstance(value, list):
        return f"[{','.join(map(value_text, value))}]"
    if isinstance(value, dict):
        pairs = (f"{value_text(str(key))}:{value_text(item)}" for key, item in value.items())
        return f"{{{','.join(pairs)}}}"
    if isinstance(value, float):
        # `1e-05` and `1.0` as people write them: `1e-5` and `1`.
        return re.sub(r"e\+?(-?)0*", r"e\1", repr(value)).removesuffix(".0")
    return json.dumps(value)


def _parse(items: Sequence[str]) -> dict[str, list[Any]]:
    """Return the values of each key, which may be one."""
    values: dict[str, list[Any]] = {}
    for item in items:
        key, sign, text = item.partition("=")
        if not sign or not all(key.split(".")):
            raise ConfigError(f"--grid {shown(item)}: must look like section.key=value,value")
        if key in values:
            raise _set_twice(key)
        try:
            options = parse_yaml(f"[{text}]")
        except (yaml.YAMLError, ValueError, RecursionError):
            raise ConfigError(
                f"--grid {shown(item)}: cannot be split into values; write text with commas, "
                "brackets or colons in quotes"
            ) from None
        if not options:
            raise ConfigError(f"--grid {key}: has no value; give several, as in {key}=1,2")
        texts = [value_text(option) for option in options]
        for position, option in enumerate(options):
            if texts[position] in texts[:position]:
                raise ConfigError(f"--grid {key}: has the value {shown(option)} twice; remove one")
        values[key] = options
    return values


def _check_uploads(points: Sequence[Point]) -> None:
    """Refuse runs whose models would replace each other on the Hub."""
    names = [p.config.training.hub_model_id for p in points if p.config.training.push_to_hub]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"--grid: training.hub_model_id: {name} would be of {names.count(name)} runs; set "
                "training.push_to_hub=false, and upload the best run by fastpref export"
            )


def _check_keys(overrides: Sequence[str], keys: Sequence[str]) -> None:
    for override in overrides:
        if _key(override) in keys:
            raise _set_twice(_key(override))


def _set_twice(key: str) -> ConfigError:
    return ConfigError(f"--grid {key}: is set twice on the command line; remove one of them")


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """Return the last component of each key, or all of a key whose last one is not unique."""
    last = [key.rpartition(".")[2] for key in keys]
    return {
        key: quote(label if last.count(label) == 1 else key, safe="", errors="replace")
        for key, label in zip(keys, last, strict=True)
    }


def _in_one_folder(points: Sequence[Point]) -> Grid:
    """Return the grid with a folder for each run inside the common `training.output_dir`."""
    for field in ("training.output_dir", "data.cache", "resume"):
        options = list(dict.fromkeys(shown(_value(point.config, field)) for point in points))
        if len(options) > 1:
            raise ConfigError(
                f"--grid {field}: cannot vary, got {', '.join(options)}; give it one value"
            )
    first = points[0].config
    if first.resume not in (None, "auto"):
        raise ConfigError(
            f"resume: a grid continues its own runs, got {shown(first.resume)}; remove it"
        )
    names: dict[str, str] = {}
    for point in points:
        if len(point.name.encode()) > _LONGEST_NAME:
            raise ConfigError(
                f"--grid: the folder name {shown(point.name)} is too long; vary fewer keys, or "
                "shorten the values"
            )
        twin = names.setdefault(point.config.to_yaml(), point.name)
        if twin != point.name:
            raise ConfigError(f"--grid: {twin} and {point.name} are the same run; remove a value")
    folder = Path(first.training.output_dir)
    return Grid(folder, [_placed(point, folder) for point in points])


def _placed(point: Point, folder: Path) -> Point:
    training = point.config.training.model_copy(update={"output_dir": str(folder / point.name)})
    config = point.config.model_copy(update={"training": training, "resume": "auto"})
    return Point(point.name, point.values, config)


def _value(config: Config, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _key(assignment: str) -> str:
    return assignment.partition("=")[0]


def _depth(assignment: str) -> int:
    return _key(assignment).count(".")
