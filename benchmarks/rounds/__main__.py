"""Rounds against offline DPO on the demo's task, and rounds on a real model.

    python -m benchmarks.rounds --tune --out benchmarks/results/rounds.json
    python -m benchmarks.rounds --out benchmarks/results/rounds.json
    python -m benchmarks.rounds --real-model MODEL --data PROMPTS.jsonl --out …

The tasks and what counts are in `demo` and `real_model`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.rounds.demo import on_the_demo, tune
from benchmarks.rounds.real_model import on_a_model
from fastpref.utils import environment, result_json
from fastpref.utils.progress import Display


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


if __name__ == "__main__":
    main()
