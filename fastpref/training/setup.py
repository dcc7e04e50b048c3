"""Everything that is ready before the first step: folder, tokens, plan, policy, reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from fastpref import distributed
from fastpref.config import Config, ConfigError
from fastpref.data.batch_plan import Plan
from fastpref.data.collate import Batch
from fastpref.data.dataset import GroupDataset, Groups, load_groups
from fastpref.data.kto_mismatch import Mismatched
from fastpref.data.tokenizers import tokenizer_of
from fastpref.losses import Loss, PairwiseLoss, TokenLevelLoss
from fastpref.losses.groupwise import PROS
from fastpref.losses.pointwise import KTO
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
from fastpref.training.optim import check_eight_bit
from fastpref.utils.atomic_files import clear_leftovers
from fastpref.utils.progress import Display


@dataclass(frozen=True)
class DataView:
    """Groups, the order in which they are visited, and their reference log-probs."""

    groups: Groups
    plan: Plan
    reference: Reference

    def batches(self, policy: Policy, indices: list[int]) -> list[Batch]:
        """The forward passes of a micro-batch, or of one that holds nothing: ranks gather the model
        together, so where a rank has no group left it takes one that does not count."""
        return policy.batches(self.groups, indices or [self.plan.shortest])


@dataclass(frozen=True)
class DataSplit(DataView):
    """The data of training or of evaluation; for KTO also its mismatched responses."""

    groups: GroupDataset
    mismatched: DataView | None = None  # in the steps of `plan` and the same order


@dataclass(frozen=True)
class Loaded:
    tokenizer: PreTrainedTokenizerBase
    policy: Policy  # as loaded; not yet restored from a checkpoint
    loss: Loss
    train: DataSplit
    eval: DataSplit | None = None


@dataclass(frozen=True)
class TrainingSetup(Loaded):
    folder: Path = Path()
    checkpoint: Path | None = None  # to continue from


def prepare(config: Config, display: Display) -> TrainingSetup:
    """Claim the run directory and `load`.

    Raises UserError in one line for anything a user can mend.
    """
    folder = Path(config.training.output_dir)
    found = _claim(folder, config, display)
    return TrainingSetup(**vars(load(config, display)), folder=folder, checkpoint=found)


def precompute(config: Config, display: Display) -> None:
    """Have the reference log-probs in the cache, for runs with the same model and data.

    Raises UserError as `prepare`, and where the config caches none.
    """
    if config.reference_mode != "cached":
        raise ConfigError(
            f"reference: {config.reference_mode} keeps no log-probs; use reference: cached"
        )
    load(config, display)
    display.note(f"reference log-probs are in {Path(config.data.cache).expanduser()}/reference")


def load(config: Config, display: Display) -> Loaded:
    """Load, tokenise and plan; the reference is taken from the policy as it was loaded."""
    loss, data = config.build_loss(), config.data
    announce_code(config.model, display.note)
    with distributed.main_process_first():
        tokenizer = tokenizer_of(config)
        datasets = [load_groups(data.train, tokenizer, data, loss.kind)]
        if data.eval is not None:
            datasets.append(load_groups(data.eval, tokenizer, data, loss.kind, "test"))
    for name, dataset in zip(("train", "eval"), datasets, strict=False):
        display.note(f"{name}: {dataset.summary()}")
        _check_labels(loss, dataset)
    _check_scores(loss, datasets[0])
    if isinstance(loss, PairwiseLoss) and any(data.has_token_weights for data in datasets):
        loss = TokenWeighted(loss)
    _advise_on_weights(loss, datasets[0], display)
    mismatched = [Mismatched(d, data.max_length) for d in datasets if isinstance(loss, KTO)]
    device = device_of(config.training.device)
    check_eight_bit(config.optim, device)
    policy = load_policy(config, tokenizer, device)
    choose_layout(policy, config, datasets[0], display)
    seeds = (config.training.seed, None)  # held-out data is visited in its own order
    # Every budget is checked before the reference takes its time.
    plans = [
        _plan(config, policy, groups, seed) for groups, seed in zip(datasets, seeds, strict=False)
    ]
    others = [
        _plan(config, policy, groups, seed) for groups, seed in zip(mismatched, seeds, strict=False)
    ]
    loaded = partial(load_policy, config, tokenizer, policy.device)
    reference = _references(config, policy, loaded, display, isinstance(loss, TokenLevelLoss))
    visits = [
        DataView(groups, plan, reference(groups, plan))
        for groups, plan in zip(mismatched, others, strict=True)
    ]
    splits = [
        DataSplit(dataset, plan, reference(dataset, plan), other)
        for dataset, plan, other in zip_longest(datasets, plans, visits)
    ]
    torch.manual_seed(config.training.seed + distributed.rank())  # dropout is not alike on all
    return Loaded(tokenizer, policy, loss, *splits)


def _plan(config: Config, policy: Policy, groups: Groups, seed: int | None) -> Plan:
    _check_context(groups, policy)
    t = config.training
    shared = distributed.world_size(), distributed.rank()
    return Plan.of(groups, t.batch_size, t.micro_batch_tokens, seed, policy.layout, *shared)


def _references(
    config: Config,
    policy: Policy,
    loaded: Callable[[], Policy],
    display: Display,
    per_token: bool,
) -> Callable[[Groups, Plan], Reference]:
    """Makes the reference for groups and their plan; a frozen one is loaded once for all."""
    mode, cache = config.reference_mode, Path(config.data.cache).expanduser()
    if mode == "none":
        return lambda groups, plan: no_reference
    if mode in ("frozen", "adapter"):
        live: Reference = AdapterReference(policy)
        if mode == "frozen":
            use_layout(second := loaded(), policy.layout)
            live = FrozenReference(second)
        return lambda groups, plan: live
    return lambda groups, plan: cached_reference(policy, groups, plan, cache, display, per_token)


def _check_labels(loss: Loss, dataset: GroupDataset) -> None:
    if isinstance(loss, PairwiseLoss) and not loss.soft_labels and dataset.has_preferences:
        raise ConfigError(
            f"loss: {loss.name} does not take soft labels, and the data has them; set "
            f"data.soft_labels=false or choose another objective"
        )


def _check_scores(loss: Loss, dataset: GroupDataset) -> None:
    """Refuse an alpha at or below which PRO-S may have no optimum for some group."""
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
            f"it pro_s may have no optimum (row {dataset[worst].row} of {dataset.source}, whose "
            f"{last - first} scores lie up to {spread:.4g} from their mean); raise it or scale the "
            "scores down"
        )


def _advise_on_weights(loss: Loss, dataset: GroupDataset, display: Display) -> None:
    """A note where KTO's classes weigh more unequally than is advised (see `KTO`)."""
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


def _claim(folder: Path, config: Config, display: Display) -> Path | None:
    """Make the run directory and find the checkpoint to continue from, if that is asked for."""
    root = folder / "checkpoints"
    begun = (folder / "metrics.jsonl").exists() or checkpoint_files.complete(root)
    taken = config.resume is None and begun
    if not distributed.all_ranks(not taken):
        raise ConfigError(
            f"training.output_dir: {folder} already holds a run; continue it with resume=auto or "
            "choose another folder"
        )
    found = checkpoint_files.find(root, config.resume, display.note) if config.resume else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"training.output_dir: {error.filename}: {error.strerror}") from None
    if distributed.is_main_process():
        clear_leftovers(folder)
    return found


def device_of(name: str) -> torch.device:
    """The device of `training.device`, of several GPUs this rank's own.

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
