"""Description of the environment (device, versions, commit) that result files record."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastpref.utils.version import __version__

_ROOT = Path(__file__).resolve().parents[2]


def describe(device: str | None = None) -> dict[str, Any]:
    """Device, threads, versions and commit; `device` defaults to the GPU if there is one."""
    cuda = torch.cuda.is_available() if device is None else device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu(),
        "threads": torch.get_num_threads(),
        "versions": {
            "fastpref": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": package_version("triton"),
        },
        "commit": _commit(),
    }


def package_version(name: str) -> str | None:
    """Version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _commit() -> str | None:
    # An installed package may lie inside an unrelated repository.
    if not (_ROOT / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None
