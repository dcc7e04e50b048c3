"""Triton's interpreter, with the rounding of a GPU."""

from __future__ import annotations

import pytest

from benchmarks.gpu.interpreter import rounding_to_nearest


def round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter round fp32 to the nearest bf16, as GPUs do; it cuts the bits off."""
    from triton.runtime import interpreter

    convert = rounding_to_nearest(interpreter._convert_float)
    monkeypatch.setattr(interpreter, "_convert_float", convert)
