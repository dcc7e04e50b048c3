"""The ideal rejected responses: their weights where every probability is known, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fastpref.evaluation.ideal_rejected import (
    IdealRejected,
    effective_candidates,
    log_weights,
    resample,
)
from fastpref.reproduce.logit_tables import Pairs, all_pairs, always, js, train
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display
from tests.helpers.data import LLAMA, rows, write_jsonl


def test_weights_are_powers_of_the_ratio_of_reference_and_target() -> None:
    target = torch.tensor([[0.5, 0.25, 0.125]]).log()
    reference = torch.tensor([[0.125, 0.25, 0.5]]).log()
    # (ref / target)^(1/2) is 1/2, 1 and 2.
    weights = log_weights(target, reference, 0.5).exp()
    torch.testing.assert_close(weights, torch.tensor([[1.0, 2.0, 4.0]]).double() / 7)
    assert effective_candidates(log_weights(target, reference, 0.5)).item() == pytest.approx(
        49 / 21
    )


def test_equal_models_leave_the_reference_as_it_is() -> None:
    logps = torch.randn(3, 5)
    weights = log_weights(logps, logps, 0.1)
    torch.testing.assert_close(weights.exp(), torch.full((3, 5), 0.2).double())
    torch.testing.assert_close(effective_candidates(weights), torch.full((3,), 5.0).double())


def test_resampled_candidates_follow_the_ideal_distribution() -> None:
    """Of six responses; the error of 20,000 prompts with 200 candidates is some 0.003."""
    beta, prompts, count = 0.7, 20_000, 200
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    reference, target = logits.log_softmax(1)
    candidates = torch.multinomial(
        reference.exp().expand(prompts, -1), count, replacement=True, generator=generator
    )
    weights = log_weights(target[candidates], reference[candidates], beta)
    drawn = candidates.gather(1, resample(weights, 1, generator))
    shares = drawn.flatten().bincount(minlength=6) / prompts
    ideal = (reference + beta * (reference - target)).softmax(0)
    assert (ideal - reference.exp()).abs().max() > 0.1
    torch.testing.assert_close(shares.double(), ideal, rtol=0, atol=0.015)


def test_dpo_learns_the_target_from_pairs_with_these_weights() -> None:
    """Theorem L.1, with every candidate at hand: each response is one, so K is large enough."""
    beta = 0.5
    generator = torch.Generator().manual_seed(1)
    reference, target = torch.randn(2, 2, 6, generator=generator, dtype=torch.float64).log_softmax(
        2
    )
    # The candidates are all responses, each with its share in the reference.
    ideal = (reference + log_weights(target, reference, beta)).log_softmax(1)
    chosen, rejected = all_pairs(6, 2)
    weights = (reference.gather(1, chosen) + ideal.gather(1, rejected)).exp()
    policy = train(
        reference,
        {"name": "dpo", "beta": beta},
        always(Pairs(chosen, rejected, weights)),
        800,
        0.05,
    )
    assert js(reference, target).min() > 1e-2
    assert js(policy, target).max() < 1e-9


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf])
def test_a_beta_without_meaning_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="beta: expected a number > 0"):
        log_weights(torch.zeros(1, 2), torch.zeros(1, 2), beta)
    with pytest.raises(UserError, match="--beta: expected a number > 0"):
        IdealRejected("a", "b", "c", Path("d"), beta=beta)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reference: expected the shape \(P, K\) of target"):
        log_weights(torch.zeros(1, 2), torch.zeros(1, 3), 0.1)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    folder = tmp_path_factory.mktemp("models") / "target"
    torch.manual_seed(1)
    options = {**LLAMA, "initializer_range": 0.2}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_command_writes_pairs_to_train_on(
    fastpref: Any, tiny_llama: str, target: str, tmp_path: Path
) -> None:
    data, out = str(write_jsonl(tmp_path / "d.jsonl", rows(4))), tmp_path / "pairs.jsonl"
    options = ("--prompts", data, "--out", str(out), "--max-new-tokens", "4", "--candidates", "6")
    command = ("data", "rejected", target, tiny_llama, *options, "--samples", "2")
    done = fastpref(*command, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "8 pairs of 4 prompts; of 6 candidates" in done.stdout
    pairs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [pair["prompt"] for pair in pairs[::2]] == [row["prompt"] for row in rows(4)]
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    again = fastpref(*command, "--device", "cpu")
    assert again.returncode == 2
    assert f"error: --out: {out} is already there; choose another file" in again.stderr


def test_a_target_far_away_is_said_to_need_more_candidates(
    fastpref: Any, tiny_llama: str, target: str, tmp_path: Path
) -> None:
    data, out = str(write_jsonl(tmp_path / "d.jsonl", rows(4))), str(tmp_path / "pairs.jsonl")
    options = ("--prompts", data, "--out", out, "--max-new-tokens", "6", "--beta", "50")
    done = fastpref("data", "rejected", target, tiny_llama, *options, "--device", "cpu")
    assert "note: 100% of the prompts have fewer than 2; raise --candidates" in done.stdout


def test_one_candidate_is_no_choice() -> None:
    with pytest.raises(UserError, match="--candidates: expected a number >= 2, to choose from"):
        IdealRejected("a", "b", "c", Path("d"), candidates=1)


def test_the_same_seed_gives_the_same_pairs(
    tiny_llama: str, target: str, tmp_path: Path, display: Display
) -> None:
    data = str(write_jsonl(tmp_path / "d.jsonl", rows(3)))
    texts = []
    for name in ("a", "b"):
        out = tmp_path / f"{name}.jsonl"
        task = IdealRejected(
            target, tiny_llama, data, out, candidates=3, max_new_tokens=4, device="cpu"
        )
        assert task.run(display)["prompts"] == 3
        texts.append(out.read_text())
    assert texts[0] == texts[1]
