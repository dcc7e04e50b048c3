"""Parts of the demo; `make demo` runs all of it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml
from rich.console import Console

from fastpref import demo
from fastpref.config import parse
from fastpref.data.synthetic import pure_semantic
from fastpref.utils.progress import Display

Command = Callable[..., CompletedProcess[str]]

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


def test_a_folder_without_a_model_is_refused_before_an_earlier_demo_is_deleted(
    tmp_path: Path, fastpref: Command
) -> None:
    out, empty = tmp_path / "demo", tmp_path / "empty"
    out.mkdir()
    empty.mkdir()
    (out / "demo.json").write_text("{}")
    (out / "kept.txt").touch()
    for model in (empty, tmp_path / "absent"):
        done = fastpref("demo", "--model", str(model), "--out", str(out))
        assert done.returncode == 2 and (out / "kept.txt").exists()
        assert done.stderr == (
            f"error: --model: {model} is no Hugging Face model: it has no config.json; name a "
            "folder that `save_pretrained` wrote\n"
        )


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, fastpref: Command) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    done = fastpref("demo", "--model", str(model), "--out", str(tmp_path / "demo"))
    assert done.returncode == 2 and not (tmp_path / "demo").exists()
    assert done.stderr.startswith(f"error: model.path: cannot load {model}: ")


def test_a_pair_as_a_conversation_has_no_marks_of_turns() -> None:
    pair = pure_semantic.Pair(
        prompt="User: Which drink do you like best?\nAssistant:",
        chosen=" I like tea more than all the others.",
        rejected=" I like cola more than all the others.",
        p=0.75,
        set="drink",
        words=("tea", "cola"),
    )
    assert demo.conversation(pair) == {
        "prompt": [{"role": "user", "content": "Which drink do you like best?"}],
        "chosen": [{"role": "assistant", "content": "I like tea more than all the others."}],
        "rejected": [{"role": "assistant", "content": "I like cola more than all the others."}],
        "p": 0.75,
    }


def test_a_model_without_a_chat_template_gets_text_about_three_nouns(tmp_path: Path) -> None:
    held_out = demo._write_pairs(tmp_path / "data", 0, chat=False)
    for path, count in ((held_out, 42), (tmp_path / "data" / "train.jsonl", 160)):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == count and {row["set"] for row in rows} == {"drink", "city", "pet"}
        assert all(row["prompt"].startswith("User: ") for row in rows)


def test_the_demo_of_a_model_starts_both_objectives_from_it(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole demo of a model of 30k weights, in two steps of two pairs."""
    monkeypatch.setattr(demo, "_STEPS", 2)
    monkeypatch.setattr(demo, "_BATCH", 2)
    monkeypatch.setattr(demo, "_HELD_OUT", 3)
    out, console = tmp_path / "demo", Console(record=True, width=120, file=io.StringIO())
    demo.run(out, 0, Display(console), Path(tiny_llama))
    rows = [json.loads(line) for line in (out / "data" / "train.jsonl").read_text().splitlines()]
    # The tokenizer has a chat template.
    assert len(rows) == 4 and {row["prompt"][0]["role"] for row in rows} == {"user"}
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"seconds", "before", "dpo", "pmo"}
    assert results["before"]["chosen_change"] == 0 != results["dpo"]["chosen_change"]
    assert (out / "dpo" / "model" / "adapter_config.json").exists()
    said = console.export_text()
    assert "BEFORE" in said and "Expect DPO to decide nearly every pair" in said
