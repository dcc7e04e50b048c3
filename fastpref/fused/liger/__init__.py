"""Replacements of the linear losses of liger-kernel 0.8: same arguments, same results.

    from fastpref.fused.liger import LigerFusedLinearDPOLoss, LigerFusedLinearCrossEntropyLoss
    from fastpref.fused.liger.functional import liger_fused_linear_dpo

`FusedLinearXLoss`, which is also `LigerFusedLinearXLoss` here, takes the constructor and call
arguments of liger's class of that name and returns its `(loss, aux)`, whose numbers are not always
those of the papers:

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

from fastpref.fused.liger.cross_entropy import CrossEntropyOutput, FusedLinearCrossEntropyLoss
from fastpref.fused.liger.jsd import FusedLinearJSDLoss
from fastpref.fused.liger.kto import FusedLinearKTOLoss
from fastpref.fused.liger.pairs import (
    FusedLinearCPOLoss,
    FusedLinearDPOLoss,
    FusedLinearORPOLoss,
    FusedLinearSimPOLoss,
)

# The names of liger-kernel, so that an import line is all that changes.
LigerFusedLinearCPOLoss = FusedLinearCPOLoss
LigerFusedLinearCrossEntropyLoss = FusedLinearCrossEntropyLoss
LigerFusedLinearDPOLoss = FusedLinearDPOLoss
LigerFusedLinearJSDLoss = FusedLinearJSDLoss
LigerFusedLinearKTOLoss = FusedLinearKTOLoss
LigerFusedLinearORPOLoss = FusedLinearORPOLoss
LigerFusedLinearSimPOLoss = FusedLinearSimPOLoss

__all__ = [
    "CrossEntropyOutput",
    "FusedLinearCPOLoss",
    "FusedLinearCrossEntropyLoss",
    "FusedLinearDPOLoss",
    "FusedLinearJSDLoss",
    "FusedLinearKTOLoss",
    "FusedLinearORPOLoss",
    "FusedLinearSimPOLoss",
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]
