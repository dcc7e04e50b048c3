"""Argument checks of the ops, their messages, and the choice of the implementation."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpref_kernels
from fastpref import ops
from fastpref.ops import chunked, dispatch
from tests.helpers.dispatch import Inside

HIDDEN, WEIGHT, LABELS = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.long)


IMPLEMENTATIONS = ["cpu", "chunked", "reference", "triton"]


class NoHostSync(Inside):
    """Raises where a value is read back from a tensor: item, tolist, `if tensor`."""

    def seen(self, func, args, out):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("train", ["h", "hwb"])
def test_no_value_is_read_on_the_host(impl, train):
    if impl == "triton" and not torch.cuda.is_available():
        pytest.skip("the interpreter itself reads values")
    hidden = torch.randn(9, 5, requires_grad=True)
    weight = torch.randn(11, 5, requires_grad="w" in train)
    labels = torch.randint(11, (9,))
    with NoHostSync():
        ops.linear_logps(hidden, weight, labels, softcap=3.0, impl=impl).sum().backward()
        ops.token_stats(hidden, weight, labels, impl=impl)
        ops.linear_kl(hidden, weight, hidden, weight, impl=impl).sum().backward()
        with pytest.raises(AssertionError, match="a value was read"):
            labels[0].item()
    assert hidden.grad is not None


@pytest.mark.parametrize("train", ["h", "hwb"])
def test_fake_and_meta_tensors_have_shapes_alone(train):
    with FakeTensorMode():
        hidden = torch.randn(9, 5, requires_grad=True)
        weight = torch.randn(11, 5, requires_grad="w" in train)
        labels = torch.randint(11, (9,))
        ops.linear_logps(hidden, weight, labels, softcap=3.0).sum().backward()
        ops.linear_kl(hidden, weight, hidden, weight).sum().backward()
        assert ops.token_stats(hidden, weight, labels).top1.dtype == torch.bool
        geometry = ops.score_geometry(hidden, weight, labels, torch.zeros(5).long(), per_pair=True)
        assert geometry.cosine.shape == (2,)
        assert hidden.grad.shape == hidden.shape
    meta = [x.to("meta") for x in (HIDDEN, WEIGHT, LABELS)]
    assert ops.linear_logps(*meta).shape == (4,)


def test_chunked_is_the_default_that_takes_everything(monkeypatch):
    calls = []
    real = chunked.BACKEND
    counted = real.row_pass._replace(score=lambda *a: calls.append(1) or real.row_pass.score(*a))
    monkeypatch.setattr(chunked, "BACKEND", chunked.Chunked(counted))
    args = (HIDDEN.double(), WEIGHT.double(), LABELS)
    ops.linear_logps(*args)
    ops.linear_logps(*args, impl="chunked")
    once = len(calls) // 2
    ops.linear_logps(*args, impl="reference")
    assert len(calls) == 2 * once > 0
    assert ops.implementation(args[0]) == "chunked"
    assert ops.implementation(args[0], impl="reference") == "reference"


def test_a_named_implementation_is_used_or_refused(monkeypatch):
    args = (HIDDEN.double(), WEIGHT.double(), LABELS)
    with pytest.raises(ValueError, match=r"impl: expected 'auto' or one of 'chunked', 'reference'"):
        ops.linear_logps(*args, impl="fast")
    with pytest.raises(ValueError, match=r"impl: 'triton' takes torch.bfloat16.*got torch.float64"):
        ops.linear_kl(*args[:2], *args[:2], impl="triton")
    elsewhere = dispatch.Implementation("there", "no.such.module", frozenset({"cuda"}))
    monkeypatch.setattr(dispatch, "TABLE", (elsewhere, *dispatch.TABLE))
    assert torch.equal(ops.linear_logps(*args), ops.linear_logps(*args, impl="chunked"))


def test_the_kernels_say_what_they_need(monkeypatch):
    """The interpreter is on in these tests; off, and on other devices, the reason is named."""
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    if not torch.cuda.is_available():
        assert "set TRITON_INTERPRET=1" in fastpref_kernels.unavailable_reason("cpu")
        assert "there is none" in fastpref_kernels.unavailable_reason("cuda")
    assert "cannot run on mps" in fastpref_kernels.unavailable_reason("mps")
    monkeypatch.setattr(fastpref_kernels, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="impl: 'triton' needs triton, which is not installed"):
        ops.linear_logps(HIDDEN, WEIGHT, LABELS, impl="triton")


def test_a_sharded_weight_is_refused_by_name():
    class Sharded(torch.Tensor):
        device_mesh = "mesh"

    weight = WEIGHT.as_subclass(Sharded)
    with pytest.raises(ValueError, match=r"weight: got a DTensor.*inside the forward of the FSDP"):
        ops.linear_logps(HIDDEN, weight, LABELS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 2, 3)}, r"hidden: .*\(T, D\).*\(2, 2, 3\)"),
        ({"hidden": torch.zeros(4, 3, dtype=torch.long)}, r"hidden: .*torch.int64"),
        ({"weight": torch.zeros(3, 5)}, r"weight: expected shape \(V, 3\).*\(3, 5\)"),
        ({"weight": torch.zeros(3)}, r"weight: expected shape \(V, 3\).*\(3,\)"),
        ({"weight": torch.zeros(0, 3)}, r"weight: .*V >= 1.*\(0, 3\)"),
        ({"weight": WEIGHT.bfloat16()}, "weight: expected torch.float32 .*torch.bfloat16"),
        ({"weight": WEIGHT.to("meta")}, "weight: expected to be on cpu .*meta"),
        ({"labels": LABELS.float()}, "labels: expected int64 or int32, got torch.float32"),
        ({"labels": LABELS.bool()}, "labels: expected int64 or int32, got torch.bool"),
        ({"labels": LABELS[:3]}, r"labels: expected shape \(4,\).*\(3,\)"),
        ({"labels": LABELS[:, None]}, r"labels: expected shape \(4,\).*\(4, 1\)"),
        ({"labels": LABELS.to("meta")}, "labels: expected to be on cpu .*meta"),
        ({"bias": torch.zeros(3)}, r"bias: expected shape \(5,\).*\(3,\)"),
        ({"bias": torch.zeros(5).double()}, "bias: expected torch.float32 .*torch.float64"),
        ({"bias": torch.zeros(5, device="meta")}, "bias: expected to be on cpu .*meta"),
        ({"logit_scale": 0.0}, "logit_scale: expected a finite number other than 0, got 0.0"),
        ({"logit_scale": math.inf}, "logit_scale: .*got inf"),
        ({"logit_scale": torch.ones(())}, r"logit_scale: .*got tensor\(1.\)"),
        ({"softcap": 0.0}, "softcap: expected a finite number above 0, got 0.0"),
        ({"softcap": -30.0}, "softcap: .*got -30.0"),
        ({"softcap": math.nan}, "softcap: .*got nan"),
    ],
)
@pytest.mark.parametrize("op", [ops.linear_logps, ops.token_stats])
def test_bad_arguments_are_named(op, change, message):
    with pytest.raises(ValueError, match=message):
        op(**({"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_hidden": torch.zeros(3, 2)}, "ref_hidden: expected 4 rows.*got 3"),
        ({"ref_weight": torch.zeros(6, 2)}, "ref_weight: .*5 rows, got 6"),
        ({"ref_weight": torch.zeros(5, 4)}, r"ref_weight: expected shape \(V, 2\).*ref_hidden"),
        ({"ref_hidden": torch.zeros(4)}, r"ref_hidden: expected a \(T, D\)"),
        ({"impl": "fast"}, "impl: expected 'auto' or one of 'cpu', .*'chunked', 'reference'"),
    ],
)
def test_bad_arguments_of_kl_are_named(change, message):
    good = {"ref_hidden": torch.zeros(4, 2), "ref_weight": torch.zeros(5, 2)}
    ops.linear_kl(HIDDEN, WEIGHT, **good)
    with pytest.raises(ValueError, match=message):
        ops.linear_kl(HIDDEN, WEIGHT, **(good | change))


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.zeros(4, dtype=torch.long), r"cu_seqlens: expected 2 B \+ 1 offsets.*got 4"),
        (torch.zeros(1, dtype=torch.long), r"cu_seqlens: expected 2 B \+ 1 offsets.*got 1"),
        (torch.zeros(3), "cu_seqlens: expected an int32 or int64 vector"),
    ],
)
def test_bad_arguments_of_geometry_are_named(cu_seqlens, message):
    ops.score_geometry(HIDDEN, WEIGHT, LABELS, torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match=message):
        ops.score_geometry(HIDDEN, WEIGHT, LABELS, cu_seqlens)


@pytest.mark.parametrize(
    ("values", "cu_seqlens", "message"),
    [
        (torch.zeros(2, 2), torch.tensor([0, 2]), r"values: .*\(2, 2\)"),
        (torch.zeros(2).long(), torch.tensor([0, 2]), "values: .*torch.int64"),
        (torch.zeros(2), torch.tensor([0.0, 2.0]), "cu_seqlens: .*torch.float32"),
        (torch.zeros(2), torch.tensor([[0, 2]]), r"cu_seqlens: .*\(1, 2\)"),
        (torch.zeros(2), torch.zeros(0).long(), r"cu_seqlens: .*\(0,\)"),
        (torch.zeros(2), torch.tensor([0, 2], device="meta"), "cu_seqlens: .*meta"),
    ],
)
def test_bad_arguments_of_segment_sum_are_named(values, cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        ops.segment_sum(values, cu_seqlens)
