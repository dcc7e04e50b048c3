"""Implementations to compare: named callables of the same inputs.

A callable takes `Inputs` and returns token log-probs (T,), their sum (), or the result of another
op. It imports its library when it is called; `unavailable_reason` says in one line why it cannot
run here. A result with a value per token gets the uneven `grad_logps` of the inputs as its upstream
gradient; a sum can only have an even one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor
from torch.nn import functional

from fastpref import ops
from fastpref.bench import attention
from fastpref.bench.problems import (
    Inputs,
    Problem,
    make_inputs,
    packed_segments,
    small,
    visible_pairs,
)
from fastpref.ops import reference
from fastpref.ops.reference import IGNORE_INDEX
from fastpref.utils.environment import package_version
from fastpref.utils.errors import UserError, first_line

Function = Callable[[Inputs], Tensor]
Logps = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, labels -> (T,)

BETA = 0.1  # of DPO
# Bytes of a chunk for "least memory"; GEMMs of so few rows take longer.
LEAST_CHUNK = 4 << 20
# Modules with a CACHE_BYTES.
_CACHES = {"cpu": "fastpref.ops.cpu", "triton": "fastpref_kernels.linear_logps"}
PACKAGES = {
    "torch": "torch",
    "liger": "liger-kernel",
    "cce": "cut-cross-entropy",
    "trl": "trl",
    "flash": "flash-attn",
}


@dataclass(frozen=True)
class Implementation:
    """One callable for each op that it has.

    gemms: of its GEMM baseline, if it differs from the problem's. budgets: (module, name, bytes)
    to set while it runs, forward and backward.
    """

    name: str
    family: str  # fastpref, or a key of PACKAGES
    functions: dict[str, Function]
    heads: tuple[str, ...] = ("frozen", "trained")
    gemms: str | None = None
    budgets: tuple[tuple[str, str, int], ...] = ()

    def serves(self, problem: Problem) -> bool:
        return problem.op in self.functions and problem.head in self.heads


def implementations(device: str, families: tuple[str, ...]) -> list[Implementation]:
    """Implementations of fastpref for a device, then of the named families, in a fixed order.

    On a CPU the Triton kernels are included only under the interpreter, whose speed says nothing.
    """
    names = ["triton", "chunked"] if device == "cuda" else ["cpu", "chunked"]
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        names.insert(0, "triton")
    ours = [implementation for name in names for implementation in _ours(name)]
    by_segment = {"packed_attention": attention.ours("by_segment")}
    ours.append(Implementation("fastpref by_segment", "fastpref", by_segment))
    return ours + [peer for peer in _peers(device) if peer.family in families]


def check_families(names: str) -> tuple[str, ...]:
    """Split a comma-separated list of families; UserError for an unknown one."""
    families = tuple(name.strip() for name in names.split(",") if name.strip())
    for name in families:
        if name not in PACKAGES:
            raise UserError(f"--against: expected some of {', '.join(PACKAGES)}, got {name!r}")
    return families


def versions(families: tuple[str, ...]) -> dict[str, str]:
    """Version of each family's package, or "not installed"."""
    return {name: package_version(PACKAGES[name]) or "not installed" for name in families}


def prepare(
    implementation: Implementation, problem: Problem, inputs: Inputs
) -> Callable[[], Tensor]:
    """A callable that runs forward and, if the op has one, backward; gradients go to the inputs."""
    function = implementation.functions[problem.op]

    def run() -> Tensor:
        inputs.hidden.grad = inputs.weight.grad = None
        with ExitStack() as budgets:
            budgets.enter_context(
                setting("fastpref.ops.chunked", "CHUNK_BYTES", problem.chunk_bytes)
            )
            for budget in implementation.budgets:
                budgets.enter_context(setting(*budget))
            result = function(inputs)
            if problem.differentiable:
                _backward(result, inputs)
        return result.detach()

    return run


def unavailable_reason(implementation: Implementation, problem: Problem, device: str) -> str:
    """Reason why an implementation cannot run an op here, imports included; empty if it can."""
    tiny = small(problem)
    try:
        prepare(implementation, tiny, make_inputs(tiny, device))()
    except Exception as error:
        return reason(error)
    return ""


def reason(error: Exception) -> str:
    """One line for the table: the kind of error and the start of its message."""
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: no module {error.name}"
    if isinstance(error, UserError):
        return first_line(error)
    return f"{type(error).__name__}: {first_line(error)}"[:160]


def gemm_baseline(problem: Problem, inputs: Inputs, letters: str) -> Callable[[], None]:
    """A callable that runs the GEMMs named by `letters`, on full matrices allocated in advance."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    if problem.op == "packed_attention":
        return _score_gemms(problem, inputs, letters)
    logits = hidden.new_empty(problem.T, problem.V)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        for letter in letters:
            if letter == "L":
                torch.mm(hidden, weight.T, out=logits)
            elif letter == "H":
                torch.mm(logits, weight, out=grad_hidden)
            else:
                torch.mm(logits.T, hidden, out=grad_weight)

    return run


def dpo(logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean over pairs of -log sigmoid(beta * (logp of chosen - logp of rejected)), ()."""
    chosen, rejected = ops.segment_sum(logps, cu_seqlens).chunk(2)
    return -functional.logsigmoid(BETA * (chosen - rejected)).mean()


@contextmanager
def setting(module: str, name: str, value: int | None) -> Iterator[None]:
    """Context manager that sets a byte budget of a module; None changes and imports nothing."""
    if value is None:
        yield
        return
    owner = import_module(module)
    previous = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, previous)


def _score_gemms(problem: Problem, inputs: Inputs, letters: str) -> Callable[[], None]:
    """GEMMs of the FLOPs of attention: every query by the mean number of keys that it sees."""
    keys = -(-visible_pairs(packed_segments(problem.T)) // problem.T)
    weight = inputs.ref_hidden.new_ones(keys, problem.D)
    scores = inputs.ref_hidden.new_empty(problem.T, keys)

    def run() -> None:
        for _ in letters:
            torch.mm(inputs.ref_hidden, weight.T, out=scores)

    return run


def _backward(result: Tensor, inputs: Inputs) -> None:
    """Backward pass with an uneven upstream gradient, if the result is more than a number."""
    if result.dim() == 2:
        result.backward(inputs.ref_hidden)
    elif result.dim() == 1:
        (result.to(inputs.grad_logps.dtype) @ inputs.grad_logps).backward()
    else:
        result.backward()


def _with_logps(logps: Logps) -> dict[str, Function]:
    """Ops that follow from token log-probs; rows without a label are removed first."""

    def direct(x: Inputs) -> Tensor:
        return logps(x.hidden, x.weight, x.labels)

    def padded(x: Inputs) -> Tensor:
        rows, cu_seqlens = completions(x)
        return dpo(logps(x.hidden[rows], x.weight, x.labels[rows]).float(), cu_seqlens)

    return {
        "linear_logps": direct,
        "forward": direct,
        "dpo": lambda x: dpo(direct(x).float(), x.cu_seqlens),
        "dpo_padded": padded,
    }


def completions(x: Inputs) -> tuple[Tensor, Tensor]:
    """Rows that have a label, and the offsets of the sequences among them."""
    labeled = x.labels != IGNORE_INDEX
    before = functional.pad(labeled.cumsum(0), (1, 0))
    return labeled.nonzero().squeeze(1), before[x.cu_seqlens]


def _ours(impl: str) -> list[Implementation]:
    def geometry(x: Inputs) -> Tensor:
        scores = ops.score_geometry(
            x.hidden, x.weight, x.labels, x.cu_seqlens, per_pair=True, impl=impl
        )
        return torch.cat(scores)

    logps = functools.partial(ops.linear_logps, impl=impl)
    functions: dict[str, Function] = {
        **_with_logps(logps),
        "linear_kl": lambda x: ops.linear_kl(
            x.hidden, x.weight, x.ref_hidden, x.weight.detach(), impl=impl
        ),
        "score_geometry": geometry,
    }
    if impl == "triton":
        functions["packed_attention"] = attention.ours(impl)
    statistics: dict[str, Function] = {
        "forward": lambda x: ops.token_stats(x.hidden, x.weight, x.labels, impl=impl).logps
    }
    score_sums: dict[str, Function] = {
        "linear_logps": lambda x: ops.linear_logps_and_scores(
            x.hidden, x.weight, x.labels, len(x.labels) // 2, impl=impl
        )[0]
    }
    implementations = [
        Implementation(f"fastpref {impl}", "fastpref", functions),
        Implementation(f"fastpref {impl}, all statistics", "fastpref", statistics),
        Implementation(f"fastpref {impl}, score sums", "fastpref", score_sums),
    ]
    alone = {"linear_logps": functions["linear_logps"]}
    no_cache = (_CACHES.get(impl, ""), "CACHE_BYTES", 0)
    if impl in _CACHES:
        name = f"fastpref {impl}, no cache"
        implementations.append(
            Implementation(name, "fastpref", alone, ("trained",), "LHLW", budgets=(no_cache,))
        )
    if impl == "cpu":
        budgets = (no_cache, ("fastpref.ops.chunked", "CHUNK_BYTES", LEAST_CHUNK))
        implementations.append(
            Implementation("fastpref cpu, least memory", "fastpref", alone, budgets=budgets)
        )
    return implementations


def _peers(device: str) -> list[Implementation]:
    liger_dpo = Implementation("liger DPO, eager", "liger", _liger_dpo(False), ("frozen",))
    compiled = Implementation("liger DPO", "liger", _liger_dpo(True), ("frozen",))
    return [
        Implementation("torch full logits", "torch", _FULL),
        Implementation("torch linear_cross_entropy", "torch", _with_logps(_torch_fused)),
        Implementation("torch linear_cross_entropy, sum", "torch", {"linear_logps": _torch_sum}),
        Implementation("liger cross entropy, sum", "liger", {"linear_logps": _liger}),
        *([compiled, liger_dpo] if device == "cuda" else [liger_dpo]),
        Implementation("cce", "cce", _with_logps(_cce("auto"))),
        Implementation("cce, no filter", "cce", _with_logps(_cce(None))),
        Implementation("trl chunked log-prob", "trl", _with_logps(_trl)),
        Implementation(
            "torch sdpa by sequence", "torch", {"packed_attention": attention.sdpa_by_sequence}
        ),
        *(_attention_on_gpus() if device == "cuda" else []),
    ]


def _attention_on_gpus() -> list[Implementation]:
    return [
        Implementation("torch FlexAttention", "torch", {"packed_attention": attention.flex}),
        Implementation("flash-attn", "flash", {"packed_attention": attention.ours("flash")}),
    ]


def _full_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logps = functional.linear(hidden, weight).log_softmax(1)
    return logps.gather(1, labels[:, None]).squeeze(1)


def _full_padded(x: Inputs) -> Tensor:
    """DPO as with a model's own head: logits of every row."""
    logps = _full_logits(x.hidden, x.weight, x.labels.clamp(min=0))
    return dpo(logps.float().masked_fill(x.labels == IGNORE_INDEX, 0.0), x.cu_seqlens)


def _full_geometry(x: Inputs) -> Tensor:
    return torch.cat(
        reference.score_geometry(x.hidden, x.weight, x.labels, x.cu_seqlens, per_pair=True)
    )


_FULL: dict[str, Function] = {
    **_with_logps(_full_logits),
    "dpo_padded": _full_padded,
    "linear_kl": lambda x: reference.linear_kl(x.hidden, x.weight, x.ref_hidden, x.weight.detach()),
    "score_geometry": _full_geometry,
    "packed_attention": attention.dense,
}


def _torch_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str
) -> Tensor:
    if not hasattr(functional, "linear_cross_entropy"):
        raise UserError(f"torch {torch.__version__} has no functional.linear_cross_entropy")
    # Without options it computes full logits.
    options = torch.nn.LinearCrossEntropyOptions()
    loss: Tensor = functional.linear_cross_entropy(
        hidden, weight, labels, reduction=reduction, options=options
    )
    return loss


def _torch_fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -_torch_linear_cross_entropy(hidden, weight, labels, "none")


def _torch_sum(x: Inputs) -> Tensor:
    return -_torch_linear_cross_entropy(x.hidden, x.weight, x.labels, "sum")


def _liger(x: Inputs) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(x.weight, x.hidden, x.labels)
    return -loss


def _liger_dpo(compiled: bool) -> dict[str, Function]:
    def loss(x: Inputs) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        sequences = len(x.cu_seqlens) - 1
        module = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=compiled)
        hidden = x.hidden.view(sequences, -1, x.hidden.shape[1])
        value: Tensor = module(x.weight, hidden, x.labels.view(sequences, -1))[0]
        return value

    return {"dpo": loss, "dpo_padded": loss}


def _cce(filter_eps: str | None) -> Logps:
    """Cut Cross-Entropy; filter "auto" drops small softmax entries from the gradients."""

    def logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        options = {"reduction": "none", "filter_eps": filter_eps}
        losses: Tensor = linear_cross_entropy(hidden, weight, labels, **options)
        return -losses

    return logps


def _trl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    logps: Tensor = ChunkedLogProbFunction.apply(
        hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
    )[0]
    return logps
