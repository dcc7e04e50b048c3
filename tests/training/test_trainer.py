"""The loop: exact zeros at the start, exact accumulation, exact resumption, and clean stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref import losses, metrics
from fastpref.config import Config, ConfigError
from fastpref.data.collate import collate
from fastpref.data.dataset import load_groups
from fastpref.metrics import preference as monitors
from fastpref.model.policy import Policy
from fastpref.training.nonfinite import Diverged
from fastpref.training.signals import Interrupted
from fastpref.training.trainer import Trainer
from fastpref.trunk import build_trunk
from fastpref.utils.progress import Display
from tests.helpers.data import rows, write_jsonl
from tests.helpers.policies import policy_of
from tests.helpers.training_runs import records, run, weights

MakeConfig = Callable[..., Config]


@pytest.mark.parametrize("name", losses.names("pairwise"))
@pytest.mark.parametrize("soft", [True, False])
def test_every_objective_trains(
    make_config: MakeConfig, display: Display, tmp_path: Path, name: str, soft: bool
) -> None:
    path = write_jsonl(tmp_path / "soft.jsonl", rows(12, soft=True))
    config = make_config(
        loss=name, data__train=str(path), data__soft_labels=soft, training__epochs=4,
        optim__lr=3e-5 if soft else 1e-3,  # some overshoot the finite optimum of a soft label
    )  # fmt: skip
    if soft and not losses.build(name).soft_labels:
        with pytest.raises(ConfigError, match=f"loss: {name} does not take soft labels"):
            Trainer(config, display)
        return
    Trainer(config, display).loop([])
    lines = records(config)
    assert len(lines) == 12
    assert sum(x["loss"] for x in lines[-3:]) < sum(x["loss"] for x in lines[:3])


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"reference": "frozen"},
        {"model__dtype": "float64"},
        {"adapter": {"name": "lora", "r": 4}},
        {"training__micro_batch_tokens": 60},
        {"training__activation_checkpointing": "full"},
    ],
)
def test_rewards_of_the_first_step_are_exactly_zero(
    make_config: MakeConfig, display: Display, change: dict[str, Any]
) -> None:
    data = make_config().data.train
    config = make_config(data__eval=data, training__steps=2, **change)
    run(config, display)
    evaluation, first, second, *_ = records(config)
    for name in ("chosen", "rejected", "margins"):
        assert first[f"rewards/{name}"] == 0.0
        assert evaluation[f"eval_rewards/{name}"] == 0.0
    assert second["rewards/margins"] != 0.0


def test_metrics_have_the_names_that_people_expect(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    soft = write_jsonl(tmp_path / "soft.jsonl", rows(10, soft=True))
    config = make_config(data__eval=str(soft), training__steps=2, optim__warmup_steps=2)
    run(config, display)
    expected = {"step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "entropy"}
    pairs = {"chosen", "rejected", "accuracies", "margins"}
    expected |= {f"rewards/{name}" for name in pairs} | {"logps/chosen", "logps/rejected"}
    watched = {name for name in monitors.MONITORS if not name.startswith("preference/")}
    evaluation, first, second, _ = records(config)
    assert expected | watched == set(first) == set(second)
    curves = {"eval_contrast/histogram", "eval_preference/calibration"}
    assert set(evaluation) == {"step", "epoch", "eval_entropy"} | curves | {
        f"eval_{name}" for name in metrics.PAIR_METRICS + monitors.MONITORS
    }
    assert sum(evaluation["eval_preference/calibration"]["count"]) == 10
    assert sum(evaluation["eval_contrast/histogram"]["counts"]) == 10
    assert (first["learning_rate"], second["learning_rate"]) == (5e-4, 1e-3)
    assert second["num_tokens"] > first["num_tokens"] > 0


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_four_micro_batches_equal_one(
    make_config: MakeConfig, display: Display, tmp_path: Path, name: str
) -> None:
    """Same parameters to 1e-6 after three steps, the last of them with fewer pairs."""
    data = str(write_jsonl(tmp_path / "d.jsonl", rows(10)))
    trained = []
    for tokens in (30, 100_000):  # 30 holds one pair at a time
        # Epsilon 1e-4: where a gradient is zero but for rounding, Adam's quotient is noise.
        config = make_config(
            data__train=data,
            optim={"name": name, "lr": 1e-3, "eps": 1e-4},
            training__micro_batch_tokens=tokens,
            training__output_dir=str(tmp_path / str(tokens)),
        )
        trainer = run(config, display)
        parts = [len(trainer.plan.step(k)) for k in range(3)]
        assert parts == ([4, 4, 2] if tokens == 30 else [1, 1, 1])
        trained.append(weights(trainer))
    for key, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][key], rtol=0, atol=1e-6)


def test_the_loss_of_a_step_is_the_mean_over_its_pairs(
    make_config: MakeConfig, display: Display
) -> None:
    config = make_config(loss="simpo", training__steps=1)
    trainer = run(config, display)
    fresh = policy_of(config, trainer.run.tokenizer, torch.device("cpu"))
    indices = [i for part in trainer.plan.step(0) for i in part]
    batch = collate([trainer.run.train.groups[i] for i in indices])
    from fastpref.logps import SequenceLogps

    logps = SequenceLogps.from_sequences(fresh(batch).logps, batch.lengths)
    expected = losses.build("simpo")(logps, None).loss.mean().item()
    assert records(config)[0]["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"optim__schedule": "cosine", "optim__warmup_steps": 2},
        {"optim": {"name": "rmsprop", "lr": 1e-3}, "training__log_every": 3},
        {
            "adapter": {"name": "lora", "r": 4, "dropout": 0.2},
            "training__activation_checkpointing": "full",
        },
    ],
)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    make_config: MakeConfig, display: Display, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Interrupted after step 5, with a checkpoint from step 4 and a window of metrics half full."""
    settings = {"training__epochs": 3, "training__checkpoint_every": 2, **change}
    settings["data__eval"] = make_config().data.train
    whole = make_config(training__output_dir=str(tmp_path / "whole"), **settings)
    expected = weights(run(whole, display))
    broken = make_config(training__output_dir=str(tmp_path / "broken"), **settings)
    trainer = Trainer(broken, display)
    original = trainer._train_step

    def failing(with_entropy: bool) -> Any:
        if trainer.step == 5:
            raise RuntimeError("power cut")
        return original(with_entropy)

    trainer._train_step = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.loop([])
    resumed = make_config(training__output_dir=str(tmp_path / "broken"), resume="auto", **settings)
    again = weights(run(resumed, display))
    assert records(resumed) == records(whole)
    assert all(torch.equal(expected[name], again[name]) for name in expected)


def test_a_finished_run_resumes_to_its_export(make_config: MakeConfig, display: Display) -> None:
    settings = {"training__epochs": 1, "training__checkpoint_every": 2}
    first = run(make_config(**settings), display)
    before = records(make_config(**settings))
    again = run(make_config(resume="auto", **settings), display)
    assert records(make_config(**settings)) == before
    assert all(torch.equal(weights(first)[n], w) for n, w in weights(again).items())


def test_a_signal_saves_and_stops_and_resuming_goes_on(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    whole = make_config(training__output_dir=str(tmp_path / "whole"))
    run(whole, display)
    config = make_config()
    with pytest.raises(Interrupted, match="SIGTERM after step 1; continue with resume=auto"):
        Trainer(config, display).loop([signal.SIGTERM])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]
    run(make_config(resume="auto"), display)
    assert records(config) == records(whole)


def test_a_signal_during_the_evaluation_is_saved_too(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    config = make_config(data__eval=make_config().data.train, training__eval_every=1)
    trainer, signals = Trainer(config, display), list[int]()
    original = trainer._evaluate

    def interrupted(pairs: Any) -> None:
        original(pairs)
        if trainer.step == 2:
            signals.append(signal.SIGINT)

    trainer._evaluate = interrupted  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="SIGINT after step 2"):
        trainer.loop(signals)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]


def test_going_back_to_an_older_checkpoint_abandons_the_later_ones(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    settings = {"training__checkpoint_every": 1, "training__keep_checkpoints": 3}
    run(make_config(training__steps=6, **settings), display)
    older = tmp_path / "run" / "checkpoints" / "step-4"
    run(make_config(resume=str(older), training__steps=5, **settings), display)
    left = {path.name for path in older.parent.iterdir()}
    assert left == {"step-4", "step-5"}
    assert [x["step"] for x in records(make_config())] == [1, 2, 3, 4, 5]


def test_only_the_newest_checkpoints_are_kept(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    run(make_config(training__steps=7, training__checkpoint_every=2), display)
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"step-6", "step-7"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training__seed": 1}, r"another order of it: training\.seed: 0 → 1; restore"),
        ({"training__batch_size": 2}, r"order of it: training\.batch_size: 4 → 2; restore"),
        ({"adapter": {"name": "lora"}}, "is of another model or adapter"),
        ({"optim__name": "rmsprop"}, "is of a run with AdamW; restore optim.name"),
    ],
)
def test_resuming_something_else_is_refused(
    make_config: MakeConfig, display: Display, change: dict[str, Any], message: str
) -> None:
    run(make_config(training__checkpoint_every=2), display)
    with pytest.raises(ValueError, match=message):
        Trainer(make_config(resume="auto", training__checkpoint_every=2, **change), display)


def test_a_changed_rate_is_used_and_announced(
    make_config: MakeConfig, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_config(training__steps=2, training__checkpoint_every=1), display)
    notes: list[str] = []
    monkeypatch.setattr(display, "note", notes.append)
    changes = {"optim__weight_decay": 0.5, "training__steps": 3, "training__checkpoint_every": 1}
    trainer = Trainer(make_config(resume="auto", **changes), display)
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert "changed since the run began: optim.weight_decay: 0.0 → 0.5" in notes


def test_rows_without_p_beside_soft_labels(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    mixed = [{**row, "p": row["p"] if i % 2 else None} for i, row in enumerate(rows(16, soft=True))]
    path = str(write_jsonl(tmp_path / "mixed.jsonl", mixed))
    config = make_config(data__train=path, data__eval=path, training__steps=1)
    run(config, display)
    assert records(config)[0]["eval_preference/accuracy"] >= 0


def test_responses_longer_than_the_model_knows(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    long = [{"prompt": "User: a\nAssistant:", "chosen": " tea" * 300, "rejected": " bread"}]
    path = str(write_jsonl(tmp_path / "long.jsonl", long))
    config = make_config(data__train=path, data__max_length=2048)
    with pytest.raises(ConfigError, match=r"but the model knows 256; set data.max_length=256"):
        Trainer(config, display)


def test_an_output_folder_with_a_run_is_not_overwritten(
    make_config: MakeConfig, display: Display
) -> None:
    run(make_config(training__steps=1), display)
    with pytest.raises(ConfigError, match="already holds a run; continue it with resume=auto"):
        Trainer(make_config(training__steps=1), display)


@pytest.mark.parametrize(("metric", "poison"), [("loss", "output"), ("grad_norm", "gradient")])
def test_a_non_finite_step_stops_the_run_and_names_its_rows(
    make_config: MakeConfig, display: Display, metric: str, poison: str
) -> None:
    config = make_config(training__log_every=3, training__epochs=3, training__checkpoint_every=9)
    trainer = Trainer(config, display)
    original = trainer._train_step
    parameter = trainer.parameters[0]

    def poisoned(with_entropy: bool) -> Any:
        if trainer.step == 4 and poison == "output":
            parameter.data.fill_(float("nan"))
        handle = None
        if trainer.step == 4 and poison == "gradient":
            handle = parameter.register_hook(lambda g: torch.full_like(g, float("inf")))
        result = original(with_entropy)
        if handle is not None:
            handle.remove()
        return result

    trainer._train_step = poisoned  # type: ignore[method-assign]
    with pytest.raises(Diverged, match=f"{metric} is (nan|inf) at step 5"):
        trainer.loop([])
    report = json.loads((trainer.run.folder / "nonfinite.json").read_text())
    indices = [i for part in trainer.plan.step(4) for i in part]
    assert report["rows"] == sorted(trainer.run.train.groups[i].row for i in indices)
    assert (report["step"], report["metric"]) == (5, metric)
    assert not (trainer.run.folder / "checkpoints").exists()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"model": {"init": "random", "dtype": "float32", "config": {"tie_word_embeddings": True}}},
        {"adapter": {"name": "lora", "r": 4}},
    ],
)
def test_the_export_loads_in_transformers_with_the_same_log_probs(
    make_config: MakeConfig, display: Display, change: dict[str, Any]
) -> None:
    if "model" in change:
        llama = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1}
        llama |= {"intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 300}
        change["model"]["config"] = {**llama, **change["model"]["config"]}
    config = make_config(training__steps=3, **change)
    trainer = Trainer(config, display)
    trainer.loop([])
    dataset = trainer.run.train.groups
    batch = collate([dataset[i] for i in range(6)])
    with torch.no_grad():
        ours = trainer.policy(batch).logps
    folder = trainer.export()
    exported = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert load_groups(config.data.train, tokenizer, config.data).fingerprint == dataset.fingerprint
    with torch.no_grad():
        logits = exported(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.predictor_positions]
    logps = logits.log_softmax(-1).gather(-1, batch.labels[:, None])[:, 0]
    expected = torch.stack([part.mean() for part in logps.split(batch.lengths.tolist())])
    torch.testing.assert_close(ours / batch.lengths, expected, rtol=0, atol=1e-5)
    reloaded = Policy(exported, torch.float32)
    reloaded.trunk = build_trunk(exported.base_model)
    with torch.no_grad():
        again = reloaded(batch).logps
    if config.adapter is None:  # merging rounds B A into the weights
        assert torch.equal(again, ours)
    card = (folder / "README.md").read_text()
    assert "beta" not in card.split("## Config")[0] and "name: dpo" in card
    assert "| logps/chosen |" in card and "Load it with transformers 5 or later." in card


def test_an_adapter_is_exported_alone_where_it_is_not_merged(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    config = make_config(training__steps=1, adapter={"name": "lora", "merge": False})
    run(config, display)
    names = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names


def test_evaluation_does_not_change_training(make_config: MakeConfig, display: Display) -> None:
    data, folder = make_config().data.train, make_config().training.output_dir
    plain = weights(run(make_config(training__output_dir=f"{folder}-1"), display))
    config = make_config(
        training__output_dir=f"{folder}-2", data__eval=data, training__eval_every=1
    )
    watched = weights(run(config, display))
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert [x["step"] for x in records(config) if "eval_loss" in x] == [0, 1, 2, 3]


def test_tensorboard(make_config: MakeConfig, display: Display, tmp_path: Path) -> None:
    run(make_config(training__steps=1, training__report_to=["tensorboard"]), display)
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_ctrl_c_in_a_real_process(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(training__epochs=500)
    path = tmp_path / "c.yaml"
    path.write_text(config.to_yaml())
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "fastpref", "train", str(path)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 90
    while not metrics.read_records(tmp_path / "run" / "metrics.jsonl"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped by SIGINT after step" in errors and "Traceback" not in errors
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    (shard,) = saved.glob("*.safetensors")
    assert load_file(shard)
