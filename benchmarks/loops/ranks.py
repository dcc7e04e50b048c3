"""A snippet on one of two ranks, and how far its parameters are from plain PyTorch's."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.loops import setting
from benchmarks.loops.libraries import Loop


def work(rank: int, port: int, loop: Loop, tied: bool, folder: Path) -> None:
    """Run a snippet as one of the ranks; the first writes `errors.json` into the folder."""
    torch.set_num_threads(1)
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": setting.RANKS}
    values |= {"LOCAL_WORLD_SIZE": setting.RANKS, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in values.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "loops"}
    os.chdir(folder)
    loop.prepare()
    result = errors(loop, rank, tied)
    if rank == 0:
        (folder / "errors.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


def errors(loop: Loop, rank: int, tied: bool) -> dict[str, float]:
    """Compare what a snippet trains.

    Returns, by name: the largest difference of a parameter between the ranks; the largest from
    plain PyTorch's, relative to the largest change of a parameter; and, where the loop leaves one,
    that of the last loss, relative to the loss.
    """
    # First: a library may change how models are made, as DeepSpeed does.
    start = loop.models(tied)[0].state_dict()
    expected, expected_loss = setting.plain_training(*loop.models(tied), loop.logits)
    model, loss = loop.train(loop.code, rank, tied)
    trained = full_parameters(model)
    change = max(_distance(expected[name], start[name]) for name in expected)
    result = {
        "between_ranks": max(_between_ranks(values) for values in trained.values()),
        "parameters": max(_distance(trained[name], expected[name]) for name in expected) / change,
    }
    if loss is not None:
        total = loss.detach().clone()
        dist.all_reduce(total)
        result["loss"] = abs(total.item() / setting.RANKS / expected_loss - 1)
    return result


def full_parameters(model: Any) -> dict[str, Tensor]:
    """Parameters of a model that may be sharded, whole on each rank."""
    return {name: _full(parameter) for name, parameter in model.named_parameters()}


def _full(parameter: Any) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach()
    gathered: Any = nullcontext()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(parameter)
    with gathered:
        return torch.clone(parameter.detach())


def _between_ranks(values: Tensor) -> float:
    everywhere = [torch.empty_like(values) for _ in range(setting.RANKS)]
    dist.all_gather(everywhere, values.contiguous())
    return max(_distance(values, of_rank) for of_rank in everywhere)


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
