"""The C++ row passes: accuracy, extreme logits, agreement of the modes, and a missing library.

The size of a row decides which code runs: vectors are 16 wide and come in pairs, sums restart every
2048 columns.
Errors are compared over some hundred gradients or more, so that no single rounding decides.
"""

import math
import shutil
import sys
import warnings

import pytest
import torch

from fastpref import ops
from fastpref.ops import chunked, cpu, dispatch

UNAVAILABLE = cpu.unavailable_reason("cpu")
built = pytest.mark.skipif(bool(UNAVAILABLE), reason=UNAVAILABLE)

# Less than a vector; a vector and a bit; whole pairs; several sums; several sums and a remainder.
VOCABULARIES = [1, 7, 17, 64, 1000, 4096, 32001]
TRAIN = ["h", "hw", "hwb"]


def problem(T, D, V, *, scale=1.0, offset=0.0, bias=True):
    g = torch.Generator().manual_seed(T * 10007 + D * 101 + V)
    hidden = torch.randn(T, D, generator=g) * scale
    weight = torch.randn(V, D, generator=g) * D**-0.5
    labels = torch.randint(V, (T,), generator=g)
    labels[1::4] = -100
    bias = torch.randn(V, generator=g) + offset if bias else None
    return hidden, weight, bias, labels, torch.randn(T, generator=g)


def run(inputs, impl, train, dtype=torch.float32, **options):
    """Log-probs and {name: gradient} of hidden (h), weight (w) and bias (b) as named."""
    *arguments, labels, upstream = inputs
    leaves = {
        name: x.detach().to(dtype).requires_grad_(name in train)
        for name, x in zip("hwb", arguments, strict=True)
        if x is not None
    }
    logps = ops.linear_logps(
        leaves["h"], leaves["w"], labels, bias=leaves.get("b"), impl=impl, **options
    )
    if any(x.requires_grad for x in leaves.values()):
        logps.backward(upstream.to(dtype))
    return logps.detach(), {n: x.grad for n, x in leaves.items() if x.grad is not None}


def stats(inputs, impl, dtype=torch.float32, **options):
    hidden, weight, bias, labels, _ = inputs
    bias = None if bias is None else bias.to(dtype)
    return ops.token_stats(
        hidden.to(dtype), weight.to(dtype), labels, bias=bias, impl=impl, **options
    )


def rms(x):
    return float(x.double().square().mean().sqrt())


def assert_as_good_as_torch(ours, exact, *rivals, name=""):
    """err(ours) <= 2 err(fp32 PyTorch) + eps |exact|, all finite."""
    assert torch.isfinite(ours).all()
    eps = torch.finfo(torch.float32).eps
    bound = 2 * max(rms(theirs - exact) for theirs in rivals) + eps * rms(exact)
    assert rms(ours - exact) <= bound, name


def assert_accurate(inputs, train, **options):
    """Compare with PyTorch on whole logits and on chunks: its GEMMs may round in another order."""
    ours, grads = run(inputs, "cpu", train, **options)
    exact, exact_grads = run(inputs, "reference", train, torch.float64, **options)
    whole, whole_grads = run(inputs, "reference", train, **options)
    pieces, pieces_grads = run(inputs, "chunked", train, **options)
    assert_as_good_as_torch(ours, exact, whole, pieces)
    assert grads.keys() == exact_grads.keys()
    for name, grad in grads.items():
        rivals = whole_grads[name], pieces_grads[name]
        assert_as_good_as_torch(grad, exact_grads[name], *rivals, name=name)


@pytest.fixture(params=["cached", "recomputed"])
def cache_mode(request, monkeypatch):
    """Run a test with cached and with recomputed dlogits of a trained head."""
    monkeypatch.setattr(cpu, "CACHE_BYTES", 2**30 if request.param == "cached" else 0)
    return request.param


def test_the_library_is_there_if_a_compiler_is():
    if cpu.LIBRARY.exists():
        assert cpu.unavailable_reason("cpu") == ""
    elif sys.platform == "linux" and shutil.which("g++"):
        pytest.fail("there is a C++ compiler but no library; run pip install -e . again")
    else:
        pytest.skip("no C++ compiler on this platform")


@built
def test_exp_is_good_to_2_ulp():
    # All of its range: from the smallest normal result to the largest finite one.
    x = torch.cat([torch.linspace(-87, 88, 400_001), torch.linspace(-1, 1, 100_001)])
    z = x[None].clone()
    cpu._dlogits(z, torch.tensor([-1]), torch.zeros(1), torch.tensor([-1.0]))  # no label: exp(z)
    exact = x.double().exp()
    ulp = torch.exp2(exact.log2().floor() - 23)
    assert ((z[0] - exact).abs() / ulp).max() <= 2
    tail = torch.tensor([[-math.inf, -1e30, -200.0, -87.5, 0.0, math.nan]])
    cpu._dlogits(tail, torch.tensor([-1]), torch.zeros(1), torch.tensor([-1.0]))
    assert tail[0, :5].tolist() == [0.0, 0.0, 0.0, 0.0, 1.0] and tail[0, 5].isnan()


@built
@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("T", [1, 33])
@pytest.mark.parametrize("train", TRAIN)
def test_values_and_gradients(cache_mode, T, V, train):
    assert_accurate(problem(T, 24, V), train)


@built
@pytest.mark.parametrize("V", VOCABULARIES)
def test_statistics(V):
    inputs = problem(33, 24, V)
    ours, theirs = stats(inputs, "cpu"), stats(inputs, "reference")
    exact = stats(inputs, "reference", torch.float64)
    for name in ("logps", "lse", "entropy"):
        assert_as_good_as_torch(*(getattr(s, name) for s in (ours, exact, theirs)), name=name)
    assert torch.equal(ours.top1, exact.top1)


@built
@pytest.mark.parametrize("train", TRAIN)
@pytest.mark.parametrize("options", [{"logit_scale": -0.7}, {"logit_scale": 0.5, "softcap": 8.0}])
def test_scale_and_softcap(cache_mode, train, options):
    assert_accurate(problem(33, 24, 1000, scale=3.0), train, **options)


@built
@pytest.mark.parametrize("train", TRAIN)
@pytest.mark.parametrize("offset", [-60.0, 60.0])
def test_offset_logits(cache_mode, train, offset):
    assert_accurate(problem(33, 24, 1000, offset=offset), train)


@built
@pytest.mark.parametrize("train", TRAIN)
@pytest.mark.parametrize("scale", [40.0, -40.0])
def test_peaked_logits(cache_mode, train, scale):
    # Hidden states along (or against) their label's row: probabilities of 1, of 1e-40, and of 0.
    _, weight, bias, labels, upstream = problem(33, 24, 1000)
    inputs = scale * weight[labels.clamp(min=0)], weight, bias, labels, upstream
    assert run(inputs, "reference", "")[0].min() < -60 or scale > 0
    assert_accurate(inputs, train)
    ours, exact = stats(inputs, "cpu"), stats(inputs, "reference", torch.float64)
    torch.testing.assert_close(ours.entropy.double(), exact.entropy, rtol=1e-4, atol=1e-6)


@built
@pytest.mark.parametrize("column", [0, 6, 16, 999])  # the label's, vectors', and the remainder's
def test_nan_reaches_its_rows_results_and_no_other(cache_mode, column):
    hidden, weight, bias, labels, upstream = problem(9, 5, 1000)
    labels[0] = 0
    inputs = hidden, weight, bias, labels, upstream
    logits = hidden @ weight.T + bias
    clean = logits.clone()
    logits[0, column] = math.nan
    for scale in (None, 1.0):
        z = logits.clone()
        rows = cpu._ROWS.score(z, labels.clamp(min=0), True, scale)
        expected = cpu._ROWS.score(clean.clone(), labels.clamp(min=0), True, scale)
        for name in ("logps", "lse", "entropy"):
            assert getattr(rows, name)[0].isnan()
            assert torch.equal(getattr(rows, name)[1:], getattr(expected, name)[1:])
        assert not rows.top1[0]
        assert scale is None or (z[0].isnan().all() and z[1:].isfinite().all())
    hidden = hidden.clone()
    hidden[0, 0] = math.nan
    logps, grads = run((hidden, *inputs[1:]), "cpu", "h")
    assert logps[0].isnan() and logps[1:].isfinite().all()
    assert grads["h"][0].isnan().all() and grads["h"][1:].isfinite().all()


@built
@pytest.mark.parametrize("train", TRAIN)
def test_a_forbidden_token_has_probability_zero(cache_mode, train):
    hidden, weight, bias, labels, upstream = problem(33, 24, 1000)
    labels.clamp_(max=998)
    bias[999] = -math.inf
    inputs = hidden, weight, bias, labels, upstream
    assert_accurate(inputs, train)
    ours, exact = stats(inputs, "cpu"), stats(inputs, "reference", torch.float64)
    torch.testing.assert_close(ours.entropy.double(), exact.entropy, rtol=1e-5, atol=0)
    if "b" in train:
        assert run(inputs, "cpu", train)[1]["b"][999] == 0


@built
def test_an_infinite_logit_and_a_row_without_finite_logits_are_nan():
    z = torch.zeros(2, 40)
    z[0, 3] = math.inf
    z[1] = -math.inf
    assert cpu._ROWS.score(z, torch.tensor([0, 0]), False, None).logps.isnan().all()


@built
@pytest.mark.parametrize("rows", [1, 4, 13])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.5, "softcap": 8.0}])
def test_log_probs_do_not_depend_on_who_needs_a_gradient(monkeypatch, cache_mode, rows, options):
    V = 2100  # more than one sum
    monkeypatch.setattr(chunked, "CHUNK_BYTES", rows * V * 4)
    inputs = problem(13, 16, V)
    plain, _ = run(inputs, "cpu", "", **options)
    for train in ("h", "w", "b", "hwb"):
        assert torch.equal(run(inputs, "cpu", train, **options)[0], plain)
    assert torch.equal(stats(inputs, "cpu", **options).logps, plain)
    with torch.inference_mode():
        assert torch.equal(run(inputs, "cpu", "", **options)[0], plain)


@built
@pytest.mark.parametrize("train", TRAIN)
def test_two_runs_agree_bit_for_bit_whatever_the_threads(cache_mode, train):
    inputs = problem(9, 5, 4097)
    logps, grads = run(inputs, "cpu", train)
    again, grads_again = run(inputs, "cpu", train)
    assert torch.equal(logps, again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in train)
    threads = torch.get_num_threads()
    z = torch.randn(9, 4097)
    expected = z.clone()
    cpu._ROWS.score(expected, torch.arange(9), True, 1.0)
    try:
        torch.set_num_threads(3)
        cpu._ROWS.score(z, torch.arange(9), True, 1.0)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(z, expected)


@built
def test_cached_dlogits_survive_a_backward_pass(cache_mode):
    hidden, weight, bias, labels, upstream = problem(9, 5, 100)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    logps = ops.linear_logps(hidden, weight, labels, bias=bias, impl="cpu")
    first, second = (
        torch.autograd.grad(logps, leaves, upstream, retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@built
def test_dlogits_are_cached_only_where_they_fit(monkeypatch):
    inputs = problem(8, 5, 100)  # 3200 bytes of dlogits

    def caches(cache, chunk):
        monkeypatch.setattr(cpu, "CACHE_BYTES", cache)
        monkeypatch.setattr(chunked, "CHUNK_BYTES", chunk)
        return cpu.BACKEND.new_dlogits_cache(*inputs[:2]) is not None

    assert caches(3200, 2**20) and caches(3200, 800)
    assert not caches(3199, 2**20) and not caches(3200, 799)
    with cpu.calls_alive(3):
        assert caches(9600, 2**20) and not caches(9599, 2**20)


@built
def test_a_label_outside_the_vocabulary_is_refused():
    hidden, weight, _, labels, _ = problem(5, 4, 11)
    for out_of_range in (11, -1, 2**40):
        labels[2] = out_of_range
        with pytest.raises(ValueError, match=r"labels: expected -100 or an index below 11.*1 of"):
            ops.linear_logps(hidden, weight, labels, impl="cpu")


@built
def test_it_is_the_default_for_fp32_and_refuses_other_dtypes(monkeypatch):
    calls = []
    real = cpu._ROWS.score
    rows = cpu._ROWS._replace(score=lambda *a: calls.append(1) or real(*a))
    monkeypatch.setattr(cpu, "BACKEND", chunked.Chunked(rows))
    hidden, weight, _, labels, _ = problem(5, 4, 11)
    ops.linear_logps(hidden, weight, labels)
    once = len(calls)
    assert once > 0
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        ops.linear_logps(hidden.to(dtype), weight.to(dtype), labels)
        with pytest.raises(ValueError, match=rf"impl: 'cpu' takes torch.float32, got {dtype}"):
            ops.linear_logps(hidden.to(dtype), weight.to(dtype), labels, impl="cpu")
    assert len(calls) == once


def test_without_the_library_auto_works_and_a_named_cpu_says_what_to_do(monkeypatch, tmp_path):
    hidden, weight, _, labels, _ = problem(5, 4, 11)
    expected = ops.linear_logps(hidden, weight, labels, impl="chunked")
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "_rows.so")
    cpu.unavailable_reason.cache_clear()
    dispatch._warn_once.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"impl: 'auto' takes 'chunked' on cpu: 'cpu' was not"):
            assert torch.equal(ops.linear_logps(hidden, weight, labels), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.linear_logps(hidden, weight, labels)  # said once
            ops.linear_logps(hidden.double(), weight.double(), labels)  # `cpu` takes fp32 alone
        with pytest.raises(ValueError, match=r"impl: 'cpu' was not built.*C\+\+ compiler"):
            ops.linear_logps(hidden, weight, labels, impl="cpu")
        with pytest.raises(ValueError, match=r"one of .*'chunked', 'reference'"):
            ops.linear_logps(hidden, weight, labels, impl="fast")
    finally:
        cpu.unavailable_reason.cache_clear()
