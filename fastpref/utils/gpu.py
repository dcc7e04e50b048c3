"""Whether a machine certainly has no GPU, without importing torch."""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.metadata import PackageNotFoundError, version


def has_no_gpu() -> bool:
    """Whether torch would find no GPU; False where only torch can tell."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return True
    try:
        build = version("torch").partition("+")[2]
    except PackageNotFoundError:
        return False
    if build == "cpu":
        return True
    if sys.platform != "linux" or build.startswith(("rocm", "xpu")):
        return False
    try:
        ctypes.CDLL("libcuda.so.1")  # the driver's, which no wheel brings
    except OSError:
        return True
    return False
