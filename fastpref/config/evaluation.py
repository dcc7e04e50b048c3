"""Section of the config for what evaluations decide and show, besides their metrics."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from fastpref.config.fields import Name, NonNegativeFloat, PositiveInt, Section

# Metrics of evaluations, and whether higher values are better; None where neither is in general.
HIGHER_IS_BETTER: dict[str, bool | None] = {
    "loss": False,
    "rewards/chosen": True,
    "rewards/rejected": None,
    "rewards/accuracies": True,
    "rewards/margins": True,
    "logps/chosen": True,
    "logps/rejected": None,
    "logps/chosen_change": True,
    "logps/rejected_change": None,
    "lengths/chosen": None,
    "lengths/rejected": None,
    "lengths/empty": None,
    "preference/accuracy": True,
    "preference/mean_kl": False,
    "preference/pci": True,
    "contrast/mean": None,
    "contrast/below": None,
    "contrast/inside": None,
    "contrast/above": None,
    "entropy": None,
}


class Evaluation(Section):
    """Decisions and samples of the evaluations of `data.eval`, in addition to their metrics."""

    metric_for_best_model: Name | None = Field(
        None,
        description="Metric of the evaluations by which the best checkpoint is chosen, such as "
        "`rewards/accuracies` or `loss`, or that of one source, such as `loss/NAME`. A checkpoint "
        "is written at each evaluation that is the best so far, and the best one is kept.",
    )
    greater_is_better: bool | None = Field(
        None,
        description="Whether higher values of `metric_for_best_model` are better. Default: what "
        "is usual for the metric; it must be set for metrics without a usual direction.",
    )
    load_best_model_at_end: bool = Field(
        False,
        description="Export the weights of the best evaluation instead of the last ones; by "
        "`metric_for_best_model`, or the loss.",
    )
    early_stopping_patience: PositiveInt | None = Field(
        None,
        description="End the run after so many evaluations in a row that are not better than the "
        "best one before them, by `metric_for_best_model` or the loss; null: never.",
    )
    early_stopping_threshold: NonNegativeFloat = Field(
        0.0, description="Difference by which an evaluation must be better to count as such."
    )
    samples: PositiveInt | None = Field(
        None,
        description="Number of prompts of `data.eval`, the first different ones, that every "
        "evaluation completes greedily, into `samples.jsonl` of the run directory and the report.",
    )
    max_new_tokens: PositiveInt = Field(
        128, description="Largest number of tokens in a completion of `samples`."
    )

    @field_validator("metric_for_best_model")
    @classmethod
    def _without_prefix(cls, value: str | None) -> str | None:
        if value is None:
            return None
        name = value.removeprefix("eval_").removeprefix("eval/")
        if _base(name) is None:
            raise ValueError(f"must be one of {', '.join(HIGHER_IS_BETTER)}, got {value!r}")
        return name

    @model_validator(mode="before")
    @classmethod
    def _no_option_without_effect(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for option, default, needed in (
            ("greater_is_better", None, "metric_for_best_model"),
            ("early_stopping_threshold", 0, "early_stopping_patience"),
        ):
            if values.get(option, default) not in (default, None) and not values.get(needed):
                raise ValueError(f"{option}: is for {needed}, which is not set; set it too")
        return values

    @model_validator(mode="after")
    def _direction_is_known(self) -> Evaluation:
        if self.metric is not None and self._greater is None:
            raise ValueError(
                f"greater_is_better: higher {self.metric} is neither better nor worse in general; "
                "set true or false"
            )
        return self

    @property
    def metric(self) -> str | None:
        """Metric that the best evaluation and the early stop go by; None if neither is wanted."""
        if self.metric_for_best_model is not None:
            return self.metric_for_best_model
        wanted = self.load_best_model_at_end or self.early_stopping_patience is not None
        return "loss" if wanted else None

    @property
    def keeps_best(self) -> bool:
        """Whether the best evaluation gets a checkpoint."""
        return self.metric_for_best_model is not None or self.load_best_model_at_end

    @property
    def is_higher_better(self) -> bool:
        """Whether higher values of `metric` are better."""
        return bool(self._greater)

    @property
    def _greater(self) -> bool | None:
        if self.greater_is_better is not None or self.metric is None:
            return self.greater_is_better
        base = _base(self.metric)
        return None if base is None else HIGHER_IS_BETTER[base]

    def options_set(self) -> list[str]:
        """Names of the options in use that need evaluations."""
        options = {
            "metric_for_best_model": self.metric_for_best_model is not None,
            "load_best_model_at_end": self.load_best_model_at_end,
            "early_stopping_patience": self.early_stopping_patience is not None,
            "samples": self.samples is not None,
        }
        return [name for name, is_set in options.items() if is_set]


def _base(name: str) -> str | None:
    """Metric of a name, which may have the name of a source after it; None if there is none."""
    matches = (base for base in HIGHER_IS_BETTER if f"{name}/".startswith(f"{base}/"))
    return next(matches, None)
