"""Reward models from data to export: transformers scores the export as the run did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from fastpref.config import Config
from fastpref.model.reward_policy import RewardPolicy, set_padding_token
from fastpref.training.exports import export_step
from fastpref.training.signals import Interrupted
from fastpref.training.trainer import Trainer, train
from fastpref.utils.errors import ModelError, UserError
from fastpref.utils.progress import Display
from tests.helpers.data import labelled, scored, write_jsonl

MakeConfig = Callable[..., Config]
Command = Callable[..., Any]
LORA = {"r": 4, "target_modules": "all-linear"}


def reward_config(make_config: MakeConfig, **overrides: Any) -> Config:
    return make_config(**{"loss": {"name": "bradley_terry"}, "optim__lr": 1e-2, **overrides})


@torch.no_grad()
def run_rewards(trainer: Trainer) -> list[torch.Tensor]:
    """Rewards of every group by the policy of a run."""
    trainer.policy.eval()
    data = trainer.run.train.groups
    batches = [trainer.policy.batches(data, [k])[0] for k in range(len(data))]
    return [trainer.policy(batch).logps for batch in batches]


@torch.no_grad()
def exported_rewards(model: Any, folder: Path, trainer: Trainer) -> list[torch.Tensor]:
    """Rewards of the same groups by transformers, in padded batches."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    values = []
    for k in range(len(trainer.run.train.groups)):
        group = trainer.run.train.groups[k]
        ids = [[*group.prompt.tolist(), *response.tolist()] for response in group.responses]
        batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        output = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"])
        values.append(output.logits[:, 0])
    return values


@pytest.mark.parametrize(
    ("loss", "adapter"),
    [
        ("bradley_terry", None),
        ("plackett_luce", {**LORA, "merge": True}),
        ("reward_regression", {**LORA, "merge": False}),
        ("label_regression", None),
    ],
)
def test_an_export_scores_as_the_run(
    make_config: MakeConfig, display: Display, tmp_path: Path, loss: str, adapter: Any
) -> None:
    rows = {"label_regression": labelled(6), "bradley_terry": None}.get(loss, scored(6))
    changed = {} if rows is None else {"data__train": write_jsonl(tmp_path / "d.jsonl", rows)}
    changed = {name: str(path) for name, path in changed.items()}
    config = reward_config(make_config, loss={"name": loss}, adapter=adapter, **changed)
    trainer = Trainer(config, display)
    assert isinstance(trainer.policy, RewardPolicy)
    before = torch.cat(run_rewards(trainer))
    trainer.loop([])
    ours, folder = run_rewards(trainer), trainer.export()
    assert (torch.cat(ours) - before).abs().max() > 0.05
    model: Any
    if adapter is None or adapter["merge"]:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        assert model.config.num_labels == 1 and len(model.config.id2label) == 1
    else:
        from peft import PeftModel

        start = AutoModelForSequenceClassification.from_pretrained(
            config.model.path, num_labels=1, dtype=torch.float32
        )
        start.config.pad_token_id = AutoTokenizer.from_pretrained(folder).pad_token_id
        model = PeftModel.from_pretrained(start, str(folder))
        saved = json.loads((folder / "adapter_config.json").read_text())
        assert (saved["task_type"], saved["modules_to_save"]) == ("SEQ_CLS", ["score"])
    theirs = exported_rewards(model, folder, trainer)
    torch.testing.assert_close(torch.cat(ours), torch.cat(theirs), rtol=0, atol=1e-5)
    records = [json.loads(line) for line in (trainer.run.folder / "metrics.jsonl").open()]
    assert "rewards/chosen" in records[-1] and records[-1]["loss"] < records[0]["loss"] * 1.5
    assert not any(name.startswith(("logps", "entropy", "preference")) for name in records[-1])


def test_padded_rows_train_the_same_reward_model(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    rewards = []
    for layout in ("prefix_shared", "padded"):
        changed = {"training__layout": layout, "training__output_dir": str(tmp_path / layout)}
        trainer = Trainer(reward_config(make_config, **changed), display)
        trainer.loop([])
        rewards.append(torch.cat(run_rewards(trainer)))
        trainer.close()
    torch.testing.assert_close(*rewards, rtol=1e-3, atol=1e-3)


def test_a_resumed_run_and_the_export_of_a_checkpoint_are_the_same(
    make_config: MakeConfig, display: Display, tmp_path: Path
) -> None:
    changed = {"adapter": LORA, "training__checkpoint_every": 1, "training__epochs": 1}
    config = reward_config(make_config, **changed)
    whole = train(config, display)
    export_step(whole.parent, 3, tmp_path / "late", torch.device("cpu"), display)
    part = reward_config(make_config, **changed, training__output_dir=str(tmp_path / "part"))
    with pytest.raises(Interrupted, match="after step 1"):
        train(part, display, received=[15])
    resumed = train(part.model_copy(update={"resume": "auto"}), display)
    files = [folder / "model.safetensors" for folder in (whole, tmp_path / "late", resumed)]
    assert len({file.read_bytes() for file in files}) == 1


def test_the_padding_token_ends_no_response(tokenizer: PreTrainedTokenizerFast) -> None:
    set_padding_token(tokenizer)
    assert tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("<pad>")
    for special, expected in (
        (["<|end|>", "<|reserved_0|>"], "<|reserved_0|>"),
        (["<|eot_id|>", "<|finetune_right_pad_id|>"], "<|finetune_right_pad_id|>"),
    ):
        # As that of Llama 3: the padding token is missing, or the token that ends all text.
        for pad in (None, special[0]):
            backend = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
            backend.add_special_tokens({"additional_special_tokens": special})
            backend.eos_token, backend.pad_token = special[0], pad
            backend.chat_template = "{{ messages[0]['content'] }}<s></s><pad><|im_start|><|im_end|>"
            set_padding_token(backend)
            assert backend.pad_token_id == backend.convert_tokens_to_ids(expected)
    backend.chat_template += "<|finetune_right_pad_id|><|reserved_0|><|end|><unk>"
    with pytest.raises(ModelError, match="has no token for padding besides those that end a resp"):
        set_padding_token(backend)


def test_commands_refuse_the_objectives_of_the_other(fastpref: Command, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    base = "model: {path: llama}\ndata: {train: pairs.jsonl}\nloss: "
    for command, loss, says in (
        ("train", "bradley_terry", "loss: bradley_terry trains a reward model; use fastpref rew"),
        ("precompute", "plackett_luce", "loss: plackett_luce trains a reward model; use fastpre"),
        ("reward", "dpo", "loss: dpo trains a language model; use fastpref train, or one of brad"),
    ):
        config.write_text(base + loss)
        done = fastpref(command, str(config))
        assert done.returncode == 2 and says in done.stderr


@pytest.mark.parametrize("option", ["reference=frozen", "calibration=rc", "update=dpo_pg"])
def test_options_of_language_models_are_refused(
    fastpref: Command, tmp_path: Path, option: str
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("{model: {path: llama}, data: {train: a.jsonl}, loss: bradley_terry}")
    done = fastpref("reward", str(config), option)
    name = option.partition("=")[0]
    assert f"{name}: is for language models, and bradley_terry trains a reward" in done.stderr


def test_a_metric_of_language_models_chooses_no_reward_model(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"logps/chosen is not measured for a reward model; use lo"):
        reward_config(
            make_config,
            data__eval="pairs.jsonl",
            training__eval_every=1,
            evaluation__metric_for_best_model="logps/chosen",
        )
