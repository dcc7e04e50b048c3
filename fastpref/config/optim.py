"""Section of the config for the optimizer and its learning-rate schedule."""

from __future__ import annotations

from math import ceil
from typing import Literal

from pydantic import Field, model_validator

from fastpref.config.fields import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Section,
)


class Optim(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "rmsprop", "sgd", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw",
        description="Optimizer. The 8-bit ones (bitsandbytes, not supported for sharded weights) "
        "store each moment of a matrix entry in one byte; the paged one moves them to CPU memory "
        "when GPU memory is short.",
    )
    lr: PositiveFloat = Field(1e-6, description="Peak learning rate.")
    weight_decay: NonNegativeFloat = Field(
        0.0,
        description="Weight decay on matrices: decoupled for adamw, and added to the "
        "gradient for rmsprop and sgd.",
    )
    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.999), description="Decay of the two moments; not for rmsprop and sgd."
    )
    alpha: Fraction = Field(0.99, description="Decay of the squared gradient; rmsprop only.")
    momentum: Fraction = Field(
        0.0, description="Decay of the sum of past gradients that is the update; sgd only."
    )
    eps: PositiveFloat = Field(1e-8, description="Added to the denominator; not for sgd.")
    max_grad_norm: PositiveFloat | None = Field(
        1.0, description="Clip the norm of the gradient to this; null: no clipping."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="Learning rate after the warm-up; `linear` and `cosine` end at 0.",
    )
    warmup_steps: NonNegativeInt = Field(0, description="Optimizer steps of linear warm-up.")
    warmup_ratio: Fraction | None = Field(
        None,
        description="Share of all optimizer steps that is linear warm-up, rounded up to whole "
        "steps, instead of `warmup_steps`.",
    )

    @property
    def foreign_options(self) -> tuple[str, ...]:
        """Options of other optimizers, which this one does not have."""
        if self.name == "sgd":
            return ("betas", "alpha", "eps")
        return ("betas", "momentum") if self.name == "rmsprop" else ("alpha", "momentum")

    def warmup(self, steps: int) -> int:
        """Return the number of warm-up steps of a run of `steps` steps."""
        return self.warmup_steps if self.warmup_ratio is None else ceil(steps * self.warmup_ratio)

    @model_validator(mode="after")
    def _no_foreign_option(self) -> Optim:
        for foreign in self.foreign_options:
            if foreign in self.model_fields_set:
                raise ValueError(f"{foreign} is not an option of {self.name}; remove it")
        return self

    @model_validator(mode="after")
    def _one_warmup(self) -> Optim:
        if self.warmup_ratio is not None and self.warmup_steps:
            raise ValueError(
                f"warmup_ratio: {self.warmup_ratio:g}, but warmup_steps is {self.warmup_steps}; "
                "remove one of them"
            )
        return self
