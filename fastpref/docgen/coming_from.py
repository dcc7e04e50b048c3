"""Generate `docs/coming-from.md` from the tables of `fastpref.config`.

`python -m fastpref.docgen.coming_from > docs/coming-from.md`
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastpref.config import foreign_keys, renamed
from fastpref.config.foreign_keys import Counterpart
from fastpref.docgen.markdown import table

_BEGINNING = """\
# Coming from another trainer

A config that was written for TRL, torchtitan or axolotl can be ported by running it:
`fastpref train theirs.yaml --dry-run` refuses keys of these trainers in one line, which names the
counterpart of each. The tables below add remarks. Where a table has no counterpart, remove the key.

Four things differ in kind:

- The **batch** is `training.batch_size` pairs per optimizer step, over all ranks and micro-batches.
  A micro-batch is bounded by its tokens (`training.micro_batch_tokens`), so there is no number of
  accumulation steps to choose.
- The **objective** is one section, `loss: {name: dpo, beta: 0.1}`; [its parameters](objectives.md)
  depend on the name.
- The **reference** is the model before training. Its log-probs are computed once and cached, unless
  `reference` says otherwise.
- **Intervals** and the warm-up are numbers of optimizer steps, not shares of a run or an epoch.

This page is generated: `python -m fastpref.docgen.coming_from > docs/coming-from.md`.
"""


def markdown() -> str:
    """Return the page."""
    parts = [_BEGINNING]
    for trainers, keys in foreign_keys.BY_TRAINER.items():
        title = trainers.replace("other", "Other")
        parts += [f"## {title}\n", _counterparts(keys.items())]
    parts += [
        "## torchtitan\n",
        "The sections of its TOML files, written as YAML.\n",
        _counterparts(foreign_keys.TORCHTITAN.items()),
        "Other keys of its sections have no counterpart:\n",
        table(
            ("section", "instead"),
            (
                (f"`{name}`", about.advice)
                for name, about in foreign_keys.TORCHTITAN_SECTIONS.items()
            ),
        )
        + "\n",
        "## Earlier fastpref\n",
        "Earlier names work until the next release; `fastpref train` prints a note for each.\n",
        table(("earlier", "now"), _earlier_names()),
    ]
    return "\n".join(parts) + "\n"


def _counterparts(keys: Iterable[tuple[str, Counterpart]]) -> str:
    rows = ((f"`{key}`", f"`{path}`" if path else "–", advice) for key, (path, advice) in keys)
    return table(("theirs", "here", "remark"), rows) + "\n"


def _earlier_names() -> Iterator[tuple[str, str]]:
    for old, new in {**renamed.SECTIONS, **renamed.KEYS}.items():
        yield f"`{old}`", f"`{new}`"
    for path, names in renamed.VALUES.items():
        for old, new in names.items():
            yield f"`{path}: {old}`", f"`{path}: {new}`"


if __name__ == "__main__":
    print(markdown(), end="")
