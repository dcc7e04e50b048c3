"""The template that a config names, its variables and its date, and what is in the cache's key."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastpref import config as configs
from fastpref.config import ConfigError, Data, Model
from fastpref.data import template_source
from fastpref.data.dataset import GroupDataset, load_groups, tokenizer_fingerprint
from fastpref.data.readers import DataError
from fastpref.data.template_source import template_fingerprint, with_template
from fastpref.data.tokenizers import tokenizer_of
from tests.helpers.chat_templates import message, scored, template
from tests.helpers.data import rows, write_jsonl

PAIR = {
    "prompt": [message("user", "Which tea?")],
    "chosen": [message("assistant", "Black tea, of course.")],
    "rejected": [message("assistant", "None at all, thanks.")],
}
INLINE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
DATED = "{{ strftime_now('%d %b %Y') + '\n' }}" + INLINE


def load(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> GroupDataset:
    path = tmp_path / "d.jsonl"
    if not path.exists():
        write_jsonl(path, [PAIR])
    config = Data(train=str(path), cache=str(tmp_path / "cache"), **options)
    return load_groups(config.train, tokenizer, config)


def test_a_template_is_a_file_a_folder_a_text_or_a_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, tiny_llama: str
) -> None:
    (tmp_path / "mine.jinja").write_text(INLINE, "utf-8-sig")
    of_file = scored(tokenizer, PAIR, chat_template=str(tmp_path / "mine.jinja"))
    assert of_file == scored(tokenizer, PAIR, chat_template=INLINE)
    assert of_file[:2] == ("user: Which tea?\nassistant: ", "Black tea, of course.\n")
    chatml = scored(tokenizer, PAIR)
    assert scored(tokenizer, PAIR, chat_template="chatml") == chatml
    assert scored(tokenizer, PAIR, chat_template=tiny_llama) == chatml
    named = with_template(tokenizer, Data(train="x", chat_template="chatml"))
    named.chat_template = {"default": INLINE, "short": str(tokenizer.chat_template)}
    assert scored(named, PAIR) == of_file
    assert scored(named, PAIR, chat_template="short") == chatml
    chosen = with_template(named, Data(train="x", chat_template="short"))
    assert scored(chosen, PAIR) == scored(chosen, PAIR, chat_template="short") == chatml


def test_no_template_and_no_such_variable_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, tiny_llama: str
) -> None:
    match = "data.chat_template: none.jinja is no file, no template and none of the names chatml; "
    with pytest.raises(DataError, match=match):
        scored(tokenizer, PAIR, chat_template="none.jinja")
    with pytest.raises(DataError, match=match):
        tokenizer_of(Model(path=tiny_llama), Data(train="x", chat_template="none.jinja"), "sft")
    (tmp_path / "d.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"data.chat_template: cannot read .*; name a text file: "):
        scored(tokenizer, PAIR, chat_template=str(tmp_path / "d.jinja"))
    data = Data(train="x", chat_template_kwargs={"enable_thinkin": False})
    match = "data.chat_template_kwargs: the chat template has no enable_thinkin; check the name"
    with pytest.raises(DataError, match=match):
        with_template(tokenizer, data)


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "tokenize"])
def test_arguments_that_fastpref_sets_are_no_variables(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    with pytest.raises(ConfigError, match=f"chat_template_kwargs: {name} is set by fastpref"):
        configs.parse_section("data", Data, {"train": "x", "chat_template_kwargs": {name: 1}})
    row = {**PAIR, "chat_template_kwargs": {name: 1}}
    with pytest.raises(DataError, match=f"chat_template_kwargs: {name} is set by fastpref; remove"):
        scored(tokenizer, row)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (3, "chat_template_kwargs must be an object, got int"),
        ([], "chat_template_kwargs must be an object, got a list"),
        ("{oops", "chat_template_kwargs must be an object or its JSON text: "),
    ],
)
def test_variables_of_a_row_are_an_object(
    tokenizer: PreTrainedTokenizerFast, value: Any, match: str
) -> None:
    with pytest.raises(DataError, match=match):
        scored(tokenizer, {**PAIR, "chat_template_kwargs": value})


def test_the_date_is_that_of_the_config_or_today(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = {"chat_template": DATED, "template_date": "2026-01-31"}
    assert scored(tokenizer, PAIR, **fixed)[0].startswith("31 Jan 2026\nuser: Which tea?")
    days = [date(2026, 1, 31), date(2026, 2, 1)]
    datasets = []
    for day in days:
        monkeypatch.setattr(template_source, "today", lambda day=day: day)
        datasets.append(load(tmp_path, tokenizer, chat_template=DATED))
    assert datasets[0].fingerprint != datasets[1].fingerprint
    assert load(tmp_path, tokenizer, **fixed).fingerprint == datasets[0].fingerprint
    says = "; the chat template prints the date 2026-02-01 (data.template_date)"
    assert datasets[1].summary().endswith(says)
    plain = [load(tmp_path, tokenizer, template_date=day) for day in (None, "2026-01-31")]
    assert plain[0].fingerprint == plain[1].fingerprint and "the date" not in plain[0].summary()


@pytest.mark.parametrize("value", ["yesterday", "31.01.2026", "2026-02-30", 3])
def test_a_date_has_year_month_and_day(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.template_date: must be a date such as 2026-01-3"):
        configs.parse_section("data", Data, {"train": "x", "template_date": value})


def test_all_that_changes_tokens_changes_the_key(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(INLINE)
    file = Data(train="x", chat_template=str(path))
    keys = {template_fingerprint(tokenizer, Data(train="x")), template_fingerprint(tokenizer, file)}
    inline = Data(train="x", chat_template=INLINE)
    assert template_fingerprint(tokenizer, inline) in keys  # its text counts, not its name
    path.write_text(INLINE + " ")
    assert template_fingerprint(tokenizer, file) not in keys
    qwen = template("qwen3")
    load(tmp_path, tokenizer, chat_template=qwen)
    load(tmp_path, tokenizer, chat_template=qwen, chat_template_kwargs={"enable_thinking": False})
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2


def test_special_tokens_that_are_split_change_the_key(tmp_path: Path, tiny_llama: str) -> None:
    plain, split = (
        AutoTokenizer.from_pretrained(tiny_llama, split_special_tokens=flag)
        for flag in (False, True)
    )
    assert tokenizer_fingerprint(plain) != tokenizer_fingerprint(split)
    lengths = [load(tmp_path, each).prompt_lengths[0] for each in (plain, split)]
    assert lengths[0] < lengths[1]
    other = AutoTokenizer.from_pretrained(tiny_llama, unk_token="<pad>")
    assert tokenizer_fingerprint(plain) != tokenizer_fingerprint(other)


def test_the_tokenizer_of_a_run_has_the_template_for_its_export(tiny_llama: str) -> None:
    data = Data(train="x", chat_template=INLINE)
    assert tokenizer_of(Model(path=tiny_llama), data, "pairwise").chat_template == INLINE


def test_a_template_for_rows_of_text_is_not_used(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_jsonl(tmp_path / "d.jsonl", rows(2))
    dataset = load(tmp_path, tokenizer, chat_template=INLINE)
    says = "; data.chat_template is not used, as no row is a conversation"
    assert re.search(re.escape(says), dataset.summary())
