"""The table of implementations, and the choice of the one that runs an op."""

import functools
import warnings
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.ops.backend import Backend


class Implementation(NamedTuple):
    name: str
    module: str  # has a BACKEND; that of the reference has the functions themselves
    devices: frozenset[str] | None  # device types on which "auto" takes it; None means all
    dtypes: frozenset[torch.dtype] | None = None  # of hidden; None means any
    optional: bool = False  # the module has unavailable_reason(device) -> str, empty if it can run


# In the order in which "auto" tries them.
TABLE = (
    Implementation(
        "cpu", "fastpref.ops.cpu", frozenset({"cpu"}), frozenset({torch.float32}), optional=True
    ),
    Implementation(
        "triton",
        "fastpref_kernels",
        frozenset({"cuda"}),
        frozenset({torch.float16, torch.bfloat16, torch.float32}),
        optional=True,
    ),
    Implementation("chunked", "fastpref.ops.chunked", None),
    Implementation("reference", "fastpref.ops.reference", None),
)


def choose(impl: str, device: str, dtype: torch.dtype) -> Implementation:
    """Row of TABLE for `impl`, a name or "auto", and inputs on a type of device.

    Raises ValueError for an `impl` that does not exist or cannot take such inputs. Where "auto"
    passes over a compiled implementation that is made for such inputs, it warns once.
    """
    passed_over: dict[str, str] = {}  # reasons by name
    for row in TABLE:
        if impl == "auto" and (row.devices is None or device in row.devices):
            reason = _unavailable_reason(row, device, dtype)
            if not reason:
                for name, why in passed_over.items():
                    _warn_once(f"impl: 'auto' takes {row.name!r} on {device}: {name!r} {why}")
                return row
            if _takes(row, dtype):
                passed_over[row.name] = reason
        elif impl == row.name:
            reason = _unavailable_reason(row, device, dtype)
            if reason:
                raise ValueError(f"impl: {impl!r} {reason}, or use impl='auto'")
            return row
    names = [repr(row.name) for row in TABLE if not _unavailable_reason(row, device, dtype)]
    raise ValueError(f"impl: expected 'auto' or one of {', '.join(names)}, got {impl!r}")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def backend_for(impl: str, hidden: Tensor) -> Backend:
    """The backend of the implementation that `choose` returns for inputs like `hidden`."""
    row = choose(impl, hidden.device.type, hidden.dtype)
    backend: Backend = import_module(row.module).BACKEND
    return backend


def _unavailable_reason(row: Implementation, device: str, dtype: torch.dtype) -> str:
    """Reason why `row` cannot take such inputs, and what would help; empty if it can."""
    if not _takes(row, dtype):
        assert row.dtypes is not None
        accepted = ", ".join(sorted(str(dtype) for dtype in row.dtypes))
        return f"takes {accepted}, got {dtype}; cast the inputs"
    if not row.optional:
        return ""
    reason: str = import_module(row.module).unavailable_reason(device)
    return reason


def _takes(row: Implementation, dtype: torch.dtype) -> bool:
    return row.dtypes is None or dtype in row.dtypes
