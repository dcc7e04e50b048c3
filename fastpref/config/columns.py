"""Names of columns that rows may have, and a mapping from them to those of a data set."""

from __future__ import annotations

import difflib
from typing import Annotated

from pydantic import AfterValidator

from fastpref.config.fields import Name

# As in `fastpref.data.formats` and `fastpref.data.sft`.
COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "label",
    "completions",
    "scores",
    "messages",
    "conversations",
    "tools",
    "chat_template_kwargs",
    "system",
    "system_prompt",
    "input",
    "history",
    "p",
    "margin",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "chosen_weights",
    "rejected_weights",
)


# Columns that a row is no row without.
_NEEDED = ("chosen", "rejected", "completion", "completions", "label", "scores", "messages")
# Columns that are read only to refuse rows whose prompt lacks their text.
_LEFT_OUT = ("input", "history")


def check_columns(columns: dict[str, str | None]) -> dict[str, str | None]:
    """The mapping itself; ValueError for a name that fastpref reads no column of.

    A column that is mapped to null is left out, which needed ones cannot be.
    """
    for name in columns:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS)
            known = ", ".join(near or COLUMNS)
            turned = [own for own, other in columns.items() if other in COLUMNS]
            hint = "; the name of the data set comes second" if name in turned else ""
            raise ValueError(f"{name} is no column of fastpref; use one of {known}{hint}")
        if columns[name] is None and name in _NEEDED:
            raise ValueError(f"{name} cannot be left out; name the column that has it")
        if columns[name] is not None and name in _LEFT_OUT:
            raise ValueError(f"{name} can only be null, to be left out; put its text into prompt")
    return columns


Columns = Annotated[dict[str, Name | None], AfterValidator(check_columns)]
