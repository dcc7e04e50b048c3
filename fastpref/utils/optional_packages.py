"""Checks for packages that only some options need."""

from __future__ import annotations

from importlib.util import find_spec

from fastpref.utils.errors import UserError


class MissingPackage(UserError):
    """The package of an option is not installed."""


def has(package: str) -> bool:
    """Whether a package is installed; `package` is its name on PyPI."""
    return find_spec(package.replace("-", "_")) is not None


def require(package: str, option: str) -> None:
    """Raise MissingPackage with the pip command if the package is not installed."""
    if not has(package):
        raise MissingPackage(f"{option} needs {package}; pip install {package}")
