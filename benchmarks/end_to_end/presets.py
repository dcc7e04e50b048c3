"""Models, lengths of data and contestants of the comparison.

Presets for GPUs draw words uniformly, one token each, in prompts and responses of log-normal
lengths; times depend on the lengths only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
Values = dict[str, Any]
TEXTS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths in tokens: median and standard deviation of the logarithm."""

    prompt: tuple[float, float]
    response: tuple[float, float]

    def draw(self, pairs: int, longest: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Draw lengths of prompt, chosen and rejected, (pairs, 3).

        A prompt has at most 3/4 of `longest` tokens, which leaves room for a response.
        """
        normal = np.random.default_rng(seed).standard_normal((pairs, 3))
        medians, spreads = zip(self.prompt, self.response, self.response, strict=True)
        drawn = np.exp(np.log(medians) + np.array(spreads) * normal).round().astype(np.int64)
        return drawn.clip(1, [3 * longest // 4, longest, longest])


SHORT = Lengths((120, 0.8), (250, 0.6))  # as in UltraFeedback
LONG = Lengths((1500, 0.4), (200, 0.6))  # as with retrieved text or long conversations


@dataclass(frozen=True)
class Preset:
    """One comparison: every contestant trains the same model on the same pairs in the same steps.

    All contestants take `steps` optimizer steps, or `curve_steps` with a loss curve; both include
    the first `warm_up` steps, which are not timed. They take turns of `block` steps.
    """

    name: str
    model: Values  # a Hugging Face config
    max_length: int
    device: str
    dtype: str
    lengths: Lengths | None  # None: real text, tokenized with a BPE trained on it
    steps: int
    curve_steps: int
    block: int
    batch_size: int  # pairs of an optimizer step
    micro_batch: int  # pairs of a forward pass of TRL; fastpref fills `micro_batch_tokens`
    minutes: float
    lr: float
    adapter: Values | None = None
    warm_up: int = 1
    ours: Values = field(default_factory=dict)  # fields of fastpref's `training`

    @property
    def pairs(self) -> int:
        return self.curve_steps * self.batch_size


@dataclass(frozen=True)
class Contestant:
    """A trainer and its options in addition to the preset."""

    name: str
    trainer: str  # fastpref, trl, or trl with fastpref's loss (mixin) or with liger-kernel's
    options: Values = field(default_factory=dict)  # of fastpref's `training`, or of DPOConfig
    curve: bool = False
    model: Values = field(default_factory=dict)  # fields of fastpref's `model`


OURS, PEER = "fastpref", "TRL"
# Ordered by importance, since time can run out.
CONTESTANTS = (
    Contestant(OURS, "fastpref", curve=True),
    Contestant(PEER, "trl", curve=True),
    Contestant(
        "fastpref, defaults",
        "fastpref",
        {"micro_batch_tokens": "auto", "activation_checkpointing": "auto"},
    ),
    Contestant("fastpref, no checkpointing", "fastpref", {"activation_checkpointing": "off"}),
    Contestant("fastpref, transformers' layers", "fastpref", model={"kernels": "torch"}),
    Contestant("TRL, reference precomputed", "trl", {"precompute_ref_log_probs": True}),
    Contestant("TRL, liger's layers", "trl", {"use_liger_kernel": True}),
    Contestant("TRL, no checkpointing", "trl", {"gradient_checkpointing": False}),
    Contestant("TRL, fastpref's loss", "mixin"),
    Contestant("TRL, liger's loss", "liger"),
)


def llama(width: int, inner: int, layers: int, heads: tuple[int, int], **more: Any) -> Values:
    """Hugging Face config of a Llama; heads: of queries, and of keys."""
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        **more,
    }


_CPU = Preset(
    "cpu",
    llama(256, 640, 4, (4, 4), vocab_size=16000),  # 11.2M parameters
    max_length=1024,
    device="cpu",
    dtype="float32",
    lengths=None,
    steps=6,
    curve_steps=24,
    block=2,
    batch_size=4,
    micro_batch=4,
    minutes=20,
    lr=1e-5,
    # A CPU computes pair by pair, so recomputation saves nothing for one or two pairs.
    ours={"micro_batch_tokens": 2048, "activation_checkpointing": "off"},
)
_CPU_LORA = replace(
    _CPU,
    name="cpu-lora",
    # SmolLM2-135M
    model=llama(576, 1536, 30, (9, 3), vocab_size=49152, tie_word_embeddings=True),
    max_length=512,
    steps=4,
    curve_steps=6,
    block=1,
    minutes=40,
    adapter={"name": "lora", "r": 16, "alpha": 32, "target_modules": "all-linear"},
)
_LORA = Preset(
    "lora-8b",
    llama(4096, 14336, 32, (32, 8)),  # Llama-3-8B
    max_length=2048,
    device="cuda",
    dtype="bfloat16",
    lengths=SHORT,
    steps=8,
    curve_steps=8,
    block=8,
    batch_size=16,
    micro_batch=4,
    minutes=9,
    lr=5e-6,
    adapter={"name": "lora", "r": 16, "alpha": 32, "target_modules": "all-linear"},
    warm_up=2,
    ours={"micro_batch_tokens": 4096},  # tokens of the longest possible pair: least memory
)
# The same path in a minute, as a check before a run of an hour.
_SMALL = replace(
    _LORA, name="small", model=llama(1024, 2816, 4, (8, 4)), steps=4, curve_steps=4, minutes=3
)
_QLORA = replace(_LORA, name="qlora-8b", adapter={**(_LORA.adapter or {}), "quantize": "nf4"})
# TRL's policy, gradient, moments and reference in fp32 are 20 bytes a parameter: 30 GB.
_FULL = replace(
    _LORA,
    name="full-1.5b",
    model=llama(1536, 8960, 28, (12, 2), tie_word_embeddings=True),
    adapter=None,
    lr=5e-7,
)


def _long(preset: Preset) -> Preset:
    name = f"{preset.name}-long"
    ours = {"micro_batch_tokens": 8192}
    return replace(
        preset, name=name, lengths=LONG, max_length=4096, batch_size=8, micro_batch=2, ours=ours
    )


# Pairs of 32k tokens, the longest that a run on one GPU is likely to meet.
_LORA_32K = replace(
    _LORA,
    name="lora-8b-32k",
    lengths=Lengths((24000, 0.1), (3000, 0.3)),
    max_length=32768,
    batch_size=2,
    micro_batch=1,
    steps=5,
    curve_steps=5,
    block=5,
    ours={"micro_batch_tokens": 65536},
)
PRESETS = {
    preset.name: preset
    for short in (_LORA, _QLORA, _FULL)
    for preset in (short, _long(short))
} | {preset.name: preset for preset in (_SMALL, _CPU, _CPU_LORA, _LORA_32K)}  # fmt: skip


def tiny(preset: Preset) -> Preset:
    """A preset with the same path that takes seconds on a CPU."""
    lengths = preset.lengths or SHORT
    (prompt, a), (response, b) = lengths.prompt, lengths.response
    small = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return replace(
        preset,
        model={**preset.model, **small, **heads},
        max_length=preset.max_length // 32,
        device="cpu",
        lengths=Lengths((prompt / 32, a), (response / 32, b)),
        steps=2,
        curve_steps=3,
        block=1,
        batch_size=4,
        micro_batch=2,
        warm_up=1,
    )


def synthetic(preset: Preset, seed: int = 0) -> Iterator[Row]:
    """Generate pairs of words `w0`, `w1`, …, one for each token that is not special."""
    assert preset.lengths is not None
    generator = np.random.default_rng(seed + 1)
    words = preset.model["vocab_size"] - len(SPECIAL)
    for lengths in preset.lengths.draw(preset.pairs, preset.max_length, seed):
        parts = [" ".join(f"w{k}" for k in generator.integers(words, size=n)) for n in lengths]
        yield dict(zip(TEXTS, (parts[0], f" {parts[1]}", f" {parts[2]}"), strict=True))


def real(path: Path, count: int) -> list[Row]:
    """Read the first pairs of a JSONL file, without soft labels."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    return [{name: row[name] for name in TEXTS} for row in rows]


SPECIAL = ("<s>", "</s>", "<pad>")


def word_tokenizer(size: int) -> Any:
    """Make a Hugging Face tokenizer of `size` tokens, one for each word of `synthetic`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{k}" for k in range(size - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad
    )


def fastpref_config(preset: Preset, contestant: Contestant, folder: Path, steps: int) -> Values:
    """The config of a run on the model and pairs in `folder`.

    fastpref may refuse adapter options of the preset.
    """
    optim = {"lr": preset.lr, "weight_decay": 0.0, "max_grad_norm": 1.0}
    training = {"batch_size": preset.batch_size, "steps": steps, "seed": 0, "device": preset.device}
    training |= {"checkpoint_every": None, "output_dir": str(folder / contestant.name)}
    config: Values = {
        "model": {"path": str(folder / "model"), "dtype": preset.dtype, **contestant.model},
        "data": {
            "train": str(folder / "pairs.jsonl"),
            "max_length": preset.max_length,
            "cache": str(folder / "cache"),
        },
        "loss": {"name": "dpo", "beta": 0.1},
        "optim": optim,
        "training": {**training, **preset.ours, **contestant.options},
    }
    if preset.adapter is not None:
        config["adapter"] = preset.adapter
    return config


def trl_config(preset: Preset, contestant: Contestant, folder: Path, steps: int) -> Values:
    """Arguments of DPOConfig; all others keep TRL's defaults."""
    return {
        "output_dir": str(folder / contestant.name),
        "max_steps": steps,
        "per_device_train_batch_size": preset.micro_batch,
        "gradient_accumulation_steps": math.ceil(preset.batch_size / preset.micro_batch),
        "train_sampling_strategy": "sequential",
        "max_length": preset.max_length,
        "beta": 0.1,
        "learning_rate": preset.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": preset.dtype == "bfloat16",
        "use_cpu": preset.device == "cpu",
        "logging_steps": 1,  # free: TRL computes all metrics in every step anyway
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **contestant.options,
    }
