"""Models, tokenizers and adapters that are damaged, incomplete, unknown or of another kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.bad_input.command import Case, Make
from tests.helpers.data import LLAMA, rows

PAIRS = rows(4)
CHAT = [
    {
        "prompt": [{"role": "user", "content": "Q?"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
]
TRAIN = ("train", "c.yaml")
WEIGHTS = "model.safetensors"


def _copied(change: Callable[[Path], Any]) -> Make:
    """A copy of the tiny Llama in the folder `m`, with a change."""

    def make(folder: Path) -> None:
        shutil.copytree(folder / "llama", folder / "m")
        change(folder / "m")

    return make


def _edited(name: str, **values: Any) -> Callable[[Path], Any]:
    """A JSON file with other values; `...` takes one away."""

    def change(model: Path) -> None:
        found = {**json.loads((model / name).read_text()), **values}
        kept = {key: value for key, value in found.items() if value is not ...}
        (model / name).write_text(json.dumps(kept))

    return change


def _tie(model: Path) -> None:
    """Make a model's embeddings its head, in its config and its files."""
    _edited("config.json", tie_word_embeddings=True)(model)
    weights = load_file(model / WEIGHTS)
    del weights["lm_head.weight"]
    save_file(weights, model / WEIGHTS, {"format": "pt"})


def _written(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda model: (model / name).write_bytes(content)


def _gone(name: str) -> Callable[[Path], Any]:
    return lambda model: (model / name).unlink()


def _weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def edit(model: Path) -> None:
        held = load_file(model / WEIGHTS)
        change(held)
        save_file(held, model / WEIGHTS, metadata={"format": "pt"})

    return edit


def _in_shards(model: Path) -> None:
    """Two files of weights, of which the second is missing."""
    names = list(load_file(model / WEIGHTS))
    (model / WEIGHTS).rename(model / "model-00001-of-00002.safetensors")
    where = {name: f"model-0000{1 + (k > 4)}-of-00002.safetensors" for k, name in enumerate(names)}
    index = {"metadata": {}, "weight_map": where}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _broken(name: str, says: str, change: Callable[[Path], Any], **config: Any) -> Case:
    config = {"model": {"path": "m"}, **config}
    return Case(f"model: {name}", says, config, PAIRS, make=_copied(change), arguments=TRAIN)


def _random(says: str, tokenizer: str | None = "llama", **values: Any) -> Case:
    config = {key: value for key, value in {**LLAMA, **values}.items() if value is not ...}
    made = {"init": "random", "path": None, "tokenizer": tokenizer, "config": config}
    if tokenizer is None:
        made.pop("tokenizer")
    name = f"model.config: {', '.join(f'{k} {v}' for k, v in values.items())}"[:60]
    return Case(name, says, {"model": made}, PAIRS, arguments=TRAIN)


def _config(name: str, says: str | None, data: Any = PAIRS, /, **config: Any) -> Case:
    arguments = TRAIN if says else ("precompute", "c.yaml")
    return Case(name, says, config, data, arguments=arguments)


def _template(name: str, says: str, template: str | None) -> Case:
    file = "chat_template.jinja"
    change = _gone(file) if template is None else _written(file, template.encode())
    return Case(
        f"chat template: {name}", says, {"model": {"path": "m"}}, CHAT, make=_copied(change),
        arguments=TRAIN,
    )  # fmt: skip


_CANNOT = "model.path: cannot load m: *"
_LOST = "model.path: m has no weights named * (of * that are missing); are its files complete, *"
FILES = [
    _broken("no config.json", "model*: cannot load m: *", _gone("config.json")),
    _broken("empty config.json", "model*: cannot load m: *", _written("config.json", b"")),
    _broken("broken config.json", "model*: cannot load m: *", _written("config.json", b"{oops")),
    _broken("config.json a list", "model*: cannot load m: *", _written("config.json", b"[1]")),
    _broken("config.json of bytes", "model*: cannot load m: *", _written("config.json", b"\xff")),
    _broken("unknown architecture", "model*: cannot load m: *",
            _edited("config.json", model_type="hal9000")),
    _broken("no architecture", "model*: cannot load m: *",
            _edited("config.json", model_type=..., architectures=...)),
    _broken("an encoder and a decoder", "model*: cannot load m: *",
            _edited("config.json", model_type="t5", architectures=["T5ForConditionalGeneration"])),
    _broken("no weights", "model: cannot load m: *", _gone(WEIGHTS)),
    _broken("no bytes of weights", "model: cannot load m: *", _written(WEIGHTS, b"")),
    _broken("text for weights", "model: cannot load m: *", _written(WEIGHTS, b"version lfs " * 9)),
    _broken("cut weights", "model: cannot load m: *",
            lambda m: (m / WEIGHTS).write_bytes((m / WEIGHTS).read_bytes()[:-5000])),
    _broken("a missing shard", "model: cannot load m: *", _in_shards),
    _broken("a missing tensor", _LOST, _weights(lambda w: w.pop("model.norm.weight"))),
    _broken("a missing layer", _LOST,
            _weights(lambda w: [w.pop(n) for n in list(w) if "layers.1" in n])),
    _broken("other names", _LOST,
            _weights(lambda w: [w.update({"x." + n: w.pop(n)}) for n in list(w)])),
    _broken("more layers in its config", _LOST, _edited("config.json", num_hidden_layers=3)),
    _broken("another width", "model: cannot load m: *", _edited("config.json", hidden_size=64)),
    _broken("no width", "model*: cannot load *", _edited("config.json", hidden_size=0)),
    _broken("text for a width", "model*: cannot load *", _edited("config.json", hidden_size="32")),
    _broken("NaN among weights", "model: the log-probs of LlamaForCausalLM are not finite; *",
            _weights(lambda w: w["lm_head.weight"].fill_(float("nan")))),
    _broken("infinity among weights", "model: the log-probs of LlamaForCausalLM are not *",
            _weights(lambda w: w["model.norm.weight"].fill_(float("inf")))),
    _broken("quantized", "model.path: m is quantized (gptq), which is not supported; *",
            _edited("config.json", quantization_config={"quant_method": "gptq", "bits": 4})),
    _broken("nf4, all weights trained",
            "model.path: m is quantized, and only an adapter can be trained on it; set *",
            _edited("config.json", quantization_config={
                "quant_method": "bitsandbytes", "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4"})),
    _broken("fewer rows than tokens", "model: the tokenizer has * tokens but the embedding only *",
            lambda m: (_edited("config.json", vocab_size=300)(m), _weights(lambda w: w.update(
                {n: w[n][:300].clone() for n in w if w[n].shape[0] == 384}))(m))),
    _config("model: a folder that is not there", "model.path: cannot load nowhere: *",
            model={"path": "nowhere"}),
    _config("model: a Hub name", "model.path: cannot load nobody/nothing: *",
            model={"path": "nobody/nothing"}),
    _config("model: a file", "model.path: cannot load pairs.jsonl: *",
            model={"path": "pairs.jsonl"}),
    _config("model: an empty folder", "model.path: cannot load /proc/self/task: *",
            model={"path": "/proc/self/task"}),
]  # fmt: skip

TOKENIZERS = [
    _config("tokenizer: not there", "model.tokenizer: cannot load nowhere: *",
            model={"tokenizer": "nowhere"}),
    _broken("no tokenizer.json", "model.path: cannot load m: *", _gone("tokenizer.json")),
    _broken("empty tokenizer.json", _CANNOT, _written("tokenizer.json", b"")),
    _broken("broken tokenizer.json", _CANNOT, _written("tokenizer.json", b"{oops")),
    _broken("tokenizer.json without a model", _CANNOT, _written("tokenizer.json", b"{}")),
    _broken("broken tokenizer_config.json", _CANNOT, _written("tokenizer_config.json", b"{oops")),
    _template("none", "pairs.jsonl, row 1: chat template failed: the data is *", None),
    _template("raises", "pairs.jsonl, row 1: chat template failed: roles must alternate; *",
              "{{ raise_exception('roles must alternate') }}"),
    _template("a syntax error", "pairs.jsonl, row 1: chat template failed: *", "{% for %}"),
    _template("an unknown function", "pairs.jsonl, row 1: chat template failed: *", "{{ f() }}"),
    _template("a long loop", "pairs.jsonl, row 1: chat template failed: *",
              "{% for i in range(10 ** 9) %}{% endfor %}"),
    _template("reaches for Python", "pairs.jsonl, row 1: chat template failed: *",
              "{{ messages.__class__.__mro__[1].__subclasses__() }}"),
    Case("tokenizer: no EOS, BOS or padding", None,
         {"model": {"path": "m"}}, PAIRS, arguments=("precompute", "c.yaml"),
         make=_copied(_edited("tokenizer_config.json", eos_token=..., bos_token=...,
                              pad_token=...))),
    Case("tokenizer: no EOS, and an empty prompt in every row",
         "pairs.jsonl: no pair is left to train on (*)*", {"model": {"path": "m"}},
         [{"prompt": "", "chosen": "a", "rejected": "b"}], arguments=TRAIN,
         make=_copied(_edited("tokenizer_config.json", eos_token=..., bos_token=...,
                              pad_token=...))),
]  # fmt: skip

_PHI = {"model_type": "phi", "num_key_value_heads": 4}
RANDOM = [
    _random("model.config.hiden_size: unknown key for llama; did you mean hidden_size?",
            hiden_size=3),
    _random("model: cannot load *", model_type="hal9000"),
    _random("model: cannot load *", model_type=3),
    _random("model: cannot load *", model_type=["llama"]),
    _random("model.config.hidden_size: unknown key for t5; *", model_type="t5"),
    _random("model: cannot load *", hidden_size=-1),
    _random("model: cannot load *", hidden_size=0),
    _random("model: cannot load *", hidden_size="many"),
    _random("model: cannot load *", hidden_size=None),
    _random("model: cannot load *", num_attention_heads=0),
    _random("model*: cannot load *", num_attention_heads=5),
    _random("model*: cannot load *", num_key_value_heads=3),
    _random("model: cannot load *", hidden_act="nope"),
    _random("model: cannot load *", vocab_size=10**15),
    _random("model: the tokenizer has * tokens but the embedding only 100 rows; *", vocab_size=100),
    _random("model.config.vocab_size: must be >= 261, got 100", None, vocab_size=100),
    _random("model.config.vocab_size: must be >= 261, got -1", None, vocab_size=-1),
    _random("model.config.vocab_size: is needed to train a tokenizer on the data *", None,
            vocab_size="300"),
    _random("model: BertLMHeadModel computes its logits in a way that *", model_type="bert",
            num_key_value_heads=..., is_decoder=True),
]  # fmt: skip

LORA: dict[str, Any] = {"name": "lora", "r": 2}


def _put(name: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("precious")

    return make


def _adapter(path: Path, **values: Any) -> None:
    path.mkdir()
    about = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (path / "adapter_config.json").write_text(json.dumps({**about, **values}))
    save_file({"a": torch.zeros(1)}, path / "adapter_model.safetensors")


def _loaded(name: str, says: str, **values: Any) -> Case:
    return Case(f"adapter.path: {name}", says, {"adapter": {"path": "a"}}, PAIRS, arguments=TRAIN,
                make=lambda folder: _adapter(folder / "a", **values))  # fmt: skip


ADAPTERS = [
    _config("adapter: no such layer", "adapter.target_modules: cannot load *",
            adapter={**LORA, "target_modules": ["nope"]}),
    _config("adapter: on the head",
            "adapter.target_modules: the head of LlamaForCausalLM must be *",
            adapter={**LORA, "target_modules": ["lm_head"]}),
    _config("adapter: on a norm", "adapter.target_modules: cannot load *",
            adapter={**LORA, "target_modules": ["norm"]}),
    _config("adapter: not there", "adapter.path: cannot load nowhere: *",
            adapter={"path": "nowhere"}),
    _config("adapter: a model", "adapter.path: cannot load llama: *", adapter={"path": "llama"}),
    _loaded("other weights", "adapter.path: a does not fit the model*"),
    _loaded("another kind", "adapter.path: a is of type IA3, and only LORA can be trained; *",
            peft_type="IA3", feedforward_modules=[]),
    _loaded("an unknown kind", "adapter.path: cannot load a: *", peft_type="NOPE"),
    _loaded("saved modules", "adapter.path: a also changes weights of the base model (*",
            modules_to_save=["lm_head"]),
    _loaded("biases", "adapter.path: a also changes weights of the base model (bias: all); *",
            bias="all"),
    _loaded("layers of another model", "adapter.path: cannot load a: *", target_modules=["nope"]),
    Case("adapter: on tied embeddings",
         "adapter.target_modules: the embeddings of LlamaForCausalLM are also its head, *",
         {"model": {"path": "m"}, "adapter": {**LORA, "target_modules": ["embed_tokens"]}}, PAIRS,
         make=_copied(_tie), arguments=TRAIN),
]  # fmt: skip

_BIASED = {
    "init": "random", "path": None, "tokenizer": "llama", "config": {**LLAMA, **_PHI},
}  # fmt: skip
TOGETHER = [
    _config("a run: too few tokens",
            "training.micro_batch_tokens: 10 cannot hold the longest pair (*",
            training={"micro_batch_tokens": 10}),
    _config("a run: beyond the context", "data.max_length: the longest response ends at *",
            [{"prompt": "a", "chosen": "tea " * 500, "rejected": "b"}],
            data={"max_length": 1000}),
    _config("a run: flat rows", "training.layout: packed needs model.attn_implementation: *",
            training={"layout": "packed"}),
    _config("a run: more ranks than there are", "parallel: replicate 1 · shard 2 needs 2 ranks, *",
            parallel={"shard": 2}),
    _config("a run: more copies than ranks", "parallel: replicate 3 · shard 1 needs 3 ranks, *",
            parallel={"replicate": 3}),
    _config("a run: paged", "optim.name: paged_adamw_8bit pages the memory of a GPU, and *",
            optim={"name": "paged_adamw_8bit"}),
    _config("a run: liger on CPU", "model.kernels: liger runs on CUDA, and this is cpu; *",
            model={"kernels": "liger"}),
    _config("a run: flash on CPU", "*", model={"attn_implementation": "flash_attention_2"}),
    _config("a run: nf4 in fp64", "adapter.quantize: nf4 computes in bfloat16 or float32; *",
            adapter={**LORA, "quantize": "nf4"}, model={"dtype": "float64"}),
    _config("a run: calibrated, a head with a bias",
            "calibration.scope: the head of PhiForCausalLM has a bias, whose scores are not *",
            model=_BIASED, calibration={"name": "rc", "scope": "head"}),
    _config("a run: the band, a head with a bias",
            "monitor.band_every: the head of PhiForCausalLM has a bias, whose scores are not *",
            model=_BIASED, monitor={"band_every": 1}),
    _config("a run: a divergence, a head with a bias",
            "loss: tdpo1 measures a KL divergence, which is not implemented for heads with a *",
            model=_BIASED, loss="tdpo1"),
    _config("a run: reference log-probs of some rows",
            "pairs.jsonl: ref_chosen_logps and ref_rejected_logps cannot be used, 3 rows *",
            [{**PAIRS[0], "ref_chosen_logps": -1, "ref_rejected_logps": -1}, *PAIRS[1:]]),
    _config("a run: reference log-probs of rows that are cut",
            "pairs.jsonl: ref_chosen_logps and ref_rejected_logps cannot be used, some rows are *",
            [{"prompt": "a", "chosen": "tea " * 99, "rejected": "b", "ref_chosen_logps": -1,
              "ref_rejected_logps": -1}]),
    _config("a run: a checkpoint that is not there",
            "resume: elsewhere is not a checkpoint folder*", resume="elsewhere"),
    Case("a run: onto another", "training.output_dir: run already holds a run; continue it with *",
         {}, PAIRS, arguments=TRAIN, make=_put("run/metrics.jsonl")),
    Case("a run: its folder is a file",
         "training.output_dir: out: Not a directory; choose another folder",
         {"training": {"output_dir": "out"}}, PAIRS, arguments=TRAIN,
         make=_put("out")),
    Case("a run: its folder lies in a file", "training.output_dir: out*: Not a directory*",
         {"training": {"output_dir": "out/run"}}, PAIRS, arguments=TRAIN,
         make=_put("out")),
    Case("a run: the cache is a file", "data.cache: c: Not a directory; choose another folder",
         {"data": {"cache": "c"}}, PAIRS, arguments=TRAIN,
         make=_put("c")),
    Case("precompute: nothing to keep",
         "reference: none keeps no log-probs; use reference: cached",
         {"loss": "simpo"}, PAIRS, arguments=("precompute", "c.yaml")),
    _config("legal: a row again and again", None, PAIRS[:1] * 9),
    _config("legal: one row", None, PAIRS[:1]),
    _config("legal: white space for responses", None,
            [{"prompt": "a", "chosen": " ", "rejected": "\n"}]),
    _config("legal: a prompt of 1 MB", None,
            [{"prompt": "tea " * 250_000, "chosen": "a", "rejected": "b"}],
            data={"truncation": "keep_end"}),
]  # fmt: skip

CASES = [*FILES, *TOKENIZERS, *RANDOM, *ADAPTERS, *TOGETHER]
