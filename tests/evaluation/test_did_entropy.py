"""The estimate where the differential information is known, and whole runs of the command."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fastpref import losses
from fastpref.config import ConfigError
from fastpref.data.formats import TextGroup
from fastpref.data.prompts import Prompt
from fastpref.evaluation.did_entropy import (
    LOSS,
    Estimate,
    entropy,
    slope_summary,
    slopes,
    table,
    write_pairs,
)
from fastpref.evaluation.sample import Completion
from fastpref.logps import SequenceLogps
from fastpref.model.generate import Sampling
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display
from tests.helpers.data import LLAMA, rows, write_jsonl


def test_the_optimum_on_all_pairs_is_the_differential_information() -> None:
    """Categorical policies: pi' = pi / ref, normalised, and the estimates from its samples."""
    generator = torch.Generator().manual_seed(0)
    prompts, classes, samples = 300, 6, 8
    drawn = torch.randn(2, prompts, classes, generator=generator, dtype=torch.float64)
    policy, reference = drawn.log_softmax(-1)
    q = (policy - reference).log_softmax(-1)

    loss = losses.from_config(LOSS)
    assert not loss.needs_reference
    logits = reference.clone().requires_grad_()
    weights = policy.exp()[:, :, None] * reference.exp()[:, None, :]  # of each pair (w, l)
    ones = torch.ones(prompts * classes**2)
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=500,
        tolerance_grad=1e-10,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        z = logits.log_softmax(-1)
        chosen = z[:, :, None].expand_as(weights).flatten()
        rejected = z[:, None, :].expand_as(weights).flatten()
        mean = (weights.flatten() * loss(SequenceLogps(chosen, rejected, ones, ones)).loss).sum()
        mean.backward()
        return mean

    optimizer.step(closure)
    learned = logits.detach().log_softmax(-1)
    torch.testing.assert_close(learned, q, rtol=0, atol=1e-5)

    y = torch.multinomial(learned.exp(), samples, replacement=True, generator=generator)
    estimate, error = entropy(learned.gather(-1, y))
    exact = -(q.exp() * q).sum(-1).mean().item()
    assert error is not None and 0 < error < 0.05
    assert abs(estimate - exact) < 3 * error
    fitted = slopes((policy - reference).gather(-1, y), learned.gather(-1, y))
    summary = slope_summary(fitted)
    assert summary["share_nonnegative"] == 1.0
    assert summary["median"] == pytest.approx(1.0, abs=1e-3)
    same = (y == y[:, :1]).all(1)  # K equal samples say nothing about a slope
    assert torch.equal(fitted.isnan(), same) and summary["prompts"] == prompts - same.sum()


def test_slopes_are_least_squares() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 50, 4))
    expected = [np.polyfit(a, b, 1)[0] for a, b in zip(x, y, strict=True)]
    fitted = slopes(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(fitted.numpy(), expected, rtol=1e-9)
    assert slope_summary(torch.tensor([1.0, -1.0, 2.0, 0.0, math.nan])) == {
        "prompts": 4,
        "share_nonnegative": 0.75,
        "median": 0.0,
    }


def test_the_standard_error_is_that_of_a_mean_over_prompts() -> None:
    logps = torch.tensor([[-1.0, -3.0], [-4.0, -4.0], [-6.0, -6.0]], dtype=torch.float64)
    estimate, error = entropy(logps)  # means 2, 4, 6
    assert estimate == pytest.approx(4.0) and error == pytest.approx(2 / math.sqrt(3))
    assert entropy(logps[:1]) == (2.0, None)


def test_plain_text_ends_with_eos_where_it_was_drawn(tmp_path: Path) -> None:
    def completion(prompt: Any, text: str, finished: bool) -> Completion:
        ids = np.asarray([1], dtype=np.int32)
        return Completion(Prompt(1, TextGroup(prompt, ()), ids), ids, text, finished, -1.0)

    chat = [{"role": "user", "content": "a"}]
    chosen = [completion("a", " tea", True), completion(chat, "tea", True)]
    rejected = [completion("a", " cof", False), completion(chat, "cof", False)]
    write_pairs(tmp_path / "pairs.jsonl", chosen, rejected, "</s>")
    text, messages = map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines())
    assert text == {"prompt": "a", "chosen": " tea</s>", "rejected": " cof"}
    assert messages["chosen"] == [{"role": "assistant", "content": "tea"}]


@pytest.fixture(scope="module")
def other_llama(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> str:
    folder = tmp_path_factory.mktemp("models") / "other"
    torch.manual_seed(1)
    options = {**LLAMA, "initializer_range": 0.2}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


SHORT = Sampling(n=3, max_new_tokens=6)


def test_a_run_leaves_pairs_a_model_and_numbers(
    tiny_llama: str, other_llama: str, tmp_path: Path, display: Display
) -> None:
    data = str(write_jsonl(tmp_path / "d.jsonl", rows(6)))
    unseen = str(write_jsonl(tmp_path / "u.jsonl", rows(10)[6:]))
    out = tmp_path / "out"
    estimate = Estimate(
        tiny_llama,
        other_llama,
        data,
        out,
        SHORT,
        pairs=2,
        held_out=unseen,
        overrides=("optim.lr=1e-3", "training.batch_size=4"),
        device="cpu",
    )
    result = estimate.run(display)
    assert json.loads((out / "did_entropy.json").read_text()) == json.loads(json.dumps(result))
    assert (result["did"]["prompts"], result["did"]["samples"]) == (4, 12)
    assert result["policy"]["samples"] == result["reference"]["samples"] == 12
    assert result["slopes"]["prompts"] == 4
    optim = result["config"]["optim"]
    assert (optim["name"], optim["lr"], optim["warmup_steps"]) == ("rmsprop", 1e-3, 150)
    assert result["config"]["model"]["path"] == other_llama
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert [pair["prompt"] for pair in pairs[::2]] == [row["prompt"] for row in rows(6)]
    assert (out / "training" / "model" / "model.safetensors").exists()
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(table(result))
    text = console.export_text()
    for part in (f"{result['did']['entropy']:.2f}", "differential information", "a >= 0 for"):
        assert part in text


def test_equal_models_draw_different_pairs_and_determine_no_slope(
    tiny_llama: str, tmp_path: Path, display: Display
) -> None:
    """The chosen and the rejected response must not share their random numbers."""
    data = str(write_jsonl(tmp_path / "d.jsonl", rows(4)))
    out = tmp_path / "out"
    result = Estimate(tiny_llama, tiny_llama, data, out, SHORT, device="cpu").run(display)
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    assert result["slopes"] == {"prompts": 0, "share_nonnegative": None, "median": None}
    assert "no prompt determines a slope" in str(table(result).caption)


def test_an_adapter_as_reference_is_merged_for_training(
    tiny_llama: str, tmp_path: Path, display: Display
) -> None:
    import peft

    base: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    data = str(write_jsonl(tmp_path / "d.jsonl", rows(2)))
    adapter, out = str(tmp_path / "adapter"), tmp_path / "out"
    result = Estimate(tiny_llama, adapter, data, out, SHORT, device="cpu").run(display)
    assert result["config"]["model"]["path"] == str(out / "reference")


def test_what_a_user_can_cause(tiny_llama: str, tmp_path: Path, display: Display) -> None:
    data, out = str(write_jsonl(tmp_path / "d.jsonl", rows(2))), tmp_path / "out"
    models = (tiny_llama, tiny_llama, data)
    with pytest.raises(UserError, match="--temperature: expected > 0, to sample, got 0"):
        Estimate(*models, out, Sampling(temperature=0.0))
    with pytest.raises(UserError, match="--responses: expected a number >= 2, to fit a slope"):
        Estimate(*models, out, Sampling(n=1))
    wrong = Estimate(*models, out, SHORT, overrides=("optim.lr=-1",), device="cpu")
    with pytest.raises(ConfigError, match=r"optim\.lr: must be > 0, got -1"):
        wrong.run(display)
    long = replace(SHORT, max_new_tokens=250)
    with pytest.raises(UserError, match="--max-new-tokens: 250 after the prompt of row 1"):
        Estimate(*models, out, long, device="cpu").run(display)
    assert list(out.iterdir()) == []  # so that it can be tried again
    (out / "mine").touch()
    with pytest.raises(UserError, match=r"--out: .*out is not empty; choose another folder"):
        Estimate(*models, out, SHORT, device="cpu").run(display)


def test_the_command(fastpref: Any, tiny_llama: str, other_llama: str, tmp_path: Path) -> None:
    data = str(write_jsonl(tmp_path / "d.jsonl", rows(4)))
    options = ("--prompts", data, "--out", str(tmp_path / "out"), "--max-new-tokens", "4")
    done = fastpref("did-entropy", tiny_llama, other_llama, *options, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "note: training ends at step 1, within the warm-up of 150 steps" in done.stdout
    assert done.stdout.rstrip().endswith("out/did_entropy.json")
