"""Optimizers: which weights decay, the 8-bit ones against plain AdamW, and the schedules."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpref.config import Config, ConfigError, Optim
from fastpref.training import optim
from fastpref.training.optim import check_eight_bit, learning_rate, make_optimizer
from fastpref.training.signals import Interrupted
from fastpref.training.trainer import Trainer
from fastpref.utils import optional_packages
from fastpref.utils.optional_packages import MissingPackage
from fastpref.utils.progress import Display

MakeConfig = Callable[..., Config]
LARGE = (96, 64)  # bitsandbytes stores moments in 8 bits from 4,096 weights on
needs_bitsandbytes = pytest.mark.skipif(
    not optional_packages.has("bitsandbytes"), reason="bitsandbytes is not installed"
)


def weights(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def gradients(parameters: list[nn.Parameter], steps: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(p.shape, generator=generator) for p in parameters] for _ in range(steps)]


def updates(config: Optim, parameters: list[nn.Parameter], steps: int) -> list[Tensor]:
    """Difference of each weight before and after the steps."""
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = make_optimizer(config, parameters)
    for step_gradients in gradients(parameters, steps):
        for parameter, gradient in zip(parameters, step_gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach() - old for parameter, old in zip(parameters, before, strict=True)]


def adamw(config: Optim, parameters: list[nn.Parameter], steps: int) -> list[Tensor]:
    """The same differences by the definition of AdamW in fp64, with decay of matrices only."""
    moved = []
    for index, parameter in enumerate(parameters):
        start = weight = parameter.detach().double()
        first = second = torch.zeros_like(weight)
        decay = config.weight_decay if parameter.dim() >= 2 else 0.0
        b1, b2 = config.betas
        for k, step_gradients in enumerate(gradients(parameters, steps), 1):
            g = step_gradients[index].double()
            first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g**2
            step = first / (1 - b1**k) / ((second / (1 - b2**k)).sqrt() + config.eps)
            weight = weight * (1 - config.lr * decay) - config.lr * step
        moved.append((weight - start).float())
    return moved


@pytest.mark.parametrize("name", ["adamw", pytest.param("adamw_8bit", marks=needs_bitsandbytes)])
def test_adamw_by_its_definition(name: str) -> None:
    config = Optim(name=name, lr=1e-2, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-6)
    small = weights((8, 4), (5,))
    expected = adamw(config, small, steps=6)
    for actual, definition in zip(updates(config, small, steps=6), expected, strict=True):
        torch.testing.assert_close(actual, definition, rtol=1e-4, atol=1e-6)


@needs_bitsandbytes
def test_moments_in_8_bits_are_near() -> None:
    config = Optim(name="adamw_8bit", lr=1e-2, weight_decay=0.3)
    parameters = weights(LARGE)
    (expected,) = adamw(config, parameters, steps=6)
    (actual,) = updates(config, parameters, steps=6)
    error = (actual - expected).norm() / expected.norm()
    assert 1e-6 < error < 0.05


@needs_bitsandbytes
def test_their_state_is_tensors_of_a_byte_a_weight() -> None:
    parameters = weights(LARGE, (7,))
    optimizer = make_optimizer(Optim(name="adamw_8bit"), parameters)
    assert type(optimizer).__name__ == "AdamW8bit"
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    assert all(isinstance(t, Tensor) for entry in state.values() for t in entry.values())
    assert state[0]["state1"].dtype == state[0]["state2"].dtype == torch.uint8
    assert state[1]["state1"].dtype == torch.float32
    assert [int(entry["step"]) for entry in state.values()] == [1, 1]


@needs_bitsandbytes
def test_a_run_with_8_bit_moments_resumes_bit_for_bit(
    make_config: MakeConfig, display: Display
) -> None:
    output = make_config().training.output_dir
    options: dict[str, Any] = {
        "optim": {"name": "adamw_8bit", "lr": 1e-3, "weight_decay": 0.1},
        "training__checkpoint_every": 1,
    }

    def run(**change: Any) -> dict[str, Tensor]:
        trainer = Trainer(make_config(**options, **change), display)
        trainer.loop([])
        return trainer.policy.state_dict()

    whole = run(training__steps=4, training__output_dir=f"{output}-whole")
    run(training__steps=2)
    resumed = run(training__steps=4, resume="auto")
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_rmsprop_by_its_definition() -> None:
    config = Optim(name="rmsprop", lr=1e-2, alpha=0.9, eps=1e-6, weight_decay=0.3)
    parameters = weights((8, 4), (5,))
    start = [parameter.detach().double() for parameter in parameters]
    expected = []
    for index, weight in enumerate(start):
        mean = torch.zeros_like(weight)
        for step_gradients in gradients(parameters, steps=6):
            g = step_gradients[index].double() + (0.3 * weight if weight.dim() >= 2 else 0)
            mean = 0.9 * mean + 0.1 * g**2
            weight = weight - 1e-2 * g / (mean.sqrt() + 1e-6)
        expected.append((weight - start[index]).float())
    for actual, definition in zip(updates(config, parameters, 6), expected, strict=True):
        torch.testing.assert_close(actual, definition, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_by_its_definition(momentum: float) -> None:
    config = Optim(name="sgd", lr=1e-2, momentum=momentum, weight_decay=0.3)
    parameters = weights((8, 4), (5,))
    start = [parameter.detach().double() for parameter in parameters]
    expected = []
    for index, weight in enumerate(start):
        velocity = torch.zeros_like(weight)
        for step_gradients in gradients(parameters, steps=6):
            g = step_gradients[index].double() + (0.3 * weight if weight.dim() >= 2 else 0)
            velocity = momentum * velocity + g
            weight = weight - 1e-2 * velocity
        expected.append((weight - start[index]).float())
    for actual, definition in zip(updates(config, parameters, 6), expected, strict=True):
        torch.testing.assert_close(actual, definition, rtol=1e-4, atol=1e-6)


@needs_bitsandbytes
def test_what_8_bits_are_refused_for(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = weights(LARGE)
    with pytest.raises(ConfigError, match=r"optim\.name: paged_adamw_8bit pages the memory of a"):
        make_optimizer(Optim(name="paged_adamw_8bit"), parameters)
    check_eight_bit(Optim(name="paged_adamw_8bit"), torch.device("cuda"))
    monkeypatch.setattr(optim, "DTensor", nn.Parameter)
    with pytest.raises(ConfigError, match="adamw_8bit needs full weights, and these are shar"):
        make_optimizer(Optim(name="adamw_8bit"), parameters)


def test_8_bits_without_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional_packages, "find_spec", lambda name: None)
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        match = rf"optim\.name: {name} needs bitsandbytes; pip install bitsandbytes"
        with pytest.raises(MissingPackage, match=match):
            make_optimizer(Optim(name=name), weights(LARGE))
    make_optimizer(Optim(name="adamw"), weights(LARGE))


OPTIONS: dict[str, Any] = {"betas": (0.9, 0.9), "alpha": 0.9, "momentum": 0.9, "eps": 1e-6}
OWN = {
    "adamw": {"betas", "eps"},
    "adamw_8bit": {"betas", "eps"},
    "paged_adamw_8bit": {"betas", "eps"},
    "rmsprop": {"alpha", "eps"},
    "sgd": {"momentum"},
}


@pytest.mark.parametrize("name", OWN)
def test_options_of_the_others_are_refused(name: str) -> None:
    for option, value in OPTIONS.items():
        if option in OWN[name]:
            assert getattr(Optim(name=name, **{option: value}), option) == value
        else:
            match = f"{option} is not an option of {name}; remove it"
            with pytest.raises(ValueError, match=match):
                Optim(name=name, **{option: value})


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_the_rate_of_each_step(schedule: str, expected: list[float]) -> None:
    config = Optim(lr=1.0, schedule=schedule, warmup_steps=2)
    rates = [learning_rate(config, step, 6) for step in range(6)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ratio", "steps", "warmup"), [(0.0, 100, 0), (0.1, 100, 10), (0.1, 101, 11), (0.03, 10, 1)]
)
def test_a_share_of_the_steps_is_rounded_up(ratio: float, steps: int, warmup: int) -> None:
    config = Optim(lr=1.0, warmup_ratio=ratio)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    same = [learning_rate(Optim(lr=1.0, warmup_steps=warmup), step, steps) for step in range(steps)]
    assert config.warmup(steps) == warmup
    assert rates == same


def test_two_lengths_of_the_warm_up_are_refused() -> None:
    match = r"warmup_ratio: 0\.1, but warmup_steps is 5; remove one of them"
    with pytest.raises(ValueError, match=match):
        Optim(warmup_ratio=0.1, warmup_steps=5)
    assert Optim(warmup_ratio=0.1, warmup_steps=0).warmup(30) == 3


def test_a_run_with_momentum_resumes_bit_for_bit(make_config: MakeConfig, display: Display) -> None:
    output = make_config().training.output_dir
    options: dict[str, Any] = {
        "optim": {"name": "sgd", "lr": 1e-2, "momentum": 0.9, "warmup_ratio": 0.5},
        "training__checkpoint_every": 1,
    }

    def run(**change: Any) -> dict[str, Tensor]:
        trainer = Trainer(make_config(**options, **change), display)
        trainer.loop(stop)
        return trainer.policy.state_dict()

    stop: list[int] = []
    whole = run(training__steps=4, training__output_dir=f"{output}-whole")
    stop = [signal.SIGTERM]
    with pytest.raises(Interrupted):
        run(training__steps=4)
    stop = []
    resumed = run(training__steps=4, resume="auto")
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_plain_gradient_steps_have_no_state_to_resume(
    make_config: MakeConfig, display: Display
) -> None:
    options: dict[str, Any] = {"optim": {"name": "sgd", "lr": 1e-2}, "training__steps": 2}
    trainer = Trainer(make_config(**options, training__checkpoint_every=1), display)
    trainer.loop([])
    resumed = Trainer(make_config(**options, resume="auto"), display)
    assert resumed.step == 2 and not any(resumed.optimizer.state.values())
