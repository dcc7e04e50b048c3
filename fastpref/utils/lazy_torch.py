"""torch for modules that declare more than they compute: it is imported at its first use.

Importing torch takes seconds, and a config is checked against the objectives in a fraction of one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

if TYPE_CHECKING:
    import torch as torch
    from torch import Tensor as Tensor
else:
    Tensor = Any  # for annotations, which nothing evaluates

    class _Torch:
        """Stand-in for the module, which looks every name up in it."""

        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch, name)

    torch = _Torch()


def logsigmoid(x: Tensor) -> Tensor:
    """log S(x), elementwise."""
    return torch.nn.functional.logsigmoid(x)


def no_grad(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorator as `torch.no_grad`, which torch can only offer once it is imported."""

    @wraps(function)
    def without_gradient(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with torch.no_grad():
            return function(*args, **kwargs)

    return without_gradient
