"""Checkpoints that are complete or absent, in safetensors and JSON; nothing is pickled.

A checkpoint holds the trained weights, the optimizer's state, the random state and the position
in the run. Frozen weights come from where they came from at the start.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from fastpref.errors import UserError
from fastpref.files import replacing
from fastpref.model import Policy

_NAME = re.compile(r"step-(\d+)")


class CheckpointError(UserError):
    """A checkpoint that cannot be continued from."""


def save(
    root: Path,
    step: int,
    policy: Policy,
    optimizer: Optimizer,
    position: dict[str, Any],
    window: Tensor,
    keep: int,
) -> Path:
    """Write `root/step-N` beside, rename it when complete, and only then drop the oldest."""
    folder = root / f"step-{step}"
    for stale in root.glob(".step-*"):  # left by a killed process
        shutil.rmtree(stale)
    with replacing(folder) as temporary:
        temporary.mkdir()
        save_file(_trained(policy), temporary / "weights.safetensors")
        state = optimizer.state_dict()
        save_file(_flatten(state["state"]), temporary / "optimizer.safetensors")
        save_file({"window": window, **_random_state()}, temporary / "state.safetensors")
        about = {"step": step, "position": position, "optimizer": type(optimizer).__name__}
        (temporary / "state.json").write_text(json.dumps(about))
    complete = _complete(root)
    kept = [done for done in complete if done <= step][-keep:]  # later ones: an abandoned branch
    for old in set(complete) - set(kept):
        shutil.rmtree(root / f"step-{old}")
    return folder


def find(root: Path, resume: str) -> Path | None:
    """The checkpoint to continue from: the newest complete one for `auto`, or the folder named."""
    if resume != "auto":
        folder = Path(resume)
        if not (folder / "state.json").is_file():
            raise CheckpointError(f"resume: {resume} is not a checkpoint folder")
        return folder
    steps = _complete(root)
    return root / f"step-{steps[-1]}" if steps else None


def position(folder: Path) -> dict[str, Any]:
    """The saved position in the run, with its `step`."""
    about = json.loads((folder / "state.json").read_text())
    return {"step": about["step"], **about["position"]}


def restore(folder: Path, policy: Policy, optimizer: Optimizer) -> Tensor:
    """Load weights, optimizer and random state; returns the saved window of metrics."""
    weights = load_file(folder / "weights.safetensors")
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    shapes, saved = ({n: p.shape for n, p in x.items()} for x in (trained, weights))
    if shapes != saved:
        odd = min(name for name, _ in shapes.items() ^ saved.items())
        raise CheckpointError(f"resume: {folder} is of another model or adapter (differs in {odd})")
    about = json.loads((folder / "state.json").read_text())
    if about["optimizer"] != type(optimizer).__name__:
        raise CheckpointError(
            f"resume: {folder} is of a run with {about['optimizer']}; restore optim.name"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    moments = _unflatten(load_file(folder / "optimizer.safetensors"))
    groups = optimizer.state_dict()["param_groups"]  # hyperparameters are those of the config
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    state = load_file(folder / "state.safetensors")
    torch.set_rng_state(state["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in state:
        torch.cuda.set_rng_state(state["rng.cuda"])
    return state["window"]


def _complete(root: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    found = [_NAME.fullmatch(path.name) for path in root.iterdir()] if root.is_dir() else []
    return sorted(int(match[1]) for match in found if match)


def _trained(policy: Policy) -> dict[str, Tensor]:
    return {n: p.detach().contiguous() for n, p in policy.named_parameters() if p.requires_grad}


def _random_state() -> dict[str, Tensor]:
    state = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["rng.cuda"] = torch.cuda.get_rng_state()
    return state


def _flatten(state: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{i}.{name}": t for i, entry in state.items() for name, t in entry.items()}


def _unflatten(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    return state
