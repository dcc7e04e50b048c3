"""Objectives on preference pairs that look at single tokens.

They need the log-probs of a reference at the same tokens. Notation of the docstrings: at token i of
a response, t_i is its log-prob under the policy minus that under the reference, c_i its weight in
the data (`TokenLogps.weights`, 1 where there are none) and kl_i the KL divergence of the policy's
distribution from the reference's; tw, tl are sum_i c_i * t_i over the chosen and the rejected
response, Dw, Dl the sums of kl_i, and nw, nl the token counts. sg(x) is x without its gradient. S
is the logistic function and LS its logarithm. d_w = -dL/dtw and d_l = dL/dtl are the incentives.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fastpref.logps import TokenLogps, mean_logps, segment_positions, segment_sum
from fastpref.losses.base import Kind, Loss, LossOutput, choice, number
from fastpref.utils.lazy_torch import Tensor, logsigmoid, no_grad, torch

_SOURCES = {
    "kl": "the KL divergence of each token; compute it with `ops.linear_kl`",
    "importance": "the importance of each token, by gradient attribution; `lam: 0` does without",
    "collision_entropy": "-log sum_v p_v^2 of each token; `wpo: unaligned` does without",
}


@dataclass(frozen=True)
class TokenLevelLoss(Loss):
    """An objective on preference pairs that consumes log-probs per token.

    With a soft label p (`policy.preference`), and L(w, l) the hard-label loss,

        L_p = p * L(chosen, rejected) + (1 - p) * L(rejected, chosen).

    An empty response has empty sums, which are 0.
    """

    kind: ClassVar[Kind] = "pairwise"
    # False where the loss of a pair depends on the rest of the batch: then it has no reversed pair.
    soft_labels: ClassVar[bool] = True

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of `TokenLogps`, of the policy, that must not be None."""
        return ()

    @abstractmethod
    def __call__(
        self,
        policy: TokenLogps,
        reference: TokenLogps | None = None,
        reference_point: Tensor | None = None,
    ) -> LossOutput:
        """Loss and rewards of each pair.

        The reference is a constant: no gradient reaches it, and only its log-probs are read.
        Raises ValueError when a needed reference or column is missing, or has another shape, and
        for a reference point.
        """

    def check(
        self,
        policy: TokenLogps,
        reference: TokenLogps | None,
        reference_point: Tensor | None,
    ) -> None:
        """Raise ValueError for arguments that `__call__` refuses."""
        for column in self.columns:
            if getattr(policy, column) is None:
                raise ValueError(f"{column}: {self.name} needs {_SOURCES[column]}")
        if self.needs_reference and reference is None:
            raise ValueError(
                f"reference: {self.name} needs the log-probs of a reference policy, got None; "
                f"pass those of the same tokens"
            )
        if reference is not None and reference.logps.shape != policy.logps.shape:
            raise ValueError(
                f"reference: expected {policy.logps.numel()} tokens as in the policy, got shape "
                f"{tuple(reference.logps.shape)}; pass the same batch to both models"
            )
        self.refuse_reference_point(reference_point)


@dataclass(frozen=True)
class TokenRatioLoss(TokenLevelLoss):
    """A token-level objective with reward beta * t, on a few statistics of each response.

    A subclass writes two methods: `statistics`, of which the first row is t, and `hard_loss`.
    """

    needs_reference: ClassVar[bool] = True
    beta: float = number(0.1, above=0)

    @abstractmethod
    def statistics(self, policy: TokenLogps, log_ratios: Tensor) -> Tensor:
        """K numbers of each response, (K, 2B), from the log-ratios t_i of the tokens, (T,)."""

    @abstractmethod
    def hard_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The loss (B,) of pairs whose first response is better, from statistics (K, B)."""

    def __call__(
        self,
        policy: TokenLogps,
        reference: TokenLogps | None = None,
        reference_point: Tensor | None = None,
    ) -> LossOutput:
        self.check(policy, reference, reference_point)
        return self._output(policy, self.statistics(policy, self._log_ratios(policy, reference)))

    def _log_ratios(self, policy: TokenLogps, reference: TokenLogps | None) -> Tensor:
        assert reference is not None
        return policy.logps - reference.logps.detach()

    def _output(self, policy: TokenLogps, statistics: Tensor) -> LossOutput:
        chosen, rejected = statistics[:, : policy.pairs], statistics[:, policy.pairs :]
        loss = self.hard_loss(chosen, rejected)
        if policy.preference is not None:
            p = policy.preference
            loss = p * loss + (1 - p) * self.hard_loss(rejected, chosen)
        rewards = self.beta * statistics[0].detach()
        return LossOutput(loss, rewards[: policy.pairs], rewards[policy.pairs :])


@dataclass(frozen=True)
class TDPO1(TokenRatioLoss):
    """Token-level DPO, first form: DPO minus the difference of the two sequential KL divergences.

    loss:       -LS(beta * v), v = tw - tl - (Dl - Dw)
    incentives: d_w = d_l = beta * S(-beta * v); Dw and Dl have a gradient of their own,
                dL/dDl = -dL/dDw = beta * S(-beta * v)
    source:     Zeng et al. 2024, arXiv:2404.11999
    use:        in place of `dpo` where rejected responses drift away from the reference and variety
                matters; it also raises the divergence of chosen responses, and every step needs the
                reference's hidden states

    Rewards are beta * t; those of the authors' code are beta * (t + D). Weights of the data
    multiply t_i, not kl_i.
    """

    name: ClassVar[str] = "tdpo1"
    columns: ClassVar[tuple[str, ...]] = ("kl",)

    def statistics(self, policy: TokenLogps, log_ratios: Tensor) -> Tensor:
        assert policy.kl is not None
        t = segment_sum(_weighted(policy, log_ratios), policy.cu_seqlens)
        return torch.stack([t, segment_sum(policy.kl, policy.cu_seqlens)])

    def hard_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        (tw, dw), (tl, dl) = chosen, rejected
        return -logsigmoid(self.beta * (tw - tl - (dl - dw)))


@dataclass(frozen=True)
class TDPO2(TDPO1):
    """Token-level DPO, second form: weighs the KL term and holds that of the chosen response fixed.

    loss:       -LS(beta * v), v = tw - tl - alpha * (Dl - sg(Dw))
    incentives: d_w = d_l = beta * S(-beta * v); dL/dDl = alpha * beta * S(-beta * v)
    source:     Zeng et al. 2024, arXiv:2404.11999
    use:        in place of `tdpo1` as a rule: it holds the divergence of rejected responses down
                and leaves that of chosen ones; alpha must be tuned, and every step needs the
                reference's hidden states

    Rewards are beta * t; those of the authors' code are beta * (t + D). alpha = 0 is `dpo`. Under a
    soft label each order of the pair holds the divergence of its own first response fixed.
    """

    name: ClassVar[str] = "tdpo2"
    alpha: float = number(0.5, at_least=0)

    def hard_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        (tw, dw), (tl, dl) = chosen, rejected
        return -logsigmoid(self.beta * (tw - tl - self.alpha * (dl - dw.detach())))


@dataclass(frozen=True, eq=False)
class TokenAnchors:
    """Log-ratios of one response per pair that the policy itself has sampled, for `ti_dpo`.

    log_ratios: (A,) log-prob of each token under the policy minus that under the reference.
    cu_seqlens: (B + 1,) int32 or int64 offsets of the B anchors, as in `TokenLogps`.
    """

    log_ratios: Tensor
    cu_seqlens: Tensor


@dataclass(frozen=True)
class TIDPO(TokenRatioLoss):
    """Token-importance DPO: DPO on log-ratios weighted token by token, with a triplet term.

    loss:       -LS(beta * (Tw - Tl)) + gamma * max(0, Aw - Al + margin), T = sum_i W_i * c_i * t_i;
                W = n * (lam * I / sum(I) + (1 - lam) * P / sum(P)), constant; A the squared
                distance sum_i (a_i - t_i)^2 to an anchor of log-ratios a
    incentives: d_w = d_l = beta * S(-beta * (Tw - Tl)) on the weighted sums Tw, Tl, plus the
                triplet's
    source:     Yang et al. 2025, arXiv:2505.19653
    use:        in place of `dpo` where few tokens of a response decide; importance costs another
                backward pass and measures what moves the largest logit, not what was preferred.
                `fastpref train` has the weights of the paper without its triplet term

    I is the importance of a token, P(i) = exp(-((i - (n - 1)/2) / (n/4))^2 / 2) a prior on its
    place i = 0 .. n - 1, and both are brought to mean 1 in each response, so that constant W is
    `dpo`. The paper mixes an I of sum 1 with an unnormalized P; its authors' release has the mean
    of 1 and differs in the width of P, n/8, in lam 0.2, beta 0.2, and in a base of `tdpo2`.
    lam = 0 needs no importance; where all of a response's are 0 they count as equal.

    weights="one_minus_p" is the form of the code released for arXiv:2604.18239 under this name:
    a weighted average, T = sum_i w_i * c_i * t_i / sum_i w_i with w_i = 1 - p_i constant and p_i
    the policy's probability of the token, without importance or prior.

    Rewards are beta * T. The triplet term compares token by token from the start of the responses;
    beyond the end of one, its log-ratio counts as 0, a choice made here. It needs one response per
    pair that the policy samples in the step itself. `fastpref train` does not sample, so gamma is 0
    and a config with another gamma is refused; a loop of your own passes the samples as `anchors`.
    The paper has gamma 0.1 and no value of the margin, which is that of the release, where gamma
    too is 0.001.
    """

    name: ClassVar[str] = "ti_dpo"
    lam: float = number(0.7, at_least=0)
    weights: Literal["hybrid", "one_minus_p"] = choice("hybrid", "one_minus_p")
    gamma: float = number(0.0, at_least=0)
    margin: float = number(1e-3, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lam > 1:
            raise ValueError(f"lam: must be >= 0 and <= 1, got {self.lam}")
        if self.weights == "one_minus_p" and self.lam != 0.7:
            raise ValueError("lam: one_minus_p has none; leave it out or set weights: hybrid")
        if self.gamma == 0 and self.margin != 1e-3:
            raise ValueError("margin: gamma = 0 leaves its term out; leave it out or set gamma")

    @property
    def columns(self) -> tuple[str, ...]:
        return ("importance",) if self.weights == "hybrid" and self.lam > 0 else ()

    def __call__(
        self,
        policy: TokenLogps,
        reference: TokenLogps | None = None,
        reference_point: Tensor | None = None,
        *,
        anchors: TokenAnchors | None = None,
    ) -> LossOutput:
        """Loss and rewards of each pair, as in every token-level objective.

        The anchors are needed with gamma > 0, refused otherwise, and may carry a gradient. Raises
        ValueError when they are missing, not needed or of another number of pairs.
        """
        self.check(policy, reference, reference_point)
        log_ratios = self._log_ratios(policy, reference)
        statistics = self.statistics(policy, log_ratios)
        if self.gamma == 0 and anchors is not None:
            raise ValueError("anchors: gamma = 0 leaves them out; leave them out or set gamma")
        if self.gamma > 0:
            statistics = torch.cat([statistics, self._distances(policy, log_ratios, anchors)[None]])
        return self._output(policy, statistics)

    def statistics(self, policy: TokenLogps, log_ratios: Tensor) -> Tensor:
        weighted = self.token_weights(policy) * _weighted(policy, log_ratios)
        return segment_sum(weighted, policy.cu_seqlens)[None]

    def hard_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        loss = -logsigmoid(self.beta * (chosen[0] - rejected[0]))
        if self.gamma == 0:
            return loss
        return loss + self.gamma * (chosen[1] - rejected[1] + self.margin).relu()

    @no_grad
    def token_weights(self, policy: TokenLogps) -> Tensor:
        """W of each token, (T,), those of the data left out; no gradient."""
        if self.weights == "one_minus_p":
            return _shares(-torch.expm1(policy.logps), policy)
        segment_ids, positions = segment_positions(policy.cu_seqlens, policy.logps.numel())
        n = policy.lengths.to(policy.logps)[segment_ids]
        prior = torch.exp(-(((positions - (n - 1) / 2) / (n / 4)).square()) / 2)
        weights = (1 - self.lam) * _shares(prior, policy)
        if self.lam > 0:
            assert policy.importance is not None
            weights = weights + self.lam * _shares(policy.importance.to(prior), policy)
        return n * weights

    def _distances(
        self, policy: TokenLogps, log_ratios: Tensor, anchors: TokenAnchors | None
    ) -> Tensor:
        """Squared distance of each response's log-ratios from those of its pair's anchor, (2B,)."""
        if anchors is None or anchors.cu_seqlens.shape != (policy.pairs + 1,):
            got = "None" if anchors is None else f"{len(anchors.cu_seqlens) - 1}"
            raise ValueError(
                f"anchors: gamma > 0 needs one per pair, {policy.pairs}, got {got}; sample a "
                f"response of the policy to each prompt, or leave gamma at 0"
            )
        segment_ids, positions = segment_positions(policy.cu_seqlens, log_ratios.numel())
        pairs = torch.arange(2 * policy.pairs, device=segment_ids.device) % max(policy.pairs, 1)
        offsets = anchors.cu_seqlens.long()
        aligned = offsets[pairs[segment_ids]] + positions
        # The log-ratio that a token beyond the anchor's end is compared with.
        end = anchors.log_ratios.new_zeros(1)
        aligned = aligned.where(
            aligned < offsets[pairs[segment_ids] + 1], anchors.log_ratios.numel()
        )
        gaps = log_ratios - torch.cat([anchors.log_ratios, end])[aligned]
        within = segment_sum(gaps.square(), policy.cu_seqlens)
        segment_ids, positions = segment_positions(offsets, anchors.log_ratios.numel())
        beyond = [
            segment_sum(anchors.log_ratios.square() * (positions >= lengths[segment_ids]), offsets)
            for lengths in (policy.lengths[: policy.pairs], policy.lengths[policy.pairs :])
        ]
        return within + torch.cat(beyond)


def token_incentives(
    objective: TokenLevelLoss, policy: TokenLogps, reference: TokenLogps | None = None
) -> Tensor:
    """The scalar by which an objective scales the score of each token, (T,), by autograd.

    It is -dL/dlogps: d_w times the weight of a token in a chosen response, and -d_l times it in a
    rejected one. The gradient through `policy.kl` is not part of it.
    """
    with torch.enable_grad():
        logps = policy.logps.detach().requires_grad_()
        loss = objective(replace(policy.detach(), logps=logps), reference).loss
        (gradient,) = torch.autograd.grad(loss.sum(), logps)
    return -gradient


def token_pair_incentives(
    objective: TokenLevelLoss, policy: TokenLogps, reference: TokenLogps | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`token_incentives` as two scalars per pair and a weight per token: d_w, d_l (B,), W (T,).

    d_w is the mean of -dL/dlogps over the chosen tokens, d_l that of dL/dlogps over the rejected
    ones, and the incentives of the tokens are d_w * W and -d_l * W, so that W has mean 1 in each
    response. For an empty response d is 0. Where d is 0, W is 1, although single tokens may have
    incentives that cancel: these are lost.
    """
    incentives = token_incentives(objective, policy, reference)
    means = mean_logps(segment_sum(incentives, policy.cu_seqlens), policy.lengths)
    segment_ids, _ = segment_positions(policy.cu_seqlens, incentives.numel())
    weights = torch.where(means[segment_ids] == 0, 1.0, incentives / means[segment_ids])
    return means[: policy.pairs], -means[policy.pairs :], weights


def _weighted(policy: TokenLogps, values: Tensor) -> Tensor:
    """Values (T,) times the weights of the data."""
    return values if policy.weights is None else policy.weights * values


def _shares(values: Tensor, policy: TokenLogps) -> Tensor:
    """Values >= 0 over their sum within each response, (T,) -> (T,); equal where all are 0."""
    segment_ids, _ = segment_positions(policy.cu_seqlens, values.numel())
    totals = segment_sum(values, policy.cu_seqlens)[segment_ids]
    return torch.where(totals > 0, values / totals, 1 / policy.lengths.to(values)[segment_ids])


OBJECTIVES: tuple[type[TokenLevelLoss], ...] = (TDPO1, TDPO2, TIDPO)
