"""Samples of a round: shards that survive a kill, and pairs of scored samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from fastpref import distributed
from fastpref.data.pairs import Recipe
from fastpref.data.prompts import Prompt, prompt_of
from fastpref.model.generate import Sampling
from fastpref.rounds.artifacts import RoundFiles, Row
from fastpref.rounds.pairing import groups_of, pair
from fastpref.rounds.sampling import Draw, Drawn, Place, Request, TransformersEngine, sample
from fastpref.utils.progress import Display


class Counting:
    """Engine that draws one token, in shards of two, and counts what it has drawn."""

    def __init__(self) -> None:
        self.drawn: list[Place] = []

    def draw(
        self, requests: Sequence[Request], complete: AbstractSet[Place]
    ) -> Iterator[list[Drawn]]:
        missing = [request for request in requests if request.place not in complete]
        for start in range(0, len(missing), 2):
            shard = missing[start : start + 2]
            self.drawn += [request.place for request in shard]
            yield [Drawn(r.place, [10 + r.seed % 50], False) for r in shard]


@pytest.fixture
def draw(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Draw:
    texts = ["tea or coffee?", "river?", "bread or cheese?"]
    prompts = [
        Prompt(
            k + 1, prompt_of({"prompt": text}), tokenizer(text, return_tensors="np").input_ids[0]
        )
        for k, text in enumerate(texts)
    ]
    return Draw(RoundFiles(tmp_path, 1), "samples", "key", prompts, 3, seed=5)


def test_samples_go_on_after_a_torn_line(draw: Draw, tokenizer: PreTrainedTokenizerFast) -> None:
    display, calls = Display(Console(quiet=True)), 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    first, second = Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        sample(draw, lambda: first, tokenizer, display, stop)
    partial = draw.files.path("samples", "key").with_suffix(".partial")
    partial.write_text(partial.read_text()[:-4])
    rows = sample(draw, lambda: second, tokenizer, display, lambda: None)
    # Six were drawn; the line of the last is torn.
    assert first.drawn[:5] + second.drawn == [(k // 3, k % 3) for k in range(9)]
    assert not partial.exists()
    assert [len(row["tokens"]) for row in rows] == [3, 3, 3]
    assert rows == sample(draw, Counting, tokenizer, display, lambda: None)


def sampled(texts: str, prompt: int, *tokens: list[int]) -> Row:
    return {
        "prompt": f"prompt {prompt}",
        "completions": list(texts),
        "prompt_tokens": [prompt],
        "tokens": list(tokens),
    }


SAMPLES = [
    sampled("abc", 1, [4], [5, 6], [7]),
    sampled("aab", 2, [4], [4], [5]),
    sampled("abc", 3, [4], [5], [7]),
]
SCORES = [[0.5, 2.0, 1.0], [1.0, 1.0, 0.0], [3.0, 3.0, 3.0]]


def test_pairs_keep_the_numbers_of_their_samples(tmp_path: Path) -> None:
    files = RoundFiles(tmp_path, 1)
    pairs = pair(files, "k", SAMPLES, SCORES, Recipe("best-worst"))
    assert [(row["group"], row["samples"]) for row in pairs.rows] == [(0, [1, 0]), (1, [0, 2])]
    assert pairs.left_out == {"equal scores": 1}
    assert pair(files, "k", [], [], Recipe("best-worst")) == pairs
    every = pair(files, "all", SAMPLES, SCORES, Recipe("all-pairs", min_gap=0.75))
    assert sorted(row["samples"] for row in every.rows if row["group"] == 0) == [[1, 0], [1, 2]]


def test_groups_have_the_sampled_tokens(tmp_path: Path) -> None:
    rows = pair(RoundFiles(tmp_path, 1), "k", SAMPLES, SCORES, Recipe("best-worst")).rows
    pairs = groups_of("pairwise", tmp_path, SAMPLES, SCORES, rows, True, "s")
    assert [r.tolist() for r in pairs[0].responses] == [[5, 6], [4]] and pairs[0].margin == 1.5
    single = groups_of("pointwise", tmp_path, SAMPLES, SCORES, rows, False, "s")
    assert [(single[k].responses[0].tolist(), single[k].labels) for k in range(2)] == [
        ([5, 6], (1.0,)),
        ([4], (0.0,)),
    ]
    groups = groups_of("groupwise", tmp_path, SAMPLES, SCORES, rows, False, "s")
    assert len(groups) == 2 and groups[0].labels == (0.5, 2.0, 1.0)


class FakePolicy:
    """Draws a token for each prompt, its own first one, and keeps the seeds of its batches."""

    def __init__(self, sharded: bool) -> None:
        self.sharded = sharded
        self.seeds: list[int] = []

    def generate(self, prompts: list[list[int]], ends: Any, sampling: Sampling) -> list[list[int]]:
        self.seeds.append(sampling.seed)
        return [[prompt[0]] for prompt in prompts]


@pytest.mark.parametrize(("sharded", "last"), [(True, [4, 4, 4]), (False, [4])])
def test_ranks_draw_whole_batches(
    monkeypatch: pytest.MonkeyPatch, sharded: bool, last: list[int]
) -> None:
    """Of five batches of two, the third is complete, and sharded weights need all in each pass."""
    requests = [Request((k, 0), [7, 7], seed=k // 2) for k in range(10)]
    of_rank = []
    for rank in range(3):
        policy: Any = FakePolicy(sharded)
        monkeypatch.setattr(distributed, "world_size", lambda: 3)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "gather_objects", lambda own: [own or [[7], [7]]] * 3)
        engine = TransformersEngine(policy, set(), Sampling(batch_size=2))
        shards = engine.draw(requests, {(4, 0), (5, 0)})
        assert [one.place[0] for shard in shards for one in shard] == [0, 1, 2, 3, 6, 7, 8, 9]
        of_rank.append(policy.seeds)
    assert [seeds[0] for seeds in of_rank] == [0, 1, 3]
    assert [seeds[1] for seeds in of_rank if len(seeds) > 1] == last
