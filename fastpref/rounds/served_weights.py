"""Give the weights of a round to servers: as an adapter, or as a folder by a command."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
from pathlib import Path

from fastpref.config import RoundSampling
from fastpref.evaluation.judge.endpoint import Failure, Refusal, post
from fastpref.model.export import export
from fastpref.rounds.session import Session
from fastpref.utils.atomic_files import remove, replacing
from fastpref.utils.errors import UserError

_NAME = "fastpref-"  # begins the names of adapters at the servers
_LOADED = "already been loaded"  # what vLLM answers to a name that it has


class ServedWeights:
    """The weights that the servers have, in a folder of the run that they can read."""

    def __init__(self, session: Session) -> None:
        self._session, self._config = session, session.config
        self._options: RoundSampling = session.rounds.sampling
        self._folder: Path | None = None
        self._name = ""

    @property
    def model(self) -> str:
        """Name of the weights at the servers."""
        return self._name

    def update(self, key: str) -> None:
        """Write the policy as it is to a folder named by its key, and give it to all servers."""
        folder = self._session.folder / "rounds" / f"weights-{key[:16]}"
        if folder == self._folder:
            return
        for stale in folder.parent.glob("weights-*"):
            if stale != folder:
                remove(stale)
        if not folder.exists():
            with replacing(folder) as temporary:
                export(self._session.policy, self._session.tokenizer, temporary, self._is_merged)
        previous, self._folder = self._name, folder.absolute()
        self._name = self._options.model or str(self._config.model.path)
        if self._options.update_command is None:
            self._name = f"{_NAME}{key[:16]}"
        for server in self._options.servers:
            self.give(server)
            if previous.startswith(_NAME):
                self._unload(server, previous)

    def give(self, server: str) -> None:
        """Give the weights to one server; raises UserError if it does not take them."""
        assert self._folder is not None
        if self._options.update_command is not None:
            _run(self._options.update_command, self._folder, server)
            return
        body = {"lora_name": self._name, "lora_path": str(self._folder)}
        try:
            post(f"{server}/load_lora_adapter", body, self._options.api_key, self._options.timeout)
        except (Failure, Refusal) as error:
            if _LOADED not in str(error):
                raise UserError(
                    f"rounds.sampling.servers: {server} does not load the adapter ({error}); start "
                    "it with LoRA and runtime updates allowed, or set rounds.sampling."
                    "update_command"
                ) from None

    def close(self) -> None:
        """Delete the folder, which is exported again where it is needed."""
        if self._folder is not None:
            remove(self._folder)

    @property
    def _is_merged(self) -> bool:
        """Whether servers get the full model."""
        adapter = self._config.adapter
        return adapter is None or (self._options.update_command is not None and adapter.merge)

    def _unload(self, server: str, name: str) -> None:
        """Free the place of an adapter; it does no harm where it stays."""
        with contextlib.suppress(Failure, Refusal):
            post(
                f"{server}/unload_lora_adapter",
                {"lora_name": name},
                self._options.api_key,
                self._options.timeout,
            )


def _run(command: str, folder: Path, server: str) -> None:
    """Run the user's command for one server; raises UserError if it fails."""
    for name, value in (("{folder}", str(folder)), ("{server}", server)):
        command = command.replace(name, shlex.quote(value))
    # The config's command is the user's own.
    done = subprocess.run(command, shell=True, capture_output=True, text=True)  # noqa: S602
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(
            f"rounds.sampling.update_command: failed for {server} with exit code "
            f"{done.returncode} ({lines[-1][:200] if lines else 'no output'}); fix it"
        )
