"""`fastpref demo`: DPO and PMO from the weights of one model, small or real.

Pure-semantic pairs with known target probabilities show the effect of an objective on a model: DPO
drives the log-probs of a pair apart until beta times their difference matches the target, so the
policy's own probabilities collapse; PMO with alpha + beta near 1 leaves them near the target
(preference matching optimization, Proposition 4.2).

The model is a small one that learns the language of the pairs first (SFT), or with `--model` a
Hugging Face model, which gets an adapter and a few steps on pairs about three nouns.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table

from fastpref import config as configs
from fastpref import metrics
from fastpref.data.synthetic import pure_semantic
from fastpref.data.tokenizers import load_tokenizer
from fastpref.training.trainer import train
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display

_MARKER = "demo.json"
STAGES = ("sft", "dpo", "pmo")
TITLES = {
    "sft": "2. SFT: a Llama with random weights learns both responses",
    "dpo": "3. DPO (beta 0.1) from that checkpoint",
    "pmo": "4. PMO (alpha 0.9, beta 0.1) from that checkpoint",
}
MODEL_TITLES = {
    "dpo": "2. DPO (beta 0.1): a LoRA adapter on the model",
    "pmo": "3. PMO (alpha 0.9, beta 0.1): another one on the same model",
}
READING = """
The held-out pairs compare words that training compared only with other words. Accuracy is the share
of pairs in which the model prefers the likelier response, by its own probability S(z_w - z_l). KL
is the distance of that probability from p, and PCI the mean of the lesser of it and 1 less it,
which is near 0 where every pair is decided. Expect DPO to decide nearly every pair while both
log-probs fall: it fits beta times the change of the margin to p. PMO fits the probability to p."""
NOUNS = ("drink", "city", "pet")  # of the pairs for a real model, which has time for a few steps
_OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": 0.1},
    "pmo": {"name": "pmo", "alpha": 0.9, "beta": 0.1},
}
_STEPS, _BATCH, _HELD_OUT = 10, 16, 42  # with a real model
_LLAMA = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}


def stage_configs(out: Path, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The three configs, by stage; `fastpref train` runs each of them alone."""
    data = {
        "train": str(out / "data" / "train.jsonl"),
        "eval": str(out / "data" / "test.jsonl"),
        "max_length": 64,
        "cache": str(out / "cache"),
    }
    training = {
        "batch_size": 64,
        "log_every": 5,
        "seed": seed,
        "activation_checkpointing": False,
        "batch_invariant": False,
        "checkpoint_every": None,
    }

    def stage(
        name: str, model: dict[str, Any], loss: dict[str, Any], lr: float, **extra: Any
    ) -> dict[str, Any]:
        return {
            "model": {"dtype": "float32", **model},
            "data": data,
            "loss": loss,
            "optim": {"lr": lr, "schedule": "cosine", "warmup_steps": 10},
            "training": {**training, **extra, "output_dir": str(out / name)},
        }

    sft_model = {"path": str(out / "sft" / "model")}
    return {
        "sft": stage(
            "sft",
            {"init": "random", "config": _LLAMA},
            {"name": "sft", "responses": "both"},
            3e-3,
            steps=60,
            eval_every=12,
        ),
        "dpo": stage("dpo", sft_model, _OBJECTIVES["dpo"], 5e-4, steps=60, eval_every=12),
        "pmo": stage("pmo", sft_model, _OBJECTIVES["pmo"], 5e-4, steps=60, eval_every=12),
    }


def model_stage_configs(out: Path, model: Path, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The two configs with a real model, by stage: LoRA in fp32, one epoch of a few steps."""
    return {
        name: {
            "model": {"path": str(model), "dtype": "float32"},
            "adapter": {"name": "lora", "r": 16, "alpha": 32, "merge": False},
            "data": {
                "train": str(out / "data" / "train.jsonl"),
                "eval": str(out / "data" / "test.jsonl"),
                "max_length": 256,
                "cache": str(out / "cache"),
            },
            "loss": loss,
            "optim": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 3},
            "training": {
                "batch_size": _BATCH,
                "steps": _STEPS,
                "eval_every": _STEPS // 2,
                "log_every": 2,
                "seed": seed,
                "activation_checkpointing": False,
                "batch_invariant": False,
                "checkpoint_every": None,
                "output_dir": str(out / name),
            },
        }
        for name, loss in _OBJECTIVES.items()
    }


def run(out: Path, seed: int, display: Display, model: Path | None = None) -> None:
    """Generate the data, train the stages, and write a table, a picture and the models.

    model: folder of a Hugging Face model to start from, instead of the small one of the SFT stage.

    Raises UserError for a folder that holds no model, and for an `out` with other contents.
    """
    started = time.monotonic()
    chat = False if model is None else _has_chat_template(model)
    _prepare_folder(out)
    display.note(
        f"1. data: pairs that differ in one word, with a target probability, in {out}/data"
    )
    if model is None:
        # A second thread gains little on GEMMs this small, and next to another busy process the
        # two threads wait for each other, which is ten times slower.
        torch.set_num_threads(1)
        _, held_out = pure_semantic.write(out / "data", seed)
        stages, titles = stage_configs(out, seed), TITLES
    else:
        held_out = _write_pairs(out / "data", seed, chat)
        stages, titles = model_stage_configs(out, model, seed), MODEL_TITLES
    models = {}
    for name, values in stages.items():
        path = out / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        display.note(f"\n{titles[name]}: fastpref train {path}")
        models[name] = train(configs.load(path), display)
    curves = {name: evaluations(out / name) for name in stages}
    results = {name: result(curve) for name, curve in curves.items()}
    if model is not None:
        results = {"before": result(curves["dpo"][:1]), **results}
    seconds = time.monotonic() - started
    (out / "results.json").write_text(json.dumps({"seconds": seconds, **results}, indent=1))
    targets = [json.loads(line)["p"] for line in held_out.read_text().splitlines()]
    target_pci = sum(min(p, 1 - p) for p in targets) / len(targets)
    picture = draw(curves, target_pci, out / "demo.png")
    display.note("")
    display.console.print(table(results))
    if model is not None:
        display.note(READING)
    display.note(f"\npicture: {picture}\nmodels:  {', '.join(str(m) for m in models.values())}")
    display.note(f"took {seconds / 60:.1f} minutes")


def conversation(pair: pure_semantic.Pair) -> dict[str, Any]:
    """A pair as the messages of a chat, without the words that mark the turns in its text."""
    question = pair.prompt.removeprefix("User: ").removesuffix("\nAssistant:")
    answers = {"chosen": pair.chosen.strip(), "rejected": pair.rejected.strip()}
    return {
        "prompt": [{"role": "user", "content": question}],
        **{side: [{"role": "assistant", "content": text}] for side, text in answers.items()},
        "p": pair.p,
    }


def _write_pairs(folder: Path, seed: int, chat: bool) -> Path:
    """Write the pairs for a real model, as chats where it has a template; return the test file."""
    folder.mkdir()
    splits = pure_semantic.split(pure_semantic.generate(seed), seed)
    for name, pairs, count in zip(
        ("train", "test"), splits, (_STEPS * _BATCH, _HELD_OUT), strict=True
    ):
        chosen = [pair for pair in pairs if pair.set in NOUNS][:count]
        rows = [conversation(pair) if chat else asdict(pair) for pair in chosen]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder / "test.jsonl"


def _has_chat_template(model: Path) -> bool:
    """Whether the tokenizer of a model has a chat template. Raises UserError where there is none.

    ModelError, which is one, says why a tokenizer cannot be loaded.
    """
    if not (model / "config.json").is_file():
        raise UserError(
            f"--model: {model} is no Hugging Face model: it has no config.json; name a folder "
            "that `save_pretrained` wrote"
        )
    tokenizer = load_tokenizer(configs.Model(path=str(model)))
    return tokenizer is not None and bool(tokenizer.chat_template)


def evaluations(run_folder: Path) -> list[dict[str, Any]]:
    """The evaluation records of a run, in order."""
    records = metrics.read_records(run_folder / "metrics.jsonl")
    return [record for record in records if "eval_loss" in record]


def result(curve: list[dict[str, Any]]) -> dict[str, float]:
    """Final held-out metrics, and the change of log-probs since the stage's first evaluation."""
    first, last = curve[0], curve[-1]
    return {
        "accuracy": last["eval_preference/accuracy"],
        "mean_kl": last["eval_preference/mean_kl"],
        "pci": last["eval_preference/pci"],
        "chosen_change": last["eval_logps/chosen"] - first["eval_logps/chosen"],
        "rejected_change": last["eval_logps/rejected"] - first["eval_logps/rejected"],
    }


def table(results: dict[str, dict[str, float]]) -> Table:
    """Results on held-out pairs, whose words are never compared in training."""
    table = Table(title="held-out pairs (nats; log-prob change since the stage began)")
    table.add_column("")
    for heading in ("accuracy ↑", "mean KL to p ↓", "PCI ↑", "Δ chosen", "Δ rejected"):
        table.add_column(heading, justify="right")
    for name, values in results.items():
        table.add_row(
            name.upper(),
            f"{values['accuracy']:.3f}",
            f"{values['mean_kl']:.3f}",
            f"{values['pci']:.3f}",
            f"{values['chosen_change']:+.2f}",
            f"{values['rejected_change']:+.2f}",
        )
    return table


def draw(curves: dict[str, list[dict[str, Any]]], target_pci: float, path: Path) -> Path:
    """Draw accuracy, KL, PCI and log-probs over the steps of each stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = {"sft": "#7f7f7f", "dpo": "#d1495b", "pmo": "#00798c"}
    panels = {
        "eval_preference/accuracy": "accuracy (share of pairs)",
        "eval_preference/mean_kl": "mean KL to the target p (nats)",
        "eval_preference/pci": "PCI, mean of min(p̂, 1 − p̂)",
    }
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, (key, title) in zip(axes.flat, panels.items(), strict=False):
        for name, curve in curves.items():
            steps = [record["step"] for record in curve]
            axis.plot(steps, [record[key] for record in curve], color=colors[name], label=name)
        axis.set_title(title, fontsize=11)
    axes.flat[2].axhline(target_pci, color="black", lw=1, ls=":", label="target p")
    axis = axes.flat[3]
    for name, curve in curves.items():
        steps = [record["step"] for record in curve]
        for key, style in (("eval_logps/chosen", "-"), ("eval_logps/rejected", "--")):
            change = [record[key] - curve[0][key] for record in curve]
            side = key.removeprefix("eval_logps/")
            axis.plot(steps, change, style, color=colors[name], label=f"{name} {side}")
    axis.set_title("change of summed log-prob (nats)", fontsize=11)
    for axis in axes.flat:
        axis.set_xlabel("optimizer steps of the stage")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    # The legend lies between SFT's line, which stays at the top of this panel, and the others.
    axes.flat[3].legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.88))
    start = "SFT warm-up, then" if "sft" in curves else "a pretrained model before and after"
    figure.suptitle(f"Held-out pure-semantic pairs: {start} preference training")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _prepare_folder(out: Path) -> None:
    """Delete an earlier demo; raise UserError for a folder with other contents."""
    if (out / _MARKER).exists():
        shutil.rmtree(out)
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"--out: {out} is not empty and holds no demo; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).write_text("{}")
