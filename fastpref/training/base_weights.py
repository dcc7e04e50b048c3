"""The weights that a run starts from, which a resumed run must have again.

A checkpoint holds the trained weights alone. The frozen base of an adapter and the reference are
loaded from their files, so other files in their place would change the run.
"""

from __future__ import annotations

import os
from pathlib import Path

from fastpref import distributed
from fastpref.config import Config, ConfigError
from fastpref.model.weight_files import fingerprint
from fastpref.training import checkpoint_files


def fingerprints(config: Config) -> dict[str, str]:
    """Fingerprints of the files of model, adapter and teacher, as rank 0 sees them."""
    known: dict[str, str] = {}
    for field, path in _paths(config).items() if distributed.is_main_process() else ():
        text = path and fingerprint(path)
        if text:
            known[field] = text
    return distributed.broadcast(known)


def check(checkpoint: Path, config: Config) -> None:
    """Raise ConfigError for files with other weights than those that the checkpoint began from.

    What is not known of either is not compared, such as checkpoints of earlier versions.
    """
    saved = checkpoint_files.position(checkpoint).get("base", {})
    for field, text in fingerprints(config).items():
        if saved.get(field, text) != text:
            raise ConfigError(
                f"{field}: the weights of {_paths(config)[field]} are not those that {checkpoint} "
                "began from; restore them, or choose another training.output_dir"
            )


def _paths(config: Config) -> dict[str, str | None]:
    adapter = None if config.adapter is None else config.adapter.path
    teacher = getattr(config.build_loss(), "teacher", None)
    teacher = teacher and os.path.expanduser(teacher)
    return {"model.path": config.model.path, "adapter.path": adapter, "loss.teacher": teacher}
