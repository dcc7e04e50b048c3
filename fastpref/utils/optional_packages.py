"""Packages that only some options need."""

from __future__ import annotations

from importlib.util import find_spec

from fastpref.utils.errors import UserError


class MissingPackage(UserError):
    """An option whose package is not installed."""


def has(package: str) -> bool:
    """Whether a package, named as pip knows it, is installed."""
    return find_spec(package.replace("-", "_")) is not None


def require(package: str, option: str) -> None:
    """Raises MissingPackage, with the command that mends it, where the package is not installed."""
    if not has(package):
        raise MissingPackage(f"{option} needs {package}; pip install {package}")
