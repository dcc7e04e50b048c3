"""Tests of liger-kernel's chunked losses and linear cross entropy, with `fastpref.fused` inside.

python -m benchmarks.peer_suites liger FOLDER [--full] [--out FILE] [--select EXPRESSION]

FOLDER is a checkout of github.com/linkedin/Liger-Kernel, whose tests run against the installed
liger-kernel. The module is a plugin of pytest as well: it replaces the losses in liger-kernel's
modules before the tests import them. Without a GPU half-precision GEMMs are computed in fp32, and
the shape of 1024 by 4096 has an eighth of both unless `--full`, which takes hours there.
"""

from __future__ import annotations

import argparse
import os
from importlib import import_module, metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.peer_suites import suite

NAMES = ("DPO", "CPO", "SimPO", "ORPO", "KTO", "JSD")
TESTS = (
    *(f"test/chunked_loss/test_{name.lower()}_loss.py" for name in NAMES),
    "test/transformers/test_fused_linear_cross_entropy.py",
)
OUT = suite.RESULTS / "peer-suites-liger.json"
_FULL = "FASTPREF_PEER_FULL"
_LARGE = {"H": 1024, "V": 4096}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.peer_suites liger", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full", action="store_true", help="all shapes as they are, on a CPU too")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--select", default="", help="expression of pytest -k")
    options = parser.parse_args(arguments)
    # Their `torch.compile` functions run as they stand.
    environment = {"TORCHDYNAMO_DISABLE": "1", _FULL: "1" if options.full else ""}
    result = suite.run(
        options.folder, TESTS, "benchmarks.peer_suites.liger", environment, ["-k", options.select]
    )
    suite.write(_about(options.full) | result, options.out)


def _about(full: bool) -> dict[str, Any]:
    import torch

    gpu = torch.cuda.is_available()
    return {
        "version": metadata.version("liger-kernel"),
        "torch": torch.__version__,
        "device": "cuda" if gpu else "cpu",
        "large_shapes": "full" if full or gpu else "an eighth of H and V",
    }


def pytest_configure() -> None:
    import torch

    _replace_chunked_losses()
    _replace_cross_entropy()
    if not torch.cuda.is_available():
        from benchmarks.peer_suites.on_cpu import OnCpu

        OnCpu().__enter__()


def pytest_collection_modifyitems(items: list[Any]) -> None:
    import torch

    if os.environ[_FULL] or torch.cuda.is_available():
        return
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if _LARGE.items() <= parameters.items():
            parameters.update({name: size // 8 for name, size in _LARGE.items()})


def _replace_chunked_losses() -> None:
    from fastpref.fused import liger
    from fastpref.fused.liger import functional as ours

    chunked, functional = (
        import_module(f"liger_kernel.{name}")
        for name in ("chunked_loss", "chunked_loss.functional")
    )
    for name in NAMES:
        module = import_module(f"liger_kernel.chunked_loss.{name.lower()}_loss")
        loss = getattr(liger, f"LigerFusedLinear{name}Loss")
        function = getattr(ours, f"liger_fused_linear_{name.lower()}")
        setattr(module, f"LigerFusedLinear{name}Loss", loss)
        setattr(chunked, f"LigerFusedLinear{name}Loss", loss)
        setattr(module, f"LigerFusedLinear{name}Function", SimpleNamespace(apply=function))
        setattr(functional, f"liger_fused_linear_{name.lower()}", function)


def _replace_cross_entropy() -> None:
    from fastpref.fused import liger
    from fastpref.fused.liger.functional import liger_fused_linear_cross_entropy

    def all_outputs(*arguments: Any) -> tuple[Any, ...]:
        """The four outputs of liger's autograd function."""
        output = liger_fused_linear_cross_entropy(*arguments)
        if isinstance(output, liger.CrossEntropyOutput):
            return tuple(vars(output).values())
        return output, None, None, None

    replacements: dict[str, dict[str, Any]] = {
        "transformers.functional": {
            "CrossEntropyOutput": liger.CrossEntropyOutput,
            "liger_fused_linear_cross_entropy": liger_fused_linear_cross_entropy,
        },
        "transformers.fused_linear_cross_entropy": {
            "LigerFusedLinearCrossEntropyLoss": liger.LigerFusedLinearCrossEntropyLoss
        },
        "ops": {"LigerFusedLinearCrossEntropyFunction": SimpleNamespace(apply=all_outputs)},
    }
    for module, attributes in replacements.items():
        for name, value in attributes.items():
            setattr(import_module(f"liger_kernel.{module}"), name, value)
