"""The policy of a reward model: the trunk of a language model under a head of one row.

The reward of a response is read at its last token, as `AutoModelForSequenceClassification` does of
a conversation alone. Where `Policy` returns summed log-probs it returns rewards, so data, plan,
trainer and checkpoints are those of every other run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from fastpref.data.collate import Batch
from fastpref.model.policy import ForwardOptions, Policy, PolicyOutput
from fastpref.utils.errors import ModelError

HEAD = "score"  # name of the head in the classifiers of transformers
_SAVED_HEAD = f"base_model.model.{HEAD}."  # names of its weights in the files of peft
_NO_OPTIONS = ForwardOptions()


class RewardPolicy(Policy):
    """A sequence classifier with one label; `PolicyOutput.logps` are the rewards (S,)."""

    has_loaded_head = False  # whether an adapter has brought its own

    def _require_plain_head(self) -> None:
        head = getattr(self.base, HEAD, None)
        if type(head) is not nn.Linear or head.out_features != 1:
            raise ModelError(
                f"model: {type(self.base).__name__} has no linear layer {HEAD} with one output; "
                "use another model"
            )

    @property
    def vocabulary(self) -> int:
        embeddings: Any = self.base.get_input_embeddings()
        rows: int = embeddings.weight.shape[0]
        return rows

    def train_head(self) -> None:
        """Train the head of a frozen base, in fp32 at least; it is small and never sharded."""
        head: Any = getattr(self.base, HEAD)
        head.to(torch.promote_types(self.compute_dtype, torch.float32)).requires_grad_(True)

    @torch.no_grad()
    def load_head(self, values: dict[str, Tensor], path: str) -> None:
        """Take the head of an adapter at `path` out of its values, if they have one.

        Raises ModelError for a head of another shape.
        """
        head: Any = getattr(self.base, HEAD)
        names = {name for name in values if name.startswith(_SAVED_HEAD)}
        if not names:
            return
        parts = {name.removeprefix(_SAVED_HEAD): values.pop(name) for name in sorted(names)}
        targets = dict(head.named_parameters())
        if {name: part.shape for name, part in parts.items()} != {
            name: target.shape for name, target in targets.items()
        }:
            shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in parts.items())
            raise ModelError(
                f"adapter.path: the head of {path} ({shapes}) does not fit the model; use an "
                "adapter of a reward model with one label that was trained on it"
            )
        for name, target in targets.items():
            target.copy_(parts[name])
        self.has_loaded_head = True

    def replicated_parameters(self) -> list[nn.Parameter]:
        adapters = self.adapter_parameters()
        head: Any = getattr(self.base, HEAD)
        return [*adapters, *head.parameters()] if adapters else adapters

    def forward(self, batch: Batch, options: ForwardOptions = _NO_OPTIONS) -> PolicyOutput:
        """Compute the rewards of the batch's sequences; a reward has no optional outputs."""
        last = batch.label_positions[batch.cu_seqlens[1:] - 1]
        rewards = self._rewards(self.hidden_states(batch).index_select(0, last))
        return PolicyOutput(rewards, token_logps=rewards.new_zeros(0))

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight (1, D) and bias (1,) of the head, in fp32 or fp64."""
        dtype = torch.promote_types(self.compute_dtype, torch.float32)
        head: Any = getattr(self.base, HEAD)
        return head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)

    def _rewards(self, hidden: Tensor) -> Tensor:
        """Rewards (S,) of the hidden states (S, D) of last tokens."""
        weight, bias = self.head()
        return functional.linear(hidden.to(weight.dtype), weight, bias)[:, 0]

    @torch.no_grad()
    def check_head(self) -> None:
        """Compare a reward with that of the model itself, on eight tokens.

        Raises ModelError that names the model if they differ or are not finite.
        """
        with self._evaluating(), self.autocast():
            ids = torch.arange(1, 9, device=self.device).remainder(self.vocabulary)[None]
            pad = self.base.config.get_text_config().pad_token_id
            # A padding token at the end would be passed over.
            ids[ids == pad] = 9 % self.vocabulary
            ours = self._rewards(self.last_hidden_state(input_ids=ids)[:, -1])
            theirs = self.base(input_ids=ids, use_cache=False).logits[:, 0].to(ours.dtype)
        error, half = (ours - theirs).abs().max().item(), self.compute_dtype == torch.bfloat16
        tolerance = max(0.1, 2**-6 * theirs.abs().max().item()) if half else 1e-3
        if not error <= tolerance:
            raise ModelError(
                f"model: {type(self.base).__name__} computes other rewards than its layer {HEAD} "
                f"(they differ by {error:.3g}); look for NaN in its weights, or use another model"
            )


def set_padding_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a padding token that ends no response.

    A classifier of transformers reads the reward at the last token that is not padding, so the
    token that ends a response must not be it. Raises ModelError if the tokenizer has no other.
    """
    for token in _candidates(tokenizer):
        if _is_free(token, tokenizer):
            tokenizer.pad_token = token
            return
    raise ModelError(
        f"model.tokenizer: {tokenizer.name_or_path or 'it'} has no token for padding besides those "
        "that end a response; add a special token to the tokenizer"
    )


def _candidates(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Tokens for padding: the one in use, those that are named so, unused ones, others."""
    if tokenizer.pad_token is not None:
        yield str(tokenizer.pad_token)
    added: Any = tokenizer.added_tokens_decoder
    special = [str(token) for _, token in sorted(added.items()) if token.special]
    for word in ("pad", "reserved", "unused", ""):
        yield from (token for token in special if word in token.lower())


def _is_free(token: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a token neither begins nor ends a sequence, nor stands in the chat template."""
    used = {tokenizer.eos_token, tokenizer.bos_token}
    return token not in used and token not in str(tokenizer.chat_template or "")
