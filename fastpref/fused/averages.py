"""Averages that change from step to step, as buffers of a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from fastpref.dynamics.pair_calibration import PairCalibration
from fastpref.dynamics.reward_calibration import RewardCalibration
from fastpref.losses.pointwise import RunningMean

Source = TypeVar("Source", RewardCalibration, PairCalibration, RunningMean)


class Averages(nn.Module, Generic[Source]):
    """The averages of a calibration or of rewards: fp64 buffers by the names of its `state_dict`.

    Buffers and source share their tensors, so that each sees what is loaded into the other. They
    stay fp64 in a module that is cast.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source: Source = source
        self._shared: dict[str, Tensor] = {}
        for name, value in source.state_dict().items():
            self.register_buffer(name, value)
            self._shared[name] = value

    def on(self, device: torch.device) -> Source:
        """The source, with its averages on a device."""
        for name, buffer in self.named_buffers(recurse=False):
            value = getattr(self.source, name)
            # Another tensor than the shared one was loaded into the source.
            newest = buffer if value is self._shared[name] else value
            self._share(name, newest.to(device, torch.float64))
        return self.source

    def store(self) -> None:
        """Take over the averages of the source after their update."""
        for name, buffer in self.named_buffers(recurse=False):
            buffer.copy_(getattr(self.source, name))
            self._share(name, buffer)

    def values(self) -> dict[str, Tensor]:
        """The averages by name, fp64."""
        return self.on(next(self.buffers()).device).state_dict()

    def load_values(self, averages: dict[str, Tensor]) -> None:
        """Restore a result of `values`. Raises ValueError for another."""
        device = next(self.buffers()).device
        self.source.load_state_dict(averages)
        self.on(device)

    def _share(self, name: str, value: Tensor) -> None:
        self._buffers[name] = self._shared[name] = value
        setattr(self.source, name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.values()
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            # A move keeps the values; a cast would have rounded them.
            moved = buffer.dtype == torch.float64
            self._share(name, buffer if moved else before[name].to(buffer.device))
        return self
