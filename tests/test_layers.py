"""Imports go one way, and heavy ones happen when they are needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastpref.docgen import architecture

ROOT = Path(__file__).parents[1] / "fastpref"
# A room, which is a folder or a module of the package, imports from its own line and those above.
LAYERS = (
    {"utils"},
    {"logps"},
    {"ops", "attention", "distributed"},
    {"trunk"},
    {"losses"},
    {"dynamics", "metrics"},
    {"config"},
    {"data"},
    {"bench", "docgen"},
    {"model"},
    {"plan"},
    {"training", "fused", "report"},
    {"evaluation"},
    {"online"},
    {"rounds"},
    {"demo", "reproduce"},
    {"cli"},
    {"__main__", "__init__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    name = architecture.room_of(path)
    upwards = {other for other in architecture.imported(path) if LEVEL[other] > LEVEL[name]}
    assert not upwards, f"{name} imports {upwards}"


def test_rooms_import_each_other_in_no_circle() -> None:
    """Within a line of LAYERS, too."""
    imports = architecture.arrows()
    rooms = imports.keys() - {architecture.KERNELS}
    level = [(a, b) for a in rooms for b in imports[a] if LEVEL[a] == LEVEL[b]]
    assert not {(b, a) for a, b in level} & set(level)


def test_losses_import_only_logps_their_base_and_what_every_room_may() -> None:
    for path in (ROOT / "losses").glob("*.py"):
        assert architecture.imported(path) <= {"logps", "losses", "utils"}


@pytest.mark.parametrize(
    "absent",
    [
        {  # in one process, which takes seconds to import torch; each after those before it
            "fastpref": ("torch", "transformers", "triton"),
            "fastpref.losses": ("torch", "transformers", "triton", "pydantic"),
            "fastpref.cli": ("torch", "transformers", "triton", "datasets"),
            "fastpref.config": ("torch", "transformers", "triton", "datasets"),
            "fastpref.ops": ("transformers", "triton", "fastpref_kernels"),
            "fastpref.trunk": ("transformers", "triton", "fastpref_kernels"),
            "fastpref.fused": ("transformers", "triton", "trl", "liger_kernel"),
            "fastpref.bench.runner": ("fastpref_kernels", "matplotlib", "trl", "liger_kernel"),
            "fastpref.training.trainer": ("fastpref_kernels", "matplotlib", "wandb", "peft"),
        },
        {"fastpref.report": ("transformers", "triton", "datasets")},
    ],
    ids=["one after the other", "report"],
)
def test_optional_and_heavy_imports_are_lazy(absent: dict[str, tuple[str, ...]]) -> None:
    code = (
        "import importlib, sys\n"
        f"for module, absent in {absent!r}.items():\n"
        "    importlib.import_module(module)\n"
        "    print(module, [m for m in absent if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        timeout=120,
    )
    assert done.stdout.splitlines() == [f"{module} []" for module in absent], done.stderr
