"""Training on two and on four ranks: the weights, metrics and checkpoints of one process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastpref import config as configs
from fastpref import distributed, metrics
from fastpref.config import ConfigError
from fastpref.model import fsdp
from fastpref.model.policy import Policy
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display
from tests.helpers import rank_processes
from tests.helpers.data import labelled, rows, scored, write_jsonl

# Of 8 groups; the last step of an epoch has 5, fewer than the micro-batches of four ranks.
STEPS = 5
LORA = {"name": "lora", "r": 4, "alpha": 8}
RC = {"name": "rc", "momentum": 0.9}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "accumulated": {"training": {"micro_batch_tokens": 160}},
    "tied": {
        "model": {"path": "tied"},
        "reference": "frozen",
        "training": {"activation_checkpointing": "selective"},
    },
    "lora": {"adapter": LORA},
    "lora, reference beside it": {"adapter": LORA, "loss": "tdpo2"},
    "calibrated": {"calibration": RC, "training": {"micro_batch_tokens": 160}},
    "calibrated copies": {"parallel": {"shard": 1}, "adapter": LORA, "calibration": RC},
    "hybrid": {"parallel": {"replicate": 2}, "training": {"micro_batch_tokens": 160}},
    "copies": {"parallel": {"shard": 1}, "loss": "ti_dpo", "training": {"micro_batch_tokens": 160}},
    "projected": {"update": "dpo_pg", "training": {"micro_batch_tokens": 160, "layout": "padded"}},
    "pointwise": {"loss": "kto", "data": {"train": "labelled"}},
    "running mean": {"loss": "bco", "data": {"train": "labelled"}},
    "groupwise": {"loss": "nca", "data": {"train": "scored"}},
}
ON_FOUR = ("full", "tied", "lora", "calibrated", "hybrid")
RESUMED = ("calibrated", "lora")


def make(home: Path, case: str, name: str, **training: Any) -> configs.Config:
    """The config of a case; `name` is its run directory."""
    change = dict(CASES[case])
    if distributed.world_size() == 1:
        change.pop("parallel", None)
    values: dict[str, Any] = {
        "loss": "dpo",
        # With a large eps no update depends on the sign of a rounding error.
        "optim": {"lr": 3e-3, "eps": 1e-3},
        "monitor": {"band_every": 1}
        if change.get("loss", "dpo") == "dpo" and "update" not in change
        else {},
        **change,
    }
    model = home / change.get("model", {}).get("path", "llama")
    values["model"] = {"path": str(model), "dtype": "float32"}
    data = home / f"{change.get('data', {}).get('train', 'rows')}.jsonl"
    values["data"] = {"train": str(data), "eval": str(data), "max_length": 64}
    values["data"]["cache"] = str(home / "cache")
    values["training"] = {
        "steps": STEPS,
        "batch_size": 8,
        "micro_batch_tokens": 4096,
        "log_every": 2,
        "device": "cpu",
        "checkpoint_every": None,
        "output_dir": str(home / name),
        **change.get("training", {}),
        **training,
    }
    return configs.parse(values)


def train(config: configs.Config) -> dict[str, Tensor]:
    """Train to the end, export, and return the full trained weights."""
    trainer = Trainer(config, Display(Console(quiet=True)))
    trainer.loop([])
    trained = {
        name: fsdp.full_tensor(p.detach()).clone()
        for name, p in trainer.policy.trainable_parameters().items()
    }
    trainer.export()
    return trained


def work(rank: int, port: int, world: int, home: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    with distributed.process_group():
        for case in CASES if world == 2 else ON_FOUR:
            weights = train(make(home, case, f"{case}-{world}"))
            if rank == 0:
                torch.save(weights, home / f"{case}-{world}.pt")
        for case in RESUMED if world == 2 else ():
            train(make(home, case, f"{case}-cut", steps=3, checkpoint_every=3, log_every=1))
        for case in RESUMED if world == 4 else ():
            resume(home, case, world)


def resume(home: Path, case: str, world: int) -> None:
    """Continue a run of two ranks on `world` ranks, in a copy of its directory."""
    source, copy = home / f"{case}-cut", home / f"{case}-resumed-{world}"
    if distributed.is_main_process():
        copy.mkdir()
        (copy / "metrics.jsonl").write_text((source / "metrics.jsonl").read_text())
    distributed.barrier()
    config = make(home, case, copy.name, log_every=1)
    resumed = config.model_copy(update={"resume": str(source / "checkpoints" / "step-3")})
    weights = train(resumed)
    if distributed.is_main_process():
        torch.save(weights, home / f"{copy.name}.pt")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Path:
    """Models, data, and the results of each case on one, two and four ranks."""
    folder = tmp_path_factory.mktemp("sharding")
    (folder / "llama").symlink_to(tiny_llama)
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(tiny_llama, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "tied")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder / "tied")
    for name, records in (("rows", rows(21)), ("labelled", labelled(21)), ("scored", scored(21))):
        write_jsonl(folder / f"{name}.jsonl", records)
    for case in CASES:
        torch.save(train(make(folder, case, f"{case}-1")), folder / f"{case}-1.pt")
    rank_processes.start(work, 2, 2, folder)
    for case in RESUMED:
        train(make(folder, case, f"{case}-whole", log_every=1))
        resume(folder, case, 1)
    rank_processes.start(work, 4, 4, folder)
    return folder


def lines(run: Path) -> list[dict[str, Any]]:
    """Numeric metrics, except for time and memory."""
    records = []
    for line in metrics.read_records(run / "metrics.jsonl"):
        skipped = {*metrics.TIMING_METRICS}
        if line["step"] <= 1:  # rewards are 0 up to rounding errors, whose sign is arbitrary
            skipped |= {"rewards/accuracies", "eval_rewards/accuracies"}
        compared = {k: v for k, v in line.items() if k not in skipped}
        records.append({k: v for k, v in compared.items() if isinstance(v, int | float)})
    return records


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-5)


def assert_same_lines(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line.keys() for line in actual] == [line.keys() for line in expected]
    for line, other in zip(actual, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("case", "world"), [*((case, 2) for case in CASES), *((case, 4) for case in ON_FOUR)]
)
def test_ranks_train_the_weights_of_one_process(home: Path, case: str, world: int) -> None:
    actual, expected = (torch.load(home / f"{case}-{n}.pt") for n in (world, 1))
    assert_same_weights(actual, expected)
    assert_same_lines(lines(home / f"{case}-{world}"), lines(home / f"{case}-1"))
    start = lines(home / f"{case}-{world}")[0]
    if case != "tied":
        assert start["eval_rewards/chosen"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("case", ["full", "tied", "lora"])
def test_ranks_export_what_one_process_does(home: Path, case: str) -> None:
    models = [
        AutoModelForCausalLM.from_pretrained(home / f"{case}-{n}" / "model").state_dict()
        for n in (1, 2, 4)
    ]
    assert_same_weights(models[1], models[0])
    assert_same_weights(models[2], models[0])


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("case", RESUMED)
def test_a_checkpoint_of_two_ranks_resumes_on_any_number(home: Path, case: str, world: int) -> None:
    run, whole = home / f"{case}-resumed-{world}", home / f"{case}-whole"
    resumed, expected = lines(run), lines(whole)
    assert_same_lines(
        [line for line in resumed if line["step"] > 3], [e for e in expected if e["step"] > 3]
    )


def test_only_the_first_rank_writes(home: Path) -> None:
    assert json.loads((home / "full-4" / "metrics.jsonl").read_text().splitlines()[0])
    four, one = (
        [line["step"] for line in metrics.read_records(home / f"full-{n}" / "metrics.jsonl")]
        for n in (4, 1)
    )
    assert four == one


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"replicate": 2, "shard": 2}, "replicate 2 · shard 2 needs 4 ranks, and there is 1"),
        ({"shard": 8}, "replicate 1 · shard 8 needs 8 ranks, and there is 1"),
        ({"replicate": 3}, "replicate 3 · shard 1 needs 3 ranks, and there is 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fsdp.make_mesh(configs.Parallel(**mesh), torch.device("cpu"))


@pytest.mark.parametrize("mesh", [{}, {"replicate": 1}, {"shard": 1}])
def test_a_rank_alone_needs_no_mesh(mesh: dict[str, Any]) -> None:
    assert fsdp.make_mesh(configs.Parallel(**mesh), torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "ti_dpo"}, "ti_dpo takes gradients of its own .* set parallel.shard=1"),
        ({"calibration": {"scope": "full"}}, "scope: full takes gradients .* use head, or set"),
    ],
)
def test_what_a_sharded_model_cannot_do_is_refused(
    make_config: Any, display: Display, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    always = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(Policy, "sharded", always, raising=False)
    monkeypatch.setattr(Policy, "reshard", lambda self: None, raising=False)
    with pytest.raises(ConfigError, match=message):
        Trainer(make_config(**change), display)
