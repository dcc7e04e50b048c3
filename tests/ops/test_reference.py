"""The specification against formulas written out token by token, in fp64 unless a test says."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastpref import ops
from fastpref.ops import reference

T, D, V = 7, 5, 11  # odd and distinct, so that a swapped dimension cannot go unnoticed


@pytest.fixture
def head() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(T, D, dtype=torch.float64)
    weight = torch.randn(V, D, dtype=torch.float64)
    labels = torch.randint(V, (T,))
    return hidden, weight, labels, torch.randn(V, dtype=torch.float64)


def logit(h: Tensor, w: Tensor, b: float, scale: float, cap: float | None) -> float:
    raw = scale * (sum(float(x) * float(y) for x, y in zip(h, w, strict=True)) + b)
    return raw if cap is None else cap * math.tanh(raw / cap)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.7, None), (-2.0, 3.0)])
def test_statistics_follow_their_definitions(head, scale, cap):
    hidden, weight, labels, bias = head
    stats = reference.token_stats(hidden, weight, labels, bias=bias, logit_scale=scale, softcap=cap)
    for t in range(T):
        row = [logit(hidden[t], weight[v], float(bias[v]), scale, cap) for v in range(V)]
        lse = math.log(sum(math.exp(x) for x in row))
        target = row[int(labels[t])]
        # Eleven terms of order one: 1e-12 leaves three decimal digits above fp64 rounding.
        assert float(stats.lse[t]) == pytest.approx(lse, abs=1e-12)
        assert float(stats.logps[t]) == pytest.approx(target - lse, abs=1e-12)
        entropy = -sum(math.exp(x - lse) * (x - lse) for x in row)
        assert float(stats.entropy[t]) == pytest.approx(entropy, abs=1e-12)
        assert bool(stats.top1[t]) == (target == max(row))
    assert stats.top1.any() and not stats.top1.all()
    logps = reference.linear_logps(
        hidden, weight, labels, bias=bias, logit_scale=scale, softcap=cap
    )
    torch.testing.assert_close(logps, stats.logps, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.7, None), (-2.0, 3.0)])
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_collision_entropy_follows_its_definition(head, scale, cap, impl):
    hidden, weight, labels, bias = head
    labels[4] = -100
    got = ops.collision_entropy(
        hidden, weight, labels, bias=bias, logit_scale=scale, softcap=cap, impl=impl
    )
    for t in range(T):
        row = [logit(hidden[t], weight[v], float(bias[v]), scale, cap) for v in range(V)]
        total = sum(math.exp(x) for x in row)
        expected = -math.log(sum((math.exp(x) / total) ** 2 for x in row))
        assert float(got[t]) == pytest.approx(0.0 if t == 4 else expected, abs=1e-12)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_collision_entropy_of_a_certain_token_is_not_below_zero(impl):
    weight = torch.zeros(V, D)
    weight[3, 0] = 90.0
    hidden = torch.randn(64, D).abs() + 1  # 90 nats and more: fp32 rounds at 1e-5
    got = ops.collision_entropy(hidden, weight, torch.zeros(64).long(), impl=impl)
    assert (got >= 0).all() and got.max() < 1e-4


def test_entropy_of_a_uniform_and_of_a_certain_token():
    weight = torch.zeros(V, D)
    weight[3, 0] = 1000.0  # a gap of 1000 nats: every other probability underflows to 0
    hidden = torch.zeros(2, D)
    hidden[1, 0] = 1.0
    stats = reference.token_stats(hidden, weight, torch.tensor([3, 3]))
    assert float(stats.entropy[0]) == pytest.approx(math.log(V), rel=1e-6)
    assert float(stats.entropy[1]) == 0.0
    assert stats.top1.tolist() == [True, True]  # the uniform row is one big tie


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_widened_before_the_gemm(head, dtype):
    hidden, weight, labels, bias = (x.to(dtype) if x.is_floating_point() else x for x in head)
    logps = reference.linear_logps(hidden, weight, labels, bias=bias)
    widened = reference.linear_logps(hidden.float(), weight.float(), labels, bias=bias.float())
    assert logps.dtype == torch.float32
    assert torch.equal(logps, widened)


def test_autocast_is_ignored(head):
    hidden, weight, labels, _ = (x.float() if x.is_floating_point() else x for x in head)
    outside = reference.linear_logps(hidden, weight, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reference.linear_logps(hidden, weight, labels), outside)


def test_ignored_tokens_count_nowhere_even_when_they_hold_nan(head):
    hidden, weight, labels, _ = head
    keep = torch.tensor([0, 2, 3, 6])
    padded, marked = torch.full_like(hidden, math.nan), torch.full_like(labels, -100)
    padded[keep], marked[keep] = hidden[keep], labels[keep]
    padded.requires_grad_(), weight.requires_grad_()

    logps = reference.linear_logps(padded, weight, marked)
    logps.sum().backward()
    dropped = [1, 4, 5]
    assert logps[dropped].tolist() == [0.0] * 3
    assert padded.grad[dropped].abs().sum() == 0
    (expected,) = torch.autograd.grad(
        reference.linear_logps(hidden[keep], weight, labels[keep]).sum(), weight
    )
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-14)
    stats = reference.token_stats(padded, weight, marked)
    for values in stats:
        assert values[dropped].tolist() == [0.0] * 3


def test_gradients_match_finite_differences(head):
    hidden, weight, labels, bias = head
    labels[2] = -100
    inputs = tuple(x.requires_grad_() for x in (hidden, weight, bias))
    assert torch.autograd.gradcheck(
        lambda h, w, b: reference.linear_logps(h, w, labels, bias=b, logit_scale=0.7, softcap=3.0),
        inputs,
    )


def test_kl_equals_torch_distributions_and_differentiates_the_policy_only(head):
    hidden, weight, _, _ = head
    ref_hidden, ref_weight = torch.randn(T, 3).double(), torch.randn(V, 3).double()
    leaves = [x.requires_grad_() for x in (hidden, weight, ref_hidden, ref_weight)]
    kl = reference.linear_kl(*leaves, logit_scale=0.5, softcap=4.0)
    policy, ref = (
        torch.distributions.Categorical(logits=4.0 * torch.tanh(0.5 * (h @ w.T) / 4.0))
        for h, w in ((hidden, weight), (ref_hidden, ref_weight))
    )
    expected = torch.distributions.kl_divergence(ref, policy)
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=1e-13)
    kl.sum().backward()
    assert ref_hidden.grad is None and ref_weight.grad is None
    for ours, theirs in zip(
        (hidden.grad, weight.grad), torch.autograd.grad(expected.sum(), leaves[:2]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    same = reference.linear_kl(hidden, weight, hidden, weight)
    assert same.abs().max() < 1e-14


@pytest.mark.parametrize("cap", [None, 2.0])
def test_geometry_is_that_of_the_weight_gradients(head, cap):
    hidden, weight, labels, _ = head
    labels[4] = -100
    cu = torch.tensor([0, 2, 2, 5, 7])  # chosen_1 is empty; rejected_0 holds an ignored token
    weight.requires_grad_()
    logps = reference.linear_logps(hidden, weight, labels, logit_scale=1.5, softcap=cap)
    bounds = list(pairwise(cu.tolist()))
    scores = [
        torch.autograd.grad(logps[a:b].sum(), weight, retain_graph=True)[0] for a, b in bounds
    ]
    norms = [float(s.norm()) for s in scores]

    pairs = reference.score_geometry(
        hidden, weight, labels, cu, per_pair=True, logit_scale=1.5, softcap=cap
    )
    assert pairs.chosen_norm.tolist() == pytest.approx(norms[:2], rel=1e-12)
    assert pairs.rejected_norm.tolist() == pytest.approx(norms[2:], rel=1e-12)
    cosine = float((scores[0] * scores[2]).sum()) / (norms[0] * norms[2])
    assert pairs.cosine.tolist() == pytest.approx([cosine, 0.0], rel=1e-11)

    batch = reference.score_geometry(hidden, weight, labels, cu, logit_scale=1.5, softcap=cap)
    chosen, rejected = (scores[0] + scores[1]) / 2, (scores[2] + scores[3]) / 2
    assert float(batch.chosen_norm) == pytest.approx(float(chosen.norm()), rel=1e-12)
    assert float(batch.rejected_norm) == pytest.approx(float(rejected.norm()), rel=1e-12)
    cosine = float((chosen * rejected).sum() / (chosen.norm() * rejected.norm()))
    assert float(batch.cosine) == pytest.approx(cosine, rel=1e-11)
    assert batch.cosine.shape == batch.chosen_norm.shape == ()


@pytest.mark.parametrize(
    "cu",
    [
        [0, 0, 2, 7],  # an empty segment first
        [0, 3, 3, 3, 7],  # two in the middle
        [0, 4, 7, 7],  # one at the end
        [0, 7],
        [0, 0],  # nothing but an empty one: no value counts
        [2, 5],  # values before and after the segments
        [0],  # no segment at all
    ],
)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_segment_sum(cu, index_dtype):
    torch.manual_seed(1)
    values = torch.randn(T, dtype=torch.float64, requires_grad=True)
    sums = reference.segment_sum(values, torch.tensor(cu, dtype=index_dtype))
    bounds = list(pairwise(cu))
    expected = [math.fsum(values.detach()[a:b].tolist()) for a, b in bounds]
    assert sums.shape == (len(cu) - 1,)
    assert sums.tolist() == pytest.approx(expected, abs=1e-14)
    upstream = torch.arange(1.0, len(cu), dtype=torch.float64)
    (grad,) = torch.autograd.grad(sums, values, upstream)
    by_hand = torch.zeros(T, dtype=torch.float64)
    for (a, b), u in zip(bounds, upstream, strict=True):
        by_hand[a:b] = u
    assert torch.equal(grad, by_hand)


def test_segment_sum_of_nothing():
    sums = reference.segment_sum(torch.empty(0), torch.tensor([0, 0, 0]))
    assert sums.tolist() == [0.0, 0.0]


def test_segment_sum_of_a_long_response_is_rounded_once():
    # 4096 tokens of about -3 nats: summed one by one in fp32 the error is some 50 units in the
    # last place; the result must be the correctly rounded sum.
    torch.manual_seed(2)
    values = -3 * torch.rand(4096)
    exact = torch.tensor(math.fsum(values.tolist()))
    assert torch.equal(reference.segment_sum(values, torch.tensor([0, 4096]))[0], exact)


def test_segment_sum_never_reads_past_the_values():
    values = torch.ones(9)[:4]
    assert reference.segment_sum(values, torch.tensor([0, 2, 9])).tolist() == [2.0, 2.0]
