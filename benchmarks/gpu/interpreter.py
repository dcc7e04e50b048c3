"""Triton's interpreter, with the rounding of a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def rounding_to_nearest(cut: Any) -> Any:
    """The interpreter's conversion of floats, but fp32 goes to the nearest bf16, as on GPUs.

    cut: `triton.runtime.interpreter._convert_float`, which cuts the bits off.
    """
    from triton.language import bfloat16, float32

    def convert(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) != (float32, bfloat16):
            return cut(values, source, target, rounding_mode)
        rounded = torch.from_numpy(np.array(values, np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    return convert


def round_to_nearest() -> None:
    """Let the interpreter of this process round as GPUs do."""
    from triton.runtime import interpreter

    interpreter._convert_float = rounding_to_nearest(interpreter._convert_float)
