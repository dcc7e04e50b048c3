"""Replacements of the preference losses of liger-kernel 0.8: same arguments, same results.

`FusedLinearXLoss` takes the constructor and call arguments of liger's `LigerFusedLinearXLoss` and
returns its `(loss, aux)`, whose numbers are not always those of the papers:

    nll            -sum of the chosen token log-probs / their number in the batch
    logits mean    over all positions, ignored ones included
    CPO, SimPO     label smoothing e: -(1 - e) * LS(u) - e * LS(-u), u with gamma on both sides
    ORPO           nll - beta * LS(odds), the odds of mean log-probs; rewards beta * a
    KTO            no clamp of kl at 0, no weights; everything in aux is a sum over the batch

The sum of all logits is (sum of hidden) . (sum of the head's rows), so no logit is computed for it.
`aux` carries no gradient. `compiled` and `chunk_size` are accepted and ignored.

Where liger has NaN, a response without scored tokens has mean log-prob 0, a batch without chosen
tokens nll 0, and certain tokens (a = 0) finite odds in ORPO. Options that liger would ignore are
refused. LS is the logarithm of the logistic function, a is a mean log-prob.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from fastpref import losses
from fastpref.fused.scored_tokens import ScoredTokens
from fastpref.logps import SequenceLogps, mean_logps
from fastpref.losses.normalized import ODDS_LIMIT
from fastpref.losses.numerics import log1mexp
from fastpref.ops import IGNORE_INDEX

Aux = tuple[Tensor, ...]

# The values of `loss_type` in liger's DPO; all but "sigmoid" are names of objectives here.
_LOSS_TYPES = (
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "discopop",
)  # fmt: skip


class _Sequences(NamedTuple):  # each (S,)
    logps: Tensor  # sums, or means over the scored tokens
    sums: Tensor
    lengths: Tensor


class _FusedLinearLoss(nn.Module):
    """Base of the losses: log-probs of sequences, and sums of logits."""

    def __init__(
        self, ignore_index: int, beta: float, compiled: bool, average: bool, chunk_size: int
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compiled = compiled
        self.average_log_prob = average
        self.chunk_size = chunk_size

    def _sequences(
        self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None
    ) -> _Sequences:
        shape = tuple(hidden.shape)
        if len(shape) != 3:
            raise ValueError(f"_input: expected shape (S, L, D), got {shape}")
        if target.shape != shape[:2]:
            raise ValueError(f"target: expected shape {shape[:2]}, got {tuple(target.shape)}")
        tokens = ScoredTokens.padded(target, hidden.device, ignore_index=self.ignore_index)
        sums = tokens.logps(tokens.rows(hidden), weight, bias)
        logps = mean_logps(sums, tokens.lengths) if self.average_log_prob else sums
        return _Sequences(logps, sums, tokens.lengths)

    @torch.no_grad()
    def _reference(
        self,
        hidden: Tensor,
        target: Tensor,
        ref_input: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        used: bool,
    ) -> Tensor | None:
        """The reference's log-probs, or None without one."""
        if (ref_input is not None, ref_weight is not None) != (used, used):
            raise ValueError(
                f"ref_input: expected ref_input and ref_weight where use_ref_model is True and "
                f"neither where it is False, got use_ref_model={used}"
            )
        if ref_input is None or ref_weight is None:
            return None
        if ref_input.shape[:2] != hidden.shape[:2]:
            expected = (*hidden.shape[:2], "E")
            raise ValueError(f"ref_input: expected {expected}, got {tuple(ref_input.shape)}")
        return self._sequences(ref_input, ref_weight, target, ref_bias).logps


class _PairLoss(_FusedLinearLoss):
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
        of_logits = _sums_of_logits(hidden, weight, bias) / (pairs * hidden.shape[1] * len(weight))
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
            raise ValueError(f"loss_type: expected one of {expected}, got {loss_type!r}")
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


class FusedLinearKTOLoss(_FusedLinearLoss):
    """KTO, as `liger_kernel.chunked_loss.LigerFusedLinearKTOLoss`.

    kl is one number, () or (1,), for all responses. aux: sums over the desirable and over the other
    responses of the log-probs, of all logits, and of the rewards.
    """

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(ignore_index, beta, compiled, average_log_prob, chunk_size)
        self.use_ref_model = use_ref_model

    def forward(
        self,
        _input: Tensor,  # (S, L, D)
        lin_weight: Tensor,  # (V, D)
        target: Tensor,  # (S, L)
        bias: Tensor | None = None,  # (V,)
        preference_labels: Tensor | None = None,  # (S,) bool
        ref_input: Tensor | None = None,  # (S, L, E)
        ref_weight: Tensor | None = None,  # (V, E)
        ref_bias: Tensor | None = None,  # (V,)
        kl: Tensor | None = None,  # () or (1,)
    ) -> tuple[Tensor, Aux]:
        desirable = preference_labels
        if desirable is None or desirable.dtype != torch.bool or len(desirable) != len(_input):
            raise ValueError(
                f"preference_labels: expected bool of shape ({len(_input)},), got {desirable!r}"
            )
        if kl is not None and kl.numel() != 1:
            raise ValueError(f"kl: expected one number, got shape {tuple(kl.shape)}; take its mean")
        logps = self._sequences(_input, lin_weight, target, bias).logps
        reference = self._reference(
            _input, target, ref_input, ref_weight, ref_bias, self.use_ref_model
        )
        log_ratios = logps if reference is None else logps - reference
        shifted = log_ratios if kl is None else log_ratios - kl.detach().reshape(())
        signed = torch.where(desirable, self.beta * shifted, -self.beta * shifted)
        logits = _sums_of_logits(_input, lin_weight, bias)
        sums = [_split_sum(x, desirable) for x in (logps, logits, self.beta * log_ratios)]
        aux = tuple(x.detach().to(logps.dtype) for pair in sums for x in pair)
        return (-signed).sigmoid().mean(), aux


def _split_sum(values: Tensor, desirable: Tensor) -> tuple[Tensor, Tensor]:
    """Sums () over the desirable and over the other responses."""
    return torch.where(desirable, values, 0.0).sum(), torch.where(desirable, 0.0, values).sum()


@torch.no_grad()
def _sums_of_logits(
    hidden: Tensor,  # (S, L, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
) -> Tensor:  # (S,) float64
    """Sum of the logits over all positions of a sequence: (sum of hidden) . (sum of rows)."""
    sums = hidden.sum(1, dtype=torch.float64) @ weight.sum(0, dtype=torch.float64)
    return sums if bias is None else sums + hidden.shape[1] * bias.sum(dtype=torch.float64)
