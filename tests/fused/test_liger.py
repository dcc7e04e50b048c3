"""The stand-ins for liger-kernel's losses against liger-kernel: loss, aux and gradients.

In fp32 both sum the same terms in another order: up to 64 log-probs of a sequence, each from up to
256 logits, have a relative error of about 1e-6, and 1e-5 of the largest entry leaves room for ten
such. discopop has 1e-4: it divides the margin, of sums of 100 nats, by tau = 0.05, so that liger's
own gradient is 5e-5 away from fp64 (ours 5e-6). `compiled=False` because liger would otherwise
spend minutes in a C++ compiler.
"""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

from fastpref import fused

liger = pytest.importorskip("liger_kernel.chunked_loss")

# (pairs, positions, width, vocabulary): one token, odd everything, more than one chunk of 2 pairs.
SHAPES = [(1, 1, 3, 7), (3, 7, 17, 101), (5, 16, 8, 256)]
DPO_TYPES = ["sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
             "apo_zero", "apo_down", "discopop"]  # fmt: skip
AUX = ["chosen_logps", "rejected_logps", "chosen_logits", "rejected_logits", "nll_loss",
       "chosen_rewards", "rejected_rewards", "log_odds_ratio", "log_odds_chosen"]  # fmt: skip


def pair_of(name, **options):
    """Our loss and liger's, made with the same arguments."""
    theirs = getattr(liger, f"LigerFusedLinear{name}Loss")
    return getattr(fused, f"FusedLinear{name}Loss")(**options), theirs(
        **{"compiled": False, **options}
    )


def inputs(shape, bias=True, ignore_index=-100, dtype=torch.float32, seed=0):
    """Hidden states, head and targets; a third is ignored, but no sequence as a whole."""
    pairs, length, width, vocabulary = shape
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g).to(dtype)

    target = torch.randint(vocabulary, (2 * pairs, length), generator=g)
    ignored = torch.rand(target.shape, generator=g) < 1 / 3
    ignored[:, -1] = False
    return {
        "lin_weight": normal(vocabulary, width),
        "_input": normal(2 * pairs, length, width),
        "target": target.masked_fill(ignored, ignore_index),
        "bias": normal(vocabulary) if bias else None,
    }


def reference_of(tensors, bias=True):
    made = {name: tensors[name] for name in ("_input", "lin_weight", "bias")}
    g = torch.Generator().manual_seed(9)
    moved = {
        name: None if x is None else (x + 0.1 * torch.randn(x.shape, generator=g)).to(x.dtype)
        for name, x in made.items()
    }
    return {
        "ref_input": moved["_input"],
        "ref_weight": moved["lin_weight"],
        "ref_bias": moved["bias"] if bias else None,
    }


def run(loss, tensors, upstream=1.0):
    """Loss, aux and the gradients of hidden, weight and bias."""
    leaves = {
        name: tensors[name].detach().clone().requires_grad_()
        for name in ("_input", "lin_weight", "bias")
        if tensors[name] is not None
    }
    value, aux = loss(**{**tensors, **leaves})
    (upstream * value).backward()
    return value.detach(), aux, {name: leaf.grad for name, leaf in leaves.items()}


def assert_same(ours, theirs, relative):
    (loss, aux, grads), (their_loss, their_aux, their_grads) = ours, theirs
    torch.testing.assert_close(loss, their_loss, rtol=relative, atol=relative)
    assert len(aux) == len(their_aux)
    for i, (mine, other) in enumerate(zip(aux, their_aux, strict=True)):
        assert mine.shape == other.shape and mine.dtype == other.dtype, AUX[i]
        assert not mine.requires_grad
        close(mine, other, relative)
    assert grads.keys() == their_grads.keys()
    for name, grad in grads.items():
        assert grad.dtype == their_grads[name].dtype
        close(grad, their_grads[name], relative)


def close(mine, other, relative):
    scale = max(1.0, other.float().abs().max().item()) if other.dim() < 2 else other.abs().max()
    torch.testing.assert_close(mine, other, rtol=0, atol=relative * float(scale))


def check(name, tensors, upstream=1.0, relative=1e-5, **options):
    ours, theirs = pair_of(name, **options)
    relative = 1e-4 if options.get("loss_type") == "discopop" else relative
    assert_same(run(ours, tensors, upstream), run(theirs, tensors, upstream), relative)


@pytest.mark.parametrize("name", ["DPO", "SimPO", "CPO", "ORPO", "KTO"])
def test_arguments_and_defaults_are_those_of_liger(name):
    ours, theirs = (
        getattr(fused, f"FusedLinear{name}Loss"),
        getattr(liger, f"LigerFusedLinear{name}Loss"),
    )
    for method in ("__init__", "forward"):
        mine, other = (inspect.signature(getattr(x, method)).parameters for x in (ours, theirs))
        assert [(p.name, p.default, p.kind) for p in mine.values()] == [
            (p.name, p.default, p.kind) for p in other.values()
        ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss_type", DPO_TYPES)
@pytest.mark.parametrize("with_reference", [True, False])
def test_dpo(shape, loss_type, with_reference):
    smoothing = {"exo_pair": 1e-3, "robust": 0.1}.get(loss_type, 0.0)
    tensors = inputs(shape)
    if with_reference:
        tensors |= reference_of(tensors)
    check("DPO", tensors, beta=0.2, loss_type=loss_type, label_smoothing=smoothing,
          use_ref_model=with_reference)  # fmt: skip


@pytest.mark.parametrize("ref_bias", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("nll", [True, False])
def test_dpo_options(ref_bias, average, nll):
    tensors = inputs((3, 7, 17, 101))
    check("DPO", tensors | reference_of(tensors, ref_bias), beta=0.5, alpha=0.3,
          compute_nll_loss=nll, average_log_prob=average, chunk_size=2)  # fmt: skip
    check("DPO", tensors | reference_of(tensors, ref_bias), loss_type="discopop",
          discopop_tau=0.2, average_log_prob=average, compute_nll_loss=nll)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("nll", [True, False])
@pytest.mark.parametrize(("beta", "alpha", "smoothing"), [(0.1, 1.0, 0.0), (2.5, 0.4, 0.2)])
def test_cpo_and_simpo(shape, bias, nll, beta, alpha, smoothing):
    tensors = inputs(shape, bias)
    options = dict(beta=beta, alpha=alpha, label_smoothing=smoothing, compute_nll_loss=nll)
    check("CPO", tensors, **options)
    check("CPO", tensors, average_log_prob=True, **options)
    check("SimPO", tensors, gamma=0.7, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("nll", ["target", "own target", "none"])
def test_orpo(shape, bias, nll):
    tensors = inputs(shape, bias)
    if nll == "own target":
        tensors["nll_target"] = inputs(shape, seed=3)["target"]
    check("ORPO", tensors, beta=0.3, compute_nll_loss=nll != "none")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kl", [None, 0.7, -0.3])
@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_kto(shape, bias, kl, with_reference, average):
    tensors = inputs(shape, bias)
    if with_reference:
        tensors |= reference_of(tensors, bias)
    g = torch.Generator().manual_seed(1)
    tensors["preference_labels"] = torch.rand(2 * shape[0], generator=g) < 0.5
    tensors["kl"] = None if kl is None else torch.tensor([kl])
    # beta * z stays near -1: liger subtracts S from 1 and has no digits left where S is near 1.
    check("KTO", tensors, beta=0.01, use_ref_model=with_reference, average_log_prob=average)


@pytest.mark.parametrize("name", ["DPO", "SimPO", "CPO", "ORPO"])
def test_another_ignore_index_and_upstream_gradient(name):
    options = {"use_ref_model": False} if name == "DPO" else {}
    tensors = inputs((3, 7, 17, 101), ignore_index=0)
    check(name, tensors, upstream=-2.5, ignore_index=0, **options)


@pytest.mark.parametrize("name", ["DPO", "CPO", "KTO"])
def test_rows_ignored_as_a_whole(name):
    tensors = inputs((3, 7, 17, 101))
    tensors["target"][1] = tensors["target"][4] = tensors["target"][5] = -100
    if name == "KTO":
        tensors["preference_labels"] = torch.arange(6) < 3
    check(name, tensors, **({"use_ref_model": False} if name == "DPO" else {}))


@pytest.mark.parametrize("name", ["DPO", "SimPO", "CPO", "ORPO", "KTO"])
def test_where_liger_divides_by_zero_ours_is_finite(name):
    options = {"use_ref_model": False} if name in ("DPO", "KTO") else {}
    if name != "ORPO" and name != "SimPO":
        options["average_log_prob"] = True
    tensors = inputs((2, 4, 5, 11))
    tensors["target"][:2] = -100
    if name == "KTO":
        tensors["preference_labels"] = torch.arange(4) < 2
    ours, theirs = (run(loss, tensors) for loss in pair_of(name, **options))
    assert theirs[0].isnan()
    assert all(x.isfinite().all() for x in (ours[0], *ours[1], *ours[2].values()))


def test_odds_of_certain_tokens_are_finite():
    tensors = inputs((1, 2, 3, 5), bias=False)
    tensors["lin_weight"] = torch.eye(5, 3)
    tensors["_input"] = 100 * torch.eye(3)[tensors["target"].clamp(0, 2)]
    tensors["target"] = tensors["target"].clamp(0, 2)
    ours, theirs = (run(loss, tensors) for loss in pair_of("ORPO"))
    assert theirs[0].isnan() and ours[0].isfinite() and ours[2]["_input"].isfinite().all()


def grid():
    """The cases of liger's own unit tests: every bias, reference, nll, ignored label and beta."""
    for name, bias, ref_bias, nll in itertools.product(
        ("DPO", "SimPO", "CPO", "ORPO", "KTO"), (True, False), (True, False), (True, False)
    ):
        has_reference = name in ("DPO", "KTO")
        if (ref_bias and not has_reference) or (nll and name == "KTO"):
            continue
        options = {} if name == "KTO" else {"compute_nll_loss": nll}
        options |= {"use_ref_model": True} if has_reference else {}
        for ignore_index, beta in ((-100, 0.1), (42, 0.2)):
            yield name, bias, ref_bias, options | {"ignore_index": ignore_index, "beta": beta}


def of_grid(name, shape, bias, ref_bias, options, dtype=torch.float32):
    """Inputs of a case, with logits of about 1: liger's KTO has no digits far from 0."""
    tensors = inputs(shape, bias, options["ignore_index"], dtype)
    if options.get("use_ref_model"):
        tensors |= reference_of(tensors, bias=bias and ref_bias)
        if ref_bias and not bias:
            tensors["ref_bias"] = torch.linspace(-1, 1, shape[3]).to(dtype)
    if name == "KTO":
        tensors["preference_labels"] = torch.arange(2 * shape[0]) % 3 == 0
        tensors["kl"] = torch.tensor([0.4], dtype=dtype)
    heads = {n: tensors[n] / shape[2] ** 0.5 for n in ("lin_weight", "ref_weight") if n in tensors}
    return tensors | heads


@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (3, 47, 31, 123)], ids=str)
@pytest.mark.parametrize("case", grid(), ids=str)
def test_the_grid_of_liger(shape, case):
    name, _, _, options = case
    check(name, of_grid(name, shape, *case[1:]), **options)


@pytest.mark.parametrize("name", ["DPO", "SimPO", "CPO", "ORPO", "KTO"])
def test_the_large_shape_of_liger(name):
    """Seconds, since it is 17 GFLOP a product.

    A reward below 1 is a tenth of the difference of two sums of 700 nats, whose spacing in fp32 is
    6e-5: one such of either sum, and of both libraries, makes 2e-5.
    """
    options = {"ignore_index": -100, "beta": 0.1}
    options |= {"use_ref_model": True} if name in ("DPO", "KTO") else {}
    tensors = of_grid(name, (8, 128, 1024, 4096), True, True, options)
    check(name, tensors, relative=2.5e-5, **options)


@pytest.mark.parametrize("name", ["DPO", "SimPO", "CPO", "ORPO", "KTO"])
@pytest.mark.parametrize("shape", [(2, 3, 8, 13), (3, 47, 31, 123)], ids=str)
def test_bf16_is_no_further_from_fp32_than_liger(name, shape):
    """Liger rounds the logits to bf16, ours does not; tiny, since a CPU multiplies bf16 slowly."""
    options = {"ignore_index": -100, "beta": 0.1}
    options |= {"use_ref_model": True} if name in ("DPO", "KTO") else {}
    tensors = of_grid(name, shape, True, True, options, torch.bfloat16)
    wide = {k: x.float() if x is not None and x.is_floating_point() else x
            for k, x in tensors.items()}  # fmt: skip
    ours, theirs = pair_of(name, **options)
    truth = run(theirs, wide)
    mine, other = run(ours, tensors), run(theirs, tensors)
    for get in (lambda r: r[0], *(lambda r, i=i: r[1][i] for i in range(len(truth[1]))),
                *(lambda r, n=n: r[2][n] for n in truth[2])):  # fmt: skip
        expected = get(truth)
        error, their_error = ((get(r).float() - expected).abs().max() for r in (mine, other))
        # 2^-8: one rounding to bf16, for where liger is exact by luck.
        assert error <= 2 * their_error + 2**-8 * expected.abs().max()
    assert [x.dtype for x in mine[2].values()] == [torch.bfloat16] * 3


def test_frozen_parts_get_no_gradient():
    tensors = inputs((2, 3, 4, 9))
    loss = fused.FusedLinearDPOLoss(use_ref_model=False)
    hidden = tensors["_input"].requires_grad_()
    loss(**tensors)[0].backward()
    assert hidden.grad is not None and tensors["lin_weight"].grad is None
    with torch.no_grad():
        assert not loss(**tensors)[0].requires_grad


def test_padding_that_holds_nan_does_not_reach_the_loss():
    tensors = inputs((2, 3, 4, 9))
    tensors["target"][0, 0] = -100
    tensors["_input"][0, 0] = float("nan")
    loss, _, grads = run(fused.FusedLinearCPOLoss(), tensors)
    assert loss.isfinite() and all(x.isfinite().all() for x in grads.values())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DPO", {"loss_type": "ipo"}, r"Unsupported loss_type: expected one of sigmoid.*got 'ipo'"),
        ("DPO", {"label_smoothing": 0.1}, r"label_smoothing: sigmoid has none, got 0.1.*cdpo"),
        ("DPO", {"loss_type": "exo_pair"}, r"label_smoothing must be > 0 for .*got 0.0"),
        (
            "DPO",
            {"loss_type": "robust", "label_smoothing": 0.5},
            r"label_smoothing must lie in \[0.0, 0.5\) for loss_type='robust', got 0.5",
        ),
        ("DPO", {"beta": 0.0}, r"beta: must be > 0"),
    ],
)
def test_options_that_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(fused, f"FusedLinear{name}Loss")(**options)


@pytest.mark.parametrize(
    ("name", "options", "change", "message"),
    [
        ("DPO", {}, {}, r"ref_input: expected ref_input and ref_weight.*use_ref_model=True"),
        ("DPO", {"use_ref_model": False}, {"ref_input": torch.zeros(4, 3, 4)}, r"ref_input: .*"),
        ("CPO", {}, {"target": torch.zeros(4, 2).long()}, r"target: expected shape \(4, 3\)"),
        ("CPO", {}, {"_input": torch.zeros(3, 3, 4)}, r"_input: expected 2B sequences.*got 3"),
        ("CPO", {}, {"_input": torch.zeros(12, 4)}, r"_input: expected shape \(S, L, D\)"),
        ("ORPO", {"compute_nll_loss": False}, {"nll_target": torch.zeros(4, 3).long()},
         r"nll_target: compute_nll_loss is False"),
        ("KTO", {}, {}, r"preference_labels: expected bool of shape \(4,\), got None"),
        ("KTO", {}, {"preference_labels": torch.ones(4)}, r"preference_labels: expected bool"),
        ("KTO", {}, {"preference_labels": torch.ones(4).bool(), "kl": torch.zeros(4)},
         r"kl: expected one number.*take its mean"),
    ],
)  # fmt: skip
def test_inputs_that_are_refused(name, options, change, message):
    tensors = inputs((2, 3, 4, 9)) | change
    with pytest.raises(ValueError, match=message):
        getattr(fused, f"FusedLinear{name}Loss")(**options)(**tensors)
