"""The first step of TRL's DPO trainer on fastpref's head beside that of TRL alone.

python -m benchmarks.trl_first_step [--only ARCHITECTURE ...] [--out FILE]

For each tiny architecture of TRL's tests, full and LoRA, every `loss_type` and a list of options of
DPOConfig: loss and norm of the gradient in fp32, relative to those of TRL alone. Policy and
reference have different weights.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import tiny_models
from benchmarks.peer_suites import stand_ins
from fastpref.docgen import markdown

OUT = Path(__file__).parent / "results" / "trl-first-step.json"
Values = dict[str, Any]
# Attributes of the trainer, beside those of plain DPO.
CASES: dict[str, Values] = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {},
    "aot_unpaired": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {},
    "sigmoid + bco_pair + sft": {"loss_weights": [0.8, 0.2, 1.0]},
    "sigmoid, forward_kl": {"f_divergence_type": "forward_kl"},
    "sigmoid, js_divergence": {"f_divergence_type": "js_divergence"},
    "sigmoid, alpha_divergence": {"f_divergence_type": "alpha_divergence"},
    "sigmoid, ld_alpha": {"ld_alpha": 0.5},
    "sigmoid, use_weighting": {"use_weighting": True},
}
_PLAIN: Values = {
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "ld_alpha": None,
    "use_weighting": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="architectures, such as opt")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    architectures = sorted({*stand_ins.MODELS.values()})
    rows: dict[str, Values] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or architectures:
            rows[name] = {
                kind: errors(name, kind == "lora", Path(folder)) for kind in ("full", "lora")
            }
            print(name, {k: max(c["loss"] for c in v.values()) for k, v in rows[name].items()})
    versions = {name: metadata.version(name) for name in ("trl", "transformers", "peft", "torch")}
    report = {"versions": versions, "architectures": rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))


def errors(architecture: str, lora: bool, folder: Path) -> dict[str, Values]:
    """Relative differences of loss and norm of the gradient from TRL's, by case."""
    from trl import DPOTrainer

    from fastpref.fused.trl import fused

    trainers = [
        _trainer(each, architecture, lora, folder) for each in (fused(DPOTrainer), DPOTrainer)
    ]
    batches = [next(iter(each.get_train_dataloader())) for each in trainers]
    assert torch.equal(*(batch["input_ids"] for batch in batches))
    found = {}
    for case, values in CASES.items():
        ours, theirs = (
            _step(trainer, batch, case, values)
            for trainer, batch in zip(trainers, batches, strict=True)
        )
        found[case] = {
            name: abs(ours[name] - theirs[name]) / max(abs(theirs[name]), 1e-6) for name in theirs
        }
    return found


def _trainer(trainer: Any, architecture: str, lora: bool, folder: Path) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig

    model = tiny_models.build(architecture, stand_ins.VOCABULARY)
    reference = None if lora else tiny_models.build(architecture, stand_ins.VOCABULARY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = trainer(
            model,
            ref_model=reference,
            args=DPOConfig(
                str(folder), per_device_train_batch_size=4, bf16=False, seed=3, report_to=[],
                use_cpu=True, gradient_checkpointing=False, loss_type=["sigmoid"],
                # Fields of the head's output are chosen at construction.
                use_weighting=True,
            ),
            train_dataset=Dataset.from_list([stand_ins.standard(i) for i in range(8)]),
            processing_class=stand_ins.tokenizer(),
            peft_config=LoraConfig(r=4, target_modules=_layers(model)) if lora else None,
        )  # fmt: skip
    torch.manual_seed(1)
    for parameter in made.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.02 * torch.randn(parameter.shape))
    return made


def _layers(model: Any) -> list[str]:
    """Names of the linear layers that adapters can change in every architecture."""
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }
    return sorted(names - {"out_proj"})  # peft refuses this one in state space models


def _step(trainer: Any, batch: Any, case: str, values: Values) -> Values:
    """Loss of a batch, and norm of its gradient."""
    for name, value in {**_PLAIN, **values}.items():
        setattr(trainer, name, value)
    trainer.loss_types = case.split(",")[0].split(" + ")
    trainer.loss_weights = values.get("loss_weights", [1.0])
    trainer.model.train().zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    grads = [w.grad for w in trainer.model.parameters() if w.grad is not None]
    norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    return {"loss": loss.item(), "grad_norm": norm}


def table(report: Values) -> str:
    """Largest differences of each architecture over all cases."""
    columns = ("architecture", "loss", "gradient norm", "loss, LoRA", "gradient norm, LoRA")
    rows = []
    for name, kinds in report["architectures"].items():
        largest = [
            f"{max(case[what] for case in kinds[kind].values()):.0e}"
            for kind in ("full", "lora")
            for what in ("loss", "grad_norm")
        ]
        rows.append([f"`{name}`", *largest])
    return markdown.table(columns, rows)


if __name__ == "__main__":
    main()
