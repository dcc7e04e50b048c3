"""Rounds against offline DPO on the demo's task.

Answers name a word, and each word has a latent utility that decides all preferences. From one
supervised model, offline DPO takes 60 steps on the pairs of the data; three rounds take 20 steps
each on their own samples, scored by the same utility. Objective, batch size, optimizer and schedule
are the same. The objective is DPO and, per token, SFT on the preferred answer: DPO alone lowers the
log-probs of both answers until the model leaves the templates. The supervised model is trained for
longer than the demo's, so that nearly all its samples are answers.

`--tune` tries the settings of `GRID` on four seeds that are not among those of the result. The
result has the best of them for the rounds, and the best two for offline DPO, which counts with the
better one, seed by seed.

The true-preference rate of a model is the probability, by the utilities, that its answer is
preferred to the supervised model's: the mean of S(u - u_start) over answers to all prompts, which
are those of the training. An answer in another form than the templates' is worse than every word.
The rounds win where their rate is above that of offline DPO by more than two standard errors, over
prompts, of the difference.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastpref import config as configs
from fastpref import demo
from fastpref.data.prompts import read_prompts
from fastpref.data.synthetic import pure_semantic
from fastpref.docgen import markdown
from fastpref.evaluation.sample import Sampler
from fastpref.model.generate import Sampling
from fastpref.rounds import loop
from fastpref.training.trainer import train
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
