"""Read YAML with the numbers of version 1.2 and without dates."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Loader with the numbers of YAML 1.2 (`1e-5` is a number) and without dates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Return the values of a YAML text."""
    return yaml.load(text, _Loader)  # noqa: S506 – it is a SafeLoader


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with keys such as `optim.lr`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        flat |= inner if inner is not None else {f"{prefix}{key}": value}
    return flat
