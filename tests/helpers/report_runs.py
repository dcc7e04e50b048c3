"""Run directories with metrics of which the charts are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastpref import config as configs
from fastpref.report.runs import Run

BINS = {"predicted": [0.5, 1.2], "target": [1.0, 1.0], "count": [5.0, 2.0]}


def config(**sections: Any) -> configs.Config:
    values = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}, "loss": "dpo", **sections}
    return configs.parse(values)


def trained(step: int) -> dict[str, Any]:
    """A line of training: chosen falls by half a nat a step, rejected by one."""
    return {
        "step": step,
        "loss": 1 / step,
        "rewards/accuracies": 0.5,
        "rewards/margins": step / 20,
        "logps/chosen": -10 - step / 2,
        "logps/rejected": -12.0 - step,
        "logps/chosen_change": -step / 2,
        "logps/rejected_change": -1.0 * step,
        "lengths/chosen": 7.0,
        "lengths/rejected": 9.0,
        "entropy": 2.0,
        "reward": 0.1 * step,
        "kl": 0.2 * step,
        "clip_share": 0.1,
        "tokens_per_second": 1000.0 + step,
        "peak_memory_gib": 1.5,
        "grad_norm": 0.1 * step,
    }


def with_band(step: int) -> dict[str, Any]:
    return trained(step) | {
        "band/log_r": 0.25,
        "band/log_r_star": 0.5,
        "band/cosine": 0.8,
        "band/lower": 0.5 - 1 / step,
        "band/upper": 0.5 + 1 / step,
        "band/inside": 0.75,
        "band/log_r_average": 0.25 + 1 / step,
        "pair_band/inside": 0.5,
        "pair_band/both_down": 0.25,
        "pair_band/both_up": 0.25,
        "pair_band/crossed": 0.0,
        "calibration/log_r": 0.0,
    }


def evaluated(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "eval_loss": 0.5,
        "eval_preference/accuracy": 0.5 + step / 100,
        "eval_preference/mean_kl": 0.1 + step,
        "eval_preference/pci": 0.4,
        "eval_preference/calibration": BINS,
        "eval_contrast/histogram": {"counts": [1, 8, 1], "edges": [-1.0, 0.0, 10.0, 11.0]},
        "eval_contrast/below": 0.9,
        "eval_contrast/inside": 0.1,
        "eval_contrast/above": 0.0,
    }


def run(records: list[dict[str, Any]], name: str = "a", **sections: Any) -> Run:
    return Run(name, config(**sections), records)


def full(name: str = "a", steps: int = 20, **sections: Any) -> Run:
    """A run that has data for every chart."""
    lines = [with_band(step) for step in range(1, steps + 1)]
    records = [evaluated(0), *lines, evaluated(steps)]
    return run(sorted(records, key=lambda line: int(line["step"])), name, **sections)


def write(folder: Path, made: Run) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(made.config.to_yaml())
    lines = "".join(json.dumps(line) + "\n" for line in made.records)
    (folder / "metrics.jsonl").write_text(lines)
    return folder
