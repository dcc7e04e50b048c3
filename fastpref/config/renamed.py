"""Earlier names of config keys, sections and values; they work until the next release."""

from __future__ import annotations

from typing import Any

from fastpref.config.errors import ConfigError

KEYS = {
    "training.output": "training.output_dir",
    "training.track": "training.report_to",
    "training.max_tokens": "training.micro_batch_tokens",
    "adapter.targets": "adapter.target_modules",
    "monitor.band": "monitor.band_every",
    "mesh.reshard": "parallel.reshard_after_forward",
    "mesh.offload": "parallel.cpu_offload",
}
SECTIONS = {"mesh": "parallel"}
VALUES = {
    "training.layout": {"shared": "prefix_shared", "flat": "packed"},
    "update": {"projected": "dpo_pg"},
}


def renamed(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of a config under their present names, and a note for each earlier name.

    Malformed values stay where they are, for validation to refuse. Raises ConfigError, naming
    both, where a key is set under its earlier and its present name.
    """
    result = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    notes: list[str] = []
    for old, new in KEYS.items():
        _rename_key(result, old, new, notes)
    for old, new in SECTIONS.items():
        _rename_section(result, old, new, notes)
    for path, names in VALUES.items():
        _rename_value(result, path, names, notes)
    return result, notes


def _rename_key(values: dict[str, Any], old: str, new: str, notes: list[str]) -> None:
    old_section, old_key = old.split(".")
    new_section, new_key = new.split(".")
    source, target = values.get(old_section), values.get(new_section, {})
    if not isinstance(source, dict) or not isinstance(target, dict) or old_key not in source:
        return
    if new_key in target:
        raise _set_twice(old, new)
    target[new_key] = source.pop(old_key)
    values[new_section] = target
    notes.append(_note(old, new))


def _rename_section(values: dict[str, Any], old: str, new: str, notes: list[str]) -> None:
    if old not in values:
        return
    source, target = values.pop(old), values.get(new, {})
    if isinstance(source, dict) and isinstance(target, dict):
        twice = [key for key in source if key in target]
        if twice:
            raise _set_twice(f"{old}.{twice[0]}", f"{new}.{twice[0]}")
        values[new] = {**target, **source}
    elif new in values:
        raise _set_twice(old, new)
    else:
        values[new] = source
    notes.append(_note(old, new))


def _rename_value(
    values: dict[str, Any], path: str, names: dict[str, str], notes: list[str]
) -> None:
    section, _, key = path.rpartition(".")
    fields = values.get(section) if section else values
    value = fields.get(key) if isinstance(fields, dict) else None
    if isinstance(fields, dict) and isinstance(value, str) and value in names:
        fields[key] = names[value]
        notes.append(_note(f"{path}: {value}", names[value]))


def _note(old: str, new: str) -> str:
    return f"{old} is now {new}; the old name works until the next release"


def _set_twice(old: str, new: str) -> ConfigError:
    return ConfigError(f"{old}: is an earlier name of {new}, and both are set; remove {old}")
