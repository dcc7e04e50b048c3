"""Runs on several sources: their parts of an epoch, their metrics, and exact resumption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastpref import metrics
from fastpref.config import Config
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display
from tests.helpers.data import labelled, rows, scored, write_jsonl
from tests.helpers.training_runs import lose_power_after, records, run, told, weights

MakeConfig = Callable[..., Config]
KINDS = {"dpo": rows, "bco": labelled, "kto": labelled, "nca": scored}


def three(folder: Path, make: Callable[[int], list[dict[str, Any]]] = rows) -> list[dict[str, Any]]:
    """Sources of 12, 20 and 4 rows, with shares 1/2, 1/4 and 1/4."""
    parts, sources = make(36), []
    for name, start, stop, share in (("a", 0, 12, 0.5), ("b", 12, 32, 0.25), ("c", 32, 36, 0.25)):
        path = write_jsonl(folder / f"{name}.jsonl", parts[start:stop])
        sources.append({"path": str(path), "share": share})
    return sources


def test_each_source_has_its_part_of_every_epoch(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    config = make_config(data__train=three(tmp_path), training__steps=2)
    trainer = Trainer(config, display)
    groups = trainer.run.train.groups
    assert len(groups) == 36 and trainer.plan.steps_per_epoch == 9
    for epoch in range(3):
        indices = [i for k in range(9) for i in trainer.plan.groups(9 * epoch + k)]
        rows_of = [name.split(":")[0] for name in map(lambda i: groups.row_names([i])[0], indices)]
        assert {name: rows_of.count(name) for name in "abc"} == {"a": 18, "b": 9, "c": 9}
    assert groups.row_names([0, 11, 12, 32]) == ["a:1", "a:12", "b:1", "c:1"]
    assert [group.index for group in map(groups.__getitem__, (3, 30))] == [3, 30]
    assert groups[30].first == 60


@pytest.mark.parametrize("name", KINDS)
def test_metrics_of_the_sources_add_up_to_those_of_the_step(
    make_config: MakeConfig, display: Display, tmp_path: Path, name: str
) -> None:
    sources = three(tmp_path, KINDS[name])
    held_out = {"first": sources[0]["path"], "second": sources[1]["path"]}
    config = make_config(
        loss=name, data__train=sources, data__eval=held_out, training__steps=2,
        training__batch_size=12,
    )  # fmt: skip
    run(config, display)
    evaluation, _, step, _ = records(config)
    parts = {"a": 6, "b": 3, "c": 3}
    assert sum(step[f"loss/{s}"] * n for s, n in parts.items()) / 12 == pytest.approx(step["loss"])
    for metric in ("rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert any(f"{metric}/{source}" in step for source in parts), metric
    if name == "dpo":
        margins = sum(step[f"rewards/margins/{s}"] * n for s, n in parts.items()) / 12
        assert margins == pytest.approx(step["rewards/margins"])
    mean = (evaluation["eval_loss/first"] * 12 + evaluation["eval_loss/second"] * 20) / 32
    assert mean == pytest.approx(evaluation["eval_loss"])


def test_a_held_out_set_has_the_metrics_that_it_has_alone(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    paths = {source["path"][-7]: source["path"] for source in three(tmp_path)}
    together = make_config(data__eval=paths, training__steps=3)
    run(together, display)
    alone = make_config(
        data__eval=paths["b"], training__steps=3, training__output_dir=str(tmp_path / "alone")
    )
    run(alone, display)
    for ours, expected in zip(records(together), records(alone), strict=True):
        for name in metrics.PAIR_METRICS:
            if f"eval_{name}" in expected:
                assert ours[f"eval_{name}/b"] == pytest.approx(expected[f"eval_{name}"], rel=1e-12)


def test_a_resumed_run_is_the_same_to_the_bit(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "data__train": three(tmp_path),
        "training__steps": 14,  # into the second epoch
        "training__log_every": 3,
        "training__checkpoint_every": 5,
    }
    whole = run(make_config(**options), display)
    expected = records(whole.config)
    options["training__output_dir"] = str(tmp_path / "stopped")
    stopped = Trainer(make_config(**options), display)
    lose_power_after(stopped, 11)
    with pytest.raises(RuntimeError, match=r"power cut"):
        stopped.loop([])
    resumed = run(make_config(**options, resume="auto"), display)
    assert resumed.step == 14
    assert records(resumed.config) == expected
    for name, weight in weights(whole).items():
        assert torch.equal(weights(resumed)[name], weight), name


def test_other_shares_are_another_order_which_is_refused(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    sources = three(tmp_path)
    run(make_config(data__train=sources, training__checkpoint_every=2, training__steps=2), display)
    sources[0]["share"], sources[1]["share"] = 0.25, 0.5
    config = make_config(data__train=sources, training__steps=4, resume="auto")
    with pytest.raises(ValueError, match=r"resume: .*data.train"):
        Trainer(config, display)


def test_the_reference_covers_rows_that_no_epoch_has_had_yet(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    sources = three(tmp_path)
    for source, weight in zip(sources, (0.25, 2.5, 1), strict=True):
        source["weight"] = weight
        del source["share"]
    config = make_config(data__train=sources, training__steps=2)
    trainer = Trainer(config, display)
    assert trainer.plan.steps_per_epoch == -(-(3 + 50 + 4) // 4)
    split = trainer.run.train
    cached = split.reference(trainer.policy.batches(split.groups, [5])[0])
    assert cached is not None
    with torch.no_grad():
        (batch,) = trainer.policy.batches(split.groups, [5])
        assert torch.equal(cached.logps, trainer.policy(batch).logps)
    assert np.bincount(trainer.plan.groups(0), minlength=36).sum() == 4


def test_a_run_says_what_each_source_contributes(make_config: MakeConfig, tmp_path: Path) -> None:
    text = told(make_config(data__train=three(tmp_path), training__steps=1))
    assert "train: a: 18 pairs an epoch, 50.00%, 1.5 times its 12" in text
    assert "train: b: 9 pairs an epoch, 25.00%, 0.45 times its 20" in text
