"""`fastpref score`: add the score of every response to rows of preference data."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastpref.data.formats import split_prompt
from fastpref.data.messages import Messages
from fastpref.data.prompt_column import prompt_of
from fastpref.data.prompt_parts import whole_prompt
from fastpref.data.readers import DataError, Record, read_rows
from fastpref.data.tokenize import chunks
from fastpref.evaluation.comparisons import Group, JudgeScorer
from fastpref.evaluation.judge.options import require_device
from fastpref.evaluation.scorers import FunctionScorer, Scorer, model_scorer
from fastpref.utils.atomic_files import replacing
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display

_ROWS = 64  # scored together, so that neighbors of similar length share a batch
# Columns that a chat template would read, and scorers do not.
_TEMPLATE = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Source:
    """A reward model, or a function that the user names, with the options of the model."""

    model: str | None
    function: str | None = None
    batch_size: int = 8
    device: str = "auto"
    dtype: str | None = None
    text: bool = False

    def build(self, display: Display) -> Scorer | JudgeScorer:
        """Load the model or import the function; raises UserError unless there is one of them."""
        if (self.model is None) == (self.function is None):
            raise UserError("score: expected a reward model or --function, one of them")
        if self.function is not None:
            return FunctionScorer(self.function)
        assert self.model is not None
        require_device(self.device, self.dtype)
        return model_scorer(
            self.model, display, self.device, self.dtype, self.batch_size, self.text
        )


class Responses(NamedTuple):
    """Prompt of a row, and its responses."""

    prompt: str | Messages
    texts: list[str]
    columns: tuple[str, ...]  # of the scores: one for each response, or one for a list of them

    def scored(self, row: Record, scores: list[float]) -> Record:
        """The row with columns of its scores; columns of the same names are replaced."""
        if self.columns == ("scores",):
            return {**row, "scores": scores}
        return {**row, **dict(zip(self.columns, scores, strict=True))}


def run(source: Source, data: str, out: Path | None, display: Display, limit: int | None) -> None:
    """Score all rows, and write them with their scores to `out` or to standard output.

    Raises UserError if `out` exists, and DataError for a row without responses.
    """
    if not data:
        raise UserError("--data: is missing; name a file with responses")
    if out is not None and out.exists():
        raise UserError(f"--out: {out} is already there; choose another file")
    scorer = source.build(display)
    compares = isinstance(scorer, JudgeScorer)
    rows = _rows(data, limit, least=2 if compares else 1)
    if not rows:
        raise DataError(f"{data}: has no rows; use data with at least one response")
    if source.model is not None and not compares:
        note_texts(data, rows, source.text, display)
    if out is None:
        for row in scored_rows(scorer, rows, display):
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in scored_rows(scorer, rows, display):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    display.note(str(out))


def note_texts(
    data: str, rows: list[tuple[Record, Responses]], text: bool, display: Display
) -> None:
    """Note how a reward model reads text prompts, if there are any."""
    if any(isinstance(responses.prompt, str) for _, responses in rows):
        how = "as they are, with an EOS" if text else "as messages of a user; see --text"
        display.note(f"{data}: text prompts are scored {how}")


def scored_rows(
    scorer: Scorer | JudgeScorer, rows: list[tuple[Record, Responses]], display: Display
) -> Iterator[Record]:
    """Rows with the scores of their responses, in order."""
    if isinstance(scorer, JudgeScorer):
        groups = [Group(responses.prompt, responses.texts) for _, responses in rows]
        compared = scorer.compare(groups, lambda: None)
        for (row, responses), of_row in zip(rows, compared, strict=True):
            yield responses.scored(row, of_row)
        return
    display.phase("score", len(rows), 0)
    done = 0
    for part in chunks(rows, _ROWS):
        prompts = [r.prompt for _, r in part for _ in r.texts]
        scores = iter(scorer(prompts, [text for _, r in part for text in r.texts]))
        for row, responses in part:
            yield responses.scored(row, [next(scores) for _ in responses.texts])
        done += len(part)
        display.advance(done)


def _rows(data: str, limit: int | None, least: int) -> list[tuple[Record, Responses]]:
    """Rows with their responses; raises DataError for a row with fewer than `least` of these."""
    rows: list[tuple[Record, Responses]] = []
    for number, row in read_rows(data):
        if len(rows) == limit:
            break
        try:
            responses = responses_of(row)
            if len(responses.texts) < least:
                raise DataError(
                    f"a model that compares needs {least} responses of a prompt, got "
                    f"{len(responses.texts)}; use one that scores a response"
                )
            rows.append((row, responses))
        except DataError as error:
            raise DataError(f"{data}, row {number}: {error}") from None
    return rows


def responses_of(row: Record) -> Responses:
    """Prompt and responses of a row of any format; raises DataError if it has none."""
    named, columns = _named_responses(row)
    for name in _TEMPLATE:
        if row.get(name) is not None:
            raise DataError(f"{name}: is not passed to scorers; leave the row out")
    prompt = prompt_of(row)
    if isinstance(prompt, list):  # of `fastpref sample`, whose completions are texts
        named = {name: _message(response) for name, response in named.items()}
    prompt, responses = split_prompt(prompt, named)
    return Responses(
        whole_prompt(row, prompt), [_text(response) for response in responses], columns
    )


def _named_responses(row: Record) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Responses by name, and the columns of their scores."""
    if isinstance(row.get("completions"), list) and row["completions"]:
        named = {f"completions[{k}]": value for k, value in enumerate(row["completions"])}
        return named, ("scores",)
    if row.get("completion") is not None:
        return {"completion": row["completion"]}, ("score",)
    pair = {name: row[name] for name in ("chosen", "rejected") if row.get(name) is not None}
    if len(pair) == 2:
        return pair, ("chosen_score", "rejected_score")
    raise DataError(
        f"no chosen and rejected, completion or completions; columns found: "
        f"{', '.join(map(str, row)) or 'none'}"
    )


def _message(response: Any) -> Any:
    is_text = isinstance(response, str)
    return [{"role": "assistant", "content": response}] if is_text else response


def _text(response: str | Messages) -> str:
    """Text of a response; raises DataError for several messages, which scorers do not take."""
    if isinstance(response, str):
        return response
    content = response[0].get("content")
    if len(response) != 1 or not isinstance(content, str):
        raise DataError("a response must be one message of the assistant with text; leave it out")
    return content
