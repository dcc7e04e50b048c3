"""Checks of a config against the machine that need neither torch nor the model: paths and packages.

Importing torch takes seconds and a reference may take an hour, so what they cannot change is
refused before them. The parts that load a model or data check again, and more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastpref.config import Config, ConfigError
from fastpref.config.template_kwargs import is_lost_path
from fastpref.training.run_folder import check_order, holds_run, newest_checkpoint
from fastpref.utils import hub
from fastpref.utils.gpu import has_no_gpu
from fastpref.utils.model_sources import check_source
from fastpref.utils.optional_packages import has, require

_DATA_FILES = (".json", ".jsonl", ".parquet", ".arrow")


def check_inputs(config: Config) -> None:
    """Raise UserError for a model, data, package or device that is certainly not there."""
    model, adapter, training = config.model, config.adapter, config.training
    if model.path is not None:
        check_source("model.path", model.path, "config.json")
    if model.tokenizer is not None:
        check_source("model.tokenizer", model.tokenizer)
    if adapter is not None and adapter.path is not None:
        check_source("adapter.path", adapter.path, "adapter_config.json")
    teacher = getattr(config.build_loss(), "teacher", None)
    if teacher is not None:
        check_source("loss.teacher", teacher, "config.json")
    for path in _sources(config.data.train, config.data.eval):
        _check_data(path)
    for template in (config.data.chat_template, *_templates(config)):
        if template is not None and is_lost_path(template):
            raise ConfigError(f"data.chat_template: {template}: no such file; check the path")
    _check_folder("data.cache", config.data.cache)
    if training.device == "cuda" and has_no_gpu():
        raise ConfigError(
            "training.device: cuda is asked for, but torch finds no GPU; use cpu or auto"
        )
    _check_packages(config)


def check_output(config: Config) -> None:
    """Raise UserError where the run directory cannot be made or a tracker is not installed."""
    _check_folder("training.output_dir", config.training.output_dir)
    for name in config.training.report_to:
        if not has(name):
            raise ConfigError(f"training.report_to: {name} is not installed; pip install {name}")
    if config.training.push_to_hub:
        hub.check("training.push_to_hub", str(config.training.hub_model_id))


def check_run(config: Config) -> None:
    """Raise UserError as `check_output` does, and for a run or a checkpoint in the way."""
    check_output(config)
    resume, folder = config.resume, Path(config.training.output_dir)
    if resume is None and holds_run(folder):
        raise ConfigError(
            f"training.output_dir: {folder} already holds a run; continue it with resume=auto or "
            "choose another folder"
        )
    if resume is not None:
        checkpoint = newest_checkpoint(folder) if resume == "auto" else _checkpoint(Path(resume))
        if checkpoint is not None:
            check_order(checkpoint, config)


def _checkpoint(resume: Path) -> Path:
    if (resume / "state.json").is_file():
        return resume
    if newest_checkpoint(resume) is not None:
        raise ConfigError(
            f"resume: {resume} is a run directory; use resume=auto with training.output_dir="
            f"{resume}, or one of its checkpoints"
        )
    raise ConfigError(f"resume: {resume} is not a checkpoint folder; use one, or auto")


def _sources(*values: Any) -> Iterator[str]:
    """Paths or Hub names in `data.train` and `data.eval`: one, several, or several with options."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _sources(*value.values())
        elif isinstance(value, list | tuple):
            yield from _sources(*value)
        elif hasattr(value, "path"):
            yield from _sources(value.path)


def _templates(config: Config) -> Iterator[str | None]:
    """Chat templates of the sources of `data.train` and `data.eval`."""
    for source in (*config.data.sources("train"), *config.data.sources("eval")):
        yield source.template


def _check_data(source: str) -> None:
    """Raise ConfigError for a file that is not there; of a pattern or a Hub name readers decide."""
    path = Path(source)
    is_path = source.startswith((".", "/")) or path.suffix in _DATA_FILES
    if is_path and not path.exists() and not set(source) & set("*?["):
        raise ConfigError(f"{source}: no such file; check the path")
    if path.is_file() and path.stat().st_size == 0:
        raise ConfigError(f"{source}: the file is empty; name one with rows")


def _check_folder(field: str, name: str) -> None:
    """Raise ConfigError for a folder that can be neither made nor written to."""
    folder = Path(name).expanduser().absolute()
    problem = "cannot be written to"
    while not os.path.lexists(folder):
        folder = folder.parent
    if folder.is_dir() and os.access(folder, os.W_OK):
        return
    if not folder.is_dir():
        problem = "Not a directory"
    raise ConfigError(f"{field}: {name}: {problem}; choose another folder")


def _check_packages(config: Config) -> None:
    if config.adapter is not None and config.adapter.quantize is not None:
        require("bitsandbytes", f"adapter.quantize: {config.adapter.quantize}")
    if config.optim.name.endswith("8bit"):
        require("bitsandbytes", f"optim.name: {config.optim.name}")
    if config.model.attn_implementation == "flash_attention_2":
        require("flash-attn", "model.attn_implementation: flash_attention_2")
    if config.model.kernels == "liger":
        require("liger-kernel", "model.kernels: liger")
