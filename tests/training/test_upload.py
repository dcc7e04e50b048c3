"""Uploads of a run's final model and of its exports, to a server on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from fastpref.config import Config, ConfigError
from fastpref.config.grid import load_grid
from fastpref.training.trainer import Trainer
from fastpref.utils.hub import UploadError
from fastpref.utils.progress import Display
from tests.helpers.hub_server import HubServer, connected
from tests.helpers.training_runs import run

MakeConfig = Callable[..., Config]
Fastpref = Callable[..., CompletedProcess[str]]
HUB = {"training__push_to_hub": True, "training__hub_model_id": "ann/tiny"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with connected(monkeypatch) as server:
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_final_model_is_uploaded_and_later_exports_too(
    server: HubServer, make_config: MakeConfig, display: Display, tmp_path: Path, fastpref: Fastpref
) -> None:
    run(make_config(training__steps=1, training__checkpoint_every=1, **HUB), display)
    assert server.repositories == {"ann/tiny": contents(tmp_path / "run" / "model")}

    done = fastpref("export", "run", "--step", "1", "--push-to-hub", "ann/one", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"uploaded: {server.url}/ann/one" in done.stdout
    assert server.repositories["ann/one"] == contents(tmp_path / "run" / "exports" / "step-1")

    done = fastpref("export", "run", "--push-to-hub", "ann/two", "--private", cwd=tmp_path)
    assert done.returncode == 0
    assert server.repositories["ann/two"] == server.repositories["ann/tiny"]
    assert server.private["ann/two"] and not server.private["ann/one"]


def test_a_failed_upload_keeps_the_model_and_names_the_command_that_uploads_it(
    server: HubServer, make_config: MakeConfig, display: Display, tmp_path: Path, fastpref: Fastpref
) -> None:
    trainer = Trainer(make_config(training__steps=1, **HUB), display)
    trainer.loop([])
    server.refuse["/preupload/"] = 403, "the quota is exceeded"
    with pytest.raises(UploadError) as error:
        trainer.export()
    command = f"fastpref export {tmp_path / 'run'} --push-to-hub ann/tiny"
    assert str(error.value).endswith(f"upload it by {command}")

    done = fastpref(*command.split()[1:])
    assert done.returncode == 2 and done.stderr.startswith("error: cannot upload to ann/tiny: ")
    server.refuse.clear()
    assert fastpref(*command.split()[1:]).returncode == 0
    assert server.repositories["ann/tiny"] == contents(tmp_path / "run" / "model")


def test_a_run_without_a_final_model_says_so(
    server: HubServer, tmp_path: Path, fastpref: Fastpref
) -> None:
    done = fastpref("export", str(tmp_path), "--push-to-hub", "ann/tiny")
    assert done.returncode == 2
    assert f"error: {tmp_path}: has no final model to upload; wait for the end" in done.stderr


def test_runs_of_a_grid_do_not_replace_each_other(make_config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(make_config(**HUB).to_yaml())
    message = (
        "--grid: training.hub_model_id: ann/tiny would be of 2 runs; set training.push_to_hub="
    )
    with pytest.raises(ConfigError, match=message):
        load_grid(path, [], ["optim.lr=1e-6,1e-5"])
    assert load_grid(path, [], ["training.hub_model_id=ann/a,ann/b"]).points


def test_an_option_of_the_hub_alone_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="push_to_hub: needs a name on the Hub; set hub_model_id"):
        make_config(training__push_to_hub=True)
    with pytest.raises(ConfigError, match="hub_model_id: nothing is uploaded; set push_to_hub, or"):
        make_config(training__hub_model_id="ann/tiny")
