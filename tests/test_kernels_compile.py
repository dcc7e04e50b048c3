"""The compile command: real machine code for three GPUs on a machine that has none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from fastpref_kernels import compile as command
from fastpref_kernels.configs import SHARED_MEMORY_LIMIT, gemm_configs

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, where the interpreter is off."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    return subprocess.run(
        [sys.executable, "-m", "fastpref_kernels.compile", *arguments],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_recomputation_compiles_for_hopper(tmp_path) -> None:
    out = tmp_path / "table.md"
    done = run("--arch", "90", "--only", "linear_delta", "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = out.read_text().splitlines()[2:]
    assert len(rows) == 6  # two variants, two bf16 configurations and one fp32
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1] == "linear_delta" and cells[6] == "0" and cells[8] == "wgmma"
        assert 0 < int(cells[5]) <= 255 and 0 < int(cells[7]) <= SHARED_MEMORY_LIMIT[90]


@pytest.mark.parametrize("arguments", [("--arch", "75"), ("--only", "softmax")])
def test_a_wrong_argument_is_named(arguments) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and arguments[0] in done.stderr.splitlines()[-1]


def test_what_makes_a_row_fail() -> None:
    job = command.Job("linear_delta", "plain", "bf16", gemm_configs(90, 2)[0], 90)
    good = command.Row(job, 200, 0, 1000, True)
    assert good.problems() == []
    assert good._replace(spills=8).problems() == ["spills"]
    assert good._replace(shared=SHARED_MEMORY_LIMIT[90] + 1).problems() == ["shared memory"]
    assert good._replace(instruction=False).problems() == ["no wgmma"]
    assert good._replace(error="does not compile").problems() == ["does not compile"]


def test_every_kernel_of_the_package_is_compiled() -> None:
    """A kernel in a source file but in no table would never be checked."""
    sources = (ROOT / "kernels" / "fastpref_kernels").glob("*.py")
    written = {
        line.split("def ")[1].split("(")[0]
        for source in sources
        for line in source.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    tables = {**command.GEMM_KERNELS, **command.ROW_KERNELS}
    assert written == {kernel.function.fn.__name__ for kernel in tables.values()}
