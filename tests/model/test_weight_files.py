"""A fingerprint of weights depends on the tensors, not on the files that hold them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastpref.model.weight_files import fingerprint


@pytest.fixture
def model(tiny_llama: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def test_a_copy_in_several_files_has_the_same(model: Path, tmp_path: Path) -> None:
    before = fingerprint(str(model))
    tensors = load_file(model / "model.safetensors")
    names, index = sorted(tensors, reverse=True), {}
    for number, part in enumerate((names[:3], names[3:])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, model / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert fingerprint(str(model)) == before is not None


@pytest.mark.parametrize("change", ["values", "dtype", "name"])
def test_other_tensors_have_another(model: Path, change: str) -> None:
    before, file = fingerprint(str(model)), model / "model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensor = tensors.pop(name)
    changed = {
        "values": {name: tensor + 1e-4},
        "dtype": {name: tensor.to(torch.bfloat16)},
        "name": {f"{name}.": tensor},
    }
    save_file({**tensors, **changed[change]}, file)
    assert fingerprint(str(model)) not in (None, before)


def test_pickled_weights_have_one(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(9)}, tmp_path / "pytorch_model.bin")
    before = fingerprint(str(tmp_path))
    torch.save({"weight": torch.ones(9)}, tmp_path / "pytorch_model.bin")
    assert None is not before != fingerprint(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{}", b"\xff" * 64])
def test_damaged_files_have_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert fingerprint(str(tmp_path)) is None


@pytest.mark.parametrize("source", ["no/where", "/no/where", "nobody/nothing"])
def test_what_is_not_there_has_none(source: str) -> None:
    assert fingerprint(source) is None
