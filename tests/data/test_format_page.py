"""The rows of docs/data-formats.md are trained as the page shows, from JSON lines and Parquet."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from fastpref.cli.show import as_text
from fastpref.config import Data
from fastpref.config.schema import Config
from fastpref.data.preview import previews
from fastpref.data.sft import row_kind
from tests.helpers.data import write_jsonl

PAGE = Path(__file__).parents[2] / "docs" / "data-formats.md"
SECTIONS = re.split(r"^## (?=\d+\. )", PAGE.read_text("utf-8"), flags=re.MULTILINE)[1:]


def blocks(section: str) -> dict[str, str]:
    """Code of a section by language."""
    return dict(re.findall(r"^```(\w+)\n(.*?)^```", section, re.M | re.S))


def test_the_page_has_twelve_formats() -> None:
    assert [section.partition(".")[0] for section in SECTIONS] == [str(k) for k in range(1, 13)]
    assert all({"json", "text"} <= blocks(section).keys() for section in SECTIONS)


def shown(path: Path, code: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> str:
    """The parts of the rows of a file, in the words of `fastpref data show`."""
    values: dict[str, Any] = yaml.safe_load(code.get("yaml", "")) or {}
    data = Data(**{"train": str(path), **values.get("data", {})})
    loss = Config(model={"path": "-"}, data=data, loss=values.get("loss", "dpo")).build_loss()
    found = previews(str(path), tokenizer, data, row_kind(loss, data), limit=9)
    return "".join(as_text(preview).plain.partition("\n")[2] for preview in found)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.partition("\n")[0])
def test_a_format_is_trained_as_shown(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, section: str
) -> None:
    code = blocks(section)
    rows = [json.loads(line) for line in code["json"].splitlines()]
    paths = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "rows.parquet"
    pd.DataFrame(rows).to_parquet(paths[1])
    for path in paths:
        assert shown(path, code, tokenizer) == code["text"], path.suffix
