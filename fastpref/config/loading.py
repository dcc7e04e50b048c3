"""Read a config: a YAML file, `section.key=value` overrides, validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    ValidationError,
)

from fastpref.config.messages import ConfigError, one_line
from fastpref.config.schema import Config
from fastpref.config.yaml_io import parse_yaml


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML config, apply `section.key=value` overrides, and validate.

    Raises ConfigError, one line, for a missing file, broken YAML, or the first invalid field.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the config ({error.strerror}); name a YAML file"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; write the config as YAML in UTF-8") from None
    try:
        values = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # e.g. a number of many digits
        raise ConfigError(
            f"{path}: not valid YAML; mend it: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold sections such as model, data and loss")
    for override in overrides or []:
        _apply_override(values, override)
    return parse(values)


def parse(values: dict[str, Any]) -> Config:
    """Validate nested dictionaries; raises ConfigError naming the first field at fault."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(one_line(error)) from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, sign, text = override.partition("=")
    keys = path.split(".")
    if not sign or not all(keys):
        raise ConfigError(f"override {override!r}: must look like section.key=value")
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    for depth, key in enumerate(keys[:-1]):
        inner = values.get(key)
        if isinstance(inner, str) and key in ("loss", "adapter", "calibration") and depth == 0:
            inner = {"name": inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"override {override!r}: {'.'.join(keys[: depth + 1])} is a value; "
                "name a key that is there"
            )
        values[key] = inner
        values = inner
    values[keys[-1]] = value
