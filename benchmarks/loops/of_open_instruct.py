"""The loop of open-instruct's `dpo_tune_cache.py`, around the tiny model of the other loops.

Its functions come from a folder of its sources, without their imports: the whole module needs
packages for clusters and for sampling.
"""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.loops import setting

SOURCES = "OPEN_INSTRUCT"  # environment variable: the folder open_instruct of its sources
FUNCTIONS = {
    "tensor_utils.py": ("pad_to_length",),
    "dpo_utils.py": ("concatenated_inputs", "dpo_loss"),
}


def import_functions(folder: Path) -> ModuleType:
    """Make `open_instruct.dpo_utils`, with the functions of a folder `open_instruct`."""
    package, utils = ModuleType("open_instruct"), ModuleType("open_instruct.dpo_utils")
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": torch.nn.functional}
    for file, functions in FUNCTIONS.items():
        tree = ast.parse((folder / file).read_text(encoding="utf-8"))
        tree.body = [
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and node.name in functions
        ]
        if len(tree.body) != len(functions):
            raise ValueError(f"{folder / file}: expected the functions {', '.join(functions)}")
        exec(compile(tree, file, "exec"), names)  # noqa: S102
        if file == "tensor_utils.py":
            names["tensor_utils"] = _namespace("tensor_utils", names)
    utils.__dict__.update(names)
    package.dpo_utils = utils  # type: ignore[attr-defined]
    sys.modules |= {"open_instruct": package, "open_instruct.dpo_utils": utils}
    return utils


def _namespace(name: str, names: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(names)
    return module


def collate(rows: list[tuple[int, setting.Example]]) -> dict[str, Tensor]:
    """The columns of its collator: one for each side, padded to the same length, and indices."""
    batch = setting.collate([example for _, example in rows])
    sides = zip(("chosen", "rejected"), (0, 1), strict=True)
    columns = {
        f"{side}_{name}": values.chunk(2)[half]
        for side, half in sides
        for name, values in batch.items()
    }
    return columns | {"index": torch.tensor([index for index, _ in rows])}


def models(tied: bool) -> tuple[Any, Any]:
    """The reference is the policy at the start."""
    return setting.causal_model(tied=tied), setting.causal_model(tied=tied)


def train(code: str, rank: int, tied: bool) -> tuple[Any, Tensor]:
    """Train as its loop does: weights are loaded into shards; the reference's log-probs first."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin
    from transformers import AutoModelForCausalLM

    utils = import_functions(Path(os.environ[SOURCES]))
    exec(code, {})  # noqa: S102
    if rank == 0:
        models(tied)[0].save_pretrained("model")
    dist.barrier()
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(setting.ZERO_3))
    policy = AutoModelForCausalLM.from_pretrained("model")
    rows: Any = list(enumerate(setting.examples()))
    loader: DataLoader[Any] = DataLoader(rows, setting.PAIRS, collate_fn=collate)
    model, optimizer, batches = accelerator.prepare(policy, setting.sgd(policy), loader)
    cache = _reference_logps(model, [collate([row]) for row in rows], utils)
    for batch in batches:
        with accelerator.accumulate(model):
            chosen, rejected, _ = utils.concatenated_forward(
                model, batch, average_log_prob=False, output_router_logits=False
            )
            losses, _, _ = utils.dpo_loss(
                chosen, rejected, *cache[batch["index"]].T, beta=setting.BETA
            )
            accelerator.backward(losses.mean())
            optimizer.step()
            optimizer.zero_grad()
    return policy, losses.mean()


@torch.no_grad()
def _reference_logps(model: Any, batches: list[dict[str, Tensor]], utils: Any) -> Tensor:
    """Log-probs (N, 2) of the policy before training."""
    model.eval()
    logps = [torch.cat(utils.concatenated_forward(model, batch)[:2]) for batch in batches]
    model.train()
    return torch.stack(logps)
