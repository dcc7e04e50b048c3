"""Two ranks of TRL's DPO trainer with fastpref's head: equal to the bit, and those of TRL alone."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.helpers import rank_processes
from tests.helpers.data import rows

CASES = ("ddp", "fsdp")


def train(cls: Any, kind: str, model: str, folder: str, tokenizer: Any) -> dict[str, Tensor]:
    """Parameters in full after three steps; each rank has its own part of the data."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = cls(
            AutoModelForCausalLM.from_pretrained(model),
            ref_model=AutoModelForCausalLM.from_pretrained(model),
            args=DPOConfig(
                folder, per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to=[],
                gradient_checkpointing=False, seed=3, disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows(12)), processing_class=tokenizer,
        )  # fmt: skip
    wrapper = _wrapped(trainer.model, kind)
    if kind == "fsdp":
        _wrapped(trainer.ref_model, kind)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    for _, batch in zip(range(3), trainer.get_train_dataloader(), strict=False):
        trainer.compute_loss(wrapper.train(), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    values = {}
    for name, parameter in trainer.model.named_parameters():
        full: Any = getattr(parameter, "full_tensor", parameter.clone)
        values[name] = full().detach()
    return values


def _wrapped(model: Any, kind: str) -> Any:
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard([model.model.norm, model.lm_head], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def rank_of_two(rank: int, port: int, model: str, folder: str, tokenizer: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TQDM_DISABLE": "1"}
    from trl import DPOTrainer

    from fastpref.fused.trl import fused

    results = {
        (kind, name): train(cls, kind, model, folder, tokenizer)
        for kind in CASES
        for name, cls in (("ours", fused(DPOTrainer)), ("theirs", DPOTrainer))
    }
    torch.save(results, f"{folder}/{rank}.pt")
    sys.stdout.flush()
    # Without the destructors of the process group, which can wait for each other in gloo.
    os._exit(0)


def test_ranks_are_equal_to_the_bit_and_to_those_of_trl(
    tmp_path: Path, tiny_llama: str, tokenizer: Any
) -> None:
    """To 1e-5 of the largest change of TRL's parameters."""
    pytest.importorskip("trl")
    rank_processes.start(rank_of_two, 2, tiny_llama, str(tmp_path), tokenizer)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    start = _weights(tiny_llama)
    for kind in CASES:
        theirs = first[kind, "theirs"]
        way = max((value - start[name]).abs().max().item() for name, value in theirs.items())
        assert way > 1e-3
        for name, value in first[kind, "ours"].items():
            assert torch.equal(value, second[kind, "ours"][name]), name
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-5 * way, msg=name)


def _weights(model: str) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
