"""Parts of the demo; `make demo` runs all of it."""

from __future__ import annotations

import io
from pathlib import Path

import yaml
from rich.console import Console

from fastpref import demo
from fastpref.config import parse

EXAMPLES = Path(__file__).parents[1] / "examples"


def curve(scale: float) -> list[dict[str, float]]:
    return [
        {
            "step": step,
            "eval_loss": 0.5,
            "eval_preference/accuracy": 0.5 + step / 100,
            "eval_preference/mean_kl": scale * step,
            "eval_preference/pci": 0.4,
            "eval_logps/chosen": -10 - scale * step,
            "eval_logps/rejected": -10 - 2 * scale * step,
        }
        for step in (0, 15, 30)
    ]


def test_the_examples_are_what_the_demo_runs() -> None:
    for stage, values in demo.stage_configs(Path("runs/demo")).items():
        shown = yaml.safe_load((EXAMPLES / f"demo-{stage}.yaml").read_text())
        assert parse(shown) == parse(values)


def test_results_and_table() -> None:
    results = {name: demo.result(curve(scale)) for name, scale in (("dpo", 0.1), ("pmo", 0.01))}
    assert results["dpo"]["chosen_change"] == -3.0
    assert results["dpo"]["rejected_change"] == -6.0
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(demo.table(results))
    text = console.export_text()
    for part in ("DPO", "PMO", "0.800", "3.000", "0.400", "-3.00", "-6.00"):
        assert part in text


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    picture = demo.draw(
        {"sft": curve(0), "dpo": curve(0.1), "pmo": curve(0.01)}, 0.25, tmp_path / "p.png"
    )
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
