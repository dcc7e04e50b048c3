"""Data that a reward objective cannot learn is refused, and groups that teach nothing are noted."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from fastpref import losses
from fastpref.config import Config, ConfigError
from fastpref.data.dataset import load_groups
from fastpref.training.reward_checks import advise_on_padding, check_rewards
from fastpref.utils.progress import Display
from tests.helpers.data import write_jsonl

MakeConfig = Callable[..., Config]
Row = dict[str, Any]


@pytest.fixture
def notes_of(
    make_config: MakeConfig, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> Callable[..., str]:
    """Notes on rows for an objective, as one line."""

    def check(rows: list[Row], name: str, max_length: int = 64, **options: Any) -> str:
        loss = losses.build(name, **options)
        file = str(write_jsonl(tmp_path / "d.jsonl", rows))
        data = make_config(data__train=file, data__max_length=max_length).data
        shown = io.StringIO()
        display = Display(Console(file=shown, width=1000))
        check_rewards(loss, "train", load_groups(file, tokenizer, data, loss.kind), display)
        return " ".join(shown.getvalue().split())

    return check


def pair(chosen: str, rejected: str, **columns: Any) -> Row:
    return {"prompt": "tea or coffee?", "chosen": chosen, "rejected": rejected, **columns}


def group(*scores: float) -> Row:
    texts = [f" answer {k}" for k in range(len(scores))]
    return {"prompt": "tea?", "completions": texts, "scores": list(scores)}


def label(value: int) -> Row:
    return {"prompt": "tea?", "completion": " yes", "label": value}


def test_equal_responses_are_noted_and_data_of_nothing_else_is_refused(
    notes_of: Callable[..., str],
) -> None:
    equal, other = pair(" tea", " tea"), pair(" tea", " coffee")
    assert notes_of([other, pair(" te", " tea")], "bradley_terry") == ""
    note = notes_of([other, equal, other], "bradley_terry")
    assert note.startswith("note: 1 of 3 pairs have equal responses up to data.max_length, e.g. ro")
    assert "e.g. row 2; they teach nothing, and rounding decides whether they count as" in note
    with pytest.raises(ConfigError, match=r"data.train: the responses of every pair of .* are equ"):
        notes_of([equal, equal], "bradley_terry")
    # Of responses that differ late, the same tokens remain.
    late = pair(" tea and coffee" * 9 + " no", " tea and coffee" * 9 + " yes")
    assert notes_of([late, other], "bradley_terry", max_length=512) == ""
    assert "1 of 2 pairs have equal" in notes_of([late, other], "bradley_terry", max_length=24)


def test_an_order_needs_different_scores(notes_of: Callable[..., str]) -> None:
    tied, single, ordered = group(2, 2, 2), group(1), group(0, 1)
    assert notes_of([ordered, ordered], "plackett_luce") == ""
    note = notes_of([ordered, tied, single], "plackett_luce")
    assert note == (
        "note: 2 of 3 groups have no two different scores, so they have no order to learn"
    )
    with pytest.raises(ConfigError, match=r"loss: plackett_luce learns the order of a group's sc"):
        notes_of([tied, single], "plackett_luce")
    assert notes_of([tied, single], "reward_regression") == ""


def test_labels_of_one_kind_and_negative_margins_are_noted(notes_of: Callable[..., str]) -> None:
    assert notes_of([label(1), label(0)], "label_regression") == ""
    note = "note: there is no {} response; the reward of every response becomes {}"
    assert notes_of([label(1), label(1)], "label_regression") == note.format("undesirable", 1)
    assert notes_of([label(0)], "label_regression") == note.format("desirable", 0)
    margins = [pair(" tea", " no", margin=value) for value in (-1, 0, 0.5)]
    assert notes_of(margins, "bradley_terry") == ""
    said = notes_of(margins, "bradley_terry", offset=1.0)
    assert said.startswith("note: 1 of 3 margins are negative: the reward of rejected may be large")


def test_token_weights_weigh_no_reward(notes_of: Callable[..., str]) -> None:
    weights = {"chosen_weights": [1.0] * 4, "rejected_weights": [1.0] * 4}
    with pytest.raises(ConfigError, match="loss: bradley_terry has no log-probs of tokens to weig"):
        notes_of([pair("abc", "abd", **weights)], "bradley_terry")


@pytest.mark.parametrize(("padding", "is_noted"), [("</s>", True), ("<pad>", False)])
def test_a_classifier_that_passes_over_the_end_is_noted(
    make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast, tiny_llama: str, tmp_path: Path,
    padding: str, is_noted: bool,
) -> None:  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    model.config.pad_token_id = tokenizer.convert_tokens_to_ids(padding)
    model.save_pretrained(tmp_path / "m")
    config = make_config(model__path=str(tmp_path / "m"), loss="bradley_terry")
    data = load_groups(config.data.train, tokenizer, config.data)
    shown = io.StringIO()
    display = Display(Console(file=shown, width=1000))
    advise_on_padding(config.build_loss(), config.model, data, display)
    assert ("ends the sequences. transformers passes over it" in shown.getvalue()) is is_noted
    advise_on_padding(losses.build("dpo"), config.model, data, display)
    assert shown.getvalue().count("note") == is_noted
