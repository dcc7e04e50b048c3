"""Configs that are no YAML, have odd keys or values, or contradict themselves."""

from __future__ import annotations

from typing import Any

from tests.bad_input.command import Case

LORA = {"name": "lora"}


def _text(name: str, says: str, config: str | bytes) -> Case:
    return Case(f"yaml: {name}", says, config)


def _fields(says: str, **config: Any) -> Case:
    return Case(f"config: {says[:60]}", says, config)


def _overridden(says: str, *overrides: str) -> Case:
    return Case(f"override: {' '.join(overrides)}", says, {}, arguments=_dry(*overrides))


def _dry(*overrides: str) -> tuple[str, ...]:
    return ("train", "c.yaml", "--dry-run", *overrides)


NOT_YAML = [
    _text("empty", "c.yaml: must hold sections such as model, data and loss", ""),
    _text("comment", "c.yaml: must hold sections such as model, data and loss", "# nothing\n"),
    _text("list", "c.yaml: must hold sections such as model, data and loss", "- model\n"),
    _text("scalar", "c.yaml: must hold sections such as model, data and loss", "dpo\n"),
    _text("number", "c.yaml: must hold sections such as model, data and loss", "3\n"),
    _text("open bracket", "c.yaml: not valid YAML; fix it: *", "model: {path: x\n"),
    _text("tab", "c.yaml: not valid YAML; fix it: *", "model:\n\tpath: x\n"),
    _text("two documents", "c.yaml: not valid YAML; fix it: *", "model: {}\n---\ndata: {}\n"),
    _text("undefined alias", "c.yaml: not valid YAML; fix it: *", "model: *there\n"),
    _text("list as a key", "c.yaml: not valid YAML; fix it: *", "[model]: x\n? [a]\n: b\n"),
    _text("Python object", "c.yaml: not valid YAML; fix it: *", "model: !!python/object:os x\n"),
    _text("not an int", "c.yaml: not valid YAML; fix it: *", "training: {seed: !!int x}\n"),
    _text("many digits", "c.yaml: not valid YAML; fix it: *", f"model: {'9' * 5000}\n"),
    _text("deep", "c.yaml: not valid YAML; fix it: *", "[" * 1000),
    _text("control character", "c.yaml: not valid YAML; fix it: *", "model: {path: \x01}\n"),
    _text("Latin-1", "c.yaml: not UTF-8 text; write the config *", b"model: {path: \xe9}\n"),
    _text("zip", "c.yaml: not UTF-8 text; write the config as YAML *", b"PK\x03\x04\xff\xfe"),
    _text("itself", "data.model: unknown key; known: *", "&a {model: [], data: *a, loss: dpo}\n"),
    _text("number as a key", "data: is missing; set it", "{1: 2, model: {path: x}}\n"),
    _text("null", "model: must be a mapping, got None", "model:\ndata: {train: x}\nloss: dpo\n"),
    Case("config: a folder", ".: cannot read the config (*); name a YAML file", {},
         arguments=("train", ".", "--dry-run")),
    Case("config: none", "none.yaml: cannot read the config (*); name a YAML file", {},
         arguments=("train", "none.yaml")),
    Case("config: a name too long", "*: cannot read the config (*); name a YAML file", {},
         arguments=("train", "n" * 300)),
]  # fmt: skip

KEYS = [
    _fields("trainig: unknown key; did you mean training? known: *", trainig={}),
    _fields("foo-bar: unknown key; known: *", **{"foo-bar": 1}),
    _fields(": unknown key; known: *", **{"": 1}),
    _fields("model.pth: unknown key; did you mean path? known: *", model={"pth": "x"}),
    _fields("data.test: unknown key; known: *", data={"test": "x"}),
    _fields("data.max length: unknown key; did you mean max_length? *", data={"max length": 3}),
    _fields("optim.learning_rate: a key of TRL and axolotl; set optim.lr here",
            optim={"learning_rate": 1e-5}),
    _fields("optim.wieght_decay: unknown key; did you mean weight_decay? *",
            optim={"wieght_decay": 0}),
    _fields("training.batchsize: unknown key; did you mean batch_size? *",
            training={"batchsize": 1}),
    _fields("training.gradient_accumulation_steps: a key of TRL and axolotl; there is none here, *",
            training={"gradient_accumulation_steps": 2}),
    _fields("bf16: a key of TRL and axolotl; set model.dtype here (bfloat16 is the default); "
            "also: lora_r → adapter.r; remove: strict", lora_r=8, bf16=True, strict=True),
    _fields("optimizer.eps: a key of torchtitan; set optim.eps here; also: optimizer.lr → optim.lr",
            optimizer={"lr": 1e-5, "eps": 1e-8}),
    _fields("adapter: qlora is a name of axolotl; set adapter.quantize here (*", adapter="qlora"),
    _fields("batch_size: a key of other trainers; set training.batch_size here *", batch_size=8),
    _fields("epochs: unknown key; did you mean training.epochs? known: *", epochs=3),
    _fields("training.output: is an earlier name of training.output_dir, and both are set; *",
            training={"output": "x"}),
    _fields("adapter.rank: unknown key; known: *", adapter={"name": "lora", "rank": 8}),
    _fields("calibration.decay: unknown key; known: *", calibration={"name": "rc", "decay": 0}),
    _fields("monitor.band_evry: unknown key; did you mean band_every? known: *",
            monitor={"band_evry": 1}),
    _fields("parallel.shards: unknown key; did you mean shard? known: *", parallel={"shards": 2}),
    _fields("loss.gamma: not a parameter of dpo, which accepts *",
            loss={"name": "dpo", "gamma": 1}),
    _fields("loss.Beta: not a parameter of dpo, which accepts *", loss={"name": "dpo", "Beta": 1}),
    Case("config: no data", "data: is missing; set it", "{model: {path: x}, loss: dpo}"),
    Case("config: no loss", "loss: is missing; set it", "{model: {path: x}, data: {train: x}}"),
    Case("config: no model", "model: is missing; set it", "{data: {train: x}, loss: dpo}"),
    Case("config: no training data", "data.train: is missing; set it",
         "{model: {path: x}, data: {}, loss: dpo}"),
]  # fmt: skip

CONTRADICTIONS = [
    _fields("reference: none, but dpo needs reference log-probs; use *", reference="none"),
    _fields("reference: none, but kto needs reference log-probs; use *",
            loss="kto", reference="none"),
    _fields("reference: none, but 1 dpo + 0.5 sft needs reference log-probs; use *",
            loss=[{"name": "dpo"}, {"name": "sft", "weight": 0.5}], reference="none"),
    _fields("reference: cached, but tdpo2 compares whole distributions, which are not kept *",
            loss="tdpo2", reference="cached"),
    _fields("reference: adapter, but there is no adapter; use cached or frozen",
            reference="adapter"),
    *[
        _fields(f"calibration: is for pairwise objectives, and {name} is {kind}; remove it",
                calibration="rc", loss=name)
        for name, kind in (("kto", "pointwise"), ("bco", "pointwise"), ("nca", "groupwise"),
                           ("info_nca", "groupwise"), ("pro_s", "groupwise"))
    ],
    _fields("monitor.band_every: is for pairwise objectives, and kto is pointwise; remove it",
            monitor={"band_every": 3}, loss="kto"),
    _fields("update: dpo_pg: is for pairwise objectives, and bco is pointwise; remove it",
            update="dpo_pg", loss="bco"),
    _fields("update: dpo_pg uses no incentives to calibrate; remove one of them",
            update="dpo_pg", calibration="rc"),
    _fields("training.eval_every: there is nothing to evaluate; set data.eval",
            training={"eval_every": 3}),
    _fields("monitor.margins: the first must be <= the second, got [2.0, 1.0]",
            monitor={"margins": [2, 1]}),
    _fields("model: path and init: random exclude each other; remove one",
            model={"init": "random", "config": {"model_type": "llama"}}),
    _fields("model.init: random needs config: {model_type: …, …}",
            model={"init": "random", "path": None}),
    _fields("model.init: random needs config: {model_type: …, …}",
            model={"init": "random", "path": None, "config": {"vocab_size": 300}}),
    _fields("model: path is missing (or use init: random with config: {…})", model={"path": None}),
    _fields("model: config is only for init: random; a pretrained model brings its own, *",
            model={"config": {"model_type": "llama"}}),
    *[
        _fields(f"adapter.{name}: the adapter at path brings its own; remove it",
                adapter={"path": "sft", name: value})
        for name, value in {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": "q_proj",
                            "rslora": True, "dora": True}.items()
    ],
    _fields("optim: alpha is not an option of adamw; remove it", optim={"alpha": 0.9}),
    _fields("optim: betas is not an option of rmsprop; remove it",
            optim={"name": "rmsprop", "betas": [0.9, 0.9]}),
    _fields("optim: alpha is not an option of adamw_8bit; remove it",
            optim={"name": "adamw_8bit", "alpha": 0.9}),
    _fields("loss.alpha: must be > 1, got 1.0; *", loss={"name": "pro_b", "alpha": 1.0}),
    _fields("loss.alpha: must be > 1, got 0.5; *", loss={"name": "pro_b", "alpha": 0.5}),
    _fields("loss.alpha: alpha + beta must be > 0, got 0 for both",
            loss={"name": "pmo", "alpha": 0, "beta": 0}),
    _fields("loss.alpha: js has none; leave it out or set divergence: alpha",
            loss={"name": "f_dpo", "divergence": "js", "alpha": 0.3}),
    _fields("loss.left_margin: must be <= right_margin (0.8), got 0.9",
            loss={"name": "stapo", "left_margin": 0.9}),
    _fields("loss.lam: must be >= 0 and <= 1, got 1.5", loss={"name": "ti_dpo", "lam": 1.5}),
    _fields("loss.f_alpha: it belongs to f_divergence: alpha; leave it out or set that",
            loss={"name": "dpo", "f_alpha": 0.3}),
    _fields("loss.f_alpha: js has none; leave it out or set f_divergence: alpha",
            loss={"name": "dpo", "f_divergence": "js", "f_alpha": 0.3}),
    _fields("loss.f_divergence: does not apply to simpo, whose loss is not one of *; leave it out",
            loss={"name": "simpo", "f_divergence": "js"}),
    _fields("loss.ld_alpha: must be >= 0 and <= 1, got 1.5", loss={"name": "dpo", "ld_alpha": 1.5}),
    _fields("loss.ld_alpha: does not apply to kto, which is not one of pairs *; leave it out",
            loss={"name": "kto", "ld_alpha": 0.5}),
    _fields("loss.wpo: does not apply to nca, which is not one of pairs; leave it out",
            loss={"name": "nca", "wpo": True}),
    _fields("loss[1].name: kto is not an objective on pairs; only those can be added up",
            loss=[{"name": "dpo"}, {"name": "kto"}]),
    _fields("loss[0].weight: must be > 0, got 0", loss=[{"name": "dpo", "weight": 0}]),
    _fields("loss[0].weight: must be > 0, got -1", loss=[{"name": "dpo", "weight": -1}]),
    _fields("loss[1].name: is missing, e.g. {name: dpo, weight: 0.8}",
            loss=[{"name": "dpo"}, {"weight": 1}]),
    _fields("loss[0].name: no objective is called 'dop'; known: *", loss=[{"name": "dop"}]),
    _fields("loss: expected a list such as [{name: dpo, weight: 0.8}, *", loss=[]),
    _fields("loss: name is missing, e.g. loss: {name: dpo, beta: 0.1}", loss={"beta": 0.1}),
    _fields("loss: name is missing, e.g. loss: {name: dpo, beta: 0.1}", loss={}),
    _fields("loss.name: no objective is called 'DPOO'; known: *", loss="DPOO"),
    _fields("loss.name: no objective is called ''; known: *", loss=""),
]  # fmt: skip

VALUES = [
    _fields("optim.lr: must be > 0, got 0", optim={"lr": 0}),
    _fields("optim.lr: must be > 0, got -1e-06", optim={"lr": -1e-6}),
    _fields("optim.lr: must be a number, got '5e'", optim={"lr": "5e"}),
    _fields("optim.lr: must be finite, got inf", optim={"lr": float("inf")}),
    _fields("optim.lr: must be > 0, got nan", optim={"lr": float("nan")}),
    _fields("optim.betas.1: is missing; set it", optim={"betas": [0.9]}),
    _fields("optim.betas.0: must be < 1, got 1.0", optim={"betas": [1.0, 0.9]}),
    _fields("optim.betas: must be a list, got 0.9", optim={"betas": 0.9}),
    _fields("optim.name: must be 'adamw', 'rmsprop', *, got 'lion'", optim={"name": "lion"}),
    _fields("optim.schedule: must be 'constant', 'linear' or 'cosine', got 'wsd'",
            optim={"schedule": "wsd"}),
    _fields("training.batch_size: must be a whole number, got 2.5", training={"batch_size": 2.5}),
    _fields("training.batch_size: must be < 2^63, got *", training={"batch_size": 10**30}),
    _fields("training.seed: must be < 2^63, got *", training={"seed": 2**63}),
    _fields("training.seed: must be >= 0, got -1", training={"seed": -1}),
    _fields("training.output_dir: must be a name, got ''", training={"output_dir": ""}),
    _fields("training.output_dir: must be a name, got 'a*b'", training={"output_dir": "a\0b"}),
    _fields("training.report_to.0: must be 'tensorboard' or 'wandb', got 'mlflow'",
            training={"report_to": ["mlflow"]}),
    _fields("training.device: must be 'auto', 'cpu' or 'cuda', got 'cuda:1'",
            training={"device": "cuda:1"}),
    _fields("training.layout: must be 'auto', 'prefix_shared', 'packed' or 'padded', got 'ragged'",
            training={"layout": "ragged"}),
    _fields("data.train: must be a name, got ' '", data={"train": " "}),
    _fields("data.train: must be text, got ['a', 'b']", data={"train": ["a", "b"]}),
    _fields("data.train: must be a path from a user of this machine, got '~nobody.here/x'",
            data={"train": "~nobody.here/x"}),
    _fields("data.cache: must be a path from a user of this machine, got '~nobody.here/x'",
            data={"cache": "~nobody.here/x"}),
    Case("config: a lone surrogate",
         "data.train: is not valid Unicode at character 1, got 'a\\ud800'; fix it",
         '{model: {path: x}, data: {train: "a\\ud800"}, loss: dpo}'),
    _fields("data.max_length: must be >= 2, got 1", data={"max_length": 1}),
    _fields("data.truncation: must be 'keep_start' or 'keep_end', got 'left'",
            data={"truncation": "left"}),
    _fields("model.dtype: must be 'bfloat16', 'float32' or 'float64', got 'fp8'",
            model={"dtype": "fp8"}),
    _fields("model.path: must be text, got 3", model={"path": 3}),
    _fields("model.kernels: must be 'auto', 'liger' or 'torch', got 'triton'",
            model={"kernels": "triton"}),
    _fields("adapter.quantize: must be 'nf4', got 'int8'", adapter={**LORA, "quantize": "int8"}),
    _fields("adapter.name: must be 'lora', got 'ia3'", adapter="ia3"),
    _fields("adapter.r: must be > 0, got 0", adapter={**LORA, "r": 0}),
    _fields("adapter.dropout: must be < 1, got 1", adapter={**LORA, "dropout": 1}),
    _fields("calibration.name: must be 'rc', got 'platt'", calibration="platt"),
    _fields("parallel.shard: must be > 0, got 0", parallel={"shard": 0}),
    _fields("loss.beta: must be > 0, got 0", loss={"name": "dpo", "beta": 0}),
    _fields("loss.beta: must be a number, got True", loss={"name": "dpo", "beta": True}),
    _fields("loss.beta: must be a number, got '0.1'", loss={"name": "dpo", "beta": "0.1"}),
    _fields("loss.beta: must be finite, got nan", loss={"name": "dpo", "beta": float("nan")}),
    _fields("loss.beta: must be finite, got 1000*", loss={"name": "dpo", "beta": 10**400}),
    _fields("loss.divergence: must be one of *, got 'kl'", loss={"name": "f_dpo",
                                                               "divergence": "kl"}),
    _fields("reference: must be 'cached', 'frozen', 'adapter' or 'none', got 'live'",
            reference="live"),
    _fields("loss: must be a mapping, got 3", loss=3),
    _fields("loss: must be a mapping, got ['dpo']", loss=["dpo"]),
    _fields("model: must be a mapping, got 'llama'; set model.path here *", model="llama"),
    _fields("data: must be a mapping, got 'pairs.jsonl'; set data.train here *",
            data="pairs.jsonl"),
    _fields("training: must be a mapping, got []", training=[]),
    _fields("optim: must be a mapping, got 'adamw'; set optim.name here *", optim="adamw"),
]  # fmt: skip

OVERRIDES = [
    _overridden("override 'optim.lr': must look like section.key=value", "optim.lr"),
    _overridden("override '=1': must look like section.key=value", "=1"),
    _overridden("override 'optim..lr=1': must look like section.key=value", "optim..lr=1"),
    _overridden("override '.=1': must look like section.key=value", ".=1"),
    _overridden(
        "override 'model.path.x=1': model.path is a value; name a key that is there",
        "model.path.x=1",
    ),
    _overridden("optim.lr: must be a number, got 'fast'", "optim.lr=fast"),
    _overridden("optim.lr: must be a number, got None", "optim.lr="),
    _overridden("optim.lr: must be a number, got '{'", "optim.lr={"),
    _overridden("loss.name: no objective is called 'nope'; known: *", "loss=nope"),
    _overridden("training.steps: must be > 0, got 0", "training.steps=0"),
    _overridden("training.steps: must be a whole number, got *", f"training.steps={'9' * 5000}"),
]

CASES = [*NOT_YAML, *KEYS, *CONTRADICTIONS, *VALUES, *OVERRIDES]
