"""The section `data` of the config: preference data and how it is tokenized."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from fastpref.config.columns import Columns
from fastpref.config.fields import PathName, PositiveInt, Section, TemplateName
from fastpref.config.sources import Source, Sources, check_sources, sources_of
from fastpref.config.template_kwargs import check_day, check_template_kwargs

DataField = Literal["train", "eval"]
TemplateKwargs = Annotated[dict[str, Any], AfterValidator(check_template_kwargs)]
Day = Annotated[str, BeforeValidator(check_day)]


class Data(Section):
    """Preference data and how it is tokenized."""

    train: Sources = Field(
        description="JSON, JSONL, Parquet or Arrow file, or a Hub name. Columns for pairwise "
        "objectives: `prompt, chosen, rejected` or `chosen, rejected`, optional `p`; for pointwise "
        "ones: `prompt, completion, label`, or the columns of pairs, which become two rows each; "
        "for groupwise ones: `prompt, completions, scores`; for `sft` alone also `prompt, "
        "completion` or `messages` (see `sft_on`). Several sources are a list of `{path, name, "
        "weight or share, split, columns, template}`, see [several sources](mixtures.md)."
    )
    eval: Sources | None = Field(
        None,
        description="Held-out data in the same formats. Of several sets, a list as in `train` or a "
        "mapping of names to paths, the metrics of each have its name at the end, such as "
        "`eval_loss/NAME`, and those without a name are of all.",
    )
    columns: Columns = Field(
        {},
        description="Columns of the data under other names, e.g. `{prompt: question, chosen: "
        "response_j}`: the name that fastpref reads, then the name in the data, or null to leave "
        "the column out. A source has its own in `columns`.",
    )
    max_length: Annotated[int, Field(ge=2)] = Field(
        2048, description="Longest prompt + response, in tokens; longer ones are truncated."
    )
    truncation: Literal["keep_start", "keep_end"] = Field(
        "keep_start",
        description="`keep_start` cuts the end of a response; `keep_end` first cuts the start of "
        "the prompt, equally for all responses.",
    )
    max_prompt_length: PositiveInt | None = Field(
        None,
        description="Longest prompt, in tokens. Of a longer one the end is kept, behind its BOS "
        "token, before `max_length` bounds prompt + response; without it only `max_length` bounds "
        "the prompt.",
    )
    sft_on: Literal["completion", "assistant", "all"] = Field(
        "completion",
        description="Tokens that `loss: sft` trains on in rows without `chosen` and `rejected`. "
        "`completion`: the column `completion`, or the last assistant message of `messages`; "
        "`assistant`: every assistant message of a conversation; `all`: every token but the "
        "first, prompts included.",
    )
    chat_template: TemplateName | None = Field(
        None,
        description="Chat template of conversations: a Jinja file, the template itself, the name "
        "of one of the tokenizer's templates, or `chatml`; default: the tokenizer's. The exported "
        "tokenizer has it, too.",
    )
    chat_template_kwargs: TemplateKwargs = Field(
        {},
        description="Variables of the chat template, e.g. `{enable_thinking: false}`. A column "
        "`chat_template_kwargs` of the data comes before them.",
    )
    template_date: Day | None = Field(
        None,
        description="Date, as YYYY-MM-DD, that chat templates print which ask for the current one; "
        "default: today. Another date makes other tokens, so a run that is resumed on another "
        "day needs the date of its start here.",
    )
    add_eos: bool = Field(
        True,
        description="End plain-text responses with the EOS token (chat templates end their own).",
    )
    soft_labels: bool = Field(
        True,
        description="Use the column `p` of pairs, the probability that `chosen` is preferred, if "
        "the data has it; `false` ignores it, and `chosen` is always preferred.",
    )
    token_weights: bool = Field(
        True,
        description="Use the columns `chosen_weights` and `rejected_weights` of pairs if the data "
        "has them: lists with the weight of each token of the response, in the order of the "
        "tokenizer; an added EOS has weight 1. `false` gives all tokens equal weight.",
    )
    streaming: bool = Field(
        False,
        description="Read and tokenize the rows of `train` as they are needed, and keep none on "
        "disk: for data larger than memory and cache, see [larger than memory](streaming.md). "
        "`train` is then also a folder or a pattern such as `shards/*.parquet`.",
    )
    shuffle_window: PositiveInt | None = Field(
        None,
        description="With `streaming`: successive rows that are tokenized and shuffled together. "
        "Default: 8192.",
    )
    cache: PathName = Field(
        "~/.cache/fastpref",
        validate_default=True,
        description="Folder for tokenized data and reference log-probs; safe to delete.",
    )

    @model_validator(mode="after")
    def _room_for_a_response(self) -> Data:
        prompt = self.max_prompt_length
        if prompt is not None and prompt >= self.max_length:
            raise ValueError(
                f"max_prompt_length: must be < max_length, {self.max_length}, got {prompt}"
            )
        if prompt is not None and self.sft_on == "all":
            raise ValueError(
                "max_prompt_length: with sft_on: all a row has no prompt to cut; remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _sources_make_a_mixture(self) -> Data:
        for source in self.sources("eval"):
            if source.weight is not None or source.share is not None:
                raise ValueError(
                    f"eval: {source.label} has a weight or share, and held-out data is read whole; "
                    "remove it"
                )
        fields: tuple[DataField, ...] = ("train", "eval")
        for field in fields:
            if sources := self.sources(field):
                check_sources(field, sources)
        return self

    @model_validator(mode="after")
    def _one_source_is_streamed(self) -> Data:
        if self.shuffle_window is not None and not self.streaming:
            raise ValueError(
                "shuffle_window: is for streaming, and all rows are shuffled otherwise; remove it"
            )
        if self.streaming and not isinstance(self.train, str):
            raise ValueError(
                "streaming: reads one source, and train has a list; write them into one folder, "
                "or remove streaming"
            )
        return self

    def sources(self, field: DataField) -> list[Source]:
        """The sources of `train` or `eval`, none if it is not set."""
        return sources_of(self.train if field == "train" else self.eval)

    def of(self, source: Source) -> Data:
        """The same settings for one source, its path in `train` and nothing held out."""
        changes: dict[str, Any] = {"train": source.location, "eval": None, "streaming": False}
        if source.columns is not None:
            changes["columns"] = source.columns
        if source.template is not None:
            changes["chat_template"] = source.template
        return self.model_copy(update=changes)
