"""Log-probs of whole responses from a causal language model as a trainer wraps it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastpref import ops
from fastpref.fused.model_head import ModelHead
from fastpref.fused.model_loss import warn_of_lone_ranks
from fastpref.fused.scored_tokens import ScoredTokens
from fastpref.ops import IGNORE_INDEX


class ModelLogps:
    """Summed log-probs of the labeled tokens, computed in the place of the model's head.

        sequence_logps = ModelLogps(model)
        logps = sequence_logps(model, input_ids=..., attention_mask=..., labels=...)  # (S,)

    For trainers that have a loss of their own on log-probs; `ModelLoss` computes the loss, too.
    model, impl, ignore_index, head: as in `ModelLoss`, which says what is raised.
    """

    def __init__(
        self,
        model: nn.Module,
        impl: str = "auto",
        *,
        ignore_index: int = IGNORE_INDEX,
        head: nn.Module | None = None,
    ) -> None:
        self.head = ModelHead(model, head)
        self.head.check_now(model)
        self.impl = impl
        self.ignore_index = ignore_index
        self._is_warned = False

    def __call__(
        self,
        model: nn.Module,
        *,
        labels: Tensor,  # (S, L)
        attention_mask: Tensor | None = None,  # (S, L)
        **inputs: Any,
    ) -> Tensor:
        """Log-probs (S,) in nats, with a gradient to the parameters of the model.

        model, labels, inputs: as in `ModelLoss`, with its warning of ranks without a wrapper.
        Without gradient where torch's are disabled.

        Raises ValueError for labels that do not fit the mask or the hidden states (S, L, D), and
        for inputs that the model ignores.
        """
        self.head.check_inputs(inputs)
        if attention_mask is not None:
            if attention_mask.shape != labels.shape:
                raise ValueError(
                    f"attention_mask: expected shape {tuple(labels.shape)}, "
                    f"got {tuple(attention_mask.shape)}"
                )
            inputs["attention_mask"] = attention_mask

        def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if labels.shape != hidden.shape[:-1]:
                raise ValueError(
                    f"labels: expected shape {tuple(hidden.shape[:-1])}, one per hidden state, "
                    f"got {tuple(labels.shape)}"
                )
            tokens = ScoredTokens.padded(
                labels, hidden.device, attention_mask=attention_mask, shift=True,
                ignore_index=self.ignore_index,
            )  # fmt: skip
            rows = tokens.rows(hidden)
            logps = tokens.token_logps(rows, weight, bias, **self.head.options, impl=self.impl)
            return ops.segment_sum(logps, tokens.cu_seqlens)

        logps, _ = self.head.run(model, compute, inputs)
        if logps.requires_grad and not self._is_warned:
            self._is_warned = True
            warn_of_lone_ranks(model)
        return logps
