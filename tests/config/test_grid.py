"""Grids of configs: product, names of runs, and what is refused before the first run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastpref.config import Config, ConfigError
from fastpref.config.grid import Grid, load_grid, value_text

MakeConfig = Callable[..., Config]
LoadGrid = Callable[..., Grid]


@pytest.fixture
def grid_of(make_config: MakeConfig, tmp_path: Path) -> LoadGrid:
    """The grid of some items, and of overrides that come before them."""
    path = tmp_path / "c.yaml"
    path.write_text(make_config(loss={"name": "pmo", "alpha": 0.9}).to_yaml())
    return lambda *items, overrides=(), note=None: load_grid(path, overrides, items, note)


def test_the_last_key_changes_fastest(grid_of: LoadGrid, tmp_path: Path) -> None:
    grid = grid_of("loss.beta=0.05,0.1,0.2", "loss.alpha=0.9,1")
    assert grid.folder == tmp_path / "run"
    assert [point.name for point in grid.points] == [
        "beta=0.05,alpha=0.9",
        "beta=0.05,alpha=1",
        "beta=0.1,alpha=0.9",
        "beta=0.1,alpha=1",
        "beta=0.2,alpha=0.9",
        "beta=0.2,alpha=1",
    ]
    last = grid.points[-1]
    assert last.values == {"loss.beta": 0.2, "loss.alpha": 1}
    assert last.folder == tmp_path / "run" / "beta=0.2,alpha=1"
    loss: Any = last.config.build_loss()
    assert (loss.beta, loss.alpha, last.config.resume) == (0.2, 1, "auto")


def test_a_key_with_one_value_is_an_override(grid_of: LoadGrid, tmp_path: Path) -> None:
    output_dir = f"training.output_dir={tmp_path}/other"
    grid = grid_of("optim.lr=1e-5,2e-5", "optim.betas=[0.9,0.99]", output_dir)
    assert [point.name for point in grid.points] == ["lr=1e-5", "lr=2e-5"]
    assert grid.points[1].config.optim.betas == (0.9, 0.99)
    assert grid.points[1].folder == tmp_path / "other" / "lr=2e-5"


def test_a_section_is_set_before_its_keys(grid_of: LoadGrid) -> None:
    grid = grid_of("loss.beta=0.3", "loss=dpo,hinge", overrides=["training.steps=2"])
    losses: list[Any] = [point.config.build_loss() for point in grid.points]
    assert [(loss.name, loss.beta) for loss in losses] == [("dpo", 0.3), ("hinge", 0.3)]
    assert [point.config.training.steps for point in grid.points] == [2, 2]


def test_keys_with_equal_ends_are_named_in_full(grid_of: LoadGrid) -> None:
    grid = grid_of("loss.alpha=0.9,1", "adapter.alpha=8,16", "optim.lr=1,2")
    assert grid.points[2].name == "loss.alpha=0.9,adapter.alpha=16,lr=1"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-5, "1e-5"),
        (5e-07, "5e-7"),
        (1e22, "1e22"),
        (0.05, "0.05"),
        (1.0, "1"),
        (10, "10"),
        (True, "true"),
        (None, "null"),
        ("dpo", "dpo"),
        ("a/b c,d", "a%2Fb%20c%2Cd"),
        ("..", ".."),
        ([0.9, 0.99], "[0.9,0.99]"),
        ({"name": "dpo", "beta": 0.1}, "{name:dpo,beta:0.1}"),
    ],
)
def test_values_are_parts_of_file_names(value: Any, text: str) -> None:
    assert value_text(value) == text


def test_lists_mappings_and_quoted_commas_are_values(grid_of: LoadGrid) -> None:
    grid = grid_of("optim.betas=[0.9,0.99],[0.8,0.9]", 'data.train="a,b.jsonl",c/d.jsonl')
    assert [point.name for point in grid.points[:2]] == [
        "betas=[0.9,0.99],train=a%2Cb.jsonl",
        "betas=[0.9,0.99],train=c%2Fd.jsonl",
    ]
    assert grid.points[2].config.optim.betas == (0.8, 0.9)
    assert grid.points[0].config.data.train == "a,b.jsonl"


def test_a_renamed_key_is_noted_once(grid_of: LoadGrid, make_config: MakeConfig) -> None:
    notes: list[str] = []
    grid_of("loss.beta=0.1,0.2", overrides=["update=projected", "loss=dpo"], note=notes.append)
    assert len(notes) == 1 and "dpo_pg" in notes[0]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["loss.beta"], "--grid 'loss.beta': must look like section.key=value,value"),
        (["=1,2"], "--grid '=1,2': must look like section.key=value,value"),
        (["loss..beta=1,2"], "--grid 'loss..beta=1,2': must look like section.key=value,value"),
        (["loss.beta="], "--grid loss.beta: has no value; give several, as in loss.beta=1,2"),
        (
            ["loss.beta=1,,2"],
            "--grid 'loss.beta=1,,2': cannot be split into values; write text with",
        ),
        (
            ["loss.beta=[1,2"],
            "--grid 'loss.beta=[1,2': cannot be split into values; write text with",
        ),
        (["loss.beta=0.1,0.10"], "--grid loss.beta: has the value 0.1 twice; remove one"),
        (["loss.beta=1,1.0"], "--grid loss.beta: has the value 1.0 twice; remove one"),
        (["loss.beta=1,2", "loss.beta=3"], "--grid loss.beta: is set twice on the command line; "),
        (["optim.weight_decay=0,1"], "--grid optim.weight_decay: is set twice on the command line"),
        (["loss.beta=1"], "--grid: every key has one value; give a key several, as in key=1,2"),
        (["training.output_dir=a,b"], "--grid training.output_dir: cannot vary, got 'a', 'b'; "),
        (["training.output=a,b"], "training.output: is an earlier name of training.output_dir"),
        (["data.cache=a,b"], "--grid data.cache: cannot vary, got 'a', 'b'; give it one value"),
        (["resume=auto,x"], "--grid resume: cannot vary, got 'auto', 'x'; give it one value"),
        (["loss.beta=1,2", "resume=x"], "resume: a grid continues its own runs, got 'x'; remove"),
        (["loss.beta=0.1,-1"], "loss.beta: must be >= 0, got -1"),
        (["optim.lrr=1,2"], "optim.lrr: unknown key; did you mean lr?"),
        (["loss.gamma=1,2"], "loss.gamma: not a parameter of pmo"),
        (
            ["training.activation_checkpointing=full,true"],
            "--grid: activation_checkpointing=full and activation_checkpointing=true are the same",
        ),
        ([f"data.train={'a' * 100},{'b' * 199}"], "--grid: the folder name 'train=bbbbbb"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_run(
    grid_of: LoadGrid, items: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        grid_of(*items, overrides=["optim.weight_decay=0.1"])
    assert str(refusal.value).startswith(message)


def test_a_long_name_is_refused_with_its_remedy(grid_of: LoadGrid) -> None:
    with pytest.raises(ConfigError, match="is too long; vary fewer keys, or shorten the values"):
        grid_of(f"data.train=a,{'b' * 199}")
