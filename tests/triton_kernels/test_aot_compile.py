"""The compile command: machine code for three GPUs on a machine without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from fastpref_kernels import aot_compile as command
from fastpref_kernels.aot_kernels import is_usual
from fastpref_kernels.common.configs import (
    SHARED_MEMORY_LIMIT,
    AttentionConfig,
    attention_configs,
    gemm_configs,
)
from fastpref_kernels.losses.registry import PAIR_OBJECTIVES, RESPONSE_OBJECTIVES

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, where the interpreter is off."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    return subprocess.run(
        [sys.executable, "-m", "fastpref_kernels.aot_compile", *arguments],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_every_kernel_compiles_for_every_architecture(tmp_path) -> None:
    """Run the whole command, which takes minutes: it proves that the code for a GPU exists."""
    out = tmp_path / "table.md"
    done = run("--jobs", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:] + "\n".join(problems(out))
    rows = [cells(row) for row in out.read_text().splitlines()[2:]]
    jobs = list(command.jobs([80, 90, 100], None))
    assert [(int(row[0]), *row[1:4]) for row in rows] == [
        (job.arch, job.kernel, job.variant, job.dtype) for job in jobs
    ]
    for arch, kernel, _, dtype, _, registers, spills, shared, instruction, *_ in rows:
        assert 0 < int(registers) <= 255 and spills == "0"
        assert int(shared) <= SHARED_MEMORY_LIMIT[int(arch)]
        products = {**command.GEMM_KERNELS, **command.ATTENTION_KERNELS}
        if arch == "90" and dtype == "bf16" and kernel in products:
            assert instruction == "wgmma"


SUMS = """
import itertools, re, triton
from triton.backends.compiler import GPUTarget
from fastpref_kernels import aot_compile as command
from fastpref_kernels.common.configs import MERGE, gemm_configs

def sums(name, variant, dtype, config, aligned):
    kernel = command.KERNELS[name].function
    source = command.source(command.Job(name, variant, dtype, config, 90))
    for index, parameter in enumerate(kernel.params):
        if aligned and parameter.name in "TV" and not parameter.do_not_specialize:
            source.attrs[index,] = [["tt.divisibility", 16]]
    options = {"num_warps": config.num_warps, "enable_fp_fusion": False}
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"]
    layouts = dict(re.findall(r"^(#[a-z0-9]+) = (.*)$", code, re.M))
    reduced = re.findall(r'"tt.reduce".*?\}\) : \((tensor<[^#]*)(#[a-z0-9]+)', code, re.S)
    return sorted({(shape, layouts[layout]) for shape, layout in reduced})

for dtype, size in (("bf16", 2), ("fp32", 4)):
    for name, config in (("linear_softmax_fwd", gemm_configs(90, size)[0]), ("merge_fwd", MERGE)):
        launches = itertools.product(("stats", "train"), [dtype], [config], (False, True))
        layouts = [sums(name, *launch) for launch in launches]
        assert layouts[0] and all(x == layouts[0] for x in layouts), (name, dtype, layouts)
"""


def test_sums_are_laid_out_alike_whatever_the_variant_and_the_number_of_rows() -> None:
    """Otherwise the last bit of a log-prob would depend on the mode and the number of tokens."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    done = subprocess.run(
        [sys.executable, "-c", SUMS], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def problems(table: Path) -> list[str]:
    """Rows of a table whose last column is not empty."""
    rows = table.read_text().splitlines()[2:] if table.exists() else []
    return [row for row in rows if cells(row)[-1]]


@pytest.mark.parametrize("arguments", [("--arch", "75"), ("--only", "softmax")])
def test_a_wrong_argument_is_named(arguments) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and arguments[0] in done.stderr.splitlines()[-1]


def test_problems_that_make_a_row_fail() -> None:
    job = command.Job("linear_dlogits", "plain", "bf16", gemm_configs(90, 2)[0], 90)
    good = command.Row(job, 200, 0, 1000, True)
    assert good.problems() == []
    assert good._replace(spills=8).problems() == ["spills"]
    assert good._replace(shared=SHARED_MEMORY_LIMIT[90] + 1).problems() == ["shared memory"]
    assert good._replace(instruction=False).problems() == ["no wgmma"]
    assert good._replace(error="does not compile").problems() == ["does not compile"]


def test_every_kernel_of_the_package_is_compiled() -> None:
    """A kernel that is in no table would never be checked."""
    sources = (ROOT / "kernels" / "fastpref_kernels").rglob("*.py")
    kernels = {
        line.split("def ")[1].split("(")[0]
        for source in sources
        for line in source.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    assert kernels == {kernel.function.fn.__name__ for kernel in command.KERNELS.values()}


def test_attention_is_compiled_at_every_head_size() -> None:
    """With all options where they need most registers; --thorough has every combination."""
    usual = [job.variant for job in command.jobs([90], "packed_attention_fwd")]
    assert usual == ["64", "80", "96", "128", "128", "128 window,softcap", "256 window,softcap"]
    thorough = list(command.jobs([90], "packed_attention_dkv", thorough=True))
    assert {job.config for job in thorough} >= set(tiles(90))
    # Gradients of keys and of values are apart at a head size of 256, as they are launched.
    assert [job.variant for job in thorough if is_usual(job.variant, job.dtype)][-2:] == [
        "256 window,softcap keys alone",
        "256 window,softcap values alone",
    ]


def tiles(arch: int) -> list[AttentionConfig]:
    """Tiles of the gradients of keys and values in half precision."""
    return [
        attention_configs(arch, 2, size, softcap).dkv
        for size in (64, 80, 96, 128, 256)
        for softcap in (False, True)
    ]


def test_every_objective_is_compiled_with_all_its_choices() -> None:
    variants = command.LOSS_KERNELS["pair_losses"].variants
    assert {variant.split()[0] for variant in variants} == set(PAIR_OBJECTIVES)
    assert {"f_dpo reverse_kl", "f_dpo js", "sft both False", "sft chosen True"} <= set(variants)
    assert set(command.LOSS_KERNELS["response_losses"].variants) == set(RESPONSE_OBJECTIVES)
