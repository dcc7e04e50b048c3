"""Loss modules for any training loop: hidden states and the head's weight in, a loss out.

`FusedPreferenceLoss` takes any objective. The `FusedLinear*Loss` classes replace the
`LigerFusedLinear*Loss` classes of liger-kernel. `fastpref.fused.trl` is for TRL's trainer.
"""

from fastpref.fused.liger import (
    FusedLinearCPOLoss,
    FusedLinearDPOLoss,
    FusedLinearKTOLoss,
    FusedLinearORPOLoss,
    FusedLinearSimPOLoss,
)
from fastpref.fused.loss import FusedPreferenceLoss
from fastpref.fused.scored_tokens import ScoredTokens, autocast_operands
from fastpref.model.token_importance import token_importance

__all__ = [
    "FusedLinearCPOLoss",
    "FusedLinearDPOLoss",
    "FusedLinearKTOLoss",
    "FusedLinearORPOLoss",
    "FusedLinearSimPOLoss",
    "FusedPreferenceLoss",
    "ScoredTokens",
    "autocast_operands",
    "token_importance",
]
