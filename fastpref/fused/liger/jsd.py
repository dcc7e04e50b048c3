"""Distillation by the Jensen-Shannon divergence as in liger-kernel."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import pad

from fastpref.fused.scored_tokens import ScoredTokens, autocast_operands
from fastpref.ops import IGNORE_INDEX
from fastpref.ops.divergence import Kind, linear_divergence

# Of the generalized divergence, whose limits are scaled to the two KL divergences.
_LIMITS: dict[float, Kind] = {0: "forward", 1: "reverse"}


class FusedLinearJSDLoss(nn.Module):
    """As `liger_kernel.chunked_loss.LigerFusedLinearJSDLoss`.

        hard   -sum of the student's log-probs / number of scored tokens
        soft   sum of beta KL(teacher || m) + (1 - beta) KL(student || m) / the same number
        loss   weight_hard_loss hard + weight_soft_loss soft

    with m = beta teacher + (1 - beta) student; beta 0 is KL(teacher || student), beta 1 is
    KL(student || teacher). The temperature divides the logits of soft only. Entries of the
    vocabulary that only the teacher has count as logits 0 of the student.

    Returns the loss, or (loss, soft, hard) with `return_soft_hard_loss`; soft and hard have no
    gradient. `compiled` and `chunk_size` are accepted and ignored. Raises ValueError, naming the
    argument, for shapes or numbers that do not fit.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = IGNORE_INDEX,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= beta <= 1:
            raise ValueError(f"beta: expected a number from 0 to 1, got {beta!r}")
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number > 0, got {temperature!r}")
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,  # (T, D)
        student_weight: Tensor,  # (V, D)
        teacher_input: Tensor,  # (T, E)
        teacher_weight: Tensor,  # (V or more, E)
        true_labels: Tensor,  # (T,)
        student_bias: Tensor | None = None,  # (V,)
        teacher_bias: Tensor | None = None,  # (V or more,)
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        for name, hidden in (("student_input", student_input), ("teacher_input", teacher_input)):
            if hidden.dim() != 2 or hidden.shape[:1] != true_labels.shape:
                raise ValueError(
                    f"{name}: expected shape (T, D) with T labels, got {tuple(hidden.shape)} and "
                    f"labels of {tuple(true_labels.shape)}"
                )
        tokens = ScoredTokens.padded(
            true_labels[None], student_input.device, ignore_index=self.ignore_index
        )
        rows = tokens.rows(student_input)
        count = tokens.lengths.sum().clamp(min=1)
        soft = self._divergences(
            (rows, student_weight, student_bias),
            (tokens.rows(teacher_input).detach(), teacher_weight, teacher_bias),
        )
        soft = soft.sum() / count
        hard = soft.new_zeros(())
        if self.weight_hard_loss or self.return_soft_hard_loss:
            hard = -tokens.token_logps(rows, student_weight, student_bias).sum() / count
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        if not self.return_soft_hard_loss:
            return loss
        return loss, soft.detach(), hard.detach()

    def _divergences(
        self,
        student: tuple[Tensor, Tensor, Tensor | None],
        teacher: tuple[Tensor, Tensor, Tensor | None],
    ) -> Tensor:  # (T,)
        hidden, weight, bias = autocast_operands(*student)
        teacher_hidden, teacher_weight, teacher_bias = autocast_operands(*teacher)
        missing = len(teacher_weight) - len(weight)
        if missing > 0:
            weight = pad(weight, (0, 0, 0, missing))
            bias = None if bias is None else pad(bias, (0, missing))
        return linear_divergence(
            hidden, weight, teacher_hidden, teacher_weight, _LIMITS.get(self.beta, "jsd"),
            beta=self.beta, temperature=self.temperature, bias=bias,
            teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
        )  # fmt: skip
