"""Read completions with scores, from which preference data is built.

| layout | columns |
|---|---|
| UltraFeedback | `instruction`, `completions`: objects with `response`, `overall_score` and |
| | `annotations`, whose four aspects have a `Rating` |
| groups | `prompt`, `completions`, `scores`, two lists of the same length |
| single completions | `prompt`, `completion` or `response`, and a column with its score; the |
| | rows of a prompt follow each other |
| pairs | as for a pairwise objective; the scores are `p`, by default 1, and 1 - `p` |

The first row decides the layout. A group without usable scores is not an error of the file: it is
read as `LeftOut`, with the reason. Rows that break the layout raise DataError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple, get_args

from fastpref.data.formats import TextGroup, to_groups
from fastpref.data.messages import Messages, text_of
from fastpref.data.readers import DataError, Record, kind_of, read_rows
from fastpref.utils.errors import UserError, shown

Layout = Literal["ultrafeedback", "groups", "single", "pairs"]
UltraFeedbackScore = Literal["overall", "mean"]
ULTRAFEEDBACK_SCORES: tuple[str, ...] = get_args(UltraFeedbackScore)
ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
_LAYOUTS = (
    "instruction, completions (UltraFeedback) | prompt, completions, scores | prompt, completion "
    "or response, and a score | chosen, rejected"
)


class LeftOut(NamedTuple):
    """Reason for which a group of completions is not used."""

    reason: str


NO_SCORE = LeftOut("a completion without a score")
NOT_RATED = LeftOut("a rating is N/A")
WRONG_TEN = LeftOut("overall score 10 with a mean rating of at most 2")
EMPTY = LeftOut("an empty completion")
TOO_FEW = LeftOut("fewer than two completions")
NOT_UNICODE = LeftOut("text that is not valid Unicode")


class ScoredFile:
    """Groups of scored completions in a file or Hub data set, read once by iteration.

    score: of UltraFeedback, `overall` (the default) or `mean`, of the four ratings; of single
        completions, the column of the score, `score` by default; of other layouts, None.
    exclude: pairs of a column and a text; a group with such a row is left out.

    Raises DataError if the file is unreadable, empty or in no layout, UserError if `score` or
    `exclude` does not fit it.
    """

    def __init__(
        self,
        source: str,
        score: str | None = None,
        exclude: Sequence[tuple[str, str]] = (),
        default_split: str = "train",
    ) -> None:
        self.source, self._exclude = source, tuple(exclude)
        rows = read_rows(source, default_split)
        first = next(rows, None)
        if first is None:
            raise DataError(f"{source}: has no rows; use data with at least one prompt")
        self.layout = _layout(source, first[1])
        self.score = _check_score(self.layout, score)
        for column, _ in self._exclude:
            if column not in first[1]:
                raise UserError(
                    f"--exclude: {source} has no column {column}; use one of "
                    f"{', '.join(map(str, first[1]))}"
                )
        self._rows = chain([first], rows)

    def __iter__(self) -> Iterator[TextGroup | LeftOut]:
        """Yield each group, its scores as labels, or the reason for which it is left out."""
        parse = _PARSERS[self.layout]
        for number, rows in _grouped(self.source, self._rows, self.layout):
            try:
                yield self._excluded(rows) or parse(rows, self.score)
            except DataError as error:
                raise DataError(f"{self.source}, row {number}: {error}") from None

    def _excluded(self, rows: list[Record]) -> LeftOut | None:
        for column, text in self._exclude:
            if any(str(row.get(column)) == text for row in rows):
                return LeftOut(f"{column}={text}")
        return None


def characters(response: str | Messages) -> int:
    """Number of characters of a text, or of the text contents of messages."""
    if isinstance(response, str):
        return len(response)
    return sum(len(text_of(message.get("content"))) for message in response)


def _layout(source: str, row: Record) -> Layout:
    layouts: tuple[tuple[Layout, tuple[str, ...]], ...] = (
        ("ultrafeedback", ("instruction", "completions")),
        ("groups", ("prompt", "completions", "scores")),
        ("pairs", ("chosen", "rejected")),
        ("single", ("prompt", "completion")),
        ("single", ("prompt", "response")),
    )
    for layout, columns in layouts:
        if all(name in row for name in columns):
            return layout
    raise DataError(
        f"{source}, row 1: no completions with scores; columns found: "
        f"{', '.join(map(str, row)) or 'none'}; accepted: {_LAYOUTS}"
    )


def _check_score(layout: Layout, score: str | None) -> str:
    """Name of the score to read; UserError if the layout has no such choice."""
    if layout == "ultrafeedback":
        if score is not None and score not in ULTRAFEEDBACK_SCORES:
            raise UserError(
                f"--score: must be {' or '.join(ULTRAFEEDBACK_SCORES)} for UltraFeedback, "
                f"got {score}"
            )
        return score or "overall"
    if layout == "single":
        return score or "score"
    if score is not None:
        raise UserError(
            f"--score: there is no choice for rows of {layout}, got {score}; leave it out"
        )
    return ""


def _grouped(
    source: str, rows: Iterator[tuple[int, Record]], layout: Layout
) -> Iterator[tuple[int, list[Record]]]:
    """Rows of each group and the number of the first; only single completions have several."""
    if layout != "single":
        yield from ((number, [row]) for number, row in rows)
        return
    seen: dict[int, int] = {}  # hash of each prompt, and the number of its first row
    group: list[Record] = []
    start = 1
    for number, row in rows:
        if group and row.get("prompt") != group[0].get("prompt"):
            yield start, group
            group = []
        if not group:
            start = number
            key = hash(json.dumps(row.get("prompt"), sort_keys=True))
            if key in seen:
                raise DataError(
                    f"{source}, row {number}: the prompt of row {seen[key]} again, after others; "
                    "sort the rows by prompt"
                )
            seen[key] = number
        group.append(row)
    yield start, group


def _ultrafeedback(rows: list[Record], score: str) -> TextGroup | LeftOut:
    row = rows[0]
    completions = row.get("completions")
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise DataError(
            "completions must be a list of objects with response and scores, got "
            f"{shown(completions)}"
        )
    read = _overall_score if score == "overall" else _mean_rating
    return _group(
        row.get("instruction"), [c.get("response") for c in completions], map(read, completions)
    )


def _overall_score(completion: Record) -> float | LeftOut:
    value = _number(completion.get("overall_score"))
    if value is None:
        return NO_SCORE
    mean = _mean_rating(completion)
    # The first release gave 10 to responses that the critique had given 1.
    return WRONG_TEN if value == 10 and isinstance(mean, float) and mean <= 2 else value


def _mean_rating(completion: Record) -> float | LeftOut:
    """Mean of the four ratings, or `fine-grained_score` where there are no annotations."""
    annotations = completion.get("annotations")
    if not annotations:
        value = _number(completion.get("fine-grained_score"))
        return NO_SCORE if value is None else value
    if not isinstance(annotations, dict):
        raise DataError(f"annotations must be an object, got {kind_of(annotations)}")
    ratings = [_rating(annotations.get(aspect)) for aspect in ASPECTS]
    values = [_number(rating) for rating in ratings]
    if None in values:
        return NOT_RATED if "N/A" in ratings else NO_SCORE
    return math.fsum(value for value in values if value is not None) / len(values)


def _rating(annotation: Any) -> Any:
    return annotation.get("Rating") if isinstance(annotation, dict) else None


def _scores_column(rows: list[Record], _: str) -> TextGroup | LeftOut:
    row = rows[0]
    scores = row.get("scores")
    if not isinstance(scores, list) or not isinstance(row.get("completions"), list):
        return to_groups(row, "groupwise")[0]  # raises its error
    return _group(row.get("prompt"), row["completions"], map(_score, scores), row)


def _single(rows: list[Record], score: str) -> TextGroup | LeftOut:
    name = "completion" if "completion" in rows[0] else "response"
    for row in rows:
        if score not in row:
            raise DataError(
                f"no column {score}; columns found: {', '.join(map(str, row))}; name the column "
                "of the score with --score"
            )
    scores = (_score(row[score]) for row in rows)
    completions = [row.get(name) for row in rows]
    return _group(rows[0].get("prompt"), completions, scores, rows[0])


def _pair(rows: list[Record], _: str) -> TextGroup | LeftOut:
    pair = to_groups(rows[0], "pairwise", token_weights=False)[0]
    if not all(map(characters, pair.responses)):
        return EMPTY
    p = pair.labels[0] if pair.labels else 1.0
    return pair._replace(labels=(p, 1 - p), reference_logps=None)


_PARSERS: dict[Layout, Callable[[list[Record], str], TextGroup | LeftOut]] = {
    "ultrafeedback": _ultrafeedback,
    "groups": _scores_column,
    "single": _single,
    "pairs": _pair,
}


def _group(
    prompt: Any,
    completions: list[Any],
    scores: Iterator[float | LeftOut],
    columns: Record | None = None,
) -> TextGroup | LeftOut:
    """Group of the columns' values, or the first reason against it.

    columns: a row with those that the chat template reads.
    """
    if len(completions) < 2:
        return TOO_FEW
    values: list[float] = []
    for score in scores:
        if isinstance(score, LeftOut):
            return score
        values.append(score)
    # An empty text, or none at all.
    if any(isinstance(text, str | None) and not (text or "").strip() for text in completions):
        return EMPTY
    if not _is_unicode([prompt, completions]):
        return NOT_UNICODE
    names = ("tools", "chat_template_kwargs")
    template = {name: columns.get(name) for name in names} if columns else {}
    row = {"prompt": prompt, "completions": completions, "scores": values, **template}
    return to_groups(row, "groupwise")[0]


def _score(value: Any) -> float | LeftOut:
    number = _number(value)
    if number is None and not (value is None or isinstance(value, str | float)):
        raise DataError(f"a score must be a number, got {shown(value)}")
    return NO_SCORE if number is None else number


def _number(value: Any) -> float | None:
    """A finite number, also if written as text; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
