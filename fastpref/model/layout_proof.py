"""Proof that a model computes packed rows as it computes single sequences.

The attention function is the only place where tokens of a packed row may meet, and it must be told
all that it needs. Three questions, on the layers of transformers with an attention of our own:

1. Does the mask of a single sequence say more than the arguments of the attention do? A window that
   is kept in the mask alone would be lost in a packed row, which has no mask.
2. Does anything pass from one sequence to another? The embeddings of one segment are replaced by
   NaN, which passes through every weight, even one of 0: a token that computes with such a number,
   in a convolution, a recurrence or a statistic of the row, is NaN itself.
3. Do tokens meet at the right positions? Hidden states of a packed row are compared with those of
   single sequences while the scores of the attention are scaled to a standard deviation of 2: in a
   model with small random weights all scores are nearly equal, whatever the positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastpref import attention
from fastpref.attention import Segments
from fastpref.data.dataset import TokenGroup
from fastpref.data.packing import PackedRow, pack_groups
from fastpref.model.layout_check import relative_error
from fastpref.model.packed_attention import OUT_OF_MEMORY, argument_problem

NAME = "fastpref_probe"
SCORES = 2.0  # standard deviation of the scores after scaling
QUERIES = 64  # number of queries of a mask that are read

OUTSIDE = "its layers mix positions outside of the attention"
MASK = "its mask is neither causal nor a window"
WINDOW = "its layers keep a window in the mask alone"
MADE_MASK = "its layers make a mask of their own"
NO_SEGMENTS = "its layers do not pass the segments on"
UNSET = "its attention cannot be replaced"
VALUES = "its attention has values of another size than its keys"
NO_CALL = "its layers call no attention that can be replaced"
UNREAD = "its layers do not compute with its embeddings alone"
POSITIONS = "its layers do not use the positions of a packed row"


class Obstacle(Exception):
    """Reason why a model cannot compute packed rows."""


@torch.no_grad()
def packing_obstacle(model: Any, groups: Sequence[TokenGroup], tolerance: float) -> str:
    """Reason why a Hugging Face model cannot compute these groups packed; empty if it can.

    groups: at least one; the longest ones, since a window shows in sequences longer than itself.
    tolerance: largest relative error of hidden states that rounding explains.
    """
    original, was_training = model.config._attn_implementation, model.training
    model.eval()
    try:
        # Compiled layers would record nothing, or be compiled again for the probe.
        with torch.compiler.set_stance("force_eager"):
            _prove(model, groups, tolerance)
    except Obstacle as obstacle:
        return str(obstacle)
    except OUT_OF_MEMORY:
        raise
    # Modeling code raises anything for an argument or a mask that it does not know.
    except Exception as error:
        text = str(error).partition("\n")[0]
        return f"its layers cannot take a packed row ({type(error).__name__}: {text[:80]})"
    finally:
        model.set_attn_implementation(original)
        model.train(was_training)
    return ""


def _prove(model: Any, groups: Sequence[TokenGroup], tolerance: float) -> None:
    """Raise Obstacle if one of the three questions has the wrong answer."""
    probe = Probe()
    with probe.of(model):
        sequences = [(g, k) for g, group in enumerate(groups) for k in range(len(group.responses))]
        longest = max(sequences, key=lambda s: _size(groups, s))
        alone = pack_groups(groups, [longest], share=False)
        with probe.reading_masks():
            probe.hidden_states(model, alone)
        if not probe.calls:
            raise Obstacle(NO_CALL)
        # A second group, which must not see the first one.
        row = pack_groups(groups if len(groups) > 1 else [*groups, groups[0]], sequences)
        _check_leaks(lambda poisoned: probe.hidden_states(model, row, poisoned), row.segments)
        expected = []
        for sequence in sequences:
            single = pack_groups(groups, [sequence], share=False)
            states = probe.hidden_states(model, single)
            expected.append(states[single.predictor_positions.to(states.device)])
        states = probe.hidden_states(model, row)[row.predictor_positions.to(model.device)]
        if not relative_error(states, torch.cat(expected)) <= tolerance:
            raise Obstacle(POSITIONS)


def _size(groups: Sequence[TokenGroup], sequence: tuple[int, int]) -> int:
    group, response = groups[sequence[0]], sequence[1]
    return len(group.prompt) + len(group.responses[response])


def _check_leaks(hidden_states: Callable[[Tensor], Tensor], segments: Segments) -> None:
    """Raise Obstacle if a poisoned token reaches one that must not see it.

    hidden_states: function from the poisoned tokens (P,), bool, to hidden states (P, D).
    """
    sizes, prompts = torch.from_numpy(segments.sizes), torch.from_numpy(segments.prompts)
    index = torch.arange(len(sizes))
    first, last = prompts == 0, prompts == prompts[-1]
    responses = index != prompts
    # Segments to poison: first responses, last responses, the first group, the last group.
    cases = [
        responses & torch.cat([torch.tensor([False]), ~responses[:-1]]),
        responses & torch.cat([~responses[1:], torch.tensor([True])]),
        first,
        last,
    ]
    for poisoned in cases:
        # A response whose prompt is poisoned may be poisoned, too.
        must_be_finite = ~(poisoned | poisoned[prompts])
        is_finite = hidden_states(poisoned.repeat_interleave(sizes)).isfinite().all(-1).cpu()
        if is_finite[poisoned.repeat_interleave(sizes)].any():
            raise Obstacle(UNREAD)
        if not is_finite[must_be_finite.repeat_interleave(sizes)].all():
            raise Obstacle(OUTSIDE)


class Probe:
    """Attention that records how a model calls it, and scales the scores.

    calls: number of attention calls of the last pass.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._factors: list[float] = []  # of the scores, by call
        self._reads_masks = False
        # By storage: a tensor that stands for a mask, and the window of the mask.
        self._masks: dict[int, tuple[Tensor, int | Obstacle | None]] = {}

    @contextmanager
    def of(self, model: Any) -> Iterator[None]:
        """Context manager in which the model calls this attention; the caller restores its own."""
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(NAME, self.attention)
        AttentionMaskInterface.register(NAME, self.mask)
        try:
            model.set_attn_implementation(NAME)
            if model.config._attn_implementation != NAME:
                raise Obstacle(UNSET)
            yield
        finally:
            self._masks.clear()

    @contextmanager
    def reading_masks(self) -> Iterator[None]:
        """Context manager in which the model makes its masks, which are compared."""
        self._reads_masks = True
        try:
            yield
        finally:
            self._reads_masks = False

    def hidden_states(self, model: Any, row: PackedRow, poisoned: Tensor | None = None) -> Tensor:
        """Last hidden states (P, D) of a row whose poisoned tokens have embeddings of NaN."""
        self.calls = 0
        ids, positions = row.input_ids.to(model.device), row.position_ids.to(model.device)

        def poison(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            mask = poisoned.to(output.device)[..., None]  # type: ignore[union-attr]
            return output.masked_fill(mask, math.nan)

        embedding = model.get_input_embeddings()
        handle = None if poisoned is None else embedding.register_forward_hook(poison)
        try:
            output = model.base_model(
                input_ids=ids, position_ids=positions, use_cache=False, segments=row.segments
            )
        finally:
            if handle is not None:
                handle.remove()
        states: Tensor = output.last_hidden_state[0]
        return states

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        mask_function: Callable[..., Tensor],
        device: torch.device | None = None,
        **_: Any,
    ) -> Tensor | None:
        """Mask function of transformers: a tensor that stands for the mask, or None."""
        if not self._reads_masks:
            return None
        # An obstacle only if an attention uses the mask.
        window: int | Obstacle | None
        try:
            window = _window_of(mask_function, q_length, kv_length)
        except Obstacle as obstacle:
            window = obstacle
        marker = torch.zeros(1, dtype=torch.bool, device=device)
        self._masks[marker.untyped_storage().data_ptr()] = marker, window
        return marker.expand(batch_size, 1, q_length, kv_length)

    def attention(
        self,
        module: Any,
        query: Tensor,  # (N, H, L, D)
        key: Tensor,  # (N, H', L, D)
        value: Tensor,  # (N, H', L, D)
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        sliding_window: int | None = None,
        segments: Segments | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Attention of a packed row, in plain PyTorch; raises Obstacle for what is not known."""
        problem = argument_problem(module, None, dropout, others)
        if problem:
            raise Obstacle(f"its attention has {problem}, which packed rows do not know")
        if segments is None:
            raise Obstacle(NO_SEGMENTS)
        if value.shape != key.shape:
            raise Obstacle(VALUES)
        if attention_mask is not None:
            self._compare(attention_mask, sliding_window, query.shape[2])
        q, k, v = (x.to(value.dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        scale = (q.shape[-1] ** -0.5 if scaling is None else scaling) * self._factor(q, k, scaling)
        options: dict[str, Any] = {"window": sliding_window, "softcap": softcap}
        output = attention.packed_attention(
            q, k, v, segments, scale=scale, impl="by_segment", **options
        )
        return output.unflatten(0, (query.shape[0], query.shape[2])), None

    def _compare(self, attention_mask: Tensor, sliding_window: int | None, length: int) -> None:
        """Raise Obstacle unless the mask is the causal one, within the window of the arguments."""
        known = isinstance(attention_mask, Tensor) and self._masks.get(
            attention_mask.untyped_storage().data_ptr()
        )
        if not known:
            raise Obstacle(MADE_MASK)
        window = known[1]
        if isinstance(window, Obstacle):
            raise window
        if sliding_window is not None and sliding_window >= length:
            sliding_window = None
        if window != sliding_window:
            raise Obstacle(WINDOW)

    def _factor(self, q: Tensor, k: Tensor, scaling: float | None) -> float:
        """Factor of this call's scores, from the first pass with finite ones."""
        call, self.calls = self.calls, self.calls + 1
        if call == len(self._factors):
            keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            scale = q.shape[-1] ** -0.5 if scaling is None else scaling
            scores = torch.einsum("hd,khd->hk", q[-1].float(), keys.float()) * scale
            spread = (scores - scores.mean(-1, keepdim=True)).square().mean().sqrt().item()
            self._factors.append(min(max(1.0, SCORES / max(spread, 1e-9)), 1e4))
        return self._factors[call]


def _window_of(mask_function: Callable[..., Tensor], queries: int, keys: int) -> int | None:
    """Window of a causal mask, None if it shows in none of the queries; raises Obstacle."""
    if queries != keys:
        raise Obstacle(MASK)
    k = torch.arange(keys)[None]
    q = torch.linspace(0, keys - 1, min(keys, QUERIES)).round().long()[:, None]
    zero = torch.zeros(1, 1, dtype=torch.long)
    seen = mask_function(zero, zero, q, k).expand(len(q), keys)
    size = int(seen[-1].sum())
    expected = (k <= q) & (q - k < size)
    if not torch.equal(seen, expected):
        raise Obstacle(MASK)
    return None if size == keys else size
