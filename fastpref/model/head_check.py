"""Options of a model's head by the names of its config, and their check on the model's logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastpref import ops
from fastpref.utils.errors import ModelError

if TYPE_CHECKING:
    from fastpref.model.policy import Policy

# Size of the largest logit on scaled hidden states: a cap of up to a hundred times as much shows.
LARGE = 1e3
# Largest error of log-probs that rounding explains, on hidden states as they are and scaled ones.
TOLERANCE = 1e-3
LARGE_TOLERANCE = 1e-5 * LARGE  # the largest logit has seven digits in fp32


def head_options(config: Any) -> tuple[float, float | None]:
    """Return (logit_scale, softcap) of an architecture; `check_head` verifies them."""
    config = config.get_text_config()
    kind = config.model_type
    scale = 1.0
    if kind.startswith("cohere"):
        scale = config.logit_scale
    elif kind.startswith(("granite", "minicpm3")):
        scale = 1.0 / config.logits_scaling
    elif kind.startswith("hyperclovax"):
        scale = config.logits_scaling
    elif kind.startswith("falcon_h1"):
        scale = config.lm_head_multiplier
    return scale, _softcap(config)


def _softcap(config: Any) -> float | None:
    """Cap of the logits; its name differs between architectures."""
    for name, value in vars(config).items():
        words = name.replace("softcap", "soft_cap").split("_")
        of_the_head = "cap" in [word.removesuffix("ping") for word in words]
        of_the_head &= bool({"logit", "logits"} & {*words})
        of_the_head &= not {"attn", "attention", "router", "gate"} & {*words}
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if of_the_head and is_number and value > 0:
            return float(value)
    return None


def check_head(policy: Policy) -> None:
    """Compare log-probs of the fused head with those of the model's logits, on eight tokens.

    Twice: on the hidden states of these tokens, and on the same scaled until their logits are
    large, where a cap of the logits shows.

    Raises ModelError that names the model if they differ or are not finite.
    """
    ids = _ids(policy)
    hidden = policy.last_hidden_state(input_ids=ids)[0]
    weight, bias = policy.head()

    def ours(factor: float) -> Tensor:
        labels = ids.flatten().roll(-1)
        options = policy.head_options
        return ops.linear_logps(hidden * factor, weight, labels, bias=bias, **options)

    logps = ours(1.0)
    if not logps.isfinite().all():
        raise ModelError(
            f"model: the log-probs of {type(policy.base).__name__} are not finite; look for NaN "
            "or infinity in its weights"
        )
    _compare(policy, logps, _logits(policy, ids), TOLERANCE)
    largest = (hidden @ weight.T).abs().max().item() * abs(policy.logit_scale)
    if largest > 0:
        factor = LARGE / largest
        _compare(policy, ours(factor), _logits(policy, ids, factor), LARGE_TOLERANCE)


def _ids(policy: Policy) -> Tensor:
    rows = policy.head()[0].shape[0]
    return torch.arange(1, 9, device=policy.device).remainder(rows).unsqueeze(0)


def _logits(policy: Policy, ids: Tensor, factor: float = 1.0) -> Tensor:
    """The model's logits (8, V), of hidden states that are multiplied by a factor."""

    def scale(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return inputs[0] * factor, *inputs[1:]

    handle = policy.base.get_output_embeddings().register_forward_pre_hook(scale)
    try:
        with policy.autocast():
            logits: Tensor = policy.base(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    return logits[0]


def _compare(policy: Policy, ours: Tensor, logits: Tensor, tolerance: float) -> None:
    """Raise ModelError unless log-probs of the head (8,) are those of the model's logits."""
    error = logp_error(ours, logits, _ids(policy).flatten().roll(-1))
    if policy.compute_dtype == torch.bfloat16:
        tolerance = rounded_tolerance(logits, tolerance)
    if not error <= tolerance:
        raise ModelError(
            f"model: {type(policy.base).__name__} computes its logits in a way that the fused "
            f"head does not know (log-probs differ by {error:.3g}); use another model"
        )


def logp_error(logps: Tensor, logits: Tensor, labels: Tensor) -> float:
    """Largest difference of log-probs (T,) from those of the labels (T,) under logits (T, V)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    expected = logits.to(dtype).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    return (logps - expected).abs().max().item()


def rounded_tolerance(logits: Tensor, tolerance: float) -> float:
    """Tolerance of log-probs of logits that the model rounds to half precision."""
    # bfloat16 has a relative error of up to 2^-9.
    return max(0.1, tolerance, 2**-7 * logits.abs().max().item())
