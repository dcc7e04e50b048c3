"""Read a config: a YAML file, `section.key=value` overrides, validation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from fastpref.config.errors import ConfigError
from fastpref.config.fields import Section
from fastpref.config.foreign import translation
from fastpref.config.messages import one_line
from fastpref.config.renamed import renamed
from fastpref.config.schema import Config, inner_section
from fastpref.config.yaml_io import parse_document, parse_yaml

_Section = TypeVar("_Section", bound=Section)
_SHORT_FORMS = {"adapter": "adapter: lora", "calibration": "calibration: rc"}


def load(
    path: str | Path,
    overrides: list[str] | None = None,
    note: Callable[[str], object] | None = None,
) -> Config:
    """Read a YAML config, apply `section.key=value` overrides, and validate.

    note: called with one line for each key that the config sets under an earlier name.

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
        values, blank = parse_document(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # e.g. a number of many digits
        raise ConfigError(
            f"{path}: not valid YAML; fix it: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold sections such as model, data and loss")
    for override in overrides or []:
        _apply_override(values, override)
    for name, example in _SHORT_FORMS.items():
        # Someone who left the options of an adapter out does not mean to train all weights.
        if name in blank and values[name] is None:
            raise ConfigError(f"{name}: is empty; write {example}, or {name}: null for none")
    return parse(values, note)


def parse(values: dict[str, Any], note: Callable[[str], object] | None = None) -> Config:
    """Validate nested dictionaries; `note` as in `load`.

    Raises ConfigError naming the first invalid field, or the keys of another trainer.
    """
    values, notes = renamed(values)
    values = {name: _section(name, value) for name, value in values.items()}
    if note is not None:
        for text in notes:
            note(text)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(translation(values) or one_line(error)) from None


def parse_section(name: str, kind: type[_Section], values: dict[str, Any]) -> _Section:
    """Validate one section of a config alone; raises ConfigError as `parse` does."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(one_line(error, name)) from None


def _section(name: Any, value: Any) -> Any:
    """Return the value of a section, `{}` for one that is empty."""
    field = Config.model_fields.get(name)
    if value is not None or field is None or field.default is None:
        return value
    return {} if inner_section(field) else value


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, sign, text = override.partition("=")
    keys = path.split(".")
    if not sign or not all(keys):
        raise ConfigError(f"override {override!r}: must look like section.key=value")
    try:
        value = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"override {override!r}: {error}") from None
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
