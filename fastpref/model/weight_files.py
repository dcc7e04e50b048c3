"""Fingerprints of the files of a model, which tell whether other weights have taken their place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from fastpref.data.shards import sampled_hash

_BLOCK = 256  # bytes that are read in the middle and at the end of each tensor


def fingerprint(source: str) -> str | None:
    """Hash of names, shapes, dtypes and some bytes of all tensors, whatever files hold them.

    A change of a few numbers may go unnoticed; other training changes nearly all of them. Of files
    that are not safetensors, the sizes and some bytes count.

    source: a folder, or a name of the Hub whose files are in the cache.

    Returns None if there are no files.
    """
    folder = _folder(source)
    if folder is None:
        return None
    try:
        files = _safetensors(folder)
        if files:
            return hashlib.sha256("\n".join(sorted(_tensors(files))).encode()).hexdigest()
        pickles = sorted(folder.glob("*model*.bin"))
        return sampled_hash(pickles) if pickles else None
    except (OSError, ValueError, KeyError, TypeError):  # the model's own reader says what is wrong
        return None


def _folder(source: str) -> Path | None:
    if Path(source).is_dir():
        return Path(source)
    for name in ("config.json", "adapter_config.json"):
        try:
            cached = try_to_load_from_cache(source, name)
        except ValueError:  # no name of the Hub
            return None
        if isinstance(cached, str):
            return Path(cached).parent
    return None


def _safetensors(folder: Path) -> list[Path]:
    """The files that a model or an adapter is loaded from."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [folder / name for name in sorted({*names.values()})]
    whole = (folder / "model.safetensors", folder / "adapter_model.safetensors")
    return [path for path in whole if path.is_file()][:1]


def _tensors(files: list[Path]) -> Iterator[str]:
    """A line for each tensor: name, dtype, shape, and some of its bytes."""
    for path in files:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError(f"{path} is damaged")
            header: dict[str, Any] = json.loads(file.read(size))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = (8 + size + offset for offset in entry["data_offsets"])
                some = b""
                for position in ((begin + end) // 2, end - _BLOCK):
                    file.seek(max(begin, position))
                    some += file.read(min(_BLOCK, end - begin))
                yield f"{name} {entry['dtype']} {entry['shape']} {some.hex()}"
