"""Atomic writes leave files and folders either complete or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastpref.utils.atomic_files import file_sha256, replacing, sha256


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with replacing(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_a_killed_process_with_the_same_id_are_replaced(tmp_path: Path) -> None:
    leftover = tmp_path / f".folder.{os.getpid()}.tmp"
    leftover.mkdir()
    (leftover / "half").write_text("x")
    with replacing(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "whole").write_text("y")
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["whole"]


def test_folders_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("one", "two"):
        with replacing(path) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [entry.name for entry in path.iterdir()] == ["two"]
    assert list(tmp_path.iterdir()) == [path]


def test_hashes_tell_splits_apart(tmp_path: Path) -> None:
    assert sha256("ab", "c") != sha256("a", "bc") != sha256("abc")
    assert sha256("ab") == sha256(b"ab")
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x").startswith("ba7816bf")
