"""Attention over packed rows by the Triton kernels against its definition in fp64."""

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from fastpref.attention import Segments, packed_attention, reference
from fastpref.attention.by_segment import Options
from fastpref_kernels import packed_attention as module
from fastpref_kernels.common import configs
from fastpref_kernels.common.attention_tile import head_parts
from fastpref_kernels.common.configs import AttentionConfig, AttentionConfigs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Prompts and responses that tiles of 16 do not divide, of one token, of one tile; a prompt alone.
GROUPS = ((20, 17, 1, 33), (5,), (1, 16))
# Relative errors in the norm, of values and gradients: fp32 sums of some hundred terms.
FP32 = 1e-5


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan() -> Iterator[None]:
    """Every output must be written: torch fills new tensors with NaN under this setting."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(
    segments: Segments, heads: tuple[int, int], size: int = 16, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Query, key, value and upstream gradient."""
    draw = torch.Generator().manual_seed(segments.tokens + size)
    shapes = [(segments.tokens, count, size) for count in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(shape, generator=draw).to(DEVICE, dtype) for shape in shapes]


def results(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, segments: Segments, **options
) -> list[Tensor]:
    """Output and gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    out = packed_attention(*leaves, segments, impl="triton", **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def defined(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, segments: Segments, **options
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    options = {"scale": query.shape[-1] ** -0.5, **options}
    out = reference.packed_attention(*leaves, segments, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check(tensors: list[Tensor], segments: Segments, tolerance: float = FP32, **options) -> None:
    ours = results(*tensors, segments, **options)
    exact = defined(*(x.double() for x in tensors), segments, **options)
    for a, b in zip(ours, exact, strict=True):
        # A gradient that is 0, as under a window of one token, has the rounding of its terms.
        assert (a.double() - b).norm() <= tolerance * b.norm().clamp(min=1.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 1},
        {"window": 7},  # shorter than prompts and responses
        {"window": 20},  # as long as a prompt
        {"window": 30},
        {"window": 53},  # as long as the longest sequence
        {"softcap": 1.5, "scale": 0.7},
        {"window": 18, "softcap": 0.5},
    ],
    ids=str,
)
def test_matches_the_definition(options) -> None:
    segments = Segments(GROUPS)
    check(make(segments, (2, 1)), segments, **options)


@pytest.mark.parametrize("groups", [((1,),), ((1, 1, 1), (2,)), ((48, 32),)], ids=str)
def test_segments_of_one_token_and_of_whole_tiles(groups) -> None:
    segments = Segments(groups)
    check(make(segments, (1, 1)), segments)
    check(make(segments, (1, 1)), segments, window=17)


@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (8, 1)])
def test_heads_that_share_keys(heads) -> None:
    segments = Segments(((18, 5, 9),))
    check(make(segments, heads), segments)


@pytest.mark.parametrize("size", [48, 64, 80, 96, 112, 128, 144, 256])
def test_head_sizes(size) -> None:
    segments = Segments(((5, 17), (3,)))
    check(make(segments, (1, 1), size), segments)


@pytest.mark.parametrize(
    ("size", "parts"),
    [(16, (16, 0)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (112, (128, 0)),
     (192, (128, 64)), (208, (256, 0)), (256, (256, 0))],
)  # fmt: skip
def test_parts_of_a_head(size, parts) -> None:
    assert head_parts(size) == parts


@pytest.mark.parametrize(
    ("queries", "keys", "apart"), [(32, 16, False), (16, 64, False), (16, 32, True)]
)
def test_tiles_of_other_shapes(queries, keys, apart, monkeypatch) -> None:
    tile = AttentionConfig(queries, keys, 1, 1)
    tiles = AttentionConfigs(tile, tile, tile, tile if apart else None)
    monkeypatch.setattr(configs, "INTERPRETER_ATTENTION", tiles)
    segments = Segments(GROUPS)
    check(make(segments, (1, 1)), segments)
    check(make(segments, (1, 1)), segments, window=30, softcap=2.0)


@pytest.mark.parametrize("options", [{}, {"window": 20, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_the_dtype(dtype, options) -> None:
    """Weights and their gradients are rounded to the dtype for products, as in plain torch."""
    segments = Segments(GROUPS[:2])
    tensors = make(segments, (1, 1), dtype=dtype)
    ours = results(*tensors, segments, **options)
    exact = defined(*(x.double() for x in tensors), segments, **options)
    plain = in_the_dtype(*tensors, segments, **options)
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.dtype == dtype
        assert (a - c).norm() <= 2 * (b - c).norm() + torch.finfo(dtype).eps * c.norm()


def in_the_dtype(query, key, value, grad, segments, *, window=None, softcap=None) -> list[Tensor]:
    """Scores in the dtype of the inputs, as a model without fused attention has them."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    group = query.shape[1] // key.shape[1]
    q, k, v = (x.transpose(0, 1) for x in leaves)
    k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
    scores = query.shape[-1] ** -0.5 * (q @ k.transpose(1, 2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = reference.mask(segments, window, query.device)
    out = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def test_views_of_one_stacked_projection() -> None:
    segments = Segments(((18, 5),))
    query, key, value, grad = make(segments, (4, 2))
    stacked = torch.cat([query, key, value], dim=1)
    views = stacked.split((4, 2, 2), dim=1)
    assert not views[1].is_contiguous()
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, key, value)]
    plain = results(query, key, value, grad, segments)
    for inputs in (views, heads_first):
        for a, b in zip(results(*inputs, grad, segments), plain, strict=True):
            assert torch.equal(a, b)


def test_any_strides_of_the_upstream_gradient() -> None:
    segments = Segments(((18, 5),))
    *inputs, grad = make(segments, (2, 1))
    check([*inputs, grad[:1, :1].expand(grad.shape)], segments)
    check([*inputs, torch.ones((), device=DEVICE).expand(grad.shape)], segments)


def test_equal_responses_have_equal_outputs_and_gradients_to_the_bit() -> None:
    """At any place in the row, and whatever the other groups are."""
    segments = Segments(((9, 4), (30, 17, 3, 17)))
    tensors = make(segments, (1, 1))
    first, second = slice(43, 60), slice(63, 80)
    for x in tensors:
        x[second] = x[first]
    for options in ({}, {"window": 25}):
        whole = results(*tensors, segments, **options)
        alone = results(*(x[13:60] for x in tensors), Segments(((30, 17),)), **options)
        for a, b in zip(whole, alone, strict=True):
            assert torch.equal(a[first], a[second])
            assert torch.equal(a[first], b[30:])


def test_nothing_outside_the_group_is_read() -> None:
    segments = Segments(((18, 5, 9), (4, 3)))
    tensors = make(segments, (2, 1))
    exact = results(*(x[:32] for x in tensors), Segments(((18, 5, 9),)))
    for x in tensors:
        x[32:] = torch.nan
    for a, b in zip(results(*tensors, segments), exact, strict=True):
        assert torch.equal(a[:32], b)


def test_the_log_sum_exp() -> None:
    segments = Segments(GROUPS)
    query, key, value, _ = (x.double() for x in make(segments, (1, 1)))
    scores = (query[:, 0] @ key[:, 0].T / 4).masked_fill(
        ~reference.mask(segments, None, query.device), -torch.inf
    )
    inputs = (x.float() for x in (query, key, value))
    _, lse = module.forward(*inputs, segments, Options(0.25))
    torch.testing.assert_close(lse[:, 0].double(), scores.logsumexp(1), rtol=1e-6, atol=1e-6)


def test_very_peaked_scores() -> None:
    segments = Segments(((18, 20),))
    query, *others = make(segments, (1, 1))
    # fp32 holds a score of 300 to 1.5e-5, which is the relative error of its weight.
    check([100 * query, *others], segments, tolerance=1e-4)
    check([-100 * query, *others], segments, tolerance=1e-4, window=19)


def test_lists_of_tiles() -> None:
    """The longest walk first: a tile of a response has its prompt before it."""
    segments = Segments(((3, 5, 2), (4,)))
    cpu = torch.device("cpu")
    assert module.query_tiles(segments, 4, cpu).tolist() == [
        [3, 5, 4, 0, 3],
        [3, 5, 0, 0, 3],
        [8, 2, 0, 0, 3],
        [0, 3, 0, 0, 0],
        [10, 4, 0, 10, 0],
    ]
    assert module.key_tiles(segments, 4, cpu).tolist() == [
        [0, 3, 0, 10, 5, 1, 3],
        [3, 5, 0, 8, 0, 2, 2],
        [10, 4, 0, 14, 0, 4, 4],
        [8, 2, 0, 10, 0, 3, 3],
        [3, 5, 4, 8, 0, 2, 2],
    ]
    assert module.segment_starts(segments, cpu).tolist() == [0, 3, 8, 10, 14]
    assert module.query_tiles(segments, 4, cpu) is module.query_tiles(segments, 4, cpu)
    assert np.array_equal(module.tiled(np.array([1, 8, 9]), 8)[1], [0, 0, 0, 8])


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        (torch.zeros(3, 1, 24), Options(1.0), "multiples of 16 up to 256, got 24"),
        (torch.zeros(3, 1, 272), Options(1.0), "multiples of 16 up to 256, got 272"),
        (torch.zeros(3, 1, 16).double(), Options(1.0), "got torch.float64"),
        (torch.zeros(3, 1, 16), Options(0.0), "a positive scale, got 0.0"),
    ],
)
def test_inputs_that_the_kernels_cannot_take_are_named(query, options, message) -> None:
    assert message in module.unavailable_reason(query.to(DEVICE), options)
    assert module.unavailable_reason(torch.zeros(3, 1, 80, device=DEVICE), Options(1.0)) == ""
