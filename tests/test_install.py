"""The pinned versions install on other machines than this one, with the torch that PyPI serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11", "3.12", "3.13")
EXTRAS = ("gpu", "track", "dev")  # flash-attn has no wheels: it is built on the machine it is for


def pip(*arguments: str, empty: Path) -> subprocess.CompletedProcess[str]:
    """Run pip on the index alone: builds of torch that lie on this machine stay out of it."""
    environment = {
        **os.environ,
        "PIP_FIND_LINKS": str(empty),
        "PIP_EXTRA_INDEX_URL": empty.as_uri(),
        "PIP_CONSTRAINT": "",
    }
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def resolve(version: str, requirements: list[str], folder: Path) -> dict[str, Any]:
    """Resolve requirements under the pins for Linux and the first release of a Python version.

    Returns each package's metadata by name. Nothing is installed.
    """
    report = folder / "report.json"
    done = pip(
        *("install", "--dry-run", "--ignore-installed", "--only-binary=:all:", "--quiet"),
        *("--python-version", version, "--target", str(folder / "nowhere")),
        *("--report", str(report), "-c", str(ROOT / "constraints.txt"), *requirements),
        empty=folder,
    )
    assert done.returncode == 0, f"Python {version}: {done.stderr[-3000:]}"
    installs = json.loads(report.read_text())["install"]
    return {entry["metadata"]["name"].lower(): entry["metadata"] for entry in installs}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip where pip cannot ask the package index."""
    folder = tmp_path_factory.mktemp("index")
    done = pip("download", "--no-deps", "-d", str(folder / "d"), "typing_extensions", empty=folder)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        pytest.skip(f"the package index cannot be reached: {last}")


@pytest.mark.skipif(sys.platform != "linux", reason="the pins are those of Linux")
@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("version", PYTHONS)
def test_the_pins_resolve_with_the_torch_of_the_index(version: str, tmp_path: Path) -> None:
    """`pip install -c constraints.txt -e '.[…]'` finds versions that agree, triton's included."""
    extras = [name for extra in EXTRAS for name in PROJECT["optional-dependencies"][extra]]
    packages = resolve(version, [*PROJECT["dependencies"], *extras], tmp_path)
    torch = packages["torch"]
    assert "+cpu" not in torch["version"], "a build for CPU demands no triton and proves nothing"
    demanded = [need for need in torch["requires_dist"] if need.startswith("triton")]
    assert demanded and packages["triton"]["version"] in demanded[0]


def test_every_python_that_is_supported_is_resolved() -> None:
    assert PROJECT["requires-python"] == f">={PYTHONS[0]},<3.{int(PYTHONS[-1][2:]) + 1}"
