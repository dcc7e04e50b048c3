"""Forward and backward tests of cut-cross-entropy, with `fastpref.fused.cross_entropy` inside.

python -m benchmarks.peer_suites cce FOLDER [--out FILE] [--select EXPRESSION]

FOLDER is a checkout of github.com/apple/ml-cross-entropy. The module is a plugin of pytest as well:
it replaces `linear_cross_entropy` before the tests import it. Without a GPU the tests run on the
CPU, with half-precision GEMMs computed in fp32.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.peer_suites import suite

TESTS = ("tests/test_cce_loss_forward.py", "tests/test_cce_loss_backward.py")
OUT = suite.RESULTS / "peer-suites-cce.json"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.peer_suites cce", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--select", default="", help="expression of pytest -k")
    options = parser.parse_args(arguments)
    # Their `torch.compile` functions run as they stand.
    result = suite.run(
        options.folder, TESTS, "benchmarks.peer_suites.cce", {"TORCHDYNAMO_DISABLE": "1"},
        ["-k", options.select],
    )  # fmt: skip
    suite.write(_about(options.folder) | result, options.out)


def _about(folder: Path) -> dict[str, Any]:
    import torch

    version = folder / "cut_cross_entropy" / "__init__.py"
    return {
        "version": version.read_text().rpartition("__version__ = ")[2].strip().strip('"'),
        "torch": torch.__version__,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def pytest_configure() -> None:
    import cut_cross_entropy
    import torch

    from fastpref.fused import cross_entropy

    names = ("linear_cross_entropy", "LinearCrossEntropy", "LinearCrossEntropyImpl")
    for name in names:
        setattr(cut_cross_entropy, name, getattr(cross_entropy, name))
    if not torch.cuda.is_available():
        from benchmarks.peer_suites.on_cpu import OnCpu

        for name, replacement in (
            ("is_available", lambda: True),
            ("manual_seed", torch.manual_seed),
        ):
            setattr(torch.cuda, name, replacement)
        OnCpu().__enter__()
