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
    _typed("export --step 1", "Missing argument 'RUN'; see fastpref export --help"),
    _typed("export r", "--step: is missing; name the step of a checkpoint, or upload *"),
    _typed("export r --step 1 --private", "--private: is for --push-to-hub, which is missing; *"),
    _typed("export r --push-to-hub tiny", "--push-to-hub: must be ORG/NAME on the Hub, got 'tiny'"),
    _typed("export r --push-to-hub a/b", "--push-to-hub: the Hub is switched off by HF_HUB_OFF*"),
    _typed("export r --step last", "Invalid value for '--step': *; see fastpref export --help"),
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
    _typed("data pairs --out p.jsonl", "Missing argument 'FILE'; see fastpref data pairs --help"),
    _typed("data pairs s.jsonl", "Missing option '--out'; see fastpref data pairs --help"),
    _typed("data pairs s.jsonl --out p.jsonl --eval -1", "Invalid value for '--eval': *; see *"),
    _typed("data pairs s.jsonl --out p.jsonl --k two", "Invalid value for '--k': *; see *"),
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

_TWO = "loss.beta=0.1,0.2"
GRIDS = [
    _typed("train c.yaml --grid", "Option '--grid' requires an argument; see *"),
    _typed("train c.yaml --grid loss.beta", "--grid 'loss.beta': must look like section.key=*"),
    _typed("train c.yaml --grid beta=0.1,0.2", "beta: a key of TRL; set loss.beta here"),
    _typed("train c.yaml --grid loss.beta=0.1", "--grid: every key has one value; give a key *"),
    _typed("train c.yaml --grid loss.beta=", "--grid loss.beta: has no value; give several, as *"),
    _typed("train c.yaml --grid loss.beta=0.1,0.1", "--grid loss.beta: has the value 0.1 twice; *"),
    _typed("train c.yaml --grid loss.beta={0.1,0.2", "--grid 'loss.beta={0.1,0.2': cannot be *"),
    _typed(f"train c.yaml loss.beta=1 --grid {_TWO}", "--grid loss.beta: is set twice on the *"),
    _typed(f"train c.yaml --grid {_TWO} --grid {_TWO}", "--grid loss.beta: is set twice on the *"),
    _typed("train c.yaml --grid training.output_dir=a,b", "--grid training.output_dir: cannot *"),
    _typed(f"train c.yaml --grid {_TWO} resume=r", "resume: a grid continues its own runs, got *"),
    _typed("train c.yaml --grid loss.beta=0.1,x", "loss.beta: must be a number, got 'x'"),
    _typed("train c.yaml --grid optim.lr=nan,1", "optim.lr: must be > 0, got 'nan'"),
    _typed("train c.yaml --grid training.activation_checkpointing=full,true",
           "--grid: *=full and *=true are the same run; remove a value"),
    _typed(f"train none.yaml --grid {_TWO}", "none.yaml: cannot read the config (*); name a *"),
    _typed(f"train --grid {_TWO}", "Missing argument 'CONFIG.yaml'; see fastpref train --help"),
    _typed(f"train c.yaml --grid {_TWO} --dry-run", None),
    _typed(f"train c.yaml --grid {_TWO}", "training.output_dir: run holds a run; choose another *",
           **{"run/metrics.jsonl": '{"step": 1}\n'}),
    _typed(f"train c.yaml --grid {_TWO}", "run/beta=0.1/config.yaml: cannot read the config (*",
           **{"run/beta=0.1/model/config.json": "{}"}),
    _typed(f"train c.yaml --grid {_TWO}",
           "training.output_dir: run/beta=0.2 is of another config (*); restore it, remove *",
           **{"run/beta=0.2/nonfinite.json": "{",
              "run/beta=0.2/config.yaml": yaml.safe_dump(BASE)}),
    _typed("train c.yaml --grid loss.beta=0.1,0.2 --grid training.output_dir=/proc/no",
           "training.output_dir: /proc/no: *; choose another folder"),
]  # fmt: skip

EXPORTS = [
    _typed("export nowhere --step 1", "nowhere: no such run; expected a folder with config.yaml *"),
    _typed("export llama --step 1", "llama: no such run; expected a folder with config.yaml and *"),
    _run("export r --step 1", "--step: r has no checkpoint of step 1; it has none, choose one"),
    _run("export r --step 1", "--step: r has no checkpoint of step 1; it has 2, 10, choose one",
         **{"checkpoints/step-2/x": "", "checkpoints/step-10/x": "", "checkpoints/.step-1/x": ""}),
    _run("export r --step 2", "--step: r/checkpoints/step-2: checksums.json is missing; choose *",
         **{"checkpoints/step-2/state.json": "{}"}),
    _run("export r --step 1 --output pairs.jsonl",
         "--output: pairs.jsonl is already there; choose another folder"),
    _run("export r --step 1 --device tpu", "--device: expected auto or cpu or cuda, got 'tpu'"),
    _run("export r --step 1 --device cuda", "training.device: cuda is asked for, but torch *"),
    _run("export r --step 1", "*: not valid YAML; fix it: *", config_yaml="{"),
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
    _typed("sample nowhere --prompts pairs.jsonl", "MODEL: cannot load nowhere: *"),
    _typed("sample llama --prompts none.jsonl", "none.jsonl: no such file; check the path"),
    _typed("sample llama --prompts ~nobody.here/p.jsonl",
           "--prompts: must be a path from a user of this machine, got '~nobody.here/p.jsonl'"),
    _typed("sample ~nobody.here --prompts pairs.jsonl", "MODEL: must be a path from a user *"),
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
    _typed("eval nowhere --data pairs.jsonl", "MODEL: cannot load nowhere: *"),
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
    _typed("data rejected llama", "Missing argument 'REFERENCE'; see fastpref data rejected *"),
    _typed("data rejected llama llama --prompts pairs.jsonl --out pairs.jsonl",
           "--out: pairs.jsonl is already there; choose another *"),
    _typed("data rejected llama llama --prompts pairs.jsonl --out o --candidates 1",
           "--candidates: expected a number >= 2, to choose from, got 1"),
    _typed("data rejected llama llama --prompts pairs.jsonl --out o --beta 0",
           "--beta: expected a number > 0, got 0.0"),
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
    _typed("reproduce pmo --seeds 0", "--seeds: expected a number >= 1, got 0"),
    _typed("reproduce pmo --model nowhere", "--model: nowhere is no Hugging Face model: it has *"),
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

_PAIRS = "data pairs g.jsonl --out new/p.jsonl"
_GROUP = {"g.jsonl": GROUPS}
PREPARATIONS = [
    _typed("data pairs none.jsonl --out p.jsonl", "none.jsonl: no such file; check the path"),
    _typed("data pairs e.jsonl --out p.jsonl", "e.jsonl: the file is empty; name one with rows",
           **{"e.jsonl": ""}),
    _typed("data pairs pairs.jsonl --out p.jsonl", "--build: pairs.jsonl has pairs already; use *"),
    _typed("data pairs g.jsonl --out g.jsonl", "--out: g.jsonl is already there; choose *",
           **_GROUP),
    _typed("data pairs g.jsonl --out p.csv", "--out: expected a file .jsonl or .parquet, got p.csv",
           **_GROUP),
    _typed("data pairs g.jsonl --out /proc/no/p.jsonl", "/proc*; check path and disk", **_GROUP),
    *[_typed(f"{_PAIRS} {options}", says, **_GROUP) for options, says in (
        ("--build best", "--build: expected one of best-random, *, got best"),
        ("--score mean", "--score: there is no choice for rows of groups, got mean; leave it out"),
        ("--exclude source", "--exclude: expected COLUMN=TEXT, got source"),
        ("--exclude source=flan", "--exclude: g.jsonl has no column source; use one of prompt, *"),
        ("--score-range 10,1", "--score-range: expected LOW,HIGH such as 1,10, got 10,1"),
        ("--score-range one", "--score-range: expected LOW,HIGH such as 1,10, got one"),
        ("--score-range 0,0.9", "--score-range: got a score of 1; choose a range that has it"),
        ("--min-gap inf", "--min-gap: expected a number >= 0, got inf"),
        ("--min-gap 2", "g.jsonl: no group of completions is left (score gap below --min-gap: 1)*"),
        ("--k 1 --build k-responses", "--k: expected at least 2, got 1"),
        ("--k 5 --build k-responses", "g.jsonl: no group * (fewer than 5 completions: 1); *"),
        ("--eval 1", "--eval: 1 leaves none of 1 rows; use fewer"),
        ("--keep-desired 0.1", "--keep-desired: only --build binary has labels; leave it out"),
    )],
    _typed(_PAIRS, "g.jsonl, row 2: no prompt; columns found: *; formats accepted for a *",
           **{"g.jsonl": GROUPS + '{"completions": ["a", "b"], "scores": [1, 2]}\n'}),
    _typed(_PAIRS, "g.jsonl, line 2: not valid JSON; *", **{"g.jsonl": GROUPS + '{"prompt": "p'}),
]  # fmt: skip

CASES = [
    *USAGE,
    *LOSSES,
    *PLANS,
    *REPORTS,
    *EXPORTS,
    *GRIDS,
    *SAMPLES,
    *EVALUATIONS,
    *OTHERS,
    *REPRODUCTIONS,
]
CASES += [*PREPARATIONS, *RANKS]
