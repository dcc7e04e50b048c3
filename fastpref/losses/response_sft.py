"""Supervised fine-tuning on single responses, which need neither label nor reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastpref.logps import UnpairedLogps, mean_logps
from fastpref.losses.base import choice
from fastpref.losses.pointwise import PointwiseLoss, PointwiseOutput
from fastpref.utils.lazy_torch import Tensor


@dataclass(frozen=True)
class ResponseSFT(PointwiseLoss):
    """Negative log-likelihood of each response: `sft` on data without rejected responses.

    loss: -a, or -z if not average; rewards are a or z.

    An empty response adds nothing. It has no entry in the registry: `loss: sft` becomes this
    objective where the rows of the data are single responses.
    """

    name: ClassVar[str] = "sft"
    needs_reference: ClassVar[bool] = False
    average: bool = choice(True, False)

    def __call__(
        self,
        policy: UnpairedLogps,
        reference: UnpairedLogps | None = None,
        reference_point: Tensor | None = None,
    ) -> PointwiseOutput:
        """Loss and reward of each response; a reference has no effect.

        Raises ValueError for a reference point.
        """
        self.refuse_reference_point(reference_point)
        values = mean_logps(policy.logps, policy.lengths) if self.average else policy.logps
        return PointwiseOutput(-values, values.detach(), classifies=False)

    def reward(self, log_ratios: Tensor) -> Tensor:
        raise NotImplementedError("the rewards of sft need lengths; call the objective")

    def response_loss(
        self, log_ratios: Tensor, policy: UnpairedLogps, reference_point: Tensor
    ) -> Tensor:
        raise NotImplementedError("sft has no log-ratios; call the objective")
