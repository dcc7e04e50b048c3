"""Distillation as a module: hidden states and heads of two models in, a scalar loss out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpref.fused.scored_tokens import ScoredTokens, autocast_operands
from fastpref.ops import IGNORE_INDEX
from fastpref.ops.divergence import Kind, linear_divergence


class FusedDistillationLoss(nn.Module):
    """Mean divergence of a student's token distributions from a teacher's, without logits.

    kind: "reverse" is KL(student || teacher), the usual choice on samples of the student;
        "forward" is KL(teacher || student); "jsd" lies between them.
    beta: weight of the teacher in the mixture of "jsd".
    temperature: divides the logits of both models.
    logit_scale, softcap: of the student's head; those with `teacher_` are of the teacher's.
    ignore_index: the label of tokens that are not scored; -100 is ignored, too.

    Both models have one vocabulary; their widths may differ. Formulas and memory are those of
    `fastpref.ops.divergence`.
    """

    def __init__(
        self,
        kind: Kind = "reverse",
        beta: float = 0.5,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_softcap: float | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "kind": kind,
            "beta": beta,
            "temperature": temperature,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "teacher_logit_scale": teacher_logit_scale,
            "teacher_softcap": teacher_softcap,
        }
        empty = torch.zeros(0, 1), torch.zeros(1, 1)
        linear_divergence(*empty, *empty, **self.options)  # refuses wrong options here
        self.ignore_index = ignore_index

    def forward(
        self,
        hidden: Tensor,  # (S, L, D), or (T, D) with cu_seqlens
        weight: Tensor,  # (V, D)
        teacher_hidden: Tensor,  # (S, L, E) or (T, E)
        teacher_weight: Tensor,  # (V, E)
        labels: Tensor,  # (S, L) or (T,)
        cu_seqlens: Tensor | None = None,  # (S + 1,)
        attention_mask: Tensor | None = None,  # (S, L)
        *,
        bias: Tensor | None = None,  # (V,)
        teacher_bias: Tensor | None = None,  # (V,)
        num_items_in_batch: Tensor | int | None = None,
        shift: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss () over the scored tokens, nats, and metrics: detached tensors ().

        The labels only say which tokens are scored; `labels[..., t]` is the token that
        `hidden[..., t]` predicts, and `shift` and `attention_mask` are as in `FusedPreferenceLoss`.
        num_items_in_batch: scored tokens of the whole optimizer step, which divides the sum, so
        that accumulated steps do not depend on how they are split. The gradient of 0 scored tokens
        is 0. Metrics: `divergence`, the mean over the tokens of this call, and `tokens`.

        Raises ValueError, naming the argument, for shapes that do not fit together.
        """
        _check_shapes(hidden, teacher_hidden, labels, cu_seqlens)
        options: dict[str, Any] = {"shift": shift, "ignore_index": self.ignore_index}
        if cu_seqlens is None:
            tokens = ScoredTokens.padded(
                labels, hidden.device, attention_mask=attention_mask, **options
            )
        else:
            tokens = ScoredTokens.packed(labels, cu_seqlens, scored_only=True, **options)
        student = autocast_operands(tokens.rows(hidden), weight, bias)
        with torch.no_grad():
            teacher = autocast_operands(tokens.rows(teacher_hidden), teacher_weight, teacher_bias)
        divergences = linear_divergence(
            *student[:2], *teacher[:2], bias=student[2], teacher_bias=teacher[2], **self.options
        )
        count = divergences.new_tensor(len(divergences))
        mean = divergences.sum() / count.clamp(min=1)
        loss = mean if num_items_in_batch is None else divergences.sum() / num_items_in_batch
        return loss, {"divergence": mean.detach(), "tokens": count}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _check_shapes(
    hidden: Tensor, teacher_hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None
) -> None:
    size = 3 if cu_seqlens is None else 2
    form = "(S, L, D)" if cu_seqlens is None else "(T, D) with cu_seqlens"
    for name, states in (("hidden", hidden), ("teacher_hidden", teacher_hidden)):
        if states.dim() != size:
            raise ValueError(f"{name}: expected shape {form}, got {tuple(states.shape)}")
        if states.shape[:-1] != labels.shape:
            raise ValueError(
                f"labels: expected shape {tuple(states.shape[:-1])} like the positions of {name}, "
                f"got {tuple(labels.shape)}"
            )
