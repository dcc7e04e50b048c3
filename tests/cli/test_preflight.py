"""Refusals that need neither torch nor the model: before both, and within half a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastpref.cli.preflight import check_inputs, check_run
from fastpref.config import Config
from fastpref.utils.errors import UserError

ROOT = Path(__file__).parents[2]
_LOADED = (
    "import sys; sys.argv = ['fastpref', *sys.argv[1:]]\n"
    "from fastpref.cli import main\n"
    "try:\n    main()\n"
    "finally:\n    print(*[m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
)


@pytest.mark.parametrize(
    "line",
    [
        "train c.yaml model.path=./m",
        "train c.yaml reference=none",
        "train c.yaml loss.beta=-1 loss.name=simpo",
        "eval ./m --data pairs.jsonl",
        "train --help",
    ],
)
def test_an_answer_without_the_model_imports_no_torch(tmp_path: Path, line: str) -> None:
    (tmp_path / "c.yaml").write_text("model: {path: m}\ndata: {train: d.jsonl}\nloss: dpo\n")
    done = subprocess.run(
        [sys.executable, "-c", _LOADED, *line.split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == (0 if "--help" in line else 2), done.stderr
    assert done.stdout.splitlines()[-1] == ""


def test_what_is_there_is_accepted(make_config: Callable[..., Config]) -> None:
    check_inputs(make_config())
    check_run(make_config())
    check_run(make_config(resume="auto"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model__path": "./nope"}, "model.path: cannot load ./nope: no such folder; check the"),
        ({"model__path": "/no/such"}, "model.path: cannot load /no/such: no such folder; check"),
        (
            {"model__path": "models/llma"},
            "model.path: cannot load models/llma: no such folder, and the Hub's cache has no such "
            "model (HF_HUB_OFFLINE is set); check the path",
        ),
        ({"model__tokenizer": "/no/tok"}, "model.tokenizer: cannot load /no/tok: no such folder"),
        ({"adapter": {"path": "/no/a"}}, "adapter.path: cannot load /no/a: no such folder; check"),
        ({"data__train": "no.jsonl"}, "no.jsonl: no such file; check the path"),
        ({"data__eval": "./no"}, "./no: no such file; check the path"),
        ({"data__eval": [{"path": "no.parquet"}]}, "no.parquet: no such file; check the path"),
        ({"training__device": "cuda"}, "training.device: cuda is asked for, but torch finds no"),
    ],
)
def test_an_input_that_is_not_there_is_refused(
    make_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    says: str,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError) as refusal:
        check_inputs(make_config(**change))
    assert str(refusal.value).startswith(says)


def test_folders_that_are_no_model_are_told_apart(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    run = tmp_path / "earlier"
    (run / "model").mkdir(parents=True)
    (run / "file").touch()

    def refusal(path: Path) -> str:
        with pytest.raises(UserError) as error:
            check_inputs(make_config(model__path=str(path)))
        return str(error.value).partition(f"{path}: ")[2]

    assert refusal(run) == "the folder has no config.json; name the folder of a model"
    assert refusal(run / "file") == "it is a file; name the folder of a model"
    (run / "model" / "config.json").write_text("{}")
    assert refusal(run) == f"it is a run directory; use its model, {run}/model"


def test_a_package_that_is_not_installed_is_refused_before_the_run(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastpref.cli.preflight.has", lambda name: False)
    with pytest.raises(UserError, match=r"^training.report_to: wandb is not installed; pip"):
        check_run(make_config(training__report_to="wandb"))


def test_a_run_that_took_no_step_claims_no_folder(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    metrics = folder / "metrics.jsonl"
    for before in ("", '{"step": 0, "eval_loss": 0.7}\n'):
        metrics.write_text(before)
        check_run(make_config())
    metrics.write_text('{"step": 0, "eval_loss": 0.7}\n{"step": 1, "loss": 0.7}\n')
    with pytest.raises(UserError, match="already holds a run; continue it with resume=auto"):
        check_run(make_config())
    check_run(make_config(resume="auto"))


def test_a_resume_in_another_order_is_refused_with_both_values(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-5"
    checkpoint.mkdir(parents=True)
    state = {"step": 5, "position": {"plan": ["f", "l", 4, 0]}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    check_run(make_config(resume="auto"))
    with pytest.raises(UserError) as refusal:
        check_run(make_config(resume="auto", training__batch_size=8, training__seed=3))
    assert "training.batch_size: 4 → 8, training.seed: 0 → 3; restore what" in str(refusal.value)
    with pytest.raises(UserError, match=r"run is a run directory; use resume=auto with training"):
        check_run(make_config(resume=str(tmp_path / "run")))
    with pytest.raises(UserError, match=r"^resume: .* is not a checkpoint folder; use one, or"):
        check_run(make_config(resume=str(tmp_path)))


def test_a_folder_that_cannot_be_made_is_refused(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^training.output_dir: .*file/run: Not a directory; cho"):
        check_run(make_config(training__output_dir=str(tmp_path / "file" / "run")))
    with pytest.raises(UserError, match=r"^data.cache: .*file: Not a directory; choose another"):
        check_inputs(make_config(data__cache=str(tmp_path / "file")))
