"""The config of `fastpref train`: one YAML file, checked before anything is loaded.

Every field is described where it is declared; `docs/config.md` and `fastpref train --help` are
written from these declarations (`python -m fastpref.docgen.config`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from fastpref import losses
from fastpref.config.fields import (
    Fraction,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from fastpref.config.yaml_io import flatten, parse_yaml


class Model(Section):
    path: Name | None = Field(
        None, description="Local folder or Hub name of a Hugging Face causal language model."
    )
    init: Literal["pretrained", "random"] = Field(
        "pretrained",
        description="`random` builds the model from `config` with random weights (seeded by "
        "`training.seed`).",
    )
    config: dict[str, Any] | None = Field(
        None,
        description="With `init: random`: a Hugging Face model config, e.g. "
        "`{model_type: llama, hidden_size: 256, vocab_size: 16000, …}`.",
    )
    tokenizer: Name | None = Field(
        None,
        description="Folder or Hub name of the tokenizer; default: `path`. With `init: random` "
        "and none named, a byte-level BPE of `config.vocab_size` tokens is trained on "
        "`data.train`.",
    )
    dtype: Literal["bfloat16", "float32", "float64"] = Field(
        "bfloat16",
        description="What the forward pass computes in. Weights that are trained are kept in "
        "fp32 at least.",
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="Attention code of transformers; `auto`: sdpa where the model supports it.",
    )
    kernels: Literal["auto", "liger", "torch"] = Field(
        "auto",
        description="RMSNorm, rotary embedding and gated MLP of the layers: `liger` takes those of "
        "liger-kernel, on CUDA; `auto`: liger where it is installed and knows the model, except "
        "with float64.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Off unless you ask."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if self.init == "random":
            if self.config is None or "model_type" not in self.config:
                raise ValueError("init: random needs config: {model_type: …, …}")
            if self.path is not None:
                raise ValueError("path and init: random exclude each other; remove one")
        elif self.path is None:
            raise ValueError("path is missing (or use init: random with config: {…})")
        elif self.config is not None:
            raise ValueError(
                "config is only for init: random; a pretrained model brings its own, leave it out"
            )
        return self


class Adapter(Section):
    name: Literal["lora"] = Field("lora", description="Low-rank adapters (peft).")
    r: PositiveInt = Field(16, description="Rank.")
    alpha: PositiveFloat = Field(32, description="Scale; the update is `alpha / r · B A`.")
    dropout: Fraction = Field(
        0.0,
        description="Dropout on the adapters' input. Above 0, rewards of the first step are not "
        "exactly 0.",
    )
    target_modules: Name | list[Name] = Field(
        "all-linear",
        description="Module names, or `all-linear`: every linear layer except the head.",
    )
    rslora: bool = Field(
        False, description="Scale by `alpha / √r` instead, arXiv:2312.03732, for high ranks."
    )
    dora: bool = Field(
        False,
        description="Train the norms of the weights' rows apart from their directions (DoRA, "
        "arXiv:2402.09353). In bfloat16 the norms are rounded, for the reference too. Not for "
        "weights that are sharded.",
    )
    quantize: Literal["nf4"] | None = Field(
        None,
        description="`nf4` keeps the frozen linear layers, but not the head, in 4 bits "
        "(bitsandbytes, double quantisation; QLoRA, arXiv:2305.14314). Over many ranks each has "
        "all of them.",
    )
    path: Name | None = Field(
        None,
        description="Folder or Hub name of an adapter that is trained on, e.g. of SFT. It brings "
        "its own rank, scale, dropout, target modules and kind; the reference is the model with "
        "this adapter as it was.",
    )
    merge: bool = Field(
        True,
        description="Export the merged model, in `model.dtype` throughout; `false` exports the "
        "adapter alone.",
    )

    @property
    def foreign_options(self) -> tuple[str, ...]:
        """Those that an adapter which is loaded brings itself."""
        return ("r", "alpha", "dropout", "target_modules", "rslora", "dora") if self.path else ()

    @model_validator(mode="after")
    def _a_loaded_one_describes_itself(self) -> Adapter:
        for name in self.foreign_options:
            if name in self.model_fields_set:
                raise ValueError(f"{name}: the adapter at path brings its own; remove it")
        return self


class Data(Section):
    train: Name = Field(
        description="JSON, JSONL, Parquet or Arrow file, or a Hub name. Columns for pairwise "
        "objectives: `prompt, chosen, rejected` or `chosen, rejected`, optional `p`; for pointwise "
        "ones: `prompt, completion, label` or those of pairs, which are taken apart; for groupwise "
        "ones: `prompt, completions, scores`."
    )
    eval: Name | None = Field(None, description="Held-out data in the same formats.")
    max_length: Annotated[int, Field(ge=2)] = Field(
        2048, description="Longest prompt + response, in tokens; longer ones are cut."
    )
    truncation: Literal["keep_start", "keep_end"] = Field(
        "keep_start",
        description="`keep_start` cuts the end of a response; `keep_end` first cuts the start of "
        "the prompt, equally for all responses.",
    )
    add_eos: bool = Field(
        True,
        description="End plain-text responses with the EOS token (chat templates end their own).",
    )
    soft_labels: bool = Field(
        True,
        description="Use the column `p` of pairs, the probability that `chosen` is preferred, "
        "where the data has it; `false` takes `chosen` as preferred for certain.",
    )
    token_weights: bool = Field(
        True,
        description="Use the columns `chosen_weights` and `rejected_weights` of pairs where the "
        "data has them: lists of how much each token of the response counts, as the tokenizer "
        "makes them; an EOS that is added counts 1. `false` counts all tokens alike.",
    )
    cache: Name = Field(
        "~/.cache/fastpref",
        description="Folder for tokenised data and reference log-probs; safe to delete.",
    )


class Calibration(Section):
    name: Literal["rc"] = Field("rc", description="Reward Calibration, arXiv:2604.18239.")
    momentum: Fraction = Field(
        0.98, description="Weight of the past in the averages of incentives and score norms."
    )
    scope: Literal["auto", "head", "last_adapter", "full"] = Field(
        "auto",
        description="Parameters whose scores are measured: the head's weight, the trained ones of "
        "the last layer that has any, or all; `auto`: the head where it is trained, else "
        "last_adapter. `head` is the cheap one.",
    )


class Monitor(Section):
    band_every: PositiveInt | None = Field(
        None,
        description="Steps between measurements of the Disentanglement Band (scores of the head); "
        "with calibration it is measured in every step.",
    )
    margins: tuple[float, float] | None = Field(
        None,
        description="Two margins of the contrastive logit, the difference of the log-probs per "
        "token, or with a reference of the log-ratios: the shares of pairs below, between and "
        "above are metrics. Default: those of the objective, or `0.6, 0.8`, with a reference "
        "`12, 16`.",
    )

    @field_validator("margins")
    @classmethod
    def _in_order(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] <= value[1]:
            raise ValueError(f"the first must be <= the second, got {list(value)}")
        return value


class Optim(Section):
    name: Literal["adamw", "rmsprop", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw",
        description="Optimizer. The 8-bit ones (bitsandbytes, not for weights that are sharded) "
        "keep the moments of matrices in a byte each; the paged one lets them leave the GPU's "
        "memory when it is short.",
    )
    lr: PositiveFloat = Field(1e-6, description="Peak learning rate.")
    weight_decay: NonNegativeFloat = Field(
        0.0, description="Weight decay on matrices (decoupled, except for rmsprop)."
    )
    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.999), description="All but rmsprop: decay of the two moments."
    )
    alpha: Fraction = Field(0.99, description="rmsprop: decay of the squared gradient.")
    eps: PositiveFloat = Field(1e-8, description="Added to the denominator.")
    max_grad_norm: PositiveFloat | None = Field(
        1.0, description="Clip the gradient's norm; null: never."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="After warm-up; linear and cosine end at 0."
    )
    warmup_steps: NonNegativeInt = Field(0, description="Optimizer steps of linear warm-up.")

    @property
    def foreign_option(self) -> str:
        """The one option that belongs to the other optimizers."""
        return "betas" if self.name == "rmsprop" else "alpha"

    @model_validator(mode="after")
    def _options_of_this_optimizer(self) -> Optim:
        foreign = self.foreign_option
        if foreign in self.model_fields_set:
            raise ValueError(f"{foreign} is not an option of {self.name}; remove it")
        return self


class Training(Section):
    epochs: PositiveInt = Field(1, description="Passes over the data; ignored if `steps` is set.")
    steps: PositiveInt | None = Field(
        None, description="Optimizer steps; takes as many epochs as needed."
    )
    batch_size: PositiveInt = Field(
        32,
        description="Pairs, single responses or groups per optimizer step, over all micro-batches.",
    )
    micro_batch_tokens: PositiveInt = Field(
        16384,
        description="Tokens of one micro-batch, with padding if there is any; the number of "
        "accumulation steps follows.",
    )
    layout: Literal["auto", "prefix_shared", "packed", "padded"] = Field(
        "auto",
        description="How groups lie in a forward pass: `prefix_shared` packs them into one row in "
        "which the responses of a group share one copy of its prompt; `packed` into one row of "
        "separate sequences, for flash_attention_2; `padded` makes a row of each response. `auto`: "
        "prefix_shared where `model.attn_implementation` is left open and the model proves to give "
        "the same hidden states, packed with flash_attention_2, else padded.",
    )
    activation_checkpointing: Literal["full", "selective", "off"] = Field(
        "full",
        description="Recompute activations in the backward pass: `full` in every block, less "
        "memory and a third slower; `selective` in every other one; `off`. `true` and `false` are "
        "full and off.",
    )
    compile: bool = Field(False, description="`torch.compile` each block of the model.")
    batch_invariant: bool = Field(
        True,
        description="On CPU, give each group a forward pass of its own: its log-probs then do not "
        "depend, to the last bit, on the others of its micro-batch. `false` is faster for small "
        "models. On CUDA, and for sharded models, a micro-batch is always one pass.",
    )
    seed: NonNegativeInt = Field(0, description="Order of the data, random weights, dropout.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto`: cuda if there.")
    nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="What happens at a loss or a gradient that is NaN or infinite, on any rank. "
        "`stop` the run before the next line of metrics or checkpoint; `skip` the step, count it "
        "and name its rows in the metrics, and stop at the tenth in a row. `skip` waits for the "
        "device in every step.",
    )
    log_every: PositiveInt = Field(10, description="Steps averaged into one line of metrics.")
    eval_every: PositiveInt | None = Field(
        None, description="Steps between evaluations; null: at the start and the end only."
    )
    checkpoint_every: PositiveInt | None = Field(
        500, description="Steps between checkpoints; null: only when interrupted."
    )
    keep_checkpoints: PositiveInt = Field(2, description="Newest checkpoints kept.")
    output_dir: Name = Field("runs/my-run", description="Run directory.")
    report_to: list[Literal["tensorboard", "wandb"]] = Field(
        [], description="Also send metrics there (`pip install fastpref[track]`)."
    )

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _yes_or_no(cls, value: Any) -> Any:
        return {True: "full", False: "off"}[value] if isinstance(value, bool) else value


class Parallel(Section):
    replicate: PositiveInt | None = Field(
        None,
        description="Copies of the model (HSDP); ranks = replicate · shard. Default: as many as "
        "`shard` makes, else 1.",
    )
    shard: PositiveInt | None = Field(
        None,
        description="Ranks that share one copy; default: all of ranks / `replicate`. 1: every rank "
        "has all weights, and gradients are added up once per step.",
    )
    reshard_after_forward: bool = Field(
        True,
        description="Free a block's gathered weights after its forward pass, and gather them again "
        "in the backward pass; `false` sends less and keeps more.",
    )
    cpu_offload: bool = Field(
        False,
        description="Keep weights, gradients and optimizer state in CPU memory, and update there.",
    )

    def sizes(self, ranks: int) -> tuple[int, int]:
        """`replicate` and `shard`, with what is left open filled in for so many ranks."""
        replicate = self.replicate or (max(1, ranks // self.shard) if self.shard else 1)
        return replicate, self.shard or max(1, ranks // replicate)


ReferenceMode = Literal["cached", "frozen", "adapter", "none"]


class Config(Section):
    model: Model = Field(description="The policy, and before training the reference.")
    adapter: Adapter | None = Field(None, description="Train adapters instead of all weights.")
    data: Data = Field(description="Preference data.")
    loss: dict[str, Any] | list[dict[str, Any]] = Field(
        description="The objective: `{name: dpo, beta: 0.1}`, the name alone, or a list of "
        "pairwise ones, each with a `weight`, to be added up. Pairwise, "
        "pointwise (`kto`, `bco`, …) or groupwise (`info_nca`, …), which decides the columns that "
        "the data needs. `fastpref losses` lists names and options."
    )
    reference: ReferenceMode | None = Field(
        None,
        description="Reference log-probs: `cached` computes them once before training and keeps "
        "them on disk; `frozen` runs a second copy of the model in every step, `adapter` the model "
        "without its adapters; `none`. Default: `cached` where the objective needs them, but for "
        "divergences of whole distributions (`tdpo1`, `tdpo2`) `adapter`, or `frozen` without "
        "adapters; else `none`. With an objective that needs none, a reference is measured against "
        "only.",
    )
    calibration: Calibration | None = Field(
        None, description="Rescale the incentives of a pairwise objective; `rc` alone will do."
    )
    monitor: Monitor = Field(Monitor(), description="What is measured beside the usual metrics.")
    update: Literal["gradient", "dpo_pg"] = Field(
        "gradient",
        description="`dpo_pg`: DPO-PG, the gradient of the chosen log-likelihood without what "
        "would raise the rejected one; the objective is a metric alone, and adamw and rmsprop do "
        "not keep the method's guarantees.",
    )
    optim: Optim = Field(Optim(), description="Optimizer and schedule.")
    training: Training = Field(Training(), description="The loop.")
    parallel: Parallel = Field(
        Parallel(), description="How the ranks that `torchrun` starts share the model (FSDP2)."
    )
    resume: Name | None = Field(
        None,
        description="`auto` continues the newest complete checkpoint of the run directory (and "
        "starts anew if there is none); or the folder of a checkpoint.",
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
    def _incentives_are_of_pairs(self) -> Config:
        asked = (
            "calibration"
            if self.calibration
            else "monitor.band_every"
            if self.monitor.band_every
            else ""
        )
        asked = "update: dpo_pg" if self.update == "dpo_pg" else asked
        if asked == "update: dpo_pg" and self.calibration:
            raise ValueError("update: dpo_pg uses no incentives to calibrate; remove one of them")
        loss = self.build_loss()
        if asked and loss.kind != "pairwise":
            raise ValueError(
                f"{asked}: is for pairwise objectives, and {loss.name} is {loss.kind}; remove it"
            )
        return self

    @property
    def margins(self) -> tuple[float, float]:
        """`monitor.margins`, or where it was left open those of the objective or of StaPO."""
        if self.monitor.margins is not None:
            return self.monitor.margins
        loss = self.build_loss()
        if not hasattr(loss, "left_margin"):
            loss = losses.build("stapo_ref" if loss.needs_reference else "stapo")
        return loss.left_margin, loss.right_margin

    def build_loss(self) -> Any:
        """The objective, of whichever kind."""
        return losses.from_config(self.loss)

    @property
    def reference_mode(self) -> ReferenceMode:
        """`reference`, or what the objective needs where it was left open."""
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
        """`field: old → new` for every field in which a saved config differs."""
        old, new = (flatten(parse_yaml(text)) for text in (saved.read_text(), self.to_yaml()))
        return [
            f"{path}: {old.get(path)} → {new.get(path)}"
            for path in {**old, **new}
            if old.get(path) != new.get(path) and path != "resume"
        ]

    def to_yaml(self) -> str:
        """Every field with the value that it has in the run, in a form that `load` reads."""
        values = self.model_dump(mode="json")
        loss = self.build_loss()
        values["loss"] = losses.config_of(loss)
        values["reference"] = self.reference_mode
        del values["optim"][self.optim.foreign_option]
        for name in self.adapter.foreign_options if self.adapter else ():
            del values["adapter"][name]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def section_of(path: list[str]) -> type[Section]:
    """The section class that holds the last key of a path such as ["optim", "lr"]."""
    section: type[Section] = Config
    for key in path[:-1]:
        annotation = section.model_fields[key].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, Section))
    return section
