"""A real chat model: what three objectives do to it, beside TRL's DPO, and its log-probs.

    python -m benchmarks.real_model --model FOLDER --data FOLDER [--part NAME]... [--quick]

`--model` is a Hugging Face model with a chat template, `--data` has hh_harmless_pairs.jsonl and
alpacaeval_pairs.jsonl. Everything runs in fp32 on the CPU with LoRA. Parts, in their order:

    logps       log-probs of 16 pairs against those of transformers, in every layout
    objectives  DPO, SimPO and DPO with Reward Calibration on pairs of hh_harmless
    trl         TRL's DPO on the same pairs in the same order, from the same initial adapter
    alpacaeval  DPO on pairs of AlpacaEval, whose responses are cut to fit

Each part leaves the others' entries of the result file unchanged, and all take less than half an
hour on two cores. Held-out pairs are scored by the same code before and after every run, TRL's
included; standard errors are those of means over pairs, of differences pair by pair.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

from benchmarks.real_model.bench import OBJECTIVES, SETTING, Bench, Setting, Values
from benchmarks.real_model.logps import compare_logps
from benchmarks.real_model.peer import largest_difference, train_trl
from benchmarks.real_model.tables import objectives_table, trl_table
from fastpref.utils import result_json

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "benchmarks" / "results" / "real-model.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of the two JSONL files")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all, in order")
    parser.add_argument("--name", help="of the model in the result; default: that of its folder")
    parser.add_argument("--out", type=Path, help=f"default: {OUT.relative_to(ROOT)}")
    parser.add_argument("--quick", action="store_true", help="two steps, to see that it runs")
    options = parser.parse_args()
    out = options.out or (OUT.with_name("real-model-quick.json") if options.quick else OUT)
    if not (options.model / "config.json").is_file():
        parser.error(f"--model: {options.model} has no config.json; name a Hugging Face folder")
    setting = quick(SETTING) if options.quick else SETTING
    for source in setting.sources.values():
        if not (options.data / source.file).is_file():
            parser.error(f"--data: {options.data} has no {source.file}")
    with tempfile.TemporaryDirectory(prefix="real-model-") as folder:
        bench = Bench(options.model, options.data, Path(folder), setting)
        report = bench.header(options.name or options.model.name)
        earlier = json.loads(out.read_text()) if out.exists() else {}
        if earlier.get("setting") == report["setting"]:
            report = earlier | report
        for part in options.part or PARTS:
            started = time.monotonic()
            result = PARTS[part](bench, report)
            report[part] = {**result, "seconds": round(time.monotonic() - started, 1)}
            out.write_text(result_json.dumps(report))
            print(f"{part}: {report[part]['seconds']:.0f} s, {out}", flush=True)
    for table in (objectives_table, trl_table):
        print(f"\n{table(report)}")


def quick(setting: Setting) -> Setting:
    """The same path in a minute or two."""
    sources = {
        name: replace(source, train=4, held_out=4, max_length=96)
        for name, source in setting.sources.items()
    }
    return replace(setting, sources=sources, batch_size=2, compared=2, micro_batch=1)


def measure_logps(bench: Bench, report: Values) -> Values:
    return compare_logps(bench)


def train_objectives(bench: Bench, report: Values) -> Values:
    return {"runs": {name: bench.train("hh", name) for name in OBJECTIVES}}


def train_alpacaeval(bench: Bench, report: Values) -> Values:
    return {"runs": {"dpo": bench.train("alpacaeval", "dpo")}}


def compare_with_trl(bench: Bench, report: Values) -> Values:
    """Train TRL's DPO, and fastpref's unless the report has it; compare them."""
    ours = report.get("objectives", {}).get("runs", {}).get("dpo") or bench.train("hh", "dpo")
    theirs = train_trl(bench)
    return {
        "fastpref": ours,
        "TRL": theirs,
        "largest_difference": largest_difference(ours["curves"], theirs["curves"]),
    }


PARTS: dict[str, Callable[[Bench, Values], Values]] = {
    "logps": measure_logps,
    "objectives": train_objectives,
    "trl": compare_with_trl,
    "alpacaeval": train_alpacaeval,
}


if __name__ == "__main__":
    main()
