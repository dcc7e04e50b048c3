"""Samples of completions at evaluations: greedy, of the same prompts, and without other effects."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref import metrics
from fastpref.config import Config, ConfigError
from fastpref.model.policy import Policy
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display
from tests.helpers.data import rows, write_jsonl
from tests.helpers.training_runs import lose_power_after, records, run, weights

MakeConfig = Callable[..., Config]


@pytest.fixture
def sampled(make_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """Config of three steps with evaluations of nine rows with three different prompts."""
    repeated = [row | {"prompt": rows(3)[k % 3]["prompt"]} for k, row in enumerate(rows(9))]
    held_out = write_jsonl(tmp_path / "held-out.jsonl", repeated)

    def make(**overrides: Any) -> Config:
        values = {
            "data__eval": str(held_out),
            "training__eval_every": 1,
            "evaluation__samples": 8,
            "evaluation__max_new_tokens": 6,
        }
        return make_config(**values | overrides)

    return make


def lines(config: Config) -> list[dict[str, Any]]:
    return metrics.read_records(Path(config.training.output_dir) / "samples.jsonl")


@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_the_first_different_prompts_are_completed_greedily(
    sampled: MakeConfig, display: Display, tiny_llama: str, layout: str
) -> None:
    config = sampled(training__layout=layout)
    run(config, display)
    samples = lines(config)
    assert [line["step"] for line in samples] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    prompts = [row["prompt"] for row in rows(3)]
    assert [line["prompt"] for line in samples] == prompts * 4

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for prompt, line in zip(prompts, samples, strict=False):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        whole = model.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=0)[0]
        expected = tokenizer.decode(whole[ids.shape[1] :], skip_special_tokens=True)
        assert line["completion"] == expected and 1 <= line["tokens"] <= 6


def test_samples_change_neither_metrics_nor_weights(
    sampled: MakeConfig, display: Display, tmp_path: Path
) -> None:
    adapter = {"name": "lora", "r": 4, "dropout": 0.3}
    plain = sampled(
        adapter=adapter, evaluation__samples=None, training__output_dir=f"{tmp_path}/plain"
    )
    expected = weights(run(plain, display))
    trained = weights(run(sampled(adapter=adapter), display))
    assert all(torch.equal(expected[name], trained[name]) for name in expected)
    assert records(plain) == records(sampled())
    assert not (tmp_path / "plain" / "samples.jsonl").exists()


def test_a_resumed_run_writes_each_sample_once(sampled: MakeConfig, display: Display) -> None:
    config = sampled(training__checkpoint_every=2)
    whole = [run(config, display), lines(config)][1]
    for path in sorted(Path(config.training.output_dir).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    broken = Trainer(config, display)
    lose_power_after(broken, 2)
    with pytest.raises(RuntimeError, match="power cut"):
        broken.loop([])
    run(sampled(training__checkpoint_every=2, resume="auto"), display)
    assert lines(config) == whole


def test_prompts_without_room_are_refused(sampled: MakeConfig, display: Display) -> None:
    message = "evaluation.samples: no prompt of data.eval leaves room for 250 tokens; lower eval"
    with pytest.raises(ConfigError, match=message):
        Trainer(sampled(evaluation__max_new_tokens=250), display)


def test_a_model_that_cannot_generate_trains_without_samples(
    sampled: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no cache\nat all")

    monkeypatch.setattr(Policy, "complete", fail)
    text = io.StringIO()
    with Display(Console(file=text, width=200)) as display:
        assert run(sampled(), display).step == 3
    assert text.getvalue().count("no samples, for the model cannot generate: no cache") == 1


def test_samples_need_held_out_data(make_config: MakeConfig) -> None:
    message = "evaluation.samples: there are no evaluations; set data.eval to held-out data"
    with pytest.raises(ConfigError, match=message):
        make_config(evaluation__samples=2)


def test_a_best_evaluation_needs_several(sampled: MakeConfig) -> None:
    message = "evaluation.load_best_model_at_end: compares evaluations during training; set train"
    with pytest.raises(ConfigError, match=message):
        sampled(training__eval_every=None, evaluation__load_best_model_at_end=True)
