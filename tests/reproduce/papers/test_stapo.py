"""The gradients of the StaPO study, its measurements after each epoch, and its quantities."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from fastpref.config import Config
from fastpref.data.synthetic import graded
from fastpref.reproduce import exports
from fastpref.reproduce.papers import stapo, stapo_claims, stapo_epochs
from fastpref.reproduce.sizes import SIZES
from fastpref.reproduce.study import START, Job, Outcome, Runs
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display


def test_the_theorems_hold_and_the_record_has_all_of_them() -> None:
    (record,) = stapo_epochs.theorems(Job("theorems", 0, {}))
    runs = Runs({"theorems": Outcome("theorems", 0, [record])})
    claims = [claim for claim in stapo_claims.CLAIMS if claim.kind == "theorem"]
    assert len(claims) == 3
    for claim in claims:
        assert claim.holds(claim.measure(runs).value), claim.statement


def test_the_incentive_of_stapo_vanishes_between_its_margins_and_turns_beyond_them() -> None:
    loss = {"name": "stapo", "beta": 2.0, "left_margin": 0.6, "right_margin": 0.8}
    z = torch.tensor([0.0, 0.7, 2.0], dtype=torch.float64)
    chosen, rejected = stapo_epochs.incentives(loss, z)
    assert chosen[0] > 0.4 and abs(chosen[1]) < 1e-12 and chosen[2] < -0.8
    torch.testing.assert_close(chosen, rejected)


@pytest.fixture
def exported(make_config: Callable[..., Config], display: Display, tmp_path: Path) -> Trainer:
    """A trained model with an export after each of two epochs."""
    pairs = graded.pairs(graded.groups(12, seed=0))
    paths = {k: tmp_path / f"pairs-{k}.jsonl" for k in ("train", "eval", "held-out")}
    for path in paths.values():
        path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    data = {"train": str(paths["train"]), "eval": str(paths["eval"]), "max_length": 128,
            "cache": str(tmp_path / "cache")}  # fmt: skip
    training = {"epochs": 2, "batch_size": 6, "export_every": 2, "checkpoint_every": None,
                "output_dir": str(tmp_path / "run")}  # fmt: skip
    trainer = Trainer(make_config(data=data, training=training), display)
    trainer.loop([])
    return trainer


def test_the_log_probs_after_an_epoch_are_those_of_the_model_exported_then(
    exported: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stapo_epochs, "LOGIT_EPOCHS", (0, 2))
    record = stapo_epochs._measure(exported, Job("stapo", 0, {}), (), 0)
    assert exported.step == 4
    assert record["step"] == 4
    begin, end = (np.array(record[f"logits {k}/chosen"]) for k in (0, 2))
    assert len(begin) == len(record["logits 2/cluster"]) == 12
    assert not np.allclose(begin, end)
    split = exported.run.train
    batches = exported.policy.batches(split.groups, list(range(12)))
    with torch.no_grad():
        logps = exported.forward(batches, split.reference).policy
    assert sorted(end) == pytest.approx(sorted(logps.chosen.tolist()), rel=1e-4)  # type: ignore[union-attr]
    lengths = split.groups.response_lengths.reshape(-1, 2)
    z = end / lengths[:, 0] - np.array(record["logits 2/rejected"]) / lengths[:, 1]
    assert record["logits 2/z"] == pytest.approx(z, rel=1e-4, abs=1e-5)
    assert not (exported.run.folder / "exports").exists()


def test_samples_of_an_export_have_a_family_of_their_own(exported: Trainer) -> None:
    scores = exports.score(exported, Job("stapo", 0, {}), 2, "epoch 1", 12)
    names = ("win", "malformed", "tokens", "entropy", "cluster")
    assert set(scores) == {f"epoch 1/{name}" for name in names}
    assert {len(values) for values in scores.values()} == {12}
    # Of an untrained model over a vocabulary of thousands.
    assert min(scores["epoch 1/entropy"]) > 0


def test_samples_on_a_users_data_have_no_scores(exported: Trainer) -> None:
    held_out = Path(str(exported.config.data.eval).replace("-eval", "-held-out"))
    held_out.write_text(json.dumps({"prompt": "Hi", "chosen": " Hello", "rejected": " No"}) + "\n")
    assert exports.score(exported, Job("stapo", 0, {}), 0, "epoch 0", 4) == {}


def trained(label: str, z: list[float], **arrays: list[float]) -> Outcome:
    named = {name.replace("_", " ", 1).replace("_", "/"): v for name, v in arrays.items()}
    return Outcome(label, 0, [], {"logits 5/z": z, **named})


def test_shares_and_spreads_of_z_are_those_of_the_pairs() -> None:
    runs = Runs(
        simpo=trained("simpo", [0.1, 1.0, 1.5, 0.7]), stapo=trained("stapo", [0.65, 0.7, 0.75, 0.9])
    )
    value = {claim.statement: claim for claim in stapo_claims.CLAIMS}
    past = value["SimPO drives Z past the margins, StaPO holds it"].measure(runs)
    assert past.value == pytest.approx(0.25) and past.n == 4
    between = value["With StaPO more pairs lie between the margins"].measure(runs)
    assert between.value == pytest.approx(0.5)
    spread = value["StaPO's Z is more concentrated"].measure(runs)
    expected = np.std([0.1, 1.0, 1.5, 0.7]) - np.std([0.65, 0.7, 0.75, 0.9])
    assert spread.value == pytest.approx(expected)


def test_changes_are_those_since_the_start_and_of_dpo_relative_to_it() -> None:
    sides = {"logits_0_chosen": [-10.0, -12.0], "logits_0_rejected": [-11.0, -11.0],
             "logits_5_chosen": [-13.0, -13.0], "logits_5_rejected": [-20.0, -18.0]}  # fmt: skip
    runs = Runs(dpo=trained("dpo", [0.0, 0.0], **sides))
    assert stapo_claims.change("chosen")(runs, "dpo").tolist() == [-3.0, -1.0]
    assert stapo_claims.log_ratio(5)(runs, "dpo").tolist() == [6.0, 6.0]


def test_entropies_move_either_way() -> None:
    arrays = {"simpo": ([1.0, 1.0], [0.4, 0.6]), "stapo": ([1.0, 1.0], [1.1, 1.3])}
    runs = Runs(
        {k: trained(k, [0.0], epoch_1_entropy=a, epoch_5_entropy=b) for k, (a, b) in arrays.items()}
    )
    statement = "StaPO keeps the entropy of generated text, SimPO does not"
    (claim,) = (c for c in stapo_claims.CLAIMS if c.statement == statement)
    assert claim.measure(runs).value == pytest.approx(0.5 - 0.2)


def test_what_was_learned_is_the_gain_over_the_start_which_another_run_holds() -> None:
    runs = Runs(
        {
            "stapo": trained("stapo", [0.0], epoch_0_win=[0.4, 0.6]),
            stapo_claims.TUNED: trained(stapo_claims.TUNED, [0.0], epoch_5_win=[0.7, 0.6]),
        }
    )
    (claim,) = (c for c in stapo_claims.CLAIMS if c.statement == "and it has learned something")
    assert claim.measure(runs).value == pytest.approx(0.15)


def test_the_grid_is_that_of_table_2() -> None:
    assert {(g["left_margin"], g["right_margin"]) for g in stapo_claims.GRID.values()} == {
        (0.2, 0.4), (0.4, 0.6), (0.8, 1.0), (0.4, 0.8), (0.4, 1.0), (0.6, 1.0), (0.6, 1.2)
    }  # fmt: skip
    labels = [job.label for job in stapo.jobs(0, SIZES["cores"])]
    assert labels == ["theorems", *stapo_claims.OBJECTIVES, *stapo_claims.GRID]


def test_a_pretrained_model_has_no_win_rates_and_can_be_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = SIZES["cores"].starting_from(Path("model"))
    jobs = stapo.jobs(0, size)
    labels = [job.label for job in jobs]
    assert labels == ["theorems", "simpo", "stapo"]
    scores = {"epoch 1/win": [0.0], "epoch 1/malformed": [1.0], "epoch 1/entropy": [1.2]}
    monkeypatch.setattr(stapo_epochs, "_measure", lambda *arguments: {"step": 1, **scores})
    assert jobs[1].measure is not None
    assert jobs[1].measure(None, jobs[1]) == {"step": 1, "epoch 1/entropy": [1.2]}
    arrays = {f"logits {k}/z": [0.1, 0.9] for k in stapo_epochs.LOGIT_EPOCHS}
    runs = Runs({label: Outcome(label, 0, [], arrays) for label in (START, *labels)})
    assert isinstance(stapo.draw([runs]), Figure)
