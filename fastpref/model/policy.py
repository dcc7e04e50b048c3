"""The policy: a Hugging Face causal language model whose head is the fused log-prob op.

`Policy.forward` runs the trunk, keeps the hidden states that predict completion tokens, and hands
them with the head's weight to `fastpref.ops`. Logits in full never exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from fastpref import attention, ops
from fastpref.data.batch_plan import Layout
from fastpref.data.collate import Batch, collate
from fastpref.data.dataset import IndexedGroups, TokenGroup
from fastpref.data.packing import PackedRow, varlen_arguments
from fastpref.model import head_check, layout_check, packed_attention, trunk_check
from fastpref.model.generate import Sampling, Sequences, with_transformers
from fastpref.model.layout_proof import packing_obstacle
from fastpref.model.packed_attention import packing_error
from fastpref.model.positions import context_length_of, of_rows, rotaries_by_length
from fastpref.trunk import Trunk
from fastpref.utils.errors import ModelError


class PolicyOutput(NamedTuple):
    """Results of a forward pass over S responses with T tokens; fp32, or fp64 for fp64 models."""

    logps: Tensor  # (S,) summed log-probs of the responses, nats
    token_logps: Tensor  # (T,) log-probs of the response tokens, nats
    entropy: Tensor | None = None  # (2,) entropies summed over the tokens, nats; number of tokens
    collision_entropy: Tensor | None = None  # (T,) nats
    kl: Tensor | None = None  # (T,) KL(reference || policy) of the distributions, nats
    importance: Tensor | None = None  # (T,) see `fastpref.model.token_importance`
    score_sums: Tensor | None = None  # (2, rows, D) `ops.linear_logps_and_scores`
    geometry: ops.ScoreGeometry | None = None  # (B,) of each pair's scores of the head's weight
    head: tuple[Tensor, Tensor] | None = None  # hidden states (T, D) and weight (V, D)


@dataclass(frozen=True)
class ScoreOptions:
    """Scores of the head's weight to measure, of pairs and for heads without a bias.

    sums: compute `score_sums`; part of the pass over the head, or one more with weights.
    rows: of their sketches; None for the exact sums, which take half a GEMM more per side.
    pairs: compute `geometry` of each pair, one or two more passes.
    weights: function from the output so far to the weight of each token in the scores, (T,); None
        for equal weights.
    """

    sums: bool = False
    rows: int | None = ops.SKETCH_ROWS
    pairs: bool = False
    weights: Callable[[PolicyOutput], Tensor | None] | None = None


NO_SCORES = ScoreOptions()


@dataclass(frozen=True)
class ForwardOptions:
    """Optional outputs of a forward pass; nothing is computed unless requested.

    entropy: compute the entropy, one more pass over the head.
    collision_entropy: compute the collision entropy, two more passes.
    head: return the hidden states and the head's weight, no more passes.
    reference: `head` output of the reference at the same tokens; computes `kl`, two more passes.
    scores: compute `score_sums` and `geometry` as these options say.
    """

    entropy: bool = False
    collision_entropy: bool = False
    head: bool = False
    reference: tuple[Tensor, Tensor] | None = None
    scores: ScoreOptions = NO_SCORES


_LOGPS_ONLY = ForwardOptions()
# Methods that run forward passes of the model, in addition to `forward`: FSDP2 must know them.
FORWARD_METHODS = (
    "check_head",
    "check_trunk",
    "check_causal",
    "generate",
    "packing_error",
    "packing_obstacle",
    "padding_error",
    "trunk_error",
)


class Policy(nn.Module):
    """A causal language model that returns response log-probs."""

    def __init__(self, causal_lm: nn.Module, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.causal_lm = causal_lm  # possibly wrapped by peft
        self.compute_dtype = compute_dtype
        self.layout: Layout = "padded"  # see `fastpref.model.batch_layout`
        self.batch_invariant = True  # see `batches`
        self.sharded = False  # see `fastpref.model.fsdp`
        self.kernels = "torch"  # "fused", "liger" or "torch"; see `fastpref.model.layer_kernels`
        self.trunk: Trunk | None = None  # of "fused" kernels
        self.not_fused = ""  # reason why "auto" did not choose them
        self.fresh_adapter = True  # False for an adapter that was loaded
        base = self.base
        self.logit_scale, self.softcap = head_check.head_options(base.config)
        self.rotaries = rotaries_by_length(base)
        self._require_plain_head()
        if base.base_model is base:
            raise ModelError(
                f"model: {type(base).__name__} does not give its hidden states apart from its "
                "head; use another model"
            )

    def _require_plain_head(self) -> None:
        """Raise ModelError for a head that is not a linear layer."""
        head = self.base.get_output_embeddings()
        if type(head) is not nn.Linear:
            kind = "none" if head is None else type(head).__name__
            raise ModelError(
                f"model: the head of {type(self.base).__name__} must be a plain linear layer, got "
                f"{kind}; adapters or quantization on the head are not supported"
            )

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model knows."""
        return self.head()[0].shape[0]

    @property
    def base(self) -> PreTrainedModel:
        """The Hugging Face model, without the wrapper of peft."""
        unwrap: Any = getattr(self.causal_lm, "get_base_model", None)
        return unwrap() if unwrap is not None else cast(PreTrainedModel, self.causal_lm)

    @property
    def quantized(self) -> bool:
        """Whether the base has 4-bit linear layers, which cannot be sharded."""
        return bool(getattr(self.base, "is_loaded_in_4bit", False))

    def blocks(self) -> nn.ModuleList:
        """Transformer blocks: the longest module list of the trunk."""
        lists = (m for m in self.base.base_model.modules() if isinstance(m, nn.ModuleList))
        return max(lists, key=len)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name; for a sharded model, the shards of this rank."""
        self.to_shards()
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def to_shards(self) -> None:
        """Reshard parameters left gathered by a forward pass without a backward pass (FSDP).

        They are those of the root, and with `parallel.reshard_after_forward: false` of the blocks.
        """
        for module in (self, *self.blocks()):
            if isinstance(module, FSDPModule):
                module.reshard()  # of the module alone, and not of those within

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.named_parameters() if "lora_" in name]

    def replicated_parameters(self) -> list[nn.Parameter]:
        """Parameters that every rank has in full, beside sharded weights."""
        return self.adapter_parameters()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, batch: Batch, options: ForwardOptions = _LOGPS_ONLY) -> PolicyOutput:
        """Compute log-probs of the batch's sequences and tokens, and the requested outputs."""
        hidden = self.hidden_states(batch).index_select(0, batch.predictor_positions)
        weight, bias = self.head()
        head_inputs = hidden, weight, batch.labels
        scores, sums = options.scores, None
        if scores.sums and scores.weights is None:
            logps, sums = ops.linear_logps_and_scores(
                *head_inputs, batch.chosen_tokens, rows=scores.rows, **self.head_options
            )
        else:
            logps = ops.linear_logps(*head_inputs, bias=bias, **self.head_options)
        output = PolicyOutput(ops.segment_sum(logps, batch.cu_seqlens), logps, score_sums=sums)
        if options.entropy:
            stats = ops.token_stats(*head_inputs, bias=bias, **self.head_options)
            count = stats.entropy.new_tensor(len(batch.labels))
            output = output._replace(entropy=torch.stack([stats.entropy.sum(), count]))
        if options.collision_entropy:
            collision = ops.collision_entropy(*head_inputs, bias=bias, **self.head_options)
            output = output._replace(collision_entropy=collision)
        if options.reference is not None:
            kl = ops.linear_kl(hidden, weight, *options.reference, **self.head_options)
            output = output._replace(kl=kl)
        if scores.sums or scores.pairs:
            output = self._with_scores(output, batch, (hidden, weight), scores)
        return output._replace(head=(hidden, weight)) if options.head else output

    def _with_scores(
        self, output: PolicyOutput, batch: Batch, head: tuple[Tensor, Tensor], scores: ScoreOptions
    ) -> PolicyOutput:
        """Add `geometry`, and `score_sums` where these have token weights."""
        weights = None if scores.weights is None else scores.weights(output)
        if scores.sums and output.score_sums is None:
            with torch.no_grad():
                _, sums = ops.linear_logps_and_scores(
                    *head, batch.labels, batch.chosen_tokens, token_weights=weights,
                    rows=scores.rows, **self.head_options,
                )  # fmt: skip
            output = output._replace(score_sums=sums)
        if scores.pairs:
            geometry = ops.score_geometry(
                *head, batch.labels, batch.cu_seqlens, token_weights=weights, per_pair=True,
                **self.head_options,
            )  # fmt: skip
            output = output._replace(geometry=geometry)
        return output

    @property
    def separates_groups(self) -> bool:
        """Whether each group has its own forward pass; see `batches`."""
        return self.batch_invariant and self.device.type == "cpu" and not self.sharded

    def batches(self, groups: IndexedGroups, indices: Sequence[int]) -> list[Batch]:
        """Collate the batches of a micro-batch's forward passes, on the device of the policy.

        On CUDA, and for a sharded model, whose ranks gather weights together, one batch holds all
        groups. On CPU with `batch_invariant` each group has its own batch, so that its log-probs
        are bit-identical whatever other groups are in the micro-batch.
        """
        parts = [[index] for index in indices] if self.separates_groups else [indices]
        return [
            collate([groups[i] for i in part], groups.kind, self.layout).to(self.device)
            for part in parts
        ]

    def hidden_states(self, batch: Batch, embeddings: Tensor | None = None) -> Tensor:
        """Last hidden states (R·L, D) of all positions; `embeddings` (R, L, D) replace the ids."""
        with of_rows(self.rotaries, batch.row_lengths):
            return self._hidden_states(batch, embeddings)

    def _hidden_states(self, batch: Batch, embeddings: Tensor | None) -> Tensor:
        if self.trunk is not None:
            return self._explicit(batch.input_ids, batch.position_ids, batch.segments, embeddings)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids}
        if embeddings is not None:
            inputs = {"inputs_embeds": embeddings}
        if batch.segments is not None:
            inputs["position_ids"] = batch.position_ids
            if self.layout == "packed":
                inputs |= varlen_arguments(batch.segments, self.device)
            else:
                inputs["segments"] = batch.segments
        return self.last_hidden_state(**inputs).flatten(0, 1)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, D) and bias (V,) of the head, in the compute dtype."""
        head = self.base.get_output_embeddings()
        return self._compute(head.weight), self._compute(head.bias)

    def last_hidden_state(self, **inputs: Any) -> Tensor:
        """Last hidden states (R, L, D) after the final norm, in the compute dtype."""
        with self.autocast():
            hidden = self.base.base_model(use_cache=False, **inputs).last_hidden_state
        return hidden.to(self.compute_dtype)

    def _explicit(
        self,
        input_ids: Tensor,  # (R, L)
        position_ids: Tensor | None = None,
        segments: attention.Segments | None = None,
        embeddings: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Last hidden states (R·L, D) by the explicit blocks; rows are sequences by default."""
        assert self.trunk is not None
        rows, length = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device).expand(rows, length)
        segments = segments or attention.rows(rows, length)
        dtype = dtype or self.compute_dtype
        return self.trunk(input_ids, position_ids, segments, dtype, embeddings)

    def autocast(self) -> torch.autocast:
        half = self.compute_dtype == torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half)

    def _compute(self, tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.to(self.compute_dtype)

    @property
    def head_options(self) -> dict[str, Any]:
        """Options of `fastpref.ops` for this model's head."""
        return {"logit_scale": self.logit_scale, "softcap": self.softcap}

    def packing_error(self, groups: Sequence[TokenGroup]) -> float:
        """Apply `packed_attention.packing_error` to the base model, or to the explicit blocks."""
        if self.trunk is None:
            return packing_error(self.base, groups)
        return trunk_check.long_error(self, groups)

    def explicit_row(self, row: PackedRow) -> Tensor:
        """Hidden states (P, D) of a packed row by the explicit blocks, in `checked_dtype`."""
        ids, positions = row.input_ids.to(self.device), row.position_ids.to(self.device)
        return self._explicit(ids, positions, row.segments, dtype=self.checked_dtype)

    def use_transformers(self, reason: str) -> None:
        """Compute the layers by transformers' code from now on, for a reason to tell the user."""
        self.trunk, self.kernels, self.not_fused = None, "torch", reason

    @torch.no_grad()
    def check_trunk(self) -> None:
        """Compare the explicit blocks with transformers' layers, and use those if they differ."""
        error = self.trunk_error()
        if not error <= self.rounding:
            self.use_transformers(f"its layers differ from transformers' by {error:.2g}")

    def trunk_error(self) -> float:
        """Apply `trunk_check.short_error` to the explicit blocks; 0 without them."""
        return 0.0 if self.trunk is None else trunk_check.short_error(self)

    @property
    def checked_dtype(self) -> torch.dtype:
        """Dtype in which layers are compared: that of the weights, or of gathered shards."""
        return self.compute_dtype if self.sharded else self.base.dtype

    @property
    def rounding(self) -> float:
        """Largest relative error of hidden states that rounding explains."""
        return 0.1 if self.checked_dtype == torch.bfloat16 else 1e-3

    @torch.no_grad()
    def check_head(self) -> None:
        """Compare log-probs of the fused head with those of the model's logits.

        Raises ModelError that names the model if they differ or are not finite.
        """
        with self._evaluating():
            head_check.check_head(self)

    @torch.no_grad()
    def check_causal(self) -> None:
        """Raise ModelError if the hidden state of a token depends on later tokens."""
        if self.trunk is not None:
            return
        with self._evaluating():
            layout_check.check_causal(self)

    def packing_obstacle(self, groups: Sequence[TokenGroup]) -> str:
        """Apply `layout_proof.packing_obstacle` to transformers' layers; empty for our own."""
        if self.trunk is not None:
            return ""
        return packing_obstacle(self.base, groups, self.rounding)

    @torch.no_grad()
    def padding_error(self, groups: Sequence[TokenGroup]) -> float:
        """Relative error of hidden states in padded rows, against each sequence alone."""
        with self._evaluating():
            return layout_check.padding_error(self, groups)

    def complete(self, prompts: Sequences, ends: set[int], max_new_tokens: int) -> Sequences:
        """Complete prompts greedily; see `generate`."""
        greedy = Sampling(temperature=0.0, max_new_tokens=max_new_tokens)
        return self.generate(prompts, ends, greedy)

    @torch.no_grad()
    def generate(self, prompts: Sequences, ends: set[int], sampling: Sampling) -> Sequences:
        """Draw a completion of each prompt, by the layers of transformers in the compute dtype.

        ends: tokens that end a completion; what follows is padding.

        On all ranks if the weights are sharded. Random states and the layout do not change.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            self._evaluating(),
            self.autocast(),
            torch.random.fork_rng(devices),
            packed_attention.without(self.base),
            torch.compiler.set_stance("force_eager"),
        ):
            return with_transformers(self.base, prompts, ends, sampling, synced=self.sharded)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)


def context_length(policy: Policy) -> int | None:
    """Number of positions that the model supports, or None if its config has no such entry."""
    return context_length_of(policy.base.config)
