"""The config of a run in its directory."""

from __future__ import annotations

from collections.abc import Callable

from fastpref import distributed
from fastpref.config import Config
from fastpref.training.setup import TrainingSetup
from fastpref.utils.atomic_files import replacing


def save(config: Config, run: TrainingSetup, note: Callable[[str], object]) -> None:
    """Write `config.yaml`; of a resumed run, note the fields that have changed."""
    path = run.folder / "config.yaml"
    if run.checkpoint is not None and path.exists():
        for difference in config.differences(path):
            note(f"changed since the run began: {difference}")
    if distributed.is_main_process():
        with replacing(path) as temporary:
            temporary.write_text(config.to_yaml(), encoding="utf-8")
