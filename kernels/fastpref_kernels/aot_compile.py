"""Compile every kernel in every configuration ahead of time, on a machine without a GPU.

    python -m fastpref_kernels.aot_compile [--arch 80,90,100] [--only NAME] [--out FILE]
                                           [--thorough]

One row per kernel, variant, dtype and tile shape: registers a thread, bytes of spills and of
shared memory, and the matrix instruction that the code uses. The exit status is 1 when a row
spills, needs more shared memory than the device has, misses its matrix instruction or does not
compile.
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

from fastpref_kernels.aot_kernels import (
    ARGUMENT_TYPES,
    ATTENTION_KERNELS,
    CONFIGS,
    GEMM_KERNELS,
    INPUTS,
    KERNELS,
    LOSS_KERNELS,
    ROW_KERNELS,
    is_usual,
    row_config,
)
from fastpref_kernels.common.configs import (
    FP_FUSION,
    GROUP_T,
    MERGE_PANELS,
    SHARED_MEMORY_LIMIT,
    AttentionConfig,
    GemmConfig,
    RowConfig,
    attention_configs,
    gemm_configs,
)
from fastpref_kernels.losses.inputs import LOSSES

MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}


class Job(NamedTuple):
    """One compilation."""

    kernel: str
    variant: str
    dtype: str
    config: GemmConfig | RowConfig | AttentionConfig
    arch: int


class Row(NamedTuple):
    """Result of one compilation."""

    job: Job
    registers: int
    spills: int
    shared: int
    instruction: bool | None  # None for a kernel without a GEMM
    error: str = ""

    def problems(self) -> list[str]:
        """Reasons why this row fails; empty if it passes."""
        reasons = [self.error] if self.error else []
        if self.spills:
            reasons.append("spills")
        if self.shared > SHARED_MEMORY_LIMIT[self.job.arch]:
            reasons.append("shared memory")
        if self.instruction is False:
            reasons.append(f"no {MATRIX_INSTRUCTION[self.job.arch]}")
        return reasons


def jobs(arches: list[int], only: str | None, thorough: bool = False) -> Iterator[Job]:
    """Every compilation of the given architectures, or of a single kernel.

    thorough: attention at every head size with every option, not only `is_usual` ones.
    """
    for arch in arches:
        for name, kernel in GEMM_KERNELS.items():
            if only not in (None, name):
                continue
            for variant, dtype in itertools.product(kernel.variants, ("bf16", "fp32")):
                for config in CONFIGS.get(name, gemm_configs)(arch, 4 if dtype == "fp32" else 2):
                    yield Job(name, variant, dtype, config, arch)
        for name, kernel in ROW_KERNELS.items():
            if only not in (None, name):
                continue
            for variant in kernel.variants:
                yield Job(name, variant, "bf16", row_config(name, variant), arch)
        for name, kernel in LOSS_KERNELS.items():
            if only not in (None, name):
                continue
            for variant in kernel.variants:
                yield Job(name, variant, "fp32", LOSSES, arch)
        for name, (kernel, field) in ATTENTION_KERNELS.items():
            if only not in (None, name):
                continue
            for variant, dtype in itertools.product(kernel.variants, ("bf16", "fp32")):
                constants = kernel.variants[variant]
                configs = attention_configs(
                    arch, 4 if dtype == "fp32" else 2, constants["SIZE"], "softcap" not in constants
                )
                tiles = getattr(configs, field)
                if "values alone" in variant:
                    tiles = configs.dv
                is_apart = field == "dkv" and configs.dv is not None
                is_launched = tiles is not None and is_apart == ("alone" in variant)
                is_chosen = thorough and (dtype == "bf16" or constants["SIZE"] in (64, 128))
                if is_launched and (is_chosen or is_usual(variant, dtype)):
                    yield Job(name, variant, dtype, tiles, arch)


def source(job: Job) -> ASTSource:
    """The kernel with the argument types and constants of this job's launch."""
    kernel = KERNELS[job.kernel]
    names = kernel.function.arg_names
    config = job.config
    constants = dict(kernel.variants[job.variant])
    constants["BLOCK_P"] = MERGE_PANELS
    if isinstance(config, AttentionConfig):
        constants |= {"BLOCK_Q": config.block_q, "BLOCK_K": config.block_k}
    else:
        constants |= dict.fromkeys(("BLOCK_T", "BLOCK", "BLOCK_Q"), config.block_t)
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
        if (
            kind.startswith("*")
            and not kernel.function.params[index].do_not_specialize_on_alignment
        )
        or (kind == "i32" and (name[0] == "D" or name.startswith("stride")))
    }
    return ASTSource(kernel.function, signature, constants, attributes)


def compile_job(job: Job) -> Row:
    """Compile for the job's architecture and read the resources from the machine code."""
    options: dict[str, Any] = {"num_warps": job.config.num_warps}
    options["enable_fp_fusion"] = FP_FUSION
    if not isinstance(job.config, RowConfig):
        options["num_stages"] = job.config.num_stages
    try:
        target = GPUTarget("cuda", job.arch, 32)
        binary = triton.compile(source(job), target=target, options=options)
    except Exception as error:  # every stage of the compiler has exceptions of its own
        return Row(job, 0, 0, 0, None, " ".join(f"{type(error).__name__}: {error}".split())[:80])
    registers, spills = resources(binary.asm["cubin"])
    instruction = None
    if job.kernel in GEMM_KERNELS or (job.kernel in ATTENTION_KERNELS and job.dtype == "bf16"):
        instruction = MATRIX_INSTRUCTION[job.arch] in binary.asm["ptx"]
    return Row(job, registers, spills, binary.metadata.shared, instruction)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack: registers spill there."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.findall(rf"{key}:(\d+)", text)[-1]) for key in ("REG", "STACK"))
    return registers, stack


def tile(c: GemmConfig | AttentionConfig) -> str:
    """The shape of a tile, warps and stages."""
    blocks = (c.block_t, c.block_v, c.block_d) if isinstance(c, GemmConfig) else c[:2]
    return f"{'x'.join(map(str, blocks))}, {c.num_warps}, {c.num_stages}"


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| arch | kernel | variant | dtype | t x v x d or q x k, warps, stages "
        "| registers | spills | shared | matrix instruction | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        job, c = row.job, row.job.config
        shape = f"{c.block_t}, {c.num_warps}" if isinstance(c, RowConfig) else tile(c)
        instruction = {None: "", True: MATRIX_INSTRUCTION[job.arch], False: "none"}[row.instruction]
        lines.append(
            f"| {job.arch} | {job.kernel} | {job.variant} | {job.dtype} | {shape} "
            f"| {row.registers} | {row.spills} | {row.shared} | {instruction} "
            f"| {', '.join(row.problems())} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastpref_kernels.aot_compile", description=__doc__
    )
    parser.add_argument("--arch", default="80,90,100", help="comma-separated, of 80, 90, 100")
    parser.add_argument("--only", help="a single kernel, by name")
    parser.add_argument(
        "--thorough", action="store_true", help="attention at every head size with every option"
    )
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: unset it, the interpreter compiles nothing")
    arches = arguments.arch.split(",")
    if unknown := set(arches) - {str(arch) for arch in MATRIX_INSTRUCTION}:
        parser.error(f"--arch must name some of 80, 90, 100, got {', '.join(sorted(unknown))}")
    todo = list(jobs([int(arch) for arch in arches], arguments.only, arguments.thorough))
    if not todo:
        parser.error(f"--only must be one of {', '.join(KERNELS)}, got {arguments.only}")
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
