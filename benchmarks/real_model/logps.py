"""Log-probs of the policy against those of transformers' logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.real_model.bench import Bench, Values
from fastpref.data.batch_plan import Layout
from fastpref.model.batch_layout import use_layout
from fastpref.model.policy import Policy
from fastpref.trunk import build_trunk

LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "prefix_shared")


def compare_logps(bench: Bench) -> Values:
    """Largest relative error of summed log-probs against transformers' logits.

    By code of the layers (`model.kernels`) and layout.
    """
    groups = bench.groups("hh-train")
    model = bench.causal_lm().eval()
    pairs = range(bench.setting.compared)
    expected = torch.stack(
        [
            reference_logps(model, groups[k].prompt, response)
            for k in pairs
            for response in groups[k].responses
        ]
    )
    policy = Policy(model, torch.float32)
    implementation = model.config._attn_implementation
    errors = {}
    for kernels, trunk in (("torch", None), ("fused", build_trunk(model.base_model))):
        policy.trunk = trunk
        for layout in LAYOUTS:
            # With "torch", packed rows run under transformers' mask of position ids, for lack of
            # flash-attention.
            model.set_attn_implementation(implementation)
            use_layout(policy, layout)
            with torch.no_grad():
                logps = torch.cat(
                    [policy(batch).logps for k in pairs for batch in policy.batches(groups, [k])]
                )
            error = ((logps.double() - expected) / expected).abs().max().item()
            errors[f"{kernels}, {layout}"] = error
    return {"pairs": len(pairs), "largest_relative_error": errors}


@torch.no_grad()
def reference_logps(model: Any, prompt: Any, response: Any) -> Tensor:
    """Summed log-prob of a response by the model's logits, fp64."""
    ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).sum()
