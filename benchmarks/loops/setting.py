"""What each loop trains, and the same training in plain PyTorch on the full logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader, DistributedSampler

RANKS = 2
PAIRS = 2  # per rank and step
STEPS = 3
LEARNING_RATE = 0.5  # of SGD, whose step shows a wrong scale of the gradient
BETA = 0.1
VOCABULARY = 384  # of the tokenizers in tests
# ZeRO-3 leaves weights of few elements whole by default, and all of the tiny model are.
ZERO_3: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": PAIRS,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}
Example = tuple[Tensor, Tensor, int]
Logits = Callable[[Any, dict[str, Tensor]], Tensor]  # (S, L, V) of a model and a batch


def causal_model(seed: int = 0, tied: bool = False) -> Any:
    """A Llama of two blocks in fp32; the same seed gives the same weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def reference_model(tied: bool = False) -> Any:
    """The model with other weights, without gradients: the first step is not at the reference."""
    return causal_model(seed=1, tied=tied).requires_grad_(False)


def examples() -> list[Example]:
    """Chosen and rejected token ids of different lengths, and the number of prompt tokens."""
    generator = torch.Generator().manual_seed(0)

    def ids(prompt: Tensor, length: int) -> Tensor:
        response = torch.randint(3, VOCABULARY, (length,), generator=generator)
        return torch.cat([prompt, response])

    rows = []
    for i in range(RANKS * PAIRS * STEPS):
        prompt = torch.randint(3, VOCABULARY, (2 + i % 3,), generator=generator)
        rows.append((ids(prompt, 3 + i % 4), ids(prompt, 6 - i % 5), len(prompt)))
    return rows


def collate(rows: list[Example]) -> dict[str, Tensor]:
    """All chosen and then all rejected sequences, padded on the right."""
    sequences = [chosen for chosen, _, _ in rows] + [rejected for _, rejected, _ in rows]
    prompts = [prompt for _, _, prompt in rows] * 2
    length = max(map(len, sequences))
    batch = {
        "input_ids": torch.zeros(len(sequences), length, dtype=torch.long),
        "attention_mask": torch.zeros(len(sequences), length, dtype=torch.long),
        "labels": torch.full((len(sequences), length), -100),
    }
    for i, (ids, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        batch["input_ids"][i, : len(ids)] = ids
        batch["attention_mask"][i, : len(ids)] = 1
        batch["labels"][i, prompt : len(ids)] = ids[prompt:]
    return batch


def loader(rank: int | None = None) -> DataLoader[Any]:
    """Batches in order: those of one rank, or of all, to be split by the loop."""
    rows: Any = examples()
    sampler: DistributedSampler[Any] | None = None
    if rank is not None:
        sampler = DistributedSampler(rows, RANKS, rank, shuffle=False)
    return DataLoader(rows, PAIRS, sampler=sampler, collate_fn=collate)


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)


def plain_training(model: Any, reference: Any, logits: Logits) -> tuple[dict[str, Tensor], float]:
    """Parameters after all steps, and the loss of the last one; no code of fastpref."""
    optimizer, rows, size = sgd(model), examples(), RANKS * PAIRS
    for step in range(STEPS):
        batch = collate(rows[step * size : (step + 1) * size])
        chosen, rejected = sequence_logps(model, batch, logits).chunk(2)
        with torch.no_grad():
            ref_chosen, ref_rejected = sequence_logps(reference, batch, logits).chunk(2)
        margins = BETA * ((chosen - rejected) - (ref_chosen - ref_rejected))
        loss = -logsigmoid(margins).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}, loss.item()


def sequence_logps(model: Any, batch: dict[str, Tensor], logits: Logits) -> Tensor:
    """Summed log-probs (S,) of the labeled tokens."""
    labels = batch["labels"][:, 1:]
    logps = logits(model, batch)[:, :-1].log_softmax(-1)
    logps = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (logps * (labels != -100)).sum(-1)


def causal_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits (S, L, V) of a model of transformers."""
    logits: Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits
    return logits
