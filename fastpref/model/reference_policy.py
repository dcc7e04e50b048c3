"""Log-probs of the reference policy: the model as it was loaded, before the first update.

`cached` computes them once, in the order and the forward passes of the first epoch, and keeps them
on disk under a hash of what decides them: the weights, the arithmetic and the token ids. Learning
rate, objective, batch size and seed are not among those, so runs share them; a run that is stopped
half-way leaves what it has. `frozen` and `adapter`
run the reference beside the policy, in every step: they also bring its hidden states, from which a
divergence between the two is measured.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastpref import distributed, ops
from fastpref.data.batch_plan import Plan
from fastpref.data.collate import Batch
from fastpref.data.dataset import Groups
from fastpref.data.readers import DataError
from fastpref.logps import segment_positions
from fastpref.model.fsdp import full_tensor
from fastpref.model.lora import as_loaded, weights_as_loaded
from fastpref.model.policy import ForwardOptions, Policy, PolicyOutput
from fastpref.utils import atomic_files
from fastpref.utils.progress import Display

PARTS = 20  # so many times the log-probs known so far are put on disk
_VERSION = "3"  # raise it when the same weights and tokens give other log-probs, or the layout
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
    """A second model beside the policy, as it was loaded."""

    def __init__(self, loaded: Policy) -> None:
        self._copy = loaded.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> PolicyOutput:
        output: PolicyOutput = self._copy(batch, ForwardOptions(head=True))
        return output


class AdapterReference:
    """The policy itself, its adapters off or as they were when it was loaded."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @torch.no_grad()
    def __call__(self, batch: Batch) -> PolicyOutput:
        with as_loaded(self._policy):
            output: PolicyOutput = self._policy(batch, ForwardOptions(head=True))
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
    complete = _read(path, display)
    if distributed.all_ranks(complete is not None):
        assert complete is not None
        return CachedReference(complete["logps"].to(policy.device), starts)
    display.phase("reference", len(groups))
    partial = path.with_suffix(".partial")
    known = _Known.found(partial, _read(partial, display) or {}, policy, groups, per_token)
    _compute(policy, groups, plan, starts, known, display.advance)
    known.save(path)
    return CachedReference(known.logps, starts)


@torch.no_grad()
def _compute(
    policy: Policy,
    groups: Groups,
    plan: Plan,
    starts: Tensor | None,
    known: _Known,
    progress: Progress,
) -> None:
    """Log-probs of all responses, or of all their tokens, under the policy as it is now."""
    was_training = policy.training
    policy.eval()
    steps, own = plan.steps_per_epoch, torch.zeros_like(known.logps)
    for number in range(steps):
        missing = [index for index in plan.groups(number) if not known.groups[index]]
        for indices in plan.parts(missing) if missing else ():
            for batch in policy.batches(groups, indices or [plan.shortest]):
                output: PolicyOutput = policy(batch)
                if not indices:
                    continue
                if starts is None:
                    own[batch.responses] = output.logps
                else:
                    owners, places = segment_positions(batch.cu_seqlens, len(batch.labels))
                    own[starts[batch.responses][owners] + places] = output.token_logps
        known.groups[missing] = True
        progress(int(known.groups.sum()))
        last = number + 1 == steps
        if last or (number + 1) % max(1, steps // PARTS) == 0:
            known.take_in(own, save=not last)
    policy.train(was_training)


class _Known:
    """The log-probs that are known so far, of all ranks, in a file that a stopped run leaves."""

    def __init__(self, path: Path, logps: Tensor, groups: Tensor) -> None:
        self._path = path
        self.logps = logps  # of all responses or tokens; 0 where it is not known
        self.groups = groups  # (N,) bool, on the CPU

    @classmethod
    def found(
        cls,
        path: Path,
        saved: dict[str, Tensor],
        policy: Policy,
        groups: Groups,
        per_token: bool,
    ) -> _Known:
        """What is on disk, where all ranks see the same; else nothing."""
        dtype = torch.promote_types(policy.compute_dtype, torch.float32)
        size = int(groups.response_lengths.sum() if per_token else groups.offsets[-1])
        alike = distributed.all_equal(float(saved["groups"].sum()) if saved else 0.0)
        if not saved or not alike:
            saved = {
                "logps": torch.zeros(size, dtype=dtype),
                "groups": torch.zeros(len(groups), dtype=torch.bool),
            }
        return cls(path, saved["logps"].to(policy.device), saved["groups"])

    def take_in(self, own: Tensor, save: bool) -> None:
        """Add what this rank has found since the last call; `own` begins anew."""
        self.logps += distributed.all_reduce_sum_(own)
        own.zero_()
        if save:
            self._write(self._path, {"logps": self.logps, "groups": self.groups})

    def save(self, path: Path) -> None:
        """Write the complete log-probs; what was kept on the way goes."""
        self._write(path, {"logps": self.logps})
        if distributed.local_rank() == 0:
            self._path.unlink(missing_ok=True)

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        if distributed.local_rank() == 0:  # the machines' disks may be their own
            held = {name: t.cpu().contiguous() for name, t in tensors.items()}
            with atomic_files.replacing(path) as temporary:
                save_file(held, temporary, {"crc32": _crc32(held)})


def _read(path: Path, display: Display) -> dict[str, Tensor] | None:
    """The tensors of a file of the cache; None if it is not there, or not as it was written."""
    try:
        with safe_open(path, "pt") as file:
            held = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            if (file.metadata() or {}).get("crc32") == _crc32(held):
                return held
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError):
        pass
    display.note(f"{path} is damaged; its log-probs are computed again")
    return None


def _crc32(tensors: dict[str, Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(tensors[name].view(torch.uint8).numpy().data, total)
    return str(total)


def _key(policy: Policy, groups: Groups, per_token: bool) -> str:
    like = torch.empty(0, 0, dtype=policy.compute_dtype, device=policy.device)
    arithmetic = {
        "version": _VERSION,
        "head": ops.implementation(like),
        "compute": str(policy.compute_dtype),
        "device": policy.device.type,
        "attention": policy.base.config._attn_implementation,
        "layout": policy.layout,
        "kernels": policy.kernels,
        "config": _architecture(policy),
    }
    kept = "tokens" if per_token else "sums"
    return atomic_files.sha256(
        weights_sha256(policy), json.dumps(arithmetic), groups.fingerprint, kept
    )


def _architecture(policy: Policy) -> dict[str, object]:
    """The model's config without what does not change its numbers."""
    values = json.loads(policy.base.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version", "use_cache", "dtype"):
        values.pop(name, None)
    return values


def weights_sha256(policy: Policy) -> str:
    """Hash of the weights as they were loaded, by name, shape, dtype and bytes."""
    digest = hashlib.sha256()
    for name, weight in weights_as_loaded(policy):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        held = full_tensor(weight.detach()).cpu().contiguous().view(-1)
        digest.update(held.view(torch.uint8).numpy().data)
    return digest.hexdigest()
