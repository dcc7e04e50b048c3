"""Tokenization: the boundary of responses, EOS, truncation and the cache."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from fastpref.config import Data
from fastpref.data import dataset
from fastpref.data.dataset import GroupDataset, load_groups
from fastpref.data.formats import to_groups
from fastpref.data.readers import DataError
from fastpref.data.tokenize import tokenize
from tests.helpers.data import labelled, rows, scored, write_jsonl


def data(tmp_path: Path, records: list[dict[str, Any]], **options: Any) -> Data:
    path = write_jsonl(tmp_path / "d.jsonl", records)
    return Data(train=str(path), cache=str(tmp_path / "cache"), **options)


def load(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    records: list[dict[str, Any]],
    **options: Any,
) -> GroupDataset:
    config = data(tmp_path, records, **options)
    return load_groups(config.train, tokenizer, config)


def one(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], **options: Any
) -> tuple[dict[str, Any], Counter[str]]:
    counts: Counter[str] = Counter()
    config = Data(train="x", **options)
    (encoded,) = next(
        tokenize([[(1, *to_groups(row))]], "x", tokenizer, config, "pairwise", counts)
    )
    ids = zip(
        ("prompt", "chosen", "rejected"),
        (encoded.pop("prompt"), *encoded.pop("responses")),
        strict=True,
    )
    return {**encoded, **{name: tokens.tolist() for name, tokens in ids}}, counts


def test_truncation_and_padding_of_the_tokenizer_file_are_ignored(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    row = {"prompt": "one two three", "chosen": " four five six", "rejected": " seven"}
    plain = one(tokenizer, row)[0]
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert one(tokenizer, row)[0] == plain


def test_prompt_and_response_are_the_tokens_of_the_whole_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for row in rows(20):
        encoded, _ = one(tokenizer, row)
        for name in ("chosen", "rejected"):
            whole = tokenizer(row["prompt"] + row[name])["input_ids"]
            assert encoded["prompt"] + encoded[name] == [*whole, tokenizer.eos_token_id]


def test_a_token_that_merges_across_the_boundary_is_scored(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """`…Assistant:` + ` tea` splits between tokens, but `… t` + `ea` merges into ` tea`."""
    row = {"prompt": "User: tea or coffee?\nAssistant: t", "chosen": "ea", "rejected": "he"}
    alone = tokenizer(row["prompt"])["input_ids"]
    encoded, _ = one(tokenizer, row)
    whole = tokenizer(row["prompt"] + "ea")["input_ids"]
    assert len(encoded["prompt"]) < len(alone)
    assert encoded["prompt"] + encoded["chosen"] == [*whole, tokenizer.eos_token_id]
    assert tokenizer.decode(encoded["chosen"]) == " tea</s>"


def test_eos_is_added_once_and_only_to_text(tokenizer: PreTrainedTokenizerFast) -> None:
    eos = tokenizer.eos_token_id
    row = {"prompt": "User: a\nAssistant:", "chosen": " tea", "rejected": " tea</s>"}
    encoded, _ = one(tokenizer, row)
    assert encoded["chosen"] == encoded["rejected"]
    assert encoded["chosen"].count(eos) == 1
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
    encoded, _ = one(tokenizer, {"prompt": "", "chosen": "tea", "rejected": "bread"})
    assert encoded["prompt"] == [tokenizer.bos_token_id]
    assert tokenizer.decode(encoded["chosen"]) == "tea</s>"


def test_keep_start_cuts_both_responses_at_the_same_length(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    row = {"prompt": "User: a\nAssistant:", "chosen": " tea" * 30, "rejected": " tea" * 5}
    full, _ = one(tokenizer, row)
    room = 10
    encoded, counts = one(tokenizer, row, max_length=len(full["prompt"]) + room)
    assert encoded["prompt"] == full["prompt"]
    assert encoded["chosen"] == full["chosen"][:room]  # EOS is cut off, not moved
    assert encoded["rejected"] == full["rejected"]
    assert (counts["chosen_cut"], counts["rejected_cut"], counts["prompts_cut"]) == (1, 0, 0)


def test_keep_end_cuts_the_prompt_for_both(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "User:" + " tea" * 30, "chosen": " bread" * 4, "rejected": " bread"}
    full, _ = one(tokenizer, row)
    encoded, counts = one(tokenizer, row, max_length=20, truncation="keep_end")
    assert (encoded["chosen"], encoded["rejected"]) == (full["chosen"], full["rejected"])
    assert encoded["prompt"] == full["prompt"][-(20 - len(full["chosen"])) :]
    assert counts["prompts_cut"] == 1 and counts["chosen_cut"] == 0


def test_a_long_prompt_keeps_its_end_and_its_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "User:" + " tea" * 30, "chosen": " bread" * 4, "rejected": " bread"}
    full, _ = one(tokenizer, row)
    encoded, counts = one(tokenizer, row, max_prompt_length=7)
    assert encoded["prompt"] == full["prompt"][-7:]
    assert (encoded["chosen"], encoded["rejected"]) == (full["chosen"], full["rejected"])
    assert (counts["long_prompts_cut"], counts["prompts_cut"], counts["chosen_cut"]) == (1, 0, 0)
    with_bos = {**row, "prompt": "<s>" + row["prompt"]}
    encoded, _ = one(tokenizer, with_bos, max_prompt_length=7)
    assert encoded["prompt"] == [tokenizer.bos_token_id, *full["prompt"][-6:]]
    encoded, counts = one(tokenizer, row, max_prompt_length=len(full["prompt"]))
    assert encoded["prompt"] == full["prompt"] and counts["long_prompts_cut"] == 0


@pytest.mark.parametrize(("truncation", "prompt", "chosen"), [("keep_start", 7, 3),
                                                              ("keep_end", 5, 5)])  # fmt: skip
def test_the_prompt_is_cut_before_prompt_and_response(
    tokenizer: PreTrainedTokenizerFast, truncation: str, prompt: int, chosen: int
) -> None:
    row = {"prompt": "User:" + " tea" * 30, "chosen": " bread" * 4, "rejected": " bread"}
    full, _ = one(tokenizer, row)
    assert len(full["chosen"]) == 5
    options: dict[str, Any] = {"max_length": 10, "truncation": truncation}
    encoded, counts = one(tokenizer, row, max_prompt_length=7, **options)
    assert encoded["prompt"] == full["prompt"][-prompt:]
    assert encoded["chosen"] == full["chosen"][:chosen]
    assert counts["long_prompts_cut"] == 1
    assert counts["prompts_cut"] == (truncation == "keep_end")


def test_cut_prompts_are_reported_and_part_of_the_cache_key(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    records = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in rows(4)]
    longest = max(len(tokenizer(row["prompt"])["input_ids"]) for row in records)
    whole = load(tmp_path, tokenizer, records)
    cut = load(tmp_path, tokenizer, records, max_prompt_length=longest - 1)
    assert "max_prompt_length" not in whole.summary()
    count = cut.counts["long_prompts_cut"]
    assert count > 0
    assert cut.summary().endswith(f"; cut to max_prompt_length: {count} of the prompts")
    assert whole.fingerprint != cut.fingerprint
    with pytest.raises(DataError, match=r"are cut to max_prompt_length; .* raise data.max_pro"):
        cut.given_reference_logps()
    roomy = load(tmp_path, tokenizer, records, max_prompt_length=longest)
    assert roomy.fingerprint == whole.fingerprint


def test_rows_without_a_completion_are_dropped_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    long = {"prompt": "tea " * 50, "chosen": " a", "rejected": " b"}
    empty = {"prompt": "tea", "chosen": "", "rejected": " b"}
    complete = {"prompt": "tea", "chosen": " a", "rejected": " b"}
    dataset = load(tmp_path, tokenizer, [long, empty, complete], max_length=32, add_eos=False)
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
    assert load(tmp_path, tokenizer, records)[1].labels == (records[1]["p"],)
    mixed = load(tmp_path, tokenizer, [{**records[0], "p": None}, *records[1:]])
    assert (mixed[0].labels, mixed[1].labels) == ((1.0,), (records[1]["p"],))
    hard = load(tmp_path, tokenizer, records, soft_labels=False)
    assert hard[1].labels is None and not hard.has_preferences


def test_the_cache_is_used_until_something_that_matters_changes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    original = dataset._write
    monkeypatch.setattr(
        dataset, "_write", lambda folder, *rest: (written.append(folder), original(folder, *rest))
    )
    first = load(tmp_path, tokenizer, rows(5))
    again = load(tmp_path, tokenizer, rows(5))
    assert len(written) == 1
    assert first.fingerprint == again.fingerprint
    assert all(np.array_equal(first[i].responses[0], again[i].responses[0]) for i in range(5))
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
    with_logps = [{**row, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2} for row in rows(3)]
    reference_logps = load(tmp_path, tokenizer, with_logps).given_reference_logps()
    assert reference_logps is not None and reference_logps.tolist() == [-1.5, -2.0] * 3
    assert load(tmp_path, tokenizer, rows(3)).given_reference_logps() is None
    with pytest.raises(DataError, match="cannot be used, 1 rows have none"):
        load(tmp_path, tokenizer, [*with_logps[:2], rows(3)[2]]).given_reference_logps()
    with pytest.raises(DataError, match="cannot be used, some rows are cut to max_length"):
        load(tmp_path, tokenizer, with_logps, max_length=14).given_reference_logps()


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
    encoded, _ = one(with_system, row)
    assert with_system.decode(encoded["prompt"]).startswith("You are kind.")
    assert with_system.decode(encoded["chosen"]) == "tea<|im_end|>\n"


def kinds(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    records: list[dict[str, Any]],
    kind: Any,
    **options: Any,
) -> GroupDataset:
    config = data(tmp_path, records, **options)
    return load_groups(config.train, tokenizer, config, kind)


def test_labeled_and_scored_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Every response continues the prompt and ends with EOS; labels and offsets match."""
    eos = tokenizer.eos_token_id
    single = kinds(tmp_path, tokenizer, labelled(9), "pointwise")
    assert single.offsets.tolist() == list(range(10)) and not single.has_preferences
    for i, row in enumerate(labelled(9)):
        group = single[i]
        whole = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        assert [*group.prompt, *group.responses[0]] == [*whole, eos]
        assert (group.labels, group.first) == ((float(row["label"]),), i)
    groups = kinds(tmp_path, tokenizer, scored(9), "groupwise")
    assert groups.offsets.tolist() == [0, 1, 3, 6, 10, 11, 13, 16, 20, 21]
    for i, row in enumerate(scored(9)):
        group = groups[i]
        assert (group.labels, group.first) == (tuple(row["scores"]), groups.offsets[i])
        for text, response in zip(row["completions"], group.responses, strict=True):
            assert [*group.prompt, *response] == [
                *tokenizer(row["prompt"] + text)["input_ids"],
                eos,
            ]
        longest = max(len(group.prompt) + len(response) for response in group.responses)
        assert groups.padded_lengths[i] == longest
    assert groups.label_values().tolist() == [s for row in scored(9) for s in row["scores"]]
    assert [*groups.prompt_bytes()] == [groups[i].prompt.tobytes() for i in range(9)]


def test_a_group_shares_one_start(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The second response merges with the end of the prompt, so the first starts there too."""
    row = {"prompt": "User: tea?\nAssistant: t", "completions": ["he", "ea"], "scores": [0, 1]}
    group = kinds(tmp_path, tokenizer, [row], "groupwise")[0]
    alone = kinds(tmp_path, tokenizer, [{**row, "completions": ["he", " x"]}], "groupwise")[0]
    assert len(group.prompt) < len(alone.prompt)
    assert tokenizer.decode(group.responses[1]) == " tea</s>"
    assert tokenizer.decode(group.responses[0]) == " the</s>"


def test_dropped_and_cut_responses_are_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    full = kinds(tmp_path, tokenizer, scored(12), "groupwise")
    room = int(full.padded_lengths.max()) - 1
    cut = kinds(tmp_path, tokenizer, scored(12), "groupwise", max_length=room)
    assert cut.counts["responses_cut"] == sum(
        len(group.prompt) + len(response) > room
        for group in map(full.__getitem__, range(12))
        for response in group.responses
    )
    empty = {"prompt": "tea", "completions": [" a", ""], "scores": [1, 0]}
    some = kinds(tmp_path, tokenizer, [*scored(3), empty], "groupwise", add_eos=False)
    assert some.summary().startswith("3 of 4 groups from ")
    assert some.summary().endswith(
        "dropped 1 (no completion left: 1); cut to max_length: 0 responses, 0 prompts"
    )
    single = kinds(tmp_path, tokenizer, labelled(6), "pointwise")
    assert single.summary().endswith("0 responses, 0 prompts; 4 desirable, 2 undesirable")
    long = {"prompt": "tea " * 50, "completion": " a", "label": True}
    with pytest.raises(DataError, match="no response is left to train on"):
        kinds(tmp_path, tokenizer, [long], "pointwise", max_length=8)


def test_kinds_do_not_share_what_is_cached(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    pairs = load(tmp_path, tokenizer, rows(4))
    apart = kinds(tmp_path, tokenizer, rows(4), "pointwise")
    assert (len(pairs), len(apart)) == (4, 8)
    assert pairs.fingerprint != apart.fingerprint
    again = load(tmp_path, tokenizer, rows(4))
    assert (again.fingerprint, again.labels) == (pairs.fingerprint, pairs.labels)


def test_changed_labels_change_their_hash_alone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    base = kinds(tmp_path, tokenizer, labelled(4), "pointwise")
    flipped = [{**row, "label": not row["label"]} for row in labelled(4)]
    other = kinds(tmp_path, tokenizer, flipped, "pointwise")
    assert other.fingerprint == base.fingerprint and other.labels != base.labels


@pytest.mark.parametrize(
    ("name", "kind", "labels"),
    [("alpacaeval_binary", "pointwise", 1610), ("alpacaeval_scalar", "groupwise", 3220)],
)
def test_real_responses(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    real_data: Path,
    name: str,
    kind: Any,
    labels: int,
) -> None:
    """Real responses decode to the original text; 40 rows, because they are long."""
    lines = (real_data / f"{name}.jsonl").read_text().splitlines()
    originals = [json.loads(line) for line in lines]
    assert sum(len(row.get("scores", [0])) for row in originals) == labels
    dataset = kinds(tmp_path, tokenizer, originals[:40], kind, max_length=100_000)
    assert len(dataset) == 40 and dataset.counts["responses_cut"] == 0
    for i, row in enumerate(originals[:40]):
        group = dataset[i]
        texts = row["completions"] if kind == "groupwise" else [row["completion"]]
        for text, response in zip(texts, group.responses, strict=True):
            decoded = tokenizer.decode([*group.prompt, *response])
            assert decoded == row["prompt"] + text + "</s>"
        assert group.labels == tuple(row["scores"] if kind == "groupwise" else [row["label"]])


def test_real_pairs(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, real_data: Path) -> None:
    """Real rows decode to a prompt and two responses with the original text."""
    config = Data(train=str(real_data / "hh_harmless_pairs.jsonl"), cache=str(tmp_path))
    dataset = load_groups(config.train, tokenizer, config)
    assert dataset.counts["found"] == 1200
    lines = Path(config.train).read_text().splitlines()
    for i in range(0, len(dataset), 97):
        pair = dataset[i]
        text = json.loads(lines[pair.row - 1])["chosen"]
        decoded = tokenizer.decode([*pair.prompt, *pair.responses[0]]).removesuffix("</s>")
        assert text.startswith(decoded)
