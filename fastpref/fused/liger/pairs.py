"""DPO, CPO, SimPO and ORPO as in liger-kernel: losses of pairs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref import losses
from fastpref.fused.liger.base import Aux, FusedLinearLoss, sums_of_logits
from fastpref.logps import SequenceLogps
from fastpref.losses.normalized import ODDS_LIMIT
from fastpref.losses.numerics import log1mexp
from fastpref.ops import IGNORE_INDEX

# The values of `loss_type` in liger's DPO; all but "sigmoid" are names of objectives here.
_LOSS_TYPES = (
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "discopop",
)  # fmt: skip


class _PairLoss(FusedLinearLoss):
    """A loss of B pairs, chosen_0 .. chosen_{B-1}, rejected_0 .. rejected_{B-1}."""

    def __init__(
        self,
        ignore_index: int,
        beta: float,
        alpha: float,
        compute_nll_loss: bool,
        compiled: bool,
        average: bool,
        chunk_size: int,
    ) -> None:
        super().__init__(ignore_index, beta, compiled, average, chunk_size)
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss

    def _pair_loss(
        self, chosen: Tensor, rejected: Tensor, reference: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Aux]:
        """Losses (B,) from log-probs (B,), and the entries of aux after nll."""
        raise NotImplementedError

    def _forward(
        self,
        weight: Tensor,
        hidden: Tensor,
        target: Tensor,
        bias: Tensor | None,
        reference: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, Aux]:
        if len(hidden) == 0 or len(hidden) % 2:
            raise ValueError(f"_input: expected 2B sequences, chosen first, got {len(hidden)}")
        pairs = len(hidden) // 2
        sequences = self._sequences(hidden, weight, target, bias)
        chosen, rejected = sequences.logps.chunk(2)
        nll = chosen.new_zeros(())
        if self.compute_nll_loss:
            scored = sequences
            if nll_target is not None:
                scored = self._sequences(hidden[:pairs], weight, nll_target[:pairs], bias)
            nll = -scored.sums[:pairs].sum() / scored.lengths[:pairs].sum().clamp(min=1)
        ref_pair = None if reference is None else (reference[:pairs], reference[pairs:])
        pair_losses, extra = self._pair_loss(chosen, rejected, ref_pair)
        of_logits = sums_of_logits(hidden, weight, bias) / (pairs * hidden.shape[1] * len(weight))
        logits = of_logits.view(2, pairs).sum(1)
        aux = (chosen, rejected, *logits.to(nll.dtype), nll, *extra)
        return pair_losses.mean() + self.alpha * nll, tuple(x.detach() for x in aux)


class FusedLinearDPOLoss(_PairLoss):
    """DPO and its relatives, as `liger_kernel.chunked_loss.LigerFusedLinearDPOLoss`.

    loss_type: sigmoid, hinge, exo_pair, nca_pair, robust, bco_pair, sppo_hard, apo_zero, apo_down
        or discopop. label_smoothing is for exo_pair and robust; liger ignores it elsewhere.

    Without a reference model its log-probs count as 0. aux: chosen_logps, rejected_logps,
    chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards, rejected_rewards.
    Raises ValueError, naming the argument, for an option that does not apply.
    """

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__(
            ignore_index, beta, alpha, compute_nll_loss, compiled, average_log_prob, chunk_size
        )
        if loss_type not in _LOSS_TYPES:
            expected = ", ".join(_LOSS_TYPES)
            raise ValueError(
                f"Unsupported loss_type: expected one of {expected}, got {loss_type!r}"
            )
        options: dict[str, dict[str, float]] = {
            "exo_pair": {"label_smoothing": label_smoothing},
            "robust": {"label_smoothing": label_smoothing},
            "discopop": {"tau": discopop_tau},
        }
        parameters = options.get(loss_type, {})
        if label_smoothing and "label_smoothing" not in parameters:
            raise ValueError(
                f"label_smoothing: {loss_type} has none, got {label_smoothing}; set it to 0.0, or "
                f"use FusedPreferenceLoss with 'cdpo'"
            )
        # In the words of liger-kernel, which callers may look for.
        if loss_type == "exo_pair" and not 0 < label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing must be > 0 for loss_type='exo_pair', and < 0.5, "
                f"got {label_smoothing}; the paper recommends 1e-3"
            )
        if loss_type == "robust" and not 0 <= label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing must lie in [0.0, 0.5) for loss_type='robust', "
                f"got {label_smoothing}"
            )
        self.use_ref_model = use_ref_model
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau
        name = "dpo" if loss_type == "sigmoid" else loss_type
        objective = losses.build(name, beta=beta, **parameters)
        assert isinstance(objective, losses.PairwiseLoss)
        self.objective = objective

    def forward(
        self,
        lin_weight: Tensor,  # (V, D)
        _input: Tensor,  # (2B, L, D)
        target: Tensor,  # (2B, L)
        bias: Tensor | None = None,  # (V,)
        ref_input: Tensor | None = None,  # (2B, L, E)
        ref_weight: Tensor | None = None,  # (V, E)
        ref_bias: Tensor | None = None,  # (V,)
    ) -> tuple[Tensor, Aux]:
        reference = self._reference(
            _input, target, ref_input, ref_weight, ref_bias, self.use_ref_model
        )
        return self._forward(lin_weight, _input, target, bias, reference)

    def _pair_loss(
        self, chosen: Tensor, rejected: Tensor, reference: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Aux]:
        # These objectives do not read lengths, so averages may be passed in place of sums.
        count, zero = torch.ones_like(chosen), torch.zeros_like(chosen)
        output = self.objective(
            SequenceLogps(chosen, rejected, count, count),
            SequenceLogps(*(reference or (zero, zero)), count, count),
        )
        return output.loss, (output.chosen_rewards, output.rejected_rewards)


class _SmoothedPairLoss(_PairLoss):
    """-(1 - e) * LS(u) - e * LS(-u), u = beta * (chosen - rejected) - gamma, e the smoothing."""

    gamma = 0.0
    label_smoothing = 0.0

    def forward(
        self,
        lin_weight: Tensor,  # (V, D)
        _input: Tensor,  # (2B, L, D)
        target: Tensor,  # (2B, L)
        bias: Tensor | None = None,  # (V,)
    ) -> tuple[Tensor, Aux]:
        return self._forward(lin_weight, _input, target, bias)

    def _pair_loss(
        self, chosen: Tensor, rejected: Tensor, reference: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Aux]:
        u = self.beta * (chosen - rejected) - self.gamma
        e = self.label_smoothing
        loss = -(1 - e) * logsigmoid(u) - e * logsigmoid(-u)
        return loss, (self.beta * chosen, self.beta * rejected)


class FusedLinearCPOLoss(_SmoothedPairLoss):
    """CPO, as `liger_kernel.chunked_loss.LigerFusedLinearCPOLoss`.

    The nll is a mean over the chosen tokens of the batch, weighed by alpha; the paper sums it over
    each response (`losses.build("cpo")`). aux as in `FusedLinearDPOLoss`.
    """

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(
            ignore_index, beta, alpha, compute_nll_loss, compiled, average_log_prob, chunk_size
        )
        self.label_smoothing = label_smoothing


class FusedLinearSimPOLoss(_SmoothedPairLoss):
    """SimPO, as `liger_kernel.chunked_loss.LigerFusedLinearSimPOLoss`, with nll by default.

    gamma is the margin as in `losses.build("simpo")`. aux as in `FusedLinearDPOLoss`.
    """

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, beta, alpha, compute_nll_loss, compiled, True, chunk_size)
        self.label_smoothing = label_smoothing
        self.gamma = gamma


class FusedLinearORPOLoss(_PairLoss):
    """ORPO, as `liger_kernel.chunked_loss.LigerFusedLinearORPOLoss`.

    aux as in `FusedLinearDPOLoss`, then the batch means of LS(odds) and of the log-odds.
    """

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, beta, 1.0, compute_nll_loss, compiled, True, chunk_size)

    def forward(
        self,
        lin_weight: Tensor,  # (V, D)
        _input: Tensor,  # (2B, L, D)
        target: Tensor,  # (2B, L)
        bias: Tensor | None = None,  # (V,)
        nll_target: Tensor | None = None,  # (2B, L), of which the chosen half counts
    ) -> tuple[Tensor, Aux]:
        if nll_target is not None and not self.compute_nll_loss:
            raise ValueError("nll_target: compute_nll_loss is False; leave it out")
        return self._forward(lin_weight, _input, target, bias, nll_target=nll_target)

    def _pair_loss(
        self, chosen: Tensor, rejected: Tensor, reference: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Aux]:
        odds = chosen - rejected - log1mexp(chosen, ODDS_LIMIT) + log1mexp(rejected, ODDS_LIMIT)
        ratio = logsigmoid(odds)
        rewards = self.beta * chosen, self.beta * rejected
        return -self.beta * ratio, (*rewards, ratio.mean(), odds.mean())
