"""The policy: a Hugging Face causal language model whose head is the fused log-prob op.

`Policy.forward` runs the trunk, keeps the hidden states that predict completion tokens, and hands
them with the head's weight to `fastpref.ops`. Logits in full never exist.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastpref import config as configs
from fastpref import ops
from fastpref.data.batches import Batch
from fastpref.errors import UserError, first_line


class ModelError(UserError):
    """A model that cannot be loaded, or whose log-probs this project cannot compute."""


class PolicyOutput(NamedTuple):
    """Results of a forward pass over S responses with T tokens; fp32, fp64 for fp64 models."""

    logps: Tensor  # (S,) summed log-probs of the responses, nats
    token_logps: Tensor  # (T,) those of their tokens
    entropy: Tensor | None = None  # (2,) sum over the tokens of their distributions' entropy, count
    collision_entropy: Tensor | None = None  # (T,) nats
    kl: Tensor | None = None  # (T,) KL(reference || policy) of the distributions, nats
    importance: Tensor | None = None  # (T,) of each token, by `fastpref.attribution`
    geometry: ops.ScoreGeometry | None = None  # (B,) of each pair's scores of the head's weight
    head: tuple[Tensor, Tensor] | None = None  # hidden states (T, D) and weight (V, D)


@dataclass(frozen=True)
class Asked:
    """What a forward pass brings beside log-probs; no part of it is made unasked.

    entropy: one more pass over the head. collision_entropy: two. kl: two, from the `head` of the
    reference at the same tokens. head: none. score_weights: the geometry, of batches of pairs and
    heads without a bias, one or two; the function says from the output so far how much each token
    counts in the scores, (T,), or None for all alike.
    """

    entropy: bool = False
    collision_entropy: bool = False
    head: bool = False
    reference: tuple[Tensor, Tensor] | None = None
    score_weights: Callable[[PolicyOutput], Tensor | None] | None = None


_NOTHING = Asked()


class Policy(nn.Module):
    """A causal language model that returns response log-probs."""

    def __init__(self, causal_lm: nn.Module, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.causal_lm = causal_lm  # possibly wrapped by peft
        self.compute_dtype = compute_dtype
        base = self.base
        self.logit_scale, self.softcap = _head_options(base.config)
        head = base.get_output_embeddings()
        if type(head) is not nn.Linear:
            kind = "none" if head is None else type(head).__name__
            raise ModelError(
                f"model: the head of {type(base).__name__} must be a plain linear layer, got "
                f"{kind}; adapters or quantisation on the head are not supported"
            )

    @property
    def base(self) -> PreTrainedModel:
        """The Hugging Face model without the adapters' wrapper."""
        unwrap: Any = getattr(self.causal_lm, "get_base_model", None)
        return unwrap() if unwrap is not None else cast(PreTrainedModel, self.causal_lm)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, batch: Batch, asked: Asked = _NOTHING) -> PolicyOutput:
        """Log-probs of the batch's sequences and of their tokens, and what else is asked for."""
        hidden = self.states(batch).index_select(0, batch.positions)
        weight, bias = self.head()
        of_the_tokens = hidden, weight, batch.labels
        logps = ops.linear_logps(*of_the_tokens, bias=bias, **self.head_options)
        output = PolicyOutput(ops.segment_sum(logps, batch.cu_seqlens), logps)
        if asked.entropy:
            stats = ops.token_stats(*of_the_tokens, bias=bias, **self.head_options)
            count = stats.entropy.new_tensor(len(batch.labels))
            output = output._replace(entropy=torch.stack([stats.entropy.sum(), count]))
        if asked.collision_entropy:
            spread = ops.collision_entropy(*of_the_tokens, bias=bias, **self.head_options)
            output = output._replace(collision_entropy=spread)
        if asked.reference is not None:
            kl = ops.linear_kl(hidden, weight, *asked.reference, **self.head_options)
            output = output._replace(kl=kl)
        if asked.score_weights is not None:
            geometry = ops.score_geometry(
                *of_the_tokens,
                batch.cu_seqlens,
                token_weights=asked.score_weights(output),
                per_pair=True,
                **self.head_options,
            )
            output = output._replace(geometry=geometry)
        return output._replace(head=(hidden, weight)) if asked.head else output

    def states(self, batch: Batch, embeddings: Tensor | None = None) -> Tensor:
        """Last hidden states (S L, D) of all positions, from `embeddings` (S, L, D) if given."""
        if embeddings is not None:
            return self._hidden(inputs_embeds=embeddings).flatten(0, 1)
        return self._hidden(input_ids=batch.input_ids).flatten(0, 1)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, D) and bias (V,) of the head, in the compute dtype."""
        head = self.base.get_output_embeddings()
        return self._compute(head.weight), self._compute(head.bias)

    def _hidden(self, **inputs: Tensor) -> Tensor:
        """Last hidden states (S, L, D) after the final norm, in the compute dtype."""
        with self._autocast():
            hidden = self.base.base_model(use_cache=False, **inputs).last_hidden_state
        return hidden.to(self.compute_dtype)

    def _autocast(self) -> torch.autocast:
        half = self.compute_dtype == torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half)

    def _compute(self, tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.to(self.compute_dtype)

    @property
    def head_options(self) -> dict[str, Any]:
        """Those that `fastpref.ops` take for this model."""
        return {"logit_scale": self.logit_scale, "softcap": self.softcap}

    @torch.no_grad()
    def check_head(self) -> None:
        """Refuse a model whose own logits are not what the fused head makes of its hidden states.

        Raises ModelError naming the model. Costs one forward pass over eight tokens.
        """
        rows = self.head()[0].shape[0]
        ids = torch.arange(1, 9, device=self.device).remainder(rows).unsqueeze(0)
        was_training = self.training
        self.eval()
        with self._autocast():
            logits = self.base(input_ids=ids, use_cache=False).logits
        labels = ids.flatten().roll(-1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        expected = logits[0].to(wide).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        hidden = self._hidden(input_ids=ids)[0]
        weight, bias = self.head()
        ours = ops.linear_logps(hidden, weight, labels, bias=bias, **self.head_options)
        self.train(was_training)
        tolerance = 1e-3
        if self.compute_dtype == torch.bfloat16:  # the model's own logits are rounded, to 2^-9
            tolerance = max(0.1, 2**-7 * logits.abs().max().item())
        error = (ours - expected).abs().max().item()
        if not error <= tolerance:
            raise ModelError(
                f"model: {type(self.base).__name__} computes its logits in a way that the fused "
                f"head does not know (log-probs differ by {error:.3g}); this model is not supported"
            )


def _head_options(config: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap) by architecture; `Policy.check_head` proves them."""
    config = config.get_text_config()
    kind = config.model_type
    scale = 1.0
    if kind.startswith("cohere"):
        scale = config.logit_scale
    elif kind.startswith("granite"):
        scale = 1.0 / config.logits_scaling
    elif kind.startswith("falcon_h1"):
        scale = config.lm_head_multiplier
    return scale, getattr(config, "final_logit_softcapping", None)


def load_policy(
    config: configs.Config, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Policy:
    """Load or build the model, add adapters, and prove its head.

    Weights that are trained are kept in fp32 at least and cast by autocast; frozen ones are kept
    in the compute dtype. Raises ModelError in one line.
    """
    compute_dtype = getattr(torch, config.model.dtype)
    full = config.adapter is None
    storage = torch.promote_types(compute_dtype, torch.float32) if full else compute_dtype
    torch.manual_seed(config.training.seed)
    causal_lm: Any = _build(config.model, tokenizer, storage).to(device)
    rows = causal_lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"model: the tokenizer has {len(tokenizer):,} tokens but the embedding only "
            f"{rows:,} rows"
        )
    wrapped: nn.Module = causal_lm
    if config.adapter is not None:
        causal_lm.requires_grad_(False)
        wrapped = _add_adapter(causal_lm, config.adapter)
    policy = Policy(wrapped, compute_dtype)
    try:
        policy.check_head()
    except RuntimeError as error:  # e.g. heads that do not divide the width, in a config of theirs
        raise ModelError(_failed("model", type(causal_lm).__name__, error)) from None
    if config.training.activation_checkpointing:
        if not causal_lm.supports_gradient_checkpointing:
            raise ModelError(
                f"training.activation_checkpointing: {type(causal_lm).__name__} does not support "
                "it; set it to false"
            )
        # transformers 5.x is renaming the method; both take torch's checkpoint options first.
        older = causal_lm.gradient_checkpointing_enable
        enable = getattr(causal_lm, "activation_checkpointing_enable", older)
        enable({"use_reentrant": False})
    return policy.train()


def load_tokenizer(model: configs.Model) -> PreTrainedTokenizerBase | None:
    """The tokenizer named by the config; None where one is to be trained on the data."""
    source = model.tokenizer or model.path
    if source is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers, tokenizers and the Hub raise unrelated types
        field = "tokenizer" if model.tokenizer else "path"
        raise ModelError(_failed(f"model.{field}", source, error)) from None


def _build(model: configs.Model, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": model.trust_remote_code}
    if model.attn_implementation != "auto":
        options["attn_implementation"] = model.attn_implementation
    try:
        if model.path is None:
            config = _random_config(dict(model.config or {}), tokenizer)
            return AutoModelForCausalLM.from_config(_without_dropout(config), **options)
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            raise ModelError(f"model.path: {model.path} is quantised, which is not supported")
        return AutoModelForCausalLM.from_pretrained(
            model.path, config=_without_dropout(config), **options
        )
    except UserError:
        raise
    except Exception as error:  # transformers, safetensors and the Hub raise unrelated types
        source = model.path or str(model.config)
        raise ModelError(_failed("model", source, error)) from None


def _random_config(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Any:
    """A Hugging Face config from a mapping; unknown keys are refused, not silently kept."""
    kind = values.pop("model_type")
    default = AutoConfig.for_model(kind)
    known = {*default.to_dict(), "rope_theta", "rope_scaling"}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            guess = f"; did you mean {close[0]}?" if close else ""
            raise ModelError(f"model.config.{key}: unknown key for {kind}{guess}")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    special["pad_token_id"] = tokenizer.pad_token_id
    return AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer), **special, **values})


def _without_dropout(config: Any) -> Any:
    """Log-probs of policy and reference are compared: the same weights must give the same ones."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(config, name, 0.0)
    return config


def _add_adapter(causal_lm: PreTrainedModel, adapter: configs.Adapter) -> nn.Module:
    import peft

    try:
        return peft.get_peft_model(
            causal_lm,
            peft.LoraConfig(
                r=adapter.r,
                lora_alpha=adapter.alpha,  # type: ignore[arg-type]
                lora_dropout=adapter.dropout,
                target_modules=adapter.targets,
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise ModelError(_failed("adapter.targets", str(adapter.targets), error)) from None


def _failed(field: str, source: str, error: BaseException) -> str:
    return f"{field}: cannot load {source}: {first_line(error)}"


def export(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path, merge: bool) -> None:
    """Write the model in Hugging Face format: safetensors in the compute dtype, and the tokenizer.

    With adapters and `merge`, the merged weights; else the adapters alone, for peft to load.
    """
    model: Any = policy.causal_lm
    if merge and model is not policy.base:
        model = model.merge_and_unload()  # the base itself, its weights changed
    base = policy.base
    base.config.dtype = policy.compute_dtype
    if model is base:
        state = _cast(model.state_dict(), policy.compute_dtype)
        model.save_pretrained(folder, state_dict=state)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point tensors in `dtype`; tensors that are tied stay tied."""
    made: dict[int, Tensor] = {}
    for value in state.values():
        if value.data_ptr() not in made:
            made[value.data_ptr()] = value.to(dtype) if value.is_floating_point() else value
    return {name: made[value.data_ptr()] for name, value in state.items()}


def context_length(policy: Policy) -> int | None:
    """Positions that the model was made for, or None where its config does not say."""
    config = policy.base.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return None
