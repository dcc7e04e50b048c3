"""Attention over packed rows equals its definition, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpref.attention import Segments, packed_attention, reference, rows

# Prompts and responses of one token, a prompt alone, one to four responses.
GROUPS = [((9, 14, 11),), ((1, 1, 12), (13, 3, 1, 7, 5), (4,)), ((40, 1),), ((7,), (7,))]
# Windows shorter and longer than prompts; of one token.
OPTIONS = [{}, {"window": 1}, {"window": 5}, {"window": 20}, {"softcap": 1.5, "scale": 0.7}]
HEADS = [(1, 1), (4, 4), (4, 2), (8, 1)]


def inputs(segments: Segments, heads: tuple[int, int], dtype: torch.dtype, size: int = 8):
    torch.manual_seed(0)
    tokens = segments.tokens
    shapes = [(tokens, heads[0], size), (tokens, heads[1], size), (tokens, heads[1], size)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def output_and_gradients(function, leaves: list[Tensor], *arguments, **options) -> list[Tensor]:
    out = function(*leaves, *arguments, **options)
    torch.manual_seed(1)
    return [out, *torch.autograd.grad(out, leaves, torch.randn(out.shape).to(out.dtype))]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_by_segment_is_the_definition(groups, options, heads):
    segments = Segments(groups)
    leaves = inputs(segments, heads, torch.float64)
    expected = {"scale": 8**-0.5, **options}
    for ours, exact in zip(
        output_and_gradients(packed_attention, leaves, segments, impl="by_segment", **options),
        output_and_gradients(reference.packed_attention, leaves, segments, **expected),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-11)


# Not under a window of one token, where the gradients of query and key are 0.
@pytest.mark.parametrize("options", [{}, *OPTIONS[2:]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_the_dtype(dtype, options):
    """The reference rounds only its inputs and outputs; ours may also round its two parts."""
    segments = Segments(GROUPS[1])
    leaves = inputs(segments, (4, 2), dtype)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = {"scale": 8**-0.5, **options}
    exact = output_and_gradients(reference.packed_attention, wide, segments, **expected)
    plain = output_and_gradients(reference.packed_attention, leaves, segments, **expected)
    ours = output_and_gradients(packed_attention, leaves, segments, **options)
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert (a - c).norm() <= 3 * (b - c).norm() + torch.finfo(dtype).eps * c.norm()


def test_inputs_may_be_views_of_one_tensor():
    segments = Segments(GROUPS[0])
    stacked = torch.randn(segments.tokens, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    ours = packed_attention(*stacked.unbind(1), segments)
    exact = reference.packed_attention(*stacked.unbind(1), segments, 8**-0.5)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-11)
    ours.sum().backward()


def test_rows_of_a_padded_batch_do_not_see_each_other():
    leaves = inputs(rows(3, 5), (2, 2), torch.float64)
    whole = packed_attention(*leaves, rows(3, 5))
    alone = packed_attention(*(leaf[5:10] for leaf in leaves), rows(1, 5))
    torch.testing.assert_close(whole[5:10], alone, rtol=0, atol=0)


def test_equal_responses_have_equal_outputs():
    """To the bit, so that a pair of equal responses has a margin of exactly 0."""
    segments = Segments(((30, 17, 17),))
    leaves = [leaf.detach().float() for leaf in inputs(segments, (4, 2), torch.float64)]
    for leaf in leaves:
        leaf[47:] = leaf[30:47]
    out = packed_attention(*leaves, segments)
    assert torch.equal(out[30:47], out[47:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(4, 2, 8)}, r"query: expected shape \(5, H, D\)"),
        ({"key": torch.zeros(5, 3, 8)}, "H' divides the query's 4 heads"),
        ({"value": torch.zeros(5, 1, 8)}, "value: expected the key's shape"),
        ({"key": torch.zeros(5, 2, 8).double()}, "key: expected torch.float32 on cpu"),
        ({"impl": "fastest"}, "impl: expected 'auto' or one of"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"query": torch.zeros(5, 4, 8), "key": torch.zeros(5, 2, 8)}
    arguments |= {"value": torch.zeros(5, 2, 8), "segments": rows(1, 5)}
    with pytest.raises(ValueError, match=message):
        packed_attention(**arguments | change)
