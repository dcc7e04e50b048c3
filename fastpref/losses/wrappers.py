"""Options that apply to many objectives, each an objective that wraps another.

`build_with_options` takes them as further parameters of any objective they fit:

    f_divergence, f_alpha   another regularizer than the reverse KL, for losses of a margin
    offset                  a larger reward margin where the data's column `margin` is larger
    label_smoothing         a share of the labels is expected to be flipped
    ld_alpha                tokens beyond the length of the shorter response count less
    wpo                     pairs that the policy would not produce count less

The first three wrap pairwise objectives and are pairwise objectives; the other two look at tokens.
`TokenWeighted`, which is no option, does so for data that weigh tokens. Notation: see `base`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from fastpref.logps import SequenceLogps, TokenLogps, mean_logps, segment_positions, segment_sum
from fastpref.losses.base import Loss, LossOutput, PairwiseLoss, choice, number
from fastpref.losses.kinds import Objective
from fastpref.losses.margin import FDPO
from fastpref.losses.offset import Offset
from fastpref.losses.token_level import TokenLevelLoss
from fastpref.losses.wrapping import PairwiseWrapper, Wrapper, check_pairwise, layers, not_for
from fastpref.utils.lazy_torch import Tensor, no_grad, torch

# Objectives that see a response through t = z - r alone, and of two responses the difference.
# `f_dpo` and `chi_po` bring divergences of their own.
OF_MARGIN = (
    *("dpo", "cdpo", "robust", "ipo", "hinge", "exo_pair", "discopop", "r_dpo", "bpo"),
    *("ipo_avg", "dpo_norm", "stapo_ref"),
)


@dataclass(frozen=True)
class TokenLevelWrapper(Wrapper, TokenLevelLoss):
    """A token-level objective that wraps a pairwise or another token-level one."""

    objective: PairwiseLoss | TokenLevelLoss

    @property
    def soft_labels(self) -> bool:  # type: ignore[override]
        return self.objective.soft_labels

    def inner(
        self,
        policy: TokenLogps,
        reference: TokenLogps | None,
        reference_point: Tensor | None,
        weights: Tensor | None = None,
    ) -> LossOutput:
        """Loss and rewards of the wrapped objective; a pairwise one takes weighted sums of tokens.

        The weights (T,), for a pairwise objective only, are multiplied by those of the data.
        """
        self.check(policy, reference, reference_point)
        if isinstance(self.objective, TokenLevelLoss):
            return self.objective(policy, reference, reference_point)
        if policy.weights is not None:
            weights = policy.weights if weights is None else weights * policy.weights
        sums = None if reference is None else reference.sequences(weights)
        return self.objective(policy.sequences(weights), sums, reference_point)


@dataclass(frozen=True)
class TokenWeighted(TokenLevelWrapper):
    """A pairwise objective on data that weigh tokens, or in a sum with token-level objectives.

    loss:       that of the objective with z = sum_i c_i * log p_i and r likewise, where c_i is the
                weight of token i in the data, 1 where there are none
    incentives: the objective's, times c_i
    source:     none; these are the sums that `token_level` takes

    Rewards are those of the objective on these sums. Lengths count all tokens. Name and config are
    those of the objective.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.objective, PairwiseLoss):
            raise ValueError(
                f"objective: expected one on pairs of summed log-probs, got {self.objective.name}; "
                f"use it as it is"
            )

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.objective.name

    def __call__(
        self,
        policy: TokenLogps,
        reference: TokenLogps | None = None,
        reference_point: Tensor | None = None,
    ) -> LossOutput:
        return self.inner(policy, reference, reference_point)


@dataclass(frozen=True)
class LabelSmoothing(PairwiseWrapper):
    """Label smoothing: an objective that expects a share of the labels to be flipped.

    loss:       (1 - e) * L(chosen, rejected) + e * L(rejected, chosen), e = label_smoothing
    incentives: d_w = (1 - e) * d_w - e * d_l', d_l = (1 - e) * d_l - e * d_w', with ' of the
                reversed pair
    source:     Mitchell 2023, "A note on DPO with noisy preferences" (no arXiv id), for any loss

    Rewards are those of the objective. On `dpo` this is `cdpo`. With a soft label p as well, the
    flips come on top of it, as if it were p * (1 - e) + (1 - p) * e.
    """

    label_smoothing: float = number(0.1, at_least=0, below=0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pairwise("label_smoothing", self.objective)
        if any(hasattr(layer, "label_smoothing") for layer in layers(self.objective)):
            raise ValueError(f"label_smoothing: {self.objective.name} has its own; set that")
        if not self.objective.soft_labels:
            raise not_for("label_smoothing", self.objective, "whose pairs cannot be reversed")

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        return self.objective.reward(logps, lengths, reference)

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        loss = self.objective.hard_loss(policy, reference)
        flipped = self.objective.hard_loss(policy.swapped(), reference.swapped())
        return (1 - self.label_smoothing) * loss + self.label_smoothing * flipped


@dataclass(frozen=True)
class FDivergence(PairwiseWrapper):
    """f-divergence: a loss of the log-ratio margin, regularized by another divergence.

    loss:       that of the objective with g(tw), g(tl) in place of tw, tl; g is that of `f_dpo`
    incentives: d_w = g'(tw) * d_w, d_l = g'(tl) * d_l, with the objective's own at g(tw), g(tl)
    source:     Wang et al. 2023, arXiv:2309.16240

    Rewards are those of the objective at g(t). On `dpo` this is `f_dpo`, and reverse_kl changes
    nothing. Only for objectives that see no more of a pair than the difference of the two, in which
    the unknown normalizer of the paper cancels. f_alpha belongs to the alpha divergence alone.
    """

    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = choice(
        "reverse_kl", "forward_kl", "js", "alpha"
    )
    f_alpha: float = number(0.5, above=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pairwise("f_divergence", self.objective)
        if self.objective.name not in OF_MARGIN:
            why = "whose loss is not one of the log-ratio margin; it applies to "
            raise not_for("f_divergence", self.objective, why + ", ".join(OF_MARGIN))
        if self.f_divergence != "alpha" and self.f_alpha != 0.5:
            raise ValueError(
                f"f_alpha: {self.f_divergence} has none; leave it out or set f_divergence: alpha"
            )

    def reward(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        linked = self._linked(logps, lengths, reference)
        return self.objective.reward(linked, lengths, torch.zeros_like(linked))

    def hard_loss(self, policy: SequenceLogps, reference: SequenceLogps) -> Tensor:
        linked = replace(
            policy,
            chosen=self._linked(policy.chosen, policy.chosen_lengths, reference.chosen),
            rejected=self._linked(policy.rejected, policy.rejected_lengths, reference.rejected),
        )
        zeros = torch.zeros_like(policy.chosen)
        return self.objective.hard_loss(linked, replace(linked, chosen=zeros, rejected=zeros))

    def _linked(self, logps: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        """g(t), which is the reward of f-DPO at beta = 1."""
        link = FDPO(beta=1.0, divergence=self.f_divergence, alpha=self.f_alpha)
        return link.reward(logps, lengths, reference)


@dataclass(frozen=True)
class LengthDesensitized(TokenLevelWrapper):
    """Length desensitization: tokens beyond the shorter response's length count ld_alpha times.

    loss:       that of the objective with z = z_shared + ld_alpha * z_beyond and r likewise, where
                shared are the first min(nw, nl) tokens of either response
    incentives: the objective's, times ld_alpha for the tokens beyond
    source:     Liu et al. 2024 (LD-DPO), arXiv:2409.06411

    Rewards are those of the objective on these sums. ld_alpha = 1 changes nothing and 0 leaves the
    tokens beyond out; lengths, of objectives that average, count all tokens, as in TRL. Weights of
    the data multiply z and r alike.
    """

    ld_alpha: float = number(0.5, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pairwise("ld_alpha", self.objective)
        if self.ld_alpha > 1:
            raise ValueError(f"ld_alpha: must be >= 0 and <= 1, got {self.ld_alpha}")

    def __call__(
        self,
        policy: TokenLogps,
        reference: TokenLogps | None = None,
        reference_point: Tensor | None = None,
    ) -> LossOutput:
        weights = ld_weights(policy.logps.detach(), policy.cu_seqlens, self.ld_alpha)
        return self.inner(policy, reference, reference_point, weights)


@dataclass(frozen=True)
class WPO(TokenLevelWrapper):
    """Weighted preference optimization: weighs each pair by how likely the policy would produce it.

    loss:       sg(omega) * L, omega = min(1, e^(gw + gl)), g the mean over a response of
                log p_i - log sum_v p_iv^2 (sampled) or of log p_i (unaligned)
    incentives: omega times the objective's
    source:     Zhou et al. 2024, Eq. 2 and the alignment by sampling, arXiv:2406.11827

    p is the policy, and p_i that of the i-th token. The alignment divides by the probability that
    a token drawn from the policy would have on average, so that responses like the policy's own
    weigh about 1. The bound of 1 is that of the authors' code; TRL 1.16 has none. Rewards are the
    objective's. An empty response has g = 0. Weights of the data do not enter omega.
    """

    wpo: Literal["sampled", "unaligned"] = choice("sampled", "unaligned")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.objective, PairwiseLoss | TokenLevelLoss):
            raise not_for("wpo", self.objective, "which is not one of pairs")
        if not self.objective.soft_labels:
            why = "whose loss of a pair depends on the rest of the batch"
            raise not_for("wpo", self.objective, why)

    @property
    def columns(self) -> tuple[str, ...]:
        inner = self.objective.columns if isinstance(self.objective, TokenLevelLoss) else ()
        return (*inner, "collision_entropy") if self.wpo == "sampled" else inner

    def __call__(
        self,
        policy: TokenLogps,
        reference: TokenLogps | None = None,
        reference_point: Tensor | None = None,
    ) -> LossOutput:
        output = self.inner(policy, reference, reference_point)
        return replace(output, loss=self.pair_weights(policy) * output.loss)

    @no_grad
    def pair_weights(self, policy: TokenLogps) -> Tensor:
        """omega of each pair, (B,), without gradient."""
        likeness = policy.logps
        if self.wpo == "sampled":
            assert policy.collision_entropy is not None
            likeness = likeness + policy.collision_entropy
        means = mean_logps(segment_sum(likeness, policy.cu_seqlens), policy.lengths)
        return (means[: policy.pairs] + means[policy.pairs :]).clamp(max=0).exp()


def ld_weights(
    logps: Tensor,  # (T,)
    cu_seqlens: Tensor,  # (2B + 1,): chosen_0 .. chosen_{B-1}, rejected_0 .. rejected_{B-1}
    ld_alpha: float,
) -> Tensor:  # (T,)
    """1 for tokens within the length of the pair's shorter response, ld_alpha beyond it.

    Only dtype, device and size of `logps` matter; the weights have its dtype.
    """
    segment_ids, positions = segment_positions(cu_seqlens, logps.numel())
    pairs = cu_seqlens.numel() // 2
    lengths = cu_seqlens.diff()
    shared = torch.minimum(lengths[:pairs], lengths[pairs:]).repeat(2)
    return torch.ones_like(logps).masked_fill(positions >= shared[segment_ids], ld_alpha)


OPTIONS = ("f_divergence", "f_alpha", "offset", "label_smoothing", "ld_alpha", "wpo")
# Values at which an option changes nothing, so that nothing is wrapped.
_OFF = {
    "f_divergence": "reverse_kl",
    "offset": 0,
    "label_smoothing": 0,
    "ld_alpha": 1,
    "wpo": False,
}


def build_with_options(objective: type[Objective], parameters: Mapping[str, Any]) -> Objective:
    """Build an objective from its parameters and `OPTIONS`; a parameter wins over an option.

    An option at a value that changes nothing (f_divergence: reverse_kl, offset: 0,
    label_smoothing: 0, ld_alpha: 1, wpo: false) is ignored; wpo: true means wpo: sampled. Raises
    ValueError, naming the parameter, for one that is unknown, out of range, or does not apply to
    the objective.
    """
    names = [field.name for field in fields(objective)]
    for parameter in parameters:
        if parameter not in names and parameter not in OPTIONS:
            accepted = ", ".join(names) or "none"
            raise ValueError(
                f"{parameter}: not a parameter of {objective.name}, which accepts {accepted}; "
                f"options of many objectives are {', '.join(OPTIONS)}"
            )
    built: Any = objective(**{name: parameters[name] for name in parameters if name in names})
    options = {
        name: value
        for name, value in parameters.items()
        if name not in names and not _is_off(name, value)
    }
    if "offset" in options:
        built = Offset(built, options["offset"])
    if "f_divergence" in options:
        divergence = {
            name: options[name] for name in ("f_divergence", "f_alpha") if name in options
        }
        built = FDivergence(built, **divergence)
    elif "f_alpha" in options:
        raise ValueError("f_alpha: it belongs to f_divergence: alpha; leave it out or set that")
    if "label_smoothing" in options:
        built = LabelSmoothing(built, options["label_smoothing"])
    if "ld_alpha" in options:
        built = LengthDesensitized(built, options["ld_alpha"])
    if "wpo" in options:
        built = WPO(built, "sampled" if options["wpo"] is True else options["wpo"])
    return built


def config_of(objective: Loss) -> dict[str, Any]:
    """The name, parameters and options that build an objective again, flat, as in a config."""
    values = {field.name: getattr(objective, field.name) for field in fields(objective)}
    inner = values.pop("objective", None)
    return {**({"name": objective.name} if inner is None else config_of(inner)), **values}


def _is_off(option: str, value: object) -> bool:
    off = _OFF.get(option)
    # To Python 0 is False and 1 True, but `label_smoothing: false` and `wpo: 0` are mistakes.
    return off is not None and value == off and isinstance(value, bool) == isinstance(off, bool)


WRAPPERS: tuple[type[PairwiseLoss] | type[TokenLevelLoss], ...] = (
    FDivergence,
    Offset,
    LabelSmoothing,
    LengthDesensitized,
    WPO,
)
