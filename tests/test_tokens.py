"""Tokens: where a response begins, how it ends, how both are cut, and the cache."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import rows, write_jsonl
from transformers import PreTrainedTokenizerFast

from fastpref.config import Data
from fastpref.data import tokens as module
from fastpref.data.formats import DataError, to_pair
from fastpref.data.tokens import PairDataset, load_pairs, tokenize


def data(tmp_path: Path, records: list[dict[str, Any]], **options: Any) -> Data:
    path = write_jsonl(tmp_path / "d.jsonl", records)
    return Data(train=str(path), cache=str(tmp_path / "cache"), **options)


def load(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    records: list[dict[str, Any]],
    **options: Any,
) -> PairDataset:
    config = data(tmp_path, records, **options)
    return load_pairs(config.train, tokenizer, config)


def one(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], **options: Any
) -> tuple[dict[str, Any], Counter[str]]:
    counts: Counter[str] = Counter()
    config = Data(train="x", **options)
    (made,) = tokenize([(1, to_pair(row))], "x", tokenizer, config, counts)
    return made, counts


def test_prompt_and_response_are_the_tokens_of_the_whole_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for row in rows(20):
        made, _ = one(tokenizer, row)
        for name in ("chosen", "rejected"):
            whole = tokenizer(row["prompt"] + row[name])["input_ids"]
            assert made["prompt"] + made[name] == [*whole, tokenizer.eos_token_id]


def test_a_token_that_merges_across_the_boundary_is_scored(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """`…Assistant:` + ` tea` splits between tokens, but `… t` + `ea` merges into ` tea`."""
    row = {"prompt": "User: tea or coffee?\nAssistant: t", "chosen": "ea", "rejected": "he"}
    alone = tokenizer(row["prompt"])["input_ids"]
    made, _ = one(tokenizer, row)
    whole = tokenizer(row["prompt"] + "ea")["input_ids"]
    assert len(made["prompt"]) < len(alone)
    assert made["prompt"] + made["chosen"] == [*whole, tokenizer.eos_token_id]
    assert tokenizer.decode(made["chosen"]) == " tea</s>"


def test_eos_is_added_once_and_only_to_text(tokenizer: PreTrainedTokenizerFast) -> None:
    eos = tokenizer.eos_token_id
    row = {"prompt": "User: a\nAssistant:", "chosen": " tea", "rejected": " tea</s>"}
    made, _ = one(tokenizer, row)
    assert made["chosen"] == made["rejected"]
    assert made["chosen"].count(eos) == 1
    assert eos not in one(tokenizer, {**row, "rejected": " x"}, add_eos=False)[0]["chosen"]
    user = [{"role": "user", "content": "a"}]
    chat, _ = one(
        tokenizer,
        {
            "prompt": user,
            "chosen": [{"role": "assistant", "content": "tea"}],
            "rejected": [{"role": "assistant", "content": "coffee"}],
        },
    )
    assert tokenizer.decode(chat["prompt"]).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(chat["chosen"]) == "tea<|im_end|>\n"


def test_bos_is_neither_doubled_nor_missing(tokenizer: PreTrainedTokenizerFast) -> None:
    """A tokenizer that adds BOS itself, texts with and without BOS, and a template with it."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token_id
    adding = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(
            tokenizer.backend_tokenizer.to_str()
        ),
        bos_token="<s>",
        eos_token="</s>",
    )
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    adding.chat_template = "<s>" + str(tokenizer.chat_template)
    plain = {"prompt": "User: a\nAssistant:", "chosen": " tea", "rejected": " coffee"}
    chat = {
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": [{"role": "assistant", "content": "tea"}],
        "rejected": [{"role": "assistant", "content": "coffee"}],
    }
    for row in (plain, {**plain, "prompt": "<s>" + plain["prompt"]}, chat, {**plain, "prompt": ""}):
        prompt = one(adding, row)[0]["prompt"]
        assert prompt[0] == bos and prompt.count(bos) == 1


def test_without_any_prompt_token_bos_or_eos_opens(tokenizer: PreTrainedTokenizerFast) -> None:
    made, _ = one(tokenizer, {"prompt": "", "chosen": "tea", "rejected": "bread"})
    assert made["prompt"] == [tokenizer.bos_token_id]
    assert tokenizer.decode(made["chosen"]) == "tea</s>"


def test_keep_start_cuts_both_responses_at_the_same_length(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    row = {"prompt": "User: a\nAssistant:", "chosen": " tea" * 30, "rejected": " tea" * 5}
    full, _ = one(tokenizer, row)
    room = 10
    made, counts = one(tokenizer, row, max_length=len(full["prompt"]) + room)
    assert made["prompt"] == full["prompt"]
    assert made["chosen"] == full["chosen"][:room]  # EOS is cut off, not moved
    assert made["rejected"] == full["rejected"]
    assert (counts["chosen_cut"], counts["rejected_cut"], counts["prompt_cut"]) == (1, 0, 0)


def test_keep_end_cuts_the_prompt_for_both(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "User:" + " tea" * 30, "chosen": " bread" * 4, "rejected": " bread"}
    full, _ = one(tokenizer, row)
    made, counts = one(tokenizer, row, max_length=20, truncation="keep_end")
    assert (made["chosen"], made["rejected"]) == (full["chosen"], full["rejected"])
    assert made["prompt"] == full["prompt"][-(20 - len(full["chosen"])) :]
    assert counts["prompt_cut"] == 1 and counts["chosen_cut"] == 0


def test_rows_without_a_completion_are_dropped_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    long = {"prompt": "tea " * 50, "chosen": " a", "rejected": " b"}
    empty = {"prompt": "tea", "chosen": "", "rejected": " b"}
    kept = {"prompt": "tea", "chosen": " a", "rejected": " b"}
    dataset = load(tmp_path, tokenizer, [long, empty, kept], max_length=32, add_eos=False)
    assert len(dataset) == 1 and dataset[0].row == 3
    assert dataset.counts["no_completion"] == 2
    assert "1 of 3 pairs" in dataset.summary() and "dropped 2" in dataset.summary()


def test_no_row_left_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    long = {"prompt": "tea " * 50, "chosen": " a", "rejected": " b"}
    with pytest.raises(DataError, match="no pair is left to train on"):
        load(tmp_path, tokenizer, [long], max_length=8)


def test_soft_labels_are_kept_or_ignored(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    records = rows(3, soft=True)
    assert load(tmp_path, tokenizer, records)[1].preference == records[1]["p"]
    mixed = load(tmp_path, tokenizer, [{**records[0], "p": None}, *records[1:]])
    assert (mixed[0].preference, mixed[1].preference) == (1.0, records[1]["p"])
    hard = load(tmp_path, tokenizer, records, soft_labels=False)
    assert hard[1].preference is None and not hard.has_preferences


def test_the_cache_is_used_until_something_that_matters_changes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    original = module._write
    monkeypatch.setattr(
        module, "_write", lambda folder, *rest: (written.append(folder), original(folder, *rest))
    )
    first = load(tmp_path, tokenizer, rows(5))
    again = load(tmp_path, tokenizer, rows(5))
    assert len(written) == 1
    assert first.fingerprint == again.fingerprint
    assert all(np.array_equal(first[i].chosen, again[i].chosen) for i in range(5))
    load(tmp_path, tokenizer, rows(5), max_length=12)
    load(tmp_path, tokenizer, rows(6))
    changed = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="<pad>"
    )
    load(tmp_path, changed, rows(6))
    assert len(written) == 4


def test_a_crash_while_writing_leaves_no_cache(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    bad = [*rows(600), {"prompt": "x", "chosen": 3, "rejected": "y"}]
    with pytest.raises(DataError, match="row 601"):
        load(tmp_path, tokenizer, bad)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_reference_logps_of_the_data(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    given = [{**row, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2} for row in rows(3)]
    found = load(tmp_path, tokenizer, given).given_reference_logps()
    assert found is not None and found.tolist() == [[-1.5, -2.0]] * 3
    assert load(tmp_path, tokenizer, rows(3)).given_reference_logps() is None
    with pytest.raises(DataError, match="cannot be used, 1 rows have none"):
        load(tmp_path, tokenizer, [*given[:2], rows(3)[2]]).given_reference_logps()
    with pytest.raises(DataError, match="cannot be used, some rows are cut to max_length"):
        load(tmp_path, tokenizer, given, max_length=14).given_reference_logps()


def test_conversations_need_a_template_and_its_errors_name_the_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    chat = {
        "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}],
    }
    bare = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    with pytest.raises(DataError, match="row 1: chat template failed: the data is conversational"):
        load(tmp_path, bare, [chat])
    bare.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="row 1: chat template failed: roles must alternate"):
        load(tmp_path, bare, [chat])


def test_a_default_system_prompt_is_not_scored(tokenizer: PreTrainedTokenizerFast) -> None:
    with_system = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    with_system.chat_template = "You are kind.\n" + str(tokenizer.chat_template)
    row = {
        "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "tea"}],
        "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bread"}],
    }
    made, _ = one(with_system, row)
    assert with_system.decode(made["prompt"]).startswith("You are kind.")
    assert with_system.decode(made["chosen"]) == "tea<|im_end|>\n"


def test_real_pairs(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, real_data: Path) -> None:
    """Every real row gives a prompt and two responses that spell the original text."""
    config = Data(train=str(real_data / "hh_harmless_pairs.jsonl"), cache=str(tmp_path))
    dataset = load_pairs(config.train, tokenizer, config)
    assert dataset.counts["rows"] == 1200
    lines = Path(config.train).read_text().splitlines()
    for i in range(0, len(dataset), 97):
        pair = dataset[i]
        text = json.loads(lines[pair.row - 1])["chosen"]
        decoded = tokenizer.decode([*pair.prompt, *pair.chosen]).removesuffix("</s>")
        assert text.startswith(decoded)
