"""User-facing exceptions and helpers for their messages."""


class UserError(ValueError):
    """Invalid user input: the command line prints the message in one line and exits with code 2.

    Any other exception that reaches the command line is a bug in fastpref and shows a traceback.
    """

    should_print = True  # False if another rank prints the same message


class ModelError(UserError):
    """A model or tokenizer cannot be loaded, or fastpref cannot compute the model's log-probs."""


def cannot_load(field: str, source: str, error: BaseException) -> str:
    """Message of a ModelError for an exception of another library."""
    reason = first_line(error)
    # What the Hub's client says of a path.
    if reason.startswith("Repo id must "):
        reason = "no such folder, and no name of the Hub"
    return f"{field}: cannot load {source}: {reason}; fix it or use another"


def shown(value: object) -> str:
    """Format a value as Python does, shortened to fit into one line."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:150]}… ({len(text):,} characters)"


def first_line(error: BaseException) -> str:
    """First line of another library's exception, shortened; two lines if the first ends in ":"."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    lines = lines[:2] if lines[0].endswith(":") else lines[:1]
    return " ".join(line.strip() for line in lines)[:300]


def of_file(error: OSError) -> str:
    """Message about a file that cannot be read or written, such as on a full disk."""
    return f"{error.filename or 'file'}: {error.strerror or error}; check path and disk"


# Names in the errors of torch and Python when memory runs out.
_NO_MEMORY = ("OutOfMemoryError", "MemoryError", "DefaultCPUAllocator")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python says that memory ran out."""
    return any(words in f"{type(error).__name__} {error}" for words in _NO_MEMORY)
