"""Seconds of the matrix products of a step alone: the floor of its time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Values = dict[str, Any]


def floor(model: Values, device: str, dtype: str, tokens: int, labels: int, full: bool) -> Values:
    """Seconds of a step's products, with nothing and with everything recomputed.

    tokens: positions of the trunk in a step, with shared prompts. labels: positions of the head.
    full: all weights are trained; else none but adapters, whose products are not counted.
    """
    seconds = _timer(device, getattr(torch, dtype))
    width, inner, layers = (
        model[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    head_size = width // model["num_attention_heads"]
    key_width = head_size * model["num_key_value_heads"]
    shapes = [(width, width), (key_width, width), (key_width, width), (width, width)]
    shapes += [(inner, width), (inner, width), (width, inner)]
    forward = layers * sum(seconds(tokens, inputs, outputs) for outputs, inputs in shapes)
    to_inputs = layers * sum(seconds(tokens, outputs, inputs) for outputs, inputs in shapes)
    to_weights = layers * sum(seconds(outputs, tokens, inputs) for outputs, inputs in shapes)
    vocabulary = model["vocab_size"]
    head = seconds(labels, width, vocabulary) + seconds(labels, vocabulary, width)
    if full:
        head += seconds(vocabulary, labels, width)
    total = forward + to_inputs + head + (to_weights if full else 0.0)
    return {
        "tokens": tokens,
        "labels": labels,
        "nothing_recomputed_seconds": total,
        "everything_recomputed_seconds": total + forward,
    }


def _timer(device: str, dtype: torch.dtype) -> Callable[[int, int, int], float]:
    """Return a function that times one product of (m, k) and (k, n), the least of three."""

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def seconds(m: int, k: int, n: int) -> float:
        a, b = (torch.randn(size, device=device, dtype=dtype) for size in ((m, k), (n, k)))
        times = [_once(a, b.T, synchronize) for _ in range(4)]
        return min(times[1:])

    return seconds


def _once(a: Tensor, b: Tensor, synchronize: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    a @ b
    synchronize()
    return time.perf_counter() - start


def measure(connection: Any, *arguments: Any) -> None:
    """Send the floor through a pipe, from a process of its own."""
    connection.send(floor(*arguments))
