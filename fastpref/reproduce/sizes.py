"""Sizes of a reproduction: the model, the rows of data, the seeds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Size:
    """Size of the runs of a study.

    model: folder of a pretrained model to start from, instead of a small one made here.
    """

    name: str
    hidden: int
    layers: int
    max_length: int
    warm_up: int  # prompts of each part of the data, with `per_prompt` groups of responses each
    train: int
    held_out: int
    per_prompt: int
    seeds: int
    workers: int  # runs at a time, one thread each
    dtype: str = "float32"
    lr_scale: float = 1.0  # factor on the learning rates, which suit the small model
    model: Path | None = None

    @property
    def quick(self) -> bool:
        """Whether the runs only show that the machinery works."""
        return self.name == "quick"

    @property
    def prompts(self) -> int:
        return self.warm_up + self.train + self.held_out

    @property
    def llama(self) -> dict[str, Any]:
        heads = max(4, self.hidden // 64)
        return {
            "model_type": "llama",
            "vocab_size": 1024,
            "hidden_size": self.hidden,
            "intermediate_size": self.hidden * 11 // 4,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": self.max_length,
        }

    def starting_from(self, model: Path) -> Size:
        """The same data, with a pretrained model and learning rates of its own."""
        return replace(self, model=model, lr_scale=1.0)


SIZES = {
    size.name: size
    for size in (
        Size("quick", 64, 2, 128, 80, 80, 40, 1, seeds=1, workers=2),
        Size("cores", 128, 2, 128, 120, 140, 340, 3, seeds=3, workers=2),
        Size("gpu", 1024, 12, 512, 120, 140, 340, 6, 3, 1, "bfloat16", 0.1),
    )
}
