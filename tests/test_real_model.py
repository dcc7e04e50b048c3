"""A real chat model, where the environment names one: its log-probs, steps, export and template."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref import metrics
from fastpref.config import Data, parse
from fastpref.data.batch_plan import Layout
from fastpref.data.dataset import load_groups
from fastpref.data.synthetic import pure_semantic
from fastpref.model.batch_layout import use_layout
from fastpref.model.policy import Policy
from fastpref.training.trainer import Trainer
from fastpref.trunk import build_trunk
from fastpref.utils.progress import Display

PAIRS, TOKENS = 16, 80
Messages = list[dict[str, str]]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Messages]]:
    """Pairs as conversations: real ones where there is a folder of data, else generated ones."""
    folder = Path(os.environ.get("FASTPREF_DATA", ""), "alpacaeval_pairs.jsonl")
    if "FASTPREF_DATA" in os.environ and folder.is_file():
        texts = [json.loads(line) for line in folder.read_text().splitlines()]
        texts = [row for row in texts if len(row["prompt"]) < 120]  # leaves room for responses
    else:
        pairs = pure_semantic.generate()
        texts = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [
        {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}
        for row in texts[:PAIRS]
    ]


@pytest.fixture(scope="module")
def data(rows: list[dict[str, Messages]], tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(train=str(path), max_length=TOKENS, cache=str(folder / "cache"))


@pytest.fixture(scope="module")
def tokenizer(real_model: str) -> Any:
    return AutoTokenizer.from_pretrained(real_model)


@pytest.fixture(scope="module")
def model(real_model: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def sequences(rows: list[dict[str, Messages]], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Ids of prompt and response by the tokenizer's template; chosen before rejected, in pairs."""

    def ids(messages: Messages, **options: Any) -> list[int]:
        encoded = tokenizer.apply_chat_template(messages, tokenize=True, **options)
        return list(encoded["input_ids"] if hasattr(encoded, "keys") else encoded)

    pairs = []
    for row in rows:
        prompt = ids(row["prompt"], add_generation_prompt=True)
        for side in ("chosen", "rejected"):
            whole = ids(row["prompt"] + row[side])
            assert whole[: len(prompt)] == prompt
            pairs.append((prompt, whole[len(prompt) : TOKENS]))
    return pairs


@pytest.fixture(scope="module")
def expected(model: Any, sequences: list[tuple[list[int], list[int]]]) -> Tensor:
    """Summed log-probs by transformers' logits, one sequence at a time, (2 · PAIRS,) fp64."""
    return torch.stack([summed_logps(model, *sequence) for sequence in sequences])


@torch.no_grad()
def summed_logps(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    logps = logits.double().log_softmax(-1)
    return logps.gather(-1, torch.tensor(response)[:, None]).sum()


def test_conversations_are_rendered_by_the_template_of_the_tokenizer(
    data: Data, tokenizer: Any, sequences: list[tuple[list[int], list[int]]]
) -> None:
    groups = load_groups(data.train, tokenizer, data)
    ours = [
        (group.prompt.tolist(), response.tolist())
        for group in groups
        for response in group.responses
    ]
    assert ours == sequences


@pytest.mark.parametrize("fused", [False, True], ids=["transformers' layers", "explicit blocks"])
@pytest.mark.parametrize("layout", ["padded", "packed", "prefix_shared"])
def test_log_probs_are_those_of_transformers(
    layout: Layout, fused: bool, data: Data, model: Any, tokenizer: Any, expected: Tensor
) -> None:
    """Packed rows run under transformers' own mask of position ids, for lack of flash-attention."""
    groups = load_groups(data.train, tokenizer, data)
    policy = Policy(model, torch.float32)
    policy.trunk = build_trunk(model.base_model) if fused else None
    implementation = model.config._attn_implementation
    use_layout(policy, layout)
    try:
        with torch.no_grad():
            logps = [
                policy(batch).logps for k in range(PAIRS) for batch in policy.batches(groups, [k])
            ]
    finally:
        model.set_attn_implementation(implementation)
    ours = torch.stack(logps).flatten().double()
    assert ((ours - expected) / expected).abs().max() < 1e-5


@pytest.fixture(scope="module")
def trained(
    real_model: str, data: Data, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Trainer]:
    """Trainers after two steps of DPO with LoRA on four pairs, by layout."""
    folder = tmp_path_factory.mktemp("runs")
    few = folder / "few.jsonl"
    few.write_text("".join(Path(data.train).read_text().splitlines(keepends=True)[:4]))
    trainers = {}
    for layout in ("padded", "prefix_shared"):
        values: dict[str, Any] = {
            "model": {"path": real_model, "dtype": "float32"},
            "adapter": {"name": "lora", "r": 8, "alpha": 16},
            "data": {**data.model_dump(exclude_unset=True), "train": str(few)},
            "loss": "dpo",
            "optim": {"lr": 1e-4, "schedule": "constant"},
            "training": {
                **{"steps": 2, "batch_size": 2, "layout": layout, "log_every": 1},
                **{"activation_checkpointing": "off", "checkpoint_every": None, "device": "cpu"},
                "output_dir": str(folder / layout),
            },
        }
        trainers[layout] = Trainer(parse(values), Display(Console(quiet=True)))
        trainers[layout].loop([])
    return trainers


def test_two_steps_are_the_same_in_every_layout(trained: dict[str, Trainer]) -> None:
    folders = (Path(trainer.config.training.output_dir) for trainer in trained.values())
    first, second = (metrics.read_records(folder / "metrics.jsonl") for folder in folders)
    assert [line["rewards/margins"] for line in (first[0], second[0])] == [0, 0]
    assert first[1]["rewards/margins"] != 0
    for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected", "rewards/margins"):
        ours, theirs = ([line[name] for line in lines] for lines in (first, second))
        # A unit in the last place of a log-prob of 200 nats is 1.5e-5.
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4), name


def test_the_exported_model_loads_in_transformers_and_answers(
    trained: dict[str, Trainer], tokenizer: Any, sequences: list[tuple[list[int], list[int]]]
) -> None:
    trainer = trained["padded"]
    folder = trainer.export()
    exported: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    policy = trainer.policy
    with torch.no_grad():
        (batch,) = policy.batches(trainer.run.train.groups, [0])
        ours = policy(batch).logps.double()
    theirs = torch.stack([summed_logps(exported, *sequence) for sequence in sequences[:2]])
    assert ((ours - theirs) / theirs).abs().max() < 1e-5
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.chat_template == tokenizer.chat_template
    prompt = loaded.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = exported.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in loaded.decode(answer[0, prompt["input_ids"].shape[1] :])
