"""Reward Calibration in the trainer against Algorithm 2 of arXiv:2604.18239, written out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastpref import config as configs
from fastpref import distributed
from fastpref.model import fsdp
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display
from tests.helpers import rank_processes
from tests.helpers.data import rows, write_jsonl

# All of it computes in the dtype of its weights; an RMSNorm is in fp32.
NEOX = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
STEPS, BATCH, LR, MOMENTUM, BETA, LAM = 6, 8, 0.02, 0.7, 0.1, 1.0
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": BETA},
    "cpo": {"name": "cpo", "beta": BETA, "lam": LAM},
}
ACCUMULATION = {1: 4096, 4: 100}  # micro-batches of a step on one rank: tokens of each


def config_of(home: Path, loss: str, accumulation: int, run: str) -> configs.Config:
    return configs.parse(
        {
            "model": {"path": str(home / "model"), "dtype": "float64"},
            "data": {"train": str(home / "pairs.jsonl"), "max_length": 64},
            "loss": LOSSES[loss],
            "calibration": {"momentum": MOMENTUM},
            "parallel": {"shard": 1},
            "optim": {"name": "sgd", "lr": LR, "max_grad_norm": None},
            "training": {
                "steps": STEPS,
                "batch_size": BATCH,
                "layout": "padded",
                "micro_batch_tokens": ACCUMULATION[accumulation],
                "activation_checkpointing": "off",
                "device": "cpu",
                "checkpoint_every": None,
                "output_dir": str(home / run),
            },
        }
    )


def train(config: configs.Config) -> tuple[dict[str, Tensor], Trainer]:
    trainer = Trainer(config, Display(Console(quiet=True)))
    trainer.loop([])
    parameters = trainer.policy.base.named_parameters()
    return {name: fsdp.full_tensor(p.detach()).clone() for name, p in parameters}, trainer


def of_two(rank: int, port: int, home: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    with distributed.process_group():
        for loss in LOSSES:
            for accumulation in ACCUMULATION:
                config = config_of(home, loss, accumulation, f"{loss}-{accumulation}-2")
                weights, _ = train(config)
                if rank == 0:
                    torch.save(weights, home / f"{loss}-{accumulation}-2.pt")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Path:
    """Model, data, and the weights that two ranks train."""
    folder = tmp_path_factory.mktemp("algorithm-2")
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt_neox", **NEOX)
    AutoModelForCausalLM.from_config(config).double().save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder / "model")
    write_jsonl(folder / "pairs.jsonl", rows(STEPS * BATCH))
    rank_processes.start(of_two, 2, folder)
    return folder


def transcription(
    home: Path, loss: str, trainer: Trainer, accumulated: bool
) -> tuple[dict[str, Tensor], list[float]]:
    """Final weights, and the factors of all steps.

    accumulated: whether the band of the last step clips, rather than that of the step itself.
    """
    model = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float64)
    head = model.get_output_embeddings().weight

    def logps(step: int) -> tuple[Tensor, Tensor]:
        groups = [trainer.run.train.groups[i] for i in trainer.plan.groups(step)]
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for group in groups:
            for side, response in zip(sides, group.responses, strict=True):
                ids = torch.tensor([[*group.prompt.tolist(), *response.tolist()]])
                logits = model(ids).logits[0, len(group.prompt) - 1 : -1]
                side.append(
                    logits.log_softmax(1).gather(1, ids[0, len(group.prompt) :, None]).sum()
                )
        return torch.stack(sides[0]), torch.stack(sides[1])

    with torch.no_grad():
        reference = [logps(step) for step in range(STEPS)]
    ema: Tensor | None = None
    last: tuple[Tensor, Tensor] | None = None
    factors = []
    for step in range(STEPS):
        zw, zl = logps(step)
        sw = torch.autograd.grad(zw.mean(), head, retain_graph=True)[0]
        sl = torch.autograd.grad(zl.mean(), head, retain_graph=True)[0]
        margin = BETA * (zw - zl).detach()
        if loss == "dpo":
            margin = margin - BETA * (reference[step][0] - reference[step][1])
        dl = BETA * torch.sigmoid(-margin)
        dw = dl + (LAM if loss == "cpo" else 0.0)
        own = dw.mean().log() - dl.mean().log(), (sw * sl).sum() / sw.norm() / sl.norm()
        alpha = torch.ones((), dtype=torch.float64)
        if ema is not None and last is not None:
            log_r, rho = last if accumulated else own
            target = ema[3] - ema[2]
            log_calibration = target - (ema[0] - ema[1])
            if rho > 0:
                low, high = target - log_r + rho.log(), target - log_r - rho.log()
                log_calibration = torch.minimum(torch.maximum(log_calibration, low), high)
            alpha = (log_calibration / 2).exp()
        factors.append(alpha.item())
        zw_rc = alpha * zw + (1 - alpha) * zw.detach()
        zl_rc = (1 / alpha) * zl + (1 - 1 / alpha) * zl.detach()
        policy_margin = BETA * (zw_rc - zl_rc)
        if loss == "dpo":
            policy_margin = policy_margin - BETA * (reference[step][0] - reference[step][1])
        objective = -torch.nn.functional.logsigmoid(policy_margin)
        if loss == "cpo":
            objective = objective - LAM * zw_rc
        model.zero_grad()
        objective.mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LR * parameter.grad
        new = torch.stack([dw.mean(), dl.mean(), sw.norm(), sl.norm()]).add(1e-12).log()
        ema = new if ema is None else MOMENTUM * ema + (1 - MOMENTUM) * new
        last = own
    return {name: p.detach() for name, p in model.named_parameters()}, factors


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("accumulation", ACCUMULATION)
def test_the_trainer_is_the_algorithm(home: Path, loss: str, accumulation: int) -> None:
    config = config_of(home, loss, accumulation, f"{loss}-{accumulation}-1")
    weights, trainer = train(config)
    assert len(trainer.plan.step(0)) == accumulation
    expected, factors = transcription(home, loss, trainer, accumulated=accumulation > 1)
    two_ranks = torch.load(home / f"{loss}-{accumulation}-2.pt")
    for name, exact in expected.items():
        for actual in (weights[name], two_ranks[name]):
            torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)
    # Calibration acts: CPO's factors are far from 1, and without them other weights result.
    assert factors[0] == 1
    distance = max(abs(factor - 1) for factor in factors)
    assert distance > (0.5 if loss == "cpo" else 1e-3)
