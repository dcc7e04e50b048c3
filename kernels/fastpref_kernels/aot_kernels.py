"""The tables of `aot_compile`: every kernel, its variants and the types of its arguments."""

import itertools
from typing import Any, NamedTuple

from fastpref_kernels.common.attention_tile import head_parts
from fastpref_kernels.common.configs import (
    ATTENTION_DELTA,
    COLUMN_SUMS,
    DLOGITS_OF_KL,
    GATED,
    LABEL_LOGITS,
    MERGE,
    MERGE_KL,
    NORM,
    ROTARY,
    SCORE_FOLD,
    SUMMED_COLUMNS,
    RowConfig,
    pair_configs,
)
from fastpref_kernels.dlogits import label_logits_kernel, linear_dlogits_kernel
from fastpref_kernels.gated_mlp import gated_bwd_kernel, gated_fwd_kernel
from fastpref_kernels.linear_kl import (
    kl_dlogits_kernel,
    linear_kl_fwd_kernel,
    logits_to_dlogits_kernel,
    merge_kl_kernel,
)
from fastpref_kernels.losses.pair import pair_losses_kernel
from fastpref_kernels.losses.registry import PAIR_OBJECTIVES, RESPONSE_OBJECTIVES, Objective
from fastpref_kernels.losses.response import response_losses_kernel
from fastpref_kernels.packed_attention_bwd import (
    attention_delta_kernel,
    packed_attention_dkv_kernel,
    packed_attention_dq_kernel,
)
from fastpref_kernels.packed_attention_fwd import packed_attention_fwd_kernel
from fastpref_kernels.residual_norm import residual_norm_fwd_kernel
from fastpref_kernels.rms_norm import (
    MAX_WIDTH,
    column_sums_kernel,
    rms_norm_bwd_kernel,
    rms_norm_fwd_kernel,
)
from fastpref_kernels.rotary import rotary_kernel
from fastpref_kernels.score_sketch import fold_kernel
from fastpref_kernels.softmax_stats import linear_softmax_fwd_kernel, merge_fwd_kernel

ARGUMENT_TYPES = {
    **dict.fromkeys(("labels", "lengths", "chosen_lengths", "rejected_lengths"), "*i64"),
    **dict.fromkeys(("top1", "redo_mask", "desirable"), "*u8"),
    "metrics": "*fp64",
    **dict.fromkeys(("p0", "p1", "p2", "p3"), "fp64"),
    **dict.fromkeys(("T", "V", "D", "D_REF", "B", "S", "panels", "first", "rows"), "i32"),
    **dict.fromkeys(("H", "K", "P", "window"), "i32"),
    **dict.fromkeys(("tiles", "starts"), "*i32"),
    **dict.fromkeys(("logit_scale", "softcap", "scale", "eps", "offset"), "fp32"),
    **dict.fromkeys(("update_eps", "update_offset", "total_eps", "total_offset"), "fp32"),
}
# Pointers in the dtype under test; other pointers are fp32.
INPUTS = {
    *("hidden", "weight", "ref_hidden", "ref_weight", "bias", "exp_logits", "dlogits", "folded"),
    *("query", "key", "value", "out", "grad", "dquery", "dkey", "dvalue"),
    *("update", "update_weight", "total_weight", "total", "normalized"),
    *("x", "residual", "grad_x", "cos", "sin", "gate", "up", "product", "grad_gate"),
}


HEAD_SIZES = (64, 80, 96, 128, 256)
# Arguments that are None, by option.
ATTENTION_OPTIONS = {
    "": ("window", "softcap"),
    "window": ("softcap",),
    "softcap": ("window",),
    "window,softcap": (),
}


# Arguments that are None, by the norms at a residual addition.
RESIDUAL_NORMS = {
    " update": ("total_weight", "normalized"),
    " total": ("update_weight",),
    " update,total": (),
}
NORM_WIDTHS = (128, 4096, 8192, 16384)  # heads of 128 numbers, and rows
ACTIVATIONS: dict[str, dict[str, Any]] = {"silu": {"GELU": False}, "gelu": {"GELU": True}}


class Kernel(NamedTuple):
    """A kernel and, by variant, the arguments that its launcher passes as constants."""

    function: Any
    variants: dict[str, dict[str, Any]]


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


def head_constants(size: int) -> dict[str, Any]:
    """Constants of attention with one head size."""
    first, second = head_parts(size)
    return {"SIZE": size, "FIRST": first, "SECOND": second}


def norm_constants(width: int) -> dict[str, Any]:
    """Constants of a norm over the last axis; rows of heads have a second axis."""
    return {"BLOCK_D": width, **({} if width <= 256 else {"H": 1})}


def norm_outputs(width: int) -> dict[str, tuple[str, ...]]:
    """Launches of a norm's backward pass: the arguments that are None, by name."""
    if width > MAX_WIDTH // 2:
        return {"": ("partials",), " weight alone": ("residual", "grad_x")}
    return {"": ("partials",), " with weight": ()}


def attention_variants(outputs: dict[str, tuple[str, ...]]) -> dict[str, dict[str, Any]]:
    """Every head size with every option, for each set of outputs: those that are None, by name."""
    return {
        " ".join(filter(None, (str(size), option, name))): {
            **without(*ATTENTION_OPTIONS[option], *absent),
            **head_constants(size),
            "HEADS_PER_KEY": 4,
            "UPCAST": False,
        }
        for size in HEAD_SIZES
        for option in ATTENTION_OPTIONS
        for name, absent in outputs.items()
    }


def is_usual(variant: str, dtype: str) -> bool:
    """Whether a variant of attention is compiled without --thorough: those that need most."""
    size, _, options = variant.partition(" ")
    if size == "256" or "softcap" in options:
        return dtype == "bf16" and size in ("128", "256") and "window,softcap" in options
    return "window" not in options and (dtype == "bf16" or size == "128")


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
        linear_kl_fwd_kernel,
        {
            "plain": without("softcap"),
            "softcap": without(),
            "value alone": without("softcap", "p_logits_out", "q_logits_out"),
        },
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
    "logits_to_dlogits": Kernel(
        logits_to_dlogits_kernel, {"plain": without("softcap"), "softcap": without()}
    ),
    "label_logits": Kernel(
        label_logits_kernel, {"plain": without("bias", "softcap"), "bias,softcap": without()}
    ),
    "fold": Kernel(fold_kernel, {"plain": without()}),
    "attention_delta": Kernel(
        attention_delta_kernel, {str(size): head_constants(size) for size in HEAD_SIZES}
    ),
    "rms_norm_fwd": Kernel(
        rms_norm_fwd_kernel, {str(width): norm_constants(width) for width in NORM_WIDTHS}
    ),
    "rms_norm_bwd": Kernel(
        rms_norm_bwd_kernel,
        {
            f"{width}{name}": {**without(*absent), **norm_constants(width)}
            for width in NORM_WIDTHS
            for name, absent in norm_outputs(width).items()
        },
    ),
    "residual_norm_fwd": Kernel(
        residual_norm_fwd_kernel,
        {
            f"{width}{name}": {**without(*absent), "BLOCK_D": width}
            for width in NORM_WIDTHS[1:]
            for name, absent in RESIDUAL_NORMS.items()
        },
    ),
    "column_sums": Kernel(column_sums_kernel, {"plain": {"BLOCK_D": SUMMED_COLUMNS}}),
    "rotary": Kernel(
        rotary_kernel,
        {
            str(size): {"HALF": size // 2, "BLOCK_D": size // 2, "BACKWARD": True}
            for size in (64, 256)
        },
    ),
    "gated_fwd": Kernel(gated_fwd_kernel, ACTIVATIONS),
    "gated_bwd": Kernel(gated_bwd_kernel, ACTIVATIONS),
}
LOSS_KERNELS = {
    "pair_losses": Kernel(pair_losses_kernel, loss_variants(PAIR_OBJECTIVES)),
    "response_losses": Kernel(response_losses_kernel, loss_variants(RESPONSE_OBJECTIVES)),
}
WHOLE: dict[str, tuple[str, ...]] = {"": ()}
PARTS = {"keys alone": ("dvalue",), "values alone": ("dkey",)}
# By name: the kernel, and the field of AttentionConfigs that holds its tiles.
ATTENTION_KERNELS = {
    "packed_attention_fwd": (
        Kernel(packed_attention_fwd_kernel, attention_variants(WHOLE)),
        "fwd",
    ),
    "packed_attention_dq": (Kernel(packed_attention_dq_kernel, attention_variants(WHOLE)), "dq"),
    "packed_attention_dkv": (
        Kernel(packed_attention_dkv_kernel, attention_variants({**WHOLE, **PARTS})),
        "dkv",
    ),
}
KERNELS = {
    **GEMM_KERNELS,
    **ROW_KERNELS,
    **LOSS_KERNELS,
    **{name: kernel for name, (kernel, _) in ATTENTION_KERNELS.items()},
}
ROW_CONFIGS: dict[str, RowConfig] = {
    "merge_fwd": MERGE,
    "merge_kl": MERGE_KL,
    "logits_to_dlogits": DLOGITS_OF_KL,
    "label_logits": LABEL_LOGITS,
    "fold": SCORE_FOLD,
    "attention_delta": ATTENTION_DELTA,
    "column_sums": COLUMN_SUMS,
    "rotary": ROTARY,
    "gated_fwd": GATED,
    "gated_bwd": GATED,
}


def row_config(name: str, variant: str) -> RowConfig:
    """Rows of a program of one of ROW_KERNELS; those of a norm depend on the width."""
    if name.startswith(("rms_norm", "residual_norm")):
        return NORM[int(variant.partition(" ")[0])]
    return ROW_CONFIGS[name]


CONFIGS = {"linear_kl_fwd": pair_configs, "kl_dlogits": pair_configs}
