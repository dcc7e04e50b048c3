"""The README of an exported model: what it is, how it was trained, what came out."""

from __future__ import annotations

from pathlib import Path

import yaml

from fastpref import metrics
from fastpref.config import Config
from fastpref.docgen import markdown
from fastpref.utils.version import __version__


def write(folder: Path, config: Config, metrics_file: Path) -> None:
    """Write `folder/README.md` from the config and the last training and evaluation metrics."""
    final: dict[str, float] = {}
    for record in metrics.lines(metrics_file):
        final |= {k: v for k, v in record.items() if isinstance(v, int | float)}
    header = {
        "library_name": "transformers" if config.adapter is None else "peft",
        "tags": ["fastpref", "preference-training", config.build_loss().name],
    }
    if config.adapter is not None and config.adapter.merge:
        header["library_name"] = "transformers"
    if config.model.path is not None:
        header["base_model"] = config.model.path
    rows = ((name, f"{value:.6g}") for name, value in sorted(final.items()))
    settings = config.to_yaml()
    (folder / "README.md").write_text(
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n"
        f"# {Path(config.training.output_dir).name}\n\n"
        f"Trained with `{config.build_loss().name}` by fastpref {__version__} "
        f"on `{config.data.train}`.\n\n"
        f"## Metrics of the last step\n\n{markdown.table(('metric', 'value'), rows)}\n\n"
        f"## Config\n\n```yaml\n{settings}```\n",
        encoding="utf-8",
    )
