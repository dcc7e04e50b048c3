"""The objective of a DPO trainer, and the setups that it cannot train in."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastpref import losses
from fastpref.fused.validation import needs_point
from fastpref.losses import Objective, TokenLevelLoss

# Options of DPOConfig that an objective replaces, and their defaults.
_TAKEN_OVER = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "discopop_tau": 0.05,
    "use_weighting": False,
    "ld_alpha": None,
}
_BETA = 0.1  # default of DPOConfig


def objective_of(objective: Objective | str, beta: float) -> Objective:
    """The objective of a trainer; one that is named takes `DPOConfig.beta`.

    The default of DPOConfig cannot be told from a value that the user set: where the objective has
    another default, that is used, and a warning says so. Raises ValueError for a beta that the
    objective has not.
    """
    if not isinstance(objective, str):
        own = getattr(objective, "beta", _BETA)
        if beta not in (_BETA, own):
            raise ValueError(
                f"args.beta: got {beta}, but the objective is {objective}; set it there"
            )
        return objective
    default = losses.build(objective)
    own = getattr(default, "beta", None)
    if beta == _BETA:
        if own not in (_BETA, None):
            warnings.warn(
                f"args.beta: {_BETA} is the default of DPOConfig and not used; the objective is "
                f"{default}",
                stacklevel=4,
            )
        return default
    if own is None:
        raise ValueError(f"args.beta: got {beta}, but the objective is {default}; set it there")
    return losses.build(objective, beta=beta)


def check_objective(trainer: Any, objective: Objective) -> None:
    """Raise ValueError, naming the option, if the trainer cannot train the objective."""
    args = trainer.args
    if not isinstance(objective, Objective):
        raise ValueError(
            f"objective: expected an objective or the name of one, got {objective!r}; "
            "`fastpref losses` lists them"
        )
    for name, default in _TAKEN_OVER.items():
        if getattr(args, name, default) != default:
            raise ValueError(
                f"args.{name}: expected its default {default!r}, got {getattr(args, name)!r}; the "
                "objective decides, set it there, or leave out objective="
            )
    beyond_sums = isinstance(objective, TokenLevelLoss) or needs_point(objective)
    if args.precompute_ref_log_probs and objective.needs_reference and beyond_sums:
        raise ValueError(
            f"args.precompute_ref_log_probs: TRL keeps sums of the pairs' log-probs, and "
            f"{objective.name} needs more of the reference; set it to False"
        )
    for name, present in _unsupported(trainer).items():
        if present:
            raise ValueError(
                f"{name}: not supported by {type(trainer).__name__} with objective=; use "
                "DPOConfig.loss_type"
            )


def _unsupported(trainer: Any) -> dict[str, bool]:
    """Setups without a way for an objective, and whether the trainer is one."""
    adapters = getattr(trainer.model, "peft_config", {}).values()
    return {
        "processing_class (vision-language models)": not isinstance(
            trainer.processing_class, PreTrainedTokenizerBase
        ),
        "FSDP": getattr(trainer, "is_fsdp_enabled", False),
        "prompt learning": any(adapter.is_prompt_learning for adapter in adapters),
    }
