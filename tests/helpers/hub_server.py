"""The calls of the Hugging Face Hub that an upload makes, answered on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import huggingface_hub
import pytest

from tests.helpers.local_server import listening


class HubServer:
    """Repositories by name, each with its files, and what was asked.

    lfs: ends of the names of files that go to the large file storage, as on the Hub.
    refuse: path that is answered with this status and message.
    """

    def __init__(self, lfs: tuple[str, ...] = (".safetensors",)) -> None:
        self.lfs, self.url, self.token = lfs, "", "hf_test"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.refuse: dict[str, tuple[int, str]] = {}
        self._objects: dict[str, bytes] = {}

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        self.requests.append(f"{method} {path}")
        for part, (status, message) in self.refuse.items():
            if part in path:
                return status, {"error": message}
        if path.startswith("/storage/"):
            self._objects[path.removeprefix("/storage/")] = body
            return 200, {}
        if token != f"Bearer {self.token}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        for part, reply in (
            ("/preupload/", self._preupload),
            (".git/info/lfs/objects/batch", self._batch),
            ("/commit/", self._commit),
        ):
            name, found, _ = path.removeprefix("/api/models").lstrip("/").partition(part)
            if found:
                return reply(name, body)
        return 404, {"error": f"no such path: {path}"}

    def _create(self, request: dict[str, Any]) -> tuple[int, Any]:
        name = f"{request['organization']}/{request['name']}"
        address = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", **address}
        self.repositories[name] = {}
        # Versions of huggingface_hub before 2 send `private`.
        self.private[name] = "private" in (
            request.get("visibility"),
            request.get("private") and "private",
        )
        return 200, address

    def _preupload(self, name: str, body: bytes) -> tuple[int, Any]:
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(self.lfs) else "regular" for path in paths}
        files = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]
        return 200, {"files": files}

    def _batch(self, name: str, body: bytes) -> tuple[int, Any]:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.url}/storage/{item['oid']}"}}}
            for item in json.loads(body)["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                self.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self._objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.repositories[name][value["path"]] = content
        return 200, {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1" * 40}


@contextmanager
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Context manager in which huggingface_hub talks to a server, over plain HTTP."""
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        huggingface_hub.close_session()
        yield server
    huggingface_hub.close_session()


@contextmanager
def serving() -> Iterator[HubServer]:
    """Context manager that yields a server at its `url`."""
    hub = HubServer()

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            token = self.headers.get("Authorization", "")
            path = self.path.partition("?")[0]
            status, reply = hub.answer(self.command, path, body, token)
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status >= 400:
                self.send_header("X-Error-Message", reply["error"])
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _reply  # noqa: N815

    with listening(Handler) as address:
        hub.url = address
        yield hub
