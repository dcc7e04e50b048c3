"""Predictions of `fastpref plan` for the configs of examples/papers and examples/recipes.

    python -m benchmarks.plans.examples        # a minute on a CPU

Plans each config on one H100 and on eight, with micro-batches full of the longest rows that it
admits: a quarter of `data.max_length` is prompt, the rest response. Writes
benchmarks/results/plans-of-examples.json, from which `tables.py` makes the table of
docs/paper-configs.md. The shapes of the models are in `shapes.py`, so nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.plans.shapes import SHAPES
from fastpref import config as configs
from fastpref.config import Config
from fastpref.docgen import markdown
from fastpref.plan.command import RESPONSES
from fastpref.plan.devices import GPUS
from fastpref.plan.predict import Prediction, Predictor, Setup
from fastpref.plan.workload import GroupLengths
from fastpref.utils import environment, result_json

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
RESULT = ROOT / "benchmarks" / "results" / "plans-of-examples.json"
RANKS = (1, 8)
_FIELD = re.compile(r"# (Reproduces|Reported|Missing|Source|Data|Run): (.*)")


def paths() -> list[Path]:
    """Configs of papers, then those of recipes, each in the order of their names."""
    return [
        path for name in ("papers", "recipes") for path in sorted((EXAMPLES / name).glob("*.yaml"))
    ]


def header(path: Path) -> dict[str, list[str]]:
    """Lines of each field in the comment that begins a config."""
    fields: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := _FIELD.fullmatch(line):
            lines = fields.setdefault(match[1], [match[2]])
        elif line.startswith("#   "):
            lines.append(line.removeprefix("#   "))
        else:
            return fields
    raise ValueError(f"{path}: has no config below its header")


def longest_rows(config: Config) -> GroupLengths:
    """One step of groups that fill `data.max_length`."""
    kind, longest = config.build_loss().kind, config.data.max_length
    prompt = longest // 4
    # Rows of `messages` have one response, also under the pairwise objective `sft`.
    responses = 1 if config.data.sft_on == "all" else RESPONSES[kind]
    lengths = [longest - prompt] * responses
    return GroupLengths.uniform(kind, config.training.batch_size, prompt, lengths)


def predict(examples: Iterable[Path]) -> dict[Path, dict[int, Prediction]]:
    """Predictions for each config on one H100 and on eight.

    Configs of the same shape share one trace of the model, that of the longest rows.
    """
    parsed = {path: configs.parse(yaml.safe_load(path.read_text("utf-8"))) for path in examples}
    longest_first = sorted(parsed, key=lambda path: (-parsed[path].data.max_length, path))
    with tempfile.TemporaryDirectory(prefix="shapes-") as folder:
        planner = _Planner(Path(folder))
        predictions = {path: planner(parsed[path]) for path in longest_first}
    return {path: predictions[path] for path in parsed}


class _Planner:
    """Predictions for models whose configs are written to a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._predict = Predictor(GPUS["h100"], vocabulary=None)

    def __call__(self, config: Config) -> dict[int, Prediction]:
        if config.model.path is not None:
            shape = {"path": str(self._shape(config.model.path)), "tokenizer": None}
            config = config.model_copy(update={"model": config.model.model_copy(update=shape)})
        rows = longest_rows(config)
        return {ranks: self._predict(Setup(config, rows, ranks)) for ranks in RANKS}

    def _shape(self, path: str) -> Path:
        """Folder of a model's config; models of the same shape have the same one."""
        text = json.dumps(SHAPES[path])
        folder = self._folder / hashlib.sha256(text.encode()).hexdigest()
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(text)
        return folder


def _record(path: Path, predictions: dict[int, Prediction]) -> dict[str, Any]:
    fields = header(path)
    texts = {name.lower(): " ".join(fields[name]) for name in ("Reproduces", "Reported", "Missing")}
    devices = {
        f"{ranks} × h100": {"total_bytes": p.parts.total, "fits": p.fits}
        for ranks, p in predictions.items()
    }
    return {"config": str(path.relative_to(EXAMPLES)), **texts, "devices": devices}


def table(result: Any, folder: str) -> str:
    """Markdown table of the configs of a folder: what they reproduce, and where they fit."""
    rows = []
    for record in result["examples"]:
        name = Path(record["config"])
        if name.parent.name != folder:
            continue
        link = f"[`{name.stem}`](../examples/{name})"
        texts = [record[field].removesuffix(".") for field in ("reproduces", "reported", "missing")]
        rows.append([link, *texts, *map(_peak, record["devices"].values())])
    columns = ("config", "reproduces", "reported", "not known, or different", "one H100", "eight")
    return markdown.table(columns, rows)


def _peak(device: Any) -> str:
    size = f"{device['total_bytes'] / 2**30:.1f} GiB"
    return size if device["fits"] else f"{size}, too much"


def main() -> None:
    records = [_record(path, predictions) for path, predictions in predict(paths()).items()]
    result = {"benchmark": "example-plans", **environment.describe(), "examples": records}
    RESULT.write_text(result_json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
