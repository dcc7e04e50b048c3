"""Give the weights of a round to servers, by their protocol or by a command of the user."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from pathlib import Path

from fastpref import distributed
from fastpref.config import RoundSampling
from fastpref.evaluation.judge.endpoint import Failure, Refusal
from fastpref.model.export import export
from fastpref.rounds.openai_protocol import OpenAIProtocol
from fastpref.rounds.protocol import PREFIX, ServerProtocol, Weights
from fastpref.rounds.session import Session
from fastpref.rounds.sglang_protocol import SGLangProtocol
from fastpref.utils.atomic_files import remove, replacing
from fastpref.utils.errors import UserError

_PROTOCOLS: dict[str, Callable[[RoundSampling, AbstractSet[int]], ServerProtocol]] = {
    "openai": OpenAIProtocol,
    "sglang": SGLangProtocol,
}


class ServedWeights:
    """The weights that the servers have, in a folder of the run that they can read."""

    def __init__(self, session: Session) -> None:
        self._session, self._config = session, session.config
        self._options: RoundSampling = session.rounds.sampling
        self.protocol = _PROTOCOLS[self._options.protocol](self._options, session.ends)
        self._weights: Weights | None = None

    @property
    def weights(self) -> Weights:
        """Weights of the last update."""
        assert self._weights is not None
        return self._weights

    def update(self, key: str) -> None:
        """Write the policy as it is to a folder named by its key, and give it to all servers.

        A server that fails gets it later, when it says that it has lost the weights. Of a process's
        first update a failure is an error: the address may be wrong.
        """
        folder = (self._session.folder / "rounds" / f"weights-{key[:16]}").absolute()
        previous = self._weights
        if previous is not None and folder == previous.folder:
            return
        if distributed.on_main_process(lambda: self._is_missing(folder)):
            self._export(folder)
        name = f"{PREFIX}{key[:16]}"
        if self._options.update_command is not None:
            name = self._options.model or str(self._config.model.path)
        self._weights = Weights(name, folder, not self._is_merged)
        distributed.on_main_process(lambda: self._give_to_all(previous))

    def _is_missing(self, folder: Path) -> bool:
        """Whether weights are not written yet; those of other rounds are deleted."""
        for stale in folder.parent.glob("weights-*"):
            if stale != folder:
                remove(stale)
        return not folder.exists()

    def _export(self, folder: Path) -> None:
        """Write the policy, of whose weights the ranks may have shards."""
        session = self._session
        if not distributed.is_main_process():
            export(session.policy, session.tokenizer, folder, self._is_merged)
            return
        with replacing(folder) as temporary:
            export(session.policy, session.tokenizer, temporary, self._is_merged)

    def _give_to_all(self, previous: Weights | None) -> None:
        for server in self._options.servers:
            try:
                self.give(server)
            except Failure as failure:
                if previous is None:
                    raise UserError(
                        f"rounds.sampling.servers: {server} does not take the weights ({failure}); "
                        "start it, or name another"
                    ) from None
                self._session.display.note(f"{server}: {failure}; it gets the weights later")
            else:
                self._unload(server, previous)

    def give(self, server: str) -> None:
        """Give the weights to one server.

        Raises Failure where another try may succeed, and UserError if it does not take them.
        """
        if self._options.update_command is not None:
            _run(self._options.update_command, self.weights.folder, server)
        else:
            self.protocol.load(server, self.weights)

    def close(self) -> None:
        """Delete the folder, which is exported again where it is needed."""
        if self._weights is not None and distributed.is_main_process():
            remove(self._weights.folder)

    @property
    def _is_merged(self) -> bool:
        """Whether servers get the full model."""
        adapter = self._config.adapter
        return adapter is None or (self._options.update_command is not None and adapter.merge)

    def _unload(self, server: str, previous: Weights | None) -> None:
        """Free the place of the weights before; it does no harm where they stay."""
        if previous is not None and self._options.update_command is None:
            with contextlib.suppress(Failure, Refusal):
                self.protocol.unload(server, previous)


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
