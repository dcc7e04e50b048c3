"""Distillation losses: fastpref's beside full logits, TRL's and liger-kernel's, in time and memory.

    python -m benchmarks.distillation [--repeats 3] [--out FILE]

One forward and backward pass of the mean divergence of the tokens, with gradients by the student's
hidden states and by its head, fp32, on one thread. Time is that which the thread has on a CPU, the
median of passes in which the contestants take turns. Memory is the peak of a process of its own
less the inputs and the gradients. All results are compared with those of full logits.

TRL's loss takes logits, which two matrix products before it make. Liger-kernel's runs without
torch.compile and without its cross-entropy to labels, as chunks of 1,024 tokens (its default).
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.docgen import markdown
from fastpref.fused import FusedDistillationLoss
from fastpref.ops.divergence import Kind
from fastpref.utils import environment, result_json

TOKENS, STUDENT, TEACHER, VOCABULARY = 2048, 256, 384, 49152
# By the names of TRL and liger-kernel, whose beta 0 and 1 are the forward and the reverse KL.
BETAS: dict[Kind, float] = {"reverse": 1.0, "forward": 0.0, "jsd": 0.5}
MEASURED: tuple[Kind, ...] = ("reverse", "jsd")
OURS, TRL, LIGER, LOGITS = "fastpref", "TRL", "liger-kernel", "PyTorch, full logits"


class Inputs(NamedTuple):
    """Hidden states (T, D) and (T, E), heads (V, D) and (V, E) of the student and the teacher."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor  # (T,), all scored

    @classmethod
    def random(cls, tokens: int, student: int, teacher: int, vocabulary: int) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int, columns: int, scale: float) -> Tensor:
            return torch.empty(rows, columns).normal_(std=scale, generator=generator)

        return cls(
            normal(tokens, student, 1.0).requires_grad_(),
            normal(vocabulary, student, student**-0.5).requires_grad_(),
            normal(tokens, teacher, 1.0),
            normal(vocabulary, teacher, teacher**-0.5),
            torch.randint(vocabulary, (tokens,), generator=generator),
        )

    def gradients(self) -> tuple[Tensor, Tensor]:
        assert self.hidden.grad is not None and self.weight.grad is not None
        gradients = self.hidden.grad, self.weight.grad
        self.hidden.grad = self.weight.grad = None
        return gradients


Loss = Callable[[Inputs, Kind], Tensor]


def fused(x: Inputs, kind: Kind) -> Tensor:
    offsets = torch.tensor([0, len(x.labels)])
    loss, _ = FusedDistillationLoss(kind)(*x[:4], x.labels, offsets)
    return loss


def full_logits(x: Inputs, kind: Kind) -> Tensor:
    q = (x.hidden @ x.weight.T).log_softmax(1)
    p = (x.teacher_hidden @ x.teacher_weight.T).log_softmax(1)
    if kind == "forward":
        return (p.exp() * (p - q)).sum(1).mean()
    if kind == "reverse":
        return (q.exp() * (q - p)).sum(1).mean()
    m = ((p.exp() + q.exp()) / 2).log()
    return (p.exp() * (p - m) + q.exp() * (q - m)).sum(1).mean() / 2


def trl(x: Inputs, kind: Kind) -> Tensor:
    # The tables import this module where TRL and liger-kernel may be missing.
    from trl.experimental.gkd import GKDTrainer

    logits = x.hidden @ x.weight.T, x.teacher_hidden @ x.teacher_weight.T
    student, teacher = (part[None] for part in logits)
    loss: Tensor = GKDTrainer.generalized_jsd_loss(
        student, teacher, labels=x.labels[None], beta=BETAS[kind]
    )
    return loss


def liger(x: Inputs, kind: Kind) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(0.0, 1.0, BETAS[kind], compiled=False)
    loss: Tensor = module(*x)
    return loss


CONTESTANTS: dict[str, Loss] = {OURS: fused, LIGER: liger, TRL: trl, LOGITS: full_logits}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/distillation.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = (TOKENS, STUDENT, TEACHER, VOCABULARY)
    result = {
        "benchmark": "distillation",
        **environment.describe(),
        "tokens": TOKENS,
        "student_width": STUDENT,
        "teacher_width": TEACHER,
        "vocabulary": VOCABULARY,
        "repeats": options.repeats,
        "kinds": {kind: measure(kind, shape, options.repeats) for kind in MEASURED},
    }
    options.out.write_text(result_json.dumps(result) + "\n", encoding="utf-8")
    print(table(result))


def measure(
    kind: Kind, shape: tuple[int, int, int, int], repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds, bytes and distance from full logits of each contestant for one divergence."""
    for loss in CONTESTANTS.values():
        loss(Inputs.random(8, 8, 8, 64), kind).backward()  # imports and pages of libraries
    memory = {name: extra_bytes(loss, kind, shape) for name, loss in CONTESTANTS.items()}
    inputs = Inputs.random(*shape)
    values: dict[str, tuple[Tensor, ...]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(repeats):
        for name, loss in CONTESTANTS.items():
            start = time.process_time()
            value = loss(inputs, kind)
            value.backward()
            seconds[name].append(time.process_time() - start)
            values[name] = value.detach(), *inputs.gradients()
            del value
    return {
        name: {
            "cpu_seconds": statistics.median(seconds[name]),
            "extra_bytes": memory[name],
            "distance": _distance(values[name], values[LOGITS]),
        }
        for name in CONTESTANTS
    }


def extra_bytes(loss: Loss, kind: Kind, shape: tuple[int, int, int, int]) -> int:
    """Peak memory of a pass in a forked process, less its inputs and gradients."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            loss(Inputs.random(8, 8, 8, 64), kind).backward()  # a fork drops pages of libraries
            inputs = Inputs.random(*shape)
            # Without the right to reset it, the peak counts from the fork: inputs have none.
            if os.access("/proc/self/clear_refs", os.W_OK):
                Path("/proc/self/clear_refs").write_text("5")
            before = _resident("VmRSS")
            loss(inputs, kind).backward()
            kept = sum(gradient.nbytes for gradient in inputs.gradients())
            os.write(writer, struct.pack("q", _resident("VmHWM") - before - kept))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    (extra,) = struct.unpack("q", answer)
    return max(0, int(extra))


def table(result: Any) -> str:
    kinds: Mapping[str, Mapping[str, Mapping[str, float]]] = result["kinds"]
    titles = ["", *(f"{kind}, {unit}" for kind in kinds for unit in ("s", "MiB"))]
    rows = [
        [
            name,
            *(
                cell
                for numbers in kinds.values()
                for cell in (
                    f"{numbers[name]['cpu_seconds']:.1f}",
                    f"{numbers[name]['extra_bytes'] / 2**20:,.0f}",
                )
            ),
        ]
        for name in CONTESTANTS
    ]
    return markdown.table(titles, rows)


def _distance(values: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Largest relative distance of the loss and of the gradients, by norm."""
    pairs = zip(values, exact, strict=True)
    return max(((x - y).norm() / y.norm()).item() for x, y in pairs)


def _resident(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


if __name__ == "__main__":
    main()
