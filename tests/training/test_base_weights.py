"""A run that is resumed has to begin from the same weights, and to have as many steps as before."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fastpref.config import Config, ConfigError, Optim
from fastpref.training.optim import warmup_advice
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display
from tests.helpers.training_runs import run, told

MakeConfig = Callable[..., Config]


@pytest.mark.parametrize("sections", [{}, {"adapter": {"r": 2}}], ids=str)
def test_a_base_that_was_replaced_in_place_is_refused(
    make_config: MakeConfig, tiny_llama: str, tmp_path: Path, display: Display, sections: Any
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    options = {"dtype": "float32", "path": str(base)}
    config = make_config(model=options, training__checkpoint_every=1, **sections)
    with pytest.raises(RuntimeError):
        _stopped_after_two(config, display)
    moved = shutil.copytree(base, tmp_path / "moved")
    weights = load_file(base / "model.safetensors")
    save_file({name: 1.01 * w for name, w in weights.items()}, base / "model.safetensors")
    again = config.model_copy(update={"resume": "auto"})
    message = (
        f"model.path: the weights of {base} are not those that "
        f"{config.training.output_dir}/checkpoints/step-2 began from; restore them, or choose"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        Trainer(again, display)
    model = config.model.model_copy(update={"path": str(moved)})
    assert run(again.model_copy(update={"model": model}), display).step == 3


def _stopped_after_two(config: Config, display: Display) -> None:
    trainer = Trainer(config, display)
    step = trainer._train_step

    def failing(with_entropy: bool) -> Any:
        if trainer.step == 2:
            raise RuntimeError("power cut")
        return step(with_entropy)

    trainer._train_step = failing  # type: ignore[method-assign]
    trainer.loop([])


def test_fewer_steps_than_were_taken_are_refused(make_config: MakeConfig, display: Display) -> None:
    config = make_config(training__steps=3, training__checkpoint_every=1)
    run(config, display)
    with pytest.raises(ConfigError, match=r"step-3 has taken 3 steps, and the run has 2 by traini"):
        Trainer(make_config(training__steps=2, resume="auto"), display)
    root = Path(config.training.output_dir) / "checkpoints"
    earlier = make_config(training__steps=2, resume=str(root / "step-2"))
    assert run(earlier, display).step == 2


def test_a_warm_up_longer_than_the_run_is_noted(make_config: MakeConfig) -> None:
    said = told(make_config(training__steps=2, optim={"lr": 1e-3, "warmup_steps": 8}))
    assert (
        "note: the warm-up takes 8 steps and the run has 2, so the learning rate only grows, to "
        "0.00025; lower optim.warmup_steps\n"
    ) in said


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (9, 10), (1, 1)])
def test_a_shorter_warm_up_is_not(warmup: int, steps: int) -> None:
    assert warmup_advice(Optim(lr=1.0, warmup_steps=warmup), steps) is None
