"""Sections of the config, each a class that describes its fields."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fastpref.config.fields import (
    Checkpointing,
    Fraction,
    Name,
    NonNegativeInt,
    PathName,
    PositiveFloat,
    PositiveInt,
    Section,
    TokenBudget,
)


class Model(Section):
    """The model that is trained, and its tokenizer."""

    path: PathName | None = Field(
        None, description="Local folder or Hub name of a Hugging Face causal language model."
    )
    init: Literal["pretrained", "random"] = Field(
        "pretrained",
        description="`random` builds the model from `config` with random weights (seeded by "
        "`training.seed`).",
    )
    config: dict[str, Any] | None = Field(
        None,
        description="With `init: random`: a Hugging Face model config, e.g. `{model_type: llama, "
        "hidden_size: 256, vocab_size: 16000, …}`.",
    )
    tokenizer: PathName | None = Field(
        None,
        description="Folder or Hub name of the tokenizer; default: `path`. With `init: random` "
        "the default is a byte-level BPE of `config.vocab_size` tokens, trained on `data.train`.",
    )
    dtype: Literal["bfloat16", "float32", "float64"] = Field(
        "bfloat16",
        description="Dtype of the forward pass. Trained weights are kept in fp32 at least.",
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="Attention code of transformers; `auto`: sdpa where the model supports it.",
    )
    kernels: Literal["auto", "fused", "liger", "torch"] = Field(
        "auto",
        description="Code of the decoder layers. `fused`: explicit forward and backward passes, "
        "with LoRA inside the matrix products and only what the backward pass needs in memory; "
        "`liger`: RMSNorm, rotary embedding and gated MLP of liger-kernel, on CUDA; `torch`: the "
        "layers of transformers. `auto`: fused where every part of the layers is known, else liger "
        "where it is installed and supports the model, except with float64.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")

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
    """Low-rank adapters, trained instead of the weights of the model."""

    name: Literal["lora"] = Field("lora", description="Low-rank adapters (peft).")
    r: PositiveInt = Field(16, description="Rank.")
    alpha: PositiveFloat = Field(32, description="Scale; the update is `alpha / r · B A`.")
    dropout: Fraction = Field(
        0.0,
        description="Dropout on the input of the adapters. Above 0, the rewards of the first step "
        "are not exactly 0.",
    )
    target_modules: Name | list[Name] = Field(
        "all-linear",
        description="Module names, or `all-linear`: every linear layer except the head.",
    )
    target_parameters: list[Name] | None = Field(
        None,
        description="Names of weights outside linear layers that get adapters too, e.g. `["
        "mlp.experts.gate_up_proj, mlp.experts.down_proj]` for the experts of a mixture, which "
        "are one weight for all of them. Not with dropout or DoRA.",
    )
    rslora: bool = Field(
        False, description="Scale by `alpha / √r` instead, arXiv:2312.03732, for high ranks."
    )
    dora: bool = Field(
        False,
        description="Train the norms of the rows of the weights separately from their directions "
        "(DoRA, arXiv:2402.09353). In bfloat16 the norms are rounded, for the reference too. Not "
        "supported for sharded weights.",
    )
    quantize: Literal["nf4"] | None = Field(
        None,
        description="`nf4` stores the frozen linear layers, but not the head, in 4 bits "
        "(bitsandbytes, double quantization; QLoRA, arXiv:2305.14314). They are not sharded: "
        "every rank has all of them.",
    )
    path: PathName | None = Field(
        None,
        description="Folder or Hub name of an adapter to continue training, e.g. from SFT. It "
        "brings its own rank, scale, dropout, target modules and kind, and that of a reward model "
        "its head; the reference is the model with this adapter before training.",
    )
    merge: bool = Field(
        True,
        description="Export the merged model, all of it in `model.dtype`; `false` exports the "
        "adapter only.",
    )

    @property
    def foreign_options(self) -> tuple[str, ...]:
        """Options that a loaded adapter brings itself."""
        names = ("r", "alpha", "dropout", "target_modules", "target_parameters", "rslora", "dora")
        return names if self.path else ()

    @model_validator(mode="after")
    def _loaded_adapter_brings_its_options(self) -> Adapter:
        for name in self.foreign_options:
            if name in self.model_fields_set:
                raise ValueError(f"{name}: the adapter at path brings its own; remove it")
        return self


class Calibration(Section):
    """Reward Calibration of the incentives."""

    name: Literal["rc"] = Field("rc", description="Reward Calibration, arXiv:2604.18239.")
    statistics: Literal["batch", "pairs"] = Field(
        "batch",
        description="`batch`: mean incentives and mean scores of the step's pairs, and one factor "
        "(Algorithm 2 of the paper). `pairs`: averages of the pairs' logarithms, and a factor for "
        "each pair. They agree for one pair a step.",
    )
    momentum: Fraction = Field(
        0.98, description="Weight of the past in the averages of incentives and score norms."
    )
    scope: Literal["auto", "head", "last_adapter", "full"] = Field(
        "auto",
        description="Parameters whose scores are measured: `head`, the weight of the head; "
        "`last_adapter`, the trained parameters of the last layer that has any; `full`, all. "
        "`auto`: head if it is trained, else last_adapter. `head` is the cheapest.",
    )
    sketch_rows: PositiveInt | None = Field(
        4096,
        description="Rows to which the vocabulary is folded for the norms of the batch's scores of "
        "the head; with the default log r* deviates by about 0.006. `null`: exact, for "
        "another matrix product with the head's weight and twice its memory in float32.",
    )


class Monitor(Section):
    """Measurements in addition to the usual metrics."""

    band_every: PositiveInt | None = Field(
        None,
        description="Steps between measurements of the Disentanglement Band of the batch and of "
        "each pair, by the scores of the head or of `calibration.scope`; with calibration the band "
        "of its own statistics is measured in every step.",
    )
    margins: tuple[float, float] | None = Field(
        None,
        description="Lower and upper margin of the contrastive logit; metrics show the shares of "
        "pairs below, between and above. The logit is the difference of the log-probs per token, "
        "or with a reference the difference of the log-ratios. Default: the margins of the "
        "objective; for objectives without margins `0.6, 0.8`, or with a reference `12, 16`.",
    )

    @field_validator("margins")
    @classmethod
    def _in_order(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] <= value[1]:
            raise ValueError(f"the first must be <= the second, got {list(value)}")
        return value


class Training(Section):
    """The training loop."""

    epochs: PositiveInt = Field(1, description="Passes over the data; ignored if `steps` is set.")
    steps: PositiveInt | None = Field(
        None, description="Optimizer steps, over as many epochs as needed."
    )
    batch_size: PositiveInt = Field(
        32,
        description="Pairs, single responses or groups per optimizer step, over all micro-batches.",
    )
    micro_batch_tokens: TokenBudget = Field(
        "auto",
        description="Largest number of tokens in a micro-batch, padding included; the number of "
        "accumulation steps follows from it. `auto`: chosen from the free memory, see [memory]"
        "(memory.md); 16384 for objectives in which the loss of a pair depends on its batch.",
    )
    layout: Literal["auto", "prefix_shared", "packed", "padded"] = Field(
        "auto",
        description="Layout of a forward pass: `prefix_shared` packs groups into one row in which "
        "the responses of a group share one copy of its prompt; `packed` packs separate sequences "
        "into one row, for flash_attention_2; `padded` has one padded row per response. `auto`: "
        "packed with flash_attention_2; prefix_shared if `model.attn_implementation` is auto and "
        "a check shows that the model gives the same hidden states; else padded.",
    )
    activation_checkpointing: Checkpointing = Field(
        "auto",
        description="Recompute activations in the backward pass: `auto` in as few blocks as the "
        "free memory allows, see [memory](memory.md); `full` in every block, which saves the most "
        "memory and is a third slower; `selective` in every other block; `off` in none; a number: "
        "in so many blocks, the first ones. `true` means full and `false` off.",
    )
    compile: bool = Field(False, description="`torch.compile` each block of the model.")
    batch_invariant: bool = Field(
        True,
        description="On CPU, run a forward pass per group, so that its log-probs do not depend, "
        "to the last bit, on the other groups of its micro-batch. `false` is faster for small "
        "models. On CUDA, and for sharded models, a micro-batch is always one pass.",
    )
    seed: NonNegativeInt = Field(
        0, description="Seed of the order of the data, of random weights and of dropout."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="`auto`: cuda if torch finds a GPU, else cpu."
    )
    nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="Action after a loss or gradient that is NaN or infinite, on any rank. `stop` "
        "ends the run before the next line of metrics or checkpoint. `skip` leaves the step out, "
        "counts it and names its rows in the metrics, and ends the run at the tenth such step in "
        "a row; it synchronizes with the device in every step.",
    )
    log_every: PositiveInt = Field(10, description="Steps averaged into one line of metrics.")
    eval_every: PositiveInt | None = Field(
        None, description="Steps between evaluations; null: at the start and at the end only."
    )
    checkpoint_every: PositiveInt | None = Field(
        500, description="Steps between checkpoints; null: only when the run is interrupted."
    )
    keep_checkpoints: PositiveInt = Field(2, description="Number of checkpoints to keep.")
    export_every: PositiveInt | None = Field(
        None,
        description="Steps between exports of the model to `exports/step-N` in the run directory, "
        "in the form of the final `model/`; null: none. They are kept. `fastpref export` writes "
        "one from a checkpoint.",
    )
    output_dir: PathName = Field("runs/my-run", description="Run directory.")
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        [],
        description="Trackers that also get the metrics, see [trackers](trackers.md); a resumed "
        "run goes on in the same run of each.",
    )
    push_to_hub: bool = Field(
        False, description="Upload the final model to the Hub as `hub_model_id`."
    )
    hub_model_id: Name | None = Field(
        None, description="Name on the Hub, `ORG/NAME`; the repository is made if there is none."
    )
    hub_private_repo: bool | None = Field(
        None,
        description="Whether a new repository on the Hub is private; null: as is the default of "
        "the organization.",
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker(cls, value: Any) -> Any:
        if value in (None, False, "none"):
            return []
        return value.replace(",", " ").split() if isinstance(value, str) else value

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _bool_as_word(cls, value: Any) -> Any:
        return {True: "full", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _hub_options_together(self) -> Training:
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("push_to_hub: needs a name on the Hub; set hub_model_id to ORG/NAME")
        for option in ("hub_model_id", "hub_private_repo"):
            if getattr(self, option) is not None and not self.push_to_hub:
                raise ValueError(f"{option}: nothing is uploaded; set push_to_hub, or remove it")
        return self

    @property
    def is_auto(self) -> bool:
        """Whether the memory decides a field."""
        return "auto" in (self.micro_batch_tokens, self.activation_checkpointing)


class Parallel(Section):
    """FSDP2 over the ranks that torchrun starts."""

    replicate: PositiveInt | None = Field(
        None,
        description="Copies of the model (HSDP); ranks = replicate · shard. Default: the number "
        "of ranks / `shard` if `shard` is set, else 1.",
    )
    shard: PositiveInt | None = Field(
        None,
        description="Ranks that share one copy; default: the number of ranks / `replicate`. 1: "
        "every rank has all weights, and gradients are all-reduced once per step.",
    )
    reshard_after_forward: bool = Field(
        True,
        description="Free the gathered weights of a block after its forward pass, and gather them "
        "again in the backward pass; `false` needs less communication and more memory.",
    )
    cpu_offload: bool = Field(
        False,
        description="Store weights, gradients and optimizer state in CPU memory, and update them "
        "there.",
    )

    def sizes(self, ranks: int) -> tuple[int, int]:
        """Return `replicate` and `shard` for a number of ranks, with defaults filled in."""
        replicate = self.replicate or (max(1, ranks // self.shard) if self.shard else 1)
        return replicate, self.shard or max(1, ranks // replicate)
