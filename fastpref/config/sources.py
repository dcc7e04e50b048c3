"""Sources of data: one path, or several with their parts of an epoch and their columns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from fastpref.config.columns import Columns
from fastpref.config.fields import Name, PathName, PositiveFloat, Section, TemplateName

# Shares written with two digits, such as three times 0.33, may miss 1 by this much.
_ROUNDING = 0.011


def _word(value: str) -> str:
    if not re.fullmatch(r"[\w.-]+", value):
        raise ValueError(f"must be letters, digits and any of _ . -, got {value!r}")
    return value


class Source(Section):
    """One of several sources of data."""

    path: PathName = Field(description="As `data.train` with one source.")
    name: Annotated[str, AfterValidator(_word)] | None = Field(
        None,
        description="Name in metrics, e.g. `rewards/margins/NAME`. Default: the name of the file "
        "or data set, without its folder and extension.",
    )
    weight: PositiveFloat | None = Field(
        None,
        description="Times that each row occurs in an epoch: 2 repeats all rows once, 0.5 leaves "
        "half of them to the next epoch. Default: 1.",
    )
    share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Share of the rows of an epoch, which has as many rows as all sources "
        "together; shares add up to 1. A source with fewer rows than its share is repeated, one "
        "with more leaves the others to the next epoch.",
    )
    split: Name | None = Field(None, description="Split of a Hub data set.")
    columns: Columns | None = Field(None, description="As `data.columns`, for this source.")
    template: TemplateName | None = Field(
        None, description="As `data.chat_template`, for this source."
    )

    @model_validator(mode="after")
    def _one_measure(self) -> Source:
        if self.weight is not None and self.share is not None:
            raise ValueError("share: excludes weight; remove one of them")
        if self.split is not None and Path(self.path).is_file():
            raise ValueError(f"split: is for data sets on the Hub, and {self.path} is a file")
        return self

    @property
    def location(self) -> str:
        """Path, or name of the data set and its split."""
        return self.path if self.split is None else f"{self.path}:{self.split}"

    @property
    def label(self) -> str:
        """`name`, or its default."""
        if self.name is not None:
            return self.name
        name, _, split = self.location.rstrip("/").partition(":")
        return re.sub(r"[^\w.-]+", "-", "-".join(filter(None, (Path(name).stem, split))))


def _as_list(value: Any) -> Any:
    """Return one path as it is, and all other forms as a list of sources.

    The forms are a source, a list of paths or sources, and a mapping of names to either.
    """
    if isinstance(value, dict) and not isinstance(value.get("path"), str):
        value = [_named(str(name), item) for name, item in value.items()]
    elif isinstance(value, dict | Source):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    if not value:
        raise ValueError("must name at least one source, got []")
    return [_as_source(item) for item in value]


def _named(name: str, item: Any) -> dict[str, Any]:
    return {"name": name, **(item if isinstance(item, dict) else {"path": item})}


def _as_source(item: Any) -> Any:
    return {"path": item} if isinstance(item, str) else item


# The tags are no identifiers: messages leave them out of the path of a field.
Sources = Annotated[
    Annotated[PathName, Tag("one path")] | Annotated[list[Source], Tag("several sources")],
    Discriminator(lambda value: "several sources" if isinstance(value, list) else "one path"),
    BeforeValidator(_as_list),
]


def sources_of(value: str | list[Source] | None) -> list[Source]:
    """Return the sources that a field names."""
    if value is None:
        return []
    return [Source(path=value)] if isinstance(value, str) else value


def check_sources(field: str, sources: Sequence[Source]) -> None:
    """Raise ValueError for two sources of a name, or shares that are no shares of a whole."""
    name, count = Counter(source.label for source in sources).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"{field}: {count} sources are named {name}; give each a name of its own with name"
        )
    shares = [source.share for source in sources if source.share is not None]
    if shares and len(shares) < len(sources):
        raise ValueError(f"{field}: some sources have a share; give one to each, or weights to all")
    if shares and abs(sum(shares) - 1) > _ROUNDING:
        raise ValueError(f"{field}: the shares must add up to 1, got {sum(shares):.4g}")
