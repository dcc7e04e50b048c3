"""Rounds against offline DPO on the demo's task, and rounds on a real model.

    python -m benchmarks.rounds --tune --out benchmarks/results/rounds.json
    python -m benchmarks.rounds --out benchmarks/results/rounds.json
    python -m benchmarks.rounds --real-model MODEL --data PROMPTS.jsonl --out …

Demo's task: answers name a word, and each word has a latent utility that decides all preferences.
From one supervised model, offline DPO takes 60 steps on the pairs of the data; three rounds take 20
steps each on their own samples, scored by the same utility. Objective, batch size, optimizer and
schedule are the same. The objective is DPO and, per token, SFT on the preferred answer: DPO alone
lowers the log-probs of both answers until the model leaves the templates. The supervised model is
trained for longer than the demo's, so that nearly all its samples are answers.

`--tune` tries the settings of `GRID` on four seeds that are not among those of the result. The
result has the best of them for the rounds, and the best two for offline DPO, which counts with the
better one, seed by seed.

The true-preference rate of a model is the probability, by the utilities, that its answer is
preferred to the supervised model's: the mean of S(u - u_start) over answers to all prompts, which
are those of the training. An answer in another form than the templates' is worse than every word.
The rounds win where their rate is above that of offline DPO by more than two standard errors, over
prompts, of the difference.

Real model: the score of an answer is the rule of `helpful_form`. It rises where an answer to each
held-out prompt has a higher mean score after three rounds than before, by more than two standard
errors, over prompts, of the difference.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastpref import config as configs
from fastpref import demo, metrics
from fastpref.data.messages import text_of
from fastpref.data.prompts import read_prompts
from fastpref.data.synthetic import pure_semantic
from fastpref.docgen import markdown
from fastpref.evaluation.sample import Sampler
from fastpref.model.generate import Sampling
from fastpref.rounds import loop, sequence
from fastpref.training.trainer import train
from fastpref.utils import environment, result_json
from fastpref.utils.progress import Display

METHODS = ("offline_dpo", "rounds")
ROUNDS, STEPS = 3, 60  # steps of all rounds, and of offline DPO
WARM_UP = 300  # steps of the supervised model
SEEDS, TUNING_SEEDS = (30, 31, 32), (10, 11, 12, 13)
WORST = -5.0  # utility of an answer in another form; the words' are standard normal
ANSWERS = 16  # of each prompt, for the true-preference rate


@dataclass(frozen=True)
class Setting:
    """Options of a method; samples of a prompt and their pairs are those of a round."""

    method: str  # of METHODS
    lr: float
    sft_weight: float
    samples: int | None = None
    pairs: str | None = None


def offline(lr: float, sft_weight: float) -> Setting:
    return Setting("offline_dpo", lr, sft_weight)


def in_rounds(lr: float, sft_weight: float, samples: int, pairs: str) -> Setting:
    return Setting("rounds", lr, sft_weight, samples, pairs)


GRID = (
    *(offline(lr, weight) for lr in (2e-3, 4e-3, 8e-3) for weight in (0.03, 0.1, 0.3)),
    *(in_rounds(lr, 1.0, 8, pairs) for lr in (2e-3, 4e-3) for pairs in ("all", "best_worst")),
    *(in_rounds(2e-3, weight, 16, "best_worst") for weight in (1.0, 3.0, 10.0)),
    *(in_rounds(lr, 3.0, 16, "best_worst") for lr in (1e-3, 4e-3)),
)
SETTINGS = (offline(2e-3, 0.1), offline(4e-3, 0.1), in_rounds(2e-3, 3.0, 16, "best_worst"))


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
    """Scorer: a point each for an end, 20 to 60 words, three listed items, and no apology."""

    fingerprint = "helpful form 2"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        return [helpful_form(text) for text in completions]


def helpful_form(text: str) -> float:
    """Points for the form of an answer: its end, its length, a list, and no apology."""
    words = len(text.split())
    items = len(re.findall(r"^\s*(?:[-*•]|\d+[.)])\s", text, re.MULTILINE))
    ends = text.rstrip().endswith((".", "!", "?", ")"))
    apologizes = re.search(r"\b(sorry|as an ai|i cannot|i can't)\b", text, re.IGNORECASE)
    length = 1 - min(1.0, max(0, 20 - words) / 20 + max(0, words - 60) / 60)
    return ends + length + min(items, 3) / 3 + (apologizes is None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tune", action="store_true", help="try all settings on other seeds")
    parser.add_argument("--real-model", type=Path, default=None)
    parser.add_argument("--data", type=Path, default=None, help="with --real-model: prompts")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1 if options.real_model is None else torch.get_num_threads())
    folder = Path(tempfile.mkdtemp(prefix="rounds-"))
    display, began = Display(Console(width=150)), time.monotonic()
    if options.tune:
        name, part = "tuning", tune(folder, display)
    elif options.real_model is None:
        name, part = "demo", on_the_demo(folder, display)
    else:
        name = "real_model"
        part = on_a_model(folder, options.real_model, options.data, display)
    part["seconds"] = round(time.monotonic() - began)
    print(json.dumps(part, indent=1))
    if options.out is not None:
        known = json.loads(options.out.read_text()) if options.out.exists() else {}
        known |= {"benchmark": "rounds", name: {**environment.describe("cpu"), **part}}
        options.out.write_text(result_json.dumps(known))
    shutil.rmtree(folder)


def on_the_demo(out: Path, display: Display) -> dict[str, Any]:
    """Rates of all settings by seed, and what the rounds have more than offline DPO."""
    seeds = []
    for seed in SEEDS:
        trained = list(models(out / str(seed), seed, SETTINGS, display))
        offline_dpo, rounds = (
            max((won for row, won in trained if row["method"] == method), key=statistics.fmean)
            for method in METHODS
        )
        rows = [row for row, _ in trained]
        seeds.append({"seed": seed, "models": rows, "difference": difference(offline_dpo, rounds)})
    return {"seeds": seeds, "rounds_win": all(map(_wins, seeds))}


def tune(out: Path, display: Display) -> dict[str, Any]:
    """Mean rate of every setting of the grid over the seeds of tuning, the best first."""
    rates: dict[Setting, list[float]] = {setting: [] for setting in GRID}
    for seed in TUNING_SEEDS:
        _, *trained = models(out / str(seed), seed, GRID, display)
        for setting, (row, _) in zip(GRID, trained, strict=True):
            rates[setting].append(row["true_preference_rate"])
    rows = [
        {**_as_row(setting), "mean": statistics.fmean(each), "rates": each}
        for setting, each in rates.items()
    ]
    return {"seeds": TUNING_SEEDS, "settings": sorted(rows, key=lambda row: -row["mean"])}


def models(
    out: Path, seed: int, settings: Sequence[Setting], display: Display
) -> Iterator[tuple[dict[str, Any], list[float]]]:
    """Supervised model, then one of each setting: a row, and preferences of its answers to it."""
    pure_semantic.write(out / "data", seed)
    stages = demo.stage_configs(out, seed)
    data = {name: value for name, value in stages["sft"]["data"].items() if name != "eval"}
    scorer, prompts = TrueUtility(seed), write_prompts(out)
    start = train(configs.parse(_with(stages["sft"], WARM_UP, out / "sft", data=data)), display)
    first = answers_utilities(start, prompts, scorer, display)
    yield {"method": "start", **outcome(first, first)}, preferred(first, first)
    for setting in settings:
        began, folder = time.monotonic(), out / "model"
        loss = [{**stages["dpo"]["loss"], "weight": 1.0}]
        loss.append({"name": "sft", "weight": setting.sft_weight, "average": True})
        optim = {**stages["dpo"]["optim"], "lr": setting.lr}
        values = _with(stages["dpo"], STEPS, folder, data=data, optim=optim, loss=loss)
        if setting.method == "rounds":
            config = configs.parse(rounds_config(values, prompts, setting))
            model = loop.run(config, display, scorer=lambda: scorer)
        else:
            model = train(configs.parse(values), display)
        seconds = round(time.monotonic() - began)
        new = answers_utilities(model, prompts, scorer, display)
        row = {**_as_row(setting), **outcome(new, first), "seconds": seconds}
        display.note(f"seed {seed}: {json.dumps(row)}")
        yield row, preferred(new, first)
        shutil.rmtree(folder)


def _as_row(setting: Setting) -> dict[str, Any]:
    return {name: value for name, value in asdict(setting).items() if value is not None}


def outcome(new: Sequence[float], start: Sequence[float]) -> dict[str, float]:
    """Rate against the start, mean utility, and share of answers in another form."""
    return {
        "true_preference_rate": statistics.fmean(preferred(new, start)),
        "mean_utility": statistics.fmean(new),
        "other_form": sum(one == WORST for one in new) / len(new),
    }


def preferred(new: Sequence[float], old: Sequence[float]) -> list[float]:
    """Probabilities that a new answer is preferred to the old one of its prompt and number."""
    return [1 / (1 + math.exp(o - n)) for n, o in zip(new, old, strict=True)]


def difference(offline_dpo: Sequence[float], rounds: Sequence[float]) -> dict[str, float]:
    """Rate of the rounds less that of offline DPO, with its standard error over prompts."""
    answers = [r - o for r, o in zip(rounds, offline_dpo, strict=True)]
    prompts = [statistics.fmean(answers[k : k + ANSWERS]) for k in range(0, len(answers), ANSWERS)]
    error = statistics.stdev(prompts) / math.sqrt(len(prompts))
    return {"value": statistics.fmean(prompts), "standard_error": error}


def _wins(seed: dict[str, Any]) -> bool:
    return bool(seed["difference"]["value"] > 2 * seed["difference"]["standard_error"])


def _with(stage: dict[str, Any], steps: int, folder: Path, **sections: Any) -> dict[str, Any]:
    """A stage of the demo without evaluations, of other steps and in another folder."""
    training = {name: value for name, value in stage["training"].items() if name != "eval_every"}
    training |= {"steps": steps, "output_dir": str(folder), "log_every": 20}
    return {**stage, **sections, "training": training}


def write_prompts(out: Path) -> Path:
    """File of the different prompts of the training pairs."""
    lines = (out / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = sorted({json.loads(line)["prompt"] for line in lines})
    path = out / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def rounds_config(stage: dict[str, Any], prompts: Path, setting: Setting) -> dict[str, Any]:
    """Config of the rounds: that of the offline stage, on the prompts of the data."""
    training = {name: value for name, value in stage["training"].items() if name != "steps"}
    return {
        **stage,
        "data": {**stage["data"], "train": str(prompts), "eval": str(prompts)},
        "training": training,
        "rounds": {
            "count": ROUNDS,
            "steps": STEPS // ROUNDS,
            "sampling": {"samples": setting.samples, "max_new_tokens": 24, "batch_size": 100},
            "scorer": {"function": "the:oracle"},
            "pairs": setting.pairs,
            "min_gap": 1.0,
            "eval_prompts": 75,
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


def on_a_model(out: Path, model: Path, data: Path, display: Display) -> dict[str, Any]:
    """Three rounds of LoRA on a real model, whose answers are scored by their form."""
    lines = data.read_text(encoding="utf-8").splitlines()
    short = [row for row in map(json.loads, lines) if len(_question(row)) < 200][:80]
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
            "max_length": 256,
            "cache": str(out / "cache"),
        },
        "loss": {"name": "dpo", "beta": 0.1},
        "optim": {"lr": 5e-4},
        "training": {"batch_size": 8, "log_every": 2, "output_dir": str(out / "run")},
        "rounds": {
            "count": ROUNDS,
            "prompts": 16,
            "steps": 8,
            "sampling": {"samples": 4, "max_new_tokens": 64, "batch_size": 48},
            "scorer": {"function": "helpful:form"},
            "pairs": "all",
            "min_gap": 0.2,
            "eval_prompts": 48,
        },
    }
    loop.run(configs.parse(values), display, scorer=HelpfulForm)
    before, after = (_held_out_scores(out / "run", number) for number in (0, ROUNDS))
    gains = [new - old for new, old in zip(after, before, strict=True)]
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    return {
        "rounds": metrics.read_records(out / "run" / sequence.FILE),
        "gain": {"value": statistics.fmean(gains), "standard_error": error, "prompts": len(gains)},
    }


def _held_out_scores(run: Path, number: int) -> list[float]:
    """Score of the completion of each held-out prompt after a round."""
    (path,) = (run / "rounds" / f"{number:04}").glob("eval-scores-*.jsonl")
    return [json.loads(line)["scores"][0] for line in path.read_text().splitlines()]


def tuning_table(result: Any) -> str:
    """Mean rate of every setting over the seeds of tuning, the best first."""
    rows = [
        [
            {"offline_dpo": "offline DPO", "rounds": "three rounds"}[row["method"]],
            f"{row['lr']:g}",
            f"{row['sft_weight']:g}",
            f"{row['samples']}, {row['pairs']}" if "samples" in row else "",
            f"{row['mean']:.3f}",
            f"{min(row['rates']):.3f} to {max(row['rates']):.3f}",
        ]
        for row in result["tuning"]["settings"]
    ]
    columns = ("method", "learning rate", "weight of SFT", "samples, pairs", "mean rate", "seeds")
    return markdown.table(columns, rows)


def demo_table(result: Any) -> str:
    """Rates of both methods and their difference, by seed."""
    rows = []
    for seed in result["demo"]["seeds"]:
        best = {
            name: max(
                (model for model in seed["models"] if model["method"] == name),
                key=lambda model: float(model["true_preference_rate"]),
            )
            for name in METHODS
        }
        shown = [
            f"{model['true_preference_rate']:.3f} ({model['mean_utility']:.2f})"
            for model in best.values()
        ]
        gap = seed["difference"]
        shown.append(f"{gap['value']:.3f} ± {gap['standard_error']:.3f}".replace("-", "−"))
        rows.append([str(seed["seed"]), *shown])
    return markdown.table(("seed", "offline DPO", "three rounds", "difference"), rows)


def model_table(result: Any) -> str:
    """Measures of the held-out answers of the real model, by round."""
    rows = [
        [
            "start" if row["round"] == 0 else str(row["round"]),
            f"{row['eval_reward']:.2f}",
            f"{row['eval_length']:.0f}",
            f"{row['eval_finished']:.2f}",
            f"{row['kl_to_start']:.1f}",
        ]
        for row in result["real_model"]["rounds"]
    ]
    return markdown.table(("round", "score", "tokens", "ended by itself", "KL to the start"), rows)


def _question(row: dict[str, Any]) -> str:
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else text_of(prompt[-1]["content"])


if __name__ == "__main__":
    main()
