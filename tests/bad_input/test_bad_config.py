"""Configs: every field with values that it cannot have, and contradictions, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastpref import losses
from fastpref.config import ConfigError, parse
from fastpref.docgen.config import rows
from tests.bad_input.command import BASE, Case, Shell, advises, laid_over
from tests.bad_input.configs import CASES

JUNK = [None, "", -1, 10**400, [float("nan")], {"a": 1}]
FIELDS = [row.path for row in rows()]
PARAMETERS = [
    (name, parameter)
    for name in losses.names()
    for parameter in (*losses.describe(name).defaults, "label_smoothing", "f_divergence", "wpo")
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_config_that_is_refused(shell: Shell, case: Case) -> None:
    shell.meet(case)


def decided(shell: Shell, config: dict[str, Any], about: str) -> None:
    """The config is taken, or refused in a line that names the field."""
    shell.prepare(Case("any", None, config))
    outcome = shell("train", "c.yaml", "--dry-run")
    outcome.check(Case("any", "*" if outcome.code else None, config))
    assert outcome.code == 0 or about.split(".")[0] in outcome.err


@pytest.mark.parametrize("path", FIELDS)
@pytest.mark.parametrize("value", JUNK, ids=lambda value: str(value)[:8])
def test_any_value_in_any_field(shell: Shell, path: str, value: Any) -> None:
    section, _, name = path.partition(".")
    whole = laid_over(BASE, {})
    if name:
        whole.setdefault(section, {})[name] = value
    else:
        whole[section] = value
    decided(shell, whole, path)


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS)
def test_any_value_of_any_parameter(name: str, parameter: str) -> None:
    for value in ("x", None, -1, float("nan"), 10**400, [1], {}, True):
        try:
            parse(laid_over(BASE, {"loss": {"name": name, parameter: value}}))
        except ConfigError as error:
            assert str(error).startswith(("loss", "reference")) and "\n" not in str(error)
            assert advises(str(error))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(["model", "data", "loss", "optim"]) | st.text(), values))
def test_any_mapping(shell: Shell, config: dict[str, Any]) -> None:
    (shell.folder / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    shell("train", "c.yaml", "--dry-run").check(Case("any", "*"))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary() | st.text().map(str.encode))
def test_any_bytes(shell: Shell, content: bytes) -> None:
    (shell.folder / "c.yaml").write_bytes(content)
    shell("train", "c.yaml", "--dry-run").check(Case("any", "*"))
