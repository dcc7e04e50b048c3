"""Log-probs of the reference policy: the model before its first update.

`cached` computes them once, in the order and the forward passes of the first epoch, and saves them
under a hash of the weights, the arithmetic and the token ids. The hash does not include learning
rate, objective, batch size or seed, so runs share the file; an interrupted run leaves a partial
file, from which the next one continues. A run on one CPU process leaves the groups of its first
step to that step, whose forward pass has the same bits. `frozen` and `adapter` run the reference in
every step and also return its hidden states, from which the divergence between reference and policy
is computed.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastpref import attention, distributed, ops
from fastpref.data.batch_plan import Layout, Plan
from fastpref.data.collate import Batch
from fastpref.data.dataset import Groups
from fastpref.data.readers import DataError
from fastpref.logps import segment_positions
from fastpref.model.fsdp import full_tensor
from fastpref.model.lora import as_reference, reference_weights, without_adapter
from fastpref.model.policy import ForwardOptions, Policy, PolicyOutput
from fastpref.utils import atomic_files
from fastpref.utils.progress import Display

SAVES = 20  # number of partial saves per pass
# Raise it when the log-probs of the same weights and tokens change, or the format of the file.
_VERSION = "4"
Progress = Callable[[int], None]  # takes the number of completed groups


class Reference(Protocol):
    """Callable that returns the reference's output for a batch, or None without a reference.

    A cached reference fills either `logps` or `token_logps`; the other one is empty. Only a
    reference that is run fills `head`: hidden states (T, E) and the head's weight (V, E).
    """

    def __call__(self, batch: Batch) -> PolicyOutput | None: ...


def no_reference(batch: Batch) -> None:
    """No-op reference of objectives that need none."""
    return None


class FrozenReference:
    """Reference that is a frozen copy of the initial policy."""

    def __init__(self, initial_policy: Policy) -> None:
        self._policy = initial_policy.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> PolicyOutput:
        output: PolicyOutput = self._policy(batch, ForwardOptions(head=True))
        return output


class AdapterReference:
    """Reference that is the policy itself, its adapter disabled or replaced by the initial one."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @torch.no_grad()
    def __call__(self, batch: Batch) -> PolicyOutput:
        with as_reference(self._policy):
            output: PolicyOutput = self._policy(batch, ForwardOptions(head=True))
        return output


class CachedReference:
    """Reference log-probs computed before training, looked up by the indices of the responses.

    logps: log-probs of all responses (N,), or with `starts` of all their tokens, concatenated.
    starts: (N,) index in `logps` of each response's first token.
    """

    def __init__(self, logps: Tensor, starts: Tensor | None = None) -> None:
        self.logps = logps
        self._starts = starts

    def __call__(self, batch: Batch) -> PolicyOutput:
        empty = self.logps.new_empty(0)
        if self._starts is None:
            return PolicyOutput(self.logps[batch.responses], empty)
        return PolicyOutput(empty, self.logps[token_indices(batch, self._starts)])


class FirstStepReference:
    """Cached reference that takes the missing log-probs from the first step of a run.

    Before its first update the policy is the reference, so its own forward pass has them. With the
    last of them the file is complete.
    """

    def __init__(self, partial: _PartialLogps, groups: Groups, path: Path) -> None:
        self._partial, self._path = partial, path
        self._cached = CachedReference(partial.logps)
        counts = torch.from_numpy(groups.offsets).diff()
        missing = (~partial.groups).repeat_interleave(counts).nonzero()[:, 0]
        self._missing = set(missing.tolist())  # responses

    def __call__(self, batch: Batch) -> PolicyOutput | None:
        """Log-probs of a batch, None if they are missing."""
        is_missing = not self._missing.isdisjoint(batch.responses.tolist())
        return None if is_missing else self._cached(batch)

    def take(self, batch: Batch, output: PolicyOutput) -> PolicyOutput:
        """Keep and return the log-probs of a policy before its first update."""
        self._partial.logps[batch.responses] = output.logps.detach()
        self._missing.difference_update(batch.responses.tolist())
        if not self._missing:
            self._partial.finish(self._path)
        return self._cached(batch)


def token_indices(batch: Batch, starts: Tensor) -> Tensor:
    """Index (T,) of each label of the batch among the response tokens of the data set."""
    segment_ids, positions = segment_positions(batch.cu_seqlens, len(batch.labels))
    return starts[batch.responses][segment_ids] + positions


def cached_reference(
    policy: Policy,
    groups: Groups,
    plan: Plan,
    cache: Path,
    display: Display,
    per_token: bool = False,
    first_step: bool = False,
) -> CachedReference | FirstStepReference:
    """Read or compute the reference log-probs of a data set, before the policy's first update.

    per_token: log-probs of the response tokens instead of their sums. Raises DataError if the data
        brings log-probs of its own, which are sums.
    first_step: leave those of the groups of the first step, if they are missing, to that step.
    """
    data_logps = groups.given_reference_logps()
    if data_logps is not None:
        if per_token:
            raise DataError(
                f"{groups.source}: ref_chosen_logps and ref_rejected_logps are sums, and this "
                "objective needs the log-prob of each token; remove the columns"
            )
        display.note(f"reference log-probs of {groups.source}: read from the data")
        dtype = torch.promote_types(policy.compute_dtype, torch.float32)
        return CachedReference(torch.tensor(data_logps, dtype=dtype, device=policy.device))
    path = cache / "reference" / f"{_key(policy, groups, plan, per_token)}.safetensors"
    awaited = plan.groups(plan.first_step) if first_step else []
    return saved_reference(path, policy, groups, plan, display, per_token, awaited)


def saved_reference(
    path: Path,
    policy: Policy,
    groups: Groups,
    plan: Plan,
    display: Display,
    per_token: bool,
    awaited: Sequence[int] = (),
    is_shared: bool = False,
) -> CachedReference | FirstStepReference:
    """Read the log-probs in a file, or compute them with the policy as it is and write it.

    The caller names the file by everything that determines the log-probs.

    awaited: groups to leave to the first step of the run, not with `per_token`.
    is_shared: whether all nodes see one file, which rank 0 writes; else each has a file of its own.
    """
    lengths = torch.from_numpy(groups.response_lengths)
    starts = (lengths.cumsum(0) - lengths).to(policy.device) if per_token else None
    complete = _read(path, display)
    if distributed.all_ranks(complete is not None):
        assert complete is not None
        return CachedReference(complete["logps"].to(policy.device), starts)
    display.phase("reference", len(groups) - len(set(awaited)))
    partial_path = path.with_suffix(".partial")
    saved = _read(partial_path, display) or {}
    writes = distributed.is_main_process() if is_shared else distributed.local_rank() == 0
    partial = _PartialLogps.load(partial_path, saved, policy, groups, per_token, writes)
    with _without_zero_adapter(policy):
        _compute(policy, groups, plan, starts, partial, display.advance, awaited)
    if not partial.groups.all():
        return FirstStepReference(partial, groups, path)
    partial.finish(path)
    return CachedReference(partial.logps, starts)


@torch.no_grad()
def _compute(
    policy: Policy,
    groups: Groups,
    plan: Plan,
    starts: Tensor | None,
    partial: _PartialLogps,
    progress: Progress,
    awaited: Sequence[int] = (),
) -> None:
    """Compute the missing log-probs with the policy as it is now, but not those of `awaited`."""
    was_training, left_out = policy.training, set(awaited)
    policy.eval()
    every, local_logps = max(1, plan.steps_per_epoch // SAVES), torch.zeros_like(partial.logps)
    for number, step in enumerate(plan.coverage(), start=1):
        needed = (index for index in dict.fromkeys(step) if index not in left_out)
        missing = [index for index in needed if not partial.groups[index]]
        for indices in plan.parts(missing) if missing else ():
            # A rank that has run out of groups takes part in the collectives with the shortest one.
            for batch in policy.batches(groups, indices or [plan.shortest]):
                output: PolicyOutput = policy(batch)
                if not indices:
                    continue
                if starts is None:
                    local_logps[batch.responses] = output.logps
                else:
                    local_logps[token_indices(batch, starts)] = output.token_logps
        partial.groups[missing] = True
        progress(int(partial.groups.sum()))
        if number % every == 0:
            partial.merge(local_logps, save=True)
    partial.merge(local_logps, save=bool(awaited))
    policy.train(was_training)


def _without_zero_adapter(policy: Policy) -> AbstractContextManager[None]:
    """Context manager in which explicit blocks skip an adapter that adds nothing: all its B are 0.

    The bits are the same.
    """
    last = [p for name, p in policy.named_parameters() if "lora_" in name and "_B." in name]
    if policy.trunk is None or not last or any(bool(p.any()) for p in last):
        return nullcontext()
    return without_adapter(policy)


class _PartialLogps:
    """Reference log-probs computed so far on all ranks, saved so that another run can continue.

    logps: log-probs of all responses or of all their tokens, 0 if not yet computed.
    groups: (N,) bool on the CPU, whether the log-probs of a group are computed.
    writes: whether this rank writes the files.
    """

    def __init__(self, path: Path, logps: Tensor, groups: Tensor, writes: bool) -> None:
        self._path, self._writes = path, writes
        self.logps = logps
        self.groups = groups

    @classmethod
    def load(
        cls,
        path: Path,
        saved: dict[str, Tensor],
        policy: Policy,
        groups: Groups,
        per_token: bool,
        writes: bool,
    ) -> _PartialLogps:
        """Continue from `saved`, the content of `path`, if all ranks read the same; else start."""
        dtype = torch.promote_types(policy.compute_dtype, torch.float32)
        size = int(groups.response_lengths.sum() if per_token else groups.offsets[-1])
        equal = distributed.all_equal(float(saved["groups"].sum()) if saved else 0.0)
        if not saved or not equal:
            saved = {
                "logps": torch.zeros(size, dtype=dtype),
                "groups": torch.zeros(len(groups), dtype=torch.bool),
            }
        return cls(path, saved["logps"].to(policy.device), saved["groups"], writes)

    def merge(self, local_logps: Tensor, save: bool) -> None:
        """Add this rank's new log-probs to those of all ranks, and zero `local_logps`."""
        self.logps += distributed.all_reduce_sum_(local_logps)
        local_logps.zero_()
        if save:
            self._write(self._path, {"logps": self.logps, "groups": self.groups})

    def finish(self, path: Path) -> None:
        """Write the complete log-probs and delete the partial file."""
        self._write(path, {"logps": self.logps})
        if self._writes:
            self._path.unlink(missing_ok=True)

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        if self._writes:
            cpu_tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
            with atomic_files.replacing(path) as temporary:
                save_file(cpu_tensors, temporary, {"crc32": _crc32(cpu_tensors)})


def is_intact(path: Path) -> bool:
    """Whether a file of log-probs can be read and its checksum is right."""
    return _tensors_of(path) is not None


def _read(path: Path, display: Display) -> dict[str, Tensor] | None:
    """Read the tensors of a cache file; None if it is missing or damaged, which is noted."""
    tensors = _tensors_of(path)
    if tensors is None and path.exists():
        display.note(f"{path} is damaged; its log-probs are recomputed")
    return tensors


def _tensors_of(path: Path) -> dict[str, Tensor] | None:
    """Tensors of a cache file; None if it cannot be read or its checksum is wrong."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors if (file.metadata() or {}).get("crc32") == _crc32(tensors) else None
    except (SafetensorError, OSError):
        return None


def _crc32(tensors: dict[str, Tensor]) -> str:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(tensors[name].view(torch.uint8).numpy().data, checksum)
    return str(checksum)


# Part of the cache key: the names that layouts had when caches were first written.
_LAYOUT_KEYS: dict[Layout, str] = {"prefix_shared": "shared", "packed": "flat", "padded": "padded"}


def _key(policy: Policy, groups: Groups, plan: Plan, per_token: bool) -> str:
    """Hash of everything that determines the log-probs: weights, arithmetic and token ids."""
    example = torch.empty(0, 0, dtype=policy.compute_dtype, device=policy.device)
    arithmetic = {
        "version": _VERSION,
        "head": ops.implementation(example),
        "compute": str(policy.compute_dtype),
        "device": policy.device.type,
        "attention": policy.base.config._attn_implementation,
        "packed_attention": attention.implementation(_query(policy)),
        "layout": _LAYOUT_KEYS[policy.layout],
        "kernels": policy.kernels,
        "config": _architecture(policy),
    }
    if not policy.separates_groups:
        # Log-probs depend, by rounding, on the other groups of their pass.
        arithmetic["micro_batch_tokens"] = plan.max_tokens
    values = "tokens" if per_token else "sums"
    return atomic_files.sha256(
        weights_sha256(policy), json.dumps(arithmetic), groups.fingerprint, values
    )


def _query(policy: Policy) -> Tensor:
    """A query of the policy's dtype, device and head size, (1, 1, D)."""
    config = policy.base.config.get_text_config()
    size = getattr(config, "head_dim", None)
    size = size or config.hidden_size // getattr(config, "num_attention_heads", 1)
    return torch.empty(1, 1, size, dtype=policy.compute_dtype, device=policy.device)


def _architecture(policy: Policy) -> dict[str, object]:
    """Config of the model without the entries that do not change its outputs."""
    values = json.loads(policy.base.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version", "use_cache", "dtype"):
        values.pop(name, None)
    return values


def weights_sha256(policy: Policy) -> str:
    """Hash of names, shapes, dtypes and bytes of the weights before the first update."""
    digest = hashlib.sha256()
    for name, weight in reference_weights(policy):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = full_tensor(weight.detach()).cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
