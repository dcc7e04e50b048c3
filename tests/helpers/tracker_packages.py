"""Stand-ins for the packages of trackers, with the signatures of the real ones.

They take what wandb 0.22, mlflow 3.17 and trackio 0.43 take, and keep it in a store that outlives a
process, as their servers do.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest


class Store:
    """Runs by the id that their tracker knows them by: settings, and metrics by step."""

    def __init__(self) -> None:
        self.settings: dict[str, dict[str, Any]] = {}
        self.metrics: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.status: dict[str, str] = {}
        self.fails_at: int | None = None  # step at which the network breaks

    def begin(self, run: str, **settings: Any) -> None:
        self.settings.setdefault(run, settings)
        self.metrics.setdefault(run, [])
        self.status[run] = "RUNNING"

    def log(self, run: str, step: int, values: dict[str, float]) -> None:
        if step == self.fails_at:
            raise ConnectionError("no route to host\nafter 5 tries")
        assert all(isinstance(value, int | float) for value in values.values())
        self.metrics[run].append((step, values))


class _Run:
    """Run of wandb or trackio."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        assert step is not None
        self._store.log(self._name, step, metrics)

    def finish(self) -> None:
        self._store.status[self._name] = "FINISHED"


class Metric(NamedTuple):
    key: str
    value: float
    timestamp: int
    step: int


class Param(NamedTuple):
    key: str
    value: str


class _Client:
    """Client of mlflow."""

    store: Store
    experiments: dict[str, str]

    def get_experiment_by_name(self, name: str) -> Any:
        found = self.experiments.get(name)
        return None if found is None else SimpleNamespace(experiment_id=found)

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = str(len(self.experiments) + 1)
        return self.experiments[name]

    def create_run(self, experiment_id: str, *, run_name: str | None = None) -> Any:
        run = f"id{len(self.store.settings) + 1}"
        self.store.begin(run, experiment=experiment_id, name=run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id=run))

    def log_batch(
        self, run_id: str, metrics: Sequence[Metric] = (), params: Sequence[Param] = ()
    ) -> None:
        assert len(params) <= 100 and all(len(param.value) <= 500 for param in params)
        self.store.settings[run_id].setdefault("params", {}).update(params)
        for metric in metrics:
            assert metric.timestamp > 10**12  # in milliseconds
            self.store.log(run_id, metric.step, {metric.key: metric.value})

    def update_run(self, run_id: str, status: str | None = None) -> None:
        assert run_id in self.store.settings and status is not None
        self.store.status[run_id] = status

    def set_terminated(self, run_id: str) -> None:
        self.store.status[run_id] = "FINISHED"


def install(monkeypatch: pytest.MonkeyPatch) -> dict[str, Store]:
    """Put stand-ins in the place of the packages; return the store of each."""
    stores = {name: Store() for name in ("wandb", "mlflow", "trackio")}

    def wandb_init(
        *, project: str, name: str, id: str, dir: Any, config: dict[str, Any], resume: str
    ) -> _Run:
        assert resume == "allow"
        stores["wandb"].begin(id, project=project, name=name, dir=str(dir), config=config)
        return _Run(stores["wandb"], id)

    def trackio_init(
        project: str,
        name: str | None = None,
        *,
        space_id: str | None = None,
        config: dict[str, Any] | None = None,
        resume: str = "never",
        embed: bool = True,
    ) -> _Run:
        assert name is not None and resume == "allow" and not embed
        stores["trackio"].begin(name, project=project, space=space_id, config=config)
        return _Run(stores["trackio"], name)

    client = type("MlflowClient", (_Client,), {"store": stores["mlflow"], "experiments": {}})
    modules: dict[str, dict[str, Any]] = {
        "wandb": {"init": wandb_init},
        "trackio": {"init": trackio_init},
        "mlflow": {"MlflowClient": client},
        "mlflow.entities": {"Metric": Metric, "Param": Param},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    return stores
