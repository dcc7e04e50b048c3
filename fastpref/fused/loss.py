"""Any objective as a module: hidden states and a head's weight in, a scalar loss out."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpref import losses, ops
from fastpref.dynamics.pair_calibration import PairCalibration
from fastpref.dynamics.reward_calibration import RewardCalibration
from fastpref.fused import validation, views
from fastpref.fused.averages import Averages
from fastpref.fused.calibration import Head, StepCalibration
from fastpref.fused.scored_tokens import ScoredTokens, autocast_operands, fused_operands
from fastpref.fused.validation import Given
from fastpref.losses import Logps, Objective, PointwiseOutput, TokenLevelLoss
from fastpref.losses.pointwise import RunningMean, sum_and_count
from fastpref.metrics import PAIR_METRICS, sums_and_counts
from fastpref.ops import IGNORE_INDEX


class FusedPreferenceLoss(nn.Module):
    """The mean loss of preference pairs, single responses or groups, without their logits.

    loss: an objective, such as `losses.build("simpo", beta=2.5)`, or the name of one.
    calibration: `RewardCalibration()`, or `PairCalibration()` with a factor for each pair, for
        objectives on pairs. Its scores are those of the head (`ops.linear_logps_and_scores`).
    accumulation_steps: training calls per optimizer step. After the last of them, the averages of
        the calibration, or the mean reward that `bco` compares with, are updated with the
        statistics of these calls on all ranks. The averages are buffers.
    impl, logit_scale, softcap: as in `ops.linear_logps`. The objective is evaluated by its kernel
        (`losses.evaluate`) where `impl` is "triton", or "auto" on a GPU, and it has one; not inside
        `torch.compile`, which makes a kernel of its PyTorch code.
    ignore_index: the label of tokens that are not scored; -100 is ignored, too.

    Sequences of pairs are ordered chosen_0 .. chosen_{B-1}, rejected_0 .. rejected_{B-1}; single
    responses come in any order, those of a group one after the other.
    """

    def __init__(
        self,
        loss: Objective | str,
        calibration: RewardCalibration | PairCalibration | None = None,
        impl: str = "auto",
        logit_scale: float = 1.0,
        softcap: float | None = None,
        ignore_index: int = IGNORE_INDEX,
        accumulation_steps: int = 1,
    ) -> None:
        super().__init__()
        objective = losses.build(loss) if isinstance(loss, str) else loss
        if not isinstance(objective, Objective):
            raise ValueError(
                f"loss: expected an objective or the name of one, got {loss!r}; "
                f"`fastpref losses` lists them"
            )
        if objective.of_rewards:
            raise ValueError(
                f"loss: {objective.name} is an objective of reward models, which have rewards in "
                f"place of log-probs; use fastpref reward, or another objective"
            )
        if objective.of_rollouts:
            raise ValueError(
                f"loss: {objective.name} learns from samples of the policy, which this loss does "
                f"not see; use fastpref rounds, fastpref.online, or another objective"
            )
        if not isinstance(calibration, RewardCalibration | PairCalibration | None):
            raise ValueError(f"calibration: expected a RewardCalibration, got {calibration!r}")
        if calibration is not None and not validation.of_pairs(objective):
            raise ValueError(
                f"calibration: {objective.name} is not an objective on pairs; leave it out"
            )
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps: must be >= 1, got {accumulation_steps}")
        self.loss: Objective = objective
        self.head_options: dict[str, Any] = {
            "logit_scale": logit_scale,
            "softcap": softcap,
            "impl": impl,
        }
        self.calibration = None
        if calibration is not None:
            self.calibration = StepCalibration(
                calibration, objective, accumulation_steps, self.head_options
            )
        self.mean_reward = None
        if validation.keeps_mean_reward(objective):
            self.mean_reward = Averages(RunningMean())
        self.accumulation_steps = accumulation_steps
        self._statistics: list[Tensor] = []  # of the calls since the last optimizer step
        self.ignore_index = ignore_index
        self.register_load_state_dict_pre_hook(_load_extra_state)

    def forward(
        self,
        hidden: Tensor,  # (S, L, D), or (T, D) with cu_seqlens
        weight: Tensor,  # (V, D)
        labels: Tensor,  # (S, L) or (T,)
        cu_seqlens: Tensor | None = None,  # (S + 1,)
        attention_mask: Tensor | None = None,  # (S, L)
        *,
        bias: Tensor | None = None,  # (V,)
        ref_logps: Tensor | None = None,  # (S,)
        ref_token_logps: Tensor | None = None,  # (S, L) or (T,)
        ref_hidden: Tensor | None = None,  # (S, L, E) or (T, E)
        ref_weight: Tensor | None = None,  # (V, E)
        ref_bias: Tensor | None = None,  # (V,)
        preference: Tensor | None = None,  # (B,)
        token_weights: Tensor | None = None,  # (S, L) or (T,)
        importance: Tensor | None = None,  # (S, L) or (T,)
        desirable: Tensor | None = None,  # (S,) bool
        reference_point: Tensor | None = None,  # ()
        cu_groups: Tensor | None = None,  # (G + 1,)
        scores: Tensor | None = None,  # (S,)
        shift: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss (), and metrics of the batch: detached tensors () by the names trainers log.

        `labels[..., t]` is the token that `hidden[..., t]` predicts, the one after position t. With
        `shift`, labels are aligned with the input ids as in Hugging Face models: `labels[..., t]`
        is the token at position t, and hidden states and labels are shifted against each other
        here. Tokens whose `attention_mask` is 0 are not scored. Values per token are aligned with
        the labels.

        The reference's log-probs are `ref_logps`, summed in nats (`ref_token_logps` of token-level
        objectives), or come from its hidden states and head, without gradient; an objective without
        a reference computes none. `preference` is a soft label per pair. The other arguments are as
        in `TokenLogps`, `UnpairedLogps` and `GroupedLogps`; each kind of objective has its own
        (`fastpref.fused.validation`). Divergences (tdpo) and collision entropies (wpo) are computed
        here.

        Only the scored tokens of a padded batch reach the head; selecting them waits for the device
        of `labels`, so leave the labels on the CPU to keep a GPU busy. In a packed batch tokens are
        selected only for token-level objectives; otherwise nothing waits, and a token labeled -100
        costs as much as a scored one. Under autocast the head multiplies in the autocast dtype, as
        a linear layer does.

        The metrics are `rewards/chosen`, `rewards/rejected`, `rewards/accuracies`,
        `rewards/margins`, and `logps/chosen`, `logps/rejected`, which are sums over tokens;
        `fastpref.metrics` says which pairs or responses each is a mean of, and it is NaN if there
        are none.

        Calibration measures the scores of the head, at a tenth of the cost of the head's forward
        and backward pass (that of a pass for token-level objectives and for `PairCalibration`), and
        on a GPU a wait for `cu_seqlens`. It acts in training mode, where gradients are enabled.

        Raises ValueError, naming the argument, for shapes that do not fit together, an argument
        that the objective needs or does not take, a reference that is missing or passed twice, and
        a bias together with a calibration or a divergence.
        """
        given: dict[str, Tensor | None] = {
            "preference": preference, "ref_logps": ref_logps, "ref_token_logps": ref_token_logps,
            "token_weights": token_weights, "importance": importance, "desirable": desirable,
            "reference_point": reference_point, "cu_groups": cu_groups, "scores": scores,
        }  # fmt: skip
        validation.check_plain(
            {"hidden": hidden, "labels": labels, "cu_seqlens": cu_seqlens,
             "attention_mask": attention_mask, "ref_hidden": ref_hidden, **given},
            {"weight": weight, "bias": bias, "ref_weight": ref_weight, "ref_bias": ref_bias},
        )  # fmt: skip
        validation.check_shapes(self.loss, hidden, labels, cu_seqlens, attention_mask)
        validation.check_given(self.loss, given, labels)
        validation.check_biases(self.loss, self.calibration is not None, bias, ref_bias)
        tokens = self._tokens(hidden, labels, cu_seqlens, attention_mask, shift)
        head = fused_operands(tokens.rows(hidden), weight, bias)
        reference_head = None
        if self.loss.needs_reference:
            validation.check_reference(
                self.loss, hidden, len(tokens.lengths), given, ref_hidden, ref_weight, ref_bias
            )
            if ref_hidden is not None and ref_weight is not None:
                reference_head = autocast_operands(tokens.rows(ref_hidden), ref_weight, ref_bias)
        given = _on_device(given, tokens, hidden.device)
        scores = None
        calibration = self.calibration if torch.is_grad_enabled() and self.training else None
        if calibration is None:
            logps = tokens.token_logps(*head, **self.head_options)
        else:
            logps, scores = calibration.token_logps(tokens, head)
        columns = self._columns(tokens, head, reference_head)
        policy = views.policy_view(self.loss, logps, tokens, given, columns)
        reference = None
        if self.loss.needs_reference:
            of_reference = self._reference_logps(tokens, reference_head, given)
            reference = views.reference_view(policy, of_reference.to(logps), tokens)
        seen = policy
        if calibration is not None:
            policy = calibration.calibrate(
                policy, reference, tokens, head, scores, self._loss_impl()
            )
        output = self._evaluate(policy, reference, tokens, given["reference_point"])
        return output.loss.mean(), self.metrics(output, seen)

    def _evaluate(
        self, policy: Logps, reference: Logps | None, tokens: ScoredTokens, point: Tensor | None
    ) -> losses.Output:
        """Evaluate the objective; in training, rewards are recorded for their mean."""
        if self.mean_reward is not None:
            # A copy, since the mean is updated in place before the backward pass.
            point = self.mean_reward.on(tokens.labels.device).mean.clone()
        output = losses.evaluate(self.loss, policy, reference, point, impl=self._loss_impl())
        if self.mean_reward is not None and torch.is_grad_enabled() and self.training:
            assert isinstance(output, PointwiseOutput)
            self._record(sum_and_count(output.rewards, tokens.lengths), self.mean_reward)
        return output

    def _loss_impl(self) -> str:
        """Implementation of the objective: its kernel where the head's ops use kernels, too."""
        if torch.compiler.is_compiling():
            return "reference"
        impl: str = self.head_options["impl"]
        if impl == "triton" and losses.has_kernel(self.loss):
            return impl
        return "auto" if impl == "auto" else "reference"

    def _columns(
        self, tokens: ScoredTokens, head: Head, reference_head: Head | None
    ) -> dict[str, Tensor]:
        """Columns (T,) of a token-level objective that are computed from the heads."""
        names = validation.token_columns(self.loss)
        columns = {}
        if "kl" in names:
            assert reference_head is not None
            hidden, weight, _ = head
            ref_hidden, ref_weight, _ = reference_head
            columns["kl"] = ops.linear_kl(
                hidden, weight, ref_hidden, ref_weight, **self.head_options
            )
        if "collision_entropy" in names:
            hidden, weight, bias = head
            columns["collision_entropy"] = ops.collision_entropy(
                hidden, weight, tokens.labels, bias=bias, **self.head_options
            )
        return columns

    @torch.no_grad()
    def _reference_logps(self, tokens: ScoredTokens, head: Head | None, given: Given) -> Tensor:
        """Log-probs of the reference: per token (T,) for token-level objectives, else sums (S,)."""
        per_token = isinstance(self.loss, TokenLevelLoss)
        if head is not None:
            compute = tokens.token_logps if per_token else tokens.logps
            return compute(*head, **self.head_options)
        ref_logps = given["ref_token_logps" if per_token else "ref_logps"]
        assert ref_logps is not None
        return ref_logps

    def _record(self, sums: Tensor, averages: Averages[RunningMean]) -> None:
        """Record a training call; after the last one of an optimizer step, update the averages."""
        self._statistics.append(sums)
        if len(self._statistics) == self.accumulation_steps:
            total = torch.stack(self._statistics).sum(0)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(total)
            averages.source.update(total)
            averages.store()
            self._statistics = []

    def averages(self) -> dict[str, Tensor]:
        """Averages of the calibration or of the rewards by name; empty without them."""
        averages = self._averages()
        return {} if averages is None else averages.values()

    def load_averages(self, averages: dict[str, Tensor]) -> None:
        """Restore a result of `averages`; raises ValueError for one of another kind of module."""
        own = self._averages()
        if own is not None:
            own.load_values(averages)
        elif averages:
            raise ValueError(
                f"averages: {self.loss.name} without a calibration has none, "
                f"got {', '.join(sorted(averages))}"
            )

    def metrics(self, output: losses.Output, policy: Logps) -> dict[str, Tensor]:
        """Means over the pairs, responses or groups of a call."""
        return _metrics(output, policy)

    def _averages(self) -> Averages[Any] | None:
        return self.mean_reward if self.calibration is None else self.calibration

    def extra_repr(self) -> str:
        return repr(self.loss)

    def _tokens(
        self,
        hidden: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        attention_mask: Tensor | None,
        shift: bool,
    ) -> ScoredTokens:
        options: dict[str, Any] = {"shift": shift, "ignore_index": self.ignore_index}
        if cu_seqlens is None:
            return ScoredTokens.padded(
                labels, hidden.device, attention_mask=attention_mask, **options
            )
        # Token-level objectives count tokens, and must not count ignored ones.
        scored_only = isinstance(self.loss, TokenLevelLoss)
        return ScoredTokens.packed(labels, cu_seqlens, scored_only=scored_only, **options)


def _load_extra_state(
    module: FusedPreferenceLoss, state: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Turn averages that a checkpoint holds as extra state into buffers."""
    averages = state.pop(f"{prefix}_extra_state", None) or {}
    part = "mean_reward" if module.calibration is None else "calibration"
    state.update({f"{prefix}{part}.{name}": value for name, value in averages.items()})


def _on_device(
    given: Given, tokens: ScoredTokens, device: torch.device
) -> dict[str, Tensor | None]:
    """The arguments on the device of the hidden states; values per token only of scored ones."""
    moved: dict[str, Tensor | None] = {}
    for name, value in given.items():
        value = None if value is None else value.to(device, non_blocking=True)
        per_token = value is not None and name in validation.PER_TOKEN
        moved[name] = tokens.column(value) if per_token else value  # type: ignore[arg-type]
    return moved


def _metrics(output: losses.Output, policy: Logps) -> dict[str, Tensor]:
    sums, counts = sums_and_counts(output, policy)
    metrics = dict(zip(PAIR_METRICS, (sums / counts).unbind(), strict=True))
    if isinstance(output, PointwiseOutput):
        # Single responses have no margins of their own, so it is the margin of the two means.
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    del metrics["loss"]
    return metrics
