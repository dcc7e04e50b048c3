"""Positions of a model: how many it knows, and rotary tables that depend on the length of a pass.

LongRoPE (arXiv:2402.13753) has one table for short sequences and one for long ones, and dynamic NTK
scaling has another table for every length. transformers chooses by the largest position of a whole
forward pass, so a sequence would be computed differently beside a longer one. `RotaryByLength`
chooses for each row by the length of the row's own sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Angles = tuple[Tensor, Tensor]  # cosines and sines, (R, L, D)


def context_length_of(config: Any) -> int | None:
    """Number of positions that the model of a Hugging Face config supports; None if it is not said.

    A factor of the rotary positions (`rope_scaling`) extends `original_max_position_embeddings` or,
    without it, `max_position_embeddings`.
    """
    config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        positions = getattr(config, name, None)
        if isinstance(positions, int) and not isinstance(positions, bool) and positions > 0:
            return max([positions, *_scaled(config, positions)])
    return None


def _scaled(config: Any, positions: int) -> Iterator[int]:
    """Number of positions by each factor of the rotary embedding, of layers without a window."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(parameters, Mapping):
        return
    of_layers = [value for value in parameters.values() if isinstance(value, Mapping)]
    windowed = parameters.get("sliding_attention")
    for values in [value for value in of_layers if value is not windowed] or [parameters]:
        factor = values.get("factor")
        if isinstance(factor, int | float) and factor > 1:
            yield int(factor * (values.get("original_max_position_embeddings") or positions))


class RotaryByLength:
    """Replaces the forward pass of a rotary embedding whose table depends on the pass.

    layer_types: its kinds of rotary embedding that depend on the length, by type of layer.
    threshold: length up to which every sequence has the same table.
    """

    def __init__(self, rotary: nn.Module, layer_types: Mapping[str | None, str]) -> None:
        self._rotary: Any = rotary
        self._forward = rotary.forward
        self._dynamic = [
            "" if name is None else f"{name}_"
            for name, kind in layer_types.items()
            if "dynamic" in kind
        ]
        self._lengths: Sequence[int] | None = None
        self.threshold = min(_threshold(rotary, name) for name in layer_types)
        rotary.forward = self

    @contextmanager
    def of_rows(self, lengths: Sequence[int] | None) -> Iterator[None]:
        """Context manager: in it, row r of a pass has a sequence of `lengths[r]` tokens."""
        self._lengths = lengths
        try:
            yield
        finally:
            self._lengths = None

    @torch.no_grad()
    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Angles:
        lengths = self._lengths
        if lengths is None or position_ids.shape[-1] <= self.threshold:
            angles: Angles = self._forward(x, position_ids, *args, **kwargs)
            return angles
        width = position_ids.shape[-1]
        rows = position_ids.expand(*position_ids.shape[:-2], len(lengths), width)
        tables: dict[int, Angles] = {}
        for row, length in enumerate(lengths):
            if length not in tables:
                self._reset()
                # Positions of the padding, to which no token attends, do not count.
                own = rows[..., row : row + 1, :].clamp(max=length - 1)
                cos, sin = self._forward(x[:1], own, *args, **kwargs)
                tables[length] = cos.clone(), sin.clone()
        self._reset()
        cos, sin = zip(*(tables[length] for length in lengths), strict=True)
        return torch.cat(cos, -3), torch.cat(sin, -3)

    def _reset(self) -> None:
        """Forget the longest sequence so far, whose table dynamic scaling would keep."""
        for prefix in self._dynamic:
            frequencies = getattr(self._rotary, f"{prefix}inv_freq")
            frequencies.copy_(getattr(self._rotary, f"{prefix}original_inv_freq"))
            for name in {"max_seq_len_cached", f"{prefix}max_seq_len_cached"}:
                if hasattr(self._rotary, name):
                    setattr(self._rotary, name, self._rotary.original_max_seq_len)


def rotaries_by_length(model: nn.Module) -> list[RotaryByLength]:
    """Replace the forward pass of each rotary embedding of a model that depends on the length."""
    replaced = []
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        of_layers: dict[str | None, str] = kinds if isinstance(kinds, dict) else {None: kinds}
        dependent = {name: kind for name, kind in of_layers.items() if _depends_on_length(kind)}
        if dependent and hasattr(module, "config"):
            replaced.append(RotaryByLength(module, dependent))
    return replaced


@contextmanager
def of_rows(rotaries: Sequence[RotaryByLength], lengths: Sequence[int] | None) -> Iterator[None]:
    """Context manager that sets the lengths of the rows for all rotary embeddings of a model."""
    with ExitStack() as stack:
        for rotary in rotaries:
            stack.enter_context(rotary.of_rows(lengths))
        yield


def _depends_on_length(kind: Any) -> bool:
    return isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind)


def _threshold(rotary: Any, layer_type: str | None) -> int:
    parameters = rotary.config.rope_parameters
    values = parameters if layer_type is None else parameters[layer_type]
    if "dynamic" in values["rope_type"]:
        return int(rotary.original_max_seq_len)
    return int(values["original_max_position_embeddings"])
