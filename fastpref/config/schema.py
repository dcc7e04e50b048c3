"""The config of `fastpref train`: one YAML file, checked before anything is loaded.

Every field is described where it is declared; `docs/config.md` and `fastpref train --help` are
written from these declarations (`python -m fastpref.docgen.config`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from fastpref import losses
from fastpref.config.data_section import Data
from fastpref.config.evaluation import Evaluation
from fastpref.config.fields import PathName, Section
from fastpref.config.optim import Optim
from fastpref.config.renamed import renamed
from fastpref.config.rounds_section import Rounds
from fastpref.config.sections import (
    Adapter,
    Calibration,
    Model,
    Monitor,
    Parallel,
    Training,
)
from fastpref.config.yaml_io import dump_yaml, flatten, parse_yaml

_NUMBER = r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?"
ReferenceMode = Literal["cached", "frozen", "adapter", "none"]


class Config(Section):
    model: Model = Field(description="The policy; the reference is the same model before training.")
    adapter: Adapter | None = Field(None, description="Train adapters instead of all weights.")
    data: Data = Field(description="Preference data.")
    loss: dict[str, Any] | list[dict[str, Any]] = Field(
        description="The objective: `{name: dpo, beta: 0.1}`, only the name, or a list of pairwise "
        "objectives, each with a `weight`, that are added up. An objective is pairwise, pointwise "
        "(`kto`, `bco`, …) or groupwise (`info_nca`, …), which decides the columns that the data "
        "needs. `fastpref losses` lists names and options."
    )
    reference: ReferenceMode | None = Field(
        None,
        description="Reference log-probs: `cached` computes them once before training and stores "
        "them on disk; `frozen` runs a second copy of the model in every step; `adapter` runs the "
        "model without its adapters; `none` has no reference. Default: `none` if the objective "
        "needs no reference; for divergences of whole distributions (`tdpo1`, `tdpo2`) and with "
        "`data.streaming` `adapter`, or `frozen` without adapters; else `cached`. With an "
        "objective that needs none, a reference enters the metrics only.",
    )
    calibration: Calibration | None = Field(
        None,
        description="Rescale the incentives of a pairwise objective; `calibration: rc` is enough.",
    )
    monitor: Monitor = Field(
        Monitor(), description="Measurements in addition to the usual metrics."
    )
    update: Literal["gradient", "dpo_pg"] = Field(
        "gradient",
        description="`dpo_pg`: DPO-PG, the gradient of the chosen log-likelihood without the "
        "component that would raise the rejected one. The objective is then only a metric, and "
        "the guarantees of the method do not hold with adamw and rmsprop; they are about "
        "plain gradient steps, `optim: {name: sgd}`.",
    )
    optim: Optim = Field(Optim(), description="Optimizer and schedule.")
    training: Training = Field(Training(), description="The training loop.")
    evaluation: Evaluation = Field(
        Evaluation(), description="What evaluations of `data.eval` decide and show."
    )
    parallel: Parallel = Field(
        Parallel(), description="How the ranks that `torchrun` starts share the model (FSDP2)."
    )
    rounds: Rounds | None = Field(
        None,
        description="Rounds of sampling, scoring and training, for `fastpref rounds` alone, see "
        "[rounds](rounds.md).",
    )
    resume: PathName | None = Field(
        None,
        description="`auto` continues from the newest complete checkpoint of the run directory, "
        "and starts a new run if there is none; or the folder of a checkpoint.",
    )

    @field_validator("loss", "adapter", "calibration", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("resume", mode="before")
    @classmethod
    def _yes_is_auto(cls, value: Any) -> Any:
        return "auto" if value is True else value

    @field_validator("loss", mode="before")
    @classmethod
    def _numbers_in_quotes(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [cls._numbers_in_quotes(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {key: _number(item) for key, item in value.items()}

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, value: Any) -> Any:
        if isinstance(value, dict) and "name" not in value:
            raise ValueError("name is missing, e.g. loss: {name: dpo, beta: 0.1}")
        losses.from_config(value)
        return value

    @model_validator(mode="after")
    def _reference_where_needed(self) -> Config:
        if self.reference == "none" and self.build_loss().needs_reference:
            raise ValueError(
                f"reference: none, but {self.build_loss().name} needs reference log-probs; "
                "use reference: cached or frozen"
            )
        if self.reference == "cached" and self._measures_divergence:
            raise ValueError(
                f"reference: cached, but {self.build_loss().name} compares whole distributions, "
                "which are not kept on disk; use reference: frozen, or adapter with an adapter"
            )
        if self.reference == "cached" and self.data.streaming:
            raise ValueError(
                "reference: cached, but data.streaming keeps nothing on disk; use reference: "
                "frozen, or adapter with an adapter"
            )
        if self.reference == "adapter" and self.adapter is None:
            raise ValueError("reference: adapter, but there is no adapter; use cached or frozen")
        return self

    @model_validator(mode="after")
    def _rewards_are_no_log_probs(self) -> Config:
        loss = self.build_loss()
        if not loss.of_rewards:
            return self
        options = {
            "reference": self.reference not in (None, "none"),
            "calibration": self.calibration is not None,
            "monitor": self.monitor != Monitor(),
            "update": self.update != "gradient",
            "rounds": self.rounds is not None,
            "evaluation.samples": self.evaluation.samples is not None,
        }
        for option, is_set in options.items():
            if is_set:
                raise ValueError(
                    f"{option}: is for language models, and {loss.name} trains a reward model; "
                    "remove it"
                )
        metric = self.evaluation.metric or "loss"
        if not metric.startswith(("loss", "rewards/")):
            raise ValueError(
                f"evaluation.metric_for_best_model: {metric} is not measured for a reward model; "
                "use loss or rewards/accuracies"
            )
        return self

    @model_validator(mode="after")
    def _rollouts_need_rounds(self) -> Config:
        loss = self.build_loss()
        if loss.of_rollouts and self.rounds is None:
            raise ValueError(
                f"loss: {loss.name} learns from samples that the policy draws; add a section "
                "rounds and use fastpref rounds, or choose another objective"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_has_data(self) -> Config:
        if self.training.eval_every is not None and self.data.eval is None:
            raise ValueError("training.eval_every: there is nothing to evaluate; set data.eval")
        for option in self.evaluation.options_set():
            if self.data.eval is None:
                raise ValueError(
                    f"evaluation.{option}: there are no evaluations; set data.eval to held-out data"
                )
            if option != "samples" and self.training.eval_every is None:
                raise ValueError(
                    f"evaluation.{option}: compares evaluations during training; set "
                    "training.eval_every"
                )
        return self

    @model_validator(mode="after")
    def _sft_on_needs_sft(self) -> Config:
        loss = self.build_loss()
        if self.data.sft_on != "completion" and loss.name != "sft":
            raise ValueError(
                f"data.sft_on: {self.data.sft_on} is for loss: sft alone, and the loss is "
                f"{loss.name}; remove it"
            )
        return self

    @model_validator(mode="after")
    def _triplet_term_needs_samples(self) -> Config:
        for part in self.loss if isinstance(self.loss, list) else [self.loss]:
            gamma = part.get("gamma", 0)
            if part["name"] == "ti_dpo" and gamma > 0:
                raise ValueError(
                    f"loss.gamma: is {gamma}, but the triplet term of ti_dpo needs a response that "
                    "the policy samples in each step, which fastpref train does not; remove it"
                )
        return self

    @model_validator(mode="after")
    def _incentives_need_pairs(self) -> Config:
        if self.update == "dpo_pg" and self.calibration:
            raise ValueError("update: dpo_pg uses no incentives to calibrate; remove one of them")
        option = ""
        if self.update == "dpo_pg":
            option = "update: dpo_pg"
        elif self.calibration:
            option = "calibration"
        elif self.monitor.band_every:
            option = "monitor.band_every"
        loss = self.build_loss()
        if option and loss.kind != "pairwise":
            raise ValueError(
                f"{option}: is for pairwise objectives, and {loss.name} is {loss.kind}; remove it"
            )
        return self

    @property
    def margins(self) -> tuple[float, float]:
        """`monitor.margins`; by default the margins of the objective, else those of StaPO."""
        if self.monitor.margins is not None:
            return self.monitor.margins
        loss: Any = self.build_loss()
        if not hasattr(loss, "left_margin"):
            loss = losses.build("stapo_ref" if loss.needs_reference else "stapo")
        return loss.left_margin, loss.right_margin

    def build_loss(self) -> losses.Objective:
        """Return the objective with its parameters."""
        return losses.from_config(self.loss)

    @property
    def reference_mode(self) -> ReferenceMode:
        """`reference`; by default the mode that the objective needs."""
        if self.reference is not None:
            return self.reference
        if not (self._measures_divergence or self.build_loss().needs_reference):
            return "none"
        moves = self.rounds is not None and self.rounds.reference_mode in ("every", "ema")
        if self._measures_divergence or self.data.streaming or moves:
            return "frozen" if self.adapter is None else "adapter"
        return "cached"

    @property
    def _measures_divergence(self) -> bool:
        loss = self.build_loss()
        return isinstance(loss, losses.TokenLevelLoss) and "kl" in loss.columns

    def differences(self, saved: Path) -> list[str]:
        """Return `field: old → new` for every field in which a saved config differs."""
        values, _ = renamed(parse_yaml(saved.read_text()))
        old, new = flatten(values), flatten(parse_yaml(self.to_yaml()))
        return [
            f"{path}: {old.get(path)} → {new.get(path)}"
            for path in {**old, **new}
            if _expanded(old.get(path)) != _expanded(new.get(path)) and path != "resume"
        ]

    def to_yaml(self) -> str:
        """Return every field with the value that it has in the run, as YAML that `load` reads."""
        values = self.model_dump(mode="json")
        loss = self.build_loss()
        values["loss"] = losses.config_of(loss)
        values["reference"] = self.reference_mode
        for name in self.optim.foreign_options:
            del values["optim"][name]
        for name in self.adapter.foreign_options if self.adapter else ():
            del values["adapter"][name]
        return dump_yaml(values)


def _number(value: Any) -> Any:
    """Return the number that a text in quotes is, as other fields take it; else the value."""
    if isinstance(value, str) and re.fullmatch(_NUMBER, value, re.IGNORECASE):
        return int(value) if value.lstrip("+-").isdecimal() else float(value)
    return value


def _expanded(value: Any) -> Any:
    """Return a path as this version saves it; earlier ones left the `~` in it."""
    return os.path.expanduser(value) if isinstance(value, str) else value


def section_of(path: list[str]) -> type[Section]:
    """Return the section class that holds the last key of a path such as ["optim", "lr"]."""
    section: type[Section] = Config
    for key in path[:-1]:
        if key.isdecimal():  # the position in a list, whose sections are all alike
            continue
        field = section.model_fields[key]
        inner = inner_section(field) or item_section(field)
        assert inner is not None, path
        section = inner
    return section


def inner_section(field: FieldInfo) -> type[Section] | None:
    """Return the section class that a field holds; None for a field that is a plain value."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def item_section(field: FieldInfo) -> type[Section] | None:
    """Return the section class of which a field holds a list; None for other fields."""
    return _item_section(field.annotation)


def _item_section(annotation: Any) -> type[Section] | None:
    arguments = get_args(annotation)
    if get_origin(annotation) is list and isinstance(arguments[0], type):
        return arguments[0] if issubclass(arguments[0], Section) else None
    return next(filter(None, map(_item_section, arguments)), None)
