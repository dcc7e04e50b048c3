"""Untrusted data and models, and secrets of the environment, in a run."""

from __future__ import annotations

import ast
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastpref.config import Config
from fastpref.data.tokenizers import load_tokenizer
from fastpref.report import page
from fastpref.report.runs import load as load_runs
from fastpref.training.setup import load
from fastpref.utils import atomic_files
from fastpref.utils.errors import ModelError
from fastpref.utils.progress import Display
from tests.helpers.data import rows, write_jsonl
from tests.helpers.policies import policy_of

ROOT = Path(__file__).parents[2]
MARKUP = "<script>alert(1)</script>"
SECRETS = {"HF_TOKEN": "hf_0secret0", "WANDB_API_KEY": "1secret1"}
# Runs commands of fastpref in one process and prints what was unpickled in it.
COMMANDS = """
import json, sys
unpickled = []
def watch(event, arguments):
    if event == "pickle.find_class":
        unpickled.append(".".join(arguments[1:]))
sys.addaudithook(watch)
from fastpref.cli.app import app
for command in json.loads(sys.argv[1]):
    app(command, standalone_mode=False)
print("unpickled:", unpickled)
"""


class Life:
    """A run that was trained and resumed, and what it printed."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder = folder
        data = [{**row, "prompt": f"{MARKUP} {row['prompt']}"} for row in rows(8)]
        values = [
            f"data.train={write_jsonl(folder / 'pairs.jsonl', data)}",
            f"data.eval={folder / 'pairs.jsonl'}",
            f"data.cache={folder / 'cache'}",
            f"training.output_dir={folder / 'run'}",
        ]
        config = folder / "config.yaml"
        config.write_text(
            f"model: {{path: {model}, dtype: float32}}\ndata: {{}}\nloss: dpo\n"
            "training: {batch_size: 4, device: cpu, checkpoint_every: 2}\n"
        )
        commands = [
            ["train", str(config), *values, "training.steps=2"],
            ["train", str(config), *values, "training.steps=4", "resume=auto"],
        ]
        self.done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", COMMANDS, json.dumps(commands)],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=folder,
            env={**os.environ, **SECRETS, "PYTHONPATH": str(ROOT)},
            umask=0o027,
        )
        assert self.done.returncode == 0, self.done.stderr

    def written(self) -> list[Path]:
        """Everything that the run wrote: its directory and the cache."""
        return [*(self.folder / "run").rglob("*"), *(self.folder / "cache").rglob("*")]


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Life:
    return Life(tmp_path_factory.mktemp("life"), tiny_llama)


def test_a_run_unpickles_nothing_and_writes_no_pickle(life: Life) -> None:
    assert life.done.stdout.splitlines()[-1] == "unpickled: []"
    written = [path for path in life.written() if path.is_file()]
    assert any("checkpoints" in path.parts for path in written)
    assert {path.suffix for path in written if path.stat().st_size} <= {
        *(".arrow", ".json", ".jsonl", ".safetensors"),
        *(".jinja", ".md", ".yaml"),
    }


def test_no_secret_of_the_environment_is_written_or_said(life: Life) -> None:
    for name, secret in SECRETS.items():
        assert secret not in life.done.stdout + life.done.stderr
        leaks = [p for p in life.written() if p.is_file() and secret.encode() in p.read_bytes()]
        assert not leaks, name


def test_files_have_the_modes_of_the_umask(life: Life) -> None:
    for path in life.written():
        expected = 0o750 if path.is_dir() else 0o640
        assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(expected), path


def test_markup_in_a_prompt_does_not_reach_the_report(life: Life) -> None:
    run = life.folder / "run"
    assert MARKUP in (life.folder / "pairs.jsonl").read_text()
    assert "<script" not in page.html(load_runs([run]), [], [], refresh=False)


def test_cleaning_removes_links_and_not_what_they_lead_to(tmp_path: Path) -> None:
    outside, run = tmp_path / "outside", tmp_path / "run"
    (run / "step-2").mkdir(parents=True)
    outside.mkdir()
    (outside / "kept").touch()
    for link in ("step-1", "step-2/inner", ".cache.1.tmp", "model"):
        (run / link).symlink_to(outside)
    for step in ("step-1", "step-2"):
        atomic_files.discard(run / step)
    atomic_files.clear_leftovers(run)
    with atomic_files.replacing(run / "model") as temporary:
        temporary.mkdir()
    assert [path.name for path in run.iterdir()] == ["model"]
    assert not (run / "model").is_symlink() and (outside / "kept").exists()


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("part", ["model", "adapter"])
def test_a_pickle_in_a_model_is_not_run(
    make_config: Callable[..., Config], tmp_path: Path, tiny_llama: str, part: str
) -> None:
    sprung = tmp_path / "sprung"
    folder = tmp_path / "theirs"
    shutil.copytree(tiny_llama, folder)
    if part == "model":
        (folder / "model.safetensors").unlink()
        config = make_config(model__path=str(folder))
        name = "pytorch_model.bin"
    else:
        config = make_config(adapter={"name": "lora", "path": str(folder)})
        described = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(described))
        name = "adapter_model.bin"
    torch.save({"weight": Trap(sprung)}, folder / name)
    tokenizer = load_tokenizer(config.model)
    assert tokenizer is not None
    with pytest.raises(ModelError, match=r"(?i)weights.only"):
        policy_of(config, tokenizer, torch.device("cpu"))
    assert not sprung.exists()
    torch.load(folder / name, weights_only=False)
    assert sprung.exists()  # it would have been


def test_code_of_a_model_is_not_run_unless_asked_for(
    make_config: Callable[..., Config], tmp_path: Path, tiny_llama: str
) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(tiny_llama, folder)
    about = json.loads((folder / "config.json").read_text())
    about |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig"}}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "odd.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\n")
    config = make_config(model__path=str(folder))
    assert config.model.trust_remote_code is False
    with pytest.raises(ModelError, match="custom code"):
        load(config, Display(Console(quiet=True)))
    assert not (tmp_path / "sprung").exists()


def test_code_that_is_trusted_is_announced(
    make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str], tiny_llama: str
) -> None:
    display = Display(Console(width=500))
    load(make_config(), display)
    assert "trust_remote_code" not in capsys.readouterr().out
    load(make_config(model__trust_remote_code=True), display)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == (
        f"note: model.trust_remote_code: Python code that comes with {tiny_llama} is run here"
    )


UNTRUSTED = {  # that unpickle, or send pickles to other ranks
    *("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "read_pickle"),
    *("torch.load", "torch.save", "np.load", "np.save", "allow_pickle"),
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
    *("send_object_list", "recv_object_list"),
}


def names(path: Path) -> set[str]:
    """Modules, functions and keywords that a file uses, with and without their module."""
    names_in_file: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            names_in_file |= {node.attr, ast.unparse(node)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names_in_file |= {alias.name for alias in node.names}
            names_in_file.add(getattr(node, "module", None) or "")
        elif isinstance(node, ast.keyword) and node.arg:
            names_in_file.add(node.arg)
    return names_in_file


def test_the_sources_use_tensors_and_text_alone() -> None:
    sources = [*(ROOT / "fastpref").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert len(sources) > 100
    assert {str(path): names(path) & UNTRUSTED for path in sources if names(path) & UNTRUSTED} == {}
    assert names(Path(__file__)) & UNTRUSTED == {"torch.load", "torch.save"}
