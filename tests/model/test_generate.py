"""Generation samples from the model's distribution and ignores its generation config."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from fastpref.model.generate import Sampling, engine, with_transformers, with_vllm
from fastpref.utils.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def ignore(done: int) -> None:
    pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "--n: expected a number >= 1, got 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens: expected a number >= 1, got 0"),
        ({"batch_size": -1}, "--batch-size: expected a number >= 1, got -1"),
        ({"temperature": float("nan")}, "--temperature: expected >= 0, got nan"),
        ({"top_p": 0.0}, r"--top-p: expected a share in \(0, 1\], got 0.0"),
        ({"seed": -1}, "--seed: expected a number >= 0, got -1"),
        ({"engine": "tgi"}, "--engine: expected auto or transformers or vllm, got 'tgi'"),
        ({"n": 2, "temperature": 0.0}, "--n: greedy completions of a prompt are all the same"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**options)


def test_vllm_is_used_where_it_can_be_and_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> object:
        return object()

    for device, adapter in ((CPU, False), (CUDA, True), (CUDA, False)):
        assert engine("transformers", device, adapter) == "transformers"
    monkeypatch.setattr(importlib.util, "find_spec", installed)
    assert engine("auto", CUDA, False) == engine("vllm", CUDA, False) == "vllm"
    for device, adapter, reason in (
        (CPU, False, "needs a GPU"),
        (CUDA, True, "does not load adapters"),
    ):
        assert engine("auto", device, adapter) == "transformers"
        with pytest.raises(UserError, match=reason):
            engine("vllm", device, adapter)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert engine("auto", CUDA, False) == "transformers"
    with pytest.raises(UserError, match="--engine: vllm is not installed; use --engine trans"):
        engine("vllm", CUDA, False)


def test_draws_follow_the_models_distribution_and_not_its_generation_config(
    tiny_llama: str,
) -> None:
    """Frequencies of one token after a prompt, against the softmax: chi-square in 20 bins."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    model.generation_config = GenerationConfig(top_k=3, repetition_penalty=5.0, eos_token_id=7)
    prompt, draws = [5, 9, 9, 40], 4000
    sampling = Sampling(max_new_tokens=1, batch_size=1000)
    drawn = with_transformers(model, [prompt] * draws, {1}, sampling, ignore)
    with torch.no_grad():
        probabilities = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    order = probabilities.argsort(descending=True)
    bins = torch.empty_like(order)
    bins[order] = torch.arange(len(order)).clamp(max=19)
    expected = torch.zeros(20, dtype=torch.float64).index_add_(0, bins, probabilities) * draws
    counts = torch.bincount(bins[torch.tensor(drawn)[:, 0]], minlength=20)
    # 0.999 quantile of 19 degrees of freedom.
    assert ((counts - expected).square() / expected).sum() < 44
    assert (model.generation_config.top_k, model.generation_config.eos_token_id) == (3, 7)


def test_top_p_and_temperature_narrow_the_draw(tiny_llama: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    prompts = [[5, 9, 9, 40]] * 200
    with torch.no_grad():
        best = int(model(torch.tensor(prompts[:1])).logits[0, -1].argmax())
    kinds = []
    for options in ({}, {"temperature": 0.5}, {"top_p": 0.2}, {"temperature": 0.0}):
        sampling = Sampling(max_new_tokens=1, batch_size=200, **options)
        drawn = {ids[0] for ids in with_transformers(model, prompts, set(), sampling, ignore)}
        assert best in drawn
        kinds.append(len(drawn))
    assert kinds[0] > kinds[1] > 1 and kinds[0] > kinds[2] > 1 and kinds[3] == 1


def test_what_vllm_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class LLM:
        def __init__(self, model: str, **options: Any) -> None:
            assert (model, options["dtype"], options["max_model_len"]) == ("m", "bfloat16", 7)

        def generate(self, inputs: list[Any], parameters: list[Any], use_tqdm: bool) -> list[Any]:
            answers = [
                i["prompt_token_ids"] + [p.seed] for i, p in zip(inputs, parameters, strict=True)
            ]
            assert all(p.stop_token_ids == [1, 2] for p in parameters)
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=a)]) for a in answers]

    fake = SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    sampling = Sampling(max_new_tokens=4, seed=10)
    drawn = with_vllm("m", "bfloat16", [[8], [8], [7, 7, 7]], {2, 1}, sampling, ignore)
    assert drawn == [[8, 10], [8, 11], [7, 7, 7, 12]]  # the same prompt, another seed
