"""Rounds against offline DPO on the demo's task, and rounds on a real model.

    python -m benchmarks.rounds --out benchmarks/results/rounds.json
    python -m benchmarks.rounds --real-model MODEL --data PROMPTS.jsonl --out …

Demo's task: answers name a word, and each word has a latent utility that decides all preferences.
From one supervised model, offline DPO takes 60 steps on the pairs of the data; three rounds take 20
steps each on their own samples, scored by the same utility, with the same batch size, optimizer and
schedule, and both at each of two learning rates. The supervised model is trained for longer than
the demo's, so that nearly all its samples are answers. The true-preference rate of a model is the
probability, by the utilities, that its answer is preferred to the supervised model's: the mean of
S(u - u_start) over answers to all prompts. An answer in another form than the templates' is worse
than every word. The rounds win where their better rate is above the better one of offline DPO.

Real model: the score of an answer is the rule of `helpful_form`, and should rise over the rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastpref import config as configs
from fastpref import demo, metrics
from fastpref.data.messages import text_of
from fastpref.data.prompts import read_prompts
from fastpref.data.synthetic import pure_semantic
from fastpref.evaluation.evaluate import evaluate
from fastpref.evaluation.sample import Sampler
from fastpref.model.generate import Sampling
from fastpref.rounds import loop, sequence
from fastpref.training.trainer import train
from fastpref.utils import environment, result_json
from fastpref.utils.progress import Display

ROUNDS, STEPS = 3, 60  # steps of all rounds, and of offline DPO
WARM_UP = 300  # steps of the supervised model
RATES = (1e-4, 2e-4)  # learning rates
WORST = -5.0  # utility of an answer in another form; the words' are standard normal
ANSWERS = 8  # of each prompt, for the true-preference rate


class TrueUtility:
    """Scorer: the latent utility of the word that an answer names."""

    def __init__(self, seed: int) -> None:
        self.fingerprint = f"utilities {seed}"
        self._utility = pure_semantic.utilities(seed)
        self._answers = {
            f"User: {question.format(noun=noun)}\nAssistant:": {
                answer.format(word=word): word for word in words
            }
            for noun, words in pure_semantic.SETS.items()
            for question, answer in pure_semantic.TEMPLATES
        }

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        words = [
            self._answers[prompt].get(text)
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        return [WORST if word is None else self._utility[word] for word in words]


class HelpfulForm:
    """Scorer: 1 point each for an end, 30 to 120 words, three listed items, and no apology."""

    fingerprint = "helpful form 1"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        return [helpful_form(text) for text in completions]


def helpful_form(text: str) -> float:
    """Points for the form of an answer: its end, its length, a list, and no apology."""
    words = len(text.split())
    items = len(re.findall(r"^\s*(?:[-*•]|\d+[.)])\s", text, re.MULTILINE))
    ends = text.rstrip().endswith((".", "!", "?", ")"))
    apologizes = re.search(r"\b(sorry|as an ai|i cannot|i can't)\b", text, re.IGNORECASE)
    length = 1 - min(1.0, max(0, 30 - words) / 30 + max(0, words - 120) / 120)
    return ends + length + min(items, 3) / 3 + (apologizes is None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--real-model", type=Path, default=None)
    parser.add_argument("--data", type=Path, default=None, help="with --real-model: prompts")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1 if options.real_model is None else torch.get_num_threads())
    folder = Path(tempfile.mkdtemp(prefix="rounds-"))
    display, began = Display(Console(width=150)), time.monotonic()
    if options.real_model is None:
        name = "demo"
        seeds = [on_the_demo(folder / str(seed), seed, display) for seed in range(options.seeds)]
        part: dict[str, Any] = {"seeds": seeds, "rounds_win": all(map(_rounds_win, seeds))}
    else:
        name = "real model"
        part = {"rounds": on_a_model(folder, options.real_model, options.data, display)}
    part["seconds"] = round(time.monotonic() - began)
    print(json.dumps(part, indent=1))
    if options.out is not None:
        known = json.loads(options.out.read_text()) if options.out.exists() else {}
        known |= {"benchmark": "rounds", name: {**environment.describe("cpu"), **part}}
        options.out.write_text(result_json.dumps(known))
    shutil.rmtree(folder)


def _rounds_win(result: dict[str, Any]) -> bool:
    rates = result["true_preference_rate"]
    return bool(max(rates["rounds"].values()) > max(rates["offline_dpo"].values()))


def on_the_demo(out: Path, seed: int, display: Display) -> dict[str, Any]:
    """Offline DPO and three rounds from one supervised model, for one seed."""
    pure_semantic.write(out / "data", seed)
    stages = demo.stage_configs(out, seed)
    scorer, began = TrueUtility(seed), time.monotonic()
    data = {name: value for name, value in stages["sft"]["data"].items() if name != "eval"}
    start = train(configs.parse(_with(stages["sft"], WARM_UP, out / "sft", data=data)), display)
    models = {("start", 0.0): start}
    seconds = {"sft": round(time.monotonic() - began), "offline_dpo": 0, "rounds": 0}
    for lr in RATES:
        optim = {**stages["dpo"]["optim"], "lr": lr}
        for name in ("offline_dpo", "rounds"):
            folder, began = out / f"{name}-{lr}", time.monotonic()
            values = _with(stages["dpo"], STEPS, folder, data=data, optim=optim)
            if name == "rounds":
                config = configs.parse(rounds_config(out, values))
                models[name, lr] = loop.run(config, display, scorer=lambda: scorer)
            else:
                models[name, lr] = train(configs.parse(values), display)
            seconds[name] += round(time.monotonic() - began)
    utilities = {
        key: answers_utilities(folder, out / "prompts.jsonl", scorer, display)
        for key, folder in models.items()
    }
    first = utilities["start", 0.0]
    held_out = {
        key: evaluate(str(folder), str(out / "data" / "test.jsonl"), display)["metrics"]
        for key, folder in models.items()
    }
    result = {
        "seed": seed,
        "true_preference_rate": _table({key: rate(u, first) for key, u in utilities.items()}),
        "mean_utility": _table({key: sum(u) / len(u) for key, u in utilities.items()}),
        "other_form": _table(
            {key: sum(one == WORST for one in u) / len(u) for key, u in utilities.items()}
        ),
        "held_out_pairs_accuracy": _table({k: m["accuracy"]["value"] for k, m in held_out.items()}),
        "rounds": {
            f"{lr:g}": metrics.read_records(out / f"rounds-{lr}" / sequence.FILE) for lr in RATES
        },
        "seconds": seconds,
    }
    display.note(f"seed {seed}: {json.dumps(result['true_preference_rate'])}")
    return result


def _table(values: dict[tuple[str, float], float]) -> dict[str, dict[str, float]]:
    """Values by method and learning rate."""
    table: dict[str, dict[str, float]] = {}
    for (name, lr), value in values.items():
        table.setdefault(name, {})[f"{lr:g}"] = value
    return table


def _with(stage: dict[str, Any], steps: int, folder: Path, **sections: Any) -> dict[str, Any]:
    """A stage of the demo without evaluations, of other steps and in another folder."""
    training = {name: value for name, value in stage["training"].items() if name != "eval_every"}
    training |= {"steps": steps, "output_dir": str(folder), "log_every": 20}
    return {**stage, **sections, "training": training}


def rate(new: Sequence[float], old: Sequence[float]) -> float:
    """Probability that a new answer is preferred to the old one of the same prompt and number."""
    return sum(1 / (1 + math.exp(o - n)) for n, o in zip(new, old, strict=True)) / len(new)


def rounds_config(out: Path, offline: dict[str, Any]) -> dict[str, Any]:
    """Config of the rounds: that of the offline stage, on the prompts of the data."""
    lines = (out / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = sorted({json.loads(line)["prompt"] for line in lines})
    path = out / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    training = {name: value for name, value in offline["training"].items() if name != "steps"}
    return {
        **offline,
        "data": {**offline["data"], "train": str(path), "eval": str(path)},
        "training": training,
        "rounds": {
            "count": ROUNDS,
            "steps": STEPS // ROUNDS,
            "sampling": {"samples": 8, "max_new_tokens": 24, "batch_size": 100},
            "scorer": {"function": "the:oracle"},
            "pairs": "all",
            "min_gap": 1.0,
            "eval_prompts": len(prompts),
        },
    }


def answers_utilities(
    model: Path, prompts: Path, scorer: TrueUtility, display: Display
) -> list[float]:
    """Utilities of several answers to each prompt."""
    sampler = Sampler(str(model), dtype="float32")
    rows = read_prompts(str(prompts), sampler.tokenizer)
    sampling = Sampling(n=ANSWERS, max_new_tokens=24, batch_size=100, seed=1)
    drawn = sampler.draw(rows, sampling, display)
    return scorer([one.prompt.text.prompt for one in drawn], [one.text for one in drawn])


def on_a_model(out: Path, model: Path, data: Path, display: Display) -> list[dict[str, Any]]:
    """Three rounds of LoRA on a real model, whose answers are scored by their form."""
    lines = data.read_text(encoding="utf-8").splitlines()
    short = [row for row in map(json.loads, lines) if len(_question(row)) < 200][:48]
    paths = {"train": out / "prompts.jsonl", "eval": out / "held-out.jsonl"}
    for path, rows in zip(paths.values(), (short[:32], short[32:]), strict=True):
        messages = [[{"role": "user", "content": _question(row)}] for row in rows]
        text = "".join(json.dumps({"prompt": each}) + "\n" for each in messages)
        path.write_text(text, encoding="utf-8")
    values = {
        "model": {"path": str(model), "dtype": "float32"},
        "adapter": {"r": 16, "alpha": 32},
        "data": {
            **{name: str(path) for name, path in paths.items()},
            "max_length": 384,
            "cache": str(out / "cache"),
        },
        "loss": {"name": "dpo", "beta": 0.1},
        "optim": {"lr": 2e-4},
        "training": {"batch_size": 8, "log_every": 2, "output_dir": str(out / "run")},
        "rounds": {
            "count": 3,
            "prompts": 16,
            "steps": 6,
            "sampling": {"samples": 4, "max_new_tokens": 96, "batch_size": 32},
            "scorer": {"function": "helpful:form"},
            "pairs": "all",
            "min_gap": 0.2,
            "eval_prompts": 16,
        },
    }
    loop.run(configs.parse(values), display, scorer=HelpfulForm)
    return metrics.read_records(out / "run" / sequence.FILE)


def _question(row: dict[str, Any]) -> str:
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else text_of(prompt[-1]["content"])


if __name__ == "__main__":
    main()
