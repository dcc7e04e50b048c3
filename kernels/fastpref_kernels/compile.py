"""Compile every kernel in every configuration ahead of time, on a machine without a GPU.

    python -m fastpref_kernels.compile [--arch 80,90,100] [--only NAME] [--out FILE]

One row per kernel, variant, dtype and tile shape: registers a thread, bytes of spills and of
shared memory, and which matrix instruction the code uses. The exit status is 1 when a row spills,
wants more shared memory than the device has, misses its matrix instruction or does not compile.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .configs import (
    DELTA,
    GROUP_T,
    MERGE,
    SHARED_MEMORY_LIMIT,
    GemmConfig,
    RowConfig,
    gemm_configs,
    pair_configs,
)
from .delta import delta_kernel, linear_delta_kernel
from .forward import linear_softmax_fwd_kernel, merge_fwd_kernel
from .linear_kl import kl_delta_kernel, linear_kl_fwd_kernel, merge_kl_kernel

MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
ARGUMENT_TYPES = {
    "labels": "*i64",
    "top1": "*u8",
    **dict.fromkeys(("T", "V", "D", "D_REF", "panels", "first"), "i32"),
    **dict.fromkeys(("logit_scale", "softcap"), "fp32"),
}
# Of the dtype under test; other pointers are fp32.
INPUTS = frozenset(["hidden", "weight", "ref_hidden", "ref_weight", "bias", "exps", "delta"])


class Kernel(NamedTuple):
    """A kernel and the sets of arguments that launchers leave out."""

    function: Any
    absent: dict[str, tuple[str, ...]]


class Job(NamedTuple):
    """One compilation."""

    kernel: str
    variant: str
    dtype: str
    config: GemmConfig | RowConfig
    arch: int


class Row(NamedTuple):
    """What came of it."""

    job: Job
    registers: int
    spills: int
    shared: int
    instruction: bool | None  # None for a kernel that multiplies no matrices
    error: str = ""

    def problems(self) -> list[str]:
        """Why this row fails, if it does."""
        found = [self.error] if self.error else []
        if self.spills:
            found.append("spills")
        if self.shared > SHARED_MEMORY_LIMIT[self.job.arch]:
            found.append("shared memory")
        if self.instruction is False:
            found.append(f"no {MATRIX_INSTRUCTION[self.job.arch]}")
        return found


GEMM_KERNELS = {
    "linear_softmax_fwd": Kernel(
        linear_softmax_fwd_kernel,
        {
            "stats": ("bias", "softcap", "exps", "block_max"),
            "stats,bias,softcap": ("exps", "block_max"),
            "train": ("bias", "softcap", "panel_dot"),
            "train,bias,softcap": ("panel_dot",),
        },
    ),
    "linear_kl_fwd": Kernel(linear_kl_fwd_kernel, {"plain": ("softcap",), "softcap": ()}),
    "kl_delta": Kernel(kl_delta_kernel, {"plain": ("softcap",), "softcap": ()}),
    "linear_delta": Kernel(linear_delta_kernel, {"plain": ("bias", "softcap"), "bias,softcap": ()}),
}
ROW_KERNELS = {
    "merge_fwd": Kernel(
        merge_fwd_kernel,
        {"stats": (), "train": ("panel_dot", "entropy", "top1")},
    ),
    "merge_kl": Kernel(merge_kl_kernel, {"plain": ()}),
    "delta": Kernel(delta_kernel, {"plain": ("softcap",), "softcap": ()}),
}
ROW_CONFIGS = {"merge_fwd": MERGE, "merge_kl": MERGE, "delta": DELTA}
PAIR_KERNELS = ("linear_kl_fwd", "kl_delta")


def jobs(arches: list[int], only: str | None) -> Iterator[Job]:
    """Every compilation there is."""
    for arch in arches:
        for name, kernel in GEMM_KERNELS.items():
            if only not in (None, name):
                continue
            for variant, dtype in itertools.product(kernel.absent, ("bf16", "fp32")):
                configs = pair_configs if name in PAIR_KERNELS else gemm_configs
                for config in configs(arch, 4 if dtype == "fp32" else 2):
                    yield Job(name, variant, dtype, config, arch)
        for name, kernel in ROW_KERNELS.items():
            if only not in (None, name):
                continue
            for variant in kernel.absent:
                yield Job(name, variant, "bf16", ROW_CONFIGS[name], arch)


def source(job: Job) -> ASTSource:
    """The kernel with the argument types and constants of this job's launch."""
    kernel = {**GEMM_KERNELS, **ROW_KERNELS}[job.kernel]
    names = kernel.function.arg_names
    config = job.config
    constants: dict[str, Any] = {name: None for name in kernel.absent[job.variant]}
    constants["BLOCK_T"] = config.block_t
    constants["BLOCK_E"] = gemm_configs(job.arch, 2)[0].block_e
    if isinstance(config, GemmConfig):
        constants |= {
            "BLOCK_V": config.block_v,
            "BLOCK_D": config.block_d,
            "PANEL_TILES": config.panel_tiles,
            "GROUP": GROUP_T,
            "USE_TMA": config.tma,
            "UPCAST": False,
        }
    constants = {name: value for name, value in constants.items() if name in names}

    def argument_type(name: str) -> str:
        if name in constants:
            return "constexpr"
        if isinstance(config, GemmConfig) and config.tma and name in config.blocks:
            rows, columns = config.blocks[name]
            return f"tensordesc<{job.dtype}[{rows}, {columns}]>"
        if name in INPUTS:
            return f"*{job.dtype}"
        if name.startswith("stride"):
            return "i32"
        return ARGUMENT_TYPES.get(name, "*fp32")

    signature = {name: argument_type(name) for name in names}
    divisible = [["tt.divisibility", 16]]
    attributes = {
        (index,): divisible
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and (name[0] == "D" or name.startswith("stride")))
    }
    return ASTSource(kernel.function, signature, constants, attributes)


def compile_job(job: Job) -> Row:
    """Compile for the job's architecture and read the resources off the machine code."""
    options = {"num_warps": job.config.num_warps, "enable_fp_fusion": True}
    if isinstance(job.config, GemmConfig):
        options["num_stages"] = job.config.num_stages
    try:
        target = GPUTarget("cuda", job.arch, 32)
        binary = triton.compile(source(job), target=target, options=options)
    except Exception as error:  # any stage of the compiler may be the one that gives up
        return Row(job, 0, 0, 0, None, " ".join(f"{type(error).__name__}: {error}".split())[:80])
    registers, spills = resources(binary.asm["cubin"])
    uses = MATRIX_INSTRUCTION[job.arch] in binary.asm["ptx"]
    return Row(
        job, registers, spills, binary.metadata.shared, uses if job.kernel in GEMM_KERNELS else None
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack, which is where registers spill."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.findall(rf"{key}:(\d+)", text)[-1]) for key in ("REG", "STACK"))
    return registers, stack


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| arch | kernel | variant | dtype | t x v x d, warps, stages "
        "| registers | spills | shared | matrix instruction | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        job, c = row.job, row.job.config
        shape = (
            f"{c.block_t}x{c.block_v}x{c.block_d}, {c.num_warps}, {c.num_stages}"
            if isinstance(c, GemmConfig)
            else f"{c.block_t}, {c.num_warps}"
        )
        instruction = {None: "", True: MATRIX_INSTRUCTION[job.arch], False: "none"}[row.instruction]
        lines.append(
            f"| {job.arch} | {job.kernel} | {job.variant} | {job.dtype} | {shape} "
            f"| {row.registers} | {row.spills} | {row.shared} | {instruction} "
            f"| {', '.join(row.problems())} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastpref_kernels.compile", description=__doc__)
    parser.add_argument("--arch", default="80,90,100", help="comma-separated, of 80, 90, 100")
    parser.add_argument("--only", help="a single kernel, by name")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time")
    parser.add_argument("--out", type=Path, help="write the table to this file, too")
    arguments = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: unset it, the interpreter compiles nothing")
    arches = arguments.arch.split(",")
    if unknown := set(arches) - {str(arch) for arch in MATRIX_INSTRUCTION}:
        parser.error(f"--arch must name some of 80, 90, 100, got {', '.join(sorted(unknown))}")
    todo = list(jobs([int(arch) for arch in arches], arguments.only))
    if not todo:
        names = ", ".join((*GEMM_KERNELS, *ROW_KERNELS))
        parser.error(f"--only must be one of {names}, got {arguments.only}")
    with ProcessPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(compile_job, todo))
    text = table(rows)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    failed = [row for row in rows if row.problems()]
    print(f"{len(rows)} compiled, {len(failed)} with problems", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
