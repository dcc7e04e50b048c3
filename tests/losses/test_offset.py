"""Offset of the reward margin by a column of the data."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid

from fastpref import losses
from fastpref.logps import SequenceLogps, TokenLogps
from fastpref.losses.offset import OF_REWARDS

MARGIN = torch.tensor([0.0, 0.5, 1.0, 2.0, -1.0], dtype=torch.float64)
P = torch.tensor([1.0, 0.5, 0.2, 0.9, 0.0], dtype=torch.float64)


def logps(seed: int, **columns: torch.Tensor) -> SequenceLogps:
    generator = torch.Generator().manual_seed(seed)
    values = 3 * torch.randn(2, 5, dtype=torch.float64, generator=generator) - 20
    lengths = torch.tensor([3, 4, 5, 6, 7])
    return SequenceLogps(values[0], values[1], lengths, lengths + 2, **columns)


def test_offset_dpo() -> None:
    """Amini et al. 2024, Eq. 7, with the column in the place of alpha * f(score difference)."""
    policy, reference = logps(0, margin=MARGIN), logps(1)
    u = 0.1 * (policy.chosen - reference.chosen - policy.rejected + reference.rejected)
    output = losses.build("dpo", beta=0.1, offset=0.7)(policy, reference)
    torch.testing.assert_close(output.loss, -logsigmoid(u - 0.7 * MARGIN))
    torch.testing.assert_close(output.chosen_rewards - output.rejected_rewards, u)


def test_the_reversed_pair_of_a_soft_label_has_the_opposite_margin() -> None:
    policy, reference = logps(0, margin=MARGIN, preference=P), logps(1)
    u = 0.1 * (policy.chosen - reference.chosen - policy.rejected + reference.rejected) - MARGIN
    output = losses.build("dpo", beta=0.1, offset=1)(policy, reference)
    torch.testing.assert_close(output.loss, -P * logsigmoid(u) - (1 - P) * logsigmoid(-u))


@pytest.mark.parametrize("name", OF_REWARDS)
def test_an_offset_is_the_loss_at_a_smaller_reward_margin(name: str) -> None:
    """Also where the rejected response has the reward that makes the margin smaller."""
    objective = losses.build(name)
    policy, reference = logps(0, margin=MARGIN), logps(1)
    zeros = torch.zeros(5, dtype=torch.float64)
    slope = objective.reward(zeros + 1, policy.rejected_lengths, zeros)
    raised = SequenceLogps(
        policy.chosen,
        policy.rejected + 0.3 * MARGIN / slope,
        policy.chosen_lengths,
        policy.rejected_lengths,
    )
    loss = losses.build(name, offset=0.3)(policy, reference).loss
    torch.testing.assert_close(loss, objective(raised, reference).loss)
    assert not torch.allclose(loss, objective(policy, reference).loss)


def test_margins_reach_the_objective_through_tokens() -> None:
    """Of objectives that look at tokens, and over several passes."""
    offsets = torch.tensor([0, 2, 5, 6, 8])
    values = torch.arange(8, dtype=torch.float64).neg()
    tokens = TokenLogps(values, offsets, margin=MARGIN[2:4])
    reference = TokenLogps(values / 2, offsets)
    plain = losses.build("dpo", offset=1)(tokens.sequences(), reference.sequences()).loss
    same = losses.build("dpo", offset=1, ld_alpha=1.0)
    weighted = losses.build("dpo", offset=1, wpo="unaligned")
    torch.testing.assert_close(
        weighted(tokens, reference).loss, weighted.pair_weights(tokens) * plain
    )
    assert TokenLogps.cat([tokens, tokens]).margin.tolist() == [1.0, 2.0, 1.0, 2.0]
    assert SequenceLogps.cat([tokens.sequences()] * 2).margin.tolist() == [1.0, 2.0, 1.0, 2.0]
    torch.testing.assert_close(same(tokens.sequences(), reference.sequences()).loss, plain)


def test_pairs_without_margins_are_refused() -> None:
    objective = losses.build("dpo", offset=1)
    with pytest.raises(ValueError, match="needs the margin of each pair, got None; add"):
        objective(logps(0), logps(1))
    with pytest.raises(ValueError, match="margin: expected for every part or for none, got a mix"):
        SequenceLogps.cat([logps(0), logps(0, margin=MARGIN)])
    with pytest.raises(ValueError, match=r"margin: expected shape \(1,\), one per pair, got"):
        SequenceLogps.from_sequences(torch.zeros(2), torch.ones(2), None, MARGIN)


def test_which_objectives_need_margins() -> None:
    assert losses.build("simpo", offset=1, wpo=True).needs_margin
    assert losses.from_config([{"name": "sft"}, {"name": "dpo", "offset": 1}]).needs_margin
    assert not losses.build("dpo", offset=0).needs_margin
