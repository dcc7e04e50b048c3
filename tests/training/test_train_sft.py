"""SFT runs on single responses, against transformers' own loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fastpref.config import Config
from fastpref.plan.command import _uniform_lengths
from fastpref.plan.command import run as plan
from fastpref.training.trainer import Trainer
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display
from tests.helpers.data import labelled, rows, write_jsonl
from tests.helpers.training_runs import records, run

MakeConfig = Callable[..., Config]


def chats(count: int) -> list[dict[str, Any]]:
    """Conversations of one or two assistant messages."""
    made = []
    for i, row in enumerate(rows(count)):
        messages = [
            {"role": "user", "content": row["prompt"][:12]},
            {"role": "assistant", "content": row["chosen"]},
            {"role": "user", "content": "more?"},
            {"role": "assistant", "content": row["rejected"]},
        ]
        made.append({"messages": messages[: 2 + 2 * (i % 2)]})
    return made


def expected_loss(model: Any, tokenizer: Any, messages: list[Any], sft_on: str) -> float:
    """Loss of transformers for a conversation in ChatML, with other tokens' labels at -100."""
    ids: list[int] = []
    labels: list[int] = []
    last = max(k for k, message in enumerate(messages) if message["role"] == "assistant")
    for k, message in enumerate(messages):
        is_assistant = message["role"] == "assistant"
        header = tokenizer(f"<|im_start|>{message['role']}\n")["input_ids"]
        body = tokenizer(f"{message['content']}<|im_end|>\n")["input_ids"]
        scored = is_assistant and (sft_on == "assistant" or k == last)
        ids += [*header, *body]
        labels += [-100] * len(header) + (body if scored else [-100] * len(body))
    if sft_on == "all":
        labels = ids
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
    return float(output.loss)


@pytest.mark.parametrize("layout", ["padded", "auto"])
@pytest.mark.parametrize("sft_on", ["completion", "assistant", "all"])
def test_the_loss_is_that_of_transformers(
    make_config: MakeConfig,
    display: Display,
    tmp_path: Path,
    tiny_llama: str,
    tokenizer: PreTrainedTokenizerFast,
    sft_on: str,
    layout: str,
) -> None:
    """The mean over conversations of their means over the tokens that are trained on."""
    data = chats(4)
    config = make_config(
        data__train=str(write_jsonl(tmp_path / "chats.jsonl", data)),
        data__sft_on=sft_on,
        data__max_length=128,
        loss="sft",
        training__steps=1,
        training__layout=layout,
        training__micro_batch_tokens=512,
    )
    run(config, display)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    losses = [expected_loss(model, tokenizer, row["messages"], sft_on) for row in data]
    (record,) = records(config)
    assert record["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert record["rewards/chosen"] == pytest.approx(-record["loss"])
    assert not {"rewards/accuracies", "rewards/margins", "logps/rejected"} & set(record)


def test_prompts_and_completions_in_text_train_as_pairs_do(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    """The chosen responses of the pairs alone give the same losses and weights."""
    singles = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows(12)]
    weights, losses = [], []
    for name, data in (("pairs", rows(12)), ("singles", singles)):
        config = make_config(
            data__train=str(write_jsonl(tmp_path / f"{name}.jsonl", data)),
            data__eval=str(tmp_path / f"{name}.jsonl"),
            loss="sft",
            optim={"lr": 1e-3, "eps": 1e-4},
            training__output_dir=str(tmp_path / name),
        )
        weights.append(run(config, display).policy.state_dict())
        losses.append([line.get("loss", line.get("eval_loss")) for line in records(config)])
    assert len(losses[0]) == 5 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-5)


def test_a_run_on_conversations_resumes(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    data = str(write_jsonl(tmp_path / "chats.jsonl", chats(12)))
    options: dict[str, Any] = {
        "data__train": data,
        "data__max_length": 128,
        "loss": "sft",
        "training__checkpoint_every": 1,
    }
    whole = make_config(
        data__sft_on="assistant",
        training__steps=3,
        training__output_dir=str(tmp_path / "whole"),
        **options,
    )
    run(whole, display)
    run(make_config(data__sft_on="assistant", training__steps=2, **options), display)
    with pytest.raises(UserError, match=r"data\.sft_on: assistant → all; restore"):
        Trainer(make_config(data__sft_on="all", resume="auto", **options), display)
    resumed = make_config(data__sft_on="assistant", training__steps=3, resume="auto", **options)
    run(resumed, display)
    assert records(resumed) == records(whole)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"loss": {"name": "sft", "responses": "both"}}, "loss.responses: both"),
        ({"calibration": "rc"}, "calibration"),
        ({"monitor": {"band_every": 1}}, "monitor.band_every"),
        ({"update": "dpo_pg"}, "update: dpo_pg"),
    ],
)
def test_options_on_pairs_are_refused(
    make_config: MakeConfig, display: Display, tmp_path: Path, options: Any, option: str
) -> None:
    data = str(write_jsonl(tmp_path / "chats.jsonl", chats(4)))
    config = make_config(**{"loss": "sft", "data__train": data, **options})
    with pytest.raises(UserError, match=f"^{option}: needs pairs, and .* has single responses; re"):
        Trainer(config, display)


def test_rows_that_are_not_all_good_responses_are_refused(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    good = labelled(2)
    for data, message in (
        ([*good, *rows(1)], "row 3: no completion; columns found: prompt, chosen, rejected; form"),
        (labelled(6), "row 3: label is False, and sft trains on every completion; remove the row"),
    ):
        path = str(write_jsonl(tmp_path / "mixed.jsonl", data))
        with pytest.raises(UserError, match=message):
            Trainer(make_config(loss="sft", data__train=path), display)
    path = str(write_jsonl(tmp_path / "good.jsonl", good))
    assert Trainer(make_config(loss="sft", data__train=path), display).steps == 1


def test_a_plan_counts_single_responses(make_config: MakeConfig, tmp_path: Path) -> None:
    data = str(write_jsonl(tmp_path / "chats.jsonl", chats(8)))
    config = make_config(loss="sft", data__train=data, data__max_length=128)
    assert plan(config, Console(quiet=True), "cpu", 1, None, None)
    for train, responses in ((data, 1), ("org/name", 1), (make_config().data.train, 2)):
        config = make_config(loss="sft", data__train=train)
        lengths = _uniform_lengths("20,30", config.build_loss(), config)
        assert lengths.group(0) == [20, *[30] * responses]
