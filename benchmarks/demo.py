"""Run the demo and copy its numbers and its picture for docs/demo.md.

    python -m benchmarks.demo [--folder runs/demo]

Writes benchmarks/results/demo-cpu.json and docs/assets/demo.png. `--folder` uses the results of a
demo that was run there, instead of running it again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.pictures import publish
from fastpref.utils import environment, result_json

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=None)
    folder = parser.parse_args().folder
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="demo-")) / "demo"
        command = [sys.executable, "-m", "fastpref", "demo", "--out", str(folder)]
        subprocess.run(command, check=True)
    results = json.loads((folder / "results.json").read_text())
    report = {"benchmark": "demo", **environment.describe(), **results}
    (ROOT / "benchmarks" / "results" / "demo-cpu.json").write_text(result_json.dumps(report))
    publish(folder / "demo.png")


if __name__ == "__main__":
    main()
