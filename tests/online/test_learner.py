"""The learner on a small model: its steps against plain transformers, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import distributed
from fastpref.config import Config
from fastpref.model.lora import as_reference
from fastpref.model.policy import Policy
from fastpref.model.reference_policy import FrozenReference, no_reference
from fastpref.online.learner import LearnerOptions, OnlineLearner, groups_of
from fastpref.online.mixture import _Decoder, sample_mixture
from fastpref.online.nash_md import NashMD, mixture_logits
from fastpref.online.policy_gradient import GRPO, RLOO
from fastpref.online.ppo import PPO
from fastpref.online.rollouts import OnlineObjective
from tests.helpers.policies import policy_of

PROMPTS = [[5, 6, 7], [5, 6, 7], [9], [9]]
RESPONSES = [[11, 12], [13], [14, 15, 16], [17, 11]]
REWARDS, GROUPS = torch.tensor([1.0, 0.0, 0.25, 0.75]), torch.tensor([0, 2, 4])


@pytest.fixture
def policy(make_config: Callable[..., Config], tokenizer: Any) -> Policy:
    return policy_of(make_config(), tokenizer)


def learner_of(
    policy: Policy, objective: OnlineObjective, lr: float = 1.0, **options: Any
) -> OnlineLearner:
    reference = FrozenReference(copy.deepcopy(policy))
    optimizer = torch.optim.SGD(policy.trainable_parameters().values(), lr)
    options = {"max_grad_norm": 1e9, **options}
    return OnlineLearner(policy, reference, objective, optimizer, LearnerOptions(**options))


def full_logps(policy: Policy, prompt: list[int], response: list[int]) -> Tensor:
    ids = torch.tensor([prompt + response])
    base: Any = policy.base
    logps = base(input_ids=ids).logits[0].log_softmax(-1)[:-1]
    return logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]


def weights_of(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.trainable_parameters().items()}


def test_a_step_of_rloo_is_that_of_the_full_logits(policy: Policy) -> None:
    before = weights_of(policy)
    advantages = (1.0, -1.0, -0.5, 0.5)  # at the reference there is no penalty
    loss = -sum(
        a * full_logps(policy, prompt, response).sum()
        for a, prompt, response in zip(advantages, PROMPTS, RESPONSES, strict=True)
    )
    parameters = policy.trainable_parameters()
    gradients = torch.autograd.grad(loss / 4, parameters.values())
    metrics = learner_of(policy, RLOO()).update(PROMPTS, RESPONSES, REWARDS, GROUPS)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        torch.testing.assert_close(before[name] - parameter, gradient, rtol=1e-3, atol=1e-5)
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["reward"] == 0.5 and metrics["length"] == 2.0
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("objective", [PPO(), GRPO(), NashMD()], ids=repr)
def test_micro_batches_do_not_change_a_step(policy: Policy, objective: OnlineObjective) -> None:
    """Three minibatches in two epochs, of responses of different lengths."""
    policies = [policy, copy.deepcopy(policy)]
    for each, micro_batch in zip(policies, (1, 16), strict=True):
        options = {"epochs": 2, "minibatches": 3, "micro_batch": micro_batch}
        learner_of(each, objective, 0.1, **options).update(PROMPTS, RESPONSES, REWARDS, GROUPS)
    one, other = map(weights_of, policies)
    for name, weights in one.items():
        torch.testing.assert_close(weights, other[name], rtol=1e-4, atol=1e-5)


def test_the_value_head_learns_the_returns_and_leaves_the_trunk_alone(policy: Policy) -> None:
    """Without an advantage the policy has no gradient, whatever the values are."""
    before = weights_of(policy)
    learner = learner_of(policy, PPO(kl_coef=0.0, whiten_advantages=False, value_lr=0.02))
    assert learner.value_head is not None
    learner.update([[9]], [[14]], torch.tensor([0.0]))
    after = weights_of(policy)
    assert all(torch.equal(before[name], after[name]) for name in before)
    learner.optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(15):
        learner.update([[9]], [[14]], torch.tensor([0.5]))
    batch = learner._batch(groups_of([[9]], [[14]]))
    values = learner._forward(batch).values
    assert values is not None and values.item() == pytest.approx(0.5, abs=0.2)


def test_what_cannot_be_learned_from_is_refused(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learner_of(policy, RLOO())
    with pytest.raises(ValueError, match="responses: expected tokens in each, got none"):
        learner.update(PROMPTS, [*RESPONSES[:3], []], REWARDS, GROUPS)
    with pytest.raises(ArithmeticError, match="objective: the loss is nan and the gradient"):
        learner.update(PROMPTS, RESPONSES, REWARDS * float("nan"), GROUPS)
    with pytest.raises(ValueError, match="ref_logps: the KL penalty needs the reference"):
        optimizer = torch.optim.SGD(policy.parameters(), 1.0)
        OnlineLearner(policy, no_reference, RLOO(), optimizer).update(
            PROMPTS, RESPONSES, REWARDS, GROUPS
        )
    with pytest.raises(ValueError, match="minibatches: expected a number >= 1, got 0"):
        LearnerOptions(minibatches=0)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="online objectives train in one process, got 2"):
        learner_of(policy, RLOO())


def test_the_cache_gives_the_logits_of_the_whole_sequence(policy: Policy) -> None:
    """Prompts of different lengths, padded on the left."""
    prompts, added = [[5, 6, 7], [9]], [[11, 12], [13, 14]]
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    decoder = _Decoder(policy)
    with torch.no_grad():
        decoder.next_logits(torch.tensor([[5, 6, 7], [0, 0, 9]]), mask)
        for k in range(2):
            inputs = torch.tensor([[row[k]] for row in added])
            mask = torch.cat([mask, torch.ones_like(inputs)], 1)
            logits = decoder.next_logits(inputs, mask)
        base: Any = policy.base
        for row, prompt in enumerate(prompts):
            full = base(input_ids=torch.tensor([prompt + added[row]])).logits[0, -1]
            torch.testing.assert_close(logits[row], full, rtol=1e-4, atol=1e-4)


def test_one_model_with_an_adapter_is_two_in_the_mixture(
    make_config: Callable[..., Config], tokenizer: Any
) -> None:
    base = policy_of(make_config(), tokenizer)
    adapted = policy_of(make_config(adapter={"r": 4}), tokenizer)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.trainable_parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))

    def drawn(reference: Policy, **options: Any) -> Any:
        return sample_mixture(
            adapted, reference, PROMPTS, set(), mixture=0.7, max_new_tokens=8,
            generator=torch.Generator().manual_seed(3), **options,
        )  # fmt: skip

    ours = drawn(adapted, around=partial(as_reference, adapted))
    assert ours == drawn(base) != drawn(adapted)


def test_tokens_are_drawn_from_the_mixture_up_to_an_end(policy: Policy) -> None:
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        reference.base.get_output_embeddings().weight.mul_(0.5)
        rows = [policy.base, reference.base]
        logits = [base(input_ids=torch.tensor([[9]])).logits[0, -1] for base in rows]  # type: ignore[operator]
    exact = mixture_logits(*logits, 0.3).softmax(-1)
    options: dict[str, Any] = {"mixture": 0.3, "batch_size": 4000}
    drawn = sample_mixture(
        policy, reference, [[9]] * 4000, set(), max_new_tokens=1,
        generator=torch.Generator().manual_seed(0), **options,
    )  # fmt: skip
    counts = torch.tensor(drawn).flatten().bincount(minlength=len(exact)) / 4000
    # The distance of 4,000 draws from their own distribution is 0.05 here, of the policy's 0.16.
    assert (counts - exact).abs().sum() / 2 < 0.15
    ends = set(range(0, len(exact), 2))
    completions = sample_mixture(
        policy, reference, PROMPTS, ends, max_new_tokens=5,
        generator=torch.Generator().manual_seed(0), **options,
    )  # fmt: skip
    for ids in completions:
        assert 1 <= len(ids) <= 5 and all(token not in ends for token in ids[:-1])
        assert len(ids) == 5 or ids[-1] in ends
