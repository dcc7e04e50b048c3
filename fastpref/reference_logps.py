"""Log-probs of the reference policy: the model as it was loaded, before the first update.

`cached` computes them once, in the order and the forward passes of the first epoch, and keeps them
on disk under a hash of what decides them: the weights, the arithmetic and the token ids. Learning
rate, objective, batch size and seed are not among those, so runs share them. `frozen` and `adapter`
run the reference beside the policy, in every step: they also bring its hidden states, from which a
divergence between the two is measured.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastpref import files, ops
from fastpref.data.batches import Batch
from fastpref.data.formats import DataError
from fastpref.data.plan import Plan
from fastpref.data.tokens import Groups
from fastpref.logps import segment_positions
from fastpref.model import Asked, Policy, PolicyOutput
from fastpref.progress import Display

_VERSION = "2"  # raise it when the same weights and tokens give other log-probs, or the layout
Progress = Callable[[int], None]  # groups done


class Reference(Protocol):
    """Gives the reference's log-probs of a batch; None for objectives without a reference.

    logps, token_logps: the one that was asked for when the reference was made, or both.
    head: the hidden states (T, E) and the head's weight (V, E), of a reference that is run.
    """

    def __call__(self, batch: Batch) -> PolicyOutput | None: ...


def no_reference(batch: Batch) -> None:
    return None


class FrozenReference:
    """A second copy of the model beside the policy."""

    def __init__(self, policy: Policy) -> None:
        self._copy = copy.deepcopy(policy).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> PolicyOutput:
        output: PolicyOutput = self._copy(batch, Asked(head=True))
        return output


class AdapterReference:
    """The policy itself without its adapters, which were fresh when training began."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @torch.no_grad()
    def __call__(self, batch: Batch) -> PolicyOutput:
        causal_lm: Any = self._policy.causal_lm
        with causal_lm.disable_adapter():
            output: PolicyOutput = self._policy(batch, Asked(head=True))
        return output


class CachedReference:
    """Log-probs computed before training, looked up by the responses' position in the data."""

    def __init__(self, logps: Tensor, starts: Tensor | None = None) -> None:
        self.logps = logps  # of all responses; with `starts`, of all their tokens
        self._starts = starts  # position of each response's first token among those

    def __call__(self, batch: Batch) -> PolicyOutput:
        nothing = self.logps.new_empty(0)
        if self._starts is None:
            return PolicyOutput(self.logps[batch.responses], nothing)
        owners, places = segment_positions(batch.cu_seqlens, len(batch.labels))
        return PolicyOutput(nothing, self.logps[self._starts[batch.responses][owners] + places])


def cached_reference(
    policy: Policy,
    groups: Groups,
    plan: Plan,
    cache: Path,
    display: Display,
    per_token: bool = False,
) -> CachedReference:
    """The reference for one data set; call it before the policy's first update.

    Sums of the responses, or log-probs of their tokens. Raises DataError where the data brings sums
    and tokens are asked for.
    """
    given = groups.given_reference_logps()
    if given is not None:
        if per_token:
            raise DataError(
                f"{groups.source}: ref_chosen_logps and ref_rejected_logps are sums, and this "
                "objective needs the log-prob of each token; remove the columns"
            )
        display.note(f"reference log-probs of {groups.source}: those that come with the data")
        dtype = torch.promote_types(policy.compute_dtype, torch.float32)
        return CachedReference(torch.tensor(given, dtype=dtype, device=policy.device))
    path = cache / "reference" / f"{_key(policy, groups, per_token)}.safetensors"
    lengths = torch.from_numpy(groups.response_lengths)
    starts = (lengths.cumsum(0) - lengths).to(policy.device) if per_token else None
    if not path.exists():
        display.phase("reference", len(groups))
        logps = _compute(policy, groups, plan, starts, display.advance)
        with files.replacing(path) as temporary:
            save_file({"logps": logps.cpu().contiguous()}, temporary)
    return CachedReference(load_file(path)["logps"].to(policy.device), starts)


@torch.no_grad()
def _compute(
    policy: Policy, groups: Groups, plan: Plan, starts: Tensor | None, progress: Progress
) -> Tensor:
    """Log-probs of all responses, or of all their tokens, under the policy as it is now."""
    dtype = torch.promote_types(policy.compute_dtype, torch.float32)
    size = groups.offsets[-1] if starts is None else groups.response_lengths.sum()
    logps = torch.empty(int(size), dtype=dtype, device=policy.device)
    was_training, done = policy.training, 0
    policy.eval()
    for indices in _micro_batches(plan):
        for batch in policy.batches(groups, indices):
            output: PolicyOutput = policy(batch)
            if starts is None:
                logps[batch.responses] = output.logps
            else:
                owners, places = segment_positions(batch.cu_seqlens, len(batch.labels))
                logps[starts[batch.responses][owners] + places] = output.token_logps
        done += len(indices)
        progress(done)
    policy.train(was_training)
    return logps


def _micro_batches(plan: Plan) -> Iterator[list[int]]:
    for step in plan.epoch(0):
        yield from step


def _key(policy: Policy, groups: Groups, per_token: bool) -> str:
    like = torch.empty(0, 0, dtype=policy.compute_dtype, device=policy.device)
    arithmetic = {
        "version": _VERSION,
        "head": ops.implementation(like),
        "compute": str(policy.compute_dtype),
        "device": policy.device.type,
        "attention": policy.base.config._attn_implementation,
        "layout": policy.layout,
        "config": _architecture(policy),
    }
    kept = "tokens" if per_token else "sums"
    return files.sha256(weights_sha256(policy), json.dumps(arithmetic), groups.fingerprint, kept)


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
