"""Metrics of a model against those of the trainer; intervals against theory; errors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref import metrics
from fastpref.config import Config
from fastpref.evaluation.evaluate import METRICS, Scores, evaluate, intervals, ratios, run
from fastpref.training.trainer import train
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display
from tests.helpers.data import rows, write_jsonl

MakeConfig = Callable[..., Config]


def values(result: dict[str, Any]) -> dict[str, float]:
    return {name: metric["value"] for name, metric in result["metrics"].items()}


@pytest.mark.parametrize("merge", [None, False])
def test_the_numbers_are_those_of_the_trainer(
    make_config: MakeConfig, display: Display, tmp_path: Path, tiny_llama: str, merge: bool | None
) -> None:
    """All weights: to the last bits of sums. An adapter is merged into its base, and rounded."""
    data = str(write_jsonl(tmp_path / "soft.jsonl", rows(15, soft=True)))
    adapter = {} if merge is None else {"adapter": {"name": "lora", "r": 4, "merge": merge}}
    config = make_config(
        data__eval=data, data__train=data, loss={"name": "dpo", "beta": 1.0}, training__steps=4,
        optim__lr=3e-3, **adapter,
    )  # fmt: skip
    model = train(config, display)
    *_, last = metrics.read_records(Path(config.training.output_dir) / "metrics.jsonl")
    result = evaluate(
        str(model), data, display, against=tiny_llama, max_length=64, device="cpu",
        options={"cache": str(tmp_path / "cache")},
    )  # fmt: skip
    ours = values(result)
    shared = [name for name in METRICS if f"eval_{name}" in last]
    assert len(shared) == 12
    tolerance = 1e-6 if merge is None else 1e-4
    for name in shared:
        assert ours[name] == pytest.approx(last[f"eval_{name}"], abs=tolerance, rel=1e-6), name
    assert abs(ours["rewards/margins"]) > 0.1
    assert set(ours) == set(METRICS) and result["pairs"] == 15


def test_log_probs_and_entropies_are_those_of_plain_transformers(
    tiny_llama: str, tmp_path: Path, display: Display
) -> None:
    records = rows(6)
    data = str(write_jsonl(tmp_path / "d.jsonl", records))
    options = {"cache": str(tmp_path / "cache")}
    metrics = values(evaluate(tiny_llama, data, display, device="cpu", options=options))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    sums: dict[str, list[float]] = {"chosen": [], "rejected": []}
    lengths: dict[str, list[int]] = {"chosen": [], "rejected": []}
    entropies = []
    for row in records:
        prompt = tokenizer(row["prompt"])["input_ids"]
        for side in sums:
            ids = tokenizer(row["prompt"] + row[side])["input_ids"] + [tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
            logps = logits.log_softmax(-1)
            sums[side].append(logps[range(len(logps)), ids[len(prompt) :]].sum().item())
            lengths[side].append(len(logps))
            entropies += (-(logps.exp() * logps).sum(-1)).tolist()
    chosen, rejected = (np.array(sums[side]) for side in sums)
    n_w, n_l = (np.array(lengths[side]) for side in sums)
    assert metrics == pytest.approx(
        {
            "accuracy": np.mean(chosen > rejected),
            "accuracy_per_token": np.mean(chosen / n_w > rejected / n_l),
            "margins": np.mean(chosen - rejected),
            "margins_per_token": np.mean(chosen / n_w - rejected / n_l),
            "logps/chosen": chosen.mean(),
            "logps/rejected": rejected.mean(),
            "entropy": np.mean(entropies),
            "lengths/chosen": n_w.mean(),
            "lengths/rejected": n_l.mean(),
            "lengths/chosen_longer": np.mean(n_w > n_l),
        },
        abs=1e-4,
    )


def test_every_metric_of_two_pairs() -> None:
    """By hand: log-probs -1 and -4, then -6 and -3, of 1, 4, 2 and 2 tokens."""
    policy = Scores(torch.tensor([[-1.0, -4], [-6, -3]]).double(), torch.tensor([[1.0, 2], [3, 4]]))
    reference = Scores(torch.full((2, 2), -4.0).double(), policy.entropies)
    lengths = torch.tensor([[1.0, 4], [2, 2]]).double()
    p = torch.tensor([0.9, 0.6]).double()
    columns = ratios(policy, lengths, p, reference)
    assert list(columns) == list(METRICS)
    metrics = {name: (top.sum() / bottom.sum()).item() for name, (top, bottom) in columns.items()}

    def kl(p: float, margin: float) -> float:
        q = 1 / (1 + math.exp(-margin))
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    assert metrics == pytest.approx(
        {
            "accuracy": 1 / 2,
            "accuracy_per_token": 1 / 4,  # -1 and -1, of which half counts, -3 and -1.5
            "margins": 0,
            "margins_per_token": -0.75,
            "logps/chosen": -3.5,
            "logps/rejected": -3.5,
            "preference/accuracy": 1 / 2,
            "preference/mean_kl": (kl(0.9, 3) + kl(0.6, -3)) / 2,
            "preference/pci": 1 / (1 + math.exp(3)),
            "logps/chosen_change": 0.5,
            "logps/rejected_change": 0.5,
            "rewards/accuracies": 1 / 2,
            "rewards/margins": 0,
            "entropy": 10 / 9,
            "lengths/chosen": 1.5,
            "lengths/rejected": 3,
            "lengths/chosen_longer": 0,
        }
    )


def test_intervals_are_those_of_the_central_limit() -> None:
    """1.96 standard errors of a mean and of a ratio (delta method), to a tenth of one."""
    random = np.random.default_rng(1)
    top, bottom = random.normal(3, 2, size=4000), random.uniform(1, 3, size=4000)
    ones = np.ones(4000)
    columns = {
        "mean": (torch.from_numpy(top), torch.from_numpy(ones)),
        "ratio": (torch.from_numpy(top), torch.from_numpy(bottom)),
    }
    metrics = intervals(columns)
    for name, weights in (("mean", ones), ("ratio", bottom)):
        value = top.sum() / weights.sum()
        error = np.std(top - value * weights) / weights.mean() / math.sqrt(4000)
        assert metrics[name]["value"] == pytest.approx(value)
        for key, sign in (("low", -1), ("high", 1)):
            assert metrics[name][key] == pytest.approx(value + sign * 1.96 * error, abs=0.1 * error)
    assert intervals(columns) == metrics


def test_intervals_of_pairs_that_are_all_alike_are_points() -> None:
    ones = torch.ones(5, dtype=torch.float64)
    assert intervals({"x": (ones, ones)}) == {"x": {"value": 1.0, "low": 1.0, "high": 1.0}}


def test_what_does_not_fit_is_refused(tiny_llama: str, tmp_path: Path, display: Display) -> None:
    data = str(write_jsonl(tmp_path / "d.jsonl", rows(2)))
    with pytest.raises(UserError, match="--max-length: got 257, but the model has 256 positions"):
        evaluate(tiny_llama, data, display, max_length=257, device="cpu")
    with pytest.raises(UserError, match=r"^data.truncation: must be 'keep_start' or 'keep_end'"):
        evaluate(tiny_llama, data, display, device="cpu", options={"truncation": "x"})
    options = {"cache": str(tmp_path / "cache")}
    with pytest.raises(UserError, match="cannot load no/such: "):
        evaluate("no/such", data, display, device="cpu", options=options)
    with pytest.raises(UserError, match=r"--out: .*d\.jsonl is already there; choose another file"):
        run(tiny_llama, data, Path(data), display)


def test_the_command_shows_a_table_and_writes_json(
    fastpref: Any, tiny_llama: str, tmp_path: Path
) -> None:
    data, out = str(write_jsonl(tmp_path / "d.jsonl", rows(5, soft=True))), tmp_path / "e.json"
    command = ("eval", tiny_llama, "--data", data, "--out", str(out), "--device", "cpu")
    done = fastpref(*command, "--cache", str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    assert written["pairs"] == 5 and "2,000 resamples" in written["interval"]
    for name, metric in written["metrics"].items():
        assert f" {name} " in done.stdout and f"{metric['value']:.4g}" in done.stdout
        assert metric["low"] <= metric["value"] <= metric["high"]
    assert set(written["lengths"]["chosen"]) == {"least", "median", "p90", "most"}
