"""Completions and their log-probs against plain transformers; how they end; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fastpref.data.formats import TextGroup, to_groups
from fastpref.data.prompts import Prompt, read_prompts
from fastpref.evaluation.sample import Completion, Sampler, record, run
from fastpref.model.generate import Sampling, text_after
from fastpref.utils.errors import ModelError, UserError
from fastpref.utils.progress import Display
from tests.helpers.data import rows, write_jsonl

CHAT = [{"prompt": [{"role": "user", "content": word}]} for word in ("tea", "coffee", "a piano?")]


@pytest.fixture(scope="module")
def sampler(tiny_llama: str) -> Sampler:
    return Sampler(tiny_llama, "cpu")


def prompts(sampler: Sampler, folder: Path, records: list[dict[str, Any]]) -> list[Prompt]:
    return read_prompts(str(write_jsonl(folder / "d.jsonl", records)), sampler.tokenizer)


def plain_logps(causal_lm: Any, each: Completion) -> float:
    """Log-softmax over the full logits, in fp64, of one sequence."""
    ids = torch.from_numpy(np.concatenate([each.prompt.ids, each.ids]).astype(np.int64))
    with torch.no_grad():
        logits = causal_lm(input_ids=ids[None]).logits[0].double()
    logps = logits.log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]
    return float(logps[len(each.prompt.ids) - 1 :].sum())


def ids_of(completions: list[Completion]) -> list[list[int]]:
    return [each.ids.tolist() for each in completions]


def test_greedy_in_a_batch_is_greedy_one_by_one(
    sampler: Sampler, tmp_path: Path, display: Display
) -> None:
    """Prompts of different lengths, so that all but one are padded."""
    records = [{"prompt": "tea " * k} for k in (1, 2, 5, 9, 14, 3, 7)]
    encoded = prompts(sampler, tmp_path, records)
    assert len({len(prompt.ids) for prompt in encoded}) > 4
    greedy = Sampling(temperature=0.0, max_new_tokens=24, batch_size=7)
    batched = sampler.draw(encoded, greedy, display)
    single = sampler.draw(encoded, replace(greedy, batch_size=1), display)
    assert ids_of(batched) == ids_of(single)


def test_the_seed_decides(sampler: Sampler, tmp_path: Path, display: Display) -> None:
    encoded = prompts(sampler, tmp_path, rows(5))
    sampling = Sampling(n=2, max_new_tokens=12, batch_size=4)
    first = ids_of(sampler.draw(encoded, sampling, display))
    torch.manual_seed(7)
    assert ids_of(sampler.draw(encoded, sampling, display)) == first
    assert ids_of(sampler.draw(encoded, replace(sampling, seed=1), display)) != first
    assert len({tuple(ids) for ids in first}) == 10


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_log_probs_are_those_of_plain_logits_at_temperature_one(
    sampler: Sampler, tmp_path: Path, display: Display, tiny_llama: str, temperature: float
) -> None:
    wide = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    encoded = prompts(sampler, tmp_path, rows(9))
    sampling = Sampling(temperature=temperature, top_p=0.9, max_new_tokens=20, batch_size=4)
    completions = sampler.draw(encoded, sampling, display)
    ours = torch.tensor([each.logps for each in completions], dtype=torch.float64)
    expected = torch.tensor([plain_logps(wide, each) for each in completions], dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("records", [rows(4), CHAT])
def test_a_completion_ends_with_its_first_end_or_at_the_limit(
    sampler: Sampler, tmp_path: Path, display: Display, records: list[dict[str, Any]]
) -> None:
    """At a high temperature the ends come now and then; a chat also ends with its turn."""
    encoded = prompts(sampler, tmp_path, records)
    names = ["</s>", "<pad>"]  # the tokenizer's, and token 2, which is that of a Llama config
    names += ["<|im_end|>"] if records is CHAT else []
    ends = set(sampler.tokenizer.convert_tokens_to_ids(names))
    sampling = Sampling(n=40, temperature=100.0, max_new_tokens=60, batch_size=200)
    completions = sampler.draw(encoded, sampling, display)
    for each in completions:
        assert not ends & set(each.ids[:-1].tolist())
        assert each.finished == (each.ids[-1] in ends)
        assert each.finished or len(each.ids) == 60
        assert not any(name in each.text for name in names)
    assert {int(each.ids[-1]) for each in completions if each.finished} == ends
    assert not all(each.finished for each in completions)


def test_ends_that_the_model_names_count(
    tiny_llama: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, display: Display
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.generation_config.eos_token_id = [100, 200]
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    sampler = Sampler(str(tmp_path / "m"), "cpu")
    encoded = prompts(sampler, tmp_path, rows(1))
    sampling = Sampling(n=64, temperature=100.0, max_new_tokens=60, batch_size=64)
    completions = sampler.draw(encoded, sampling, display)
    assert {int(each.ids[-1]) for each in completions if each.finished} == {100, 200, 1}


def test_a_row_has_the_form_of_its_prompt_and_can_be_trained_on(
    sampler: Sampler, tmp_path: Path, display: Display
) -> None:
    tools = [{"name": "kettle"}]
    for records in (rows(1), [{**CHAT[0], "tools": tools}]):
        encoded = prompts(sampler, tmp_path, records)
        (completions,) = sampler.draw(encoded, Sampling(max_new_tokens=5), display)
        row = json.loads(json.dumps(record(completions)))
        (group,) = to_groups({**row, "label": True}, "pointwise")
        assert group.prompt == records[0]["prompt"] and group.tools == records[0].get("tools")
        assert (row["tokens"], row["logps"]) == (len(completions.ids), completions.logps)
        (response,) = group.responses
        text = response if isinstance(response, str) else response[0]["content"]
        assert text == completions.text


def test_the_space_that_begins_a_completion_is_kept() -> None:
    """Decoders of sentencepiece's kind drop it where it begins a text."""
    pieces = {"▁tea": 0, "▁or": 1, "▁coffee": 2, "<unk>": 3}
    raw = Tokenizer(models.WordLevel(pieces, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    spaced = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert spaced.decode([1, 2]) == "or coffee"
    prompt = Prompt(1, TextGroup("tea", ()), np.asarray([0], dtype=np.int32))
    assert text_after(spaced, prompt.ids, np.asarray([1, 2], dtype=np.int32)) == " or coffee"


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_an_adapter_is_merged_into_its_base(
    tiny_llama: str,
    tmp_path: Path,
    display: Display,
    tokenizer: PreTrainedTokenizerFast,
    with_tokenizer: bool,
) -> None:
    import peft

    torch.manual_seed(1)
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(base, lora)
    adapted.save_pretrained(tmp_path / "adapter")
    if with_tokenizer:
        tokenizer.save_pretrained(tmp_path / "adapter")
    sampler = Sampler(str(tmp_path / "adapter"), "cpu")
    assert sampler.is_adapter
    encoded = prompts(sampler, tmp_path, rows(3))
    for each in sampler.draw(encoded, Sampling(max_new_tokens=8), display):
        assert each.logps == pytest.approx(plain_logps(adapted, each), abs=1e-4)
        with adapted.disable_adapter():
            assert abs(each.logps - plain_logps(adapted, each)) > 0.1


def test_frozen_weights_are_in_the_dtype_and_rotary_frequencies_are_not(tiny_llama: str) -> None:
    policy = Sampler(tiny_llama, "cpu", "bfloat16").policy
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in policy.parameters())
    assert {b.dtype for b in policy.buffers()} == {torch.float32}


def test_a_prompt_needs_room_for_its_completion(
    sampler: Sampler, tmp_path: Path, display: Display
) -> None:
    encoded = prompts(sampler, tmp_path, [{"prompt": "tea"}, {"prompt": "@" * 250}])
    sampler.draw(encoded, Sampling(max_new_tokens=6), display)
    message = (
        r"--max-new-tokens: 7 after the prompt of row 2 \(250 tokens\) end beyond the 256 "
        "positions of the model; use 6 or less"
    )
    with pytest.raises(UserError, match=message):
        sampler.draw(encoded, Sampling(max_new_tokens=7), display)
    encoded = prompts(sampler, tmp_path, [{"prompt": "@" * 256}])
    with pytest.raises(UserError, match="leave out prompts that long"):
        sampler.draw(encoded, Sampling(max_new_tokens=1), display)


def test_models_that_cannot_be_sampled(
    tiny_llama: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(bare)
    with pytest.raises(ModelError, match=r"^model.path: cannot load .*bare: "):
        Sampler(str(bare), "cpu")
    with pytest.raises(ModelError, match=r"^model.path: cannot load no/such: "):
        Sampler("no/such", "cpu")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter_config\.json: names no base_model_name_or_path"):
        Sampler(str(tmp_path), "cpu")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": tiny_llama})
    )
    with pytest.raises(ModelError, match="cannot load the adapter: "):
        Sampler(str(tmp_path), "cpu")
    with pytest.raises(UserError, match="--dtype: expected bfloat16 or float32 or float64, got 'f"):
        Sampler(tiny_llama, "cpu", "fp8")
    with pytest.raises(UserError, match="--device: expected auto or cpu or cuda, got 'tpu'"):
        Sampler(tiny_llama, "tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device: expected cpu, for torch finds no GPU, got"):
            Sampler(tiny_llama, "cuda")
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"tea": 0})))
    with pytest.raises(ModelError, match="its vocabulary is not that of the model"):
        Sampler(tiny_llama, "cpu", tokenizer=other)


def test_a_file_that_is_there_is_left_alone(
    tiny_llama: str, tmp_path: Path, display: Display
) -> None:
    data = str(write_jsonl(tmp_path / "d.jsonl", rows(2)))
    out = tmp_path / "out.jsonl"
    sampling = Sampling(n=2, max_new_tokens=3)
    run(tiny_llama, data, out, sampling, display, device="cpu", limit=1)
    written = out.read_text()
    assert len(written.splitlines()) == 2
    with pytest.raises(UserError, match=r"--out: .*out\.jsonl is already there; choose another"):
        run(tiny_llama, data, out, sampling, display, device="cpu")
    assert out.read_text() == written


def test_the_command_writes_rows_to_stdout_and_the_rest_elsewhere(
    fastpref: Any, tiny_llama: str, tmp_path: Path
) -> None:
    data = str(write_jsonl(tmp_path / "d.jsonl", rows(3)))
    options = ("--prompts", data, "--max-new-tokens", "4", "--n", "2", "--limit", "2")
    done = fastpref("sample", tiny_llama, *options, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["prompt"] for row in lines] == [rows(3)[k]["prompt"] for k in (0, 0, 1, 1)]
    assert "4 completions of 2 prompts, " in done.stderr
