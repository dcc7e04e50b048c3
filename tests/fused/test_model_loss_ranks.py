"""Two ranks with the loss in their wrappers: equal to the bit, and one process' joint batch."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastpref.fused import ModelLoss
from tests.helpers import rank_processes
from tests.helpers.integration_trainer import documented_trainer
from tests.helpers.model_losses import Batch, joint, pairs, reference_of, steps, tiny

EXAMPLES = Path(__file__).parents[2] / "examples"
CASES = ("full", "tied", "adapter")
KEYS = [(case, kind) for case in CASES for kind in ("ddp", "ddp static", "fsdp2")]
KEYS += [("full", kind) for kind in ("ddp unused", "ddp accumulated", "fsdp1")]


def setup(case: str) -> tuple[Any, ModelLoss]:
    """A model and its loss; the reference is a second model, or the base of the adapter."""
    model = tiny(tie_word_embeddings=case == "tied")
    if case != "adapter":
        return model, ModelLoss(model, "dpo", reference=reference_of(model))
    config = LoraConfig(
        target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    return model, ModelLoss(model, "dpo", reference="adapter")


def wrapped(model: Any, kind: str) -> Any:
    if kind.startswith("ddp"):
        return DistributedDataParallel(
            model, static_graph=kind == "ddp static", find_unused_parameters=kind == "ddp unused"
        )
    if kind == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    for layer in [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]:
        fully_shard(layer)
    return fully_shard(model)


def values(model: nn.Module) -> dict[str, Tensor]:
    """All parameters in full."""
    full = {}
    for name, parameter in model.named_parameters():
        whole: Any = getattr(parameter, "full_tensor", parameter.clone)
        full[name] = whole().detach()
    return full


def train(case: str, kind: str, rank: int) -> dict[str, Tensor]:
    model, preference_loss = setup(case)
    wrapper = wrapped(model, kind)

    def loss_of(batch: Batch) -> Tensor:
        if kind != "ddp accumulated":
            return preference_loss(wrapper, **batch)[0]
        first, second = ({name: x[pair::2] for name, x in batch.items()} for pair in (0, 1))
        with wrapper.no_sync():
            (preference_loss(wrapper, **first)[0] / 2).backward()
        return preference_loss(wrapper, **second)[0] / 2

    trained = wrapper if kind == "fsdp1" else model
    steps(trained, loss_of, [pairs(2 * step + rank) for step in range(3)])
    if kind == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(wrapper):
            return values(model)
    return values(model)


def example(name: str, arguments: list[str]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses that an example returns, and its parameters after training."""
    plain, module = importlib.import_module("plain_pytorch"), importlib.import_module(name)
    load, models = plain.load, []

    def recorded(path: str | None) -> Any:
        models.append(load(path))
        return models[-1]

    vars(module)["load"] = recorded
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            losses = module.main(arguments)
    finally:
        vars(module)["load"] = load
    return losses, values(models[0][0])


def rank_of_two(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")
    found = {(case, kind): train(case, kind, rank) for case, kind in KEYS}
    _, found["examples", "plain_pytorch"] = example("plain_pytorch", ["--steps", "3"])
    _, found["examples", "hf_trainer"] = example("hf_trainer", ["--steps", "3", "--loss", "dpo"])
    found["page", "trainer"] = values(documented_trainer(Path(folder), batch_size=4))
    torch.save(found, f"{folder}/{rank}.pt")
    sys.stdout.flush()
    # Without the destructors of the process group, which can wait for each other in gloo.
    os._exit(0)


def test_ranks_are_equal_to_the_bit_and_to_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-5 of the largest change: gradients in fp32, summed in another order."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    rank_processes.start(rank_of_two, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    expected: dict[tuple[str, str], dict[str, Tensor]] = {}
    start = {}
    for case in CASES:
        model, preference_loss = setup(case)
        start[case] = values(model)
        batches = [joint(pairs(2 * step), pairs(2 * step + 1)) for step in range(3)]
        steps(model, lambda batch, f=preference_loss, m=model: f(m, **batch)[0], batches)
        expected |= {key: values(model) for key in KEYS if key[0] == case}
    model = documented_trainer(tmp_path, batch_size=8)
    expected["page", "trainer"], start["page"] = values(model), values(_untrained())
    for key, parameters in first.items():
        assert all(torch.equal(value, second[key][name]) for name, value in parameters.items()), key
        if key in expected:
            way = max((v - start[key[0]][n]).abs().max().item() for n, v in parameters.items())
            assert way > 1e-3
            for name, value in parameters.items():
                torch.testing.assert_close(value, expected[key][name], rtol=0, atol=1e-5 * way)
    assert len(first) == len(expected) + 2


def _untrained() -> Any:
    return importlib.import_module("plain_pytorch").load(None)[0]
