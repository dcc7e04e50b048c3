"""Set up a run before its first step: folder, tokens, plan, policy and reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, Self

import torch
from transformers import PreTrainedTokenizerBase

from fastpref import distributed
from fastpref.config import Config, ConfigError, ReferenceMode, Training
from fastpref.data.batch_plan import Plan
from fastpref.data.collate import Batch
from fastpref.data.dataset import GroupDataset, Groups, load_groups
from fastpref.data.kto_mismatch import MismatchedGroups
from fastpref.data.sft import row_kind
from fastpref.data.tokenizers import tokenizer_of
from fastpref.losses import Objective, PairwiseLoss, TokenLevelLoss
from fastpref.losses.groupwise import PROS
from fastpref.losses.normalized import SFT
from fastpref.losses.pointwise import KTO
from fastpref.losses.response_sft import ResponseSFT
from fastpref.losses.wrappers import TokenWeighted
from fastpref.model.batch_layout import choose_layout, use_layout
from fastpref.model.load import announce_code, load_policy
from fastpref.model.policy import Policy, context_length
from fastpref.model.reference_policy import (
    AdapterReference,
    FrozenReference,
    Reference,
    cached_reference,
    no_reference,
)
from fastpref.training import checkpoint_files
from fastpref.training.memory_budget import MemoryBudget, usable_bytes
from fastpref.training.optim import check_eight_bit
from fastpref.training.profiler import part
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

    groups: Groups
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

    groups: GroupDataset
    mismatched: DataView | None = None  # in the steps of `plan` and in the same order

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

    def with_micro_batch_tokens(self, tokens: int) -> TrainingSetup:
        """The same run in micro-batches of another size."""
        held_out = self.eval and self.eval.with_micro_batch_tokens(tokens)
        return replace(self, train=self.train.with_micro_batch_tokens(tokens), eval=held_out)


def prepare(config: Config, display: Display) -> TrainingSetup:
    """Claim the run directory and `load`; raises UserError in one line."""
    folder = Path(config.training.output_dir)
    checkpoint = _claim(folder, config.resume, display)
    loaded = load(config, display, folder if checkpoint is not None else None)
    return TrainingSetup(**vars(loaded), folder=folder, checkpoint=checkpoint)


def precompute(config: Config, display: Display) -> None:
    """Cache the reference log-probs for all runs with the same model and data.

    Raises UserError as `prepare`, and where the config caches none.
    """
    if config.reference_mode != "cached":
        raise ConfigError(
            f"reference: {config.reference_mode} keeps no log-probs; use reference: cached"
        )
    load(config, display)
    display.note(f"reference log-probs are in {Path(config.data.cache).expanduser()}/reference")


def load(config: Config, display: Display, resumed: Path | None = None) -> Loaded:
    """Load, tokenize and plan; the reference is computed from the policy as it was loaded.

    resumed: run directory, if the run is resumed.
    """
    loss, data, training = config.build_loss(), config.data, config.training
    announce_code(config.model, display.note)
    rows = row_kind(loss, data)
    if isinstance(loss, SFT) and rows == "sft":
        loss = _on_responses(loss, config)
    with distributed.main_process_first():
        tokenizer = tokenizer_of(config.model, data, rows)
        datasets = [load_groups(data.train, tokenizer, data, rows)]
        if data.eval is not None:
            datasets.append(load_groups(data.eval, tokenizer, data, rows, "test"))
    for name, dataset in zip(("train", "eval"), datasets, strict=False):
        display.note(f"{name}: {dataset.summary()}")
        _check_labels(loss, dataset)
    _check_scores(loss, datasets[0])
    if isinstance(loss, PairwiseLoss) and any(data.has_token_weights for data in datasets):
        loss = TokenWeighted(loss)
    _advise_on_weights(loss, datasets[0], display)
    mismatched = [MismatchedGroups(d, data.max_length) for d in datasets if isinstance(loss, KTO)]
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
        )

    policy = new_policy(device)
    choose_layout(policy, training, config.model.attn_implementation, datasets[0], display)
    everything: list[Groups] = [*datasets, *mismatched]
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
    reference = _references(
        config.reference_mode,
        Path(data.cache).expanduser(),
        policy,
        lambda: new_policy(policy.device),
        display,
        per_token=isinstance(loss, TokenLevelLoss),
    )
    views = [
        DataView(groups, plan, reference(groups, plan))
        for groups, plan in zip(mismatched, mismatched_plans, strict=True)
    ]
    splits = [
        DataSplit(dataset, plan, reference(dataset, plan), view)
        for dataset, plan, view in zip_longest(datasets, plans, views)
    ]
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


def _plan(
    training: Training, policy: Policy, max_tokens: int, groups: Groups, seed: int | None
) -> Plan:
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


def _references(
    mode: ReferenceMode,
    cache: Path,
    policy: Policy,
    load_copy: Callable[[], Policy],
    display: Display,
    per_token: bool,
) -> Callable[[Groups, Plan], Reference]:
    """Return a function from groups and their plan to the reference; a frozen copy is shared."""
    if mode == "none":
        return lambda groups, plan: no_reference
    if mode == "cached":
        return lambda groups, plan: cached_reference(
            policy, groups, plan, cache, display, per_token
        )
    reference: Reference = AdapterReference(policy)
    if mode == "frozen":
        copy = load_copy()
        use_layout(copy, policy.layout)
        if policy.trunk is None:
            copy.use_transformers(policy.not_fused)
        reference = FrozenReference(copy)
    return lambda groups, plan: reference


def _check_labels(loss: Objective, dataset: GroupDataset) -> None:
    if isinstance(loss, PairwiseLoss) and not loss.soft_labels and dataset.has_preferences:
        raise ConfigError(
            f"loss: {loss.name} does not take soft labels, and the data has them; set "
            f"data.soft_labels=false or choose another objective"
        )


def _check_scores(loss: Objective, dataset: GroupDataset) -> None:
    """Refuse an alpha at or below which PRO-S has no optimum for some group."""
    if not isinstance(loss, PROS):
        return
    scores, offsets = torch.tensor(dataset.label_values()), torch.tensor(dataset.offsets)

    def required(first: int, last: int) -> float:
        cu_groups = offsets[first : last + 1]
        part = scores[cu_groups[0] : cu_groups[-1]]
        return loss.required_alpha(part, cu_groups - cu_groups[0]).item()

    size = 64  # the matrices of required_alpha grow with its square
    starts = range(0, len(dataset), size)
    start = max(starts, key=lambda k: required(k, min(k + size, len(dataset))))
    worst = max(range(start, min(start + size, len(dataset))), key=lambda k: required(k, k + 1))
    bound = required(worst, worst + 1)
    if loss.alpha <= bound:
        first, last = dataset.offsets[worst : worst + 2]
        spread = (scores[first:last] - scores[first:last].mean()).abs().max().item()
        raise ConfigError(
            f"loss.alpha: must be > {bound:.4g} for these scores, got {loss.alpha:g}; at or below "
            f"it pro_s has no optimum (row {dataset[worst].row} of {dataset.source}, whose "
            f"{last - first} scores lie up to {spread:.4g} from their mean); raise it or scale the "
            "scores down"
        )


def _advise_on_weights(loss: Objective, dataset: GroupDataset, display: Display) -> None:
    """Note where the weights of KTO's classes are outside the advised range (see `KTO`)."""
    if not isinstance(loss, KTO):
        return
    desirable = int(dataset.label_values().sum())
    undesirable = len(dataset) - desirable
    if not desirable or not undesirable:
        missing = "undesirable" if desirable else "desirable"
        display.note(f"note: there is no {missing} response; kto is meant for both classes")
        return
    weights = (loss.desirable_weight * desirable, loss.undesirable_weight * undesirable)
    ratio = weights[0] / weights[1]
    if not 1 <= ratio <= 4 / 3:
        low = loss.undesirable_weight * undesirable / desirable
        display.note(
            f"note: desirable responses weigh {ratio:.2f} times as much as undesirable ones; "
            f"between 1 and 1.33 is advised, e.g. loss.desirable_weight from {low:.3g} to "
            f"{low * 4 / 3:.3g}"
        )


def _check_context(groups: Groups, policy: Policy) -> None:
    longest, context = int(groups.padded_lengths.max()), context_length(policy)
    if context is not None and longest > context:
        raise ConfigError(
            f"data.max_length: the longest response ends at position {longest:,} but the model "
            f"knows {context:,}; set data.max_length={context} or less"
        )


def _claim(folder: Path, resume: str | None, display: Display) -> Path | None:
    """Make the run directory; return the checkpoint to continue from, if `resume` asks for one."""
    root = folder / "checkpoints"
    has_run = (folder / "metrics.jsonl").exists() or bool(checkpoint_files.complete_steps(root))
    if not distributed.all_ranks(resume is not None or not has_run):
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
        return torch.device("cuda", distributed.local_rank())
    return torch.device(name)
