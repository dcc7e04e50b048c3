"""Cross entropy of a head's logits as in liger-kernel: label smoothing, class weights, z-loss.

    nll      -c[y] log p[y]
    smooth   -(e / V) sum_v c[v] log p[v]                    e the label smoothing
    z_loss   s lse^2                                         s = lse_square_scale
    loss     (1 - e) nll + smooth, reduced, + z_loss, reduced

with c the class weights, 1 without `ce_weight`. "mean" divides nll and smooth by the sum of c over
the scored labels, and z_loss by their number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastpref.fused.token_terms import TokenTerms, check_operands, token_terms
from fastpref.ops import IGNORE_INDEX


@dataclass
class CrossEntropyOutput:
    """The loss and what else was requested, as `liger_kernel.transformers` returns them.

    Only the loss has a gradient, and the z-loss is part of it. Ignored tokens have accuracy 0 and
    the prediction -1; the accuracy of no token is NaN.
    """

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


class FusedLinearCrossEntropyLoss(nn.Module):
    """As `liger_kernel.transformers.LigerFusedLinearCrossEntropyLoss`.

    ce_weight: (V,) weights c of the vocabulary.
    use_token_scaling: multiply each token's loss by the probability of its label, as a constant.
    accum_dtype: accepted and ignored; gradients are summed in fp32 (fp64 for fp64 inputs).

    Returns a tensor, or a `CrossEntropyOutput` with one of the `return_` options. Raises
    ValueError, naming the argument, for options or shapes that do not fit.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(
                f"label_smoothing: expected a number from 0 to 1, got {label_smoothing!r}"
            )
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap: expected a number above 0 or None, got {softcap!r}")
        if ce_weight is not None and not ce_weight.is_floating_point():
            raise ValueError(f"ce_weight: expected floating point, got {ce_weight.dtype}")
        self.ce_weight = ce_weight
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.accum_dtype = accum_dtype
        self.use_token_scaling = use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(
        self,
        lin_weight: Tensor,  # (V, D)
        _input: Tensor,  # (T, D)
        target: Tensor,  # (T,)
        bias: Tensor | None = None,  # (V,)
    ) -> Tensor | CrossEntropyOutput:
        check_operands(_input, lin_weight, target, bias, ("_input", "lin_weight", "target", "bias"))
        if _input.dim() != 2:
            raise ValueError(
                f"_input: expected shape (T, D), got {tuple(_input.shape)}; flatten batch and time"
            )
        classes = self._class_weights(lin_weight)
        predicts = self.return_token_accuracy or self.return_predicted_tokens
        terms = token_terms(
            _input, lin_weight, target, bias, ignore_index=self.ignore_index, softcap=self.softcap,
            class_weights=classes if self.label_smoothing else None,
            only_logps=not (self.label_smoothing or self.lse_square_scale or predicts),
        )  # fmt: skip
        loss, z_loss = self._token_losses(terms, classes)
        if self.use_token_scaling:
            probabilities = terms.logps.detach().exp()
            loss, z_loss = loss * probabilities, z_loss * probabilities
        loss = self._reduced(terms, loss + z_loss)
        if not (predicts or self.return_z_loss):
            return loss
        output = CrossEntropyOutput(loss)
        if self.return_z_loss:
            output.z_loss = self._reduced(terms, z_loss).detach()
        if terms.rest is not None:
            self._add_predictions(output, terms, terms.rest.predicted)
        return output

    def _class_weights(self, weight: Tensor) -> Tensor | None:
        """Class weights (V,) on the device of the head, or None where all are 1 and unused."""
        if self.ce_weight is None:
            return weight.new_ones(len(weight)) if self.label_smoothing else None
        if self.ce_weight.shape != weight.shape[:1]:
            raise ValueError(
                f"ce_weight: expected shape ({len(weight)},), one per row of lin_weight, "
                f"got {tuple(self.ce_weight.shape)}"
            )
        return self.ce_weight.detach().to(weight.device)

    def _token_losses(self, terms: TokenTerms, classes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cross entropies and z-losses (T,), divided as the reduction asks."""
        loss, scored = -terms.logps, terms.scored
        count = scored.sum()
        divisor = count.to(loss.dtype)
        if classes is not None and self.ce_weight is not None:
            of_labels = classes.to(loss.dtype)[terms.labels.masked_fill(~scored, 0)]
            of_labels = of_labels.masked_fill(~scored, 0.0)
            loss, divisor = of_labels * loss, of_labels.sum()
        z_loss = torch.zeros_like(loss)
        if terms.rest is not None:
            e = self.label_smoothing
            if e and classes is not None:
                loss = (1 - e) * loss - e / len(classes) * terms.rest.weighted_logps
            z_loss = self.lse_square_scale * terms.rest.lse.square()
        if self.reduction == "mean":
            loss = loss / torch.where(count == 0, 1, divisor)
            z_loss = z_loss / count.clamp(min=1)
        return loss, z_loss

    def _reduced(self, terms: TokenTerms, values: Tensor) -> Tensor:
        return terms.spread(values) if self.reduction == "none" else values.sum()

    def _add_predictions(
        self, output: CrossEntropyOutput, terms: TokenTerms, predicted: Tensor
    ) -> None:
        if self.return_token_accuracy:
            correct = ((predicted == terms.labels) & terms.scored).float()
            none = self.reduction == "none"
            output.token_accuracy = (
                terms.spread(correct) if none else correct.sum() / terms.scored.sum()
            )
        if self.return_predicted_tokens:
            output.predicted_tokens = terms.spread(predicted, -1)
