"""Model card of an exported model: base model, objective, config and final metrics."""

from __future__ import annotations

from pathlib import Path

import yaml

from fastpref import metrics
from fastpref.docgen import markdown
from fastpref.utils.version import __version__

_LOADING = (
    "Load it with transformers 5 or later. Earlier versions refuse its `tokenizer_config.json` "
    "and do not read the `rope_parameters` of its `config.json`."
)


def write(folder: Path, objective: str, config_yaml: str, metrics_file: Path, step: int) -> None:
    """Write `folder/README.md`: the config, and the last training and evaluation metrics.

    objective: its name. config_yaml: the whole config, as `Config.to_yaml` writes it. step: that of
    the model; later metrics are left out.
    """
    final: dict[str, float] = {}
    for record in (r for r in metrics.iter_records(metrics_file) if r["step"] <= step):
        final |= {k: v for k, v in record.items() if isinstance(v, int | float)}
    config = yaml.safe_load(config_yaml)
    adapter, base_model = config["adapter"], config["model"]["path"]
    merged = adapter is None or adapter["merge"]
    header = {
        "library_name": "transformers" if merged else "peft",
        "tags": ["fastpref", "preference-training", objective],
    }
    if base_model is not None:
        header["base_model"] = base_model
    rows = ((name, f"{value:.6g}") for name, value in sorted(final.items()))
    (folder / "README.md").write_text(
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n"
        f"# {Path(config['training']['output_dir']).name}\n\n"
        f"Trained with `{objective}` by fastpref {__version__} "
        f"on `{config['data']['train']}`.\n\n"
        f"{_LOADING}\n\n"
        f"## Metrics of the last step\n\n{markdown.table(('metric', 'value'), rows)}\n\n"
        f"## Config\n\n```yaml\n{config_yaml}```\n",
        encoding="utf-8",
    )
