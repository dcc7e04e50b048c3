"""Log-probs and statistics in chunks against the specification.

Sizes are odd and small; a test that needs several chunks shrinks the byte budget instead of growing
the tensors.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastpref import ops
from fastpref.ops import chunked
from tests.helpers.dispatch import Inside

linear_logps = partial(ops.linear_logps, impl="chunked")

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    ),
]

# T, D, V and rows a chunk; the id names the purpose.
SIZES = [
    pytest.param(7, 5, 11, 3, id="chunks-of-3-3-1"),
    pytest.param(33, 16, 101, 7, id="prime-vocabulary"),
    pytest.param(33, 16, 101, 33, id="one-chunk"),
    pytest.param(40, 3, 17, 17, id="chunk-longer-than-its-slices"),
    pytest.param(1, 5, 11, 1, id="one-token"),
    pytest.param(5, 1, 11, 2, id="one-hidden-unit"),
    pytest.param(5, 4, 1, 2, id="one-entry-vocabulary"),
    pytest.param(0, 4, 11, 2, id="no-token"),
    pytest.param(5, 4, 11, 0, id="budget-below-one-row"),
]
HEADS = [
    pytest.param({}, id="plain"),
    pytest.param({"logit_scale": 0.3}, id="scale"),
    pytest.param({"softcap": 2.0}, id="softcap"),
    pytest.param({"logit_scale": -1.7, "softcap": 3.0}, id="scale-softcap"),
]


class Problem:
    """Seeded inputs, and an uneven upstream gradient."""

    def __init__(self, T, D, V, *, dtype=torch.float64, bias=True, ignore=True, device="cpu"):
        g = torch.Generator().manual_seed(T * 10007 + D * 101 + V)
        self.hidden = torch.randn(T, D, generator=g, dtype=torch.float64).to(device, dtype)
        self.weight = torch.randn(V, D, generator=g, dtype=torch.float64).to(device, dtype)
        self.bias = (
            torch.randn(V, generator=g, dtype=torch.float64).to(device, dtype) if bias else None
        )
        self.labels = torch.randint(V, (T,), generator=g).to(device)
        if ignore:
            self.labels[1::4] = -100
        self.upstream = torch.randn(T, generator=g, dtype=torch.float64).to(device)

    def to(self, dtype):
        other = object.__new__(Problem)
        other.__dict__ = dict(self.__dict__)
        other.hidden, other.weight = self.hidden.to(dtype), self.weight.to(dtype)
        other.bias = None if self.bias is None else self.bias.to(dtype)
        return other

    def run(self, impl="chunked", train="hwb", **options):
        """Log-probs and {name: gradient} of hidden (h), weight (w) and bias (b) as named."""
        leaves = {
            name: x.detach().requires_grad_(name in train)
            for name, x in (("h", self.hidden), ("w", self.weight), ("b", self.bias))
            if x is not None
        }
        logps = ops.linear_logps(
            leaves["h"], leaves["w"], self.labels, bias=leaves.get("b"), impl=impl, **options
        )
        if any(x.requires_grad for x in leaves.values()):
            logps.backward(self.upstream.to(logps.dtype))
        return logps.detach(), {n: x.grad for n, x in leaves.items() if x.grad is not None}

    def stats(self, impl="chunked", **options):
        return ops.token_stats(
            self.hidden, self.weight, self.labels, bias=self.bias, impl=impl, **options
        )


def set_rows(monkeypatch, rows, vocabulary, dtype=torch.float64):
    """Set the budget to `rows` rows; panels of the backward pass then hold rows * V / T columns."""
    size = 8 if dtype == torch.float64 else 4
    monkeypatch.setattr(chunked, "CHUNK_BYTES", rows * vocabulary * size)


def assert_same(ours, theirs):
    """Equal to fp64 rounding: sums of at most some hundred terms of order one to ten."""
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def assert_run_matches(problem, train, **options):
    logps, grads = problem.run(train=train, **options)
    expected, expected_grads = problem.run("reference", train=train, **options)
    assert_same(logps, expected)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert_same(grad, expected_grads[name])


@pytest.mark.parametrize(("T", "D", "V", "rows"), SIZES)
@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("train", ["", "h", "w", "b", "hwb"])
def test_values_and_gradients(monkeypatch, T, D, V, rows, options, train):
    set_rows(monkeypatch, rows, V)
    assert_run_matches(Problem(T, D, V), train, **options)


@pytest.mark.parametrize(("T", "D", "V", "rows"), SIZES)
@pytest.mark.parametrize("options", HEADS)
def test_statistics(monkeypatch, T, D, V, rows, options):
    set_rows(monkeypatch, rows, V)
    problem = Problem(T, D, V)
    ours, theirs = problem.stats(**options), problem.stats("reference", **options)
    for name in ("logps", "lse", "entropy"):
        assert_same(getattr(ours, name), getattr(theirs, name))
    assert torch.equal(ours.top1, theirs.top1)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 20),
    D=st.integers(1, 6),
    V=st.integers(1, 40),
    budget=st.integers(1, 8000),  # from less than a row to all of them (20 * 40 * 8 bytes)
    bias=st.booleans(),
    train=st.sampled_from(["h", "w", "hw"]),
)
def test_any_size_under_any_budget(T, D, V, budget, bias, train):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(chunked, "CHUNK_BYTES", budget)
        assert_run_matches(Problem(T, D, V, bias=bias), train, softcap=4.0)


@pytest.mark.parametrize("train", ["h", "hwb"])
@pytest.mark.parametrize("offset", [-60.0, 60.0])
def test_offset_logits(train, offset):
    problem = Problem(9, 5, 23)
    problem.bias = problem.bias + offset
    assert_run_matches(problem, train)


@pytest.mark.parametrize("train", ["h", "hwb"])
@pytest.mark.parametrize("sign", [1, -1])
def test_peaked_logits(train, sign):
    # Each hidden state points at its label's row (or away from it) with logits of some 200 nats:
    # probabilities of 1, of 1e-90, and an exp that would overflow without its maximum removed.
    problem = Problem(9, 5, 23)
    rows = problem.weight[problem.labels.clamp(min=0)]
    problem.hidden = sign * 40.0 * rows
    assert problem.run("reference", train="")[0].abs().max() > 50 or sign == 1
    assert_run_matches(problem, train)


@pytest.mark.parametrize("train", ["h", "hwb"])
def test_arbitrary_strides(monkeypatch, train):
    set_rows(monkeypatch, 3, 22)
    problem = Problem(7, 5, 22)
    twice = torch.stack([problem.hidden, problem.hidden + 1], 2)
    problem.hidden = twice[:, :, 0]  # strides (2 D, 2)
    problem.weight = problem.weight.T.contiguous().T  # column-major
    problem.bias = problem.bias.repeat_interleave(2)[::2]
    problem.labels = problem.labels.repeat_interleave(3)[::3]
    assert not any(x.is_contiguous() for x in (problem.hidden, problem.weight, problem.labels))
    assert_run_matches(problem, train)


def test_an_expanded_upstream_gradient(monkeypatch):
    set_rows(monkeypatch, 3, 11)
    problem = Problem(7, 5, 11)
    problem.upstream = torch.ones((), dtype=torch.float64).expand(7)
    assert_run_matches(problem, "h")
    assert_run_matches(problem, "hwb")


def test_int32_labels():
    problem = Problem(7, 5, 11)
    expected = problem.run()
    problem.labels = problem.labels.int()
    logps, grads = problem.run()
    assert torch.equal(logps, expected[0])
    assert all(torch.equal(grads[n], expected[1][n]) for n in "hwb")


@pytest.mark.parametrize("train", ["h", "hwb"])
def test_ignored_tokens_count_nowhere_even_when_they_hold_nan(monkeypatch, train):
    set_rows(monkeypatch, 2, 11)
    problem = Problem(9, 5, 11)
    dropped = problem.labels == -100
    logps, grads = problem.run(train=train)
    problem.hidden = problem.hidden.masked_fill(dropped[:, None], math.nan)
    problem.upstream = problem.upstream.masked_fill(dropped, math.nan)
    with_nan, grads_with_nan = problem.run(train=train)
    assert dropped.any() and torch.equal(with_nan, logps)
    assert with_nan[dropped].abs().sum() == 0 and grads_with_nan["h"][dropped].abs().sum() == 0
    for name, grad in grads.items():
        assert torch.equal(grads_with_nan[name], grad)
    for values in problem.stats():
        assert not values[dropped].any() and not values.isnan().any()


def test_nothing_but_ignored_tokens():
    problem = Problem(4, 5, 11)
    problem.labels.fill_(-100)
    logps, grads = problem.run()
    assert logps.tolist() == [0.0] * 4
    assert all(grad.abs().sum() == 0 for grad in grads.values())


def test_a_forbidden_token_has_probability_zero():
    # -inf in the bias takes an entry out of the vocabulary; nothing else may turn into NaN.
    problem = Problem(7, 5, 11, ignore=False)
    problem.labels.clamp_(max=9)
    problem.bias[10] = -math.inf
    for train in ("h", "hw"):
        logps, grads = problem.run(train=train)
        expected, expected_grads = problem.run("reference", train=train)
        assert_same(logps, expected)
        for name, grad in grads.items():
            assert_same(grad, expected_grads[name])
    assert_same(problem.stats().entropy, problem.stats("reference").entropy)


@pytest.mark.parametrize("train", ["h", "hwb"])
def test_finite_differences(monkeypatch, train):
    set_rows(monkeypatch, 2, 6)  # three chunks, and three panels in the backward pass
    problem = Problem(5, 3, 6)
    leaves = [
        x.requires_grad_(name in train)
        for name, x in (("h", problem.hidden), ("w", problem.weight), ("b", problem.bias))
    ]
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logps(h, w, problem.labels, bias=b, logit_scale=0.7, softcap=3.0),
        leaves,
    )


@pytest.mark.parametrize("train", ["h", "hwb"])
def test_backward_can_be_repeated_on_a_retained_graph(train):
    problem = Problem(5, 3, 6)
    leaves = [problem.hidden.requires_grad_()]
    if "w" in train:
        leaves.append(problem.weight.requires_grad_())
    logps = linear_logps(problem.hidden, problem.weight, problem.labels)
    first, second = (
        torch.autograd.grad(logps, leaves, problem.upstream, retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 13])
@pytest.mark.parametrize("options", [HEADS[0], HEADS[-1]])
def test_log_probs_do_not_depend_on_who_needs_a_gradient(monkeypatch, device, dtype, rows, options):
    # A DPO reward at step 0 is policy (with gradient) minus reference (without): exactly 0.0.
    set_rows(monkeypatch, rows, 67, dtype)
    problem = Problem(13, 16, 67, dtype=dtype, device=device)
    plain, grads = problem.run(train="", **options)
    assert not grads
    for train in ("h", "w", "b", "hwb"):
        assert torch.equal(problem.run(train=train, **options)[0], plain)
    with torch.no_grad():
        hidden = problem.hidden.detach().requires_grad_()
        off = linear_logps(hidden, problem.weight, problem.labels, bias=problem.bias, **options)
    with torch.inference_mode():
        inference = linear_logps(
            problem.hidden, problem.weight, problem.labels, bias=problem.bias, **options
        )
    assert torch.equal(off, plain) and torch.equal(inference, plain)
    assert torch.equal(problem.stats(**options).logps, plain)
    offsets = torch.tensor([0, 9, 13], device=device)
    rewards = ops.segment_sum(plain, offsets) - ops.segment_sum(off, offsets)
    assert rewards.tolist() == [0.0, 0.0]


def rms(error: Tensor) -> float:
    return float(error.double().square().mean().sqrt())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("train", ["h", "hwb"])
@pytest.mark.parametrize("sharpness", [0.3, 3.0])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.5, "softcap": 8.0}])
def test_errors_against_torch_in_the_same_dtype(
    monkeypatch, device, dtype, train, sharpness, options
):
    """err(ours) <= 2 err(PyTorch) + eps, both against fp64 on the same rounded inputs.

    For half inputs PyTorch's side is the reference, which widens them to fp32. It is more exact
    than PyTorch on half logits, with which the last assertion compares.
    """
    T, D, V = 41, 24, 211  # several chunks and panels of bf16 in some milliseconds
    set_rows(monkeypatch, 10, V, dtype)
    problem = Problem(T, D, V, dtype=dtype, device=device)
    problem.hidden = problem.hidden * sharpness
    exact, exact_grads = problem.to(torch.float64).run("reference", train, **options)
    ours, our_grads = problem.run(train=train, **options)
    theirs, their_grads = problem.run("reference", train, **options)

    assert ours.dtype == torch.float32
    eps = torch.finfo(torch.float32).eps
    assert rms(ours - exact) <= 2 * rms(theirs - exact) + eps * rms(exact)
    eps = torch.finfo(dtype).eps if dtype == torch.float32 else 0.0
    for name, grad in our_grads.items():
        assert grad.dtype == dtype
        scale = rms(exact_grads[name])
        bound = 2 * rms(their_grads[name] - exact_grads[name]) + eps * scale
        assert rms(grad - exact_grads[name]) <= bound, name
    if dtype != torch.float32 and not options:
        # Logits rounded once, as a half-precision GEMM with fp32 sums rounds them.
        wide = (problem.hidden.float() @ problem.weight.float().T + problem.bias.float()).to(dtype)
        half = wide.log_softmax(1).gather(1, problem.labels.clamp(min=0)[:, None]).squeeze(1)
        half = half.masked_fill(problem.labels == -100, 0.0)
        # Measured: 500 to 20000 times less.
        assert rms(ours - exact) < 0.01 * rms(half - exact)


class PeakMemory(Inside):
    """The most bytes alive at once in storages that operations allocated, without the inputs."""

    def __init__(self, *inputs):
        super().__init__()
        self.inputs = {x.untyped_storage()._cdata for x in inputs}
        self.alive, self.peak = {}, 0

    def seen(self, func, args, out):
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.inputs:
                storage = x.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", ["", "h", "hwb"])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.5, "softcap": 8.0}])
@pytest.mark.parametrize(
    ("T", "D", "V", "budget"),
    [
        # Full fp32 logits are 524 KB, 8 times the budget of 32 rows (so that a slice is 2 rows, not
        # a rounded-up one); the hidden states are next to nothing.
        pytest.param(256, 2, 512, 65536, id="against-logits"),
        # A copy of the weight is 4.8 MB in fp32, 2.4 MB in bf16, a full chunk of logits 48 KB.
        pytest.param(8, 800, 1500, 24000, id="against-weights"),
    ],
)
def test_peak_memory_is_one_chunk(monkeypatch, dtype, train, options, T, D, V, budget):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", budget)
    problem = Problem(T, D, V, dtype=dtype)
    inputs = (problem.hidden, problem.weight, problem.bias, problem.labels, problem.upstream)
    with PeakMemory(*inputs) as memory:
        _, grads = problem.run(train=train, **options)
    required = sum(grad.nbytes for grad in grads.values())
    # The chunk; three slices of it (softcap's slope and its making, a widened piece of the
    # weight); up to six fp32 arrays like `hidden`; vectors over tokens and, for the bias, over V.
    allowed = budget * (1 + 3 / chunked.SLICES) + 6 * 4 * T * D + 100 * T + 12 * V * ("b" in train)
    assert budget * 0.8 <= memory.peak - required <= allowed


def test_a_frozen_head_gets_no_gradient():
    problem = Problem(5, 3, 6)
    weight = torch.nn.Parameter(problem.weight, requires_grad=False)
    hidden = problem.hidden.requires_grad_()
    linear_logps(hidden, weight, problem.labels).sum().backward()
    assert weight.grad is None and hidden.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("train", ["h", "hwb"])
def test_autocast_changes_nothing(dtype, impl, train):
    problem = Problem(7, 5, 11, dtype=dtype)
    logps, grads = problem.run(impl, train)
    stats = problem.stats(impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ops.linear_logps(
            problem.hidden, problem.weight, problem.labels, bias=problem.bias, impl=impl
        )
        stats_inside = problem.stats(impl)
        if impl == "chunked":  # its backward pass must not be lowered either
            again, grads_inside = problem.run(impl, train)
            assert torch.equal(again, logps)
            assert all(torch.equal(grads_inside[n], grad) for n, grad in grads.items())
    assert torch.equal(inside, logps)
    assert all(torch.equal(a, b) for a, b in zip(stats_inside, stats, strict=True))
