"""Build pairs, labeled responses or smaller groups from a group of scored completions.

Every draw is the completion with the lowest hash of seed, purpose, prompt and completion. A result
therefore depends neither on the order of the file nor on the order of the completions in a row, and
rows that are added or removed change no other row.

Completions with equal scores are never put in an order: a pair has a score gap above 0, and of
several best completions one is drawn.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from fastpref.data.formats import TextGroup
from fastpref.data.messages import Messages
from fastpref.data.readers import Record
from fastpref.data.scored import LeftOut, characters
from fastpref.utils.errors import UserError

Build = Literal["best-random", "best-worst", "all-pairs", "k-responses", "binary"]
BUILDS: tuple[str, ...] = get_args(Build)
Form = Literal["text", "messages"]
FORMS: tuple[str, ...] = get_args(Form)
EQUAL_SCORES = LeftOut("equal scores")
SMALL_GAP = LeftOut("score gap below --min-gap")
SAME_TEXT = LeftOut("the same text with different scores")


@dataclass(frozen=True)
class Recipe:
    """Rules by which a group of scored completions becomes rows of preference data.

    build: `best-random`, the best against one drawn from the worse ones; `best-worst`;
        `all-pairs`, every pair with different scores; `k-responses`, the best and k - 1 of the
        others, with scores; `binary`, the pair of best-random as two responses with labels.
    min_gap: smallest difference of scores in a pair, or between best and worst of k responses.
    form: of prompt and responses; None leaves them as they are.
    score_range: the scores that become 0 and 1, before all other rules; None leaves scores as they
        are.
    """

    build: Build = "best-random"
    k: int = 4
    min_gap: float = 0.0
    seed: int = 0
    form: Form | None = None
    score_range: tuple[float, float] | None = None


class BuiltRow(NamedTuple):
    """A row of preference data and the numbers of its summary."""

    record: Record
    gap: float  # difference of scores; best minus worst of k responses; NaN of a labeled one
    chosen_characters: float  # of a labeled response: its own
    rejected_characters: float  # mean over the others of k responses; NaN of a labeled response
    label: int = -1  # 1 or 0 of a labeled response
    draw: int = 0  # of a labeled response: the lowest of a class are left to train on


def build_rows(group: TextGroup, recipe: Recipe) -> list[BuiltRow] | LeftOut:
    """Rows built from a group, whose labels are its scores, or the reason why there are none."""
    if recipe.score_range is not None:
        group = _scaled(group, *recipe.score_range)
    return _BUILDERS[recipe.build](group, recipe)


def draw_key(seed: int, purpose: str, *values: Any) -> int:
    """Uniform number of 64 bits that depends on nothing but the arguments, JSON values."""
    text = json.dumps([seed, purpose, *values], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _scores(group: TextGroup) -> tuple[float, ...]:
    assert group.labels is not None
    return group.labels


def _scaled(group: TextGroup, low: float, high: float) -> TextGroup:
    """The group with scores in [0, 1]; UserError for one outside the range."""
    for score in _scores(group):
        if not low <= score <= high:
            raise UserError(f"--score-range: got a score of {score:g}; choose a range that has it")
    return group._replace(labels=tuple((x - low) / (high - low) for x in _scores(group)))


def _lowest(group: TextGroup, recipe: Recipe, purpose: str, candidates: Iterable[int]) -> list[int]:
    """Indices of completions in the order of their draw."""

    def key(index: int) -> int:
        return draw_key(recipe.seed, purpose, group.prompt, group.responses[index])

    return sorted(candidates, key=key)


def _best(group: TextGroup, recipe: Recipe) -> int:
    scores = _scores(group)
    top = [index for index, score in enumerate(scores) if score == max(scores)]
    return top[0] if len(top) == 1 else _lowest(group, recipe, "chosen", top)[0]


def _worse(group: TextGroup, index: int, min_gap: float) -> list[int] | LeftOut:
    """Completions that a completion may be preferred to, or the reason why there are none."""
    scores = _scores(group)
    lower = [k for k, score in enumerate(scores) if score < scores[index]]
    apart = [k for k in lower if _is_enough(scores[index] - scores[k], min_gap)]
    other = [k for k in apart if group.responses[k] != group.responses[index]]
    if other:
        return other
    return SAME_TEXT if apart else SMALL_GAP if lower else EQUAL_SCORES


def _is_enough(gap: float, min_gap: float) -> bool:
    # 0.3 - 0.1 is just below 0.2 in floating point.
    return gap >= min_gap or math.isclose(gap, min_gap, rel_tol=1e-9)


def _best_and_random(group: TextGroup, recipe: Recipe) -> tuple[int, int] | LeftOut:
    best = _best(group, recipe)
    worse = _worse(group, best, recipe.min_gap)
    if isinstance(worse, LeftOut):
        return worse
    return best, _lowest(group, recipe, "rejected", worse)[0]


def _best_random(group: TextGroup, recipe: Recipe) -> list[BuiltRow] | LeftOut:
    indices = _best_and_random(group, recipe)
    return indices if isinstance(indices, LeftOut) else [_pair(group, *indices, recipe.form)]


def _best_worst(group: TextGroup, recipe: Recipe) -> list[BuiltRow] | LeftOut:
    best, scores = _best(group, recipe), _scores(group)
    worse = _worse(group, best, recipe.min_gap)
    if isinstance(worse, LeftOut):
        return worse
    bottom = min(scores[k] for k in worse)
    worst = _lowest(group, recipe, "rejected", (k for k in worse if scores[k] == bottom))[0]
    return [_pair(group, best, worst, recipe.form)]


def _all_pairs(group: TextGroup, recipe: Recipe) -> list[BuiltRow] | LeftOut:
    rows: list[BuiltRow] = []
    for index in range(len(group.responses)):
        worse = _worse(group, index, recipe.min_gap)
        if not isinstance(worse, LeftOut):
            rows += [_pair(group, index, other, recipe.form) for other in worse]
    if rows:
        return rows
    reason = _worse(group, _best(group, recipe), recipe.min_gap)
    return reason if isinstance(reason, LeftOut) else rows


def _k_responses(group: TextGroup, recipe: Recipe) -> list[BuiltRow] | LeftOut:
    count = len(group.responses)
    if count < recipe.k:
        return LeftOut(f"fewer than {recipe.k} completions")
    best, scores = _best(group, recipe), _scores(group)
    rest = _lowest(group, recipe, "rest", (k for k in range(count) if k != best))[: recipe.k - 1]
    gap = scores[best] - min(scores[k] for k in rest)
    if gap == 0 or not _is_enough(gap, recipe.min_gap):
        return SMALL_GAP if gap else EQUAL_SCORES
    kept = sorted([best, *rest])
    record = {
        **_prompt(group, recipe.form),
        "completions": [_response(group.responses[k], recipe.form) for k in kept],
        "scores": [scores[k] for k in kept],
    }
    others = sum(characters(group.responses[k]) for k in rest) / len(rest)
    return [BuiltRow(record, gap, characters(group.responses[best]), others)]


def _binary(group: TextGroup, recipe: Recipe) -> list[BuiltRow] | LeftOut:
    indices = _best_and_random(group, recipe)
    if isinstance(indices, LeftOut):
        return indices
    best, worse = indices
    return [_labeled(group, best, 1, recipe), _labeled(group, worse, 0, recipe)]


def _labeled(group: TextGroup, index: int, label: int, recipe: Recipe) -> BuiltRow:
    response = group.responses[index]
    record = {
        **_prompt(group, recipe.form),
        "completion": _response(response, recipe.form),
        "label": bool(label),
    }
    draw = draw_key(recipe.seed, "keep", group.prompt, response)
    return BuiltRow(record, math.nan, characters(response), math.nan, label, draw)


_BUILDERS: dict[str, Callable[[TextGroup, Recipe], list[BuiltRow] | LeftOut]] = {
    "best-random": _best_random,
    "best-worst": _best_worst,
    "all-pairs": _all_pairs,
    "k-responses": _k_responses,
    "binary": _binary,
}


def _pair(group: TextGroup, chosen: int, rejected: int, form: Form | None) -> BuiltRow:
    scores, responses = _scores(group), group.responses
    record = {
        **_prompt(group, form),
        "chosen": _response(responses[chosen], form),
        "rejected": _response(responses[rejected], form),
        "score_chosen": scores[chosen],
        "score_rejected": scores[rejected],
    }
    lengths = [characters(responses[k]) for k in (chosen, rejected)]
    return BuiltRow(record, scores[chosen] - scores[rejected], *lengths)


def _prompt(group: TextGroup, form: Form | None) -> Record:
    return {"prompt": _as_form(group.prompt, "user", form), **group.template_columns}


def _response(response: str | Messages, form: Form | None) -> str | Messages:
    return _as_form(response, "assistant", form)


def _as_form(value: str | Messages, role: str, form: Form | None) -> str | Messages:
    if isinstance(value, str):
        return [{"role": role, "content": value}] if form == "messages" else value
    if form == "text":
        raise UserError("--form: text cannot hold messages with roles; leave it out")
    return value
