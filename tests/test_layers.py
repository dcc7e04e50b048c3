"""Imports go one way, and heavy ones happen when they are needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "fastpref"
# A module may import from its own layer's modules and from those above it in this list.
LAYERS = [
    {"version", "errors", "files", "logps", "interrupts", "markdown", "packages"},
    {"ranks"},
    {"reference"},
    {"backend", "chunked", "cpu", "score_products"},
    {"implementations"},
    {"library"},
    {"ops"},
    {"losses"},
    {"band", "calibration", "projection"},
    {"config", "progress"},
    {"bench", "config_reference", "data", "objectives_reference"},
    {"attention", "profiling"},
    {"attribution", "generate", "metrics", "model", "monitors", "watch"},
    {"adapters", "layout", "liger_layers", "quantize", "sharding"},
    {"checkpoint", "fused", "model_card", "optim", "pretrained", "reference_logps", "run_lock"},
    {"forward", "prepare"},
    {"tally"},
    {"balance", "reference_point", "sample", "train", "update"},
    {"demo", "did_entropy", "estimate", "evaluate", "report"},
    {"reproduce"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(path: Path) -> set[str]:
    """Modules of fastpref that a file imports, by their first name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "fastpref":
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            found |= {parts[1] for parts in names if parts[0] == "fastpref" and len(parts) > 1}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    name = path.relative_to(ROOT).parts[0].removesuffix(".py")
    upwards = {other for other in imported(path) if LEVEL[other] > LEVEL[name]}
    assert not upwards, f"{name} imports {upwards}"


def test_losses_import_only_logps_and_their_base() -> None:
    for path in (ROOT / "losses").glob("*.py"):
        assert imported(path) <= {"logps", "losses"}


@pytest.mark.parametrize(
    "absent",
    [
        {  # in one process, which takes seconds to import torch; each after those before it
            "fastpref": ("torch", "transformers", "triton"),
            "fastpref.cli": ("torch", "transformers", "triton", "datasets"),
            "fastpref.losses": ("transformers", "triton", "pydantic"),
            "fastpref.ops": ("transformers", "triton", "fastpref_kernels"),
            "fastpref.fused": ("transformers", "triton", "trl", "liger_kernel"),
            "fastpref.config": ("transformers", "triton", "datasets"),
            "fastpref.bench.run": ("fastpref_kernels", "matplotlib", "trl", "liger_kernel"),
            "fastpref.train": ("fastpref_kernels", "matplotlib", "wandb", "peft"),
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
