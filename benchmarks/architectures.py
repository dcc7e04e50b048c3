"""Log-probs of every causal architecture of transformers that builds tiny, against its own logits.

    python -m benchmarks.architectures [--only NAME] [--ranks 1|2] [--again] [--out FILE]

Each model is saved, loaded as a run loads it, on one rank and on two, and put into the layout that
a run would choose. Log-probs of response tokens are compared with the log-softmax of the logits of
transformers' model, one sequence at a time. A model is right if the largest difference is at most
LIMIT, or if fastpref refuses it by name. Sequences are longer than the windows, convolutions and
chunks of the models.

Results are written after each model; a second call continues, and `--again` starts over. The exit
code is 1 if a model is wrong.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

RESULTS = Path(__file__).parent / "results" / "architectures.json"
LIMIT = 3e-5  # nats
SECONDS = 240  # of a model on one rank or on two
# Tokens of a prompt and of its responses.
SIZES = ((9, 30, 17), (3, 1, 12), (20, 25, 22), (1, 6, 2))
Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", help="name of an architecture")
    parser.add_argument("--ranks", type=int, choices=(1, 2), action="append")
    parser.add_argument("--again", action="store_true", help="ignore earlier results")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Imported before the processes fork.
    import torch

    import fastpref.training.trainer  # noqa: F401
    from benchmarks import tiny_models
    from fastpref.utils import environment

    torch.set_num_threads(1)
    about = environment.describe("cpu")
    about["versions"]["transformers"] = environment.package_version("transformers")
    result: Result = {"environment": about, "limit": LIMIT, "models": {}}
    if options.out.exists() and not options.again:
        result["models"] = json.loads(options.out.read_text())["models"]
    for name in options.only or tiny_models.names():
        model = result["models"].setdefault(name, {})
        for ranks in options.ranks or (1, 2):
            if str(ranks) in model and not options.only:
                continue
            model.update(measure(name, ranks))
            write(options.out, result)
            print(f"{name}, {ranks}: {model[str(ranks)]}", flush=True)
    print(summary(result["models"]))
    sys.exit(any(is_wrong(model) for model in result["models"].values()))


def write(path: Path, result: Result) -> None:
    """Write the results, a line for each model."""
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in result["models"].items())
    head = "".join(
        f' "{key}": {json.dumps(value)},\n' for key, value in result.items() if key != "models"
    )
    path.write_text(f'{{\n{head} "models": {{\n{lines}\n }}\n}}\n')


def measure(name: str, ranks: int) -> Result:
    """Result of an architecture on a number of ranks, in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        built = in_processes(1, _save, name, out)
        if built != "":
            return {str(ranks): {"not built": built}}
        about = json.loads((out / "about.json").read_text())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        problem = in_processes(ranks, _compare, out, ranks, port)
        file = out / "result.json"
        found = json.loads(file.read_text()) if file.exists() else {"failed": problem}
        return {**about, str(ranks): found}


def in_processes(count: int, work: Callable[..., None], *arguments: Any) -> str:
    """Run `work(rank, *arguments)` in forked processes; return what went wrong, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        children = [_fork(log, work, (rank, *arguments)) for rank in range(count)]
        deadline = time.monotonic() + SECONDS
        problem = ""
        while children and not problem:
            for child in list(children):
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    children.remove(child)
                    if status:
                        problem = log.read_text().strip() if log.exists() else f"status {status}"
            if time.monotonic() > deadline:
                problem = f"no result within {SECONDS} s"
            time.sleep(0.05)
        for child in children:
            os.kill(child, 9)
            os.waitpid(child, 0)
        return problem


def _fork(log: Path, work: Callable[..., None], arguments: Sequence[Any]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
        work(*arguments)
        status = 0
    except BaseException as error:
        line = f"{type(error).__name__}: {error}".partition("\n")[0]
        if not log.exists():
            log.write_text(line[:300])
            if folder := os.environ.get("TRACEBACKS"):
                Path(folder, str(os.getpid())).write_text(traceback.format_exc())
    finally:
        os._exit(status)


def _save(_rank: int, name: str, folder: Path) -> None:
    """Build a model and save it with its tokenizer, if it computes logits."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks import tiny_models

    model: Any = tiny_models.build(name)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 40)[None], use_cache=False).logits
    if logits.dim() != 3 or not logits.isfinite().all():
        raise ValueError(f"logits of shape {tuple(logits.shape)}, or not finite")
    model.save_pretrained(folder / "model")
    AutoModelForCausalLM.from_pretrained(folder / "model")
    size = sum(p.numel() for p in model.parameters())
    about = {"class": type(model).__name__, "parameters": size}
    (folder / "about.json").write_text(json.dumps(about))


def _compare(rank: int, folder: Path, ranks: int, port: int) -> None:
    """Write the result of this comparison to `result.json`."""
    from fastpref import distributed
    from fastpref.utils.errors import UserError

    if ranks > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    try:
        with distributed.process_group():
            result = _difference(folder)
    except UserError as error:
        result = {"refused": str(error).replace(f"{folder}/", "")}
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))


def _difference(folder: Path) -> Result:
    """Layout, and largest difference between log-probs of tokens and those of plain logits."""
    import torch
    from rich.console import Console
    from transformers import AutoModelForCausalLM

    from fastpref import config as configs
    from fastpref.model.batch_layout import choose_layout
    from fastpref.model.load import load_policy
    from fastpref.utils.progress import Display

    path = str(folder / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    groups: Any = Rows()
    expected = []
    with torch.no_grad():
        for group in (groups[k] for k in range(len(groups))):
            for response in group.responses:
                ids = torch.from_numpy(np.concatenate([group.prompt, response]).astype(np.int64))
                # A copy, since dynamic scaling remembers the longest sequence.
                alone = copy.deepcopy(model)
                logits = alone(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
                logps = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
                expected.append(logps[len(group.prompt) - 1 :])
    training = configs.Training(activation_checkpointing="off")
    policy = load_policy(
        configs.Model(path=path, dtype="float32"), _tokenizer(), torch.device("cpu"), training,
        configs.Parallel(),
    ).eval()  # fmt: skip
    console = Console(record=True, width=500, file=io.StringIO())
    with Display(console) as display:
        choose_layout(policy, training, "auto", [groups], display)
    with torch.no_grad():
        parts = policy.batches(groups, range(len(groups)))
        ours = torch.cat([policy(batch).token_logps for batch in parts]).double()
    difference = (ours - torch.cat(expected)).abs().max().item()
    said = console.export_text()
    reason = said.partition("each response has its own row: ")[2].partition("\n")[0].strip()
    return {
        "difference": float(f"{difference:.2e}"),
        "layout": policy.layout,
        "kernels": policy.kernels,
        **({"reason": reason} if reason else {}),
    }


class Rows:
    """Groups of random tokens, as a data set."""

    source, fingerprint = "random tokens", ""
    kind: Literal["groupwise"] = "groupwise"

    def __init__(self) -> None:
        self.prompt_lengths = np.array([prompt for prompt, *_ in SIZES])
        self.response_lengths = np.concatenate([rest for _, *rest in SIZES])
        self.offsets = np.array([0, *np.cumsum([len(rest) for _, *rest in SIZES])])
        self.padded_lengths = np.array([prompt + max(rest) for prompt, *rest in SIZES])

    def __len__(self) -> int:
        return len(SIZES)

    def given_reference_logps(self) -> None:
        """None: the data brings no log-probs."""

    def __getitem__(self, index: int) -> Any:
        from fastpref.data.dataset import TokenGroup

        draw = np.random.default_rng(index)
        prompt, *responses = (draw.integers(3, 96, size).astype(np.int32) for size in SIZES[index])
        first = int(self.offsets[index])
        return TokenGroup(index, index + 1, prompt, tuple(responses), first=first)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(index): index for index in range(90)}
    special = {"eos_token": "1", "pad_token": "0"}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "0")), **special
    )


def is_wrong(model: Result) -> bool:
    """Whether a model that builds is neither right nor refused by name."""
    return any(
        "failed" in result or result.get("difference", 0.0) > LIMIT
        for key, result in model.items()
        if key in ("1", "2")
    )


def summary(models: dict[str, Result]) -> str:
    """Number of architectures that build, and how they end."""
    built = [model for model in models.values() if "class" in model]
    refused = sum("refused" in model.get("1", {}) for model in built)
    wrong = sum(is_wrong(model) for model in built)
    return f"{len(built)} of {len(models)} build tiny: {refused} are refused, {wrong} are wrong"


def table(result: Result) -> str:
    """Table of the models that build, for the docs."""
    from fastpref.docgen import markdown

    rows = []
    for name, model in sorted(result["models"].items()):
        if "class" in model:
            one, two = (_cell(model.get(ranks, {})) for ranks in ("1", "2"))
            how = model.get("1", {})
            layout = how.get("layout", "").replace("_", " ")
            why = how.get("reason", "") or how.get("refused", "")
            rows.append([name, f"`{model['class']}`", layout, one, two, why])
    return markdown.table(
        ["architecture", "class", "layout", "one rank, nats", "two ranks, nats", "reason"], rows
    )


def _cell(result: Result) -> str:
    if "difference" in result:
        return f"{result['difference']:.0e}"
    return "refused" if "refused" in result else "failed" if result else ""


if __name__ == "__main__":
    main()
