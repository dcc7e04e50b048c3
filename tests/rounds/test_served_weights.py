"""Weights that servers are given for each round, and servers that fail meanwhile."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastpref.config import RoundSampling
from fastpref.rounds import served_weights
from fastpref.rounds.served_weights import ServedWeights
from fastpref.utils.errors import UserError
from tests.helpers.sglang_server import serving


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    def export(policy: object, tokenizer: object, folder: Path, merge: bool) -> None:
        folder.mkdir()
        (folder / f"merged-{merge}").touch()

    monkeypatch.setattr(served_weights, "export", export)


def weights_at(folder: Path, notes: list[str], *urls: str) -> ServedWeights:
    sampling = RoundSampling(engine="server", protocol="sglang", servers=list(urls), timeout=5.0)
    session: Any = SimpleNamespace(
        config=SimpleNamespace(adapter=None, model=SimpleNamespace(path="m")),
        rounds=SimpleNamespace(sampling=sampling),
        display=SimpleNamespace(note=notes.append),
        ends={2},
        folder=folder,
        policy=None,
        tokenizer=None,
    )
    return ServedWeights(session)


@pytest.mark.usefixtures("no_export")
def test_each_round_has_a_folder_and_a_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # servers may run in another folder
    (tmp_path / "rounds").mkdir()
    with serving(lambda prompt, seed: [2]) as one, serving(lambda prompt, seed: [2]) as other:
        weights = weights_at(Path(), [], one.url, other.url)
        for key in ("a" * 40, "a" * 40, "b" * 40):
            weights.update(key)
            assert weights.weights.folder.is_absolute()
    versions = ["fastpref-" + "a" * 16, "fastpref-" + "b" * 16]
    assert one.updates == other.updates == [(name, ["merged-True"]) for name in versions]
    assert [path.name for path in (tmp_path / "rounds").iterdir()] == ["weights-" + "b" * 16]
    weights.close()
    assert list((tmp_path / "rounds").iterdir()) == []


@pytest.mark.usefixtures("no_export")
def test_only_the_first_failure_of_a_process_is_an_error(tmp_path: Path) -> None:
    notes: list[str] = []
    (tmp_path / "rounds").mkdir()
    with serving(lambda prompt, seed: [2]) as one:
        with serving(lambda prompt, seed: [2]) as other:
            weights = weights_at(tmp_path, notes, other.url, one.url)
            weights.update("a")
        weights.update("b")  # the other is lost
        assert notes == [f"{other.url}: [Errno 111] Connection refused; it gets the weights later"]
        assert one.version == "fastpref-b" and other.version == "fastpref-a"
        again = weights_at(tmp_path, notes, other.url, one.url)
        with pytest.raises(UserError) as caught:
            again.update("b")
    assert str(caught.value) == (
        f"rounds.sampling.servers: {other.url} does not take the weights ([Errno 111] Connection "
        "refused); start it, or name another"
    )
