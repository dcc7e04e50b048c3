"""Options of objectives on rollouts: samples with the log-probs of the policy that drew them.

`fastpref rounds` alone trains with them. Their formulas are those of the classes of the same names
in `fastpref.online`, which take the tokens of the samples. Notation of the docstrings: pi, pi_old
and pi_ref are the probabilities of a token under the policy, the policy at the start of the round
and the reference; rho = pi / pi_old; R is the reward of a response, N their number for a prompt;
clip(rho) is rho within 1 - clip and 1 + clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NoReturn

from fastpref.logps import GroupedLogps
from fastpref.losses.base import choice, number
from fastpref.losses.groupwise import GroupwiseLoss
from fastpref.utils.lazy_torch import Tensor

_check_positive = number(1.0, above=0).metadata["check"]


def refusal(name: str) -> str:
    """Message about a call of an objective on rollouts."""
    return (
        f"objective: {name} learns from rollouts, not from log-probs of a data set; use fastpref "
        "rounds or fastpref.online"
    )


@dataclass(frozen=True)
class RolloutLoss(GroupwiseLoss):
    """Base of the objectives on rollouts, which are options alone: a call raises ValueError."""

    of_rollouts: ClassVar[bool] = True

    def check(
        self,
        policy: GroupedLogps,
        reference: GroupedLogps | None,
        reference_point: Tensor | None,
    ) -> NoReturn:
        raise ValueError(refusal(self.name))

    def response_losses(self, policy: GroupedLogps, rewards: Tensor, same: Tensor) -> Tensor:
        self.check(policy, None, None)


@dataclass(frozen=True)
class PPOOptions(RolloutLoss):
    """PPO: clipped policy gradient by token, with a learned value of each token as the baseline.

    loss:       mean_t [max(-A_t * rho_t, -A_t * clip(rho_t)) + value_coef * V_t], A by GAE
                (gamma, lam) and whitened over the round, V_t = max((v - G)^2, (v' - G)^2) / 2 with
                the return G and v' the value within value_clip of that at the start of the round
    incentives: of token t in proportion to A_t * rho_t, and 0 beyond the clipping
    source:     Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019, arXiv:1909.08593
    use:        on the policy's own samples, in rounds of several steps, where a baseline by token
                is worth a value head; the reference must be the model at the start,
                `rounds.reference: start`

    The reward of a token is -kl_coef * log(pi_old / pi_ref), and that of the last one also has R.
    The value is a linear map of the hidden states, which it does not change; value_lr is the
    learning rate of its own Adam, the same in all steps. Defaults are TRL's, but for value_lr.
    """

    name: ClassVar[str] = "ppo"
    beta: ClassVar[float] = 1.0  # type: ignore[misc]
    kl_coef: float = number(0.05, at_least=0)
    clip: float = number(0.2, above=0)
    value_clip: float = number(0.2, above=0)
    value_coef: float = number(0.1, at_least=0)
    gamma: float = number(1.0, at_least=0, at_most=1)
    lam: float = number(0.95, at_least=0, at_most=1)
    whiten_advantages: bool = choice(True, False)
    value_lr: float = number(1e-3, above=0)

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return self.kl_coef > 0


@dataclass(frozen=True)
class GRPOOptions(RolloutLoss):
    """GRPO: clipped policy gradient by token, against the other samples of the prompt.

    loss:       1/N * sum_i mean_t [max(-A_i * rho_t, -A_i * clip(rho_t)) + beta * k_t],
                A_i = (R_i - mean(R)) / std(R), k = exp(-d) + d - 1, d = log(pi / pi_ref)
    incentives: of token t in proportion to A_i * rho_t - beta * (1 - exp(-d_t)), and without the
                first term beyond the clipping
    source:     Shao et al. 2024, Eq. 3 and 4, arXiv:2402.03300; Dr. GRPO: Liu et al. 2025,
                arXiv:2503.20783
    use:        on the policy's own samples, in rounds of several steps, in place of `ppo` where a
                prompt has several samples; `gspo` has one ratio for a whole response

    clip_high is clip unless it is set. scale_rewards is the standard deviation that divides: of the
    "group", of the "batch" of a round, or "none". max_tokens divides the sum over the tokens of a
    response, in place of its length. Dr. GRPO is scale_rewards="none" with max_tokens and beta=0.
    A prompt whose samples have equal rewards has advantages 0. The estimate k of the KL divergence
    does not have the optimum of a KL penalty in the reward, see `fastpref.online`.
    """

    name: ClassVar[str] = "grpo"
    beta: float = number(0.04, at_least=0)
    clip: float = number(0.2, above=0)
    clip_high: float | None = None
    scale_rewards: Literal["group", "batch", "none"] = choice("group", "batch", "none")
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("clip_high", "max_tokens"):
            if getattr(self, option) is not None:
                _check_positive(option, getattr(self, option))

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return self.beta > 0


@dataclass(frozen=True)
class DistillationOptions(RolloutLoss):
    """On-policy distillation: the distributions of a larger model, on samples of the policy.

    loss:       mean_t D(p, q), p and q the distributions of the token under teacher and policy:
                D = KL(q || p) for "reverse_kl", KL(p || q) for "forward_kl", and for "jsd"
                beta * KL(p || m) + (1 - beta) * KL(q || m), m = beta * p + (1 - beta) * q
    incentives: none, the loss looks at whole distributions
    source:     Agarwal et al. 2024, arXiv:2306.13649; reverse_kl: Gu et al. 2024, arXiv:2306.08543
    use:        with a larger model that has the same tokens, in place of rewards; "reverse_kl"
                learns to avoid what the teacher would not say

    teacher is a folder or a Hub name of a model with the same tokenizer, and temperature divides
    the logits of both models. The mean is over all tokens of a step. The gradient does not go
    through the sampling.
    """

    name: ClassVar[str] = "distillation"
    needs_reference: ClassVar[bool] = False
    teacher: str | None = None
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = choice(
        "reverse_kl", "forward_kl", "jsd"
    )
    beta: float = number(0.5, above=0, below=1)
    temperature: float = number(1.0, above=0)


OBJECTIVES: tuple[type[RolloutLoss], ...] = (PPOOptions, GRPOOptions, DistillationOptions)
