"""The ops as torch sees them: schemas, fakes, derivatives, and one node of a compiled graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastpref import ops
from fastpref.ops import cpu, kl_op, logps_op, statistics_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU_UNAVAILABLE = cpu.unavailable_reason(DEVICE)
IMPLEMENTATIONS = [
    pytest.param("cpu", marks=pytest.mark.skipif(bool(CPU_UNAVAILABLE), reason=CPU_UNAVAILABLE)),
    "chunked",
    "triton",
]
each_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
T, D, E, V = 6, 8, 5, 19


def inputs(*trained: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"hidden": (T, D), "weight": (V, D), "bias": (V,)}
    leaves = {k: torch.randn(shape, generator=g).to(DEVICE) for k, shape in shapes.items()}
    labels = torch.randint(V, (T,), generator=g)
    labels[2] = -100
    return {k: x.requires_grad_(k in trained) for k, x in leaves.items()} | {
        "labels": labels.to(DEVICE)
    }


@each_implementation
@pytest.mark.parametrize("trained", [(), ("hidden",), ("weight", "bias"), ("hidden", "weight")])
@pytest.mark.parametrize("sketch_rows", [0, 4])
def test_opcheck_of_the_log_probs(impl, trained, sketch_rows) -> None:
    x = inputs(*trained)
    token_weights = x["hidden"][:, 0].detach() if sketch_rows else None
    arguments = (x["hidden"], x["weight"], x["labels"], x["bias"], token_weights, 0.5, 4.0)
    sketch = (sketch_rows, min(2, sketch_rows))
    trains = ("hidden" in trained, "weight" in trained)
    torch.library.opcheck(logps_op._linear_logps, (*arguments, *sketch, *trains, impl))


@each_implementation
@pytest.mark.parametrize("trained", [(), ("hidden",), ("hidden", "weight")])
def test_opcheck_of_the_divergence(impl, trained) -> None:
    x = inputs(*trained)
    g = torch.Generator().manual_seed(1)
    reference = [torch.randn(n, E, generator=g).to(DEVICE) for n in (T, V)]
    arguments = (x["hidden"], x["weight"], *reference, 0.5, None)
    head = "weight" in trained
    torch.library.opcheck(kl_op._linear_kl, (*arguments, "hidden" in trained, head, impl))


@each_implementation
@pytest.mark.parametrize("per_pair", [False, True])
def test_opcheck_of_the_statistics(impl, per_pair) -> None:
    x = inputs()
    options = (1.0, None, impl)
    torch.library.opcheck(
        statistics_op._token_stats, (x["hidden"], x["weight"], x["labels"], x["bias"], *options)
    )
    ends = torch.tensor([0, 2, 3, 4, 6])
    token_weights = None if per_pair else x["hidden"][:, 0]
    torch.library.opcheck(
        statistics_op._score_geometry,
        (x["hidden"], x["weight"], x["labels"], ends, token_weights, per_pair, *options),
    )


class Everything(nn.Module):
    """A body, a head and every op, as in a trainer's forward pass."""

    def __init__(self, impl: str, trained: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.impl = impl
        self.body = nn.Linear(D, D)
        self.head = nn.Linear(D, V).requires_grad_(trained)

    def forward(self, x: Tensor, labels: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
        hidden, weight = self.body(x), self.head.weight
        logps = ops.linear_logps(hidden, weight, labels, bias=self.head.bias, impl=self.impl)
        kl = ops.linear_kl(hidden, weight, x, weight.detach(), impl=self.impl)
        stats = ops.token_stats(hidden, weight, labels, impl=self.impl)
        geometry = ops.score_geometry(hidden, weight, labels, cu_seqlens, impl=self.impl)
        return ops.segment_sum(logps, cu_seqlens.to(x.device)), kl, stats.entropy, geometry.cosine


def gradients(module: nn.Module) -> list[Tensor]:
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    return grads


@pytest.mark.parametrize("impl", ["auto", *IMPLEMENTATIONS])
@pytest.mark.parametrize("trained", [False, True])
def test_a_compiled_module_is_one_graph_with_the_same_bits(impl, trained) -> None:
    torch._dynamo.reset()  # one code object for all cases, and a limit to its recompilations
    module = Everything(impl, trained).to(DEVICE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for tokens in (12, 9, 10):  # the later ones with a dynamic number of tokens
        g = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, D, generator=g).to(DEVICE)
        labels = torch.randint(V, (tokens,), generator=g).to(DEVICE)
        ends = torch.tensor([0, 3, 4, 4, tokens])
        results = []
        for run in (module, compiled):
            out = run(x, labels, ends)
            (out[0].sum() + out[1] @ torch.arange(float(tokens), device=DEVICE)).backward()
            results.append([*out, *gradients(module)])
        eager, graph = results
        assert len(eager) == 4 + 2 + 2 * trained
        assert all(torch.equal(a, b) for a, b in zip(eager, graph, strict=True))


def test_the_op_is_one_node() -> None:
    nodes: list[str] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    x = inputs()
    run = torch.compile(ops.linear_logps, fullgraph=True, backend=record)
    run(x["hidden"], x["weight"], x["labels"])
    assert [name for name in nodes if "fastpref" in name] == ["fastpref.linear_logps.default"]
