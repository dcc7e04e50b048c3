"""What Reward Calibration (arXiv:2604.18239) does to the training of a small model.

    python -m benchmarks.calibration --data PAIRS.jsonl [--out benchmarks/results/calibration.json]
    python -m benchmarks.calibration --data PAIRS.jsonl --overhead

For each seed the rows are shuffled and split, and a small Llama with random weights learns the
chosen responses (SFT). From there each objective trains alone and with calibration, for one epoch.
The result file says where the incentives stood to the Disentanglement Band in training, and how far
log-probs had moved in the end, on the pairs trained on and on held-out ones. With the final models
of the first seed, `one_step` compares the band's prediction with a small step of gradient descent.

`--overhead` measures what calibration costs instead. Either way the other half of the result file
stays as it is.
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
from fastpref.training.setup import DataSplit
from fastpref.training.trainer import Trainer
from fastpref.utils import environment
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
PROMPT = 200  # characters at most, so that 128 tokens hold a response as well
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
MOMENTA = (None, 0.98, 0.9)  # None: not calibrated
ONE_STEP_PAIRS = 48
T, D, V = 2048, 512, 32000  # of the head whose ops are timed
ROUNDS, STEPS_A_TURN = 7, 4
SETTING = ("optimizer", "objective", "momentum", "scope")
BAND_COLUMNS = {  # title: name in the summary, digits
    "inside the band": ("in_training/band/inside", 2),
    "log r": ("in_training/band/log_r", 2),
    "log r*": ("in_training/band/log_r_star", 2),
    "cosine": ("in_training/band/cosine", 2),
    "steps both up": ("in_training/pathway_i", 2),
    "both down": ("in_training/pathway_ii", 2),
    "apart": ("in_training/pathway_iii", 2),
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
    momentum: float | None
    scope: str = "head"

    @property
    def name(self) -> str:
        return f"{self.optimizer}-{self.objective}-{self.momentum}-{self.scope}-{self.seed}"


def jobs(seeds: int) -> list[Job]:
    """All objectives under AdamW; under gradient descent, which the theory is about, DPO alone.

    Each without calibration and with two momenta of it; CPO, whose incentives are far from even,
    also with the scores of all parameters.
    """
    settings = [("adamw", objective) for objective in OBJECTIVES] + [("sgd", "dpo")]
    made = []
    for seed in range(seeds):
        made += [Job(seed, *setting, momentum) for setting in settings for momentum in MOMENTA]
        made.append(Job(seed, "adamw", "cpo", 0.98, "full"))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="prompt, chosen, rejected: text")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80, help=f"of {BATCH} pairs, in one epoch")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--add", action="store_true", help="keep the runs of the result file")
    parser.add_argument("--overhead", action="store_true", help="measure the costs instead")
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
        else:
            known = report.get("training", {}) if options.add else {}
            found = study(Path(folder), options, known)
            report["training"] = {**environment.describe("cpu"), **found}
            print("\n\n".join(tables(report["training"])))
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def study(folder: Path, options: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any]:
    """SFT of each seed, then all runs from it, but for those known with the same settings."""
    settings = {
        "model": LLAMA, "data": options.data.name, "train_pairs": options.steps * BATCH,
        "held_out_pairs": HELD_OUT, "batch_size": BATCH, "steps": options.steps,
        "objectives": OBJECTIVES, "optimizers": OPTIMIZERS,
    }  # fmt: skip
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, torch.set_num_threads, (1,)) as pool:
        speakers = list(pool.map(partial(speak, folder), range(options.seeds)))
        if known and (known["settings"], known["sft"]) != (settings, speakers):
            raise SystemExit("--add: the runs of the result file have other settings; leave it out")
        done = {json.dumps(_job(run)): run for run in known.get("runs", [])}
        wanted = jobs(options.seeds)
        new = [job for job in wanted if json.dumps(vars(job)) not in done]
        done |= {json.dumps(_job(run)): run for run in pool.map(partial(train, folder), new)}
    runs = [done[json.dumps(vars(job))] for job in wanted]
    return {
        "settings": settings,
        "seconds": round(time.monotonic() - started) + known.get("seconds", 0),
        "sft": speakers,
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
    """A trainer on the split of a seed; its run directory is `folder / seed / name`."""
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


def speak(folder: Path, seed: int) -> dict[str, float]:
    """Learn the chosen responses from random weights, and export."""
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
    evaluated = [line for line in records(trainer) if "eval_loss" in line]
    chosen = evaluated[-1]["eval_logps/chosen"] / evaluated[-1]["eval_lengths/chosen"]
    return {"seed": seed, "held_out_logp_per_token": chosen}


def train(folder: Path, job: Job) -> dict[str, Any]:
    """One run: where it stood to the band, and where the log-probs ended."""
    trainer = make_trainer(
        folder,
        job.seed,
        job.name,
        {"epochs": 1, "batch_size": BATCH},
        model={"path": str(folder / str(job.seed) / "sft" / "model"), "dtype": "float32"},
        loss=OBJECTIVES[job.objective],
        reference="cached",  # also where the objective needs none, to be measured against
        calibration=None
        if job.momentum is None
        else {"momentum": job.momentum, "scope": job.scope},
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
    if job.seed == 0 and job.momentum in MOMENTA[:2]:
        result["one_step"] = one_step(trainer, trainer.run.eval)
    print(job.name, flush=True)
    return result


def records(trainer: Trainer) -> list[dict[str, Any]]:
    return metrics.read(trainer.run.folder / "metrics.jsonl")


def in_training(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the steps, and the share of steps on each pathway.

    `band/*` are means over the pairs of a step, with the incentives that were applied and the
    scores of the head. The pathway of a step is that of its mean predicted changes.
    """
    names = [name for name in lines[0] if name.startswith(("band/", "calibration/"))]
    found = {name: statistics.fmean(line[name] for line in lines if name in line) for name in names}
    up = [line["band/dz_chosen"] >= 0 for line in lines]
    down = [line["band/dz_rejected"] <= 0 for line in lines]
    signs = list(zip(up, down, strict=True))
    pathways = {"i": (True, False), "ii": (False, True), "iii": (True, True)}
    return found | {f"pathway_{k}": signs.count(v) / len(lines) for k, v in pathways.items()}


@torch.no_grad()
def outcome(trainer: Trainer, data: DataSplit) -> dict[str, float]:
    """What has become of the log-probs of a split since the SFT model.

    chosen_change, rejected_change: mean change of the summed log-prob, nats. accuracy: share of
    pairs whose chosen one gained more, or lost less. displaced: whose chosen one lost.
    disentangled: whose chosen one did not lose and whose rejected one did not gain.
    """
    sides = []
    for step in data.plan.epoch():
        for indices in step:
            policy, reference, *_ = see(trainer, data, indices)
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


def see(trainer: Trainer, data: DataSplit, indices: list[int], geometry: bool = False) -> Any:
    """A forward pass over some pairs, `fastpref.training.forward.MicroBatchLogps`."""
    batches = trainer.policy.batches(data.groups, indices)
    return trainer.forward(batches, data.reference, with_geometry=geometry)


def one_step(trainer: Trainer, data: DataSplit, nats: float = 0.01) -> dict[str, float]:
    """How often the band predicts the signs of what a step of gradient descent changes.

    A step follows the gradient of one pair's loss, calibrated as in training, in all parameters
    and in fp64, but for norms, which the model takes in fp32: so it is as long as changes the
    log-prob that moves more by `nats`, well above their rounding. Shares of pairs: `inside` the
    band by the scores of all parameters, `agree` where both log-probs went where these say,
    `agree_inside` of those inside, and by the scores of the head alone `head_inside` and
    `head_agree`.
    """
    policy = trainer.policy.double()
    policy.compute_dtype = torch.float64
    parameters: list[Tensor] = [p for p in policy.parameters() if p.requires_grad]
    tally: Counter[str] = Counter()
    for index in range(ONE_STEP_PAIRS):
        seen = see(trainer, data, [index], geometry=True)
        before = seen.policy
        loss = trainer.loss(trainer.balance.calibrated(seen, 0), seen.reference).loss.sum()
        d_chosen, d_rejected = torch.autograd.grad(
            loss, (before.chosen, before.rejected), retain_graph=True
        )
        predicted, by_head = (
            band(-d_chosen, d_rejected, geometry)[-2:]
            for geometry in (parameter_geometry(before, parameters), seen.geometry)
        )
        whole, head = signs(*predicted), signs(*by_head)
        rate = nats / torch.cat(predicted).abs().max().item()
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=-rate)
            after = see(trainer, data, [index]).policy
            torch._foreach_add_(parameters, gradients, alpha=rate)
        went = signs(after.chosen - before.chosen, after.rejected - before.rejected)
        inside = whole == (True, True)
        tally.update(
            inside=inside,
            agree=went == whole,
            agree_inside=inside and went == whole,
            head_inside=head == (True, True),
            head_agree=went == head,
        )
    shares = {name: count / ONE_STEP_PAIRS for name, count in tally.items()}
    shares["agree_inside"] = tally["agree_inside"] / max(1, tally["inside"])
    return {"pairs": ONE_STEP_PAIRS, **shares}


def signs(dz_chosen: Tensor, dz_rejected: Tensor) -> tuple[bool, bool]:
    """Whether the chosen log-prob of a pair does not fall, and whether the rejected one does not
    rise."""
    return dz_chosen.item() >= 0, dz_rejected.item() <= 0


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, least and most over the seeds, of each setting."""
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
    """In Markdown: the band in training, the outcome, and what a step of gradient descent does."""
    rows = training["summary"]
    band_in_training, outcomes = (
        _table(columns, {_title(row): _cells(row, columns) for row in rows})
        for columns in (BAND_COLUMNS, OUTCOME_COLUMNS)
    )
    measured = [run for run in training["runs"] if "one_step" in run]
    one_steps = {
        _title(run): [f"{run['one_step'].get(name, 0):.0%}" for name in ONE_STEP_COLUMNS.values()]
        for run in measured
    }
    return band_in_training, outcomes, _table(ONE_STEP_COLUMNS, one_steps)


def overhead_table(found: dict[str, Any]) -> str:
    """In Markdown: what a step costs by scope, and the geometry beside the log-probs of a head."""
    rows = {}
    for part, base in (("seconds_per_step", "none"), ("seconds_of_head", "linear_logps")):
        whole = found[part][base]["median"]
        for name, times in found[part].items():
            rows[name] = [f"{times['median'] * 1e3:.0f} ms", f"{times['median'] / whole:.2f}"]
    return _table(("time", "beside the first"), rows)


def _title(row: dict[str, Any]) -> str:
    title = f"{row['objective']}, {row['optimizer']}"
    title += "" if row["momentum"] is None else f", RC {row['momentum']}"
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
    """Seconds of a training step by scope of calibration, and of the head's two ops."""
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
        scope: timer.summary([value / STEPS_A_TURN for value in values])
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


def take_steps(trainer: Trainer) -> None:
    trainer.steps = trainer.step + STEPS_A_TURN
    trainer.loop([])


def head_ops() -> dict[str, Callable[[], Any]]:
    """Log-probs with the gradients of hidden states and head, and the geometry by pairs."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=g) for n in (T, V))
    weight *= D**-0.5
    labels = torch.randint(V, (T,), generator=g)

    def logps() -> tuple[Tensor, ...]:
        inputs = hidden.requires_grad_(), weight.requires_grad_()
        return torch.autograd.grad(ops.linear_logps(*inputs, labels).sum(), inputs)

    def geometry(pairs: int) -> ops.ScoreGeometry:
        offsets = torch.linspace(0, T, 2 * pairs + 1, dtype=torch.int64)
        return ops.score_geometry(hidden.detach(), weight.detach(), labels, offsets, per_pair=True)

    runs: dict[str, Callable[[], Any]] = {"linear_logps": logps}
    return runs | {f"score_geometry, {n} pairs": partial(geometry, n) for n in (1, 4, 16)}


if __name__ == "__main__":
    main()
