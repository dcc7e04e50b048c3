"""Single responses and scored groups through the loop, with the guarantees that pairs have."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref import losses
from fastpref.config import Config, ConfigError
from fastpref.data.collate import collate
from fastpref.data.dataset import load_groups
from fastpref.data.readers import DataError
from fastpref.losses import PointwiseOutput
from fastpref.metrics import PAIR_METRICS
from fastpref.training.setup import prepare
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display
from tests.helpers.data import labelled, rows, scored, write_jsonl
from tests.helpers.policies import policy_of
from tests.helpers.training_runs import records, run, weights

MakeConfig = Callable[..., Config]
POINTWISE, GROUPWISE = losses.names("pointwise"), losses.names("groupwise")
# Without beta, rewards move ten times as fast; nash_md has its optimum within 5 nats.
RATES = {"ddro_unpaired": 1e-4, "kto_simple": 1e-4, "nash_md": 2e-4}


@pytest.fixture
def make(make_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """A config for an objective on 12 rows of its kind."""
    files = {
        "pointwise": write_jsonl(tmp_path / "labelled.jsonl", labelled(12)),
        "groupwise": write_jsonl(tmp_path / "scored.jsonl", scored(12)),
    }

    def made(loss: Any, **overrides: Any) -> Config:
        name = loss if isinstance(loss, str) else loss["name"]
        data = {"data__train": str(files[losses.describe(name).kind])}
        return make_config(**{"loss": loss, **data, **overrides})

    return made


@pytest.mark.parametrize("name", POINTWISE + GROUPWISE)
def test_every_objective_trains(make: MakeConfig, display: Display, name: str) -> None:
    loss = {"name": name} | ({"alpha": 5.0} if name == "pro_s" else {})
    rate = RATES.get(name, 1e-3)
    config = make(loss, training__epochs=4, optim__lr=rate)
    Trainer(config, display).loop([])
    lines = records(config)
    assert len(lines) == 12
    assert sum(x["loss"] for x in lines[-3:]) < sum(x["loss"] for x in lines[:3])
    assert all(value == value for line in lines for value in line.values()), "no metric is NaN"


@pytest.mark.parametrize("name", ["kto", "bco", "info_nca"])
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
def test_rewards_and_point_of_the_first_step_are_exactly_zero(
    make: MakeConfig, display: Display, name: str, change: dict[str, Any]
) -> None:
    config = make(name, training__steps=2, data__eval=make(name).data.train, **change)
    trainer = Trainer(config, display)
    before = trainer.reference_point.of_step(trainer.run.train, 0)
    assert (before is None) == (name == "info_nca") and (before is None or before == 0)
    trainer.loop([])
    evaluation, first, second, _ = records(config)
    for key in ("chosen", "rejected", "margins"):
        assert first[f"rewards/{key}"] == evaluation[f"eval_rewards/{key}"] == 0.0
    assert second["rewards/margins"] != 0.0
    assert set(evaluation) >= {f"eval_{key}" for key in (*PAIR_METRICS, "entropy")}


@pytest.mark.parametrize("name", ["kto", "bco", "pro_b", "info_nca"])
def test_many_micro_batches_equal_one(
    make: MakeConfig, display: Display, tmp_path: Path, name: str
) -> None:
    """Same parameters and reference point to 1e-6 after three steps, the last of 4 groups."""
    kind = losses.describe(name).kind
    path = write_jsonl(tmp_path / "d.jsonl", (labelled if kind == "pointwise" else scored)(20))

    def trained(max_tokens: int) -> Trainer:
        # Epsilon 1e-4: where a gradient is zero but for rounding, Adam's quotient is noise.
        config = make(
            {"name": name, "beta": 0.1},  # a point and gradients well above the tolerance
            data__train=str(path),
            optim={"name": "adamw", "lr": 1e-3, "eps": 1e-4},
            training__batch_size=8,
            training__micro_batch_tokens=max_tokens,
            training__output_dir=str(tmp_path / str(max_tokens)),
        )
        return run(config, display)

    whole = trained(100_000)
    split = whole.run.train
    plans = [split.plan] + ([split.mismatched.plan] if split.mismatched else [])
    several = trained(max(int(plan.costs.max()) for plan in plans))
    parts = [[len(trainer.plan.step(k)) for k in range(3)] for trainer in (whole, several)]
    assert parts[0] == [1, 1, 1]
    assert parts[1] == [8, 8, 4] if kind == "pointwise" else min(parts[1]) > 1
    for key, value in weights(whole).items():
        torch.testing.assert_close(weights(several)[key], value, rtol=0, atol=1e-6)
    points = [trainer.reference_point.of_step(trainer.run.train, 3) for trainer in (whole, several)]
    if points[0] is not None and points[1] is not None:
        assert abs(points[0]) > 1e-3
        torch.testing.assert_close(*points, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["kto", "bco", "info_nca"])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    make: MakeConfig, display: Display, tmp_path: Path, name: str
) -> None:
    """Interrupted after step 5, with a checkpoint from step 4 and a window of metrics half full."""
    settings: dict[str, Any] = {"training__epochs": 3, "training__checkpoint_every": 2}
    settings |= {"training__log_every": 3, "data__eval": make(name).data.train}
    settings["adapter"] = {"name": "lora", "r": 4, "dropout": 0.2}  # its random state counts too
    settings["training__activation_checkpointing"] = "full"
    whole = make(name, training__output_dir=str(tmp_path / "whole"), **settings)
    expected = run(whole, display)
    trainer = Trainer(
        make(name, training__output_dir=str(tmp_path / "broken"), **settings), display
    )
    original = trainer._train_step

    def failing(with_entropy: bool) -> Any:
        if trainer.step == 5:
            raise RuntimeError("power cut")
        return original(with_entropy)

    trainer._train_step = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.loop([])
    settings["training__output_dir"] = str(tmp_path / "broken")
    resumed = make(name, resume="auto", **settings)
    again = run(resumed, display)
    assert records(resumed) == records(whole)
    assert all(torch.equal(weights(expected)[key], value) for key, value in weights(again).items())
    assert again.reference_point.state_dict() == expected.reference_point.state_dict()


def test_the_point_of_kto_is_the_mean_over_responses_to_the_next_prompt(
    make: MakeConfig, display: Display
) -> None:
    """Computed by hand from the texts, and used, clamped at 0, in the loss of the next step."""
    config = make("kto", training__steps=3, optim__lr=3e-3)
    trainer = Trainer(config, display)
    fresh = policy_of(config, trainer.run.tokenizer, torch.device("cpu"))
    groups, texts = trainer.run.train.groups, labelled(12)
    ratios, original, points = {}, trainer.reference_point.of_step, []

    def by_hand(*arguments: Any) -> Any:
        for i in (i for part in trainer.plan.step(trainer.step) for i in part):
            tokens = trainer.run.tokenizer(texts[i]["prompt"] + texts[(i + 1) % 12]["completion"])
            ids = [*tokens["input_ids"], trainer.run.tokenizer.eos_token_id]
            start = len(groups[i].prompt)
            ratios[trainer.step, i] = logp(trainer.policy, ids, start) - logp(fresh, ids, start)
        points.append(original(*arguments))
        return points[-1]

    trainer.reference_point.of_step = by_hand  # type: ignore[method-assign]
    trainer.loop([])
    for step, point in enumerate(points):
        expected = [ratio for (at, _), ratio in ratios.items() if at == step]
        assert len(expected) == 4
        assert point.item() == pytest.approx(sum(expected) / 4, abs=1e-4)
    assert max(points) > 0.1, "else the clamp hides the point"


def test_the_point_of_kto_is_taken_without_dropout(make: MakeConfig, display: Display) -> None:
    """After a step, when the adapter adds something that dropout would change."""
    adapter = {"name": "lora", "r": 4, "dropout": 0.5}
    trainer = run(make("kto", training__steps=1, adapter=adapter, optim__lr=1e-2), display)
    state = torch.get_rng_state()
    first, second = (trainer.reference_point.of_step(trainer.run.train, 1) for _ in range(2))
    assert first is not None and first != 0 and first == second
    assert torch.equal(torch.get_rng_state(), state) and trainer.policy.training


def logp(policy: Any, ids: list[int], start: int) -> float:
    with torch.no_grad():
        logits = policy.causal_lm(input_ids=torch.tensor([ids])).logits[0].double()
    picked = logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(ids)[1:, None])[:, 0]
    return picked[start - 1 :].sum().item()


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_the_loss_of_a_step_is_the_mean_at_its_point(
    make: MakeConfig, display: Display, name: str
) -> None:
    config = make({"name": name, "beta": 0.5}, training__steps=3, optim__lr=3e-3)
    trainer = Trainer(config, display)
    points, losses_, rewards = [], [], []
    of_step, record = trainer.reference_point.of_step, trainer.reference_point.after_micro_batch

    def note_point(*arguments: Any) -> Any:
        points.append(of_step(*arguments))
        return points[-1]

    def note_output(groups: list[int], logps: Any, output: PointwiseOutput) -> None:
        record(groups, logps, output)
        policy = logps.policy
        rewards.append(output.rewards.double())
        expected = trainer.loss(policy, _reference(policy, output, trainer.loss.beta), points[-1])
        losses_.append(expected.loss.mean().item())

    trainer.reference_point.of_step = note_point  # type: ignore[method-assign]
    trainer.reference_point.after_micro_batch = note_output  # type: ignore[method-assign]
    trainer.loop([])
    assert [x["loss"] for x in records(config)] == pytest.approx(losses_, rel=1e-5)
    if name == "bco":  # the mean of the rewards of the steps before
        means = [torch.cat(rewards[:k]).mean().item() for k in (1, 2)]
        assert points[0] == 0
        assert [point.item() for point in points[1:]] == pytest.approx(means, rel=1e-12)


def _reference(policy: Any, output: PointwiseOutput, beta: float) -> Any:
    """Reference log-probs that give the rewards of an output."""
    return replace(policy, logps=policy.logps - output.rewards / beta)


def test_a_step_of_one_class_leaves_out_the_metrics_of_the_other(
    make: MakeConfig, display: Display
) -> None:
    """One response a step."""
    config = make("kto", training__batch_size=1, training__steps=6, training__log_every=1)
    trainer = run(config, display)
    for line in records(config):
        (index,) = trainer.plan.step(line["step"] - 1)[0]
        present, absent = ("chosen", "rejected")[:: 1 if labelled(12)[index]["label"] else -1]
        assert f"rewards/{present}" in line and f"logps/{present}" in line
        assert f"rewards/{absent}" not in line and "rewards/margins" not in line
        assert all(value == value for value in line.values())


def test_pairs_are_taken_apart_and_said_to_be(
    make_config: MakeConfig, display: Display, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(display, "note", notes.append)
    config = make_config(loss="kto", training__steps=2)
    prepared = prepare(config, display)
    assert notes[0].startswith("train: 24 of 24 responses from ")
    assert notes[0].endswith(
        "12 desirable, 12 undesirable; each pair is two responses: chosen is desirable, rejected "
        "is not"
    )
    assert not any("note:" in note for note in notes), "classes that weigh the same need no advice"
    single = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in rows(12)
        for name in ("chosen", "rejected")
    ]
    path = write_jsonl(tmp_path / "single.jsonl", single)
    same = load_groups(str(path), prepared.tokenizer, config.data, "pointwise")
    groups = prepared.train.groups
    assert (same.fingerprint, same.labels) == (groups.fingerprint, groups.labels)
    run(config, display)


@pytest.mark.parametrize(
    ("loss", "advice"),
    [
        ({"name": "kto"}, "2.00 times as much .* loss.desirable_weight from 0.5 to 0.667"),
        ({"name": "kto", "desirable_weight": 0.5}, None),
        ({"name": "kto", "desirable_weight": 0.66}, None),
        ({"name": "kto", "desirable_weight": 0.68}, "weigh 1.36 times"),
        ({"name": "kto", "undesirable_weight": 2.1}, "0.95 times .* from 1.05 to 1.4"),
        ({"name": "bco"}, None),
    ],
)
def test_advice_on_unequal_classes(
    make: MakeConfig, display: Display, loss: dict[str, Any], advice: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    notes: list[str] = []
    monkeypatch.setattr(display, "note", notes.append)
    prepare(make(loss), display)
    assert "8 desirable, 4 undesirable" in notes[0]
    advised = [note for note in notes if note.startswith("note:")]
    assert len(advised) == (advice is not None)
    assert advice is None or re.search(advice, advised[0])


def test_one_class_alone_is_trained_on_with_a_note(
    make: MakeConfig, display: Display, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(display, "note", notes.append)
    path = write_jsonl(tmp_path / "one.jsonl", [x for x in labelled(12) if x["label"]])
    config = make("kto", data__train=str(path), data__eval=str(path))
    run(config, display)
    assert "note: there is no undesirable response; kto is meant for both classes" in notes
    assert any(note.startswith("eval at step 2  loss") for note in notes)
    assert all("rewards/rejected" not in line for line in records(config))


@pytest.mark.parametrize(
    ("loss", "records_", "error", "message"),
    [
        ("kto", labelled(1), DataError, "kto needs responses to at least two prompts"),
        ("kto", labelled(1) * 3, DataError, "kto needs responses to at least two prompts"),
        ("kto", rows(3, soft=True), DataError, "row 1: pointwise objectives do not take p"),
        ("bco", scored(3), DataError, "row 1: no completion and no label; columns found"),
        ("dpo", labelled(3), DataError, "this row is for a pointwise objective"),
        ("nca", rows(3), DataError, "no completions and no scores; .* for a pairwise objective"),
        (
            {"name": "pro_s", "alpha": 0.5},
            [*scored(2), {"prompt": "a", "completions": ["b", "c"], "scores": [0, 1]}, *scored(9)],
            ConfigError,
            r"loss.alpha: must be > \S+ for these scores, got 0.5; .* \(row \d+ of .*scores lie up",
        ),
    ],
)
def test_data_that_an_objective_cannot_use(
    make_config: MakeConfig,
    display: Display,
    tmp_path: Path,
    loss: Any,
    records_: list[dict[str, Any]],
    error: type[Exception],
    message: str,
) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", records_)
    with pytest.raises(error, match=message) as caught:
        prepare(make_config(loss=loss, data__train=str(path)), display)
    assert "\n" not in str(caught.value)


def test_the_row_that_asks_for_the_largest_alpha_is_named(
    make: MakeConfig, display: Display, tmp_path: Path
) -> None:
    """Scores 0 and 1 of two ask for 0.75, and 0, 0, 0.9 of three for 0.8."""
    mild = {"prompt": "a", "completions": ["b", "c"], "scores": [0, 1]}
    worst = {"prompt": "a", "completions": ["b", "c", "d"], "scores": [0, 0, 0.9]}
    path = write_jsonl(tmp_path / "d.jsonl", [mild] * 100 + [worst] + [mild] * 100)
    loss = {"name": "pro_s", "alpha": 0.79}
    with pytest.raises(
        ConfigError, match=r"must be > 0.8 .* \(row 101 of .* 3 scores lie up to 0.6"
    ):
        prepare(make(loss, data__train=str(path)), display)
    prepare(make({**loss, "alpha": 0.81}, data__train=str(path)), display)


def test_the_budget_holds_the_mismatched_responses_too(
    make: MakeConfig, display: Display, tmp_path: Path
) -> None:
    """A long prompt and a long response of two rows meet in a mismatched sequence."""
    two = [
        {"prompt": "User:" + " tea" * 20, "completion": " a", "label": True},
        {"prompt": "User:", "completion": " tea" * 20, "label": False},
    ]
    path = str(write_jsonl(tmp_path / "two.jsonl", two))
    config = make("kto", data__train=path, training__micro_batch_tokens=30)
    with pytest.raises(DataError, match="30 cannot hold the longest response"):
        prepare(config, display)
    prepare(make("bco", data__train=path, training__micro_batch_tokens=30), display)
    prepared = prepare(make("kto", data__train=path, data__max_length=30), display)
    mismatched = prepared.train.mismatched
    assert mismatched is not None and mismatched.groups.padded_lengths.max() == 30
    for i in range(2):
        group, length = mismatched.groups[i], mismatched.groups.padded_lengths[i]
        assert len(group.prompt) + len(group.responses[0]) == length


def test_the_reference_of_mismatched_responses_is_kept_on_disk(
    make: MakeConfig, display: Display, tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "reference"
    prepare(make("bco"), display)
    assert len(list(folder.iterdir())) == 1
    first = prepare(make("kto"), display)
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(files) == 2
    again = prepare(make("kto", training__batch_size=3, training__seed=5), display)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == files
    other = first.train.mismatched
    assert other is not None and again.train.mismatched is not None
    batch = collate([other.groups[i] for i in range(12)], "pointwise")
    sources = other.reference, again.train.mismatched.reference
    values, repeated = (reference(batch).logps for reference in sources)
    assert values is not None and repeated is not None and torch.equal(values, repeated)
    with torch.no_grad():
        torch.testing.assert_close(values, first.policy(batch).logps, rtol=0, atol=1e-4)


def test_the_alpha_of_the_paper_trains_on_four_scores(
    make: MakeConfig, display: Display, tmp_path: Path
) -> None:
    """Alpha 2.5, N 4: scores within a range of one need 0.94 at most."""
    responses = {"completions": ["b", "c", "d", "e"], "scores": [1, 1, 1, 0]}
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": f"{i}?", **responses} for i in range(12)])
    config = make("pro_s", data__train=str(path), training__steps=2)
    run(config, display)
    assert [record["step"] for record in records(config)] == [1, 2]
