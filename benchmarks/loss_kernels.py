"""Operations and time of an objective on a batch: its PyTorch code against its kernel.

    python -m benchmarks.loss_kernels                          # counts, on a CPU in the interpreter
    python -m benchmarks.loss_kernels --loss ipo --batch 256   # and on a GPU times

Each call evaluates the loss, its backward pass to the log-probs, and the sums that are logged.
Operations are those that launch a kernel on a GPU, including the loss kernel; views and allocations
launch none.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from fastpref import losses, metrics
from fastpref.logps import SequenceLogps, UnpairedLogps
from fastpref.utils import environment, result_json
from fastpref_kernels.losses import pair, response

LOSSES = ("dpo", "simpo", "kto")
# Operations that run no kernel on a GPU.
_FREE = {"alias", "detach", "empty", "expand", "new_empty", "select", "slice", "t", "unbind"}
_FREE |= {"_unsafe_view", "as_strided", "empty_like", "permute", "split", "transpose", "unsqueeze"}
_FREE |= {"view"}


class Launches(TorchDispatchMode):
    """Counts of the operations within the block by name, and of the launches of loss kernels.

    The loss kernels are counted and not run: in the interpreter they consist of operations, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.counts["loss kernel"] += 1
        return lambda *arguments, **options: None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name not in _FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def evaluation(name: str, batch: int, device: str, impl: str) -> Callable[[], None]:
    """A call that evaluates an objective on `batch` pairs or responses and differentiates it."""
    draw = torch.Generator(device).manual_seed(0)
    z, r = (-60 * torch.rand(2, batch, generator=draw, device=device) - 1 for _ in range(2))
    lengths = torch.randint(1, 200, (2, batch), generator=draw, device=device)
    objective = losses.build(name)
    policy: losses.Logps
    reference: losses.Logps
    point = None
    if isinstance(objective, losses.PointwiseLoss):
        desirable = torch.arange(batch, device=device) % 2 == 0
        policy = UnpairedLogps(z[0].requires_grad_(), lengths[0], desirable)
        reference = replace(policy, logps=r[0])
        point = torch.zeros((), device=device) if objective.needs_reference_point else None
        inputs = [policy.logps]
    else:
        chosen, rejected = (side.clone().requires_grad_() for side in z)
        policy, reference = SequenceLogps(chosen, rejected, *lengths), SequenceLogps(*r, *lengths)
        inputs = [chosen, rejected]

    def run() -> None:
        output = losses.evaluate(objective, policy, reference, point, impl=impl)
        torch.autograd.grad(output.loss.mean(), inputs)
        if not (isinstance(output, losses.LossOutput) and output.metric_sums is not None):
            metrics.sums_and_counts(output, policy)

    return run


def operations(run: Callable[[], None]) -> int:
    """Number of operations of one call."""
    launches = Launches()
    with (
        patch.object(pair, "pair_losses_kernel", launches),
        patch.object(response, "response_losses_kernel", launches),
        launches,
    ):
        run()
    return launches.counts.total()


def microseconds(run: Callable[[], None], repeats: int = 200) -> float:
    """Median time of one call on the GPU, with the launches that precede it."""
    times = []
    for _ in range(repeats + 20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return median(times[20:])


def main() -> None:
    """Print one row per objective; write them if `--out` names a file."""
    parser = argparse.ArgumentParser(description="Objectives: PyTorch code against kernels.")
    parser.add_argument("--loss", nargs="+", default=LOSSES, help="names of `fastpref losses`")
    parser.add_argument("--batch", type=int, default=32, help="pairs or responses")
    parser.add_argument("--out", type=Path, help="also write the rows to this JSON file")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device}, {options.batch} pairs or responses, fp32")
    rows = []
    for name in options.loss:
        runs = {
            impl: evaluation(name, options.batch, device, impl) for impl in ("reference", "triton")
        }
        counts = [operations(run) for run in runs.values()]
        rows.append({"loss": name, "operations": counts[0], "operations_kernel": counts[1]})
        row = f"{name:12}  operations {counts[0]:4d} -> {counts[1]:4d}"
        if device == "cuda":
            plain, kernel = (microseconds(run) for run in runs.values())
            rows[-1] |= {"microseconds": plain, "microseconds_kernel": kernel}
            row += f"   time {plain:7.1f} -> {kernel:7.1f} us"
        print(row)
    if options.out is not None:
        about = {
            "benchmark": "loss-kernels",
            **environment.describe(device),
            "batch": options.batch,
        }
        options.out.write_text(result_json.dumps({**about, "rows": rows}))


if __name__ == "__main__":
    main()
