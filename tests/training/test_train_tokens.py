"""Objectives that look at single tokens, and weights of tokens, through the loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fastpref.config import Config, ConfigError
from fastpref.data.collate import collate
from fastpref.data.dataset import TokenGroup, load_groups
from fastpref.data.readers import DataError
from fastpref.training.trainer import Trainer
from fastpref.utils.progress import Display
from tests.helpers.data import rows, write_jsonl
from tests.helpers.exact import ExactlyInFp64
from tests.helpers.training_runs import records, run, weights

MakeConfig = Callable[..., Config]
LISTED = [{"name": "tdpo2", "weight": 0.5}, {"name": "dpo", "ld_alpha": 0.5}, {"name": "sft"}]
LOSSES: dict[str, Any] = {
    "tdpo1": "tdpo1",
    "tdpo2": "tdpo2",
    "ti_dpo": "ti_dpo",
    "ti_dpo prior": {"name": "ti_dpo", "lam": 0.0},
    "ti_dpo one_minus_p": {"name": "ti_dpo", "weights": "one_minus_p"},
    "wpo": {"name": "simpo", "wpo": True},
    "list": LISTED,
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_objective_trains(make_config: MakeConfig, display: Display, name: str) -> None:
    data = make_config().data.train
    run(config := make_config(loss=LOSSES[name], training__epochs=4, data__eval=data), display)
    lines = [line for line in records(config) if "loss" in line]
    assert len(lines) == 12
    assert sum(x["loss"] for x in lines[-3:]) < sum(x["loss"] for x in lines[:3])
    assert all(value == value for line in lines for value in line.values()), "no metric is NaN"


@pytest.mark.parametrize("name", ["tdpo2", "ti_dpo", "list"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"reference": "frozen"},
        {"adapter": {"name": "lora", "r": 4}},
        {"adapter": {"name": "lora", "r": 4}, "reference": "adapter"},
        {"training__micro_batch_tokens": 60},
        {"training__activation_checkpointing": "full"},
    ],
)
def test_rewards_of_the_first_step_are_exactly_zero(
    make_config: MakeConfig, display: Display, name: str, change: dict[str, Any]
) -> None:
    run(config := make_config(loss=LOSSES[name], training__steps=2, **change), display)
    first, second = records(config)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert second["rewards/margins"] != 0.0


class Plain:
    """Log-probs of the responses of a pair, and what objectives make of them, from full logits."""

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)

    def logits(self, group: TokenGroup, k: int, embeddings: Tensor | None = None) -> Tensor:
        ids = self.ids(group, k)
        options = {"input_ids": ids} if embeddings is None else {"inputs_embeds": embeddings}
        with ExactlyInFp64():
            return self.model(**options).logits[0]

    def ids(self, group: TokenGroup, k: int) -> Tensor:
        return torch.tensor([[*group.prompt.tolist(), *group.responses[k].tolist()]])

    def log_softmax(self, group: TokenGroup, k: int) -> Tensor:
        """(n, V) of the positions that predict the response."""
        return self.logits(group, k).log_softmax(-1)[len(group.prompt) - 1 : -1]

    def logps(self, group: TokenGroup, k: int) -> Tensor:
        labels = torch.from_numpy(group.responses[k].copy()).long()
        return self.log_softmax(group, k).gather(1, labels[:, None])[:, 0]

    def importance(self, group: TokenGroup, k: int) -> Tensor:
        ids = self.ids(group, k)
        embeddings = self.model.get_input_embeddings()(ids).detach().requires_grad_()
        top = self.logits(group, k, embeddings)[-1].max()
        (gradient,) = torch.autograd.grad(top, embeddings)
        return gradient[0].abs().sum(1)[len(group.prompt) :]


def tdpo2(plain: Plain, ref: Plain, group: TokenGroup) -> Tensor:
    t, d = [], []
    for k in (0, 1):
        q, p = ref.log_softmax(group, k).detach(), plain.log_softmax(group, k)
        d.append((q.exp() * (q - p)).sum())
        t.append((plain.logps(group, k) - ref.logps(group, k).detach()).sum())
    return -logsigmoid(0.1 * (t[0] - t[1] - 0.5 * (d[1] - d[0].detach())))


def ti_dpo(plain: Plain, ref: Plain, group: TokenGroup) -> Tensor:
    t = []
    for k in (0, 1):
        n = len(group.responses[k])
        places = torch.arange(n, dtype=torch.float64)
        prior = torch.exp(-(((places - (n - 1) / 2) / (n / 4)) ** 2) / 2)
        i = plain.importance(group, k)
        w = n * (0.7 * i / i.sum() + 0.3 * prior / prior.sum())
        t.append((w * (plain.logps(group, k) - ref.logps(group, k).detach())).sum())
    return -logsigmoid(0.1 * (t[0] - t[1]))


def wpo(plain: Plain, ref: Plain, group: TokenGroup) -> Tensor:
    a, g = [], []
    for k in (0, 1):
        p = plain.log_softmax(group, k)
        a.append(plain.logps(group, k).mean())
        g.append((plain.logps(group, k) - p.exp().square().sum(1).log()).mean().detach())
    omega = min(1.0, math.exp(g[0] + g[1]))
    return omega * -logsigmoid(2 * (a[0] - a[1]) - 1.0)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("tdpo2", tdpo2),
        ("ti_dpo", ti_dpo),
        ({"name": "simpo", "beta": 2.0, "gamma": 1.0, "wpo": True}, wpo),
    ],
    ids=["tdpo2", "ti_dpo", "wpo"],
)
def test_the_second_step_is_that_of_full_logits(
    make_config: MakeConfig,
    display: Display,
    tiny_llama: str,
    tokenizer: PreTrainedTokenizerFast,
    loss: Any,
    expected: Callable[[Plain, Plain, TokenGroup], Tensor],
) -> None:
    """Losses of two steps of SGD-like training, and so the gradient of the first, in fp64.

    RMSprop with alpha 0 and a huge eps is SGD.
    """
    config = make_config(
        loss=loss, model__dtype="float64", training__steps=2, data__eval=None,
        optim={"name": "rmsprop", "lr": 5e7, "alpha": 0.0, "eps": 1e8, "max_grad_norm": None},
        training__layout="padded",  # the same operations: Llama's norms round to fp32
    )  # fmt: skip
    trainer = run(config, display)
    dataset = load_groups(config.data.train, tokenizer, config.data)
    plain, ref = Plain(tiny_llama), Plain(tiny_llama)
    for number, line in enumerate(records(config)):
        groups = [dataset[i] for part in trainer.plan.step(number) for i in part]
        losses = torch.stack([expected(plain, ref, group) for group in groups])
        assert line["loss"] == pytest.approx(losses.mean().item(), rel=1e-9)
        plain.model.zero_grad()
        losses.mean().backward()
        with torch.no_grad():
            for parameter in plain.model.parameters():
                gradient = parameter.grad
                parameter -= 5e7 * gradient / (gradient.abs() + 1e8)


def weighted(
    tokenizer: PreTrainedTokenizerFast, count: int, weigh: Callable[[int], float]
) -> list[dict[str, Any]]:
    """Pairs with the weight `weigh(k)` for token k of a response."""
    made = rows(count)
    for row in made:
        prompt = len(tokenizer(row["prompt"])["input_ids"])
        for name in ("chosen", "rejected"):
            tokens = len(tokenizer(row["prompt"] + row[name])["input_ids"]) - prompt
            row[f"{name}_weights"] = [weigh(k) for k in range(tokens)]
    return made


def test_weights_of_one_change_nothing(
    make_config: MakeConfig, display: Display, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Nor does the calibration, whose scores are then those of weighted sums, all weights 1."""
    data = write_jsonl(tmp_path / "w.jsonl", weighted(tokenizer, 12, lambda k: 1.0))
    trained = {}
    for name, change in (("plain", {}), ("weighted", {"data__train": str(data)})):
        config = make_config(
            loss="simpo", model__dtype="float64", calibration={"name": "rc", "momentum": 0.5},
            training__steps=4, training__output_dir=str(tmp_path / name), **change,
        )  # fmt: skip
        trained[name] = run(config, display)
    lines = [records(trained[name].config) for name in ("plain", "weighted")]
    for a, b in zip(*lines, strict=True):
        assert a == pytest.approx(b, rel=1e-7)
    a, b = (weights(trained[name]) for name in ("plain", "weighted"))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-6, atol=1e-9)


def test_weights_of_zero_hide_tokens(
    make_config: MakeConfig, display: Display, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """DPO on the first token of each response alone, from the second step on."""
    first = weighted(tokenizer, 12, lambda k: float(k == 0))
    config = make_config(
        data__train=str(write_jsonl(tmp_path / "w.jsonl", first)),
        data__add_eos=False, model__dtype="float64", training__steps=1,
    )  # fmt: skip
    trainer = run(config, display)
    dataset = load_groups(config.data.train, tokenizer, config.data)
    group = dataset[0]
    seen = trainer.forward([collate([group])], trainer.run.train.reference)
    output = trainer.loss(seen.policy, seen.reference)
    plain = Plain(str(trainer.run.folder / "model"))
    ref = Plain(config.model.path or "")
    t = [(plain.logps(group, k)[0] - ref.logps(group, k)[0]) for k in (0, 1)]
    assert output.loss.item() == pytest.approx(-logsigmoid(0.1 * (t[0] - t[1])).item(), rel=1e-9)


def test_weights_that_do_not_fit_are_refused(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    weights = {"chosen_weights": [1.0] * 100, "rejected_weights": []}
    path = write_jsonl(tmp_path / "w.jsonl", [{**row, **weights} for row in rows(2)])
    message = r"row 1: chosen_weights has 100 numbers, but the tokenizer makes \d+ tokens \(and"
    with pytest.raises(DataError, match=message):
        Trainer(make_config(data__train=str(path)), display)
    Trainer(make_config(data__train=str(path), data__token_weights=False), display)


def test_sums_that_come_with_the_data_are_refused(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    given = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in rows(4)]
    path = write_jsonl(tmp_path / "given.jsonl", given)
    with pytest.raises(DataError, match="are sums, and this objective needs the log-prob of each"):
        Trainer(make_config(data__train=str(path), loss={"name": "ti_dpo", "lam": 0.0}), display)


def test_many_micro_batches_equal_one(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    trained = {}
    for tokens in (4096, 60):
        config = make_config(
            loss=LISTED, training__steps=3, training__micro_batch_tokens=tokens,
            training__output_dir=str(tmp_path / str(tokens)), optim__eps=1e-4,
        )  # fmt: skip
        trained[tokens] = run(config, display)
    assert len(trained[60].plan.step(0)) > 1
    few = weights(trained[4096])
    for name, value in weights(trained[60]).items():
        torch.testing.assert_close(value, few[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scope", ["head", "full"])
def test_calibration_of_tokens(make_config: MakeConfig, display: Display, scope: str) -> None:
    """The factor moves, and the scores of both scopes are those of the weighted tokens."""
    config = make_config(
        loss={"name": "ti_dpo", "lam": 0.0}, calibration={"name": "rc", "scope": scope},
        training__steps=3,
    )  # fmt: skip
    run(config, display)
    first, *_, last = records(config)
    assert first["calibration/factor"] == 1.0 and last["calibration/factor"] != 1.0
    assert -1 <= last["band/cosine"] <= 1


def test_a_divergence_under_a_head_with_a_bias_is_refused(
    make_config: MakeConfig, display: Display
) -> None:
    phi = {
        "model_type": "phi", "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 256,
    }  # fmt: skip
    config = make_config(model={"init": "random", "config": phi, "dtype": "float32"}, loss="tdpo1")
    with pytest.raises(ConfigError, match="tdpo1 measures a KL divergence, which is not impl"):
        Trainer(config, display)
