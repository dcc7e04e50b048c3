"""Decoder blocks: explicit ones against transformers' layers, in time, memory and launches.

    python -m benchmarks.trunk [--layers 6] [--repeats 5] [--out FILE]

Time and memory: the shapes of SmolLM2-135M, fp32, one thread; LoRA has rank 16 on all linear layers
of a frozen base. A row of 1,024 tokens holds two prompts with two responses each. The contestants
take turns, and the least time counts. The GEMMs are the matrix products of the base alone, of the
same shapes and as many as a step needs.

Launches: operations of one layer that launch a kernel on a GPU, in bf16 with adapters in fp32, as
in training; attention counts as one launch forward and three backward, and a product with fp32
results as one. Transformers' layers run under autocast. "Explicit blocks, kernels" are those with
the Triton kernels for elementwise operations, of which each launch counts, and nothing is computed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.loss_kernels import Launches
from fastpref.attention import Segments, api
from fastpref.docgen import markdown
from fastpref.model import packed_attention
from fastpref.trunk import build_trunk, gated, linear, norm, rotary
from fastpref.utils import environment, result_json

SHAPES: dict[str, Any] = {  # SmolLM2-135M
    "vocab_size": 1024,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}
TINY = {**SHAPES, "hidden_size": 72, "intermediate_size": 64}
ROW = Segments(((200, 212, 212), (100, 150, 150)))
SHORT = Segments(((3, 2, 2),))
OURS, PEER, FLOOR = "explicit blocks", "transformers' layers", "GEMMs of the base"
WITH_KERNELS = "explicit blocks, kernels"
LORA, FULL = "LoRA", "all weights"
Run = Callable[[], Tensor]
Numbers = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trunk", description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/trunk.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "benchmark": "trunk",
        **environment.describe(),
        "layers": options.layers,
        "tokens": ROW.tokens,
        "modes": {mode: measure(mode, options.layers, options.repeats) for mode in (LORA, FULL)},
    }
    options.out.write_text(result_json.dumps(result) + "\n", encoding="utf-8")
    print(table(result))


def measure(mode: str, layers: int, repeats: int) -> dict[str, Numbers]:
    """Seconds, bytes and launches of each contestant."""
    model = _model(mode, {**SHAPES, "num_hidden_layers": layers})
    runs = dict(zip((OURS, PEER), contestants(model, ROW, torch.float32), strict=True))
    storages = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    numbers: dict[str, Numbers] = {
        name: {"bytes_per_token_and_layer": _saved(run, storages) / ROW.tokens / layers}
        for name, run in runs.items()
    }
    for name, seconds in _seconds(runs, model, mode, layers, repeats).items():
        numbers.setdefault(name, {}).update(seconds)
    for name, counts in launches(mode).items():
        numbers.setdefault(name, {}).update(counts)
    return numbers


def contestants(model: Any, segments: Segments, dtype: torch.dtype) -> tuple[Run, Run]:
    """Forward passes of both, from token ids to hidden states (P, D)."""
    base: Any = (model.get_base_model() if isinstance(model, peft.PeftModel) else model).model
    ids = torch.arange(segments.tokens)[None] % SHAPES["vocab_size"]
    positions = torch.from_numpy(segments.positions)[None]
    trunk = build_trunk(base)
    half = dtype == torch.bfloat16

    def explicit() -> Tensor:
        return trunk(ids, positions, segments, dtype)

    def transformers() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            output = base(input_ids=ids, position_ids=positions, use_cache=False, segments=segments)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    return explicit, transformers


def launches(mode: str) -> dict[str, Numbers]:
    """Launches of one layer: the difference between models of three layers and of two."""
    counts: dict[str, list[tuple[int, int]]] = {OURS: [], WITH_KERNELS: [], PEER: []}
    for layers in (2, 3):
        model = _model(mode, {**TINY, "num_hidden_layers": layers})
        for name, parameter in model.named_parameters():
            if not name.endswith(("lora_A.default.weight", "lora_B.default.weight")):
                parameter.data = parameter.data.bfloat16()
        explicit, transformers = contestants(model, SHORT, torch.bfloat16)
        for name, run in {OURS: explicit, WITH_KERNELS: explicit, PEER: transformers}.items():
            with _stand_ins(name == WITH_KERNELS):
                with Launches() as forward:
                    hidden = run()
                with Launches() as backward:
                    hidden.sum().backward()
            model.zero_grad()
            counts[name].append((forward.counts.total(), backward.counts.total()))
    return {
        name: {"launches_forward": b[0] - a[0], "launches_backward": b[1] - a[1]}
        for name, (a, b) in counts.items()
    }


def table(result: Any) -> str:
    columns = (
        "",
        "forward, s",
        "backward, s",
        "saved, kB a token and layer",
        "launches a layer, forward",
        "backward",
    )
    rows = []
    for mode, numbers in result["modes"].items():
        for name, values in numbers.items():
            rows.append(
                [
                    f"{mode}: {name}",
                    _number(values, "forward_seconds", 2),
                    _number(values, "backward_seconds", 2),
                    _number(values, "bytes_per_token_and_layer", 1, unit=1000),
                    _number(values, "launches_forward", 0),
                    _number(values, "launches_backward", 0),
                ]
            )
    return markdown.table(columns, rows)


def _number(values: Mapping[str, float], key: str, digits: int, unit: float = 1) -> str:
    """A cell of the table, empty for a number that a contestant does not have."""
    return f"{values[key] / unit:.{digits}f}" if key in values else ""


def _model(mode: str, shapes: Mapping[str, Any]) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **shapes)
    name = packed_attention.register()
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=name)
    if mode == LORA:
        model.requires_grad_(False)
        options = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        model = peft.get_peft_model(model, options)
    return model.train()


def _saved(run: Run, model_storages: set[int]) -> int:
    """Bytes that the forward pass saves for the backward pass, each storage once."""
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = run()
    del hidden
    return sum(s.nbytes() for address, s in saved.items() if address not in model_storages)


def _seconds(
    runs: Mapping[str, Run], model: nn.Module, mode: str, layers: int, repeats: int
) -> dict[str, Numbers]:
    """Least seconds of a forward and a backward pass; contestants take turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in (*runs, FLOOR)}
    products = _products(layers)
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            hidden = run()
            middle = time.perf_counter()
            hidden.backward(torch.ones_like(hidden))
            times[name].append((middle - start, time.perf_counter() - middle))
            model.zero_grad()
        start = time.perf_counter()
        for x, weight in products:
            x @ weight.T
        middle = time.perf_counter()
        for index, (x, weight) in enumerate(products):
            grad = x.new_ones(len(x), len(weight))
            # No gradient reaches the frozen embeddings through the first block.
            if mode == FULL or index >= len(products) // layers:
                grad @ weight
            if mode == FULL:
                grad.T @ x
        times[FLOOR].append((middle - start, time.perf_counter() - middle))
    least = {name: min(values, key=sum) for name, values in times.items()}
    return {
        name: {"forward_seconds": forward, "backward_seconds": backward}
        for name, (forward, backward) in least.items()
    }


def _products(layers: int) -> Sequence[tuple[Tensor, Tensor]]:
    """Inputs and weights of the products of all layers."""
    width, inner = SHAPES["hidden_size"], SHAPES["intermediate_size"]
    key_width = width * SHAPES["num_key_value_heads"] // SHAPES["num_attention_heads"]
    outputs = (width, key_width, key_width, width, inner, inner)
    shapes = [*((out, width) for out in outputs), (width, inner)]
    return [(torch.randn(ROW.tokens, s[1]), torch.randn(s)) for _ in range(layers) for s in shapes]


class _Attention:
    """Attention that computes nothing and counts as the launches of the Triton kernel."""

    @staticmethod
    def forward(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        query.sin()
        return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)

    @staticmethod
    def backward(grad: Tensor, query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, ...]:
        query.sin(), key.sin(), key.sin()
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(key)


class _Kernels:
    """The elementwise kernels, each of which computes nothing and counts as its launches."""

    MAX_WIDTH = 2**14

    @staticmethod
    def rms_norm(x: Tensor, *_: Any) -> Tensor:
        return x.sin()

    @staticmethod
    def residual_rms_norm(x: Tensor, update: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return update.sin(), torch.empty_like(update)

    @staticmethod
    def rms_norm_backward(
        grad: Tensor, x: Tensor, weight: Tensor, _: Any, needs_weight: bool, *residual: Any
    ) -> tuple[Tensor, Tensor | None]:
        return x.sin(), weight.sin() if needs_weight else None

    @staticmethod
    def rotate(query: Tensor, *_: Any) -> None:
        query.sin()

    rotate_backward = rotate

    @staticmethod
    def gated(gate: Tensor, *_: Any) -> Tensor:
        return gate.sin()

    @staticmethod
    def gated_backward(grad: Tensor, gate: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return gate.sin(), grad


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """A product of one launch, whose results are of the dtype without a cast."""
    return a.new_empty(len(a), b.shape[1], dtype=dtype).sin()


@contextmanager
def _stand_ins(kernels: bool) -> Iterator[None]:
    """Operations that launch on a GPU what the stand-ins count; elementwise kernels on request."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(api, "backend_for", lambda *_: _Attention))
        stack.enter_context(patch.object(linear, "_product", _product))
        for module in (norm, rotary, gated) if kernels else ():
            stack.enter_context(patch.object(module, "kernels_for", lambda _: _Kernels))
        yield


if __name__ == "__main__":
    main()
