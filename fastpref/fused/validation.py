"""Checks of the arguments of `FusedPreferenceLoss`: their shapes, and which objective takes them.

| objective | sequences | needs | may have |
|---|---|---|---|
| pairwise | 2B | | `preference` |
| token-level | 2B | `importance` where it asks for it | `preference`, `token_weights` |
| pointwise | S | `desirable`; `reference_point` (kto) | |
| groupwise | S | `cu_groups`, `scores` | |

The reference is passed as `ref_logps` (token-level: `ref_token_logps`), or as its hidden states and
head. Arguments of another kind of objective are refused, not ignored.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastpref.losses import (
    GroupwiseLoss,
    Objective,
    PairwiseLoss,
    PointwiseLoss,
    TokenLevelLoss,
)
from fastpref.losses.pointwise import BCO
from fastpref.ops import checks

Given = Mapping[str, Tensor | None]

PER_TOKEN = ("ref_token_logps", "token_weights", "importance")
_MEANING = {
    "desirable": "which responses are to be learned from, (S,) bool",
    "reference_point": "the mean log-ratio of mismatched responses, a tensor ()",
    "cu_groups": "the offsets of the groups among the responses, (G + 1,)",
    "scores": "the score of each response, (S,)",
    "importance": "how much each token matters, of the shape of labels; `lam: 0` does without",
}


def of_pairs(objective: Objective) -> bool:
    """Whether sequences are ordered chosen_0 .. chosen_{B-1}, rejected_0 .. rejected_{B-1}."""
    return isinstance(objective, PairwiseLoss | TokenLevelLoss)


def token_columns(objective: Objective) -> tuple[str, ...]:
    """Names of the values per token that the objective needs besides log-probs."""
    return objective.columns if isinstance(objective, TokenLevelLoss) else ()


def keeps_mean_reward(objective: Objective) -> bool:
    """Whether the reference point is the mean of all rewards so far."""
    return isinstance(objective, BCO)


def needs_point(objective: Objective) -> bool:
    """Whether the caller has to pass a reference point."""
    needs = isinstance(objective, PointwiseLoss) and objective.needs_reference_point
    return needs and not keeps_mean_reward(objective)


def _accepted(objective: Objective) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the arguments that an objective needs, and of those that are optional."""
    if isinstance(objective, TokenLevelLoss):
        needed = tuple(name for name in objective.columns if name == "importance")
        return needed, ("preference", "token_weights", "ref_token_logps")
    if isinstance(objective, PointwiseLoss):
        point = ("reference_point",) if needs_point(objective) else ()
        return ("desirable", *point), ("ref_logps",)
    if isinstance(objective, GroupwiseLoss):
        return ("cu_groups", "scores"), ("ref_logps",)
    return (), ("preference", "ref_logps")


def check_plain(tensors: Given, parameters: Given) -> None:
    """Raise ValueError for a DTensor."""
    for name, tensor in tensors.items():
        checks.check_plain(name, tensor)
    for name, parameter in parameters.items():
        checks.check_gathered(name, parameter)


def check_given(objective: Objective, given: Given, labels: Tensor) -> None:
    """Raise ValueError for an argument that is missing, of another kind, or not one per label."""
    needed, optional = _accepted(objective)
    for name, value in given.items():
        if value is None and name in needed:
            raise ValueError(f"{name}: {objective.name} needs {_MEANING[name]}; got None")
        if value is not None and name not in (*needed, *optional):
            taken = ", ".join((*needed, *optional))
            raise ValueError(
                f"{name}: {objective.name} has no use for it; it takes {taken}; leave it out"
            )
        if value is not None and name in PER_TOKEN and value.shape != labels.shape:
            raise ValueError(
                f"{name}: expected shape {tuple(labels.shape)}, one per label, "
                f"got {tuple(value.shape)}"
            )


def check_shapes(
    objective: Objective,
    hidden: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    attention_mask: Tensor | None,
) -> None:
    """Raise ValueError where these are not a padded or a packed batch for the objective."""
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels: expected shape {tuple(hidden.shape[:-1])}, one per hidden state, "
            f"got {tuple(labels.shape)}"
        )
    pairs = of_pairs(objective)
    if cu_seqlens is None:
        if hidden.dim() != 3 or len(hidden) == 0 or (pairs and len(hidden) % 2):
            order = (
                "(2B, L, D), all chosen and then all rejected sequences," if pairs else "(S, L, D)"
            )
            raise ValueError(
                f"hidden: expected shape {order} or (T, D) with cu_seqlens, "
                f"got {tuple(hidden.shape)}"
            )
        if attention_mask is not None and attention_mask.shape != labels.shape:
            raise ValueError(
                f"attention_mask: expected shape {tuple(labels.shape)}, "
                f"got {tuple(attention_mask.shape)}"
            )
        return
    if hidden.dim() != 2:
        raise ValueError(
            f"hidden: expected a packed (T, D) with cu_seqlens, got {tuple(hidden.shape)}"
        )
    sequences = len(cu_seqlens) - 1 if cu_seqlens.dim() == 1 else 0
    if sequences < 1 or (pairs and sequences % 2):
        order = "2 B + 1 offsets, B chosen and then B rejected sequences"
        raise ValueError(
            f"cu_seqlens: expected {order if pairs else 'S + 1 offsets of the sequences'}, "
            f"got shape {tuple(cu_seqlens.shape)}"
        )
    if attention_mask is not None:
        raise ValueError(
            "attention_mask: a packed batch has no padding; label what is not scored -100"
        )


def check_reference(
    objective: Objective,
    hidden: Tensor,
    sequences: int,
    given: Given,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> None:
    """Raise ValueError where a needed reference is missing, passed twice, or of another shape."""
    if (ref_hidden is None) != (ref_weight is None):
        missing = "ref_weight" if ref_weight is None else "ref_hidden"
        raise ValueError(f"{missing}: got None; pass ref_hidden and ref_weight together")
    if ref_bias is not None and ref_hidden is None:
        raise ValueError("ref_bias: belongs to ref_hidden and ref_weight; leave it out")
    if ref_hidden is not None and ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden: expected shape {(*hidden.shape[:-1], 'E')} for the same tokens as "
            f"hidden, got {tuple(ref_hidden.shape)}"
        )
    name = "ref_token_logps" if isinstance(objective, TokenLevelLoss) else "ref_logps"
    ref_logps = given[name]
    if "kl" in token_columns(objective) and ref_hidden is None:
        raise ValueError(
            f"ref_hidden: {objective.name} needs the divergence from the reference, which comes "
            f"from ref_hidden and ref_weight; got None"
        )
    if (ref_logps is None) == (ref_hidden is None):
        passed = "neither" if ref_logps is None else "both"
        raise ValueError(
            f"{name}: {objective.name} needs a reference, as {name} or as ref_hidden "
            f"and ref_weight; got {passed}"
        )
    if name == "ref_logps" and ref_logps is not None and ref_logps.shape != (sequences,):
        raise ValueError(
            f"ref_logps: expected shape ({sequences},), one sum per sequence in their order, "
            f"got {tuple(ref_logps.shape)}"
        )


def check_biases(
    objective: Objective, calibrates: bool, bias: Tensor | None, ref_bias: Tensor | None
) -> None:
    """Raise ValueError for biases of heads where scores or divergences are measured."""
    if bias is not None and calibrates:
        raise ValueError("bias: the scores of a head with a bias are not measured; leave it out")
    for name, value in (("bias", bias), ("ref_bias", ref_bias)):
        if value is not None and "kl" in token_columns(objective):
            raise ValueError(
                f"{name}: {objective.name} needs a divergence, which is measured between heads "
                f"without a bias; choose another objective"
            )
