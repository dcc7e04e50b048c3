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
    "p",
    "margin",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "chosen_weights",
    "rejected_weights",
)


def check_columns(columns: dict[str, str]) -> dict[str, str]:
    """The mapping itself; ValueError for a name that fastpref reads no column of."""
    for name in columns:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS)
            known = ", ".join(near or COLUMNS)
            turned = [own for own, other in columns.items() if other in COLUMNS]
            hint = "; the name of the data set comes second" if name in turned else ""
            raise ValueError(f"{name} is no column of fastpref; use one of {known}{hint}")
    return columns


Columns = Annotated[dict[str, Name], AfterValidator(check_columns)]
