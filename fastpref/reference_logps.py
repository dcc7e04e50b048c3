"""Log-probs of the reference policy: the model as it was loaded, before the first update.

`cached` computes them once, in the order and the forward passes of the first epoch, and keeps them
on disk under a hash of what decides them: the weights, the arithmetic and the token ids. Learning
rate, objective, batch size and seed are not among those, so runs share them.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastpref import files, ops
from fastpref.data.batches import Batch, Plan, micro_batch
from fastpref.data.tokens import Groups
from fastpref.model import Policy
from fastpref.progress import Display

_VERSION = "2"  # raise it when the same weights and tokens give other log-probs, or the layout
Progress = Callable[[int], None]  # groups done


class Reference(Protocol):
    """Gives the reference log-probs (S,) of a batch; None for objectives without a reference."""

    def __call__(self, batch: Batch) -> Tensor | None: ...


def no_reference(batch: Batch) -> None:
    return None


class FrozenReference:
    """A second copy of the model beside the policy."""

    def __init__(self, policy: Policy) -> None:
        self._copy = copy.deepcopy(policy).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        return self._copy(batch).logps


class CachedReference:
    """Log-probs computed before training, looked up by the responses' position in the data."""

    def __init__(self, logps: Tensor) -> None:
        self.logps = logps  # of all responses

    def __call__(self, batch: Batch) -> Tensor:
        return self.logps[batch.responses]


def cached_reference(
    policy: Policy, groups: Groups, plan: Plan, cache: Path, display: Display
) -> CachedReference:
    """The reference for one data set; call it before the policy's first update."""
    given = groups.given_reference_logps()
    if given is not None:
        display.note(f"reference log-probs of {groups.source}: those that come with the data")
        dtype = torch.promote_types(policy.compute_dtype, torch.float32)
        return CachedReference(torch.tensor(given, dtype=dtype, device=policy.device))
    path = cache / "reference" / f"{_key(policy, groups)}.safetensors"
    if not path.exists():
        display.phase("reference", len(groups))
        logps = _compute(policy, groups, plan, display.advance)
        with files.replacing(path) as temporary:
            save_file({"logps": logps.cpu().contiguous()}, temporary)
    return CachedReference(load_file(path)["logps"].to(policy.device))


@torch.no_grad()
def _compute(policy: Policy, groups: Groups, plan: Plan, progress: Progress) -> Tensor:
    """Summed log-probs of all responses under the policy as it is now."""
    dtype = torch.promote_types(policy.compute_dtype, torch.float32)
    logps = torch.empty(int(groups.offsets[-1]), dtype=dtype, device=policy.device)
    was_training, done = policy.training, 0
    policy.eval()
    for indices in _micro_batches(plan):
        for batch in micro_batch(groups, indices, policy.device):
            logps[batch.responses] = policy(batch).logps
        done += len(indices)
        progress(done)
    policy.train(was_training)
    return logps


def _micro_batches(plan: Plan) -> Iterator[list[int]]:
    for step in plan.epoch(0):
        yield from step


def _key(policy: Policy, groups: Groups) -> str:
    like = torch.empty(0, 0, dtype=policy.compute_dtype, device=policy.device)
    arithmetic = {
        "version": _VERSION,
        "head": ops.implementation(like),
        "compute": str(policy.compute_dtype),
        "device": policy.device.type,
        "attention": policy.base.config._attn_implementation,
        "config": _architecture(policy),
    }
    return files.sha256(weights_sha256(policy), json.dumps(arithmetic), groups.fingerprint)


def _architecture(policy: Policy) -> dict[str, object]:
    """The model's config without what does not change its numbers."""
    values = json.loads(policy.base.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version", "use_cache", "dtype"):
        values.pop(name, None)
    return values


def weights_sha256(policy: Policy) -> str:
    """Hash of all weights by name, shape, dtype and bytes.

    Adapters are left out: where the reference is taken they are fresh and add zero.
    """
    digest = hashlib.sha256()
    for name, weight in policy.state_dict().items():
        if "lora_" in name:
            continue
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
