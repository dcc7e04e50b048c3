"""TRL's tests of its preference trainers, with those of `fastpref.fused.trl` in their place.

python -m benchmarks.peer_suites trl FOLDER [--out FILE] [--select EXPRESSION]

FOLDER is a checkout of github.com/huggingface/trl, whose tests run against the installed TRL: once
with its own trainers, and once with ours. The models and data sets of the Hub are made here
(`benchmarks.peer_suites.stand_ins`). Tests of vision-language models are left out, and without a
GPU those of liger's layers. The module is a plugin of pytest as well, which replaces the trainers
before the tests import them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peer_suites import stand_ins, suite
from fastpref.docgen import markdown

TRAINERS = {
    "trl": ("DPOTrainer", "KTOTrainer"),
    "trl.experimental.cpo": ("CPOTrainer",),
    "trl.experimental.orpo": ("ORPOTrainer",),
}
TESTS = (
    "tests/test_dpo_trainer.py",
    "tests/test_kto_trainer.py",
    "tests/experimental/test_cpo_trainer.py",
    "tests/experimental/test_orpo_trainer.py",
)
LEFT_OUT = ("vlm", "vision", "Vision")
LEFT_OUT_ON_CPU = ("liger",)
OUT = suite.RESULTS / "peer-suites.json"
# Names that tests of TRL before 1.16 import and 1.16 has not.
_GONE = ("is_joblib_available", "is_mergekit_available", "is_openreward_available")
VARIANTS = ("plain", "fused")
_OUTCOMES = ("passed", "failed", "skipped")
_FOLDER, _FUSED = "FASTPREF_STAND_INS", "FASTPREF_FUSED_TRAINERS"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.peer_suites trl", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--select", default="", help="expression of pytest -k, to run a part")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        stand_ins.make(Path(folder))
        results = {name: _run(options.folder, folder, name, options.select) for name in VARIANTS}
    plain, fused = (results[name]["failed"] for name in VARIANTS)
    only_fused = {name: message for name, message in fused.items() if name not in plain}
    report = _about(options.folder) | results | {"fails_only_fused": only_fused}
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    options.out.write_text(text, encoding="utf-8")
    print(table(report))
    for name, message in only_fused.items():
        print(f"fails with our trainers only: {name}: {message}")
    print(f"written: {options.out}")


def table(report: dict[str, Any]) -> str:
    """Numbers of tests that pass with TRL's trainers and with ours, by file."""
    plain, fused = (report[name]["files"] for name in VARIANTS)
    rows = [[f"`{file}`", *_numbers(counts, fused[file])] for file, counts in plain.items()]
    total = [{n: sum(c[n] for c in part.values()) for n in _OUTCOMES} for part in (plain, fused)]
    columns = ("tests", "pass with TRL's trainer", "pass with ours", "fail with both", "skipped")
    return markdown.table(columns, [*rows, ["all", *_numbers(*total)]])


def _numbers(plain: dict[str, int], fused: dict[str, int]) -> list[str]:
    both = min(plain["failed"], fused["failed"])
    return [str(n) for n in (plain["passed"], fused["passed"], both, plain["skipped"])]


def _run(tests: Path, folder: str, variant: str, select: str) -> suite.Result:
    environment = {
        _FOLDER: folder,
        _FUSED: str(int(variant == "fused")),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": f"{folder}/cache-{variant}",
        "HF_MODULES_CACHE": f"{folder}/modules",
        "TQDM_DISABLE": "1",
    }
    left_out = LEFT_OUT if torch.cuda.is_available() else LEFT_OUT + LEFT_OUT_ON_CPU
    expression = f"not ({' or '.join(left_out)})" + (f" and ({select})" if select else "")
    return suite.run(
        tests.resolve(), TESTS, "benchmarks.peer_suites.trl", environment, ["-k", expression]
    )


def _about(folder: Path) -> dict[str, Any]:
    names = ("trl", "transformers", "peft", "torch")
    version = folder / "VERSION"
    return {
        "versions": {name: metadata.version(name) for name in names},
        "tests_of": version.read_text().strip() if version.exists() else "unknown",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def pytest_configure() -> None:
    import_utils = import_module("trl.import_utils")
    for name in _GONE:
        if not hasattr(import_utils, name):
            setattr(import_utils, name, lambda: False)
    if os.environ[_FUSED] == "0":
        return
    from fastpref.fused.trl import fused

    for path, names in TRAINERS.items():
        module = import_module(path)
        for name in names:
            setattr(module, name, fused(getattr(module, name)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    # Names of the Hub are folders here.
    os.chdir(os.environ[_FOLDER])
