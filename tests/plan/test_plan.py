"""Predictions of `fastpref plan` against counts by hand and against training itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fastpref import config as configs
from fastpref.config import Config, ConfigError, Parallel
from fastpref.data.collate import collate
from fastpref.data.dataset import TokenGroup, load_groups
from fastpref.data.readers import DataError
from fastpref.data.tokenizers import load_tokenizer
from fastpref.model.policy import Policy
from fastpref.model.recomputation import recomputed
from fastpref.plan import head as heads
from fastpref.plan.activation_trace import Line, Trace, trace
from fastpref.plan.command import run
from fastpref.plan.devices import GPUS, Device, find_device
from fastpref.plan.head import Head
from fastpref.plan.memory import Memory
from fastpref.plan.model_shapes import NF4_BYTES, empty_policy, shapes_of
from fastpref.plan.predict import Predictor, Setup, shard_size
from fastpref.plan.suggestions import fitting_changes
from fastpref.plan.workload import GroupLengths, Pass, Step, steps_of
from fastpref.utils.errors import ModelError, UserError
from tests.helpers.policies import policy_of

MakeConfig = Callable[..., Config]
D, V, LAYERS = 32, 384, 2  # of the tiny Llama
SMALL = Device("small", 1e12, 0.5, 1e11, 2**30 + 2**21)  # of which a run can use 2 MiB - 5 %


def empty(
    config: Config,
    vocabulary: int | None = None,
    sharded: bool = False,
    recomputed: bool = False,
) -> Policy:
    return empty_policy(
        config.model, vocabulary, sharded, adapter=config.adapter, recomputed=recomputed
    )


def policy_and_shapes(config: Config, sharded: bool = False, recomputed: bool = False) -> Any:
    policy = empty(config, None, sharded, recomputed)
    in_4bit = config.adapter is not None and config.adapter.quantize is not None
    return policy, shapes_of(policy, in_4bit)


@pytest.mark.parametrize("adapter", [None, {"name": "lora", "r": 4}])
def test_shapes_are_those_of_the_policy_that_trains(
    make_config: MakeConfig, adapter: dict[str, Any] | None
) -> None:
    config = make_config(adapter=adapter, model__dtype="bfloat16")
    _, shapes = policy_and_shapes(config)
    policy = policy_of(config, load_tokenizer(config.model), torch.device("cpu"))
    base = [p for name, p in policy.named_parameters() if "lora_" not in name]
    assert shapes.base == sum(p.numel() for p in base)
    assert shapes.base_bytes == sum(p.nbytes for p in base)
    assert shapes.trained == sum(p.numel() for p in policy.trainable_parameters().values())
    assert shapes.in_blocks == sum(
        p.numel() for n, p in policy.blocks().named_parameters() if "lora_" not in n
    )
    assert (shapes.width, shapes.vocabulary, shapes.blocks) == (D, V, LAYERS)
    assert shapes.attention_width == 32 and not shapes.tied


def test_a_base_in_4_bits_is_its_linear_layers(make_config: MakeConfig) -> None:
    config = make_config(adapter={"name": "lora", "quantize": "nf4"})
    _, shapes = policy_and_shapes(config)
    linear = LAYERS * (2 * D * D + 2 * D * 16 + 3 * D * 64)  # q, o; k, v of two heads of 8; mlp
    assert shapes.quantized == linear
    assert shapes.base_bytes == int(4 * (shapes.base - linear) + NF4_BYTES * linear)


def test_a_random_model_takes_the_vocabulary_of_its_tokenizer(make_config: MakeConfig) -> None:
    model = {"init": "random", "config": {"model_type": "llama", "hidden_size": 32}}
    model["config"] |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = make_config(model=model)
    assert shapes_of(empty(config, 500), in_4bit=False).vocabulary == 500


def test_a_model_that_is_not_there_is_one_line(make_config: MakeConfig) -> None:
    with pytest.raises(ModelError, match=r"^model: cannot load no/model"):
        empty(make_config(model__path="no/model"))


@pytest.mark.parametrize("checkpointing", ["off", "selective", "full", 1])
@pytest.mark.parametrize("adapter", [None, {"name": "lora", "r": 4}])
def test_trace_counts_what_autograd_saves(
    make_config: MakeConfig, checkpointing: Any, adapter: dict[str, Any] | None
) -> None:
    """The storages that the real trunk saves for its backward pass, each once."""
    config = make_config(
        adapter=adapter, training__activation_checkpointing=checkpointing, model__dtype="float32"
    )
    kept, again = (
        trace(policy_and_shapes(config, recomputed=r)[0], [10, 6, 8], "padded", one_kernel=True)
        for r in (False, True)
    )
    traced = kept.mixed(again, sum(recomputed(checkpointing, LAYERS)) / LAYERS)
    real = policy_of(config, load_tokenizer(config.model), torch.device("cpu"))
    model_storages = {p.untyped_storage().data_ptr() for p in [*real.parameters(), *real.buffers()]}
    for scale in (1, 2, 5):  # the last is beyond what was traced
        sizes = (np.zeros(scale * n, dtype=np.int32) for n in (10, 6, 8))
        prompt, *responses = sizes
        batch = collate([TokenGroup(0, 1, prompt, tuple(responses))], "pairwise", "padded")
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in model_storages:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            real.hidden_states(batch).sum()
        tokens = batch.input_ids.numel()
        extra = tokens * (2 * 4 * 8 + 8)  # cosines, sines and positions, which no graph holds
        extra += 4 * sum(p.numel() for p in real.adapter_parameters())  # the copies of adapters
        assert 0.99 * sum(saved.values()) <= traced.saved(tokens)
        assert traced.saved(tokens) <= 1.01 * sum(saved.values()) + extra


def test_trace_counts_the_products(make_config: MakeConfig) -> None:
    """2 FLOPs a weight and token forward, 4 backward; with adapters the base has no gradient."""
    policy, shapes = policy_and_shapes(make_config())
    full = trace(policy, [10, 6, 8], "padded", one_kernel=True)
    matrices = 2 * (shapes.in_blocks - LAYERS * 2 * D)  # without the norms
    assert full.forward_flops(100) == pytest.approx(100 * matrices)
    assert full.backward_flops(100) == pytest.approx(100 * 2 * matrices)
    policy, shapes = policy_and_shapes(make_config(adapter="lora"))
    lora = trace(policy, [10, 6, 8], "padded", one_kernel=True)
    assert lora.forward_flops(100) == pytest.approx(100 * (matrices + 2 * shapes.adapter))
    # The first block's input needs no gradient, neither from the base nor from lora_A; the
    # adapters' x A^T is computed again.
    assert 1.5 * matrices / 2 < lora.backward_flops(100) / 100 < matrices + 6 * shapes.adapter


def test_a_packed_row_on_cpu_keeps_keys_and_values_once(make_config: MakeConfig) -> None:
    """Attention by segments saves what one kernel does: a prompt's keys are not copied."""
    lines = {}
    for one_kernel in (True, False):
        policy, _ = policy_and_shapes(make_config())
        lines[one_kernel] = trace(policy, [20, 20, 20], "prefix_shared", one_kernel)
    assert lines[False].saved(120) == pytest.approx(lines[True].saved(120), rel=1e-3)


def lengths_of(prompts: list[int], responses: list[list[int]]) -> GroupLengths:
    flat = np.array([n for group in responses for n in group])
    offsets = np.array([0, *np.cumsum([len(group) for group in responses])])
    return GroupLengths("groupwise", np.array(prompts), flat, offsets)


def steps(config: Config, lengths: GroupLengths, one_by_one: bool = True) -> list[Step]:
    tokens = config.training.micro_batch_tokens
    tokens = 16384 if tokens == "auto" else tokens
    layout = Setup(config, lengths, 1).layout
    return steps_of(config.training, tokens, layout, lengths, 1, one_by_one)


@pytest.mark.parametrize("layout", ["prefix_shared", "packed", "padded"])
def test_passes_against_counting(make_config: MakeConfig, layout: str) -> None:
    prompts, responses = [3, 5, 2], [[2, 4], [1, 1, 3], [6]]
    code = "flash_attention_2" if layout == "packed" else "sdpa"
    config = make_config(
        loss="info_nca",
        training__layout=layout,
        model__attn_implementation=code,
        training__batch_size=3,
    )
    lengths = lengths_of(prompts, responses)
    [[batch]] = steps(config, lengths)
    expected = []
    for prompt, counts in zip(prompts, responses, strict=True):
        rows = [prompt + n for n in counts]
        if layout == "padded":
            rows = [max(rows)] * len(counts)
        tokens = prompt + sum(counts) if layout == "prefix_shared" else sum(rows)
        attended = sum(sum(range(1, n + 1)) for n in rows)
        if layout == "prefix_shared":
            attended -= (len(counts) - 1) * sum(range(1, prompt + 1))
        expected.append(Pass(tokens, sum(counts), attended, batch_passes=3))
    assert sorted(batch) == sorted(expected)
    [[together]] = steps(config, lengths, one_by_one=False)
    assert len(together) == 1 and together[0].scored == 17


def test_steps_are_those_of_training(make_config: MakeConfig) -> None:
    config = make_config(training__micro_batch_tokens=200)
    groups = load_groups(config.data.train, load_tokenizer(config.model), config.data)
    lengths = GroupLengths.of(groups)
    plan = steps(config, lengths)
    assert len(plan) == 3
    scored = sum(p.scored for step in plan for batch in step for p in batch)
    assert scored == groups.response_lengths.sum()
    with pytest.raises(DataError, match=r"training\.micro_batch_tokens: 10 cannot hold"):
        steps(make_config(training__micro_batch_tokens=10), lengths)


def test_cut_lengths_are_those_of_shorter_data(make_config: MakeConfig) -> None:
    config = make_config()
    tokenizer = load_tokenizer(config.model)
    whole = GroupLengths.of(load_groups(config.data.train, tokenizer, config.data))
    short = make_config(data__max_length=24)
    expected = GroupLengths.of(load_groups(short.data.train, tokenizer, short.data))
    cut = whole.truncate(24)
    for name in ("prompt_lengths", "response_lengths", "offsets"):
        assert np.array_equal(getattr(cut, name), getattr(expected, name))


NO_TRACE = Trace(*[Line(0.0, 0.0)] * 5)


def memory_of(config: Config, shard: int = 1, on_cpu: bool = False, traced: Any = NO_TRACE) -> Any:
    _, shapes = policy_and_shapes(config, sharded=shard > 1)
    head = Head(
        shapes,
        on_cpu,
        sharded=shard > 1,
        log_every=config.training.log_every,
        pair_scores=False,
        score_rows=0,
        runs_reference=config.reference_mode == "frozen",
        full_kl=False,
    )
    return Memory(
        shapes,
        traced,
        head,
        config.optim,
        config.parallel,
        config.reference_mode,
        dpo_pg=False,
        checkpoints=True,
        shard=shard,
        on_cpu=on_cpu,
        recomputed=0,
    )


def test_optimizer_and_gradients_are_those_of_training(make_config: MakeConfig) -> None:
    from fastpref.training.optim import make_optimizer

    for optim, options in (
        ({"name": "adamw"}, {}),
        ({"name": "rmsprop"}, {}),
        ({"name": "sgd"}, {}),
        ({"name": "sgd", "momentum": 0.9}, {}),
        ({"name": "adamw"}, {"adapter": "lora"}),
    ):
        config = make_config(optim=optim, **options)
        policy = policy_of(config, load_tokenizer(config.model), torch.device("cpu"))
        trained = list(policy.trainable_parameters().values())
        optimizer = make_optimizer(config.optim, trained)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        state_bytes = sum(
            value.nbytes
            for state in optimizer.state.values()
            for value in state.values()
            if value.dim()
        )
        memory = memory_of(config)
        assert memory.optimizer == state_bytes
        assert memory.gradients == sum(p.nbytes for p in trained)


def test_copies_of_all_weights_during_the_update(make_config: MakeConfig) -> None:
    """As torch's foreach optimizers make them on CUDA, and its loops on CPU do not."""
    copies = {}
    for name, decay in (("adamw", 0.1), ("rmsprop", 0), ("rmsprop", 0.1), ("sgd", 0), ("sgd", 0.1)):
        memory = memory_of(make_config(optim={"name": name, "weight_decay": decay}))
        copies[name, decay] = memory._update_copy // memory.trained_bytes
        assert replace(memory, on_cpu=True)._update_copy == 0
    assert [*copies.values()] == [0, 1, 2, 0, 1]


def test_shards_of_a_model(make_config: MakeConfig) -> None:
    config = make_config(model__dtype="bfloat16")
    whole, cut = memory_of(config), memory_of(config, shard=4)
    shapes = whole.shapes
    assert whole.weights == 4 * shapes.base
    # Both of two blocks are gathered at once: all weights in bf16, and a quarter in fp32.
    assert cut.weights == shapes.base + 2 * shapes.base
    assert cut.gradients * 4 == whole.gradients and cut.optimizer * 4 == whole.optimizer
    offloaded = memory_of(
        make_config(model__dtype="bfloat16", parallel={"cpu_offload": True}), shard=4
    )
    assert offloaded.weights == 2 * shapes.base
    assert offloaded.optimizer == offloaded.gradients == 0


def test_moments_of_a_step(make_config: MakeConfig) -> None:
    """Sums by hand for a trunk that keeps 100 bytes a token and takes 7 more at a time."""
    traced = replace(NO_TRACE, saved=Line(0, 100), backward=Line(0, 7), forward=Line(0, 3))
    memory = memory_of(make_config(), on_cpu=True, traced=traced)
    n, head = 4 * memory.shapes.base, 4 * D * V
    batch = (Pass(50, 20, 0, batch_passes=2), Pass(30, 10, 0, batch_passes=2))
    moments = memory.moments(batch, accumulates=True)
    assert {m.weights for m in moments.values()} == {n}
    assert {m.optimizer for m in moments.values()} == {2 * n}
    saved = [t * (2 * D + V) * 4 for t in (20, 10)]  # hidden states, dlogp_dhidden, dlogits
    forward = moments["head"]
    assert (forward.activations, forward.gradients) == (8000, n)
    assert forward.head == sum(saved) + (30 + 10) * D * 4 + 10 * V * 4
    assert moments["forward"].activations == 8090
    assert moments["backward"].activations == 8210
    assert moments["backward"].head == saved[0]
    assert moments["next pass"].gradients == 2 * n and moments["next pass"].activations == 5000
    assert moments["end"].gradients == 2 * n + head
    alone = memory.moments((Pass(50, 20, 0),), accumulates=False)
    assert alone["head"].gradients == 0 and alone["backward"].gradients == head
    assert alone["end"].gradients == alone["update"].gradients == n


def test_a_frozen_reference_is_a_second_model(make_config: MakeConfig) -> None:
    batch = (Pass(50, 20, 0),)
    cached, frozen = (
        memory_of(make_config(reference=mode)).moments(batch, False)["head"]
        for mode in ("cached", "frozen")
    )
    assert cached.reference == 0
    assert frozen.reference == frozen.weights + 20 * D * 4


def test_dlogits_are_cached_within_the_budgets_of_the_kernels(make_config: MakeConfig) -> None:
    kernels = pytest.importorskip("fastpref_kernels.linear_logps")
    assert heads.TRITON_CACHE_BYTES == kernels.CACHE_BYTES
    kl = pytest.importorskip("fastpref_kernels.linear_kl")
    assert heads.TRITON_KL_CHUNK_BYTES == kl.KL_CHUNK_BYTES
    head = memory_of(make_config()).head
    assert head.passes(Pass(1, 1000, 0)) == 3 + 1
    assert head.passes(Pass(1, 2**31 // (4 * V) + 1, 0)) == 4 + 1
    assert memory_of(make_config(adapter="lora")).head.passes(Pass(1, 1000, 0)) == 2 + 1


def test_ranks_that_share_a_copy() -> None:
    assert shard_size(Parallel(), False, 8) == 8
    assert shard_size(Parallel(replicate=2), False, 8) == 4
    assert shard_size(Parallel(shard=1), False, 8) == 1
    assert shard_size(Parallel(), in_4bit=True, ranks=8) == 1
    with pytest.raises(ConfigError, match="parallel: replicate 3 · shard 2 needs 6 ranks"):
        shard_size(Parallel(replicate=3, shard=2), False, 8)


def test_devices() -> None:
    assert find_device("h100", torch.bfloat16) is GPUS["h100"]
    here = find_device("cpu", torch.float32)
    assert here.is_cpu and here.flops > 1e8 and here.bandwidth > 1e8 and here.memory > 2**30
    with pytest.raises(UserError, match=r"--device: must be one of cpu, h100, .*, got abacus"):
        find_device("abacus", torch.bfloat16)


def test_changes_that_fit_come_in_the_order_of_their_cost(make_config: MakeConfig) -> None:
    config = make_config(
        optim={"name": "adamw"},
        training__activation_checkpointing="off",
        training__micro_batch_tokens=16384,
        reference="frozen",
    )
    groups = GroupLengths.uniform("pairwise", 8, 20, [40, 40])
    predict = Predictor(SMALL, None)
    setup = Setup(config, groups, 1)
    assert not predict(setup).fits
    solutions = fitting_changes(predict, setup)
    assert 0 < len(solutions) <= 3
    costs = [p.cost for _, p in solutions]
    assert costs == sorted(costs)
    for changed, p in solutions:
        assert p.fits and changed.changes
        assert predict(changed).parts == p.parts


@pytest.fixture
def config_file(make_config: MakeConfig, tmp_path: Path) -> str:
    path = tmp_path / "plan.yaml"
    path.write_text(make_config().to_yaml())
    return str(path)


def test_the_command_fits(fastpref: Any, config_file: str, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    done = fastpref("plan", config_file, "--device", "4090", "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert "fits: 0.0 GiB of the 21.8 GiB of 4090 that a run can use" in done.stdout
    record = json.loads(out.read_text())
    assert record["fits"] and record["changes"] == [] and record["steps"] == 3
    assert record["total_bytes"] == sum(record["parts"].values())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "error: --device: must be one of cpu, h100"),
        (["--lengths", "5"], "error: --lengths: must be tokens of the prompt and"),
        (["data.train=some/hub-name"], "is not a file here; give --lengths PROMPT,RESPONSE"),
        (
            ["parallel.shard=3", "--ranks", "4"],
            "error: parallel: replicate 1 · shard 3 needs 3 ranks",
        ),
    ],
)
def test_errors_are_one_line(
    fastpref: Any, config_file: str, arguments: list[str], message: str
) -> None:
    done = fastpref("plan", config_file, *arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1


LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def test_an_8b_model_needs_no_data_and_no_weights(tmp_path: Path) -> None:
    """All weights in fp32 with gradients and two moments: 16 bytes each, of 8.03e9."""
    config = configs.parse(
        {
            "model": {"init": "random", "config": LLAMA_8B},
            "data": {"train": "nowhere.jsonl"},
            "loss": "dpo",
        }
    )
    console = Console(width=120, record=True, quiet=False, file=(tmp_path / "shown").open("w"))
    assert not run(config, console, "a100-80gb", 1, "200,300", tmp_path / "plan.json")
    record = json.loads((tmp_path / "plan.json").read_text())
    parts = record["parts"]
    assert parts["weights"] == 4 * 8_030_261_248 and parts["optimizer"] == 8 * 8_030_261_248
    assert record["total_bytes"] >= 16 * 8_030_261_248
    shown = console.export_text()
    assert "does not fit" in shown
    assert 0 < len(record["changes"]) <= 3
    for change in record["changes"]:
        assert change["fits"] and " ".join(change["changes"]) in shown
