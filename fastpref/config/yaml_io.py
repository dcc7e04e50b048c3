"""Read and write YAML with the numbers of version 1.2, without dates and without repeated keys."""

from __future__ import annotations

import re
from typing import Any

import yaml

from fastpref.config.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Loader with the numbers of YAML 1.2 (`1e-5` is a number, `1:30` is text), without dates."""


_DROPPED = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value")
_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?[0-9][0-9_]*|0o[0-7]+|[-+]?0x[0-9a-fA-F_]+|[-+]?0b[01_]+",
    "tag:yaml.org,2002:float": r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9]+)"
    r"(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in (*_DROPPED, *_NUMBERS)]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), list("-+.0123456789"))


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    digits = str(loader.construct_scalar(node)).replace("_", "")
    return int(digits, 0 if re.match(r"[-+]?0[xbo]", digits) else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes text which this loader or one of YAML 1.1 reads as something else."""


for _tag, _pattern in _NUMBERS.items():
    _Dumper.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), list("-+.0123456789"))


def dump_yaml(values: Any) -> str:
    """Return values as YAML that `parse_yaml` reads, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str) -> Any:
    """Return the values of a YAML text.

    Raises yaml.YAMLError or ValueError for a text that is no YAML, and ConfigError for a key that
    is there twice and for a number that versions of YAML read differently.
    """
    return parse_document(text)[0]


def parse_document(text: str) -> tuple[Any, list[str]]:
    """Return the values as `parse_yaml` does, and the keys of the first level without a value."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        _check(node, (), set())
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        return loader.construct_document(node), [k.value for k, v in pairs if _is_blank(v)]
    finally:
        loader.dispose()


def _is_blank(node: yaml.Node) -> bool:
    """Whether nothing is written there; the value of `key: null` has a text."""
    return isinstance(node, yaml.ScalarNode) and node.value == "" and node.style is None


def _check(node: yaml.Node, path: tuple[str, ...], seen: set[int]) -> None:
    """Raise ConfigError for repeated keys and for ambiguous numbers, in `node` and below."""
    # A node that is named by an alias may hold itself.
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            _check(item, (*path, str(position)), seen)
    elif isinstance(node, yaml.MappingNode):
        keys: dict[Any, yaml.Node] = {}
        for key, value in node.value:
            first = keys.setdefault((key.tag, str(key.value)), key)
            inner = (*path, str(key.value))
            if first is not key:
                raise ConfigError(
                    f"{'.'.join(inner)}: is set twice, in lines {first.start_mark.line + 1} and "
                    f"{key.start_mark.line + 1}; remove one of them"
                )
            _check(value, inner, seen)
    # YAML 1.1 reads 010 as 8 and YAML 1.2 as 10.
    elif node.tag.endswith(":int") and re.fullmatch(r"[-+]?0[0-9_]+", str(node.value)):
        raise ConfigError(
            f"{'.'.join(path) or 'number'}: {node.value} has a leading zero, which is "
            "octal to some; write it without, or in quotes if it is text"
        )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with keys such as `optim.lr`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        flat |= inner if inner is not None else {f"{prefix}{key}": value}
    return flat
