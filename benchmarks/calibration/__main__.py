"""Entry point of `python -m benchmarks.calibration`."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

import benchmarks.calibration
from benchmarks.calibration.cost import overhead
from benchmarks.calibration.runs import BATCH, OBJECTIVES, split
from benchmarks.calibration.sketch import sketch_errors
from benchmarks.calibration.study import study
from benchmarks.calibration.tables import overhead_table, sketch_table, tables
from fastpref.utils import environment, result_json

OUT = Path(__file__).parents[1] / "results" / "calibration.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(benchmarks.calibration.__doc__ or "").partition("\n")[0]
    )
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


if __name__ == "__main__":
    main()
