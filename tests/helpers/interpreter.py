"""Triton's interpreter, with the rounding of a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


def round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter round fp32 to the nearest bf16, as GPUs do; it cuts the bits off."""
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) != (float32, bfloat16):
            return cut(values, source, target, rounding_mode)
        rounded = torch.from_numpy(np.array(values, np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
