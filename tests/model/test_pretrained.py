"""Two ranks load and export what transformers loads on one, whatever config.json says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fastpref import config as configs
from fastpref import distributed
from fastpref.config import Config
from fastpref.model import fsdp
from fastpref.model.export import export
from fastpref.model.policy import Policy
from fastpref.utils.errors import ModelError
from fastpref.utils.progress import Display
from tests.helpers import odd_checkpoints, rank_processes
from tests.helpers.adapted import close, logps_of, plain_logps, some_batch, trained
from tests.helpers.odd_checkpoints import EMBEDDING, HEAD, edit, tensors
from tests.helpers.policies import policy_of

NAMES = (
    "equal head",
    "experts",
    "newer prefixes",
    "older prefixes",
    "only head",
    "other head name",
    "own head",
    "qwen experts",
)
LORA = {"name": "lora", "r": 2}
EXPERTS = ["experts.down_proj", "experts.gate_up_proj"]
ADAPTED = {"own head": LORA, "experts": {**LORA, "target_parameters": EXPERTS}}


def config_of(path: Path, **more: Any) -> Config:
    return configs.parse(
        {
            "model": {"path": str(path), "dtype": "float32"},
            "data": {"train": "unused.jsonl"},
            "loss": "dpo",
            "training": {"device": "cpu", "activation_checkpointing": "off"},
            **more,
        }
    )


def load(path: Path, **more: Any) -> Policy:
    return policy_of(config_of(path, **more), AutoTokenizer.from_pretrained(path))


def loaded(policy: Policy) -> dict[str, Tensor]:
    """Full weights and buffers by name, a collective."""
    named = fsdp.base_weights(policy) | dict(policy.base.named_buffers())
    return {name: fsdp.full_tensor(value).clone() for name, value in named.items()}


def work(rank: int, port: int, home: Path) -> None:
    """On two ranks: load, change the trained weights, and export; for adapters and all weights."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    with distributed.process_group():
        for name in NAMES:
            policy = load(home / "models" / name)
            assert policy.sharded
            values = loaded(policy)
            if rank == 0:
                torch.save(values, home / f"{name}.pt")
            change(policy, 1.25)
            export(policy, AutoTokenizer.from_pretrained(home / "models" / name), home / name, True)
        for name, adapter in ADAPTED.items():
            policy = load(home / "models" / name, adapter=adapter)
            change(policy, 1.0, 0.01)
            tokenizer = AutoTokenizer.from_pretrained(home / "models" / name)
            export(policy, tokenizer, home / f"{name} adapted", True)
        with pytest.raises(ModelError) as caught:
            load(home / "damaged")
        (home / f"refusal-{rank}").write_text(str(caught.value))


def change(policy: Policy, factor: float, shift: float = 0.0) -> None:
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.mul_(factor).add_(shift)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Path:
    """Checkpoints in `models`, what two ranks loaded of each, and what they exported."""
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "models").mkdir()
    assert odd_checkpoints.make_all(folder / "models", tiny_llama) == list(NAMES)
    odd_checkpoints.save(folder / "damaged", "llama", tiny_llama)
    edit(folder / "damaged", lambda named: {n: w for n, w in named.items() if n != HEAD})
    rank_processes.start(work, 2, folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_load_what_transformers_loads(home: Path, name: str) -> None:
    source: Any = AutoModelForCausalLM.from_pretrained(home / "models" / name)
    expected = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    actual = torch.load(home / f"{name}.pt")
    assert actual.keys() == expected.keys()  # of tied weights only the first name
    assert all(torch.equal(actual[key], value) for key, value in expected.items())
    one = loaded(load(home / "models" / name))
    assert one.keys() == expected.keys()
    assert all(torch.equal(one[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", NAMES)
def test_an_export_has_the_names_of_the_files_and_the_trained_weights(
    home: Path, name: str
) -> None:
    source: Any = AutoModelForCausalLM.from_pretrained(home / "models" / name)
    exported: Any = AutoModelForCausalLM.from_pretrained(home / name)
    trained_values = dict(exported.named_parameters())
    assert trained_values.keys() == dict(source.named_parameters()).keys()
    for key, value in source.named_parameters():
        assert torch.equal(trained_values[key], value * 1.25), key
    if name not in ("equal head", "only head"):
        assert tensors(home / name).keys() == tensors(home / "models" / name).keys()
    described = json.loads((home / name / "config.json").read_text())
    is_tied = described["tie_word_embeddings"]
    assert is_tied == (name in ("equal head", "only head", "newer prefixes", "older prefixes"))
    processor = {"preprocessor_config.json", "processor_config.json"}
    assert processor.issubset(os.listdir(home / name)) == (name == "older prefixes")


@pytest.mark.parametrize("name", ADAPTED)
def test_two_ranks_merge_what_one_merges(home: Path, name: str, tmp_path: Path) -> None:
    policy = load(home / "models" / name, adapter=ADAPTED[name])
    change(policy, 1.0, 0.01)
    export(policy, AutoTokenizer.from_pretrained(home / "models" / name), tmp_path, True)
    one, two = tensors(tmp_path), tensors(home / f"{name} adapted")
    assert one.keys() == two.keys() == tensors(home / "models" / name).keys()
    source = tensors(home / "models" / name)
    assert sum(not torch.equal(one[key], source[key]) for key in one) >= 8
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-6)


def test_all_ranks_refuse_what_rank_0_cannot_read(home: Path) -> None:
    messages = [(home / f"refusal-{rank}").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert messages[0] == (
        f"model.path: {home / 'damaged'} has no weights named lm_head.weight (of 1 that are "
        "missing); are its files complete, and of this config.json?"
    )


@pytest.mark.parametrize("adapter", [None, {"name": "lora", "r": 4}], ids=["all weights", "lora"])
def test_a_separate_head_is_trained_and_exported(
    home: Path,
    make_config: Callable[..., Config],
    display: Display,
    tokenizer: PreTrainedTokenizerFast,
    adapter: Any,
) -> None:
    model = {"path": str(home / "models" / "own head"), "dtype": "float32"}
    options = {"training__steps": 2, "optim__lr": 1e-2}
    config = make_config(model=model, adapter=adapter, **options)
    trainer, batch = trained(config, display), some_batch(config, tokenizer)
    ours = logps_of(trainer.policy.eval(), batch)
    folder = trainer.export()
    files = tensors(folder)
    assert not torch.equal(files[HEAD], files[EMBEDDING])
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    close(plain_logps(AutoModelForCausalLM.from_pretrained(folder), batch), ours)


def test_weights_that_stay_in_fp32_are_exported_in_fp32(tmp_path: Path, tiny_llama: str) -> None:
    """The correction of a router, of which bfloat16 would choose other experts."""
    options = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    options |= {"moe_intermediate_size": 8, "first_k_dense_replace": 1, "q_lora_rank": 8}
    options |= {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    source = odd_checkpoints.save(tmp_path / "source", "deepseek_v3", tiny_llama, **options)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    correction = torch.tensor([0.1234567, 0.2, 0.3, 0.4])
    edit(source, lambda named: {**named, name: correction})
    policy = load(source, model={"path": str(source), "dtype": "bfloat16"})
    export(policy, AutoTokenizer.from_pretrained(source), tmp_path / "export", True)
    exported = tensors(tmp_path / "export")
    assert torch.equal(exported.pop(name), correction)
    assert {value.dtype for value in exported.values()} == {torch.bfloat16}
