"""Effects and costs of Reward Calibration (arXiv:2604.18239) in training a small model.

    python -m benchmarks.calibration --data PAIRS.jsonl [--out benchmarks/results/calibration.json]
    python -m benchmarks.calibration --data PAIRS.jsonl --overhead
    python -m benchmarks.calibration --data PAIRS.jsonl --sketch MODEL

    python -m benchmarks.calibration --data PAIRS.jsonl --objectives cpo

For each seed the rows are shuffled and split, and a small Llama with random weights learns the
chosen responses (SFT). From there each objective trains with and without calibration for one epoch.
The result file records the position of the incentives in the Disentanglement Band during training,
and the final changes of log-probs, on training pairs and on held-out ones. With the final models of
the first seed, `one_step` compares the band's prediction with a small step of gradient descent.

`--overhead` measures the cost of calibration instead, and `--sketch` the error of the sketches of a
pretrained model's scores. Each leaves the other parts of the result file unchanged.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fastpref import config as configs
from fastpref import metrics, ops
from fastpref.bench import timer
from fastpref.docgen import markdown
from fastpref.dynamics.band import band, parameter_geometry
from fastpref.model.policy import ScoreOptions
from fastpref.training.setup import DataSplit
from fastpref.training.trainer import Trainer
from fastpref.utils import environment, result_json
from fastpref.utils.progress import Display

OUT = Path(__file__).parent / "results" / "calibration.json"
LLAMA = {
    "model_type": "llama",
    "vocab_size": 2000,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
PROMPT = 200  # characters at most, so that 128 tokens have room for a response
HELD_OUT = 96
BATCH = 4
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": 0.1},
    "ipo": {"name": "ipo", "tau": 0.1},
    "cpo": {"name": "cpo", "beta": 0.1, "lam": 1.0},
    "simpo": {"name": "simpo", "beta": 2.0, "gamma": 1.0},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-4},
    # RMSprop with alpha 0 and a huge eps is gradient descent, here with a rate of 1e-3.
    "sgd": {"name": "rmsprop", "lr": 1e5, "alpha": 0.0, "eps": 1e8, "max_grad_norm": None},
}
# Statistics of the calibration; None: no calibration. See `calibration.statistics`.
METHODS = (None, "batch", "pairs")
ONE_STEP_PAIRS = 48
T, D, V = 2048, 512, 32000  # shape of the head whose ops are timed
SKETCHES, SKETCHED_BATCHES, SKETCHED_PAIRS = (1024, 4096, 16384), 4, 8
ROUNDS, STEPS_PER_TURN = 7, 4
SETTING = ("optimizer", "objective", "statistics", "scope")
BAND_COLUMNS = {  # title: name in the summary, digits
    "log r": ("in_training/band/log_r", 2),
    "log r*": ("in_training/band/log_r_star", 2),
    "cosine": ("in_training/band/cosine", 2),
    "steps both up": ("in_training/pathway_i", 2),
    "both down": ("in_training/pathway_ii", 2),
    "apart": ("in_training/pathway_iii", 2),
    "pairs inside theirs": ("in_training/pair_band/inside", 2),
    "cosine of pairs": ("in_training/pair_band/cosine", 2),
}
ONE_STEP_COLUMNS = {  # title: name in `one_step`
    "inside the band": "inside",
    "went as predicted": "agree",
    "inside by the head's scores": "head_inside",
    "went as these predict": "head_agree",
}
OUTCOME_COLUMNS = {
    "train: chosen": ("train/chosen_change", 1),
    "rejected": ("train/rejected_change", 1),
    "displaced": ("train/displaced", 2),
    "disentangled": ("train/disentangled", 2),
    "held out: chosen": ("held_out/chosen_change", 1),
    "rejected ": ("held_out/rejected_change", 1),
    "disentangled ": ("held_out/disentangled", 2),
    "accuracy": ("held_out/accuracy", 2),
}


@dataclass(frozen=True)
class Job:
    """One run from the SFT model of a seed."""

    seed: int
    optimizer: str
    objective: str
    statistics: str | None
    scope: str = "head"

    @property
    def name(self) -> str:
        return f"{self.optimizer}-{self.objective}-{self.statistics}-{self.scope}-{self.seed}"


def jobs(seeds: int, objectives: Iterable[str]) -> list[Job]:
    """Objectives under AdamW, and DPO under gradient descent, which the theory describes.

    Each runs without calibration and with both kinds of it; CPO, whose incentives are far from
    even, also with the scores of all parameters.
    """
    settings = [("adamw", objective) for objective in objectives]
    if "dpo" in objectives:
        settings.append(("sgd", "dpo"))
    jobs = []
    for seed in range(seeds):
        jobs += [Job(seed, *setting, method) for setting in settings for method in METHODS]
        if "cpo" in objectives:
            jobs.append(Job(seed, "adamw", "cpo", "batch", "full"))
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="prompt, chosen, rejected: text")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--steps", type=int, default=80, help=f"of {BATCH} pairs, in one epoch")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--add", action="store_true", help="keep the runs of the result file")
    parser.add_argument("--overhead", action="store_true", help="measure the cost instead")
    parser.add_argument("--sketch", type=Path, help="measure sketches of this model instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    report["benchmark"] = "calibration"
    with tempfile.TemporaryDirectory(prefix="calibration-") as folder:
        rows = [json.loads(line) for line in options.data.read_text().splitlines()]
        split(rows, Path(folder), options.seeds, options.steps * BATCH)
        if options.overhead:
            report["overhead"] = {**environment.describe("cpu"), **overhead(Path(folder))}
            print(overhead_table(report["overhead"]))
        elif options.sketch is not None:
            report["sketch"] = {
                "model": options.sketch.name, "data": options.data.name,
                **sketch_errors(Path(folder), options.sketch),
            }  # fmt: skip
            print(sketch_table(report["sketch"]))
        else:
            earlier = report.get("training", {}) if options.add else {}
            results = study(Path(folder), options, earlier)
            report["training"] = {**environment.describe("cpu"), **results}
            print("\n\n".join(tables(report["training"])))
    options.out.write_text(result_json.dumps(report))


def study(folder: Path, options: argparse.Namespace, earlier: dict[str, Any]) -> dict[str, Any]:
    """Run SFT for each seed, then all jobs from it, except those in earlier results."""
    settings = {
        "model": LLAMA, "data": options.data.name, "train_pairs": options.steps * BATCH,
        "held_out_pairs": HELD_OUT, "batch_size": BATCH, "steps": options.steps,
        "objectives": OBJECTIVES, "optimizers": OPTIMIZERS,
    }  # fmt: skip
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, torch.set_num_threads, (1,)) as pool:
        sft = list(pool.map(partial(sft_warm_up, folder), range(options.seeds)))
        start = json.loads(result_json.dumps({"settings": settings, "sft": sft}))  # rounded
        if earlier and {name: earlier[name] for name in start} != start:
            raise SystemExit("--add: the runs of the result file have other settings; leave it out")
        done = {json.dumps(_job(run)): run for run in earlier.get("runs", [])}
        all_jobs = jobs(options.seeds, options.objectives)
        new = [job for job in all_jobs if json.dumps(vars(job)) not in done]
        done |= {json.dumps(_job(run)): run for run in pool.map(partial(train, folder), new)}
    runs = [done[json.dumps(vars(job))] for job in all_jobs]
    return {
        "settings": settings,
        "seconds": round(time.monotonic() - started) + earlier.get("seconds", 0),
        "sft": sft,
        "summary": summary(runs),
        "runs": runs,
    }


def _job(run: dict[str, Any]) -> dict[str, Any]:
    return {field.name: run[field.name] for field in fields(Job)}


def split(rows: list[dict[str, Any]], folder: Path, seeds: int, train_pairs: int) -> None:
    """Write train.jsonl and held_out.jsonl of each seed."""
    fit = [row for row in rows if len(row["prompt"]) <= PROMPT]
    if len(fit) < train_pairs + HELD_OUT:
        raise SystemExit(
            f"--data: {len(fit)} rows have prompts of {PROMPT} characters or less, but --steps "
            f"needs {train_pairs + HELD_OUT}; lower it"
        )
    for seed in range(seeds):
        drawn = random.Random(seed).sample(fit, train_pairs + HELD_OUT)
        (folder / str(seed)).mkdir()
        for name, part in (("train", drawn[:train_pairs]), ("held_out", drawn[train_pairs:])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (folder / str(seed) / f"{name}.jsonl").write_text(lines)


def make_trainer(
    folder: Path, seed: int, name: str, training: dict[str, Any], **sections: Any
) -> Trainer:
    """Build a trainer on the split of a seed; its run directory is `folder / seed / name`."""
    home = folder / str(seed)
    values = {
        "data": {
            "train": str(home / "train.jsonl"),
            "eval": str(home / "held_out.jsonl"),
            "max_length": LLAMA["max_position_embeddings"],
            "soft_labels": False,
            "cache": str(folder / "cache"),
        },
        "training": {
            "log_every": 1,
            "seed": seed,
            "device": "cpu",
            "activation_checkpointing": False,
            "checkpoint_every": None,
            "output_dir": str(home / name),
            **training,
        },
        **sections,
    }
    return Trainer(configs.parse(values), Display(Console(quiet=True)))


def sft_warm_up(folder: Path, seed: int) -> dict[str, float]:
    """Train on the chosen responses from random weights, and export the model."""
    trainer = make_trainer(
        folder,
        seed,
        "sft",
        {"epochs": 3, "batch_size": 8},
        model={"init": "random", "dtype": "float32", "config": LLAMA},
        loss="sft",
        optim={"lr": 3e-3, "schedule": "cosine", "warmup_steps": 10},
    )
    trainer.loop([])
    trainer.export()
    last = [line for line in records(trainer) if "eval_loss" in line][-1]
    chosen = last["eval_logps/chosen"] / last["eval_lengths/chosen"]
    return {"seed": seed, "held_out_logp_per_token": chosen}


def train(folder: Path, job: Job) -> dict[str, Any]:
    """Train one job; return its positions in the band and the final changes of log-probs."""
    calibration = None
    if job.statistics is not None:
        calibration = {"statistics": job.statistics, "scope": job.scope}
    trainer = make_trainer(
        folder,
        job.seed,
        job.name,
        {"epochs": 1, "batch_size": BATCH},
        model={"path": str(folder / str(job.seed) / "sft" / "model"), "dtype": "float32"},
        loss=OBJECTIVES[job.objective],
        # Changes are measured from the reference, even if the objective does not need one.
        reference="cached",
        calibration=calibration,
        monitor={"band_every": 1},
        optim=OPTIMIZERS[job.optimizer],
    )
    trainer.loop([])
    assert trainer.run.eval is not None
    result = {
        **vars(job),
        "in_training": in_training([line for line in records(trainer) if "loss" in line]),
        "train": outcome(trainer, trainer.run.train),
        "held_out": outcome(trainer, trainer.run.eval),
    }
    if job.seed == 0:
        result["one_step"] = one_step(trainer, trainer.run.eval)
    print(job.name, flush=True)
    return result


def records(trainer: Trainer) -> list[dict[str, Any]]:
    return metrics.read_records(trainer.run.folder / "metrics.jsonl")


def in_training(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the steps, and the share of steps on each pathway.

    `band/*` is the band of a step's batch, with the applied incentives; the pathway of a step
    follows from the changes that it predicts.
    """
    names = [name for name in lines[-1] if name.startswith(("band/", "pair_band/", "calibration/"))]
    means = {name: statistics.fmean(line[name] for line in lines if name in line) for name in names}
    up = [line["band/dz_chosen"] >= 0 for line in lines]
    down = [line["band/dz_rejected"] <= 0 for line in lines]
    signs = list(zip(up, down, strict=True))
    pathways = {"i": (True, False), "ii": (False, True), "iii": (True, True)}
    return means | {f"pathway_{k}": signs.count(v) / len(lines) for k, v in pathways.items()}


@torch.no_grad()
def outcome(trainer: Trainer, data: DataSplit) -> dict[str, float]:
    """Changes of the log-probs of a split since the SFT model.

    chosen_change, rejected_change: mean change of the summed log-prob, nats. Shares of pairs:
    accuracy: the chosen log-prob changed by more than the rejected one. displaced: the chosen one
    fell. disentangled: the chosen one did not fall and the rejected one did not rise.
    """
    sides = []
    for step in data.plan.epoch():
        for indices in step:
            policy, reference, *_ = forward(trainer, data, indices)
            sides.append((policy.chosen - reference.chosen, policy.rejected - reference.rejected))
    chosen, rejected = (torch.cat(side).double() for side in zip(*sides, strict=True))
    columns = {
        "chosen_change": chosen,
        "rejected_change": rejected,
        "accuracy": chosen > rejected,
        "displaced": chosen < 0,
        "disentangled": (chosen >= 0) & (rejected <= 0),
    }
    return {name: values.double().mean().item() for name, values in columns.items()}


def forward(trainer: Trainer, data: DataSplit, indices: list[int], geometry: bool = False) -> Any:
    """Run a forward pass over some pairs; returns `fastpref.training.forward.MicroBatchLogps`."""
    batches = trainer.policy.batches(data.groups, indices)
    return trainer.forward(batches, data.reference, scores=ScoreOptions(sums=True, pairs=geometry))


def one_step(trainer: Trainer, data: DataSplit, nats: float = 0.01) -> dict[str, float]:
    """Compare the changes that the band predicts with those of a step of gradient descent.

    A step follows the gradient of one pair's loss, calibrated as in training, in all parameters and
    in fp64. Its length makes the larger change of a log-prob `nats`, well above the rounding of the
    model's norms, which are in fp32. Returns shares of pairs: `inside` the band by the scores of
    all parameters; `agree`: both changes have the predicted signs; `agree_inside`: the same among
    the pairs inside; `head_inside` and `head_agree`: the same with the scores of the head.
    """
    policy = trainer.policy.double()
    policy.compute_dtype = torch.float64
    objective: Any = trainer.loss  # pairwise
    parameters: list[Tensor] = [p for p in policy.parameters() if p.requires_grad]
    counts: Counter[str] = Counter()
    for index in range(ONE_STEP_PAIRS):
        trainer.calibration.discard_step()
        trainer.calibration.before_step(0)
        output = forward(trainer, data, [index], geometry=True)
        before = output.policy
        loss = objective(
            trainer.calibration.calibrate(output, True, accumulated=False), output.reference
        ).loss.sum()
        d_chosen, d_rejected = torch.autograd.grad(
            loss, (before.chosen, before.rejected), retain_graph=True
        )
        predicted, by_head = (
            band(-d_chosen, d_rejected, geometry)[-2:]
            for geometry in (parameter_geometry(before, parameters), output.geometry)
        )
        by_all, head = signs(*predicted), signs(*by_head)
        rate = nats / torch.cat(predicted).abs().max().item()
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=-rate)
            after = forward(trainer, data, [index]).policy
            torch._foreach_add_(parameters, gradients, alpha=rate)
        actual = signs(after.chosen - before.chosen, after.rejected - before.rejected)
        inside = by_all == (True, True)
        counts.update(
            inside=inside,
            agree=actual == by_all,
            agree_inside=inside and actual == by_all,
            head_inside=head == (True, True),
            head_agree=actual == head,
        )
    shares = {name: count / ONE_STEP_PAIRS for name, count in counts.items()}
    shares["agree_inside"] = counts["agree_inside"] / max(1, counts["inside"])
    return {"pairs": ONE_STEP_PAIRS, **shares}


def signs(dz_chosen: Tensor, dz_rejected: Tensor) -> tuple[bool, bool]:
    """Whether the chosen log-prob does not fall, and whether the rejected one does not rise."""
    return dz_chosen.item() >= 0, dz_rejected.item() <= 0


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, minimum and maximum over the seeds, for each setting."""
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        settings.setdefault(tuple(run[name] for name in SETTING), []).append(run)
    rows = []
    for setting, members in settings.items():
        row: dict[str, Any] = dict(zip(SETTING, setting, strict=True))
        for part in ("in_training", "train", "held_out"):
            for name in members[0][part]:
                values = [member[part][name] for member in members if name in member[part]]
                row[f"{part}/{name}"] = [statistics.fmean(values), min(values), max(values)]
        rows.append(row)
    return rows


def tables(training: dict[str, Any]) -> tuple[str, str, str]:
    """Markdown tables: the band in training, the outcome, and the steps of gradient descent."""
    rows = training["summary"]
    band_in_training, outcomes = (
        _table(columns, {_title(row): _cells(row, columns) for row in rows})
        for columns in (BAND_COLUMNS, OUTCOME_COLUMNS)
    )
    one_steps = {
        _title(run): [f"{run['one_step'].get(name, 0):.0%}" for name in ONE_STEP_COLUMNS.values()]
        for run in training["runs"]
        if "one_step" in run
    }
    return band_in_training, outcomes, _table(ONE_STEP_COLUMNS, one_steps)


def overhead_table(overhead: dict[str, Any]) -> str:
    """Markdown table: a step by scope, and score geometry relative to the log-probs of a head."""
    rows = {}
    for part, base in (("seconds_per_step", "none"), ("seconds_of_head", "linear_logps")):
        first = overhead[part][base]["median"]
        for name, times in overhead[part].items():
            rows[name] = [f"{times['median'] * 1e3:.0f} ms", f"{times['median'] / first:.2f}"]
    return _table(("time", "beside the first"), rows)


def _title(row: dict[str, Any]) -> str:
    title = f"{row['objective']}, {row['optimizer']}"
    title += "" if row["statistics"] is None else f", RC of {row['statistics']}"
    return title + (", all scores" if row["scope"] == "full" else "")


def _cells(row: dict[str, Any], columns: dict[str, tuple[str, int]]) -> list[str]:
    cells = []
    for name, digits in columns.values():
        mean, least, most = (f"{value:.{digits}f}" for value in row[name])
        cells.append(f"{mean} ({least} to {most})")
    return cells


def _table(columns: Iterable[str], rows: dict[str, list[str]]) -> str:
    return markdown.table(["", *columns], ([title, *cells] for title, cells in rows.items()))


def overhead(folder: Path) -> dict[str, Any]:
    """Measure seconds of a training step by scope of calibration, and of the head's two ops."""
    trainers = {
        scope: make_trainer(
            folder,
            0,
            f"overhead-{scope}",
            {"steps": 1, "batch_size": BATCH, "log_every": 1000},
            model={"init": "random", "dtype": "float32", "config": LLAMA},
            loss=OBJECTIVES["dpo"],
            calibration=None if scope == "none" else {"scope": scope},
        )
        for scope in ("none", "head", "last_adapter", "full")
    }
    steps: dict[str, Callable[[], Any]] = {
        scope: partial(take_steps, trainer) for scope, trainer in trainers.items()
    }
    seconds, _ = timer.interleave(steps, "cpu", ROUNDS, "none")
    per_step = {
        scope: timer.summary([value / STEPS_PER_TURN for value in values])
        for scope, values in seconds.items()
    }
    ops_seconds, _ = timer.interleave(head_ops(), "cpu", ROUNDS, "linear_logps")
    return {
        "model": LLAMA,
        "batch_size": BATCH,
        "seconds_per_step": per_step,
        "head": {"T": T, "D": D, "V": V, "dtype": "float32"},
        "seconds_of_head": {name: timer.summary(values) for name, values in ops_seconds.items()},
    }


def sketch_errors(folder: Path, model: Path) -> dict[str, Any]:
    """Deviations of sketched norms and cosines of a model's batches from the exact ones."""
    trainer = make_trainer(
        folder, 0, "sketch", {"steps": 1, "batch_size": SKETCHED_PAIRS},
        model={"path": str(model), "dtype": "float32"}, loss=OBJECTIVES["dpo"],
    )  # fmt: skip
    split = trainer.run.train
    errors: dict[int, list[tuple[float, float]]] = {rows: [] for rows in SKETCHES}
    for number in range(SKETCHED_BATCHES):
        first = number * SKETCHED_PAIRS
        indices = list(range(first, first + SKETCHED_PAIRS))
        log_r_star, cosine = batch_numbers(trainer, split, indices, None)
        for rows, deviations in errors.items():
            sketched = batch_numbers(trainer, split, indices, rows)
            deviations.append((sketched[0] - log_r_star, sketched[1] - cosine))
    return {
        "vocabulary": trainer.policy.base.get_output_embeddings().weight.shape[0],
        "batches": SKETCHED_BATCHES,
        "pairs": SKETCHED_PAIRS,
        "rms_deviation": {
            str(rows): {
                name: statistics.fmean(value**2 for value in column) ** 0.5
                for name, column in zip(
                    ("log_r_star", "cosine"), zip(*values, strict=True), strict=True
                )
            }
            for rows, values in errors.items()
        },
    }


@torch.no_grad()
def batch_numbers(
    trainer: Trainer, split: DataSplit, indices: list[int], rows: int | None
) -> tuple[float, float]:
    """log r* and the cosine of a batch's scores."""
    batches = trainer.policy.batches(split.groups, indices)
    output = trainer.forward(batches, split.reference, scores=ScoreOptions(sums=True, rows=rows))
    assert output.score_sums is not None
    chosen, rejected, cosine = ops.batch_geometry(output.score_sums, len(indices))
    return (rejected.log() - chosen.log()).item(), cosine.item()


def sketch_table(sketch: dict[str, Any]) -> str:
    """Markdown table: root mean square deviations by the rows of the sketch."""
    rows = {
        f"{int(rows):,}": [f"{value['log_r_star']:.4f}", f"{value['cosine']:.4f}"]
        for rows, value in sketch["rms_deviation"].items()
    }
    return markdown.table(["rows", "log r*", "cosine"], ([k, *v] for k, v in rows.items()))


def take_steps(trainer: Trainer) -> None:
    trainer.steps = trainer.step + STEPS_PER_TURN
    trainer.loop([])


def head_ops() -> dict[str, Callable[[], Any]]:
    """Ops to time: log-probs with gradients, with the batch's scores too, and geometry by pairs."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=generator) for n in (T, V))
    weight *= D**-0.5
    labels = torch.randint(V, (T,), generator=generator)

    def logps(with_scores: bool, rows: int | None = None) -> tuple[Tensor, ...]:
        inputs = hidden.requires_grad_(), weight.requires_grad_()
        if with_scores:
            values, _ = ops.linear_logps_and_scores(*inputs, labels, T // 2, rows=rows)
        else:
            values = ops.linear_logps(*inputs, labels)
        return torch.autograd.grad(values.sum(), inputs)

    def geometry(pairs: int) -> ops.ScoreGeometry:
        offsets = torch.linspace(0, T, 2 * pairs + 1, dtype=torch.int64)
        return ops.score_geometry(hidden.detach(), weight.detach(), labels, offsets, per_pair=True)

    runs: dict[str, Callable[[], Any]] = {
        "linear_logps": partial(logps, False),
        "with the batch's scores, 4,096 rows": partial(logps, True, ops.SKETCH_ROWS),
        "with the batch's scores, exact": partial(logps, True, None),
    }
    return runs | {f"score_geometry, {n} pairs": partial(geometry, n) for n in (1, 4, 16)}


if __name__ == "__main__":
    main()
