"""Set up a run before its first step: folder, tokens, plan, policy and reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastpref import distributed
from fastpref.config import Config, ConfigError, Training
from fastpref.data.batch_plan import Plan, tokens_of
from fastpref.data.collate import Batch
from fastpref.data.dataset import Groups
from fastpref.data.formats import RowKind
from fastpref.data.kto_mismatch import MismatchedGroups
from fastpref.data.sft import row_kind
from fastpref.data.sources import load_data
from fastpref.data.stream_plan import StreamedLengths, longest_possible, plan_stream
from fastpref.data.streaming import AnyDataset, StreamedGroups, in_memory
from fastpref.data.tokenizers import tokenizer_of
from fastpref.losses import Objective, PairwiseLoss
from fastpref.losses.groupwise import PROS
from fastpref.losses.normalized import SFT
from fastpref.losses.pointwise import KTO
from fastpref.losses.response_sft import ResponseSFT
from fastpref.losses.wrappers import TokenWeighted
from fastpref.model.batch_layout import choose_layout
from fastpref.model.coverage import announce_coverage
from fastpref.model.load import announce_code, load_policy
from fastpref.model.policy import Policy, context_length
from fastpref.model.reference_policy import Reference
from fastpref.model.reward_adapter import announce_head
from fastpref.model.reward_policy import set_padding_token
from fastpref.training import base_weights, checkpoint_files, run_folder
from fastpref.training.data_checks import (
    advise_on_margins,
    advise_on_weights,
    check_labels,
    check_margins,
    check_scores,
)
from fastpref.training.memory_budget import MemoryBudget, usable_bytes
from fastpref.training.optim import check_eight_bit
from fastpref.training.profiler import part
from fastpref.training.rank_checks import check_same_config, check_same_data
from fastpref.training.references import make_references
from fastpref.training.reward_checks import advise_on_padding, check_rewards
from fastpref.utils.atomic_files import clear_leftovers
from fastpref.utils.progress import Display


class MicroBatch(NamedTuple):
    """Forward passes of one micro-batch of this rank."""

    groups: list[int]  # indices into the data set; none if it is not real
    batches: list[Batch]
    accumulated: bool  # whether the step has several micro-batches on each rank

    @property
    def is_real(self) -> bool:
        """Whether it counts; a rank that ran out of groups computes one that does not."""
        return bool(self.groups)


@dataclass(frozen=True)
class DataView:
    """Groups, their order, and their reference log-probs."""

    groups: Groups | StreamedGroups
    plan: Plan
    reference: Reference

    def micro_batches(self, policy: Policy, step: int) -> Iterator[MicroBatch]:
        """Micro-batches of this rank in a step; every rank yields as many, some of them not real.

        The ranks of a sharded model gather its weights together, so a rank without groups computes
        the shortest group, whose results do not count.
        """
        parts = self.plan.step(step)
        for indices in parts:
            with part("batch"):
                batches = policy.batches(self.groups, indices or [self.plan.shortest])
            yield MicroBatch(indices, batches, accumulated=len(parts) > 1)

    def with_micro_batch_tokens(self, tokens: int) -> Self:
        """The same steps in micro-batches of another size."""
        return replace(self, plan=replace(self.plan, max_tokens=tokens))


@dataclass(frozen=True)
class DataSplit(DataView):
    """The data of training or of evaluation; for KTO also its mismatched responses."""

    groups: AnyDataset
    mismatched: DataView | None = None  # in the steps of `plan` and in the same order

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources, none if the data has one without a name."""
        mixture = self.groups.mixture
        return () if mixture is None else mixture.names

    def sources_of(self, indices: list[int]) -> Tensor | None:
        """Number of the source of each group, (len(indices),) int64; None without names."""
        mixture = self.groups.mixture
        return None if mixture is None else torch.from_numpy(mixture.sources_of(indices))

    @property
    def lengths(self) -> Any:
        """Tokens of each group, each response with its prompt, to be indexed by lists of groups."""
        if isinstance(self.groups, StreamedGroups):
            return StreamedLengths(self.groups, "packed")
        return tokens_of(self.groups, "packed")

    def with_micro_batch_tokens(self, tokens: int) -> Self:
        mismatched = self.mismatched and self.mismatched.with_micro_batch_tokens(tokens)
        return replace(super().with_micro_batch_tokens(tokens), mismatched=mismatched)


@dataclass(frozen=True)
class Loaded:
    """Tokenizer, policy, objective and data, as training and `fastpref precompute` load them."""

    tokenizer: PreTrainedTokenizerBase
    policy: Policy  # before a checkpoint is restored
    loss: Objective
    memory: MemoryBudget
    train: DataSplit
    eval: DataSplit | None = None


@dataclass(frozen=True)
class TrainingSetup(Loaded):
    folder: Path = Path()
    checkpoint: Path | None = None  # to continue from
    steps: int | None = None  # of the run, where the config does not say
    further_tensors: dict[str, Tensor] = field(default_factory=dict)  # kept in checkpoints, too

    def with_micro_batch_tokens(self, tokens: int) -> TrainingSetup:
        """The same run in micro-batches of another size."""
        held_out = self.eval and self.eval.with_micro_batch_tokens(tokens)
        return replace(self, train=self.train.with_micro_batch_tokens(tokens), eval=held_out)


def prepare(config: Config, display: Display, takes_first_step: bool = False) -> TrainingSetup:
    """Claim the run directory and `load`; raises UserError in one line."""
    folder = Path(config.training.output_dir)
    checkpoint = claim(folder, config.resume, display)
    if checkpoint is not None:
        base_weights.check(checkpoint, config)
    resumed = folder if checkpoint is not None else None
    loaded = load(config, display, resumed, takes_first_step and resumed is None)
    return TrainingSetup(**vars(loaded), folder=folder, checkpoint=checkpoint)


def precompute(config: Config, display: Display) -> None:
    """Cache the reference log-probs for all runs with the same model and data.

    Raises UserError as `prepare`, and where the config caches none.
    """
    if config.reference_mode != "cached":
        raise ConfigError(
            f"reference: {config.reference_mode} keeps no log-probs; use reference: cached"
        )
    check_same_config([config])
    load(config, display)
    display.note(f"reference log-probs are in {Path(config.data.cache).expanduser()}/reference")


def load(
    config: Config, display: Display, resumed: Path | None = None, takes_first_step: bool = False
) -> Loaded:
    """Load, tokenize and plan; the reference is computed from the policy as it was loaded.

    resumed: run directory, if the run is resumed.
    takes_first_step: whether the first step follows, which may compute what the reference needs.
    """
    loss, data, training = config.build_loss(), config.data, config.training
    announce_code(config.model, display.note)
    rows = row_kind(loss, data)
    if isinstance(loss, SFT) and rows == "sft":
        loss = _on_responses(loss, config)
    with distributed.main_process_first():
        tokenizer = tokenizer_of(config.model, data, rows)
        datasets: list[AnyDataset] = [_training_data(loss, config, tokenizer, rows)]
        if data.eval is not None:
            datasets.append(load_data(data, "eval", tokenizer, rows))
    if loss.of_rewards:
        set_padding_token(tokenizer)
    for name, dataset in zip(("train", "eval"), datasets, strict=False):
        check_same_data(f"data.{name}", dataset)
        for line in dataset.summary().splitlines():
            display.note(f"{name}: {line}")
        check_labels(loss, dataset)
        check_margins(loss, dataset)
        check_rewards(loss, name, dataset, display)
    check_scores(loss, datasets[0])
    if isinstance(loss, PairwiseLoss) and any(data.has_token_weights for data in datasets):
        loss = TokenWeighted(loss)
    advise_on_weights(loss, datasets[0], display)
    advise_on_margins(loss, datasets[0], display)
    advise_on_padding(loss, config.model, datasets[0], display)
    mismatched = [
        MismatchedGroups(dataset, data.max_length)
        for dataset in datasets
        if isinstance(loss, KTO) and not isinstance(dataset, StreamedGroups)
    ]
    device = device_of(training.device)
    check_eight_bit(config.optim, device)
    usable = usable_bytes(device)

    def new_policy(device: torch.device) -> Policy:
        return load_policy(
            config.model,
            tokenizer,
            device,
            training,
            config.parallel,
            adapter=config.adapter,
            keep_initial_adapter=config.reference_mode == "adapter",
            of_rewards=loss.of_rewards,
        )

    policy = new_policy(device)
    announce_coverage(policy, config.adapter, display.note)
    announce_head(policy, config.adapter, display.note)
    everything: list[Groups] = [*map(in_memory, datasets), *mismatched]
    choose_layout(policy, training, config.model.attn_implementation, everything, display)
    everything += [longest_possible(d) for d in datasets if isinstance(d, StreamedGroups)]
    memory = MemoryBudget(config, policy, len(tokenizer), usable, everything, display, resumed)
    seeds = (training.seed, None)  # held-out data has an order of its own
    # Every budget is checked before the reference takes its time.
    plans = [
        _plan(training, policy, memory.micro_batch_tokens, groups, seed)
        for groups, seed in zip(datasets, seeds, strict=False)
    ]
    mismatched_plans = [
        _plan(training, policy, memory.micro_batch_tokens, groups, seed)
        for groups, seed in zip(mismatched, seeds, strict=False)
    ]
    reference = make_references(config, policy, loss, lambda: new_policy(policy.device), display)
    views = [
        DataView(groups, plan, reference(groups, plan, False))
        for groups, plan in zip(mismatched, mismatched_plans, strict=True)
    ]
    splits = []
    for dataset, plan, view in zip_longest(datasets, plans, views):
        from_step = takes_first_step and dataset is datasets[0]
        of_data = reference(in_memory(dataset), plan, from_step)
        splits.append(DataSplit(dataset, plan, of_data, view))
    torch.manual_seed(training.seed + distributed.rank())  # dropout differs between ranks
    return Loaded(tokenizer, policy, loss, memory, *splits)


def _on_responses(loss: SFT, config: Config) -> ResponseSFT:
    """Return SFT on single responses; raises ConfigError for options that need pairs."""
    options = {
        "loss.responses: both": loss.responses == "both",
        "calibration": config.calibration is not None,
        "monitor.band_every": config.monitor.band_every is not None,
        "update: dpo_pg": config.update == "dpo_pg",
    }
    for option, is_set in options.items():
        if is_set:
            raise ConfigError(
                f"{option}: needs pairs, and {config.data.train} has single responses; remove it"
            )
    return ResponseSFT(average=loss.average)


def _training_data(
    loss: Objective, config: Config, tokenizer: PreTrainedTokenizerBase, rows: RowKind
) -> AnyDataset:
    data, training = config.data, config.training
    if not data.streaming:
        return load_data(data, "train", tokenizer, rows)
    if isinstance(loss, KTO | PROS):
        reason = "responses to other prompts" if isinstance(loss, KTO) else "the largest scores"
        raise ConfigError(
            f"data.streaming: {loss.name} needs {reason} of all the data before the first step; "
            "use another objective, or remove streaming"
        )
    return StreamedGroups(data, tokenizer, rows, training.batch_size, training.seed)


def _plan(
    training: Training,
    policy: Policy,
    max_tokens: int,
    groups: Groups | StreamedGroups,
    seed: int | None,
) -> Plan:
    if isinstance(groups, StreamedGroups):
        _check_context(longest_possible(groups), policy)
        return plan_stream(
            groups,
            training.batch_size,
            max_tokens,
            training.seed,
            policy.layout,
            distributed.world_size(),
            distributed.rank(),
        )
    _check_context(groups, policy)
    return Plan.of(
        groups,
        training.batch_size,
        max_tokens,
        seed,
        policy.layout,
        distributed.world_size(),
        distributed.rank(),
    )


def _check_context(groups: Groups, policy: Policy) -> None:
    longest, context = int(groups.padded_lengths.max()), context_length(policy)
    if context is not None and longest > context:
        raise ConfigError(
            f"data.max_length: the longest response ends at position {longest:,} but the model "
            f"knows {context:,}; set data.max_length={context} or less"
        )


def claim(folder: Path, resume: str | None, display: Display) -> Path | None:
    """Make the run directory; return the checkpoint to continue from, if `resume` asks for one."""
    root = folder / "checkpoints"
    if not distributed.all_ranks(resume is not None or not run_folder.holds_run(folder)):
        raise ConfigError(
            f"training.output_dir: {folder} already holds a run; continue it with resume=auto or "
            "choose another folder"
        )
    checkpoint = checkpoint_files.find(root, resume, display.note) if resume else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"training.output_dir: {error.filename}: {error.strerror}") from None
    if distributed.is_main_process():
        clear_leftovers(folder)
    return checkpoint


def device_of(name: str) -> torch.device:
    """Return the device of `training.device`; with several GPUs, the one of this rank.

    Raises ConfigError for a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "training.device: cuda is asked for, but torch finds no GPU; use cpu or auto"
        )
    if name == "cuda" and distributed.world_size() > 1:
        return torch.device("cuda", distributed.gpu_of_rank())
    return torch.device(name)
