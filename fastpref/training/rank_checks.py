"""Checks of what all ranks of a run share, before the first step: config, data and folder."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from fastpref import distributed
from fastpref.config import Config, ConfigError
from fastpref.config.yaml_io import flatten, parse_yaml
from fastpref.utils.atomic_files import sha256

# Fields that may differ between nodes: each tokenizes into a cache of its own.
_OF_NODE = ("data.cache",)
_SHOWN = 4  # differences in a message
# Seconds after which a file must be seen: network file systems cache what is in a folder.
_PATIENCE = 15.0


class _Tokens(Protocol):
    """Data of a run, with hashes of its token ids and of its labels."""

    source: str
    fingerprint: str
    labels: Any


def check_same_config(configs: Iterable[Config]) -> None:
    """Raise ConfigError where the configs of a rank, one or those of a grid, are not rank 0's."""
    if distributed.world_size() == 1:
        return
    ours = [_fields(config) for config in configs]
    theirs = distributed.broadcast(ours)
    problem = None
    if len(ours) != len(theirs):
        problem = f"{len(theirs)} runs → {len(ours)} runs"
    else:
        pairs = zip(theirs, ours, strict=True)
        problem = next((text for pair in pairs if (text := _differences(*pair))), None)
    problems = distributed.gather_objects(problem)
    number = next((rank for rank, text in enumerate(problems) if text), None)
    if number is not None:
        raise ConfigError(
            f"the config of rank {number} is not that of rank 0: {problems[number]}; start all "
            "ranks with the same config and overrides"
        )


def check_same_data(field: str, dataset: _Tokens) -> None:
    """Raise ConfigError where a rank reads other rows, tokens or labels than rank 0 does."""
    fingerprint = sha256(dataset.fingerprint, str(dataset.labels))
    check_same_rows(field, dataset.source, fingerprint)


def check_same_rows(field: str, source: object, fingerprint: str) -> None:
    """Raise ConfigError where rows of a source have another fingerprint on a rank than on rank 0.

    A collective call.
    """
    prints = distributed.gather_objects(fingerprint)
    number = next((rank for rank, text in enumerate(prints) if text != prints[0]), None)
    if number is not None:
        raise ConfigError(
            f"{field}: rank {number} reads other rows or tokens from {source} than rank 0 "
            f"({prints[0][:8]} → {prints[number][:8]}); give all nodes the same files and versions"
        )


def check_shared(folder: Path) -> None:
    """Raise ConfigError where a rank does not see a file that rank 0 writes to the folder."""
    if distributed.world_size() == 1:
        return
    probe = folder / f".seen-by-all-{distributed.broadcast(secrets.token_hex(8))}"
    # Also lets the others wait until the file is there.
    problem = distributed.broadcast(_touch(probe) if distributed.is_main_process() else None)
    if problem is not None:
        raise ConfigError(problem)
    seen_by = distributed.gather_objects(_appears(probe))
    if distributed.is_main_process():
        probe.unlink(missing_ok=True)
    distributed.barrier()  # until the file is gone
    if not all(seen_by):
        raise ConfigError(
            f"training.output_dir: rank {seen_by.index(False)} does not see the files that rank 0 "
            f"writes to {folder}; choose a folder that all nodes share"
        )


def _touch(path: Path) -> str | None:
    """Create a file, or return why that cannot be."""
    try:
        path.touch()
    except OSError as error:
        return f"training.output_dir: {error.filename}: {error.strerror}; choose another folder"
    return None


def _fields(config: Config) -> dict[str, Any]:
    fields = flatten(parse_yaml(config.to_yaml()))
    return {name: value for name, value in fields.items() if name not in _OF_NODE}


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """`field: value of rank 0 → value of this rank` for some fields; None if all are equal."""
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if not names:
        return None
    some = [f"{name}: {theirs.get(name)} → {ours.get(name)}" for name in names[:_SHOWN]]
    return ", ".join([*some, *(["…"] if len(names) > _SHOWN else [])])


def _appears(path: Path) -> bool:
    """Whether a file can be seen, now or soon."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            # Reading a folder makes NFS ask the server, also for names that were not there before.
            os.listdir(path.parent.parent)
            if path.name in os.listdir(path.parent):
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
