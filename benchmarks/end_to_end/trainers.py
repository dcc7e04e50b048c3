"""One contestant of the comparison, in a process of its own.

The time of a step runs from the end of one optimizer step to the end of the next. It includes
reading and collating, and excludes waiting for a turn.
"""

from __future__ import annotations

import gc
import hashlib
import re
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from fastpref.bench.contestants import reason

Values = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """Input of a contestant's process; `rows` and `folder` are equal for all contestants."""

    trainer: str
    config: Values  # fastpref's, or the arguments of DPOConfig
    folder: Path
    rows: list[dict[str, str]]  # in the order of the steps
    device: str
    dtype: str
    adapter: Values | None
    steps: int
    block: int
    batch_size: int
    threads: int


def play(job: Job, connection: Connection) -> None:
    """Prepare, report, train in turns, report; messages are parts of a result's row."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(job.threads)
    trainers: dict[str, Callable[[Job, Turns], None]] = {"fastpref": _fastpref}
    try:
        trainers.get(job.trainer, _trl)(job, Turns(job, connection))
    except Exception as error:
        traceback.print_exc()  # the report has its first line only
        connection.send({"failed": reason(error)})


def build(config: Values, folder: Path, device: str) -> None:
    """Write the model that all contestants load: random weights, in bf16 as usual."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    values = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **values), dtype=torch.bfloat16
        )
    model.save_pretrained(folder)


class Turns:
    """Lets a training loop wait for its turn, times its steps and measures its memory."""

    def __init__(self, job: Job, connection: Connection) -> None:
        self._job, self._connection = job, connection
        self._marks: list[Any] = []
        self._done = 0
        self._baseline: int | None = None

    def loaded(self) -> None:
        """Take the baseline of memory: policy and data are loaded. Only the first call counts."""
        if self._baseline is None:
            gc.collect()
            self._baseline = memory_now(self._job.device)
            self._started = time.perf_counter()

    def ready(self, pairs: Iterator[str]) -> None:
        """Report the pairs, in the order of the steps, and the setup time; `wait` next."""
        setup = time.perf_counter() - self._started
        size = self._job.batch_size
        # Sorted, since the order inside a step does not matter.
        order = [sorted(step) for step in _chunks(list(pairs), size)]
        self._connection.send({"setup_seconds": setup, "pairs": order[: self._job.steps]})

    def wait(self) -> None:
        self._connection.recv()
        self._marks = [self._mark()]

    def step(self) -> None:
        """Record the end of an optimizer step."""
        self._marks.append(self._mark())
        self._done += 1
        last = self._done == self._job.steps
        if last or self._done % self._job.block == 0:
            self._connection.send({"seconds": self._seconds()})
            if not last:
                self.wait()

    def end(self, metrics: list[Values]) -> None:
        """Report the metrics of all steps and the memory."""
        names = ("loss", "rewards/chosen", "rewards/rejected")
        peak = memory_peak(self._job.device)
        assert self._baseline is not None
        self._connection.send(
            {
                **{name: [line[name] for line in metrics] for name in names},
                "peak_bytes": peak,
                "net_bytes": peak - self._baseline,
            }
        )

    def _mark(self) -> Any:
        if self._job.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self) -> list[float]:
        """Seconds of the steps of this turn."""
        steps = zip(self._marks, self._marks[1:], strict=False)
        if self._job.device == "cpu":
            return [b - a for a, b in steps]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in steps]


def _fastpref(job: Job, turns: Turns) -> None:
    from rich.console import Console

    from fastpref import metrics
    from fastpref.config import parse
    from fastpref.training.metric_sums import NAMES
    from fastpref.training.trainer import Trainer
    from fastpref.utils.progress import Display

    class Watch(Display):
        """Sees the trainer's progress; reads a step's sums from the trainer's window."""

        trainer: Trainer | None = None

        def __init__(self) -> None:
            super().__init__(Console(quiet=True))
            self.lines: list[Values] = []

        def phase(self, name: str, total: int, done: int = 0) -> None:
            turns.loaded()
            if self.trainer is not None:
                turns.wait()

        def advance(self, done: int) -> None:
            if self.trainer is not None:
                sums = self.trainer.window.state_dict()[1][-1, 1:]
                self.lines.append(metrics.means(sums.view(2, -1), NAMES))
                turns.step()

    watch = Watch()
    trainer = Trainer(parse(job.config), watch)
    turns.loaded()  # for a reference that was cached
    start_equally(trainer.policy)
    groups = trainer.run.train.groups
    order = [groups[i] for step in trainer.plan.epoch() for part in step for i in part]
    turns.ready(pair_id(g.prompt, *g.responses) for g in order)
    watch.trainer = trainer
    trainer.loop([])
    turns.end(watch.lines)


@torch.no_grad()
def start_equally(model: torch.nn.Module) -> None:
    """Set the first matrix of every adapter to values that depend on its name in the layer alone.

    The second matrix is 0, so this leaves the first step's log-probs as they are.
    """
    for name, parameter in model.named_parameters():
        if "lora_A" in name and parameter.requires_grad:
            generator = torch.Generator().manual_seed(zlib.crc32(_in_layer(name).encode()))
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * parameter.shape[1] ** -0.5)


def _in_layer(name: str) -> str:
    """`layers.0.self_attn.q_proj`, of a parameter's name in any wrapper of the model."""
    return name[name.index("layers.") :].partition(".lora_A")[0]


def _trl(job: Job, turns: Turns) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        TrainerCallback,
    )
    from trl import DPOConfig, DPOTrainer

    from benchmarks.end_to_end.liger_loss import LigerLossDPOTrainer
    from fastpref.fused.trl import fused

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.lines: list[Values] = []

        def on_train_begin(self, *arguments: Any, **more: Any) -> None:
            turns.wait()

        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            turns.step()

        def on_log(self, *arguments: Any, **more: Any) -> None:
            if "loss" in more["logs"]:
                self.lines.append(more["logs"])

    adapter, compute = job.adapter, getattr(torch, job.dtype)
    options: Values = {"dtype": torch.float32 if adapter is None else compute}
    if adapter is not None and adapter.get("quantize"):
        options["device_map"] = {"": job.device}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=adapter["quantize"],
            bnb_4bit_compute_dtype=compute,
        )
    model: Any = AutoModelForCausalLM.from_pretrained(job.folder / "model", **options)
    if "device_map" not in options:
        model = model.to(job.device)
    lora = None
    if adapter is not None:
        lora = LoraConfig(
            r=adapter["r"],
            lora_alpha=adapter["alpha"],
            target_modules=adapter["target_modules"],
            task_type="CAUSAL_LM",
        )
    data = Dataset.from_list(job.rows)
    turns.loaded()
    watch = Watch()
    trainers: dict[str, Any] = {"mixin": fused(DPOTrainer), "liger": LigerLossDPOTrainer}
    trainer = trainers.get(job.trainer, DPOTrainer)(
        model,
        args=DPOConfig(**job.config),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(job.folder / "model"),
        peft_config=lora,
        callbacks=[watch],
    )
    start_equally(trainer.model)
    turns.ready(pair for batch in trainer.get_train_dataloader() for pair in _pairs(batch))
    trainer.train()
    turns.end(watch.lines)


def _pairs(batch: dict[str, torch.Tensor]) -> Iterator[str]:
    """Ids of the pairs of a TRL batch: all chosen, then all rejected."""
    names = ("input_ids", "attention_mask", "completion_mask")
    for rows in zip(*(half for name in names for half in batch[name].chunk(2)), strict=True):
        chosen, rejected = (
            (ids[mask.bool()], scored[mask.bool()].bool())
            for ids, mask, scored in (rows[0::2], rows[1::2])
        )
        prompts = [ids[~scored] for ids, scored in (chosen, rejected)]
        assert torch.equal(*prompts)
        yield pair_id(prompts[0], *(ids[scored] for ids, scored in (chosen, rejected)))


def pair_id(*parts: Any) -> str:
    """Short hash of the token ids of prompt, chosen and rejected."""
    text = repr([[int(token) for token in part] for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _chunks(items: Sequence[str], size: int) -> list[Sequence[str]]:
    return [items[k : k + size] for k in range(0, len(items), size)]


def memory_now(device: str) -> int:
    """Bytes in use; the peak counts from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Without write permission, the peak includes that of loading.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def memory_peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024
