"""The config of `fastpref train`: one YAML file, checked before anything is loaded.

Every field is described where it is declared; `docs/config.md` and `fastpref train --help` are
written from these declarations (`python -m fastpref.docgen.config`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from fastpref import losses
from fastpref.config.fields import Name, Section
from fastpref.config.optim import Optim
from fastpref.config.renamed import renamed
from fastpref.config.sections import (
    Adapter,
    Calibration,
    Data,
    Model,
    Monitor,
    Parallel,
    Training,
)
from fastpref.config.yaml_io import flatten, parse_yaml

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
        "needs no reference; for divergences of whole distributions (`tdpo1`, `tdpo2`) `adapter`, "
        "or `frozen` without adapters; else `cached`. With an objective that needs none, a "
        "reference enters the metrics only.",
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
    parallel: Parallel = Field(
        Parallel(), description="How the ranks that `torchrun` starts share the model (FSDP2)."
    )
    resume: Name | None = Field(
        None,
        description="`auto` continues from the newest complete checkpoint of the run directory, "
        "and starts a new run if there is none; or the folder of a checkpoint.",
    )

    @field_validator("loss", "adapter", "calibration", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

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
        if self.reference == "adapter" and self.adapter is None:
            raise ValueError("reference: adapter, but there is no adapter; use cached or frozen")
        return self

    @model_validator(mode="after")
    def _evaluation_has_data(self) -> Config:
        if self.training.eval_every is not None and self.data.eval is None:
            raise ValueError("training.eval_every: there is nothing to evaluate; set data.eval")
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
        if self._measures_divergence:
            return "frozen" if self.adapter is None else "adapter"
        return "cached" if self.build_loss().needs_reference else "none"

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
            if old.get(path) != new.get(path) and path != "resume"
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
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def section_of(path: list[str]) -> type[Section]:
    """Return the section class that holds the last key of a path such as ["optim", "lr"]."""
    section: type[Section] = Config
    for key in path[:-1]:
        inner = inner_section(section.model_fields[key])
        assert inner is not None, path
        section = inner
    return section


def inner_section(field: FieldInfo) -> type[Section] | None:
    """Return the section class that a field holds; None for a field that is a plain value."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None
