"""Types of config fields, and the base class of sections."""

from __future__ import annotations

import math
import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from fastpref.utils.errors import shown


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
    if os.path.expanduser(value).startswith("~"):
        raise ValueError(f"must be a path from a user of this machine, got {value!r}")
    return value


Name = Annotated[str, AfterValidator(_name)]


PositiveFloat = Annotated[float, Field(gt=0), AfterValidator(_finite)]


NonNegativeFloat = Annotated[float, Field(ge=0), AfterValidator(_finite)]


Fraction = Annotated[float, Field(ge=0, lt=1)]


PositiveInt = Annotated[int, Field(gt=0), AfterValidator(_countable)]


NonNegativeInt = Annotated[int, Field(ge=0), AfterValidator(_countable)]


def _word_or_int(*words: str, at_least: int) -> BeforeValidator:
    """Validator of one of some words or a whole number, with one message for both."""

    def check(value: Any) -> Any:
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
