"""Uploads to the Hub, whose calls a server on this machine answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from fastpref.utils import hub
from fastpref.utils.errors import UserError
from tests.helpers.hub_server import HubServer, connected


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with connected(monkeypatch) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {
        "README.md": b"---\nlicense: mit\n---\n# Model\n",
        "config.json": b"{}",
        "model.safetensors": bytes(range(256)) * 64,
    }.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_a_folder_is_uploaded_to_a_new_repository(server: HubServer, folder: Path) -> None:
    address = hub.upload(folder, "ann/tiny", True, "again")
    assert address == f"{server.url}/ann/tiny"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert server.repositories == {"ann/tiny": files}
    assert server.private == {"ann/tiny": True}
    assert server.messages == ["Model trained with fastpref"]


def test_an_existing_repository_gets_another_commit(server: HubServer, folder: Path) -> None:
    hub.upload(folder, "ann/tiny", None, "again")
    (folder / "config.json").write_text('{"a": 1}')
    hub.upload(folder, "ann/tiny", None, "again")
    assert server.repositories["ann/tiny"]["config.json"] == b'{"a": 1}'
    assert len(server.messages) == 2


def test_a_refusal_is_one_line_and_leaves_the_folder(server: HubServer, folder: Path) -> None:
    server.refuse["/commit/"] = 403, "storage quota exceeded"
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(hub.UploadError) as error:
        hub.upload(folder, "ann/tiny", None, "fastpref export RUN --push-to-hub ann/tiny")
    message = str(error.value)
    assert message.startswith("cannot upload to ann/tiny: ") and "\n" not in message
    assert f"{folder} is complete, upload it by fastpref export RUN --push-to-hub" in message
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("name", ["tiny", "ann/", "/tiny", "a/b/c", "ann/ti ny", "https://a/b"])
def test_a_name_that_the_hub_does_not_know_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="--push-to-hub: must be ORG/NAME on the Hub, got"):
        hub.check("--push-to-hub", name)


def test_an_upload_that_cannot_begin_is_refused_before_the_run(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.check("training.push_to_hub", "ann/tiny")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"training.push_to_hub: nobody is logged in on the Hub"):
        hub.check("training.push_to_hub", "ann/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"training.push_to_hub: the Hub is switched off by HF_"):
        hub.check("training.push_to_hub", "ann/tiny")
