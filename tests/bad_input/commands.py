"""Command lines: options that are not there, values out of range, files in the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.bad_input.command import BASE, Case
from tests.helpers.data import rows

RUN = {"config.yaml": yaml.safe_dump(BASE), "metrics.jsonl": '{"step": 1, "loss": 1.0}\n'}


def _typed(line: str, says: str | None, **files: str) -> Case:
    """A command line, and files by their names, with `__` for a slash."""

    def make(folder: Path) -> None:
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return Case(f"$ {line}"[:70], says, {}, rows(3), make=make, arguments=tuple(line.split()))


def _run(line: str, says: str | None, **changed: str) -> Case:
    """A command about the run directory `r`, some of whose files are other ones."""
    files = {**RUN, **{name.replace("_", "."): text for name, text in changed.items()}}
    return _typed(line, says, **{f"r/{name}": text for name, text in files.items()})


USAGE = [
    _typed("frobnicate", "No such command 'frobnicate'*; see fastpref --help"),
    _typed("--frobnicate", "No such option: --frobnicate*; see fastpref --help"),
    _typed("train", "Missing argument 'CONFIG.yaml'; see fastpref train --help"),
    _typed("train c.yaml --fast", "No such option: --fast*; see fastpref train --help"),
    _typed("train c.yaml --dry-run=yes", "Option '--dry-run' does not take a value; see *"),
    _typed("precompute", "Missing argument 'CONFIG.yaml'; see fastpref precompute --help"),
    _typed("plan", "Missing argument 'CONFIG.yaml'; see fastpref plan --help"),
    _typed("plan c.yaml --ranks 0", "Invalid value for '--ranks': *; see fastpref plan --help"),
    _typed("plan c.yaml --ranks two", "Invalid value for '--ranks': *; see fastpref plan --help"),
    _typed("plan c.yaml --device", "Option '--device' requires an argument; see *"),
    _typed("report", "Missing argument 'RUN…'; see fastpref report --help"),
    _typed("sample", "Missing argument 'MODEL'; see fastpref sample --help"),
    _typed("sample llama", "Missing option '--prompts'; see fastpref sample --help"),
    _typed("sample llama --prompts pairs.jsonl --n x", "Invalid value for '--n': *; see *"),
    _typed("sample llama --prompts pairs.jsonl --limit 0", "Invalid value for '--limit': *; see *"),
    _typed("eval llama", "Missing option '--data'; see fastpref eval --help"),
    _typed("eval llama --data pairs.jsonl --max-length 1", "Invalid value for '--max-length': *"),
    _typed("eval llama --data pairs.jsonl --max-tokens 0", "Invalid value for '--max-tokens': *"),
    _typed("did-entropy llama", "Missing argument 'REFERENCE'; see fastpref did-entropy --help"),
    _typed("did-entropy llama llama --prompts pairs.jsonl --responses 1",
           "Invalid value for '--responses': *; see *"),
    _typed("data", "Missing command; see fastpref data --help"),
    _typed("data impure", "No such command 'impure'*; see fastpref data --help"),
    _typed("data pure-semantic", "Missing option '--out'; see *"),
    _typed("data pure-semantic --out d --seed -1", "Invalid value for '--seed': *; see *"),
    _typed("demo --seed -1", "Invalid value for '--seed': *; see fastpref demo --help"),
    _typed("bench --rounds many", "Invalid value for '--rounds': *; see fastpref bench --help"),
    _typed("losses dpo simpo", "Got unexpected extra argument*(simpo); see fastpref losses --help"),
]  # fmt: skip

LOSSES = [
    _typed("losses nope", "name: no objective is called 'nope'; known: *"),
    _typed("losses DPOP", "name: no objective is called 'DPOP'; known: *"),
]

PLANS = [
    _typed("plan c.yaml --device tpu", "--device: must be one of cpu, *, got tpu"),
    _typed("plan none.yaml", "none.yaml: cannot read the config (*); name a YAML file"),
    *[_typed(f"plan c.yaml --lengths {text}",
             f"--lengths: must be tokens of the prompt and of each response, *, got {text}")
      for text in ("200", "a,b", "0,1", "1,-1", ",", "1.5,2", "1,,2")],
    _typed("plan c.yaml data.train=none.jsonl",
           "data.train: none.jsonl is not a file here; give --lengths PROMPT,RESPONSE, *"),
    _typed("plan c.yaml model.path=nowhere",
           "model.path: cannot load nowhere: *; or give --lengths PROMPT,RESPONSE, mean tokens"),
    _typed("plan c.yaml model.path=nowhere --lengths 10,10", "model: cannot load nowhere: *"),
    _typed("plan c.yaml optim.lr=-1", "optim.lr: must be > 0, got -1"),
    _typed("plan c.yaml parallel.shard=2 parallel.replicate=2 --device cpu",
           "parallel: replicate 2 · shard 2 needs 4 ranks; plan with --ranks 4"),
    _typed("plan c.yaml training.micro_batch_tokens=10 --device cpu",
           "*cannot hold the longest pair (*"),
    _typed("plan c.yaml --device cpu --json /proc/no/such.json", "/proc/no*; check path and disk"),
]  # fmt: skip

REPORTS = [
    _typed("report nowhere", "nowhere: not a run directory; expected one with config.yaml and *"),
    _typed("report llama", "llama: not a run directory; expected one with config.yaml and *"),
    _typed("report pairs.jsonl", "pairs.jsonl: not a run directory; expected one with *"),
    _run("report r r", "*/r: is given twice; name each run once"),
    _run("report r ./r", "*/r: is given twice; name each run once"),
    _run("report r", "r: the config of the run cannot be read: *; fix it: *", config_yaml="{"),
    _run("report r", "r: the config of the run cannot be read: *must hold sections such as *",
         config_yaml=""),
    _run("report r", "r: the config of the run cannot be read: *: is missing; set it",
         config_yaml="model: {path: x}"),
    _run("report r", "r/metrics.jsonl: holds no metrics yet; wait for the first step of the run",
         metrics_jsonl=""),
    *[_run("report r", "r/metrics.jsonl: expected a JSON object with a step on every line; *",
           metrics_jsonl=text)
      for text in ("{oops\n{}\n", "[1]\n", '{"loss": 1}\n', "3\n", '{"step": "one"}\n',
                   '{"step": null}\n', '{"step": NaN}\n', "\ud7ff\0\n", "[" * 99_999 + "\n\n")],
    _run("report r --out r/config.yaml", "*; check path and disk"),
]  # fmt: skip

_SAMPLE = "sample llama --prompts pairs.jsonl"
SAMPLES = [
    *[_typed(f"{_SAMPLE} --{option} {value}", f"--{option}: expected *, got *")
      for option, value in (("n", "0"), ("n", "-1"), ("temperature", "-1"), ("temperature", "nan"),
                            ("temperature", "inf"), ("top-p", "0"), ("top-p", "1.5"),
                            ("top-p", "nan"), ("max-new-tokens", "0"), ("batch-size", "0"),
                            ("seed", "-1"), ("seed", "99999999999999999999"), ("engine", "llama"),
                            ("device", "tpu"), ("device", "cuda"), ("dtype", "fp8"))],
    _typed(f"{_SAMPLE} --temperature 0 --n 2", "--n: greedy completions of a prompt are all *"),
    _typed(f"{_SAMPLE} --engine vllm --max-new-tokens 4", "--engine: vllm is not installed; use *"),
    _typed(f"{_SAMPLE} --out pairs.jsonl", "--out: pairs.jsonl is already there; choose another *"),
    _typed(f"{_SAMPLE} --max-new-tokens 1000", "--max-new-tokens: 1,000 after the prompt of row *"),
    _typed("sample nowhere --prompts pairs.jsonl", "model.path: cannot load nowhere: *"),
    _typed("sample llama --prompts none.jsonl", "none.jsonl: no such file; check the path"),
    _typed("sample llama --prompts ~nobody.here/p.jsonl", "~nobody.here/p.jsonl: no such file; *"),
    _typed("sample ~nobody.here --prompts pairs.jsonl", "model.path: must be a path from a user *"),
    _typed("sample llama --prompts e.jsonl", "e.jsonl: has no rows; use data *",
           **{"e.jsonl": "\n"}),
    _typed("sample llama --prompts e.jsonl", "e.jsonl, row 1: no prompt; columns found: text; *",
           **{"e.jsonl": '{"text": "a"}'}),
    _typed("sample llama --prompts e.jsonl", "e.jsonl, row 1: prompt *",
           **{"e.jsonl": '{"prompt": 3}'}),
    _typed("sample a --prompts pairs.jsonl", "a/adapter_config.json: names no base_model_name_*",
           **{"a/adapter_config.json": "{}"}),
    _typed("sample a --prompts pairs.jsonl", "a/adapter_config.json: names no base_model_name_*",
           **{"a/adapter_config.json": "[]"}),
    _typed("sample a --prompts pairs.jsonl", "a/adapter_config.json: names no base_model_name_*",
           **{"a/adapter_config.json": "{oops"}),
    _typed("sample a --prompts pairs.jsonl", "a: cannot load the adapter: *",
           **{"a/adapter_config.json": '{"base_model_name_or_path": "llama"}'}),
]  # fmt: skip

_EVAL = "eval llama --data pairs.jsonl"
EVALUATIONS = [
    _typed("eval nowhere --data pairs.jsonl", "model.path: cannot load nowhere: *"),
    _typed("eval llama --data none.jsonl", "none.jsonl: no such file; check the path"),
    _typed(f"{_EVAL} --truncation middle", "data.truncation: must be *, got 'middle'"),
    _typed(f"{_EVAL} --max-length 999", "--max-length: got 999, but the model has 256 *"),
    _typed(
        f"{_EVAL} --max-tokens 3 --cache cache", "training.micro_batch_tokens: 3 cannot hold the *"
    ),
    _typed(f"{_EVAL} --out pairs.jsonl", "--out: pairs.jsonl is already there; choose another *"),
    _typed(f"{_EVAL} --device tpu", "--device: expected auto or cpu or cuda, got 'tpu'"),
    _typed(f"{_EVAL} --dtype fp8", "--dtype: expected bfloat16 or *, got 'fp8'"),
    _typed(f"{_EVAL} --cache pairs.jsonl", "pairs.jsonl*; check path and disk"),
]

OTHERS = [
    _typed("demo --out .", "--out: . is not empty and holds no demo; choose another folder"),
    _typed("demo --out pairs.jsonl", "*; *"),
    _typed("data pure-semantic --out pairs.jsonl", "--out: pairs.jsonl*: *"),
    _typed("did-entropy llama llama --prompts pairs.jsonl --out .",
           "--out: . is not empty; choose another folder"),
    _typed("did-entropy llama llama --prompts pairs.jsonl --temperature 0 --out o",
           "--n: greedy completions of a prompt are all the same, got 4 of them; *"),
    _typed("bench --rounds 1", "--rounds: expected at least 5, got 1"),
    _typed("bench --device tpu", "--device: expected cpu or cuda, got 'tpu'"),
    _typed("bench --device cuda", "--device: cuda is asked for, but torch finds no CUDA device; *"),
    _typed("bench --only softmax", "--only: expected one of *, got 'softmax'"),
    _typed("bench --against jax", "--against: expected some of *, got 'jax'"),
    *[_typed(f"bench --shape {text}", "--shape: expected T,D,V, whole numbers such as *, got *")
      for text in ("1", "a,b,c", "3,4,5", "0,4,5", "1,2,3,4")],
]  # fmt: skip


def _ranks(name: str, says: str, **environment: Any) -> Case:
    return Case(f"ranks: {name}", says, {}, rows(3), arguments=("train", "c.yaml"),
                environment=environment)  # fmt: skip


_NUMBER = "must be a whole number in the environment of several ranks, got"
GROUPS = '{"prompt": "p", "completions": ["a", "b", "c", "d"], "scores": [0, 0.1, 0.5, 1]}\n'
REPRODUCTIONS = [
    _typed("reproduce", "Missing argument 'NAME|all'; see fastpref reproduce --help"),
    _typed("reproduce ppo", "NAME: expected all or one of pmo, rc, pro, did, stapo, got 'ppo'"),
    _typed("reproduce pmo --size big", "--size: expected one of quick, cores, gpu, got 'big'"),
    _typed("reproduce pmo --data g.jsonl", "--data: pmo is measured on data of its own; leave *"),
    _typed("reproduce all --data g.jsonl", "--data: all is measured on data of its own; leave *"),
    _typed("reproduce rc --data pairs.jsonl", "--data: pairs.jsonl: expected JSON lines with *"),
    _typed("reproduce rc --data nowhere.jsonl", "nowhere.jsonl: *"),
    _typed("reproduce rc --data g.jsonl", "--data: g.jsonl: expected 50 groups of 4 scored *",
           **{"g.jsonl": GROUPS * 49}),
    _typed("reproduce rc --data g.jsonl --quick", "--data: g.jsonl: expected JSON lines with *",
           **{"g.jsonl": "{"}),
]  # fmt: skip
RANKS = [
    _ranks("their number is a word", f"WORLD_SIZE: {_NUMBER} 'two'; *", WORLD_SIZE="two"),
    _ranks("their number is empty", f"WORLD_SIZE: {_NUMBER} ''; *", WORLD_SIZE=""),
    _ranks("no rank", f"RANK: {_NUMBER} None; start them with torchrun, *", WORLD_SIZE="2"),
    _ranks("no local rank", f"LOCAL_RANK: {_NUMBER} None; *", WORLD_SIZE="2", RANK="0"),
    _ranks("no port", f"MASTER_PORT: {_NUMBER} None; *", WORLD_SIZE="2", RANK="0", LOCAL_RANK="0"),
    _ranks("a port that is a word", f"MASTER_PORT: {_NUMBER} 'http'; *", WORLD_SIZE="2", RANK="0",
           LOCAL_RANK="0", MASTER_PORT="http"),
]  # fmt: skip

CASES = [*USAGE, *LOSSES, *PLANS, *REPORTS, *SAMPLES, *EVALUATIONS, *OTHERS, *REPRODUCTIONS, *RANKS]
