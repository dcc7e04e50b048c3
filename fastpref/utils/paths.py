"""Paths as people write them: `~` for a home and `$NAME` for a variable of the environment."""

from __future__ import annotations

import os
import re

from fastpref.utils.errors import UserError


def expand(path: str) -> str:
    """Return a path with `~` and `$NAME` or `${NAME}` replaced.

    Raises UserError for a user or a variable that does not exist, unless a file has that name.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded.startswith("~"):
        raise UserError(f"must be a path from a user of this machine, got {path!r}")
    unset = re.search(r"\$(?:[A-Za-z_]\w*|\{[^}]*\}?)", expanded)
    if unset and not os.path.lexists(expanded):
        raise UserError(f"{unset[0]} is not set, got {path!r}; export it, or write the path out")
    return expanded
