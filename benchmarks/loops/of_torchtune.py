"""The DPO recipe of torchtune, around the tiny model of the other loops."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.loops import setting

RECIPE = "full_dpo_distributed"


def decoder(seed: int = 0, tied: bool = False) -> nn.Module:
    """torchtune's Llama of the same sizes."""
    from torchtune.models.llama3 import llama3
    from torchtune.models.llama3_2 import llama3_2

    torch.manual_seed(seed)
    model: nn.Module = (llama3_2 if tied else llama3)(
        vocab_size=setting.VOCABULARY, embed_dim=32, intermediate_dim=64, num_layers=2,
        num_heads=4, num_kv_heads=2, max_seq_len=64,
    )  # fmt: skip
    return model


def models(tied: bool) -> tuple[nn.Module, nn.Module]:
    return decoder(tied=tied), decoder(seed=1, tied=tied).requires_grad_(False)


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits (S, L, V); the padding on the right needs no mask."""
    of_batch: Tensor = model(batch["input_ids"])
    return of_batch


def prepare() -> None:
    """Meet the other ranks, and import the recipe as `my_dpo`, as which `tune cp` copies it."""
    import torchtune

    dist.init_process_group("gloo")
    path = Path(torchtune.__file__).parents[1] / "recipes" / f"{RECIPE}.py"
    spec = importlib.util.spec_from_file_location("my_dpo", path)
    assert spec is not None and spec.loader is not None
    sys.modules["my_dpo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["my_dpo"])


def train(code: str, rank: int, tied: bool) -> tuple[Any, None]:
    """Run `train` of the snippet's recipe, whose setup reads no files; its sharded policy."""
    from torchtune import training
    from torchtune.rlhf.loss import DPOLoss

    training.cleanup_before_training = lambda: None  # it empties the cache of a GPU
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102
    recipe = object.__new__(names["FusedDPORecipe"])
    policy, reference = models(tied)
    for model in (policy, reference):
        conditions = [partial(training.get_shard_conditions, names_to_match=None)]
        training.shard_model(model, conditions, cpu_offload=False)
    loader = setting.loader(rank)
    loader.collate_fn = lambda rows: _columns(setting.collate(rows))
    recipe.__dict__ |= {
        "_device": torch.device("cpu"),
        "_model": policy,
        "_ref_model": reference,
        "_optimizer": setting.sgd(policy),
        "_loss_fn": DPOLoss(beta=setting.BETA),
        "_dataloader": loader,
        "_sampler": loader.sampler,
        "_steps_per_epoch": setting.STEPS,
        "max_steps_per_epoch": None,
        "epochs_run": 0,
        "total_epochs": 1,
        "global_step": 0,
        "_gradient_accumulation_steps": 1,
        "_clip_grad_norm": None,
        "_lr_scheduler": None,
        "_optimizer_in_bwd": False,
        "rank": rank,
        "world_size": setting.RANKS,
        "_is_rank_zero": rank == 0,
        "activations_handling_ctx": nullcontext(),
        "_profiler": training.DummyProfiler(),
        "_log_every_n_steps": setting.STEPS + 1,
        "_log_peak_memory_stats": False,
        "save_checkpoint": lambda epoch: None,
    }
    recipe.train()
    return policy, None


def _columns(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return batch["input_ids"], batch["labels"]
