"""Sources of models, folders and Hub names, as far as a look at the disk tells what is wrong."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fastpref.utils.errors import ModelError, UserError
from fastpref.utils.paths import expand

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def check_source(field: str, source: str, config: str | None = None) -> None:
    """Raise ModelError for a source that cannot be loaded, at a glance.

    That is a folder that does not exist and is no name for the Hub either; with the Hub switched
    off, also one that is not in its cache; and a folder without the file `config`.

    field: the option, for the message.
    """
    folder = Path(source)
    cannot = f"{field}: cannot load {source}"
    if folder.is_dir():
        if config is None or (folder / config).exists():
            return
        if (inner := _model_of(folder)) is not None:
            raise ModelError(f"{cannot}: it is a run directory; use its model, {inner}")
        raise ModelError(f"{cannot}: the folder has no {config}; name the folder of a model")
    if folder.exists():
        raise ModelError(f"{cannot}: it is a file; name the folder of a model")
    if _HUB_NAME.fullmatch(source) is None:
        raise ModelError(f"{cannot}: no such folder; check the path")
    switch = next((name for name in _OFFLINE if _is_on(name)), None)
    if switch is not None and not (_hub_cache() / f"models--{source.replace('/', '--')}").exists():
        raise ModelError(
            f"{cannot}: no such folder, and the Hub's cache has no such model ({switch} is set); "
            "check the path"
        )


def of_a_run(field: str, source: str) -> str:
    """Return a source with its `~` and variables replaced, and of a run directory its model.

    Raises ModelError for a run that has exported none, and as `check_source` does.
    """
    try:
        source = expand(source)
    except UserError as error:
        raise ModelError(f"{field}: {error}") from None
    folder = Path(source)
    # A folder of a model or adapter has its own config, in JSON.
    if (folder / "config.yaml").is_file() and not _is_model(folder):
        inner = _model_of(folder)
        if inner is None:
            raise ModelError(
                f"{field}: the run {source} has no model/ yet; write one by fastpref export "
                f"{source} --step N"
            )
        return str(inner)
    check_source(field, source)
    return source


def _model_of(run: Path) -> Path | None:
    return run / "model" if _is_model(run / "model") else None


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")


def _hub_cache() -> Path:
    """Folder of the Hub's cache, as huggingface_hub chooses it."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.path.expandvars(os.environ[variable])).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"
    )
    return Path(os.path.expandvars(home)).expanduser() / "hub"
