"""Parts of the benchmark on a real model that need none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.real_model.bench import mean, summary
from benchmarks.real_model.pairs import conversation, conversations, transcript
from benchmarks.real_model.peer import largest_difference
from benchmarks.real_model.tables import objectives_table, trl_table

TRANSCRIPT = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Tea?\n\nAssistant: "


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_transcript_becomes_turns() -> None:
    assert transcript(TRANSCRIPT + "Yes.") == [
        turn("user", "Hi."),
        turn("assistant", "Hello."),
        turn("user", "Tea?"),
        turn("assistant", "Yes."),
    ]
    assert transcript("no turns") == []


def test_a_pair_of_transcripts_has_their_common_prompt() -> None:
    pair = {"chosen": TRANSCRIPT + "Yes.", "rejected": TRANSCRIPT + "No."}
    assert conversation(pair) == {
        "prompt": [turn("user", "Hi."), turn("assistant", "Hello."), turn("user", "Tea?")],
        "chosen": [turn("assistant", "Yes.")],
        "rejected": [turn("assistant", "No.")],
    }


@pytest.mark.parametrize(
    "rejected", [TRANSCRIPT + " ", "\n\nHuman: Other?\n\nAssistant: No.", "no turns"]
)
def test_a_pair_without_a_common_prompt_or_an_answer_is_left_out(rejected: str) -> None:
    assert conversation({"chosen": TRANSCRIPT + "Yes.", "rejected": rejected}) is None


class Words:
    """A tokenizer whose tokens are words; its template adds a word to every turn."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        text = " ".join(f"{m['role']} {m['content']}" for m in messages)
        return text + " assistant" * add_generation_prompt

    def __call__(self, text, add_special_tokens):
        return {"input_ids": text.split()}


def test_pairs_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "a b", "chosen": "c", "rejected": "d"},  # 3 + 2 tokens
        {"prompt": "a b", "chosen": "c", "rejected": "d e f"},  # 3 + 4 tokens
        {"prompt": "a b c d", "chosen": "c", "rejected": "d"},  # 5 + 2 tokens
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def kept(whole: bool, max_length: int) -> list[int]:
        fitting = conversations(path, Words(), max_length, whole)
        return [rows.index({k: v[0]["content"] for k, v in row.items()}) for row in fitting]

    assert kept(whole=True, max_length=5) == [0]
    assert kept(whole=True, max_length=7) == [0, 1, 2]
    # Half of the tokens must be left to the response: prompts have 4, 4 and 6 with its opening.
    assert kept(whole=False, max_length=8) == [0, 1]


def test_held_out_metrics_and_their_standard_errors() -> None:
    before = torch.tensor([[-4.0, -2.0], [-2.0, -3.0]], dtype=torch.float64)
    after = torch.tensor([[-3.0, -6.0], [-2.0, -7.0]], dtype=torch.float64)
    lengths = torch.tensor([[4.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    result = summary(before, after, lengths)
    values = {name: metric["value"] for name, metric in result.items() if name != "pairs"}
    assert result["pairs"] == 2
    assert values == {
        "accuracy_before": 0.5,
        "accuracy": 1.0,
        "accuracy_gain": 0.5,
        "accuracy_per_token_before": 1.0,
        "accuracy_per_token": 1.0,
        "accuracy_per_token_gain": 0.0,
        "reward_accuracy": 1.0,
        "log_ratio_margin": 4.5,  # of (1 + 4) and (0 + 4)
        "chosen_change": 0.5,
        "rejected_change": -4.0,
    }
    assert result["accuracy_gain"]["standard_error"] == pytest.approx(0.5)
    assert mean(torch.tensor([1.0, 2.0, 3.0])) == {
        "value": 2.0,
        "standard_error": pytest.approx(3**-0.5),
    }


def test_curves_are_compared_step_by_step() -> None:
    ours = {"loss": [0.7, 0.6], "rewards/margins": [0.0, 0.1], "logps/chosen": [-9.0, -8.0]}
    theirs = {**ours, "loss": [0.7, 0.5], "logps/chosen": [-9.5, -8.25]}
    assert largest_difference(ours, theirs) == pytest.approx(
        {"loss": 0.1, "rewards/margins": 0.0, "logps/chosen": 0.5}
    )
    with pytest.raises(ValueError, match="shorter"):
        largest_difference(ours, {**theirs, "loss": [0.7]})


def test_tables_have_a_row_for_each_run() -> None:
    one = torch.tensor([[-2.0, -3.0], [-2.0, -1.0]], dtype=torch.float64)
    run = {"held_out": summary(one, one - 1, torch.ones_like(one))}
    report = {"objectives": {"runs": {"dpo": run, "simpo": run}}}
    lines = objectives_table(report).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "HH harmless: dpo",
        "HH harmless: simpo",
    ]
    assert "0.500 ± 0.500" in lines[2] and "−1.00 ± 0.00" in lines[2]
    both = trl_table({"trl": {"TRL": run, "fastpref": run}}).splitlines()
    assert [line.split("|")[1].strip() for line in both[2:]] == ["fastpref", "TRL"]
