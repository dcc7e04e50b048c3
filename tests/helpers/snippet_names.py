"""Names and packages that the Python snippets of README and docs/integrations.md use."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import TrainingArguments

from benchmarks.loops import setting
from tests.helpers.data import labelled, rows


def of_readme() -> dict[str, Any]:
    """A packed batch of two pairs, and log-probs of two pairs under policy and reference."""
    from fastpref.logps import SequenceLogps

    lengths = torch.tensor([3, 4])

    def logps() -> Tensor:
        return -10 * torch.rand(2)

    return {
        "hidden": torch.randn(14, 8, requires_grad=True),
        "lm_head": torch.nn.Linear(8, 32, bias=False),
        "labels": torch.arange(14),
        "cu_seqlens": torch.tensor([0, 3, 7, 10, 14]),
        "chosen": logps().requires_grad_(),
        "rejected": logps().requires_grad_(),
        "chosen_lengths": lengths,
        "rejected_lengths": lengths,
        "reference": SequenceLogps(logps(), logps(), lengths, lengths),
    }


def of_integrations(tokenizer: Any) -> dict[str, Any]:
    """A model, its reference, and batches of pairs; data sets of texts for whole trainers."""
    model, reference = setting.causal_model(), setting.reference_model()
    batches = setting.loader()
    batch = next(iter(batches))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    sequences = len(batch["labels"])
    with torch.no_grad():
        return {
            **batch,
            "batch": batch,
            "batches": batches,
            "model": model,
            "reference": reference,
            "optimizer": setting.sgd(model),
            "hidden": model.base_model(**inputs).last_hidden_state.requires_grad_(),
            "ref_hidden": reference.base_model(**inputs).last_hidden_state,
            "ref_head": reference.lm_head,
            "ref_logps": setting.sequence_logps(reference, batch, setting.causal_logits),
            "desirable": torch.arange(sequences) < sequences // 2,
            "cu_groups": torch.tensor([0, sequences // 2, sequences]),
            "scores": torch.arange(float(sequences)),
            "tokenizer": tokenizer,
            "dataset": Dataset.from_list(rows(8)),
            "unpaired": Dataset.from_list(labelled(8)),
            "peft_config": LoraConfig(task_type="CAUSAL_LM", r=4),
            "pairs": setting.examples(),
            "collate": setting.collate,
            "arguments": TrainingArguments(
                "runs", max_steps=1, remove_unused_columns=False, use_cpu=True, report_to=[]
            ),
        }


class Decoder(torch.nn.Module):
    """Decoder that, like torchtune's, takes tokens and calls `output` for logits."""

    def __init__(self) -> None:
        super().__init__()
        model = setting.causal_model()
        self.layers, self.output = model.base_model, model.lm_head

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.output(self.layers(tokens).last_hidden_state).float()
        return logits


def torchtune_recipe() -> ModuleType:
    """`my_dpo` with what the snippet uses of a recipe."""

    class FullDPORecipeDistributed:
        _device = torch.device("cpu")
        activations_handling_ctx = None

    module = ModuleType("my_dpo")
    vars(module)["FullDPORecipeDistributed"] = FullDPORecipeDistributed
    return module


def open_instruct() -> ModuleType:
    """`open_instruct` with its module `dpo_utils`, whose batches have a column for each side."""

    def concatenated_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        names = [name.removeprefix("chosen_") for name in batch if name.startswith("chosen_")]
        return {
            f"concatenated_{name}": torch.cat([batch[f"chosen_{name}"], batch[f"rejected_{name}"]])
            for name in names
        }

    package, utils = ModuleType("open_instruct"), ModuleType("open_instruct.dpo_utils")
    vars(utils)["concatenated_inputs"] = concatenated_inputs
    vars(package)["dpo_utils"] = utils
    return package
