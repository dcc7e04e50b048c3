"""Read preference data from files or the Hub, in the common formats.

A row becomes a `TextGroup`: the prompt of the model and the responses that continue it.

| kind | columns |
|---|---|
| pairwise | `prompt`, `chosen`, `rejected`; without `prompt`, what both begin with in common |
| pointwise | `prompt`, `completion`, `label`, true or 1 for a desirable completion |
| groupwise | `prompt`, `completions`, `scores`, two lists of the same length, at least 1 |

Prompts and responses are text or lists of `{"role", "content"}` messages (see
`fastpref.data.messages`), then with the optional columns `tools` and `chat_template_kwargs`, which
hold variables of the chat template, and `system` or `system_prompt`, the text of a first message
(`fastpref.data.prompt_parts`). Pairs may have `p`, the probability that `chosen` is preferred;
`margin`, by which the reward of `chosen` should be larger, for objectives with an `offset`;
`ref_chosen_logps`, `ref_rejected_logps`, summed reference log-probs in nats; and `chosen_weights`,
`rejected_weights`, lists with a weight for the log-prob of each token of the response. Other
columns are ignored. Pointwise objectives read a pair as two responses: `chosen` is desirable,
`rejected` is not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from fastpref.data.messages import Messages, check_text, normalized
from fastpref.data.prompt_column import prompt_of
from fastpref.data.prompt_parts import whole_prompt
from fastpref.data.readers import DataError, Record, kind_of, read_rows
from fastpref.data.template_columns import template_columns
from fastpref.losses import Kind
from fastpref.utils.errors import shown

COLUMNS: dict[Kind, tuple[str, ...]] = {
    "pairwise": ("chosen", "rejected"),
    "pointwise": ("prompt", "completion", "label"),
    "groupwise": ("prompt", "completions", "scores"),
}
_ACCEPTED: dict[Kind, str] = {
    "pairwise": "prompt, chosen, rejected | chosen, rejected (prompt implicit)",
    "pointwise": "prompt, completion, label | pairs, as two responses each",
    "groupwise": "prompt, completions, scores",
}
# Kind of rows: of an objective's, or those of `fastpref.data.sft`, which become single responses.
RowKind = Kind | Literal["sft"]
SftOn = Literal["completion", "assistant", "all"]  # tokens to train on, as `data.sft_on`


class TextGroup(NamedTuple):
    """Responses to one prompt: a pair, a single labeled response, or several scored responses."""

    prompt: str | Messages
    responses: tuple[str | Messages, ...]  # without the prompt; of a pair: chosen, rejected
    tools: list[Any] | None = None
    labels: tuple[float, ...] | None = None  # (p,) of a pair; (0 or 1,) of one; scores of several
    reference_logps: tuple[float, ...] | None = None  # summed, one for each response
    token_weights: tuple[list[float], ...] | None = None  # one for each token of each response
    sft_on: SftOn | None = None  # of a row for supervised fine-tuning, whose label is 1
    chat_template_kwargs: dict[str, Any] | None = None  # variables of the chat template
    margin: float | None = None  # of a pair: by which the reward of chosen should be larger

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)

    @property
    def template_columns(self) -> dict[str, Any]:
        """Columns of a row that only the chat template reads."""
        values = {"tools": self.tools, "chat_template_kwargs": self.chat_template_kwargs}
        return {name: value for name, value in values.items() if value is not None}


def read_groups(
    source: str,
    kind: Kind = "pairwise",
    default_split: str = "train",
    soft_labels: bool = True,
    token_weights: bool = True,
    columns: Mapping[str, str | None] | None = None,
    streaming: bool = False,
) -> Iterator[tuple[int, TextGroup]]:
    """Yield the groups of all rows, each with its row number; DataError at the first bad row.

    columns, streaming: as in `read_rows`.
    """
    for number, row in read_rows(source, default_split, columns, streaming):
        try:
            groups = to_groups(row, kind, soft_labels, token_weights)
        except DataError as error:
            raise DataError(f"{source}, row {number}: {error}") from None
        yield from ((number, group) for group in groups)


def to_groups(
    row: Record, kind: Kind = "pairwise", soft_labels: bool = True, token_weights: bool = True
) -> list[TextGroup]:
    """Convert a row to groups for objectives of a kind: one, or the two responses of a pair.

    Without `soft_labels` the column `p` is checked and dropped; without `token_weights`, so are
    `chosen_weights` and `rejected_weights`. Raises DataError if the row is invalid.
    """
    splits_pair = kind == "pointwise" and "completion" not in row and _has(row, "pairwise")
    if kind == "pairwise" or splits_pair:
        pair = _pair(row, soft_labels, token_weights)
        return _split_pair(pair) if splits_pair else [pair]
    return [_labeled(row) if kind == "pointwise" else _scored(row)]


def _has(row: Record, kind: Kind) -> bool:
    return all(row.get(name) is not None for name in COLUMNS[kind])


def _require(row: Record, kind: Kind) -> None:
    missing = [name for name in COLUMNS[kind] if row.get(name) is None]
    if missing:
        others = [f"a {other}" for other in COLUMNS if other != kind and _has(row, other)]
        hint = f"; this row is for {' or '.join(others)} objective" if others else ""
        raise DataError(
            f"no {' and no '.join(missing)}; columns found: {', '.join(map(str, row)) or 'none'}; "
            f"formats accepted for a {kind} objective: {_ACCEPTED[kind]}, each plain text or "
            f"lists of {{role, content}} messages{hint}"
        )


def _pair(row: Record, soft_labels: bool, token_weights: bool) -> TextGroup:
    _require(row, "pairwise")
    responses = {name: row[name] for name in ("chosen", "rejected")}
    prompt, both = split_prompt(prompt_of(row), responses)
    p = _preference(row)
    labels = (p,) if p is not None and soft_labels else None
    weights = _token_weights(row)
    return TextGroup(
        whole_prompt(row, prompt),
        both,
        labels=labels,
        reference_logps=_reference(row),
        token_weights=weights if token_weights else None,
        margin=_margin(row),
        **template_columns(row),
    )


def _split_pair(pair: TextGroup) -> list[TextGroup]:
    """Split a pair into two groups of one labeled response."""
    if pair.labels is not None:
        raise DataError(
            "pointwise objectives do not take p, a soft label; set data.soft_labels=false to take "
            "chosen as desirable and rejected as undesirable for certain"
        )
    if pair.token_weights is not None:
        raise DataError(
            "pointwise objectives do not take chosen_weights and rejected_weights; set "
            "data.token_weights=false to leave them out"
        )
    reference_logps = pair.reference_logps or (None, None)
    return [
        pair._replace(
            responses=(response,),
            labels=(label,),
            reference_logps=None if logp is None else (logp,),
            margin=None,
        )
        for response, label, logp in zip(pair.responses, (1.0, 0.0), reference_logps, strict=True)
    ]


def _labeled(row: Record) -> TextGroup:
    _require(row, "pointwise")
    label = row["label"]
    if label not in (0, 1):
        raise DataError(f"label must be true or false, or 1 or 0, got {shown(label)}")
    prompt, responses = split_prompt(row["prompt"], {"completion": row["completion"]})
    return TextGroup(
        whole_prompt(row, prompt), responses, labels=(float(label),), **template_columns(row)
    )


def _scored(row: Record) -> TextGroup:
    _require(row, "groupwise")
    completions, scores = row["completions"], row["scores"]
    for name, values in (("completions", completions), ("scores", scores)):
        if not isinstance(values, list):
            raise DataError(f"{name} must be a list, got {kind_of(values)}")
    if not completions or len(completions) != len(scores):
        raise DataError(
            "completions and scores must be lists of the same length, at least 1, got "
            f"{len(completions)} and {len(scores)}"
        )
    for position, score in enumerate(scores):
        if not _is_number(score):
            raise DataError(f"scores[{position}] must be a finite number, got {shown(score)}")
    responses = {f"completions[{k}]": text for k, text in enumerate(completions)}
    prompt, texts = split_prompt(row["prompt"], responses)
    return TextGroup(
        whole_prompt(row, prompt),
        texts,
        labels=tuple(map(float, scores)),
        **template_columns(row),
    )


def split_prompt(
    prompt: Any, responses: dict[str, Any]
) -> tuple[str | Messages, tuple[str | Messages, ...]]:
    """Return prompt and responses, all texts or all messages, with the prompt stripped.

    A response that is one message is a list of it.
    """
    responses = {name: _listed(value) for name, value in responses.items()}
    values = list(responses.values())
    if all(isinstance(value, str) for value in values):
        for name, text in {"prompt": prompt, **responses}.items():
            check_text(name, text)
        if prompt is None:
            return _split_text(*values)
        if not isinstance(prompt, str):
            raise DataError(
                f"prompt must be text like {_columns(responses)}, got {kind_of(prompt)}"
            )
        return prompt, tuple(values)
    if all(isinstance(value, list) for value in values):
        return _split_messages(prompt, responses)
    kinds = " and ".join(dict.fromkeys(map(kind_of, values)))
    raise DataError(
        f"{_columns(responses)} must be text, or be lists of messages, all alike, got {kinds}"
    )


def _listed(value: Any) -> Any:
    is_message = isinstance(value, dict) and ("role" in value or "from" in value)
    return [value] if is_message else value


def _columns(responses: dict[str, Any]) -> str:
    return " and ".join(dict.fromkeys(name.partition("[")[0] for name in responses))


def _split_text(chosen: str, rejected: str) -> tuple[str, tuple[str, str]]:
    """Split off the implicit prompt of two transcripts.

    `Human:`/`Assistant:` transcripts are split after the last shared `Assistant:`; other text at
    the last shared whitespace, so that no word is split.
    """
    prompt = chosen[: common_prefix(chosen, rejected)]
    marker = "\n\nAssistant:"
    position = prompt.rfind(marker)
    if position >= 0:
        prompt = prompt[: position + len(marker)]
    elif len(prompt) < max(len(chosen), len(rejected)):
        prompt = prompt[: max(0, *(prompt.rfind(space) for space in " \n\t"))]
    return prompt, (chosen[len(prompt) :], rejected[len(prompt) :])


def _split_messages(
    prompt: Any, responses: dict[str, Messages]
) -> tuple[Messages, tuple[Messages, ...]]:
    """Split conversations into prompt messages and the messages of each response."""
    responses = {name: messages_of(name, value) for name, value in responses.items()}
    conversations = list(responses.values())
    if prompt is None:
        shared = common_prefix(*conversations)
        if shared == min(map(len, conversations)):
            # One conversation continues the other, or they are equal.
            shared -= 1
        prompt = conversations[0][:shared]
    else:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        prompt = messages_of("prompt", prompt)
        # Some data sets repeat the prompt at the start of every conversation.
        repeated = all(messages[: len(prompt)] == prompt for messages in conversations)
        shared = len(prompt) if repeated else 0
    for name, messages in responses.items():
        if not messages[shared:] or messages[shared].get("role") in ("system", "user"):
            raise DataError(f"{name} must go on from the prompt with an assistant message")
    return prompt, tuple(messages[shared:] for messages in conversations)


def messages_of(name: str, value: Any) -> Messages:
    """Messages of a column in the form of `fastpref.data.messages`; DataError if it has none."""
    messages = normalized(name, value)
    check_text(name, messages)
    return messages


def _preference(row: Record) -> float | None:
    value = row.get("p")
    if value is None:
        return None
    if not _is_number(value) or not 0 <= value <= 1:
        raise DataError(f"p must be a probability in [0, 1], got {shown(value)}")
    return float(value)


def _margin(row: Record) -> float | None:
    value = row.get("margin")
    if value is not None and not _is_number(value):
        raise DataError(f"margin must be a finite number, got {shown(value)}")
    return None if value is None else float(value)


def _reference(row: Record) -> tuple[float, ...] | None:
    values = [row.get(name) for name in ("ref_chosen_logps", "ref_rejected_logps")]
    if values == [None, None]:
        return None
    chosen, rejected = values
    if not (_is_number(chosen) and _is_number(rejected)):
        raise DataError(
            f"ref_chosen_logps and ref_rejected_logps must both be numbers, got {shown(values)}"
        )
    return float(chosen), float(rejected)  # type: ignore[arg-type]


def _token_weights(row: Record) -> tuple[list[float], ...] | None:
    names = ("chosen_weights", "rejected_weights")
    values: list[Any] = [row.get(name) for name in names]
    if values == [None, None]:
        return None
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, list) or not all(_is_number(x) and x >= 0 for x in value):
            raise DataError(
                f"{name} must be a list of numbers >= 0, one per token, got {shown(value)}"
            )
    return tuple([float(x) for x in value] for value in values)


def _is_number(value: Any) -> bool:
    """Whether a value is an int or float (not a bool) within the range of a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def common_prefix(first: Sequence[Any], *others: Sequence[Any]) -> int:
    """Length of the longest prefix that all sequences share."""
    shortest = min(map(len, (first, *others)))
    # Fast path: the shortest sequence is usually a prefix of the others.
    if all(other[:shortest] == first[:shortest] for other in others):
        return shortest
    columns = zip(first, *others, strict=False)
    return sum(1 for _ in takewhile(lambda column: all(x == column[0] for x in column), columns))
