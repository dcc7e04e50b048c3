"""`auto` settings of the memory: chosen before the first step, corrected and lowered later.

The planner chooses them from the free memory (`fastpref.plan.budget`), the same on all ranks; they
are saved in the run directory, where a resumed run finds them. Recomputed blocks change no result.
The size of a micro-batch changes results by rounding; on one CPU process, where each group has its
own forward pass, it depends on the data alone.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastpref import distributed
from fastpref.config import Config
from fastpref.data.batch_plan import tokens_of
from fastpref.data.collate import Batch
from fastpref.data.dataset import Groups
from fastpref.model.policy import Policy
from fastpref.model.recomputation import recompute, recomputed
from fastpref.plan.budget import BATCHWISE_TOKENS, Budget
from fastpref.plan.devices import this_device
from fastpref.plan.predict import Predictor, Setup, depends_on_batch
from fastpref.plan.workload import GroupLengths, Pass
from fastpref.utils.atomic_files import replacing
from fastpref.utils.errors import ModelError, UserError, first_line, is_out_of_memory
from fastpref.utils.free_memory import free_bytes
from fastpref.utils.progress import Display

# Shares of the free memory that a run plans with; the rest is for fragmentation and for errors of
# the prediction (benchmarks/results/plan-check.json).
USABLE = {"cuda": 0.9, "cpu": 0.8}
GIB = 2**30
FILE = "memory.json"

T = TypeVar("T")


# What a process on a CPU takes beside its tensors: objects of libraries that are imported later,
# stacks of threads, gaps in the heap.
PROCESS_BYTES = 80 * 2**20


def usable_bytes(device: torch.device) -> int:
    """Memory that each rank can plan with, before the model is loaded; the least of all ranks."""
    free = free_bytes(device)
    if device.type == "cpu":  # the ranks of a machine share it
        free = max(0, free // distributed.local_world_size() - PROCESS_BYTES)
    return int(USABLE[device.type] * -distributed.all_reduce_max(-float(free)))


class MemoryBudget:
    """Micro-batch and recomputed blocks of a run; settings other than `auto` are never changed.

    usable: see `usable_bytes`. groups: data of training, whose lengths decide, and all other data,
    whose groups must fit a micro-batch. saved: run directory of a run that is resumed.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        vocabulary: int,
        usable: int,
        groups: Sequence[Groups],
        display: Display,
        saved: Path | None = None,
    ) -> None:
        self._policy, self._usable, self._display = policy, usable, display
        self._training = config.training
        self._longest = max(int(tokens_of(data, policy.layout).max()) for data in groups)
        model = config.model.model_copy(update={"kernels": policy.kernels})
        self._setup = Setup(
            config.model_copy(update={"model": model}),
            GroupLengths.of(groups[0]),
            distributed.world_size(),
            chosen_layout=policy.layout,
        )
        self._predict = Predictor(this_device(policy.device, usable), vocabulary)
        self._folder: Path | None = None
        self._lowered = False
        self._fullest: list[int] = []  # predicted peaks of the first steps
        self._corrects = policy.device.type == "cuda" and self._recomputes
        self._set(self._first(saved))
        if config.training.is_auto:
            display.note(f"memory: {self.describe()}")

    @property
    def micro_batch_tokens(self) -> int:
        return self.budget.micro_batch_tokens

    def save(self, folder: Path) -> None:
        """Write the settings to the run directory, there again when they change."""
        self._folder = folder
        self._write()

    def _write(self) -> None:
        folder = self._folder
        if folder is not None and (distributed.is_main_process() or self._lowered):
            with replacing(folder / FILE) as temporary:
                temporary.write_text(json.dumps(asdict(self.budget), indent=1) + "\n")

    def observe(self, batches: Sequence[Batch]) -> None:
        """Record a micro-batch of one of the first steps on a GPU."""
        if self._corrects:
            passes = tuple(
                Pass(b.input_ids.numel(), self._scored(b), 0, len(batches)) for b in batches
            )
            peak = self._predict.predicted_peak(self._setup, self.budget.recomputed_blocks, passes)
            self._fullest.append(peak)

    def _scored(self, batch: Batch) -> int:
        """Tokens whose hidden states the head reads."""
        return len(batch.cu_seqlens) - 1 if self._setup.of_rewards else len(batch.labels)

    def correct(self, steps: int) -> None:
        """On a GPU, choose the recomputed blocks by the memory that the first steps took.

        steps: of this process; the optimizer has its state from the second one on.
        """
        if not self._corrects or steps < 2:
            return
        measured = torch.cuda.max_memory_allocated(self._policy.device)
        error = distributed.all_reduce_max(measured / max(self._fullest))
        self._corrects = False
        fixed = self._setup.config.model_copy(
            update={
                "training": self._training.model_copy(
                    update={"micro_batch_tokens": self.budget.micro_batch_tokens}
                )
            }
        )
        better = self._predict.budget(replace(self._setup, config=fixed), int(self._usable / error))
        if better.recomputed_blocks != self.budget.recomputed_blocks:
            self._display.note(
                f"memory: {error - 1:+.0%} of the prediction; {self._recomputed(better)}"
            )
            self._set(replace(better, bytes=int(better.bytes * error)))
            self._write()

    def within(self, step: int, compute: Callable[[], T], discard: Callable[[], None]) -> T:
        """Return `compute()`; where memory runs out, lower the automatic settings and repeat it.

        step: number of the step, for the message. discard: drops what a part of `compute` has done.
        Raises the error if nothing can be lowered, and UserError on several ranks, of which the
        others may wait in a collective; they find the lower settings when they are resumed.
        """
        random_state = _random_state(self._policy.device)
        while True:
            try:
                return compute()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not self._lower():
                    raise
                message = first_line(error)
            # Outside of the handler, where the traceback no longer keeps activations alive.
            discard()
            gc.collect()
            if self._policy.device.type == "cuda":
                torch.cuda.empty_cache()
            _set_random_state(random_state, self._policy.device)
            self._write()
            if distributed.world_size() > 1:
                raise UserError(
                    f"out of memory at step {step:,} ({message}); resume=auto continues with "
                    f"{self.describe()}"
                )
            self._display.note(
                f"out of memory at step {step:,}, which is repeated with {self.describe()} "
                f"({message})"
            )

    def _lower(self) -> bool:
        """Set a smaller budget; return whether there is one."""
        blocks = len(self._policy.blocks())
        tokens, count = self.budget.micro_batch_tokens, self.budget.recomputed_blocks
        if self._recomputes and count < blocks:
            smaller = replace(self.budget, recomputed_blocks=min(blocks, count + -(-blocks // 4)))
        elif self._chooses_tokens and tokens > self._longest:
            smaller = replace(self.budget, micro_batch_tokens=max(self._longest, tokens // 2))
        else:
            return False
        self._corrects, self._lowered = False, True
        self._set(replace(smaller, bytes=0))
        return True

    def describe(self) -> str:
        """The settings in words."""
        return (
            f"{self.budget.micro_batch_tokens:,} tokens a micro-batch, "
            f"{self._recomputed(self.budget)}"
        )

    def _recomputed(self, budget: Budget) -> str:
        return f"{budget.recomputed_blocks} of {len(self._policy.blocks())} blocks recomputed"

    @property
    def _recomputes(self) -> bool:
        """Whether the number of recomputed blocks is to be chosen."""
        mode = self._training.activation_checkpointing
        return mode == "auto" and self._policy.base.supports_gradient_checkpointing

    @property
    def _chooses_tokens(self) -> bool:
        """Whether the size of a micro-batch is to be chosen; it must not decide the objective."""
        is_auto = self._training.micro_batch_tokens == "auto"
        return is_auto and not depends_on_batch(self._setup.config)

    def _set(self, budget: Budget) -> None:
        self.budget = budget
        if self._training.activation_checkpointing == "auto":
            recompute(self._policy, budget.recomputed_blocks)

    def _first(self, saved: Path | None) -> Budget:
        training = self._training
        if not training.is_auto:
            return self._careful()
        previous = None if saved is None else self._read(saved / FILE)
        if previous is not None:
            return previous
        if self._surely_fits():
            return self._without_prediction()
        try:
            budget = self._chosen(self._usable)
        except ModelError as error:  # its code cannot be traced
            self._display.note(f"note: memory is not planned; all is recomputed: {error}")
            return self._careful()
        if not budget.fits:
            self._display.note(
                f"note: a step may need {budget.bytes / GIB:.1f} GiB, and "
                f"{self._usable / GIB:.1f} GiB are free; fastpref plan says what fits"
            )
        return budget

    def _chosen(self, usable: int) -> Budget:
        budget = self._predict.budget(self._setup, usable)
        tokens = budget.micro_batch_tokens
        if self._training.micro_batch_tokens == "auto":
            tokens = max(tokens, self._longest)
        return replace(budget, micro_batch_tokens=tokens)

    def _careful(self) -> Budget:
        """The settings of the config, or where they are automatic those of least memory."""
        mode, tokens = self._training.activation_checkpointing, self._training.micro_batch_tokens
        count = 0
        if self._policy.base.supports_gradient_checkpointing:
            count = sum(recomputed("full" if mode == "auto" else mode, len(self._policy.blocks())))
        return Budget(max(BATCHWISE_TOKENS, self._longest) if tokens == "auto" else tokens, count)

    def _without_prediction(self) -> Budget:
        """The fastest settings on a CPU where each group has its own forward pass."""
        budget = self._careful()
        if self._training.activation_checkpointing == "auto":
            budget = replace(budget, recomputed_blocks=0)
        if self._chooses_tokens:
            budget = replace(budget, micro_batch_tokens=self._longest)
        return budget

    def _surely_fits(self) -> bool:
        """Whether a coarse bound is far below the memory, where each group has its own pass.

        A prediction takes a few seconds, which is long for a small model on a CPU.
        """
        policy = self._policy
        if not policy.separates_groups:
            return False
        weights = sum(
            p.numel() * p.element_size() * (6 if p.requires_grad else 2)
            for p in policy.parameters()
        )
        linear = (m for m in policy.modules() if isinstance(m, nn.Linear))
        features = sum(m.in_features + m.out_features for m in linear)
        activations = 2 * features * self._longest * policy.compute_dtype.itemsize
        return 2 * (weights + activations) < self._usable

    def _read(self, path: Path) -> Budget | None:
        """Settings of the run that is resumed, if they suit the config and the data."""
        careful, is_readable = self._careful(), True
        try:
            budget = Budget(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            budget, is_readable = careful, False
        if self._training.micro_batch_tokens != "auto":
            budget = replace(budget, micro_batch_tokens=careful.micro_batch_tokens)
        if not self._recomputes:
            budget = replace(budget, recomputed_blocks=careful.recomputed_blocks)
        fits = budget.bytes <= self._usable and budget.micro_batch_tokens >= self._longest
        # All ranks call this, whatever they have read.
        return budget if distributed.all_ranks(is_readable and fits) else None


def _random_state(device: torch.device) -> Tensor:
    """State of the generator that draws dropout."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
