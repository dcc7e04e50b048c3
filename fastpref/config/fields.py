"""Types of config fields, and the base class of sections."""

from __future__ import annotations

import math
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic.fields import FieldInfo

from fastpref.utils.errors import shown
from fastpref.utils.paths import expand


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"must be finite, got {value}")
    return value


def _countable(value: int) -> int:
    if value >= 2**63:
        raise ValueError(f"must be < 2^63, got {shown(value)}")
    return value


def _name(value: str) -> str:
    """Validate the name of a file, a folder or a model, which has to be usable as a path."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"is not valid Unicode at character {error.start}, got {value!r}; fix it"
        ) from None
    if not value.strip() or "\0" in value:
        raise ValueError(f"must be a name, got {value!r}")
    return value


Name = Annotated[str, AfterValidator(_name)]


# A file, a folder, or the name of something on the Hub, which has neither `~` nor `$`.
PathName = Annotated[str, AfterValidator(_name), AfterValidator(expand)]


# A template itself has braces, and its file has a path.
TemplateName = Annotated[
    str, AfterValidator(_name), AfterValidator(lambda text: text if "{" in text else expand(text))
]


PositiveFloat = Annotated[float, Field(gt=0), AfterValidator(_finite)]


NonNegativeFloat = Annotated[float, Field(ge=0), AfterValidator(_finite)]


Fraction = Annotated[float, Field(ge=0, lt=1)]


PositiveInt = Annotated[int, Field(gt=0), AfterValidator(_countable)]


NonNegativeInt = Annotated[int, Field(ge=0), AfterValidator(_countable)]


def _word_or_int(*words: str, at_least: int) -> BeforeValidator:
    """Validator of one of some words or a whole number, with one message for both."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value.isdecimal() and value.isascii():
            value = int(value)
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if value in words or (is_int and at_least <= value):
            return _countable(value) if is_int else value
        raise ValueError(
            f"must be {', '.join(words)} or a whole number >= {at_least}, got {shown(value)}"
        )

    return BeforeValidator(check)


TokenBudget = Annotated[Literal["auto"] | int, _word_or_int("auto", at_least=1)]


Checkpointing = Annotated[
    Literal["auto", "full", "selective", "off"] | int,
    _word_or_int("auto", "full", "selective", "off", at_least=0),
]


class Section(BaseModel):
    """Base class of sections: immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _as_people_write(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        return {key: _plain(fields[key], v) if key in fields else v for key, v in values.items()}


def _plain(field: FieldInfo, value: Any) -> Any:
    """Return None for `none` and `false` where a field can be null, and no number for a boolean."""
    kinds = _kinds(field.annotation)
    if NoneType in kinds and bool not in kinds and "none" not in kinds:
        is_none = value is False or (isinstance(value, str) and value.lower() == "none")
        if is_none:
            return None
    # In Python, and so in pydantic, True is the number 1.
    if kinds <= {int, float, NoneType}:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, list | tuple):
            return [str(item).lower() if isinstance(item, bool) else item for item in value]
    return value


def _kinds(annotation: Any) -> set[Any]:
    """Return the classes and literals of an annotation: {int, None} of `PositiveInt | None`."""
    if get_origin(annotation) is Annotated:
        return _kinds(annotation.__origin__)
    inner = get_args(annotation)
    return set().union(*map(_kinds, inner)) if inner else {annotation}
