"""Run snippets of docs/integrations.md on two CPU ranks, next to plain PyTorch on full logits.

    python -m benchmarks.loops accelerate-fsdp2          # names: benchmarks/loops/libraries.py
    DS_ACCELERATOR=cpu python -m benchmarks.loops deepspeed accelerate-deepspeed
    OPEN_INSTRUCT=FOLDER/open_instruct DS_ACCELERATOR=cpu python -m benchmarks.loops open-instruct

The libraries need not be installed together: each run updates its own rows of
`benchmarks/results/loops.json`.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch.multiprocessing import start_processes

from benchmarks.loops import ranks, setting
from benchmarks.loops.libraries import LOOPS, Loop
from fastpref.utils import result_json

RESULTS = Path("benchmarks/results/loops.json")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loops", description=__doc__)
    parser.add_argument("names", nargs="+", choices=LOOPS, metavar="NAME")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for name in options.names:
        results[name] = measure(LOOPS[name])
        print(name, json.dumps(results[name]))
        options.out.write_text(result_json.dumps(dict(sorted(results.items()))))


def measure(loop: Loop) -> dict[str, Any]:
    """Versions, and the largest errors (`ranks.errors`) with an untied and a tied head."""
    errors: dict[str, float] = {}
    for tied in loop.heads:
        for name, error in _on_ranks(loop, tied).items():
            errors[name] = max(error, errors.get(name, 0.0))
    packages = ("torch", "transformers", *loop.packages)
    return {
        "versions": {package: version(package) for package in packages},
        "ranks": setting.RANKS,
        "steps": setting.STEPS,
        **errors,
    }


def _on_ranks(loop: Loop, tied: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        arguments = (port, loop, tied, Path(folder))
        probe.close()
        start_processes(ranks.work, arguments, nprocs=setting.RANKS, start_method="spawn")
        return json.loads((Path(folder) / "errors.json").read_text())


if __name__ == "__main__":
    main()
