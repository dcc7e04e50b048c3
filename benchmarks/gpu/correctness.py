"""The Triton ops against fp64 on the GPU, at odd shapes; a section of gpu/suite.py.

    value:      err(ours) <= 2 err(PyTorch in fp32 on the same inputs) + eps   nats, the largest
    gradient:   err(ours) <= 2 err(PyTorch in the same dtype) + eps            relative, in the norm

PyTorch in fp32 is the worse of two: fp32 GEMMs, and tensor-core GEMMs with fp32 results. A tensor
core truncates every sum of 16 products, which at 4104 columns is three times the error of fp32
arithmetic. PyTorch in the same dtype rounds the logits to it, as a plain training loop does. The
eps of a gradient is one rounding to that dtype: dlogits may be rounded once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu import attention, elementwise
from benchmarks.gpu.ablation import candidates, with_candidate
from fastpref import ops
from fastpref.bench.contestants import setting

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROUNDOFF = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
VALUE_EPS = 1e-5  # a logit of 60 is held in fp32 to 2e-6, and a log-prob is a difference of two
Results = dict[str, Tensor]
Check = tuple[dict[str, Any], Callable[[], dict[str, Any]]]  # identity of a row, its check


@dataclass(frozen=True)
class Case:
    """Shapes that no tile divides, and the options of the head."""

    T: int
    D: int
    V: int
    bias: bool = False
    ignored: bool = False
    logit_scale: float = 1.0
    softcap: float | None = None


CASES = (
    Case(127, 64, 32001),
    Case(3000, 4104, 32001, ignored=True, logit_scale=0.5, softcap=30.0),
    Case(1, 64, 256000),
    Case(1000, 64, 151936, bias=True, ignored=True),
)
# Sizes divisible by 16, as in training, on which Triton specializes; the ablation reuses the code.
EVEN_CASE = Case(1024, 512, 8192)
DRY_CASES = (
    Case(9, 16, 33),
    Case(20, 24, 67, bias=True, ignored=True, logit_scale=0.5, softcap=30.0),
    Case(1, 16, 40),
)


class Inputs(dict[str, Tensor]):
    """Tensors by name; `cast` returns leaves of another dtype with the same numbers."""

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype, device: str) -> Inputs:
        draw = torch.Generator(device).manual_seed(case.T + case.V)
        normal = partial(torch.randn, generator=draw, device=device)
        tensors = {
            "hidden": normal(case.T, case.D),
            "weight": normal(case.V, case.D) * (3 * case.D**-0.5),
            "ref_hidden": normal(case.T, case.D),
        }
        if case.bias:
            tensors["bias"] = normal(case.V)
        inputs = cls({name: x.to(dtype) for name, x in tensors.items()})
        inputs["labels"] = torch.randint(case.V, (case.T,), generator=draw, device=device)
        if case.ignored:
            inputs["labels"][::3] = -100
        inputs["upstream"] = normal(case.T)
        # One pair; with a single token its rejected response is empty.
        ends = [0, -(-case.T // 2), case.T]
        inputs["cu_seqlens"] = torch.tensor(ends, device=device)
        return inputs

    def cast(self, dtype: torch.dtype) -> Inputs:
        leaves = ("hidden", "weight", "bias", "ref_hidden")
        return Inputs(
            {
                name: x.detach().to(dtype).requires_grad_(name != "ref_hidden")
                if name in leaves
                else x.to(dtype if name == "upstream" else x.dtype)
                for name, x in self.items()
            }
        )


def logps(x: Inputs, case: Case, impl: str) -> Results:
    logps = ops.linear_logps(
        x["hidden"], x["weight"], x["labels"], bias=x.get("bias"), impl=impl, **_options(case)
    )
    return {"logps": logps, **_gradients(logps, x, ("hidden", "weight", "bias"))}


def logps_frozen(x: Inputs, case: Case, impl: str) -> Results:
    """Log-probs with a frozen head; they must equal those without gradient bit for bit."""
    hidden, weight, labels, options = x["hidden"], x["weight"].detach(), x["labels"], _options(case)
    logps = ops.linear_logps(hidden, weight, labels, impl=impl, **options)
    if impl == "triton":
        for scored in (
            ops.token_stats(hidden, weight, labels, impl=impl, **options).logps,
            ops.linear_logps(hidden.detach(), weight, labels, impl=impl, **options),
        ):
            if not torch.equal(scored, logps.detach()):
                gap = float((scored - logps.detach()).abs().max())
                raise RuntimeError(f"log-probs of training and of scoring differ by {gap:.1e}")
    return {"logps": logps, **_gradients(logps, x, ("hidden",))}


def logps_without_cache(x: Inputs, case: Case, impl: str) -> Results:
    budget = 0 if impl == "triton" else None
    with setting("fastpref_kernels.linear_logps", "CACHE_BYTES", budget):
        return logps(x, case, impl)


def token_stats(x: Inputs, case: Case, impl: str) -> Results:
    stats = ops.token_stats(
        x["hidden"], x["weight"], x["labels"], bias=x.get("bias"), impl=impl, **_options(case)
    )
    return {"logps": stats.logps, "lse": stats.lse, "entropy": stats.entropy}


def linear_kl(x: Inputs, case: Case, impl: str) -> Results:
    kl = ops.linear_kl(
        x["hidden"], x["weight"], x["ref_hidden"], x["weight"].detach(), impl=impl, **_options(case)
    )
    return {"kl": kl, **_gradients(kl, x, ("hidden", "weight"))}


def score_geometry(x: Inputs, case: Case, impl: str) -> Results:
    geometry = ops.score_geometry(
        x["hidden"], x["weight"], x["labels"], x["cu_seqlens"], impl=impl, **_options(case)
    )
    return {"grad of the scores": torch.stack(geometry)}


def score_sums(x: Inputs, case: Case, impl: str) -> Results:
    _, sums = ops.linear_logps_and_scores(
        x["hidden"], x["weight"], x["labels"], int(x["cu_seqlens"][1]), rows=None, impl=impl,
        **_options(case),
    )  # fmt: skip
    return {"grad of the sums": sums}


OPS: dict[str, Callable[[Inputs, Case, str], Results]] = {
    "linear_logps, frozen": logps_frozen,
    "linear_logps, trained": logps,
    "linear_logps, no cache": logps_without_cache,
    "token_stats": token_stats,
    "linear_kl": linear_kl,
    "score_geometry": score_geometry,
    "score_sums": score_sums,
}
WITHOUT_BIAS = ("linear_logps, frozen", "linear_kl", "score_geometry", "score_sums")


def checks(device: str, dry: bool) -> Iterator[Check]:
    """Every op, dtype and case; bf16, the dtype of training, first."""
    for dtype in DTYPES:
        for case in DRY_CASES if dry else CASES:
            for op in OPS:
                row = {"op": op, "dtype": str(dtype).removeprefix("torch."), **asdict(case)}
                yield row, partial(check, op, case, dtype, device)
    yield from attention.checks(device, dry)
    yield from elementwise.checks(device, dry)
    yield from _candidates(device, dry)
    yield from _losses(device)


def _candidates(device: str, dry: bool) -> Iterator[Check]:
    """Every tile shape of configs.py for bf16, in each op that uses its table."""
    case, dtype = (DRY_CASES[0] if dry else EVEN_CASE), torch.bfloat16
    for op in OPS:
        table = "pair" if op == "linear_kl" else "gemm"
        for index, config in candidates(table, "bfloat16", device):
            row = {"op": op, "dtype": "bfloat16", **asdict(case), "config": config}
            run = partial(check, op, case, dtype, device)
            yield row, partial(with_candidate, table, index, "bfloat16", device, run)


def check(op: str, case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Errors of the Triton implementation, the allowed errors, and whether they are met."""
    inputs = Inputs.of(case, dtype, device)
    ours = OPS[op](inputs.cast(dtype), case, "triton")
    true = OPS[op](inputs.cast(torch.float64), case, "reference")
    fp32 = [OPS[op](inputs.cast(dtype), case, "reference")]
    if device == "cuda" and dtype != torch.float32:
        fp32.append(OPS[op](inputs.cast(dtype), case, "chunked"))  # tensor-core GEMMs
    plain = _plain(op, inputs.cast(dtype), case)
    errors = {}
    for name, value in true.items():
        value = value.detach()
        if name.startswith("grad"):
            scale = max(float(value.norm()), 1e-30)
            eps = ROUNDOFF[dtype] + 1e-6

            def error(x: Tensor, value: Tensor = value, scale: float = scale) -> float:
                return float((x.double() - value).norm()) / scale

            allowed = 2 * error(plain[name]) + eps
        else:

            def error(x: Tensor, value: Tensor = value, scale: float = 1.0) -> float:
                return float((x.double() - value).abs().max())

            allowed = 2 * max(error(torch32[name].detach()) for torch32 in fp32) + VALUE_EPS
        errors[name] = {"error": error(ours[name].detach()), "allowed": allowed}
    return {"errors": errors, "met": all(e["error"] <= e["allowed"] for e in errors.values())}


def _plain(op: str, x: Inputs, case: Case) -> Results:
    """Gradients (or scores) of PyTorch in the dtype of the inputs."""
    if op == "token_stats":
        return {}
    if op == "score_sums":
        x = x.cast(torch.float32)  # these sums are not rounded to the dtype of the inputs
    bias = None if op in WITHOUT_BIAS else x.get("bias")
    logp = _plain_logits(x["hidden"], x["weight"], bias, case).float().log_softmax(1)
    if op == "linear_kl":
        with torch.no_grad():
            logq = _plain_logits(x["ref_hidden"], x["weight"], None, case).float().log_softmax(1)
        return _gradients((logq.exp() * (logq - logp)).sum(1), x, ("hidden", "weight"))
    labels = x["labels"]
    tokens = logp.gather(1, labels.clamp(min=0)[:, None]).squeeze(1).masked_fill(labels < 0, 0.0)
    if not op.startswith("score"):
        return _gradients(tokens, x, ("hidden", "weight", "bias"))
    middle = int(x["cu_seqlens"][1])
    chosen, rejected = (
        torch.autograd.grad(part.sum(), x["weight"], retain_graph=True)[0].double()
        for part in (tokens[:middle], tokens[middle:])
    )
    if op == "score_sums":
        return {"grad of the sums": torch.stack([chosen, rejected])}
    norms = chosen.norm(), rejected.norm()
    cosine = (chosen * rejected).sum() / (norms[0] * norms[1]).clamp(min=1e-30)
    return {"grad of the scores": torch.stack([*norms, cosine])}


def _plain_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, case: Case) -> Tensor:
    raw = functional.linear(hidden, weight, bias) * case.logit_scale
    return raw if case.softcap is None else case.softcap * torch.tanh(raw / case.softcap)


def _options(case: Case) -> dict[str, Any]:
    return {"logit_scale": case.logit_scale, "softcap": case.softcap}


def _gradients(result: Tensor, x: Inputs, names: tuple[str, ...]) -> Results:
    trained = [name for name in names if name in x and x[name].requires_grad]
    objective = result @ x["upstream"].to(result.dtype)
    grads = torch.autograd.grad(objective, [x[n] for n in trained], allow_unused=True)
    return {f"grad {n}": g for n, g in zip(trained, grads, strict=True) if g is not None}


def _losses(device: str) -> Iterator[Check]:
    """Fused objectives of pairs, if the kernels are installed, against autograd in fp64."""
    try:
        from fastpref_kernels import losses as kernels
    except ImportError as error:
        why = str(error)

        def absent() -> dict[str, Any]:
            raise ImportError(f"not available: {why}")

        yield {"op": "losses"}, absent
        return
    for name in kernels.PAIR_OBJECTIVES:
        yield {"op": f"loss {name}", "dtype": "float32"}, partial(_check_loss, name, device)


def _check_loss(name: str, device: str) -> dict[str, Any]:
    from fastpref import losses
    from fastpref.logps import SequenceLogps
    from fastpref_kernels import losses as kernels

    B = 257
    draw = torch.Generator(device).manual_seed(B)
    z, r = (-60 * torch.rand(2, B, generator=draw, device=device) - 1 for _ in range(2))
    lengths = torch.randint(1, 200, (2, B), generator=draw, device=device)
    objective = losses.build(name)
    assert isinstance(objective, losses.PairwiseLoss)
    names = kernels.PAIR_OBJECTIVES[name].hyperparameters
    parameters = {parameter: getattr(objective, parameter) for parameter in names}

    def autograd(dtype: torch.dtype) -> Results:
        policy = SequenceLogps(*z.to(dtype), *lengths)
        reference = SequenceLogps(*r.to(dtype), *lengths)
        d_w, d_l = losses.incentives(objective, policy, reference)
        return {"loss": objective(policy, reference).loss, "d_w": d_w, "d_l": d_l}

    ours = kernels.pair_losses(name, parameters, *z, *r, *lengths)
    true, torch32 = autograd(torch.float64), autograd(torch.float32)
    errors = {}
    for key, value in true.items():
        # A sum of terms has the error of its largest term, here at most its largest value.
        eps = 8 * 2**-24 * max(1.0, float(value.abs().max()))
        allowed = 2 * float((torch32[key].double() - value).abs().max()) + eps
        error = float((getattr(ours, key).double() - value).abs().max())
        errors[key] = {"error": error, "allowed": allowed}
    return {"errors": errors, "met": all(e["error"] <= e["allowed"] for e in errors.values())}
