"""Data of a seed: three parts, of which the start model sees one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from fastpref.data.synthetic import graded
from fastpref.reproduce import data
from fastpref.reproduce.claims import EXAMPLES
from fastpref.reproduce.sizes import SIZES
from fastpref.utils.errors import UserError

SIZE = replace(SIZES["quick"], warm_up=20, train=200, held_out=30, per_prompt=2)
PARTS = data.groups_of(SIZE, 0, None)
KINDS = [*data.SEMANTIC, *data.KINDS]


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def responses(part: list[dict[str, object]]) -> set[tuple[object, str]]:
    """The responses of rows of any kind, each with its prompt."""
    texts = set()
    for row in part:
        values = [row[k] for k in ("chosen", "rejected", "completion") if k in row]
        texts |= {(row["prompt"], str(t)) for t in [*values, *row.get("completions", [])]}  # type: ignore[misc]
    return texts


def test_one_in_a_hundred_of_a_label_is_left() -> None:
    few = data.rare(graded.groups(300, seed=0), label=True)
    assert sum(row["label"] for row in few) == 3
    assert sum(not row["label"] for row in few) == 300


@pytest.mark.parametrize("kind", KINDS)
def test_the_warm_up_has_no_response_that_is_trained_on_or_held_out(
    kind: str, tmp_path: Path
) -> None:
    data.write(tmp_path, kind, 0, PARTS)
    paths = data.files(tmp_path, kind)
    warm_up, train, held_out = (rows(path) for path in paths[:3])
    assert warm_up and train and held_out
    assert not responses(warm_up) & responses(train)
    assert not responses(warm_up) & responses(held_out)
    assert rows(paths.eval) == held_out[:100]
    if kind in data.SEMANTIC:  # its prompts are few; the words compared are what must differ
        contrasts = [{tuple(sorted(row["words"])) for row in part} for part in (train, held_out)]  # type: ignore[call-overload]
        assert not contrasts[0] & contrasts[1]
    else:
        prompts = [{row["prompt"] for row in part} for part in (warm_up, train, held_out)]
        assert not prompts[0] & prompts[1] and not prompts[2] & (prompts[0] | prompts[1])


def test_the_warm_up_of_semantic_pairs_has_no_preference(tmp_path: Path) -> None:
    """Every word, and every stand-in, is as often chosen as rejected."""
    data.write(tmp_path, "semantic", 0, PARTS)
    warm_up = rows(data.files(tmp_path, "semantic").warm_up)
    assert sorted(str(row["chosen"]) for row in warm_up) == sorted(
        str(row["rejected"]) for row in warm_up
    )


@pytest.mark.parametrize("size", ["cores", "gpu"])
def test_sizes_with_verdicts_hold_out_enough_pairs(size: str, tmp_path: Path) -> None:
    for kind in ("pairs", *data.SEMANTIC):
        data.write(tmp_path, kind, 0, data.groups_of(SIZES[size], 0, None))
        assert len(rows(data.files(tmp_path, kind).held_out)) >= EXAMPLES


def test_the_papers_probabilities_tell_nothing_of_each_other(tmp_path: Path) -> None:
    """Of two templates of one contrast, p and its order agree only by chance."""
    agreement = {}
    for kind in data.SEMANTIC:
        data.write(tmp_path, kind, 0, PARTS)
        first: dict[tuple[str, ...], list[str]] = {}
        for row in rows(data.files(tmp_path, kind).train):
            words = [str(word) for word in row["words"]]  # type: ignore[attr-defined]
            first.setdefault(tuple(sorted(words)), []).append(words[0])
        pairs = [chosen[0] == chosen[1] for chosen in first.values()]
        agreement[kind] = sum(pairs) / len(pairs)
    assert 0.4 < agreement["semantic"] < 0.6
    assert agreement["semantic, utilities"] > 0.9


def test_rows_of_a_prompt_have_responses_of_their_own() -> None:
    first, second = PARTS.train[:2]
    assert first["prompt"] == second["prompt"]
    assert not {*first["completions"]} & {*second["completions"]}


def test_a_tokenizer_is_not_trained_on_held_out_rows(tmp_path: Path) -> None:
    data.write(tmp_path, "pairs", 0, PARTS)
    held_out = data.files(tmp_path, "pairs").held_out
    held_out.write_text(json.dumps({"prompt": "xylophone " * 50, "chosen": "a", "rejected": "b"}))
    folder = data.train_tokenizer(tmp_path, 500)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert len(tokenizer.tokenize("carefully")) < 4
    assert len(tokenizer.tokenize("xylophone")) > 4


def test_files_of_users_are_groups_with_room_for_a_response(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    generated = graded.groups(300, seed=0)
    path.write_text("".join(json.dumps(row) + "\n" for row in generated))
    assert data.read(path, 128, 100) == generated[:100]
    parts = data.groups_of(replace(SIZE, train=250, per_prompt=1), 0, path)
    assert [len(part) for part in parts] == [45, 105, 150]
    with pytest.raises(
        UserError, match=r"--data: .*expected 50 groups .* at most 2 characters, got 0"
    ):
        data.read(path, 1, 100)
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(UserError, match="expected JSON lines with prompt, completions and scores"):
        data.read(path, 128, 100)
