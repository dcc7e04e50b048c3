"""Every message that the command line can refuse with, read from the sources.

A message is the text of a UserError or one of its subclasses, wherever it is made, and of those
ValueErrors that a config or a row of data can cause. Of an f-string the values become `{name}`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import fastpref

ROOT = Path(fastpref.__file__).parent
_USER_ERRORS = {
    "UserError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Diverged",
    "InUse",
    "LostRank",
    "MissingPackage",
    "ModelError",
    "UploadError",
}
# Where a ValueError, too, is what a config or a row says; functions that return messages.
_OF_A_CONFIG = ("config/*.py", "losses/*.py", "data/bpe.py", "data/chat_template.py")
_OF_A_CONFIG += ("data/nested.py", "data/conversation.py")
_RETURNED = {"cannot_load", "one_line", "translation", "_refusal"}
# Arguments of objectives that no config sets, only callers in Python.
_OF_PYTHON = ("reference: ", "reference_point: ", "preference: ", "objective: ", "parts", "state: ")
_OF_PYTHON += ("anchors: ", "{column}: ", "impl: ", "margin: {name}")
_ELSEWHERE = ("fused/",)


@cache
def templates() -> dict[str, str]:
    """Every message with its values as `{name}`, and the file that it is made in."""
    found: dict[str, str] = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(_ELSEWHERE):
            continue
        for template in _made_in(ast.parse(path.read_text(encoding="utf-8")), name):
            if not (name.startswith("losses/") and template.startswith(_OF_PYTHON)):
                found.setdefault(template, name)
    return found


def pattern(template: str) -> re.Pattern[str]:
    """What finds a message that is made from a template."""
    return re.compile(".*".join(map(re.escape, re.split(r"\{\w*\}", template))))


def _made_in(tree: ast.AST, name: str) -> Iterator[str]:
    of_a_config = any(Path(name).match(each) for each in _OF_A_CONFIG)
    raised = _USER_ERRORS | ({"ValueError", "TimeoutError"} if of_a_config else set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in raised and node.args:
            yield from _template(node.args[0])
        if isinstance(node, ast.FunctionDef) and node.name in _RETURNED:
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    yield from _template(inner.value)


def _template(node: ast.expr) -> Iterator[str]:
    """The template that an expression is, unless it only passes a message on."""
    text = _text(node)
    if re.search("[a-z] ", re.sub(r"\{\w*\}", "", text)):
        yield text


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.FormattedValue):
        return "{" + _word(node.value) + "}"
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return ""


def _word(node: ast.AST) -> str:
    """A word for what stands in braces."""
    match node:
        case ast.Name(id=name):
            return name.strip("_")
        case ast.Attribute(attr=name) if name != "__name__":
            return name
        case ast.Constant(value=value):
            return re.sub(r"\W", "", str(value))
        case ast.Call(args=[*_, last]) if not isinstance(last, ast.Constant):
            return _word(last)
        case ast.Call(func=ast.Attribute(value=owner)):
            return _word(owner)
        case ast.IfExp(body=body):
            return _word(body)
        case ast.GeneratorExp(elt=element):
            return _word(element)
        case ast.BoolOp(values=[first, *_]):
            return _word(first)
    return _word(next(ast.iter_child_nodes(node)))
