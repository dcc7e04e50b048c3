"""The reference of the rounds, which is synchronized with the policy as the config says.

`start` and `round` compute the log-probs of a round's groups once, before its first step, with the
same operation as the policy. `every` and `ema`, and objectives that compare whole distributions,
run a frozen copy in every step: of the adapter, or else of all weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref.config import Config
from fastpref.data.batch_plan import Plan
from fastpref.data.dataset import Groups
from fastpref.losses import TokenLevelLoss
from fastpref.model import fsdp
from fastpref.model.lora import as_reference, reference_copies, without_adapter
from fastpref.model.policy import Policy
from fastpref.model.reference_policy import (
    AdapterReference,
    FrozenReference,
    Reference,
    no_reference,
    saved_reference,
)
from fastpref.training.step_hook import StepHook
from fastpref.utils.progress import Display


def needs_copy(config: Config) -> bool:
    """Whether a frozen copy is run in every step."""
    assert config.rounds is not None
    if config.reference_mode == "none":
        return False
    is_live = config.reference_mode in ("frozen", "adapter")
    return is_live or config.rounds.reference_mode in ("every", "ema")


class FollowingCopy:
    """Frozen copy of the policy that can be set to it, or moved toward it.

    policy: the copy, a second model, or None where it is that of the policy's adapter.
    """

    def __init__(self, policy: Policy, copy: Policy | None) -> None:
        self._trained, self.policy = policy, copy
        self.reference: Reference = AdapterReference(policy)
        if copy is not None:
            self.reference = FrozenReference(copy)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Weights of the copy by their names in a checkpoint; of sharded ones, this rank's."""
        return {name: ours for name, (ours, _) in self._pairs().items()}

    @torch.no_grad()
    def synchronize(self) -> None:
        """Set the copy to the policy."""
        for ours, trained in self._pairs().values():
            fsdp.local_tensor(ours).copy_(fsdp.local_tensor(trained))

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move the copy to `decay · copy + (1 - decay) · policy`."""
        for ours, trained in self._pairs().values():
            target = fsdp.local_tensor(trained).to(ours.dtype)
            fsdp.local_tensor(ours).lerp_(target, 1 - decay)

    def _pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Tensors of the copy and of the policy by name, looked up anew for each use.

        A forward pass leaves gathered weights in the place of the shards, until `to_shards`.
        """
        if self.policy is None:
            return reference_copies(self._trained)
        self.policy.to_shards()
        self._trained.to_shards()
        trained = dict(self._trained.named_parameters())
        return {
            name: (tensor.detach(), trained[name].detach())
            for name, tensor in self.policy.named_parameters()
        }


class Following(StepHook):
    """Synchronizes a copy every `every` steps of the run, or averages it with a decay."""

    def __init__(self, copy: FollowingCopy, options: dict[str, Any]) -> None:
        self._copy = copy
        self._every, self._decay = options.get("every"), options.get("ema")
        self._step = 0

    def before_step(self, step: int) -> None:
        self._step = step + 1

    def after_step(self) -> None:
        if self._decay is not None:
            self._copy.average(self._decay)
        elif self._every is not None and self._step % self._every == 0:
            self._copy.synchronize()


class RoundReference:
    """Reference of each round's groups.

    load_start: loads the model as it was before the first step, without an adapter.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        load_start: Callable[[], Policy],
        display: Display,
    ) -> None:
        assert config.rounds is not None
        self._options, self._mode = config.rounds.reference, config.rounds.reference_mode
        adapter = config.adapter
        self._has_adapter = adapter is not None
        self._starts_from_base = adapter is not None and not (adapter.path or adapter.dora)
        self._policy, self._load_start, self._display = policy, load_start, display
        loss = config.build_loss()
        self._per_token = isinstance(loss, TokenLevelLoss) or loss.of_rollouts
        self._is_none = config.reference_mode == "none"
        self.copy: FollowingCopy | None = None
        if needs_copy(config):
            copy = None if self._has_adapter else load_start()
            self.copy = FollowingCopy(policy, copy)
            if copy is not None:
                count = sum(parameter.numel() for parameter in copy.parameters())
                display.note(
                    f"reference: a second copy of the model, {count:,} weights, stays in memory"
                )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Weights that a checkpoint needs, by their names in it."""
        ours = {} if self.copy is None else self.copy.tensors
        return {f"reference.{name}": tensor for name, tensor in ours.items()}

    def hooks(self) -> list[StepHook]:
        """Hooks by which the copy follows the steps of the run."""
        if self.copy is None or not isinstance(self._options, dict):
            return []
        return [Following(self.copy, self._options)]

    def begin(self) -> None:
        """Synchronize the copy, at the begin of a round that has taken no step."""
        if self.copy is not None and self._mode == "round":
            self.copy.synchronize()

    def of(self, groups: Groups, plan: Plan, path: Path) -> Reference:
        """Return the reference of a round's groups; path: of their log-probs, if these are kept."""
        if self._is_none:
            return no_reference
        if self.copy is not None:
            return self.copy.reference
        with self._computing() as policy:
            return saved_reference(
                path, policy, groups, plan, self._display, self._per_token, is_shared=True
            )

    def keeps_logps(self) -> bool:
        """Whether the log-probs of a round are in a file."""
        return not self._is_none and self.copy is None

    @contextmanager
    def _computing(self) -> Iterator[Policy]:
        """Context manager that yields the policy whose log-probs are the reference's."""
        if self._mode == "round":
            yield self._policy
        else:
            with self.start() as policy:
                assert policy is not None
                yield policy

    @contextmanager
    def partner(self) -> Iterator[tuple[Policy, Callable[[], AbstractContextManager[None]]]]:
        """Context manager that yields the reference, and the context in which it computes as one.

        With an adapter it is the policy itself in that context. Without one it is the copy, or the
        model at the start, which is read again from its files and freed at the end.
        """
        if self._has_adapter:
            yield self._policy, partial(as_reference, self._policy)
        elif self.copy is not None:
            assert self.copy.policy is not None
            yield self.copy.policy, nullcontext
        else:
            yield self._load_start().eval().requires_grad_(False), nullcontext

    @contextmanager
    def start(self) -> Iterator[Policy | None]:
        """Context manager that yields the model at the start of the run.

        Without an adapter it is read again from its files, and freed at the end. None where a
        loaded adapter, or DoRA, has one frozen copy, which follows the policy.
        """
        policy = self._policy
        if not self._has_adapter:
            yield self._load_start().eval().requires_grad_(False)
        elif self.copy is None or self._mode == "start":
            with as_reference(policy):
                yield policy
        elif self._starts_from_base:
            with without_adapter(policy):
                yield policy
        else:
            yield None
