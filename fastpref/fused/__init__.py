"""Loss modules for any training loop: hidden states and the head's weight in, a loss out.

`FusedPreferenceLoss` takes any objective. The `FusedLinear*Loss` classes replace the
`LigerFusedLinear*Loss` classes of liger-kernel, `linear_cross_entropy` replaces cut-cross-entropy.
`fastpref.fused.trl` is for TRL's trainer.
"""

from fastpref.fused.cross_entropy import LinearCrossEntropy, linear_cross_entropy
from fastpref.fused.distillation import FusedDistillationLoss
from fastpref.fused.liger import (
    FusedLinearCPOLoss,
    FusedLinearCrossEntropyLoss,
    FusedLinearDPOLoss,
    FusedLinearJSDLoss,
    FusedLinearKTOLoss,
    FusedLinearORPOLoss,
    FusedLinearSimPOLoss,
)
from fastpref.fused.loss import FusedPreferenceLoss
from fastpref.fused.model_logps import ModelLogps
from fastpref.fused.model_loss import ModelLoss
from fastpref.fused.scored_tokens import ScoredTokens, autocast_operands
from fastpref.model.token_importance import token_importance

__all__ = [
    "FusedDistillationLoss",
    "FusedLinearCPOLoss",
    "FusedLinearCrossEntropyLoss",
    "FusedLinearDPOLoss",
    "FusedLinearJSDLoss",
    "FusedLinearKTOLoss",
    "FusedLinearORPOLoss",
    "FusedLinearSimPOLoss",
    "FusedPreferenceLoss",
    "LinearCrossEntropy",
    "ModelLogps",
    "ModelLoss",
    "ScoredTokens",
    "autocast_operands",
    "linear_cross_entropy",
    "token_importance",
]
