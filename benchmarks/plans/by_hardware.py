"""Predictions of `fastpref plan` for the configs of docs/hardware.md.

    python -m benchmarks.plans.by_hardware        # two minutes on a CPU

Runs every plan on that page and writes benchmarks/results/plans-by-hardware.json, from which
`tables.py` makes the table on the page. The shapes of the models are defined here, so nothing is
downloaded.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from fastpref.utils import environment, result_json

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "hardware.md"
RESULT = ROOT / "benchmarks" / "results" / "plans-by-hardware.json"
Values = dict[str, Any]

_LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, Values] = {
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_8B,
    "meta-llama/Meta-Llama-3-70B-Instruct": {
        **_LLAMA_8B,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        **_LLAMA_8B,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}


def configs() -> dict[str, str]:
    """Configs on the page, by the file name in their first line."""
    blocks = re.findall(r"^```yaml\n(# (\S+)\n.+?)^```", PAGE.read_text(), re.M | re.S)
    return {name: text for text, name in blocks}


def commands() -> dict[str, list[str]]:
    """Arguments of the `fastpref plan` commands on the page, by config."""
    lines = re.findall(r"^fastpref plan (.+)$", PAGE.read_text(), re.M)
    return {name: options for name, *options in map(shlex.split, lines)}


def main() -> None:
    texts = configs()
    plans = [plan(name, texts[name], options) for name, options in commands().items()]
    result = {"benchmark": "hardware-plans", **environment.describe(), "plans": plans}
    RESULT.write_text(result_json.dumps(result))


def plan(name: str, text: str, options: list[str]) -> Values:
    """Run one plan, and return its prediction with its config and options."""
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        path, out, model = Path(folder) / name, Path(folder) / "plan.json", Path(folder) / "model"
        path.write_text(text)
        model.mkdir()
        shape = SHAPES[yaml.safe_load(text)["model"]["path"]]
        (model / "config.json").write_text(json.dumps(shape))
        command = [sys.executable, "-W", "ignore", "-m", "fastpref", "plan", str(path)]
        command += [f"model.path={model}", *options, "--json", str(out)]
        done = subprocess.run(command, cwd=ROOT)
        if not out.exists():
            sys.exit(done.returncode)
        return {"config": name, "text": text, "options": options, **json.loads(out.read_text())}


if __name__ == "__main__":
    main()
