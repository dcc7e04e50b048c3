"""The functional forms against those of liger-kernel, with mixtures of all their options."""

from __future__ import annotations

import inspect
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import fused
from fastpref.fused import liger
from fastpref.fused.liger import functional

theirs = pytest.importorskip("liger_kernel.chunked_loss.functional")

NAMES = ("dpo", "cpo", "simpo", "orpo", "kto")
SMOOTHED = {"exo_pair": 1e-3, "robust": 0.1}
LOSS_TYPES = ("sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
              "apo_zero", "apo_down", "discopop")  # fmt: skip


def _signature(name: str) -> list[tuple[str, Any]]:
    """Names and defaults of the arguments of liger's autograd function."""
    module = __import__(f"liger_kernel.chunked_loss.{name}_loss", fromlist=["_"])
    titles = {"simpo": "SimPO"}
    function = getattr(module, f"LigerFusedLinear{titles.get(name, name.upper())}Function")
    parameters = list(inspect.signature(function.forward).parameters.values())
    return [(p.name, p.default) for p in parameters if p.name not in ("cls", "ctx")]


@pytest.mark.parametrize("name", [*NAMES, "jsd"])
def test_arguments_and_their_order_are_those_of_liger(name: str) -> None:
    ours = inspect.signature(getattr(functional, f"liger_fused_linear_{name}")).parameters.values()
    arguments = [(p.name, p.default) for p in ours]
    expected = _signature(name)
    if name == "jsd":  # there the biases have to be passed
        expected = [(key, None if key.endswith("_bias") else value) for key, value in expected]
    assert arguments == expected


def _options(name: str, draw: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {"beta": draw.choice((0.1, 0.7)), "compiled": False}
    options["chunk_size"] = draw.choice((1, 2))
    if name != "kto":
        options["compute_nll_loss"] = draw.choice((False, True))
    if name in ("dpo", "cpo", "simpo"):
        options["alpha"] = draw.choice((1.0, 0.3))
    if name in ("dpo", "cpo", "kto"):
        options["average_log_prob"] = draw.choice((False, True))
    if name in ("cpo", "simpo"):
        options["label_smoothing"] = draw.choice((0.0, 0.2))
    if name == "simpo":
        options["gamma"] = draw.choice((0.5, 0.0))
    if name == "dpo":
        loss_type = draw.choice(LOSS_TYPES)
        options |= {"loss_type": loss_type, "label_smoothing": SMOOTHED.get(loss_type, 0.0)}
    if name in ("dpo", "kto"):
        options["use_ref_model"] = draw.choice((False, True))
    return options


def _tensors(name: str, options: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Inputs in the order of the function; logits of about 1, where liger keeps its digits."""
    sequences, length, width, vocabulary = draw.choice(((2, 3, 4, 7), (6, 5, 9, 23)))
    ignore_index = options["ignore_index"] = draw.choice((-100, 3))
    target = torch.randint(vocabulary, (sequences, length))
    target[torch.rand(target.shape) < 0.3] = ignore_index
    target[:, -1] = 1
    tensors: dict[str, Any] = {
        "_input": torch.randn(sequences, length, width),
        "weight": torch.randn(vocabulary, width) / width**0.5,
        "target": target,
    }
    if name == "kto":
        tensors["preference_labels"] = torch.arange(sequences) % 3 == 0
        tensors["kl"] = draw.choice((None, torch.tensor(0.4)))
    if draw.random() < 0.5:
        tensors["bias"] = torch.randn(vocabulary)
    if options.get("use_ref_model"):
        tensors["ref_input"] = tensors["_input"] + 0.1
        tensors["ref_weight"] = tensors["weight"] * 0.9
    if name == "orpo" and options["compute_nll_loss"] and draw.random() < 0.5:
        tensors["nll_target"] = torch.randint(vocabulary, target.shape)
    return tensors


def _run(name: str, module: Any, tensors: dict[str, Any], options: dict[str, Any]) -> list[Tensor]:
    """Loss, aux and gradients."""
    leaves = {
        key: tensors[key].clone().requires_grad_()
        for key in ("_input", "weight", "bias")
        if key in tensors
    }
    given = {**tensors, **options, **leaves}
    # By position, as an autograd function takes its arguments.
    loss, aux = getattr(module, f"liger_fused_linear_{name}")(
        *(given.get(key, default) for key, default in _signature(name))
    )
    return [loss.detach(), *aux, *torch.autograd.grad(1.7 * loss, list(leaves.values()))]


@pytest.mark.parametrize("name", NAMES)
def test_any_mixture_of_options_gives_the_numbers_of_liger(name: str) -> None:
    for seed in range(20):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        options = _options(name, draw)
        tensors = _tensors(name, options, draw)
        mine, other = (_run(name, x, tensors, options) for x in (functional, theirs))
        relative = 1e-4 if options.get("loss_type") == "discopop" else 2e-5
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=relative * max(1, float(b.abs().max())))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("extra", [0, 4], ids=["one vocabulary", "the teacher's is larger"])
def test_the_jensen_shannon_loss_is_that_of_liger(beta: float, extra: int) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(9, 4), torch.randn(9, 6)
    labels = torch.randint(13, (9,)).index_fill(0, torch.tensor([2, 5]), -100)
    leaves = [student, torch.randn(13, 4), torch.randn(13)]
    for leaf in leaves:
        leaf.requires_grad_()
    heads = torch.randn(13 + extra, 6), torch.randn(13 + extra)
    results = []
    for module in (functional, theirs):
        outputs = module.liger_fused_linear_jsd(
            leaves[0], leaves[1], teacher, heads[0], labels, leaves[2], heads[1],
            0.3, 0.9, beta, -100, 2.0, False, 4, True,
        )  # fmt: skip
        results.append([*outputs, *torch.autograd.grad(outputs[0], leaves)])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.5}, r"beta: expected a number from 0 to 1, got 1.5"),
        ({"temperature": 0.0}, r"temperature: expected a number > 0, got 0.0"),
    ],
)
def test_numbers_that_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        liger.FusedLinearJSDLoss(**options)


def test_hidden_states_and_labels_that_do_not_fit_are_refused() -> None:
    head, labels = torch.ones(5, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"teacher_input: expected shape \(T, D\) with T labels"):
        liger.FusedLinearJSDLoss()(torch.ones(3, 2), head, torch.ones(4, 2), head, labels)


def test_the_names_of_liger_are_those_of_the_classes() -> None:
    for name in ("DPO", "CPO", "SimPO", "ORPO", "KTO"):
        ours = getattr(fused, f"FusedLinear{name}Loss")
        assert getattr(liger, f"LigerFusedLinear{name}Loss") is ours
