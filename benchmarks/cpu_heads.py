"""Time of token log-probs, forward and backward, on a CPU: fastpref and its peers.

    python benchmarks/cpu_heads.py [--rounds 5] [--out benchmarks/results/cpu-heads.json]

All run in one process, taking turns, on the same random fp32 inputs and the same uneven upstream
gradient per token. `products` is the yardstick: the 2 (head frozen) or 3 (trained) products that
no exact method without a second look at the logits can do without, on whole matrices made before.
A round of each comes before those that count; who needs more than ten times the products' time
there is not run again. Absolute times of a CPU mean little; the shares of the yardstick in the same
run are what to compare. The file is written after each shape and head.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import environment
import torch
from torch import Tensor

from fastpref import cpu, ops

TOO_SLOW = 10
SHAPES = ((2048, 512, 32000), (1024, 256, 128256))  # T, D, V
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def fastpref(impl: str) -> Loss:
    return lambda hidden, weight, labels, upstream: (
        ops.linear_logps(hidden, weight, labels, impl=impl) @ upstream
    )


def full_logits(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
    logps = torch.nn.functional.linear(hidden, weight).log_softmax(1)
    return logps.gather(1, labels[:, None]).squeeze(1) @ upstream


def torch_chunked(reduction: str) -> Loss:
    """torch's own chunked loss; only "none" takes an upstream gradient per token."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        losses = torch.nn.functional.linear_cross_entropy(
            hidden, weight, labels, reduction=reduction, options=options
        )
        return losses @ -upstream if reduction == "none" else losses

    return loss


def trl_chunked(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    logps, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
    )
    return logps @ upstream


def liger(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels)


PEERS: dict[str, Loss] = {
    "fastpref cpu": fastpref("cpu"),
    "fastpref chunked": fastpref("chunked"),
    "torch full logits": full_logits,
    "torch linear_cross_entropy none": torch_chunked("none"),
    "torch linear_cross_entropy sum": torch_chunked("sum"),
    "trl chunked log-prob": trl_chunked,
    "liger fused linear cross entropy": liger,
}


def measure(shape: tuple[int, int, int], trained: bool, rounds: int) -> list[dict[str, Any]]:
    hidden, weight, labels, upstream = _inputs(*shape)
    hidden.requires_grad_()
    weight.requires_grad_(trained)

    def forward_and_backward(loss: Loss) -> None:
        hidden.grad = weight.grad = None
        loss(hidden, weight, labels, upstream).backward()

    contenders: dict[str, Callable[[], None]] = {"products": _products(hidden, weight, trained)}
    failures = {}
    for name, loss in PEERS.items():
        try:
            _try_on_small_inputs(loss, trained)
            contenders[name] = lambda loss=loss: forward_and_backward(loss)  # type: ignore[misc]
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    warm_up = {name: _seconds(run) for name, run in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            if warm_up[name] <= TOO_SLOW * warm_up["products"]:
                times[name].append(_seconds(run))
    times = {name: t or [warm_up[name]] for name, t in times.items()}
    yardstick = {f: f(times["products"]) for f in (statistics.median, min)}
    base: dict[str, Any] = {
        "shape": dict(zip("TDV", shape, strict=True)),
        "head": "trained" if trained else "frozen",
    }
    points = [
        {
            **base,
            "impl": name,
            "rounds": len(t),
            "seconds": {
                "median": _round(statistics.median(t)),
                "min": _round(min(t)),
                "max": _round(max(t)),
            },
            "over_products": {
                "median": _round(statistics.median(t) / yardstick[statistics.median]),
                "min": _round(min(t) / yardstick[min]),
            },
        }
        for name, t in times.items()
    ]
    return points + [{**base, "impl": name, "failed": why} for name, why in failures.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each, at least 5")
    parser.add_argument("--out", type=Path, default=environment.RESULTS / "cpu-heads.json")
    arguments = parser.parse_args()
    if arguments.rounds < 5:
        parser.error(f"--rounds: expected at least 5, got {arguments.rounds}")
    if cpu.missing():
        parser.error(f"fastpref's cpu implementation {cpu.missing()}")

    points: list[dict[str, Any]] = []
    for shape in SHAPES:
        for trained in (False, True):
            points += measure(shape, trained, arguments.rounds)
            _print(points, shape, trained)
            _write(arguments.out, points)


def _write(out: Path, points: list[dict[str, Any]]) -> None:
    report = {
        "benchmark": "cpu-heads",
        **environment.describe(),
        "peers": {name: version(name) for name in ("trl", "liger-kernel")},
        "settings": {"dtype": "float32", "cache_bytes": cpu.CACHE_BYTES},
        "points": points,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _inputs(tokens: int, width: int, vocabulary: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width)
    weight = torch.randn(vocabulary, width) * width**-0.5
    return hidden, weight, torch.randint(vocabulary, (tokens,)), torch.randn(tokens)


def _products(hidden: Tensor, weight: Tensor, trained: bool) -> Callable[[], None]:
    h, w = hidden.detach(), weight.detach()
    logits, grad_h, grad_w = h.new_zeros(len(h), len(w)), torch.zeros_like(h), torch.zeros_like(w)

    def run() -> None:
        torch.mm(h, w.T, out=logits)
        torch.mm(logits, w, out=grad_h)
        if trained:
            torch.mm(logits.T, h, out=grad_w)

    return run


def _try_on_small_inputs(loss: Loss, trained: bool) -> None:
    """Raise what keeps `loss` from running here at all, imports included."""
    hidden, weight, labels, upstream = _inputs(64, 16, 256)
    weight.requires_grad_(trained)
    loss(hidden.requires_grad_(), weight, labels, upstream).backward()


def _print(points: list[dict[str, Any]], shape: tuple[int, int, int], trained: bool) -> None:
    T, D, V = shape
    head = "trained" if trained else "frozen"
    print(f"\nT {T}, D {D}, V {V}, head {head}: median (min) seconds, over products")
    for point in points:
        if (point["shape"]["V"], point["head"]) != (V, head):
            continue
        if "failed" in point:
            print(f"  {point['impl']:34} {point['failed']}")
            continue
        seconds, share = point["seconds"], point["over_products"]
        print(
            f"  {point['impl']:34} {seconds['median']:7.3f} ({seconds['min']:6.3f}) "
            f"{share['median']:6.2f} ({share['min']:5.2f})  {point['rounds']} rounds",
            flush=True,
        )


def _round(x: float) -> float:
    return round(x, 4)


if __name__ == "__main__":
    main()
