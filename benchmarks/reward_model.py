"""A reward model by `fastpref reward` beside TRL's RewardTrainer: accuracy, speed, exported scores.

FASTPREF_MODEL=… FASTPREF_DATA=… python -m benchmarks.reward_model [--layers 6] [--pairs 256]

Both train all weights in fp32 from the same start, the first layers of a pretrained chat model
under a new head, on the same conversations in the same order, with the same optimizer. Reported are
pairs per second of the steps alone, the accuracy on held-out pairs, and the largest difference of
our rewards from those of transformers, which loads the export.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastpref import config as configs
from fastpref.data.readers import read_rows
from fastpref.docgen import markdown
from fastpref.evaluation.scorers import RewardModelScorer
from fastpref.model.reward_policy import set_padding_token
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display, quiet_libraries

OUT = Path(__file__).parent / "results" / "reward-model.json"
BATCH, LEARNING_RATE, SEED = 8, 2e-5, 0
Row = dict[str, Any]


def table(report: Any) -> str:
    """Markdown table: speed of both trainers, and their accuracy on held-out pairs."""
    rows = [
        [title, f"{report[name]['pairs_per_second']:.2f}", f"{report[name]['accuracy']:.1%}"]
        for title, name in (("fastpref", "fastpref"), ("TRL", "trl"))
    ]
    start = ["before training", "–", f"{report['start']['accuracy']:.1%}"]
    return markdown.table(["", "pairs a second", "accuracy, held out"], [*rows, start])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6, help="of the pretrained model")
    parser.add_argument("--pairs", type=int, default=256, help="to train on")
    parser.add_argument("--held-out", type=int, default=200, help="pairs to measure on")
    parser.add_argument("--max-length", type=int, default=256, help="longer pairs are left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        report = compare(Path(name), options)
    packages = ("trl", "transformers", "torch")
    report["versions"] = {package: metadata.version(package) for package in packages}
    report["settings"] = {
        "layers": options.layers, "pairs": options.pairs, "held_out": options.held_out,
        "max_length": options.max_length, "threads": options.threads, "batch_size": BATCH,
        "lr": LEARNING_RATE,
    }  # fmt: skip
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


def compare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train both and measure both; everything is written below `folder`."""
    start = save_start(os.environ["FASTPREF_MODEL"], options.layers, folder / "start")
    rows = conversations(os.environ["FASTPREF_DATA"], start, options.max_length)
    count = options.pairs + options.held_out
    if len(rows) < count:
        raise SystemExit(f"only {len(rows)} pairs have at most {options.max_length} tokens")
    training, held_out = rows[: options.pairs], rows[options.pairs : count]
    trainer, seconds = train_ours(start, training, folder)
    order = [k for step in range(trainer.steps) for k in trainer.plan.groups(step)]
    export = trainer.export()
    theirs, their_seconds = train_theirs(start, [training[k] for k in order], folder)
    tokenizer = AutoTokenizer.from_pretrained(export)
    loaded = AutoModelForSequenceClassification.from_pretrained(export, dtype=torch.float32)
    ours = rewards(loaded, tokenizer, held_out)
    return {
        "fastpref": {"pairs_per_second": len(training) / seconds, "accuracy": accuracy(ours)},
        "trl": {
            "pairs_per_second": len(training) / their_seconds,
            "accuracy": accuracy(rewards(theirs, tokenizer, held_out)),
        },
        "start": {"accuracy": accuracy(rewards(_load(start), tokenizer, held_out))},
        "speed": their_seconds / seconds,
        "largest_score_difference": score_difference(trainer, export, held_out, ours),
    }


def save_start(source: str, layers: int, folder: Path) -> str:
    """Write a classifier of the first layers of a model, with a padding token that ends nothing."""
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    set_padding_token(tokenizer)
    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=1, num_hidden_layers=layers, dtype=torch.float32
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def conversations(data: str, start: str, max_length: int) -> list[Row]:
    """Pairs of transcripts as messages, those of which both have few tokens."""
    tokenizer: Any = AutoTokenizer.from_pretrained(start)
    source = Path(data)
    file = source / "hh_harmless_pairs.jsonl" if source.is_dir() else source
    rows: list[Row] = []
    for _, row in read_rows(str(file)):
        pair = {name: _messages(row[name]) for name in ("chosen", "rejected")}
        both = [tokenizer.apply_chat_template(m, return_dict=True) for m in pair.values()]
        if all(len(each["input_ids"]) <= max_length for each in both):
            rows.append(pair)
    return rows


def _messages(transcript: str) -> list[dict[str, str]]:
    parts = re.split(r"\n\n(Human|Assistant):", transcript)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[role], "content": text.strip()} for role, text in pairs]


def train_ours(start: str, rows: list[Row], folder: Path) -> tuple[Trainer, float]:
    """The trainer after its last step, and the seconds of its steps."""
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = configs.parse(
        {
            "model": {"path": start, "dtype": "float32"},
            "data": {"train": str(file), "cache": str(folder / "cache")},
            "loss": "bradley_terry",
            "optim": {"lr": LEARNING_RATE},
            "training": {
                "batch_size": BATCH, "epochs": 1, "device": "cpu", "seed": SEED,
                "activation_checkpointing": "off", "checkpoint_every": None,
                "batch_invariant": False,  # groups share a forward pass, as TRL's pairs do
                "output_dir": str(folder / "run"),
            },
        }
    )  # fmt: skip
    with Display(Console(stderr=True)) as display:
        trainer = Trainer(config, display)
        began = time.perf_counter()
        trainer.loop([])
        return trainer, time.perf_counter() - began


def train_theirs(start: str, rows: list[Row], folder: Path) -> tuple[Any, float]:
    """TRL's model after one pass over the rows in their order, and the seconds of its steps."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import RewardConfig, RewardTrainer

    class InOrder(RewardTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            rows: Any = train_dataset or self.train_dataset
            return SequentialSampler(rows)

    trainer = InOrder(
        model=_load(start),
        args=RewardConfig(
            str(folder / "trl"), per_device_train_batch_size=BATCH, num_train_epochs=1,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_grad_norm=1.0,
            max_length=None, bf16=False, use_cpu=True, gradient_checkpointing=False, seed=SEED,
            report_to=[], save_strategy="no", logging_steps=1000, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(start),
    )  # fmt: skip
    began = time.perf_counter()
    trainer.train()
    return trainer.model, time.perf_counter() - began


def _load(folder: str) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def rewards(model: Any, tokenizer: Any, rows: list[Row]) -> torch.Tensor:
    """Rewards of chosen and rejected responses (N, 2), each pair in one padded batch."""
    model.eval()
    pairs = []
    for row in rows:
        batch = tokenizer.apply_chat_template(
            [row["chosen"], row["rejected"]], padding=True, return_tensors="pt", return_dict=True
        )
        batch.pop("token_type_ids", None)
        pairs.append(model(**batch).logits[:, 0])
    return torch.stack(pairs)


def accuracy(values: torch.Tensor) -> float:
    """Share of the pairs whose chosen response has the higher reward."""
    return (values[:, 0] > values[:, 1]).double().mean().item()


@torch.no_grad()
def score_difference(
    trainer: Trainer, export: Path, rows: list[Row], theirs: torch.Tensor
) -> float:
    """Largest difference of transformers' rewards from the policy's and from fastpref score's."""
    scorer = RewardModelScorer(str(export), "cpu")
    prompts = [row[name][:-1] for row in rows for name in ("chosen", "rejected")]
    answers = [row[name][-1]["content"] for row in rows for name in ("chosen", "rejected")]
    scores = torch.tensor(scorer(prompts, answers)).view(-1, 2)
    differences = [(scores - theirs).abs().max().item()]
    trainer.policy.eval()
    data = trainer.run.train.groups
    tokenizer: Any = AutoTokenizer.from_pretrained(export)
    loaded = _load(str(export))
    for index in range(min(32, len(data))):  # of the training pairs, which the policy has
        (batch,) = trainer.policy.batches(data, [index])
        ours = trainer.policy(batch).logps
        group = data[index]
        sequences = [[*group.prompt.tolist(), *r.tolist()] for r in group.responses]
        padded = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
        logits = loaded(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"])
        differences.append((ours - logits.logits[:, 0]).abs().max().item())
    return max(differences)


if __name__ == "__main__":
    main()
