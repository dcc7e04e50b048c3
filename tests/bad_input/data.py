"""Training files that are damaged, and rows that are not what an objective trains on."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.bad_input.command import PAST_THE_DATA, Case, Make, Rows
from tests.helpers.data import labelled, rows, scored

TO_THE_DATA = ("train", "c.yaml", "training.device=cuda")
USER, YES = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
GOOD: dict[str, Callable[[int], Rows]] = {"dpo": rows, "kto": labelled, "nca": scored}
PAIR = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
HALF = "a\ud800"


def _row(name: str, says: str, change: dict[str, Any], loss: str = "dpo", data: Any = None) -> Case:
    """The second of three rows is changed; None takes a column away, `...` makes it null."""
    good = GOOD[loss](3)
    odd = {**good[1], **change}
    odd = {key: None if value is ... else value for key, value in odd.items() if value is not None}
    says = says if says is PAST_THE_DATA else f"pairs.jsonl, row 2: {says}"
    config = {"loss": loss, **({"data": data} if data else {})}
    return Case(f"{loss}: {name}", says, config, [good[0], odd, good[2]], arguments=TO_THE_DATA)


def _file(name: str, says: str, data: bytes, loss: str = "dpo", **config: Any) -> Case:
    """A file `name`, or with `, …` behind the name for what is odd about it."""
    file = name.partition(",")[0]
    if says is not PAST_THE_DATA:
        says = f"{file}{says}"
    return Case(
        f"file: {name}", says, {"data": {"train": file}, "loss": loss, **config}, data, file,
        arguments=TO_THE_DATA,
    )  # fmt: skip


def _legal(name: str, change: dict[str, Any], loss: str = "dpo", data: Any = None) -> Case:
    return _row(f"legal, {name}", PAST_THE_DATA, change, loss, data)


def jsonl(records: Rows) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _evaluated(records: Rows) -> Make:
    return lambda folder: (folder / "e.jsonl").write_bytes(jsonl(records))


def parquet(table: pa.Table | Rows, **options: Any) -> bytes:
    table = table if isinstance(table, pa.Table) else pa.Table.from_pylist(table)
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def arrow(records: Rows) -> bytes:
    table, sink = pa.Table.from_pylist(records), io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _broken_text() -> pa.Table:
    """A column of text whose bytes are not UTF-8."""
    bad = pa.array([b"\xff\xfe"], pa.binary()).cast(pa.binary())
    text = pa.StringArray.from_buffers(1, *bad.buffers()[1:3])
    return pa.table({"prompt": ["a"], "chosen": text, "rejected": ["b"]})


_THREE = rows(3)
_PARQUET = parquet(_THREE)
_ARROW = arrow(_THREE)
_LINE = jsonl(rows(1))
_WHOLE = zlib.compress(_LINE)

FILES = [
    *[_file(f"d.{ending}", ": the file is empty; name one with rows", b"")
      for ending in ("jsonl", "json", "parquet", "arrow", "csv")],
    *[_file(f"d.{ending}",
            ": unknown file extension; expected .json, .jsonl, .parquet, .arrow", _LINE)
      for ending in ("csv", "tsv", "txt", "jsonl.gz", "JSONL", "yaml", "pkl", "parquet.zst")],
    _file("noending", ": unknown file extension; expected *", _LINE),
    _file("d.jsonl, only blank lines", ": no pair is left to train on (*)*", b"\n \n\t\n"),
    _file("d.json, an empty list", ": no pair is left to train on (*)*", b"[]"),
    _file("d.jsonl, gzip", ", line 1: not valid JSON; expected *", gzip.compress(_LINE)),
    _file("d.json, zlib", ", line *: not valid JSON; expected *", _WHOLE),
    _file("d.jsonl, not JSON", ", line 2: not valid JSON; expected *", _LINE + b"{oops}\n"),
    _file("d.jsonl, cut", ", line 2: not valid JSON; expected *", _LINE + _LINE[:30]),
    _file("d.jsonl, Latin-1", ", line 2: not valid JSON; expected *", _LINE + b'{"a": "\xe9"}\n'),
    _file("d.jsonl, UTF-16", ", line *: not valid JSON; expected *",
          _LINE.decode().encode("utf-16")),
    _file("d.jsonl, NUL bytes", ", line 1: not valid JSON; expected *", b"\0" * 64),
    _file("d.jsonl, single quotes", ", line 1: not valid JSON; expected *", b"{'chosen': 'a'}"),
    _file("d.jsonl, comma at the end", ", line 1: not valid JSON; expected *", b'{"a": 1,}'),
    _file("d.jsonl, two on a line", ", line 1: not valid JSON; expected *", b"{} {}"),
    _file("d.jsonl, deep", ", line 1: not valid JSON; expected *", b'{"a":' + b"[" * 100_000),
    _file("d.jsonl, many digits", ", line 1: not valid JSON; expected *",
          b'{"p": ' + b"9" * 5000 + b"}"),
    _file("d.jsonl, HTML", ", line 1: not valid JSON; expected *", b"<!DOCTYPE html>\n<html>"),
    _file("d.jsonl, Git LFS", ", line 1: not valid JSON; expected *",
          b"version https://git-lfs.github.com/spec/v1\n"),
    _file("d.jsonl, a list a line", ", row 1: must be an object, got a list", b"[1, 2]\n"),
    _file("d.jsonl, text a line", ", row 1: must be an object, got text", b'"a"\n'),
    _file("d.jsonl, null", ", row 2: must be an object, got null", _LINE + b"null\n"),
    _file("d.jsonl, number", ", row 2: must be an object, got float", _LINE + b"1.5\n"),
    _file("d.json, cut", ": not valid JSON; expected *", b'[{"a": 1}'),
    _file("d.json, bytes", ": not valid JSON; expected *", b"[\xff\xff]"),
    _file("d.json, list of lists", ", row 1: must be an object, got a list", b"[[1], [2]]"),
    _file("d.json, deep", ": not valid JSON; expected *", b"[" * 100_000),
    _file("d.json, columns", ", row 1: no chosen and no rejected; columns found: train; *",
          b'{"train": []}'),
    _file("d.json, a pretty object", ", line 1: not valid JSON; expected *", b'{\n "a": 1\n}'),
    *[_file(f"d.parquet, {name}", ": not a readable Parquet file; write it again: *", data)
      for name, data in {
          "text": b"hello", "magic alone": b"PAR1", "cut": _PARQUET[:-20],
          "half": _PARQUET[: len(_PARQUET) // 2], "footer": _PARQUET[:-8] + b"\xff" * 4 + b"PAR1",
          "jsonl": _LINE, "gzip": gzip.compress(_PARQUET), "pages": _PARQUET[:4] + bytes(
              len(_PARQUET) - 700) + _PARQUET[len(_PARQUET) - 696:],
          "text that is not UTF-8": parquet(_broken_text()),
      }.items()],
    *[_file(f"d.arrow, {name}", ": not a readable Arrow file; write it again: *", data)
      for name, data in {
          "text": b"hello", "magic alone": b"ARROW1\0\0", "cut": _ARROW[:-20],
          "half": _ARROW[: len(_ARROW) // 2], "jsonl": _LINE, "Parquet": _PARQUET,
      }.items()],
    _file("d.parquet, no rows", ": no pair is left to train on (*)*",
          parquet(pa.table({"chosen": pa.array([], pa.string()),
                            "rejected": pa.array([], pa.string())}))),
    _file("d.parquet, no columns", ": no pair is left to train on (*)*", parquet(pa.table({}))),
    _file("d.parquet, binary", ", row 1: chosen and rejected must be text, *, got bytes",
          parquet([{"prompt": "a", "chosen": b"b", "rejected": b"c"}])),
    _file("d.parquet, numbers", ", row 1: chosen and rejected must be text, *, got int",
          parquet([{"prompt": "a", "chosen": 1, "rejected": 2}])),
    _file("d.parquet, nulls", ", row 1: no rejected; columns found: prompt, chosen, rejected; *",
          parquet(pa.table({"prompt": ["a"], "chosen": ["b"],
                            "rejected": pa.array([None], pa.string())}))),
    *[_file(f"d.parquet, legal, {codec}", PAST_THE_DATA, parquet(_THREE, compression=codec))
      for codec in ("NONE", "SNAPPY", "GZIP", "ZSTD", "LZ4", "BROTLI")],
    _file("d.arrow, legal", PAST_THE_DATA, _ARROW),
    _file("d.jsonl, legal, BOM", PAST_THE_DATA, b"\xef\xbb\xbf" + _LINE),
    _file("d.jsonl, legal, CRLF", PAST_THE_DATA, _LINE.replace(b"\n", b"\r\n")),
    _file("d.jsonl, legal, no newline at the end", PAST_THE_DATA, _LINE.strip()),
    _file("d.json, legal, a list", PAST_THE_DATA, json.dumps(_THREE).encode()),
    _file("d.jsonl, legal, the same row again", PAST_THE_DATA, _LINE * 20),
    _file("d.jsonl, legal, one row", PAST_THE_DATA, _LINE),
    _file("d.jsonl, legal, a prompt of 1 MB", PAST_THE_DATA,
          jsonl([{"prompt": "tea " * 250_000, "chosen": "yes", "rejected": "no"}]) + _LINE),
    _file("d.jsonl, only prompts of 1 MB", ": no pair is left to train on (*)*",
          jsonl([{"prompt": "tea " * 250_000, "chosen": "yes", "rejected": "no"}])),
    _file("d.jsonl, one prompt for kto", ": kto needs responses to at least two prompts, *",
          jsonl([{"prompt": "a", "completion": "b", "label": True}] * 4), loss="kto"),
]  # fmt: skip

SOURCES = [
    Case(f"data.train: {name}", says, {"data": {"train": source}}, arguments=TO_THE_DATA)
    for name, source, says in (
        ("missing", "none.jsonl", "none.jsonl: no such file; check the path"),
        ("missing, absolute", "/no/such.parquet", "/no/such.parquet: no such file; check the path"),
        ("missing, in a folder", "./a/b/c", "./a/b/c: no such file; check the path"),
        ("a folder", ".", ".: is a folder; name a JSON, JSONL, Parquet or Arrow file"),
        ("a model", "llama", "llama: is a folder; name a JSON, JSONL, Parquet or Arrow file"),
        ("a device", "/dev/null", "/dev/null: the file is empty; name one with rows"),
        ("a Hub name", "nobody/nothing", "nobody/nothing: no such file, and loading it from the *"),
        ("a Hub split", "nobody/nothing:x", "nobody/nothing:x: no such file, and loading it *"),
        ("a URL", "https://example.org/d.jsonl", "https://example.org/d.jsonl: no such file; *"),
        ("a name too long", "n" * 300, "*: File name too long; check path and disk"),
    )
]

_NUMBER = "must be a probability in [0, 1], got"
PAIRS = [
    *[_row(f"p {value}", f"p {_NUMBER} {value!r}", {"p": value})
      for value in (1.0001, -0.1, 2, -1, 100, "0.5", "", True, False, [0.5], {"p": 1},
                    float("inf"), float("nan"))],
    _row("p of 400 digits", f"p {_NUMBER} 1000*… (401 characters)", {"p": 10**400}),
    _row("long text for p", f"p {_NUMBER} 'xxx*", {"p": "x" * 1_000_000}),
    *[_row(f"{name} {how}", f"no {name}; columns found: *", {name: value})
      for name in ("chosen", "rejected") for how, value in (("missing", None), ("null", ...))],
    _row("nothing but a prompt", "no chosen and no rejected; columns found: prompt; *",
         {"chosen": None, "rejected": None}),
    _row("no column", "no chosen and no rejected; columns found: none; *",
         {"prompt": None, "chosen": None, "rejected": None}),
    _row("other names", "no chosen and no rejected; columns found: question, good, bad; *",
         {"prompt": None, "chosen": None, "rejected": None, "question": "", "good": "", "bad": ""}),
    _row("a prompt of another name",
         "no prompt, and the column question is not in chosen; set data.columns: *",
         {"prompt": None, "question": "What is it?"}),
    _row("a labelled row", "*; this row is for a pointwise objective",
         {"chosen": None, "rejected": None, "completion": "a", "label": 1}),
    _row("a scored row", "*; this row is for a groupwise objective",
         {"chosen": None, "rejected": None, "completions": ["a"], "scores": [1]}),
    *[_row(f"{name} of type {type(value).__name__}",
           "chosen and rejected must be text, or be lists of messages, all alike, got *",
           {name: value})
      for name in ("chosen", "rejected") for value in (3, 1.5, True, {"role": "user"}, [YES])],
    _row("both objects", "chosen and rejected must be text, or be *, got an object",
         {"chosen": {"text": "a"}, "rejected": {"text": "b"}}),
    *[_row(f"prompt {value}", "prompt must be text like chosen and rejected, got *",
           {"prompt": value}) for value in (3, 1.5, True, {"a": 1}, [USER], [])],
    *[_row(f"{name} with half a pair", f"{name} is not valid Unicode at character 1; *",
           {name: HALF}) for name in ("prompt", "chosen", "rejected")],
    _row("the other half", "chosen is not valid Unicode at character 0; *", {"chosen": "\udfff"}),
    *[_row(f"reference {a} {b}", "ref_chosen_logps and ref_rejected_logps must both be numbers, *",
           {"ref_chosen_logps": a, "ref_rejected_logps": b})
      for a, b in ((-1, None), (None, -1), ("a", -1), (-1, True), (float("nan"), -1),
                   (float("-inf"), -1), (10**400, -1), ([-1], -1))],
    *[_row(f"chosen_weights {value}", "*_weights must be a list of numbers >= 0, one per token, *",
           {"chosen_weights": value, "rejected_weights": [1]})
      for value in (None, 1, "1", {}, [-1], ["a"], [None], [True], [float("nan")], [10**400])],
    _row("weights of other tokens", "chosen_weights has 1 numbers, but the tokenizer makes *",
         {"chosen_weights": [1], "rejected_weights": [1]}),
    *[_row(f"tools {str(value)[:20]}", says, {**PAIR, "tools": value}) for value, says in (
        ("{oops", "tools must be a list or its JSON text: *"),
        ("", "tools must be a list or its JSON text: *"),
        ("[" * 100_000, "tools must be a list or its JSON text: *"),
        ("3", "tools must be a list, got int"),
        ({"a": 1}, "tools must be a list, got an object"),
        (3, "tools must be a list, got int"),
        ([{"name": HALF}], "tools is not valid Unicode at character 1; *"),
        ([{HALF: 1}], "tools is not valid Unicode at character 1; *"),
    )],
]  # fmt: skip

MESSAGES = [
    *[_row(f"{name} {how}", f"{name} must be a list of {{role, content}} messages",
           {**PAIR, name: value})
      for name in ("prompt", "chosen", "rejected")
      for how, value in (
          ("of text", ["a"]), ("of null", [None]), ("without a role", [{"content": "a"}]),
          ("with role 3", [{"role": 3, "content": "a"}]),
          ("with role null", [{"role": None, "content": "a"}]), ("in a list", [[USER]]),
          ("of ShareGPT, 3", [{"from": 3, "value": "a"}]),
      )],
    _legal("ShareGPT", {"prompt": [{"from": "human", "value": "Q?"}],
                        "chosen": [{"from": "gpt", "value": "yes"}],
                        "rejected": [{"from": "GPT", "value": "no"}]}),
    Case("chat template: no file", "data.chat_template: none.jinja: no such file; check the path",
         {"data": {"chat_template": "none.jinja"}}, [PAIR], arguments=TO_THE_DATA),
    _row("a critic", "chat template failed: the role 'critic' is unknown; name it user, *",
         {**PAIR, "chosen": [{**YES, "role": "critic"}]}),
    *[_row(f"chosen {how}", "chosen must go on from the prompt with an assistant message",
           {**PAIR, "chosen": [{"from": role, "value": "a"}]})
      for how, role in (("by a human", "human"), ("by the System", "System"))],
    _row("prompt an object", "prompt must be a list of {role, content} messages",
         {**PAIR, "prompt": USER}),
    _row("prompt a number", "prompt must be a list of {role, content} messages",
         {**PAIR, "prompt": 3}),
    *[_row(f"{name} {how}", f"{name} must go on from the prompt with an assistant message",
           {**PAIR, name: value})
      for name in ("chosen", "rejected")
      for how, value in (("empty", []), ("by the user", [USER]),
                         ("by the system", [{"role": "system", "content": "a"}]))],
    _row("no prompt, nothing shared", "chosen must go on from the prompt with an *",
         {"prompt": None, "chosen": [USER], "rejected": [YES]}),
    *[_row(f"content {content}", says, {**PAIR, "chosen": [{"role": "assistant", **content}]})
      for content, says in (
          ({"content": None}, "chosen has a message of role 'assistant' without content; give *"),
          ({}, "chosen has a message of role 'assistant' without content; give *"),
          ({"content": 3}, "chosen has a content that is int; it must be text or a list of *"),
          ({"content": [{"type": "image"}]}, "chosen has a part of type 'image' in its content; *"),
          ({"content": [{"type": "text"}]}, "chosen has a part other than text in its content; *"),
      )],
    _legal("parts", {**PAIR, "chosen": [{**YES, "content": [{"type": "text", "text": "yes"}]}]}),
    *[_row(f"chat_template_kwargs {str(value)[:9]}", says, {**PAIR, "chat_template_kwargs": value})
      for value, says in (
          (3, "chat_template_kwargs must be an object, got int"),
          ("{oops", "chat_template_kwargs must be an object or its JSON text: *"),
          ({"tools": []}, "chat_template_kwargs: tools is set by fastpref; remove it"),
      )],
    *[_row(f"half a pair in {where}", f"{name} is not valid Unicode at character 1; *",
           {**PAIR, name: value})
      for name, where, value in (
          ("prompt", "a prompt", [{"role": "user", "content": HALF}]),
          ("chosen", "a content", [{"role": "assistant", "content": HALF}]),
          ("chosen", "a role", [{"role": HALF, "content": "a"}]),
          ("rejected", "a part", [{"role": "assistant", "content": [{"text": HALF}]}]),
          ("rejected", "a key", [{"role": "assistant", "content": "a", HALF: 1}]),
          ("rejected", "a call", [{"role": "assistant", "content": "", "tool_calls": [HALF]}]),
      )],
    _row("an empty prompt", "chat template failed: *empty conversation*; fix the row, or *",
         {**PAIR, "prompt": []}),
    _row("text and messages", "chosen and rejected must be text, *, got a list and text",
         {**PAIR, "rejected": "a"}),
]  # fmt: skip

LABELLED = [
    *[_row(f"label {str(value)[:9]}", "label must be true or false, or 1 or 0, got *",
           {"label": value}, "kto")
      for value in ("yes", "", "True", 0.5, 2, -1, [1], {"a": 1}, float("nan"), 10**400)],
    *[_row(f"{name} {how}", f"no {name}; columns found: *", {name: value}, "kto")
      for name in ("prompt", "completion", "label")
      for how, value in (("gone", None), ("null", ...))],
    *[_row(f"completion {value}", "completion must be text, or be lists of messages, all alike, *",
           {"completion": value}, "kto") for value in (3, 1.5, True, {"a": 1})],
    *[_row(f"prompt {value}", "prompt must be text like completion, got *", {"prompt": value},
           "kto") for value in (3, True, {"a": 1}, [USER])],
    _row("half a pair", "completion is not valid Unicode at character 1; *",
         {"completion": HALF}, "kto"),
    _row("soft labels", "pointwise objectives do not take p, a soft label; set *",
         {**rows(1)[0], "completion": None, "label": None, "p": 0.7}, "kto"),
    _row("token weights", "pointwise objectives do not take chosen_weights and *",
         {**rows(1)[0], "completion": None, "label": None, "chosen_weights": [1],
          "rejected_weights": [1]}, "kto"),
    _row("a scored row", "*; this row is for a groupwise objective",
         {"completion": None, "label": None, "completions": ["a"], "scores": [1]}, "kto"),
    _row("by the user", "completion must go on from the prompt with an assistant message",
         {"prompt": [USER], "completion": [USER]}, "kto"),
]  # fmt: skip

SCORED = [
    *[_row(f"scores of {str(value)[:9]}", "scores[1] must be a finite number, got *",
           {"completions": ["a", "b"], "scores": [1, value]}, "nca")
      for value in (None, "1", True, [1], float("nan"), float("inf"), 10**400)],
    *[_row(f"scores {value}", "scores must be a list, got *", {"scores": value}, "nca")
      for value in (1, "1", {"a": 1}, True)],
    *[_row(f"completions {value}", "completions must be a list, got *", {"completions": value},
           "nca") for value in (1, "a", {"a": 1}, True)],
    *[_row(f"{len(a)} completions, {len(b)} scores",
           f"completions and scores must be lists of the same length, at least 1, got {len(a)} and "
           f"{len(b)}", {"completions": a, "scores": b}, "nca")
      for a, b in ((["a"], []), ([], []), (["a", "b"], [1]), (["a"], [1, 2]))],
    *[_row(f"{name} {how}", f"no {name}; columns found: *", {name: value}, "nca")
      for name in ("prompt", "completions", "scores")
      for how, value in (("gone", None), ("null", ...))],
    _row("a number among texts", "completions must be text, or be lists of messages, all alike, *",
         {"completions": ["a", 3], "scores": [1, 2]}, "nca"),
    _row("half a pair", "completions[1] is not valid Unicode at character 1; *",
         {"completions": ["a", HALF], "scores": [1, 2]}, "nca"),
    _row("an empty conversation", "completions[1] must go on from the prompt with an *",
         {"prompt": [USER], "completions": [[YES], []], "scores": [1, 2]}, "nca"),
    _row("no role", "completions[0] must be a list of {role, content} messages",
         {"prompt": [USER], "completions": [["a"], [YES]], "scores": [1, 2]}, "nca"),
    _row("a pair", "*; this row is for a pairwise objective",
         {**rows(1)[0], "completions": None, "scores": None}, "nca"),
]  # fmt: skip

ALL_ROWS = [
    Case("rows: all dropped", "pairs.jsonl: no pair is left to train on (*)*",
         {"data": {"add_eos": False}}, [{"prompt": "a", "chosen": "", "rejected": ""}] * 3,
         arguments=TO_THE_DATA),
    Case("rows: prompts fill max_length", "pairs.jsonl: no pair is left to train on (*)*",
         {"data": {"max_length": 2}}, _THREE, arguments=TO_THE_DATA),
    Case("rows: soft labels for an objective without",
         "loss: aot does not take soft labels, and the data has them; set *",
         {"loss": "aot"}, rows(3, soft=True), arguments=TO_THE_DATA),
    Case("rows: alpha at the bound", "loss.alpha: must be > * for these scores, got *; at or *",
         {"loss": {"name": "pro_s", "alpha": 1e-6}}, scored(6), arguments=TO_THE_DATA),
    Case("eval: missing", "none.jsonl: no such file; check the path",
         {"data": {"eval": "none.jsonl"}}, _THREE, arguments=TO_THE_DATA),
    Case("eval: a broken row", "e.jsonl, row 1: no chosen and no rejected; *",
         {"data": {"eval": "e.jsonl"}}, _THREE, arguments=TO_THE_DATA,
         make=_evaluated([{}])),
    Case("eval: of another kind", "e.jsonl, row 1: *; this row is for a pointwise objective",
         {"data": {"eval": "e.jsonl"}}, _THREE, arguments=TO_THE_DATA,
         make=_evaluated(labelled(2))),
]  # fmt: skip

LEGAL = [
    _legal("white space", {"chosen": " ", "rejected": "\n\t"}),
    _legal("no text", {"chosen": "", "rejected": "a"}),
    _legal("equal responses", {"chosen": "a", "rejected": "a"}),
    _legal("an empty prompt", {"prompt": ""}),
    _legal("NUL", {"chosen": "a\0b"}),
    _legal("emoji and right to left", {"chosen": "\U0001f600 \u202e\u05d0", "rejected": "\ufffd"}),
    _legal("combining marks", {"chosen": "e" + "\u0301" * 500}),
    _legal("p at the ends", {"p": 0}),
    _legal("p null", {"p": ...}),
    _legal("other columns", {"id": 3, "meta": {"a": [None]}, "": None}),
    _legal("messages among texts", PAIR),
    _legal("an unknown role", {**PAIR, "chosen": [{"role": "bot", "content": "yes"}]}),
    _legal("no prompt", {"prompt": None, "chosen": "Q? yes", "rejected": "Q? no"}),
    _legal("white space", {"completion": " "}, "kto"),
    _legal("label 1.0", {"label": 1.0}, "kto"),
    _legal("one completion", {"completions": ["a"], "scores": [0]}, "nca"),
    _legal("the same scores", {"completions": ["a", "b"], "scores": [1, 1]}, "nca"),
    _legal("scores of any size", {"completions": ["a", "b"], "scores": [-1e300, 1e300]}, "nca"),
]

CASES = [*FILES, *SOURCES, *PAIRS, *MESSAGES, *LABELLED, *SCORED, *ALL_ROWS, *LEGAL]
