"""Peak memory of token log-probs, forward and backward, as the vocabulary grows (CPU, Linux).

    python benchmarks/memory.py [--out benchmarks/results/memory-cpu.json] [--chunk-mib 64]

Each point runs in a process of its own. Its figure is the peak resident memory during one forward
and backward pass, minus the resident memory just before (libraries warmed up, inputs made), minus
the gradients it has to return. `full` is the plain way, all logits at once; `chunked` is
`fastpref.ops.linear_logps`, whose figure should be the chunk at every vocabulary.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import environment
import torch
from torch import Tensor

from fastpref import chunked, ops

TOKENS, WIDTH = 1024, 128
VOCABULARIES = (32768, 65536, 131072, 262144)
MIB = 2**20


def full(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logps = torch.nn.functional.linear(hidden, weight).log_softmax(1)
    return logps.gather(1, labels[:, None]).squeeze(1)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "full": full,
    "chunked": partial(ops.linear_logps, impl="chunked"),
}


def measure(impl: str, head: str, vocabulary: int, chunk_mib: int) -> dict[str, Any]:
    """Run one point in this process, which must not have run another."""
    chunked.CHUNK_BYTES = chunk_mib * MIB
    torch.manual_seed(0)
    # A backward pass with an upstream gradient imports several hundred modules the first time.
    warm_up = _inputs(64, 512, head)
    IMPLEMENTATIONS[impl](*warm_up).backward(torch.ones(64))

    hidden, weight, labels = _inputs(TOKENS, vocabulary, head)
    upstream = torch.randn(TOKENS)
    before = _resident_bytes()
    start = time.perf_counter()
    IMPLEMENTATIONS[impl](hidden, weight, labels).backward(upstream)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gradients = sum(x.grad.nbytes for x in (hidden, weight) if x.grad is not None)
    return {
        "impl": impl,
        "head": head,
        "vocabulary": vocabulary,
        "logits_mib": TOKENS * vocabulary * 4 / MIB,
        "extra_mib": round((peak - before - gradients) / MIB, 1),
        "seconds": round(seconds, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=environment.RESULTS / "memory-cpu.json")
    parser.add_argument("--chunk-mib", type=int, default=64, help="byte budget of one chunk")
    parser.add_argument("--point", nargs=3, metavar=("IMPL", "HEAD", "V"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        impl, head, vocabulary = arguments.point
        print(json.dumps(measure(impl, head, int(vocabulary), arguments.chunk_mib)))
        return

    points = []
    print(f"T {TOKENS}, D {WIDTH}, fp32, chunk {arguments.chunk_mib} MiB; extra memory in MiB")
    print(f"{'head':8} {'V':>7} {'logits':>7} {'full':>8} {'chunked':>8}")
    for head in ("frozen", "trained"):
        for vocabulary in VOCABULARIES:
            pair = [_in_a_child(i, head, vocabulary, arguments.chunk_mib) for i in IMPLEMENTATIONS]
            points += pair
            figures = " ".join(f"{point['extra_mib']:8.0f}" for point in pair)
            print(f"{head:8} {vocabulary:7} {pair[0]['logits_mib']:7.0f} {figures}", flush=True)

    growth = {head: _growth(points, head) for head in ("frozen", "trained")}
    print("chunked, largest over smallest vocabulary:", growth)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "benchmark": "memory",
        **environment.describe(),
        "settings": {
            "tokens": TOKENS,
            "width": WIDTH,
            "dtype": "float32",
            "chunk_mib": arguments.chunk_mib,
        },
        "points": points,
        "chunked_growth": growth,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def _inputs(tokens: int, vocabulary: int, head: str) -> tuple[Tensor, Tensor, Tensor]:
    # In place: a temporary here would raise the process's peak before the measurement.
    hidden = torch.empty(tokens, WIDTH).normal_().requires_grad_()
    weight = torch.empty(vocabulary, WIDTH).normal_(std=WIDTH**-0.5)
    labels = torch.randint(vocabulary, (tokens,))
    return hidden, weight.requires_grad_(head == "trained"), labels


def _in_a_child(impl: str, head: str, vocabulary: int, chunk_mib: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--chunk-mib", str(chunk_mib)]
    command += ["--point", impl, head, str(vocabulary)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    point: dict[str, Any] = json.loads(done.stdout)
    return point


def _growth(points: list[dict[str, Any]], head: str) -> float:
    extra = {
        point["vocabulary"]: point["extra_mib"]
        for point in points
        if point["impl"] == "chunked" and point["head"] == head
    }
    return round(extra[max(extra)] / extra[min(extra)], 3)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
