"""Compare whole training steps with TRL's: time, memory, and losses.

    python -m benchmarks.end_to_end.compare --preset cpu --data PAIRS.jsonl  twenty minutes at most
    python -m benchmarks.end_to_end.compare --preset lora-8b  on a GPU, less than nine
    python -m benchmarks.end_to_end.compare --dry-run  all presets, tiny, no GPU

Every trainer runs DPO with the same model, pairs, order, precision, AdamW and clipping; other
options are the trainer's defaults, unless the contestant's name or the preset says otherwise. Each
contestant runs in a process of its own. On a CPU they take turns of a few steps, so that anything
that slows the machine for a while slows all of them; a GPU cannot hold all of them at once, so
there they run one after the other.

The order is that of fastpref's plan: TRL gets the pairs in this order and reads them sequentially.
Before the first step, every contestant reports the token ids of each step's pairs, as they reach
the model; a contestant whose pairs differ is excluded. Memory counts from the moment when the
policy and the data are loaded: resident memory on a CPU, allocations of torch on a GPU. Times of
fastpref are those of training steps; its reference pass is reported separately (for TRL, it is part
of the setup).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kernels"))  # runs without an installation, too

import torch  # noqa: E402

from benchmarks.end_to_end.floor import measure  # noqa: E402
from benchmarks.end_to_end.presets import (  # noqa: E402
    CONTESTANTS,
    PRESETS,
    Contestant,
    Preset,
    Row,
    Values,
    fastpref_config,
    real,
    synthetic,
    tiny,
    trl_config,
    word_tokenizer,
)
from benchmarks.end_to_end.report import summary, table, write  # noqa: E402
from benchmarks.end_to_end.trainers import Job, build, pair_id, play  # noqa: E402
from fastpref.config import ConfigError, Data, parse  # noqa: E402
from fastpref.utils import environment  # noqa: E402

PACKAGES = ("trl", "transformers", "accelerate", "peft", "liger-kernel", "bitsandbytes")
WHEN_OVER = "out of time"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, help="default: cpu; --dry-run: all")
    parser.add_argument("--data", type=Path, help="JSONL of pairs, for the presets of a CPU")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/end-to-end-*.json")
    parser.add_argument("--steps", type=int, help="of every contestant; fewer for a quick look")
    parser.add_argument("--only", help="contestants by name, or all whose names begin so; with ;")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU")
    options = parser.parse_args()
    chosen = [PRESETS[options.preset or "cpu"]]
    if options.dry_run:
        chosen = [tiny(p) for p in (chosen if options.preset else PRESETS.values())]
    elif chosen[0].lengths is None and options.data is None:
        parser.error(
            f"--data: the preset {chosen[0].name} needs a JSONL file of prompt, chosen, rejected"
        )
    elif chosen[0].device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--preset {chosen[0].name}: there is no CUDA device; --dry-run works without")
    if options.steps:
        chosen = [replace(p, steps=options.steps, curve_steps=options.steps) for p in chosen]
    names = tuple(options.only.split(";")) if options.only else ("",)
    exact = [c for c in CONTESTANTS if c.name in names]
    contestants = exact if len(names) > 1 else [c for c in CONTESTANTS if c.name.startswith(names)]
    if not contestants:
        parser.error(f"--only: expected some of {', '.join(c.name for c in CONTESTANTS)}")
    # A forked contestant starts at once, but the pages of its libraries count as its memory.
    context = multiprocessing.get_context("forkserver" if options.dry_run else "spawn")
    if options.dry_run:
        context.set_forkserver_preload(
            ["fastpref.training.trainer", "trl.trainer.dpo_trainer", "peft"]
        )
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    for preset in chosen:
        out = options.out or ROOT / "benchmarks" / "results" / f"end-to-end-{preset.name}.json"
        if options.dry_run and len(chosen) > 1:
            out = out.with_name(f"{out.stem}-{preset.name}.json")
        compare(preset, contestants, options.data, out, context)


def compare(
    preset: Preset, contestants: list[Contestant], data: Path | None, out: Path, context: Any
) -> Values:
    """Run a preset, write the result file as it grows, print the table; returns the result."""
    started = time.time()
    described = environment.describe(preset.device)
    described["versions"] |= {name: environment.package_version(name) for name in PACKAGES}
    report = {"benchmark": "end_to_end", **described, "settings": asdict(preset)}
    with tempfile.TemporaryDirectory(prefix="end-to-end-") as name:
        os.environ["HF_DATASETS_CACHE"] = f"{name}/datasets"
        folder = Path(name)
        report |= prepare(preset, data, folder, context)
        jobs, rows = enter(preset, contestants, folder, report["pairs"])
        deadline = started + preset.minutes * 60
        groups = [jobs] if preset.device == "cpu" else [{name: job} for name, job in jobs.items()]
        for group in groups:
            rows |= take_turns(group, report["pairs"], context, deadline)
            report |= {"contestants": rows, **summary(preset, rows, report["response_tokens"])}
            report["seconds"] = round(time.time() - started, 1)
            write(out, report)
    print("\n".join([f"\n{preset.name}: {described['device']}", *table(report)]))
    print(f"{out}, {report['seconds']:.0f} s", flush=True)
    return report


def prepare(preset: Preset, data: Path | None, folder: Path, context: Any) -> Values:
    """Write pairs, tokenizer and model; return the pairs and tokens of each step."""
    from fastpref.data import bpe
    from fastpref.data.batch_plan import Plan
    from fastpref.data.dataset import load_groups
    from fastpref.plan.devices import find_device
    from fastpref.plan.predict import Predictor, Setup
    from fastpref.plan.workload import GroupLengths

    rows = list(synthetic(preset)) if data is None else real(data, preset.pairs)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = preset.model["vocab_size"]
    if preset.name.startswith("cpu"):
        texts = rows if data is None else real(data, sys.maxsize)
        tokenizer = bpe.train((text for row in texts for text in row.values()), size)
    else:
        tokenizer = word_tokenizer(size)
    tokenizer.save_pretrained(folder / "model")
    ids = (f"{name}_token_id" for name in ("bos", "eos", "pad"))
    special = {name: getattr(tokenizer, name) for name in ids}
    run(context, build, {**preset.model, **special}, folder / "model", preset.device)
    config = fastpref_config(preset, CONTESTANTS[0], folder, preset.steps)
    groups = load_groups(config["data"]["train"], tokenizer, Data(**config["data"]))
    plan = Plan.of(groups, preset.batch_size, sys.maxsize, config["training"]["seed"])
    steps = [[groups[i] for part in step for i in part] for step in plan.epoch()]
    ordered = [rows[group.row - 1] for step in steps for group in step]
    (folder / "ordered.json").write_text(json.dumps(ordered))
    name = "cpu" if preset.device == "cpu" else "h100"
    device = find_device(name, getattr(torch, preset.dtype))
    setup = Setup(parse(config), GroupLengths.of(groups), 1)
    predicted = Predictor(device, len(tokenizer))(setup)
    tokens = [sum(len(g.prompt) + sum(map(len, g.responses)) for g in step) for step in steps]
    labels = [sum(len(r) for g in step for r in g.responses) for step in steps]
    return {
        "vocabulary": len(tokenizer),
        "predicted": {"peak_bytes": predicted.parts.total, "step_seconds": predicted.seconds},
        "floor": products(context, preset, len(tokenizer), tokens, labels),
        "pairs": [sorted(pair_id(g.prompt, *g.responses) for g in step) for step in steps],
        "response_tokens": labels,
        "prompt_tokens": [sum(len(g.prompt) for g in step) for step in steps],
    }


def products(
    context: Any, preset: Preset, vocabulary: int, tokens: list[int], labels: list[int]
) -> Values:
    """Measure the matrix products of a mean step, in a process of its own."""
    ours, theirs = context.Pipe()
    model = {**preset.model, "vocab_size": vocabulary}
    means = (sum(counts) // len(counts) for counts in (tokens, labels))
    arguments = (model, preset.device, preset.dtype, *means, preset.adapter is None)
    run(context, measure, theirs, *arguments)
    floor: Values = ours.recv()
    return floor


def run(context: BaseContext, function: Any, *arguments: Any) -> None:
    """Call a function in a process of its own, which frees its memory at the end."""
    process = context.Process(target=function, args=arguments)  # type: ignore[attr-defined]
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{function.__name__} ended with exit code {process.exitcode}")


def enter(
    preset: Preset, contestants: Iterable[Contestant], folder: Path, pairs: list[list[str]]
) -> tuple[dict[str, Job], dict[str, Row]]:
    """Jobs of the contestants by name, and result rows of contestants with an invalid config."""
    ordered = json.loads((folder / "ordered.json").read_text())
    jobs: dict[str, Job] = {}
    refused: dict[str, Row] = {}
    for contestant in contestants:
        steps = min(preset.curve_steps if contestant.curve else preset.steps, len(pairs))
        make = fastpref_config if contestant.trainer == "fastpref" else trl_config
        config = make(preset, contestant, folder, steps)
        if contestant.trainer == "fastpref":
            try:
                parse(config)
            except ConfigError as error:
                refused[contestant.name] = {"unsupported": str(error)}
                continue
        jobs[contestant.name] = Job(
            contestant.trainer, config, folder, ordered[: steps * preset.batch_size],
            preset.device, preset.dtype, preset.adapter, steps, preset.block, preset.batch_size,
            torch.get_num_threads(),
        )  # fmt: skip
    return jobs, refused


def take_turns(
    jobs: dict[str, Job], pairs: list[list[str]], context: Any, deadline: float
) -> dict[str, Row]:
    """Start all contestants, let them take blocks of steps in turn, and return their rows."""
    players = [Player(name, job, context, deadline) for name, job in jobs.items()]
    for player in players:
        player.prepare(pairs)
    while any(player.plays for player in players):
        for player in players:
            if player.plays:
                player.turn()
    for player in players:
        player.end()
    return {player.name: player.row for player in players}


class Player:
    """Handle of a contestant's process; `row` is its result so far."""

    def __init__(self, name: str, job: Job, context: Any, deadline: float) -> None:
        self.name, self.row = name, dict[str, Any](seconds=[])
        self._job, self._context, self._deadline = job, context, deadline

    @property
    def plays(self) -> bool:
        return "failed" not in self.row and len(self.row["seconds"]) < self._job.steps

    def prepare(self, pairs: list[list[str]]) -> None:
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=play, args=(self._job, theirs))
        self._process.start()
        theirs.close()
        message = self._receive()
        reported = message.pop("pairs", None)
        self.row |= message
        expected = pairs[: self._job.steps]
        if self.plays and reported != expected:
            step = next(k for k, pair in enumerate(expected) if reported[k : k + 1] != [pair])
            self._fail(f"the token ids of step {step} are not those of the other trainers")

    def turn(self) -> None:
        self._connection.send("go")
        message = self._receive()
        seconds = self.row["seconds"] + message.pop("seconds", [])
        self.row |= {**message, "seconds": seconds}

    def end(self) -> None:
        if "failed" not in self.row:
            self.row |= self._receive()
        self._process.join()

    def _receive(self) -> Values:
        if not self._connection.poll(max(0.0, self._deadline - time.time())):
            return self._fail(WHEN_OVER)
        try:
            return dict(self._connection.recv())
        except EOFError:
            self._process.join()
            return self._fail(f"its process ended with exit code {self._process.exitcode}")

    def _fail(self, why: str) -> Values:
        self._process.kill()
        self.row["failed"] = why
        return {}


if __name__ == "__main__":
    main()
