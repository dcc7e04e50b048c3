"""What everything that a user can cause is raised as, and its words."""


class UserError(ValueError):
    """Wrong input from a user: the command line prints its one line and exits with code 2.

    Anything else that escapes to the command line is a bug of fastpref and shows a traceback.
    """

    is_news = True  # False where another rank of the run says the same


class ModelError(UserError):
    """A model or a tokenizer that cannot be loaded, or whose log-probs fastpref cannot compute."""


def cannot_load(field: str, source: str, error: BaseException) -> str:
    """The message of a ModelError for what another library refused."""
    return f"{field}: cannot load {source}: {first_line(error)}; mend it or name another"


def shown(value: object) -> str:
    """A value as Python writes it, short enough for one line of ours."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:150]}… ({len(text):,} characters)"


def first_line(error: BaseException) -> str:
    """The message of somebody else's exception, short enough for one line of ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = lines[:2] if lines[0].endswith(":") else lines[:1]
    return " ".join(line.strip() for line in said)[:300]
