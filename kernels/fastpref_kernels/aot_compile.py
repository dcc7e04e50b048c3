"""Compile every kernel in every configuration ahead of time, on a machine without a GPU.

    python -m fastpref_kernels.aot_compile [--arch 80,90,100] [--only NAME] [--out FILE]

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

from fastpref_kernels.common.configs import (
    FP_FUSION,
    GROUP_T,
    LABEL_LOGITS,
    MERGE,
    MERGE_KL,
    MERGE_PANELS,
    SCORE_FOLD,
    SHARED_MEMORY_LIMIT,
    GemmConfig,
    RowConfig,
    gemm_configs,
    pair_configs,
)
from fastpref_kernels.dlogits import label_logits_kernel, linear_dlogits_kernel
from fastpref_kernels.linear_kl import kl_dlogits_kernel, linear_kl_fwd_kernel, merge_kl_kernel
from fastpref_kernels.losses.inputs import LOSSES
from fastpref_kernels.losses.pair import pair_losses_kernel
from fastpref_kernels.losses.registry import PAIR_OBJECTIVES, RESPONSE_OBJECTIVES, Objective
from fastpref_kernels.losses.response import response_losses_kernel
from fastpref_kernels.score_sketch import fold_kernel
from fastpref_kernels.softmax_stats import linear_softmax_fwd_kernel, merge_fwd_kernel

MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
ARGUMENT_TYPES = {
    **dict.fromkeys(("labels", "lengths", "chosen_lengths", "rejected_lengths"), "*i64"),
    **dict.fromkeys(("top1", "redo_mask", "desirable"), "*u8"),
    "metrics": "*fp64",
    **dict.fromkeys(("p0", "p1", "p2", "p3"), "fp64"),
    **dict.fromkeys(("T", "V", "D", "D_REF", "B", "S", "panels", "first", "rows"), "i32"),
    **dict.fromkeys(("logit_scale", "softcap"), "fp32"),
}
# Pointers in the dtype under test; other pointers are fp32.
INPUTS = frozenset(
    "hidden weight ref_hidden ref_weight bias exp_logits dlogits folded".split()  # noqa: SIM905
)


class Kernel(NamedTuple):
    """A kernel and, by variant, the arguments that its launcher passes as constants."""

    function: Any
    variants: dict[str, dict[str, Any]]


class Job(NamedTuple):
    """One compilation."""

    kernel: str
    variant: str
    dtype: str
    config: GemmConfig | RowConfig
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


def without(*names: str) -> dict[str, Any]:
    """Arguments that are None."""
    return dict.fromkeys(names)


def loss_variants(table: dict[str, Objective]) -> dict[str, dict[str, Any]]:
    """Every objective with all its inputs, soft labels included, and all its choices."""
    variants = {}
    for name, objective in table.items():
        for choices in itertools.product(*objective.choices):
            fixed = dict(zip(("c0", "c1"), (*choices, None, None), strict=False))
            fixed["OBJECTIVE"] = objective.function
            fixed["NUMBERS"] = len(objective.arguments) - len(choices)
            fixed["CHOICES"] = len(choices)
            if objective.reference is False:
                fixed |= without("ref_chosen", "ref_rejected")
            if not objective.point:
                fixed |= without("reference_point")
            variants[" ".join((name, *map(str, choices)))] = fixed
    return variants


GEMM_KERNELS = {
    "linear_softmax_fwd": Kernel(
        linear_softmax_fwd_kernel,
        {
            "stats": without("bias", "softcap", "exp_logits", "shift", "redo_mask"),
            "stats,bias": without("softcap", "exp_logits", "shift", "redo_mask"),
            "stats,softcap": without("bias", "exp_logits", "shift", "redo_mask"),
            "train": without("bias", "softcap", "panel_dot", "redo_mask"),
            "train,bias": without("softcap", "panel_dot", "redo_mask"),
            "train,softcap": without("bias", "panel_dot", "redo_mask"),
            "redo": without("bias", "softcap", "panel_dot"),
            "redo,bias": without("softcap", "panel_dot"),
            "redo,softcap": without("bias", "panel_dot"),
        },
    ),
    "linear_kl_fwd": Kernel(
        linear_kl_fwd_kernel, {"plain": without("softcap"), "softcap": without()}
    ),
    "kl_dlogits": Kernel(kl_dlogits_kernel, {"plain": without("softcap"), "softcap": without()}),
    "linear_dlogits": Kernel(
        linear_dlogits_kernel,
        {
            "plain": without("bias", "softcap"),
            "bias": without("softcap"),
            "softcap": without("bias"),
        },
    ),
}
ROW_KERNELS = {
    "merge_fwd": Kernel(
        merge_fwd_kernel,
        {
            "stats": without("exp_logits", "shift", "redo_mask", "row_scale", "softcap"),
            "train": without("panel_dot", "entropy", "top1", "softcap"),
            "train,softcap": without("panel_dot", "entropy", "top1"),
        },
    ),
    "merge_kl": Kernel(merge_kl_kernel, {"plain": without()}),
    "label_logits": Kernel(
        label_logits_kernel, {"plain": without("bias", "softcap"), "bias,softcap": without()}
    ),
    "fold": Kernel(fold_kernel, {"plain": without()}),
}
LOSS_KERNELS = {
    "pair_losses": Kernel(pair_losses_kernel, loss_variants(PAIR_OBJECTIVES)),
    "response_losses": Kernel(response_losses_kernel, loss_variants(RESPONSE_OBJECTIVES)),
}
KERNELS = {**GEMM_KERNELS, **ROW_KERNELS, **LOSS_KERNELS}
ROW_CONFIGS = {
    "merge_fwd": MERGE,
    "merge_kl": MERGE_KL,
    "label_logits": LABEL_LOGITS,
    "fold": SCORE_FOLD,
}
CONFIGS = {"linear_kl_fwd": pair_configs, "kl_dlogits": pair_configs}


def jobs(arches: list[int], only: str | None) -> Iterator[Job]:
    """Every compilation of the given architectures, or of a single kernel."""
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
                yield Job(name, variant, "bf16", ROW_CONFIGS[name], arch)
        for name, kernel in LOSS_KERNELS.items():
            if only not in (None, name):
                continue
            for variant in kernel.variants:
                yield Job(name, variant, "fp32", LOSSES, arch)


def source(job: Job) -> ASTSource:
    """The kernel with the argument types and constants of this job's launch."""
    kernel = KERNELS[job.kernel]
    names = kernel.function.arg_names
    config = job.config
    constants = dict(kernel.variants[job.variant])
    constants["BLOCK_T"] = constants["BLOCK"] = config.block_t
    constants["BLOCK_P"] = MERGE_PANELS
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
    if isinstance(job.config, GemmConfig):
        options["num_stages"] = job.config.num_stages
    try:
        target = GPUTarget("cuda", job.arch, 32)
        binary = triton.compile(source(job), target=target, options=options)
    except Exception as error:  # every stage of the compiler has exceptions of its own
        return Row(job, 0, 0, 0, None, " ".join(f"{type(error).__name__}: {error}".split())[:80])
    registers, spills = resources(binary.asm["cubin"])
    instruction = None
    if job.kernel in GEMM_KERNELS:
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
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastpref_kernels.aot_compile", description=__doc__
    )
    parser.add_argument("--arch", default="80,90,100", help="comma-separated, of 80, 90, 100")
    parser.add_argument("--only", help="a single kernel, by name")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: unset it, the interpreter compiles nothing")
    arches = arguments.arch.split(",")
    if unknown := set(arches) - {str(arch) for arch in MATRIX_INSTRUCTION}:
        parser.error(f"--arch must name some of 80, 90, 100, got {', '.join(sorted(unknown))}")
    todo = list(jobs([int(arch) for arch in arches], arguments.only))
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
