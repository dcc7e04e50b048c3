"""Loops of the page by name: where their snippet is, how it runs, and what a CPU needs before."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.loops import of_open_instruct, of_torchtune, setting, snippets

# A trained model, possibly sharded, and the last loss of the rank, if the loop has a name for it.
Trained = tuple[Any, Tensor | None]


def _nothing() -> None:
    """No-op: the library runs on CPUs."""


def _fsdp_of_accelerate() -> None:
    """Let accelerate shard on CPUs, which it does on GPUs only; its code for it is the same."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def deepspeed_of_accelerate() -> None:
    """Name the backend, which accelerate looks for on GPUs only."""
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


def _models(tied: bool) -> tuple[Any, Any]:
    return setting.causal_model(tied=tied), setting.reference_model(tied)


def _train_with_all_batches(code: str, rank: int, tied: bool) -> Trained:
    """Run a snippet that divides the batches between the ranks."""
    return _run(code, tied, setting.loader())


def _train_with_own_batches(code: str, rank: int, tied: bool) -> Trained:
    """Run a snippet whose ranks bring their own batches."""
    return _run(code, tied, setting.loader(rank))


def _run(code: str, tied: bool, batches: Any) -> Trained:
    model, reference = _models(tied)
    names: dict[str, Any] = {
        "model": model,
        "reference": reference,
        "optimizer": setting.sgd(model),
        "batches": batches,
        "zero_3": setting.ZERO_3,
    }
    exec(code, names)  # noqa: S102
    return model, names.get("loss")


@dataclass(frozen=True)
class Loop:
    """A snippet of docs/integrations.md.

    heading, block: where it is on the page.
    packages: distributions whose versions are of interest.
    prepare: called on each rank before anything else.
    models: policy and reference at the start, with a tied head or an untied one.
    train: runs the snippet, called with its code, the rank and whether the head is tied.
    """

    title: str
    heading: str
    packages: tuple[str, ...]
    block: int = 0
    prepare: Callable[[], None] = _nothing
    models: Callable[[bool], tuple[Any, Any]] = _models
    logits: setting.Logits = setting.causal_logits
    train: Callable[[str, int, bool], Trained] = _train_with_all_batches
    heads: tuple[bool, ...] = (False, True)  # tied or not

    @property
    def code(self) -> str:
        return snippets.under(self.heading)[self.block]


LOOPS = {
    "accelerate-fsdp2": Loop(
        "accelerate, FSDP2", "accelerate with FSDP2", ("accelerate",), prepare=_fsdp_of_accelerate
    ),
    "deepspeed": Loop(
        "DeepSpeed, ZeRO-3", "DeepSpeed ZeRO-3", ("deepspeed",), train=_train_with_own_batches
    ),
    "accelerate-deepspeed": Loop(
        "accelerate, ZeRO-3", "DeepSpeed ZeRO-3", ("accelerate", "deepspeed"), block=1,
        prepare=deepspeed_of_accelerate,
    ),
    "lightning": Loop("Lightning, DDP", "Lightning", ("lightning",), train=_train_with_own_batches),
    "torchtune": Loop(
        "torchtune, its recipe", "torchtune", ("torchtune", "torchao"),
        prepare=of_torchtune.prepare, models=of_torchtune.models, logits=of_torchtune.logits,
        train=of_torchtune.train, heads=(False,),
    ),
    "open-instruct": Loop(
        "open-instruct, ZeRO-3", "open-instruct", ("accelerate", "deepspeed"),
        prepare=deepspeed_of_accelerate, models=of_open_instruct.models,
        train=of_open_instruct.train,
    ),
}  # fmt: skip
