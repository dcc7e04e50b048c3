"""Answers of a judge on disk."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from fastpref.evaluation.judge.cache import open_cache
from fastpref.utils.errors import UserError


def test_records_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "c.jsonl"
    with open_cache(path) as cache:
        assert cache.records == {}
        cache.add("k1", {"text": "ü\n2", "finish_reason": None})
        cache.add("k2", {"reward": 0.1})
        written = dict(cache.records)
    with open_cache(path) as cache:
        assert cache.records == written
        assert list(cache.records) == ["k1", "k2"]


@pytest.mark.parametrize("cut", [1, 5, 12, 20])
def test_an_incomplete_last_line_is_removed(tmp_path: Path, cut: int) -> None:
    """A process may be killed in the middle of a write."""
    path = tmp_path / "c.jsonl"
    with open_cache(path) as cache:
        cache.add("k1", {"text": "a"})
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:cut])
    with open_cache(path) as cache:
        assert list(cache.records) == ["k1"]
        cache.add("k2", {"text": "b"})
    assert path.read_bytes() == whole + b'{"key": "k2", "text": "b"}\n'


def test_another_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    for content in ('{"prompt": "a"}\n', '{"prompt": "a"}', "[1]\n", "3\n", '{"key": []}\n', "x"):
        path.write_text(content)
        with (
            pytest.raises(UserError, match=r"--cache: .*(line 1: not an answer|is not a cache of)"),
            open_cache(path),
        ):
            pass
        assert path.read_text() == content
    with (
        pytest.raises(UserError, match=r"--cache: .* is a folder; name a file"),
        open_cache(tmp_path),
    ):
        pass


def _open(path: Path, queue: multiprocessing.Queue[str]) -> None:
    try:
        with open_cache(path):
            queue.put("open")
    except UserError as error:
        queue.put(str(error))


def test_two_processes_do_not_share_a_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    path, queue = tmp_path / "c.jsonl", context.Queue()
    with open_cache(path):
        process = context.Process(target=_open, args=(path, queue))
        process.start()
        assert "c.jsonl is in use by another process; wait for it" in queue.get(timeout=60)
        process.join()
    process = context.Process(target=_open, args=(path, queue))
    process.start()
    assert queue.get(timeout=60) == "open"
    process.join()


def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    with (
        pytest.raises(UserError, match=r"cannot be locked \(Operation not supported\); name a f"),
        open_cache(tmp_path / "c.jsonl"),
    ):
        pass
