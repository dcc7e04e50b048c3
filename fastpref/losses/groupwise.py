"""Objectives on groups: several scored responses to one prompt, as many as there are.

They need a reference and sum over tokens. Notation of the docstrings: a group has responses 1..N
with summed log-probs z_i under the policy and r_i under the reference, t_i = z_i - r_i, and scores;
d_i = -dL/dz_i are the incentives. softmax and mean are over the group. S is the logistic function,
LS its logarithm, and K(x) = -(LS(x) + LS(-x)) / 2 - log 2.

Memory grows with the square of the number of responses in a batch, 4 MB per matrix at 1024
responses in fp32: all responses of a group are compared with each other, and one matrix for all
groups needs neither atomics nor group sizes on the host.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from fastpref.logps import GroupedLogps, segment_mask
from fastpref.losses.base import Kind, Loss, number
from fastpref.losses.numerics import from_fair_coin
from fastpref.utils.lazy_torch import Tensor, logsigmoid, torch


@dataclass(frozen=True, eq=False)
class GroupwiseOutput:
    """Results that are never reduced: loss (G,) per group, rewards (S,) without gradient."""

    loss: Tensor
    rewards: Tensor


@dataclass(frozen=True)
class GroupwiseLoss(Loss):
    """An objective on groups; a subclass writes the share of each response in its group's loss.

    A group without responses has loss 0. An empty response has log-prob 0, an empty sum, and is a
    response like any other to the rest of its group.
    """

    kind: ClassVar[Kind] = "groupwise"
    needs_reference: ClassVar[bool] = True
    beta: float = number(0.01, above=0)

    @abstractmethod
    def response_losses(self, policy: GroupedLogps, rewards: Tensor, same: Tensor) -> Tensor:
        """The share (S,) of each response in its group's loss.

        rewards: (S,) of `rewards`. same: (S, S) bool, whether two responses are of one group.
        """

    def __call__(
        self,
        policy: GroupedLogps,
        reference: GroupedLogps | None = None,
        reference_point: Tensor | None = None,
    ) -> GroupwiseOutput:
        """Loss of each group and reward of each response.

        The reference is a constant: no gradient reaches it. Raises ValueError when it is missing
        or has another number of responses than the policy, and for a reference point.
        """
        self.check(policy, reference, reference_point)
        rewards = self.rewards(policy, reference)
        members = segment_mask(policy.cu_groups, policy.logps.numel())
        losses = self.response_losses(policy, rewards, same_group(members))
        return GroupwiseOutput(torch.where(members, losses, 0.0).sum(1), rewards.detach())

    def rewards(self, policy: GroupedLogps, reference: GroupedLogps | None) -> Tensor:
        """Reward (S,) of each response, with its gradient: beta * t."""
        assert reference is not None
        return self.beta * (policy.logps - reference.logps.detach())

    def check(
        self,
        policy: GroupedLogps,
        reference: GroupedLogps | None,
        reference_point: Tensor | None,
    ) -> None:
        """Raise ValueError for arguments that `__call__` refuses."""
        if reference is None:
            raise ValueError(
                f"reference: {self.name} needs the log-probs of a reference policy, got None; "
                f"set `reference: cached`"
            )
        if reference.logps.shape != policy.logps.shape:
            raise ValueError(
                f"reference: expected {policy.logps.numel()} responses as in the policy, got shape "
                f"{tuple(reference.logps.shape)}; pass the same batch to both models"
            )
        self.refuse_reference_point(reference_point)


@dataclass(frozen=True)
class InfoNCA(GroupwiseLoss):
    """Noise contrastive alignment by classification: cross-entropy of the rewards to the scores.

    loss:       -sum_i q_i * log p_i, p = softmax(beta * t), q = softmax(scores / tau)
    incentives: d_i = beta * (q_i - p_i)
    source:     Chen et al. 2024, arXiv:2402.05369
    use:        for several scored responses to a prompt, in place of `dpo` on their pairs; only
                differences count, so all log-probs may fall, and tau must fit the scale of the
                scores

    Rewards are beta * t. With two responses and q = (1, 0) this is `dpo`. The default of tau is
    that of the authors' code, which trains on nearly nothing but the best response; there 0.01 is
    also added to the best score, which breaks ties and is left out.
    """

    name: ClassVar[str] = "info_nca"
    tau: float = number(1e-4, above=0)

    def response_losses(self, policy: GroupedLogps, rewards: Tensor, same: Tensor) -> Tensor:
        return -_label(policy, self.tau, same) * _log_softmax(rewards, same)


@dataclass(frozen=True)
class NCA(GroupwiseLoss):
    """Noise contrastive alignment: raises good responses each on its own, all with a pull back.

    loss:       -sum_i (q_i * LS(beta * t_i) + LS(-beta * t_i) / N), q = softmax(scores / tau)
    incentives: d_i = beta * (q_i * S(-beta * t_i) - S(beta * t_i) / N)
    source:     Chen et al. 2024, arXiv:2402.05369
    use:        in place of `info_nca` where good responses should not fall; the pull back is the
                same for bad ones, and tau must fit the scale of the scores

    Rewards are beta * t. The optimum is beta * t_i = log(N * q_i). With two responses and
    q = (1, 0) this is `nca_pair`. For tau see `info_nca`.
    """

    name: ClassVar[str] = "nca"
    tau: float = number(1e-4, above=0)

    def response_losses(self, policy: GroupedLogps, rewards: Tensor, same: Tensor) -> Tensor:
        q = _label(policy, self.tau, same)
        return -q * logsigmoid(rewards) - logsigmoid(-rewards) / same.sum(1)


@dataclass(frozen=True)
class PROS(GroupwiseLoss):
    """Proximalized preference optimization of scores: likelihood by score, all rewards held close.

    loss:       -beta/N * sum_i c_i * z_i + A * sum_{i<j} K(x_i - x_j), A = 2 alpha / (N * (N + 1)),
                c_i = scores_i - mean(scores), x_i = beta * t_i, and a further x_0 = 0 for all other
                responses in the second sum
    incentives: d_i = beta * (c_i/N - A * sum_{j != i} (S(x_i - x_j) - 1/2)), j from 0
    source:     Guo et al. 2025, arXiv:2505.23316
    use:        in place of `nca` where the sizes of the scores matter and not only the best one;
                scores of a larger range than alpha allows leave no optimum

    Rewards are beta * t. An optimum exists exactly for alpha above `required_alpha`, which grows
    in proportion to the scores; the paper's own scaling of them is not known. For a single
    response c is zero, and its reward is pulled to 0. Both prefactors and the set of pairs are
    reconstructed. alpha is scaled so that N = 1 is the pull of `pro_b`; in the terms of the paper's
    Theorem 4.3 it is alpha * eta / 2, eta = N / (N + 1). The default of alpha is the paper's, and
    that of beta its best for `pro_b`.
    """

    name: ClassVar[str] = "pro_s"
    beta: float = number(0.003, above=0)
    alpha: float = number(2.5, above=0)

    def response_losses(self, policy: GroupedLogps, rewards: Tensor, same: Tensor) -> Tensor:
        n = same.sum(1)
        likelihood = -self.beta * _centered(policy.scores.to(rewards), same) * policy.logps / n
        # Each pair stands in two rows.
        among = torch.where(same, from_fair_coin(rewards[:, None] - rewards), 0.0).sum(1) / 2
        pull = among + from_fair_coin(rewards)
        return likelihood + 2 * self.alpha * pull / (n * (n + 1))

    @staticmethod
    def required_alpha(
        scores: Tensor,  # (S,)
        cu_groups: Tensor,  # (G + 1,)
    ) -> Tensor:
        """Threshold of alpha, (): every group has an optimum above it, and some group none below.

            max over subsets U of a group of (N + 1) * |sum_U c_i| / (|U| * (N + 1 - |U|))

        If the rewards of U move by x, the first sum of the loss changes by -x/N * sum_U c_i and,
        for a large |x|, the second one by alpha * |x| * |U| * (N + 1 - |U|) / (N * (N + 1)); these
        directions are the extreme ones. For each size of U the largest |sum| is that of the
        largest or of the smallest scores. Pass some hundred responses at a time.
        """
        members = segment_mask(cu_groups, scores.numel())
        centered = _centered(scores, same_group(members))
        size = members.sum(1, keepdim=True)  # N of each group, (G, 1)
        count = torch.arange(1, scores.numel() + 1, device=scores.device)  # |U|, (S,)

        def largest_sums(values: Tensor) -> Tensor:
            ranked = torch.where(members, values, -torch.inf).sort(1, descending=True).values
            return ranked.masked_fill(count > size, 0.0).cumsum(1)

        sums = torch.maximum(largest_sums(centered), largest_sums(-centered))  # (G, S)
        bounds = torch.where(count <= size, (size + 1) * sums / (count * (size + 1 - count)), 0.0)
        return torch.cat([bounds.flatten(), bounds.new_zeros(1)]).amax()


def groupwise_incentives(
    objective: GroupwiseLoss, policy: GroupedLogps, reference: GroupedLogps | None = None
) -> Tensor:
    """The scalar by which an objective scales the score of each response, (S,), by autograd.

    d = -dL/dz with L the sum over groups, so that -grad L = sum of d * s with s the gradient of a
    response's log-prob.
    """
    with torch.enable_grad():
        logps = policy.logps.detach().requires_grad_()
        loss = objective(replace(policy, logps=logps), reference).loss
        (gradient,) = torch.autograd.grad(loss.sum(), logps)
    return -gradient


def same_group(members: Tensor) -> Tensor:
    """Whether two responses are of one group, (G, S) -> (S, S) bool; true on the diagonal."""
    group = (members * torch.arange(1, len(members) + 1, device=members.device)[:, None]).sum(0)
    return group[:, None] == group


def _log_softmax(values: Tensor, same: Tensor) -> Tensor:
    """log softmax within each group, (S,) and (S, S) -> (S,)."""
    return torch.where(same, values, -torch.inf).log_softmax(1).diagonal()


def _label(policy: GroupedLogps, tau: float, same: Tensor) -> Tensor:
    """q = softmax(scores / tau) within each group, (S,)."""
    return _log_softmax(policy.scores.to(policy.logps) / tau, same).exp()


def _centered(scores: Tensor, same: Tensor) -> Tensor:
    """Scores minus the mean of their group, (S,) and (S, S) -> (S,)."""
    return scores - torch.where(same, scores, 0.0).sum(1) / same.sum(1)


OBJECTIVES: tuple[type[GroupwiseLoss], ...] = (InfoNCA, NCA, PROS)
