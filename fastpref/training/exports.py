"""Exports of a run in Hugging Face format: during training, at its end, and of a checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from fastpref import distributed
from fastpref.config import Config, Parallel, load
from fastpref.data.sft import row_kind
from fastpref.data.sources import load_data
from fastpref.data.tokenizers import tokenizer_of
from fastpref.model.export import export
from fastpref.model.load import load_policy
from fastpref.model.policy import Policy
from fastpref.model.reward_policy import set_padding_token
from fastpref.training import checkpoint, checkpoint_files, model_card
from fastpref.training.checkpoint_files import CheckpointError
from fastpref.utils import hub
from fastpref.utils.atomic_files import discard, remove, replacing
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display


@dataclass(frozen=True)
class Exporter:
    """Writer of the exports of one run; all ranks call `write`."""

    config: Config
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    folder: Path  # of the run

    def write(self, target: Path, step: int, scratch: Path | None = None) -> None:
        """Replace `target` by the model as it is, whose card has the metrics up to `step`.

        scratch: as in `replacing`.
        """
        adapter = self.config.adapter
        merge = adapter is None or adapter.merge
        if not distributed.is_main_process():
            export(self.policy, self.tokenizer, target, merge)  # sends this rank's shards
            return
        with replacing(target, scratch) as temporary:
            export(self.policy, self.tokenizer, temporary, merge)
            model_card.write(
                temporary,
                self.config.build_loss().name,
                self.config.to_yaml(),
                self.folder / "metrics.jsonl",
                step,
            )

    def write_step(self, step: int) -> Path:
        """Write `exports/step-N` of the run and return its path."""
        target = self.folder / "exports" / f"step-{step}"
        # The next process of the run clears the run directory of what a killed one left.
        self.write(target, step, scratch=self.folder)
        return target

    def upload(self, folder: Path, display: Display) -> None:
        """Upload an export to the Hub, from rank 0, if the config asks for it.

        Raises UploadError in one line; the export stays.
        """
        training = self.config.training
        if not training.push_to_hub or not distributed.is_main_process():
            return
        assert training.hub_model_id is not None
        name = training.hub_model_id
        retry = f"fastpref export {self.folder} --push-to-hub {name}"
        address = hub.upload(folder, name, training.hub_private_repo, retry)
        display.note(f"uploaded: {address}")

    def delete_after(self, step: int) -> None:
        """Delete exports of later steps, which a run that resumes from `step` writes again."""
        root = self.folder / "exports"
        if distributed.is_main_process():
            for later in checkpoint_files.complete_steps(root):
                if later > step:
                    discard(root / f"step-{later}")


def export_step(run: Path, step: int, target: Path, device: torch.device, display: Display) -> None:
    """Write the model of checkpoint `step` of a run to `target`, while the run may go on.

    Raises UserError if the run, the step or the data of its tokenizer is not there, if the
    checkpoint is damaged or is deleted meanwhile, or if `target` exists.
    """
    config_file = run / "config.yaml"
    if not config_file.is_file():
        raise UserError(
            f"{run}: no such run; expected a folder with config.yaml and checkpoints, as "
            "`fastpref train` writes it"
        )
    if target.exists():
        raise UserError(f"--output: {target} is already there; choose another folder")
    config = load(config_file)
    with _held_checkpoint(run, step, target) as held:
        tokenizer = _tokenizer(config, checkpoint_files.position(held)["plan"][0])
        training = config.training.model_copy(
            update={"activation_checkpointing": "off", "compile": False}
        )
        policy = load_policy(
            config.model,
            tokenizer,
            device,
            training,
            Parallel(),
            adapter=config.adapter,
            of_rewards=config.build_loss().of_rewards,
        )
        checkpoint.restore_weights(held, policy, "--step")
    Exporter(config, policy, tokenizer, run).write(target, step)
    display.note(f"model: {target}")


def _tokenizer(config: Config, fingerprint: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a run; raises UserError if it was trained on data that has changed."""
    rows = row_kind(config.build_loss(), config.data)
    tokenizer = tokenizer_of(config.model, config.data, rows)
    is_trained = config.model.tokenizer is None and config.model.path is None
    if is_trained:
        groups = load_data(config.data, "train", tokenizer, rows)
        if groups.fingerprint != fingerprint:
            raise UserError(
                f"data.train: {groups.source} has changed since the run, whose tokenizer was "
                "trained on it; restore it"
            )
    if config.build_loss().of_rewards:
        set_padding_token(tokenizer)
    return tokenizer


@contextmanager
def _held_checkpoint(run: Path, step: int, target: Path) -> Iterator[Path]:
    """Context manager that yields a checkpoint's files in a folder next to `target`.

    They are hard links, or copies on another file system, so the run may delete its own.
    """
    root = run / "checkpoints"
    steps = checkpoint_files.complete_steps(root)
    source = root / f"step-{step}"
    if step not in steps:
        known = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
        raise UserError(f"--step: {run} has no checkpoint of step {step}; {known}, choose one")
    held = target.parent / f".{target.name}.{os.getpid()}.checkpoint"
    remove(held)
    try:
        held.mkdir(parents=True)
        try:
            for file in source.iterdir():
                _link(file, held / file.name)
        except FileNotFoundError:
            _check_is_there(source)
            raise
        damage = checkpoint_files.damage(held)
        if damage is not None:
            _check_is_there(source)
            raise CheckpointError(f"--step: {source}: {damage}; choose another step")
        yield held
    finally:
        remove(held)


def _check_is_there(source: Path) -> None:
    if not source.exists():
        raise CheckpointError(
            f"--step: {source} was deleted by the run while it was read; choose a later step, or "
            "raise training.keep_checkpoints"
        )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    # Another file system, or one without hard links.
    except OSError:
        shutil.copyfile(source, target)
