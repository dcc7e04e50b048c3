"""Adapters that go on as reward models: with their head, with a new one, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fastpref.config import Config
from fastpref.data.collate import Batch
from fastpref.model.reward_adapter import announce_head
from fastpref.model.reward_policy import RewardPolicy
from fastpref.training.trainer import Trainer
from fastpref.utils.errors import ModelError
from fastpref.utils.progress import Display
from tests.helpers.adapted import save_adapter

MakeConfig = Callable[..., Config]
LORA = {"r": 4, "target_modules": "all-linear", "merge": False}


def reward_config(make_config: MakeConfig, tmp_path: Path, name: str, **more: Any) -> Config:
    folder = str(tmp_path / name)
    return make_config(
        loss={"name": "bradley_terry"}, optim__lr=1e-2, training__output_dir=folder, **more
    )


def save_reward_adapter(folder: Path, base: str, labels: int = 1, **options: Any) -> Any:
    """An adapter that does something, of a classifier with a random head; as TRL saves it."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=labels, dtype=torch.float32
    )
    options = {"r": 3, "target_modules": "all-linear", "init_lora_weights": False, **options}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def first_batch(trainer: Trainer) -> Batch:
    return trainer.policy.batches(trainer.run.train.groups, [0])[0]


@torch.no_grad()
def rewards(trainer: Trainer) -> list[float]:
    trainer.policy.eval()
    values: list[float] = trainer.policy(first_batch(trainer)).logps.tolist()
    return values


def test_the_adapter_of_a_run_goes_on_where_it_ended(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    first = Trainer(reward_config(make_config, tmp_path, "first", adapter=LORA), display)
    start = rewards(first)
    first.loop([])
    end, folder = rewards(first), first.export()
    assert start != end
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert "score" not in saved["target_modules"]
    adapter = {"path": str(folder), "merge": False}
    second = Trainer(reward_config(make_config, tmp_path, "second", adapter=adapter), display)
    assert rewards(second) == end
    head: Any = second.policy.base.score
    before = head.weight.clone()
    second.loop([])
    assert (head.weight - before).abs().max() > 1e-3
    assert json.loads((second.export() / "adapter_config.json").read_text())["modules_to_save"]


@pytest.mark.parametrize("options", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["score"]}])
def test_an_adapter_of_another_trainer_has_its_own_rewards(
    make_config: MakeConfig, display: Display, tmp_path: Path, tiny_llama: str, options: Any
) -> None:
    theirs = save_reward_adapter(tmp_path / "a", tiny_llama, **options)
    adapter = {"path": str(tmp_path / "a")}
    trainer = Trainer(reward_config(make_config, tmp_path, "run", adapter=adapter), display)
    assert isinstance(trainer.policy, RewardPolicy) and trainer.policy.has_loaded_head
    group = trainer.run.train.groups[0]
    expected = []
    for response in group.responses:
        ids = torch.tensor([[*group.prompt.tolist(), *response.tolist()]])
        with torch.no_grad():
            expected.append(theirs(input_ids=ids).logits.item())
    assert rewards(trainer) == pytest.approx(expected, abs=1e-5)


def test_the_adapter_of_a_language_model_gets_a_new_head_and_a_note(
    make_config: MakeConfig, display: Display, tmp_path: Path, tiny_llama: str
) -> None:
    path = save_adapter(tmp_path / "sft", tiny_llama)
    config = reward_config(make_config, tmp_path, "run", adapter={"path": path})
    trainer, notes = Trainer(config, display), list[str]()
    announce_head(trainer.policy, config.adapter, notes.append)
    assert notes == [f"note: the adapter at {path} has no head; training begins with a random one"]
    trainer.policy.has_loaded_head = True  # type: ignore[assignment]
    announce_head(trainer.policy, config.adapter, notes.append)
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (1, {}, r"a has no head \(score\) and is no adapter of a language model \(its task_type is "
            r"None\); train it again with modules_to_save: \[score\], or use an adapter with a h"),
        (2, {"task_type": "SEQ_CLS"},
            r"the head of .*/a \(weight \(2, 32\)\) does not fit the model; use an adapter"),
        (1, {"modules_to_save": ["score", "embed_tokens"]}, "also changes weights of the base mod"),
    ],
)  # fmt: skip
def test_an_adapter_without_its_head_or_with_another_is_refused(
    make_config: MakeConfig,
    display: Display,
    tmp_path: Path,
    tiny_llama: str,
    labels: int,
    options: Any,
    message: str,
) -> None:
    save_reward_adapter(tmp_path / "a", tiny_llama, labels, **options)
    config = reward_config(make_config, tmp_path, "run", adapter={"path": str(tmp_path / "a")})
    with pytest.raises(ModelError, match=message):
        Trainer(config, display)


def test_a_classifier_with_several_labels_is_no_reward_model(
    make_config: MakeConfig, display: Display, tmp_path: Path, tiny_llama: str
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=3)
    model.save_pretrained(tmp_path / "m")
    changed = {"model__path": str(tmp_path / "m"), "model__tokenizer": tiny_llama}
    config = reward_config(make_config, tmp_path, "run", **changed)
    message = r"model.path: .*/m is a classifier with 3 labels, and a reward model has one; use a r"
    with pytest.raises(ModelError, match=message):
        Trainer(config, display)
