"""Translation of a config that was written for TRL, axolotl or torchtitan."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastpref.config.foreign_keys import (
    KEYS,
    OPTIMIZERS,
    TORCHTITAN,
    TORCHTITAN_SECTIONS,
    Counterpart,
)
from fastpref.config.schema import Config, inner_section
from fastpref.utils.errors import shown

# Sections that other trainers give a plain value, and the key that takes the value here.
_OF_SECTIONS = {
    "model": Counterpart("model.path", "a folder or a Hub name"),
    "data": Counterpart("data.train", "one file or Hub name"),
    "optim": Counterpart("optim.name", OPTIMIZERS),
}
_QLORA = Counterpart("adapter.quantize", "adapter: {name: lora, quantize: nf4}")


class ForeignKey(NamedTuple):
    """A key of another trainer in a config."""

    path: str
    origin: str  # a phrase such as "a key of TRL"
    counterpart: Counterpart


def translation(values: dict[str, Any]) -> str:
    """Return one line about all keys of other trainers in a config; empty if it has none.

    The first key is explained, the others are listed with their counterparts.
    """
    keys = foreign_keys(values)
    if not keys:
        return ""
    (path, origin, (ours, advice)), *others = keys
    pairs = [f"{key.path} → {key.counterpart.path}" for key in others if key.counterpart.path]
    without = [key.path for key in others if not key.counterpart.path]
    also = f"; also: {', '.join(pairs)}" if pairs else ""
    also += f"; remove: {', '.join(without)}" if without else ""
    if ours:
        detail = f" ({advice})" if advice else ""
        return f"{path}: {origin}; set {ours} here{detail}{also}"
    return f"{path}: {origin}; there is none here, remove it: {advice}{also}"


def foreign_keys(values: dict[str, Any]) -> list[ForeignKey]:
    """Return the keys of other trainers in a config, in its order."""
    sections = {name: inner_section(field) for name, field in Config.model_fields.items()}
    keys: list[ForeignKey | None] = []
    for name, value in values.items():
        section = sections.get(name)
        if name not in sections:
            keys += _at_top(name, value)
        elif name == "loss":
            items = value if isinstance(value, list) else [value]
            keys += [
                _nested("loss", key) for item in items if isinstance(item, dict) for key in item
            ]
        elif section is not None and isinstance(value, dict):
            keys += [_nested(name, key) for key in value if key not in section.model_fields]
        elif section is not None:
            keys.append(_instead_of_section(name, value))
    return [key for key in keys if key is not None]


def _at_top(name: Any, value: Any) -> list[ForeignKey | None]:
    """Return a key that no fastpref config has, and the foreign keys in it."""
    nested = [_nested(name, key) for key in value] if isinstance(value, dict) else []
    if name in TORCHTITAN_SECTIONS and (nested or name not in KEYS):
        section = ForeignKey(name, "a section of torchtitan", TORCHTITAN_SECTIONS[name])
        return nested or [section]
    if name in KEYS:
        trainers, counterpart = KEYS[name]
        return [ForeignKey(name, f"a key of {trainers}", counterpart), *nested]
    return nested


def _nested(section: Any, key: Any) -> ForeignKey | None:
    """Return a key of a section, of ours or of theirs; None if no other trainer has it."""
    path = f"{section}.{key}"
    if path in TORCHTITAN:
        return ForeignKey(path, "a key of torchtitan", TORCHTITAN[path])
    if section in TORCHTITAN_SECTIONS:
        return ForeignKey(path, "a key of torchtitan", TORCHTITAN_SECTIONS[section])
    if key in KEYS:
        trainers, counterpart = KEYS[key]
        # Some keys of TRL are parameters of objectives here, such as loss.beta.
        if counterpart.path != path:
            return ForeignKey(path, f"a key of {trainers}", counterpart)
    return None


def _instead_of_section(name: str, value: Any) -> ForeignKey | None:
    """Return a section that has a plain value, such as `optim: adamw_torch`."""
    if name == "adapter" and value == "qlora":
        return ForeignKey(name, "qlora is a name of axolotl", _QLORA)
    if isinstance(value, str) or (isinstance(value, list) and name == "data"):
        counterpart = _OF_SECTIONS.get(name)
        if counterpart is not None:
            return ForeignKey(name, f"must be a mapping, got {shown(value)}", counterpart)
    return None
