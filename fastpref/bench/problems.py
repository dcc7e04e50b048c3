"""Ops and shapes to measure, as data: a row is a `Problem` and the name of an implementation.

    op              what is timed                                          GEMMs it needs
    linear_logps    log-probs forward, gradients backward, head frozen     L H
                    the same, head trained                                 L H W
    forward         log-probs of the labels, no gradient                   L
    linear_kl       KL to a reference with the same head, and gradient     L L H
    dpo             DPO of equally long pairs, its gradient to hidden      L H
    dpo_padded      the same for a padded batch with prompts               L H
    score_geometry  norms and cosine of each pair's scores                 L and the Gram matrices
    packed_attention  attention over a packed row, forward and backward    7 A

    L: hidden @ weight.T      H: dlogits @ weight    W: dlogits.T @ hidden,   2 T D V FLOPs each
    A: scores of all visible pairs of a query and a key, 2 D FLOPs each; V does not matter

Every token belongs to a completion: rows of prompts and padding are removed before they reach a
head, so these numbers leave out the time that other libraries spend on them. Only `dpo_padded`
includes them: its rows are those of a padded batch with log-normal lengths, each implementation
treats them as its trainer does, and its GEMM baseline covers all rows. No DPO has a reference pass:
the reference log-probs are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.attention import Segments
from fastpref.ops.reference import IGNORE_INDEX

GEMMS = {
    ("linear_logps", "frozen"): "LH",
    ("linear_logps", "trained"): "LHW",
    ("forward", "frozen"): "L",
    ("linear_kl", "frozen"): "LLH",
    ("dpo", "frozen"): "LH",
    ("dpo_padded", "frozen"): "LH",
    # The geometry is compared with the head's forward and backward, which it accompanies.
    ("score_geometry", "frozen"): "LH",
    # Scores and output; then scores, their gradient, and the gradients of query, key and value.
    ("packed_attention", "frozen"): 7 * "A",
}
OPS = tuple(dict.fromkeys(op for op, _ in GEMMS))
PAIR_TOKENS = 2048  # of both responses together
# Medians as in UltraFeedback, in tokens, and standard deviations of the logarithm.
PROMPT, RESPONSE = (120, 0.8), (250, 0.6)


@dataclass(frozen=True)
class Problem:
    """One op at one shape; `chunk_bytes` sets `chunked.CHUNK_BYTES` unless it is None."""

    op: str
    head: str  # frozen | trained
    T: int
    D: int
    V: int
    dtype: str  # name of a torch dtype
    chunk_bytes: int | None = None

    @property
    def gemms(self) -> str:
        return GEMMS[self.op, self.head]

    @property
    def differentiable(self) -> bool:
        return self.op not in ("forward", "score_geometry")

    @property
    def pairs(self) -> int:
        """Pairs of responses, of PAIR_TOKENS each if the problem has that many tokens."""
        return max(1, self.T // PAIR_TOKENS)

    @property
    def flops(self) -> float:
        """FLOPs that an exact method needs at least, if it computes the logits once."""
        if self.op == "packed_attention":
            return 2.0 * self.D * visible_pairs(packed_segments(self.T)) * len(self.gemms)
        one = 2 * self.T * self.D * self.V
        if self.op != "score_geometry":
            return one * len(self.gemms)
        n = self.T / self.pairs / 2
        gram = 2 * 3 * n * n * (self.V + self.D)
        return one + self.pairs * min(gram, 4 * n * self.D * self.V)


class Inputs(NamedTuple):
    """Tensors of one problem."""

    hidden: Tensor  # (T, D); of packed_attention query, key and value, (T, D + 2 D')
    weight: Tensor  # (V, D)
    labels: Tensor  # (T,); -100 for rows of a prompt or padding
    grad_logps: Tensor  # (T,) fp32, uneven
    ref_hidden: Tensor  # (T, D)
    cu_seqlens: Tensor  # (2 pairs + 1,)

    @property
    def gradients(self) -> tuple[Tensor, ...]:
        return tuple(x.grad for x in (self.hidden, self.weight) if x.grad is not None)


def make_inputs(problem: Problem, device: str) -> Inputs:
    """Random inputs, the same each time; logits are normal with variance 1.

    Filled in place: a temporary would raise the process's peak memory before a measurement.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype: torch.dtype = getattr(torch, problem.dtype)
    T, D, V = problem.T, problem.D, problem.V

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        empty = torch.empty(shape, dtype=dtype, device=device)
        return empty.normal_(std=std, generator=generator)

    width = D
    if problem.op == "packed_attention":
        heads, key_heads, size = attention_heads(D)
        width = (heads + 2 * key_heads) * size
    labels = torch.randint(V, (T,), generator=generator, device=device)
    if problem.op == "dpo_padded":
        labels = labels.masked_fill(_no_completion(2 * problem.pairs, T).to(device), IGNORE_INDEX)
    return Inputs(
        hidden=normal(T, width).requires_grad_(problem.differentiable),
        weight=normal(V, D, std=D**-0.5).requires_grad_(problem.head == "trained"),
        labels=labels,
        grad_logps=normal(T, dtype=torch.float32),
        ref_hidden=normal(T, D),
        cu_seqlens=torch.arange(2 * problem.pairs + 1, device=device) * T // (2 * problem.pairs),
    )


def _no_completion(sequences: int, T: int) -> Tensor:
    """Mask of the rows outside completions, (T,) bool.

    Each sequence has equally many rows: prompt, completion, padding, cut on the right.
    """
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(2, sequences // 2, generator=generator)  # a pair has one prompt
    normals = torch.stack([pairs[0].repeat(2), torch.randn(sequences, generator=generator)])
    medians, spreads = torch.tensor([PROMPT, RESPONSE]).T
    prompt, response = (medians[:, None] * (spreads[:, None] * normals).exp()).long() + 1
    length = T // sequences
    prompt = prompt.clamp(max=length // 2)
    row = torch.arange(length)
    inside = (row >= prompt[:, None]) & (row < (prompt + response)[:, None])
    return ~inside.flatten()


@cache
def packed_segments(tokens: int) -> Segments:
    """A packed row of groups with two responses; the last group is shortened to fill the row."""
    generator = torch.Generator().manual_seed(0)
    medians, spreads = torch.tensor([PROMPT, RESPONSE, RESPONSE]).T
    groups, left = [], tokens
    while left >= 3:
        sizes = (medians * (spreads * torch.randn(3, generator=generator)).exp()).long() + 1
        if sizes.sum() > left:
            sizes = 1 + (sizes * (left - 3)) // sizes.sum()
            sizes[2] = left - sizes[:2].sum()
        groups.append(tuple(sizes.tolist()))
        left -= int(sizes.sum())
    return Segments((*groups, *[(1,)] * left))


def visible_pairs(segments: Segments) -> int:
    """Number of pairs of a query and a key that it sees."""
    return int((segments.positions + 1).sum())


def attention_heads(width: int) -> tuple[int, int, int]:
    """Query heads, key heads and head size of a row: 4 queries to a key where that divides."""
    sizes = [size for size in (128, 64, 32, 16, 8, 4, 2, 1) if width % size == 0]
    size = next(size for size in sizes if size <= 16 or width >= 4 * size)
    heads = width // size
    return heads, heads // next(share for share in (4, 2, 1) if heads % share == 0), size


def small(problem: Problem) -> Problem:
    """The same op at a tiny size, to see whether an implementation runs at all."""
    T, D, V = min(64, problem.T), min(64, problem.D), min(512, problem.V)
    return Problem(problem.op, problem.head, T, D, V, problem.dtype)


CPU_SHAPES = ((2048, 512, 32000), (1024, 256, 128256))
CUDA_SHAPES = (
    (8192, 4096, 128256),
    (8192, 4096, 32000),
    (8192, 3584, 152064),
    (4096, 2304, 256000),
)
QUICK_SHAPES = {"cpu": ((256, 64, 8192),), "cuda": ((1024, 1024, 32000),)}
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


def problems(device: str, quick: bool) -> list[Problem]:
    """Problems of `fastpref bench` on a device: the shapes, then a sweep over V and one over T."""
    if quick:
        return shape_problems(QUICK_SHAPES[device], device) + sweeps(device, quick)
    if device == "cuda":
        return shape_problems(CUDA_SHAPES, device) + sweeps(device, quick)
    heads = [
        Problem("linear_logps", head, *shape, DTYPE[device])
        for shape in CPU_SHAPES
        for head in ("frozen", "trained")
    ]
    forward = Problem("forward", "frozen", *CPU_SHAPES[0], DTYPE[device])
    dpo = shape_problems(CPU_SHAPES, device, ("dpo", "dpo_padded"))
    others = shape_problems(((256, 128, 8192),), device, ("linear_kl", "score_geometry"))
    attention = shape_problems(CPU_SHAPES[:1], device, ("packed_attention",))
    return [*heads, forward, *dpo, *others, *attention, *sweeps(device, quick)]


def shape_problems(
    shapes: tuple[tuple[int, int, int], ...], device: str, ops: tuple[str, ...] = OPS
) -> list[Problem]:
    """Every op, head by head, at each shape; attention once for shapes that differ in V only."""
    first = {shape[:2]: shape for shape in reversed(shapes)}
    return [
        Problem(op, head, *shape, DTYPE[device])
        for shape in shapes
        for op, head in GEMMS
        if op in ops and (op != "packed_attention" or first[shape[:2]] == shape)
    ]


def sweeps(device: str, quick: bool) -> list[Problem]:
    """Problems of growing V at one T, then of growing T at the smallest V; head frozen.

    Head trained: the smallest and the largest V, between which extra memory should not grow.
    """
    T, D, V, chunk_bytes = {
        ("cpu", False): (1024, 128, 32768, 64 << 20),
        ("cpu", True): (256, 64, 4096, 1 << 20),
        ("cuda", False): (4096, 4096, 32768, None),
        ("cuda", True): (1024, 1024, 16384, None),
    }[device, quick]
    sizes = [("frozen", T, V * k) for k in (1, 2, 4, 8)]
    sizes += [("frozen", t, V) for t in (T // 4, T // 2, T * 2, T * 4)]
    sizes += [("trained", T, V), ("trained", T, V * 8)]
    return [Problem("linear_logps", h, t, D, v, DTYPE[device], chunk_bytes) for h, t, v in sizes]
