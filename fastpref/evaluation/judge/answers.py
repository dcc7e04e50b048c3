"""Answers of a model, read from a file of `fastpref sample` or of AlpacaEval's form."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from fastpref.data.prompts import prompt_of
from fastpref.data.readers import DataError, Record, kind_of, read_rows

RESPONSES = ("completion", "output", "response")
IDS = ("id", "question_id", "uid")


class Question(NamedTuple):
    """A prompt, and the fields of its row that results refer to."""

    row: int  # row of the source, from 1
    prompt: Any  # text or messages
    text: str  # the prompt as the judge reads it
    id: str | None
    category: str | None
    difficulty: float | None  # `instruction_difficulty`, for the length-controlled win rate

    @property
    def name(self) -> str:
        """Row and first words of the prompt, for messages."""
        words = " ".join(self.text.split())
        return f"row {self.row} ({words if len(words) <= 60 else words[:57] + '…'})"


class Answer(NamedTuple):
    """A response of one model to a prompt."""

    question: Question
    text: str


class Answers(NamedTuple):
    """Answers of one model, in the order of the file."""

    source: str
    generator: str  # name of the model
    rows: list[Answer]


def read_answers(source: str, name: str | None = None) -> Answers:
    """Read `prompt` or `instruction`, and `completion`, `output` or `response`, of every row.

    name: of the model; the default is the `generator` of the rows, or the name of the file.

    Raises DataError if a row has no prompt or no response, or if the rows have several generators.
    """
    answers: list[Answer] = []
    generators: dict[str, int] = {}
    for number, row in read_rows(source):
        try:
            answers.append(Answer(question_of(row, number), _response(row)))
        except DataError as error:
            raise DataError(f"{source}, row {number}: {error}") from None
        generator = row.get("generator")
        if generator is not None:
            generators.setdefault(str(generator), number)
    if not answers:
        raise DataError(f"{source}: has no rows; use a file with answers")
    if name is None and len(generators) > 1:
        raise DataError(
            f"{source}: holds answers of several generators ({', '.join(generators)}); use one "
            "file per model, or name the model with --names"
        )
    return Answers(source, name or next(iter(generators), Path(source).stem), answers)


def read_questions(source: str) -> list[Question]:
    """Read the prompts of a file in any format of the trainer, or with `instruction`.

    Raises DataError if a row has no prompt.
    """
    questions: list[Question] = []
    for number, row in read_rows(source):
        try:
            questions.append(question_of(row, number))
        except DataError as error:
            raise DataError(f"{source}, row {number}: {error}") from None
    if not questions:
        raise DataError(f"{source}: has no rows; use data with at least one prompt")
    return questions


def question_of(row: Record, number: int) -> Question:
    """Prompt of a row. AlpacaEval's `input` follows the instruction after an empty line."""
    if row.get("prompt") is not None:
        prompt: Any = row["prompt"]
    elif row.get("instruction") is not None:
        parts = (row["instruction"], row.get("input"))
        prompt = "\n\n".join(_text(part, "instruction") for part in parts if part)
    else:
        prompt = prompt_of(row).prompt
    ids = (row[name] for name in IDS if row.get(name) is not None)
    identity, category = next(ids, None), row.get("category")
    return Question(
        number,
        prompt,
        prompt_text(prompt),
        None if identity is None else str(identity),
        None if category is None else str(category),
        _difficulty(row.get("instruction_difficulty")),
    )


def prompt_text(prompt: Any) -> str:
    """A prompt as one text: a single message of the user alone, other messages under their roles.

    Raises DataError for anything but text or messages with text.
    """
    if isinstance(prompt, str):
        return prompt
    messages = prompt if isinstance(prompt, list) else None
    if not messages or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"prompt must be text or a list of messages, got {kind_of(prompt)}")
    contents = [_text(message.get("content"), "content of a message") for message in messages]
    if len(messages) == 1 and messages[0].get("role") == "user":
        return contents[0]
    roles = [message.get("role") for message in messages]
    return "\n\n".join(f"[{role}]\n{text}" for role, text in zip(roles, contents, strict=True))


def _response(row: Record) -> str:
    names = [name for name in RESPONSES if row.get(name) is not None]
    if len(names) != 1:
        raise DataError(
            f"needs exactly one of {', '.join(RESPONSES)}, got {', '.join(names) or 'none'}; "
            f"columns found: {', '.join(map(str, row)) or 'none'}"
        )
    response = row[names[0]]
    if isinstance(response, list):
        if len(response) != 1 or not isinstance(response[0], dict):
            raise DataError(f"{names[0]} must be text or a list of one message of the assistant")
        response = response[0].get("content")
    return _text(response, names[0])


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} must be text, got {kind_of(value)}")
    return value


def _difficulty(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise DataError(f"instruction_difficulty must be a number, got {value!r}")
    return float(value)
