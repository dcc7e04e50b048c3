"""Model, data and scratch folder of the parts; training and judging one run."""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.real_model.pairs import conversations
from fastpref import config as configs
from fastpref import metrics
from fastpref.config import Config, Data
from fastpref.data.dataset import GroupDataset, load_groups
from fastpref.model.batch_layout import use_layout
from fastpref.model.policy import Policy
from fastpref.training.trainer import Trainer
from fastpref.utils import environment
from fastpref.utils.progress import Display

PACKAGES = ("transformers", "peft", "trl", "accelerate")
Values = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Pairs of one file: shuffled, then split; a pair is whole, or its responses may be cut."""

    file: str
    max_length: int
    whole: bool
    train: int
    held_out: int = 200


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    sources: dict[str, Source]
    batch_size: int = 8
    lr: float = 2e-4
    r: int = 16
    alpha: int = 32
    compared: int = 16  # pairs whose log-probs are compared with those of transformers
    micro_batch: int = 4  # pairs of a forward pass of TRL


SETTING = Setting(
    {
        "hh": Source("hh_harmless_pairs.jsonl", max_length=144, whole=True, train=192),
        "alpacaeval": Source("alpacaeval_pairs.jsonl", max_length=128, whole=False, train=96),
    }
)
OBJECTIVES: dict[str, Values] = {
    "dpo": {"loss": {"name": "dpo", "beta": 0.1}},
    "simpo": {"loss": {"name": "simpo", "beta": 2.0, "gamma": 1.0}},
    "dpo, RC": {"loss": {"name": "dpo", "beta": 0.1}, "calibration": "rc"},
}
CURVE = ("loss", "rewards/margins", "logps/chosen")


class Bench:
    """Model, data and scratch folder of the parts."""

    def __init__(self, model: Path, data: Path, folder: Path, setting: Setting) -> None:
        from transformers import AutoTokenizer

        self.model, self.folder, self.setting = model, folder, setting
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.display = Display(Console())
        self._before: dict[str, Tensor] = {}
        for name, source in setting.sources.items():
            rows = conversations(
                data / source.file, self.tokenizer, source.max_length, source.whole
            )
            random.Random(0).shuffle(rows)
            count = source.train + source.held_out
            if len(rows) < count:
                sys.exit(f"{source.file}: {count} pairs are needed, {len(rows)} fit")
            self._write(f"{name}-train", rows[: source.train])
            self._write(f"{name}-held-out", rows[source.train : count])

    def header(self, name: str) -> Values:
        """Machine, versions and settings of the result file."""
        described = environment.describe("cpu")
        described["versions"] |= {name: environment.package_version(name) for name in PACKAGES}
        return {
            "benchmark": "real_model",
            **described,
            "model": name,
            "parameters": sum(p.numel() for p in self.causal_lm().parameters()),
            "setting": asdict(self.setting),
        }

    def causal_lm(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)

    def path(self, split: str) -> Path:
        return self.folder / f"{split}.jsonl"

    def rows(self, split: str) -> list[Values]:
        return [json.loads(line) for line in self.path(split).read_text("utf-8").splitlines()]

    def groups(self, split: str) -> GroupDataset:
        source = self.setting.sources[split.partition("-")[0]]
        data = Data(train=str(self.path(split)), max_length=source.max_length, cache=self.cache)
        return load_groups(str(data.train), self.tokenizer, data)

    @property
    def cache(self) -> str:
        return str(self.folder / "cache")

    def config(self, source: str, objective: str) -> Config:
        """Config of a run of fastpref: one epoch over the training pairs."""
        setting = self.setting
        output = self.folder / f"{source}-{objective}".replace(", ", "-").lower()
        return configs.parse(
            {
                "model": {"path": str(self.model), "dtype": "float32"},
                "adapter": {"name": "lora", "r": setting.r, "alpha": setting.alpha},
                "data": {
                    "train": str(self.path(f"{source}-train")),
                    "max_length": setting.sources[source].max_length,
                    "cache": self.cache,
                },
                "optim": {"lr": setting.lr, "weight_decay": 0.0, "max_grad_norm": 1.0},
                "training": {
                    "batch_size": setting.batch_size,
                    "epochs": 1,
                    "log_every": 1,
                    "device": "cpu",
                    "activation_checkpointing": "off",
                    "batch_invariant": False,
                    "checkpoint_every": None,
                    "output_dir": str(output),
                },
                **OBJECTIVES[objective],
            }
        )

    def before(self, source: str) -> Tensor:
        """Log-probs of the held-out pairs under the model as it comes, (N, 2)."""
        if source not in self._before:
            policy = Policy(self.causal_lm(), torch.float32)
            self._before[source] = self.held_out(policy, source)
        return self._before[source]

    @torch.no_grad()
    def held_out(self, policy: Policy, source: str) -> Tensor:
        """Log-probs of chosen and rejected held-out responses, (N, 2) fp64, nats."""
        groups = self.groups(f"{source}-held-out")
        policy.eval()
        policy.batch_invariant = False
        use_layout(policy, "prefix_shared")
        logps = torch.empty(2 * len(groups), dtype=torch.float64)
        for first in range(0, len(groups), 8):
            indices = range(first, min(first + 8, len(groups)))
            for batch in policy.batches(groups, indices):
                logps[batch.responses] = policy(batch).logps.double()
        return logps.view(-1, 2)

    def train(self, source: str, objective: str) -> Values:
        """Train with fastpref; return curves, seconds and held-out metrics."""
        config = self.config(source, objective)
        trainer = Trainer(config, self.display)
        started = time.monotonic()
        trainer.loop([])
        seconds = time.monotonic() - started
        records = metrics.read_records(Path(config.training.output_dir) / "metrics.jsonl")
        result = {
            **curves(records),
            "training_seconds": round(seconds, 1),
            "held_out": self.judge(trainer.policy, source),
        }
        del trainer
        gc.collect()
        return result

    def judge(self, policy: Policy, source: str) -> Values:
        lengths = torch.from_numpy(self.groups(f"{source}-held-out").response_lengths)
        return summary(
            self.before(source), self.held_out(policy, source), lengths.double().view(-1, 2)
        )

    def _write(self, split: str, rows: list[Values]) -> None:
        self.path(split).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def curves(records: Sequence[Values]) -> Values:
    """Metrics of each step, by name."""
    lines = [record for record in records if "loss" in record]
    return {"curves": {name: [line[name] for line in lines] for name in CURVE}}


def summary(before: Tensor, after: Tensor, lengths: Tensor) -> Values:
    """Held-out metrics with standard errors; all arguments are (N, 2) fp64."""
    ratios = after - before
    ordered, was_ordered = (x[:, 0] > x[:, 1] for x in (after, before))
    per_token, was_per_token = ((x / lengths)[:, 0] > (x / lengths)[:, 1] for x in (after, before))
    columns = {
        "accuracy_before": was_ordered,
        "accuracy": ordered,
        "accuracy_gain": ordered.double() - was_ordered.double(),
        "accuracy_per_token_before": was_per_token,
        "accuracy_per_token": per_token,
        "accuracy_per_token_gain": per_token.double() - was_per_token.double(),
        "reward_accuracy": ratios[:, 0] > ratios[:, 1],
        "log_ratio_margin": ratios[:, 0] - ratios[:, 1],
        "chosen_change": ratios[:, 0],
        "rejected_change": ratios[:, 1],
    }
    return {"pairs": len(after), **{name: mean(column) for name, column in columns.items()}}


def mean(values: Tensor) -> dict[str, float]:
    """Mean over pairs and its standard error."""
    values = values.double()
    error = values.std() / len(values) ** 0.5
    return {"value": values.mean().item(), "standard_error": error.item()}
