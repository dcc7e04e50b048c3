"""How spread out the differential information of an update is: `fastpref did-entropy`.

What turns a reference into a policy is the distribution q(y) ∝ pi(y) / ref(y). Its normaliser
cannot be estimated well, but q can be learnt from pairs that need no judge, and sampled:

    y_w ~ pi, y_l ~ ref          among such pairs p(y_w > y_l) = q(y_w) / (q(y_w) + q(y_l))
    pi' minimises -log sigmoid(log pi'(y_w) - log pi'(y_l)), which is least where pi' = q
    H(q) ≈ -mean log pi'(y), y ~ pi'

Whether pi' came near q shows in log pi' = a log(pi / ref) + c, which holds for q with a = 1: for
each prompt, a is fitted by least squares to samples of pi'; the share of prompts with a >= 0 is
reported.

Source: "Differential Information", arXiv:2505.23761, Appendix K: one epoch, batches of 64, RMSprop
at 1e-6 after 150 steps of warm-up, 4 samples of a prompt for the fit, the entropy on unseen
prompts. Chosen here, for want of certainty about the paper's: the weights that pi' begins from (the
reference's), the temperature (1, where the mean is an entropy), the samples of a prompt for the
entropy (the same 4; a review of the paper says 32). The paper decodes its pairs greedily; here they
are sampled, as its derivation has them.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastpref import config as configs
from fastpref.data.prompts import read_prompts, response_to
from fastpref.evaluation.sample import Completion, Sampler, is_adapter
from fastpref.model.export import export
from fastpref.model.generate import Sampling, require
from fastpref.model.policy import context_length
from fastpref.training.trainer import train
from fastpref.utils import atomic_files
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display

LOSS = {"name": "logpi_dpo", "beta": 1.0}  # -log sigmoid(z_w - z_l)
_ROUNDING = 1e-3  # nats; log-ratios of a prompt that differ by less determine no slope


@dataclass(frozen=True)
class Estimate:
    """One estimate of H(q), and all that decides it. Raises UserError naming the option."""

    policy: str
    reference: str
    prompts: str  # file or Hub data set
    out: Path  # for pairs, the run of pi' and did_entropy.json
    sampling: Sampling  # n samples of pi' for each prompt
    pairs: int = 1  # for each prompt
    held_out: str | None = None  # prompts to sample pi' on, instead of those it is trained on
    limit: int | None = None
    overrides: tuple[str, ...] = ()  # of the config of pi', such as optim.lr=1e-5
    device: str = "auto"
    dtype: str | None = None

    def __post_init__(self) -> None:
        temperature, n = self.sampling.temperature, self.sampling.n
        require("temperature", temperature, temperature > 0, "> 0, to sample")
        require("responses", n, n >= 2, "a number >= 2, to fit a slope")

    def run(self, display: Display) -> dict[str, Any]:
        """Draw pairs, train pi' on them, sample it; returns what did_entropy.json holds.

        Raises UserError in one line for what a user can mend.
        """
        if self.out.exists() and any(self.out.iterdir()):
            raise UserError(f"--out: {self.out} is not empty; choose another folder")
        self.out.mkdir(parents=True, exist_ok=True)
        display.note(f"1. pairs: chosen from {self.policy}, rejected from {self.reference}")
        sampler = self._sampler(self.policy)
        tokenizer = sampler.tokenizer
        prompts = measured = read_prompts(self.prompts, tokenizer, self.limit)
        if self.held_out is not None:
            measured = read_prompts(self.held_out, tokenizer, self.limit)
        config = self._config(sampler)
        chosen = sampler.draw(prompts, self._sampling(0, self.pairs), display)
        del sampler  # one model in memory at a time
        sampler = self._sampler(self.reference, tokenizer)
        rejected = sampler.draw(prompts, self._sampling(1, self.pairs), display)
        if sampler.is_adapter:
            export(sampler.policy, tokenizer, self._merged, merge=True)
        del sampler
        write_pairs(Path(config.data.train), chosen, rejected, tokenizer.eos_token or "")
        display.note("2. pi', trained on them from the reference")
        _advise_on_warmup(config, len(chosen), display)
        trained = train(config, display)
        display.note(f"3. {self.sampling.n} samples of pi' for each of {len(measured):,} prompts")
        drawn = self._sampler(str(trained), tokenizer).draw(measured, self._sampling(2), display)
        logps = by_prompt([each.logps for each in drawn], self.sampling.n)
        result = {
            "did": summary(drawn, self.sampling.n),
            "policy": summary(chosen, self.pairs),
            "reference": summary(rejected, self.pairs),
            "slopes": slope_summary(slopes(self._log_ratios(drawn, tokenizer, display), logps)),
            "estimate": {**asdict(self), "out": str(self.out)},
            "config": yaml.safe_load(config.to_yaml()),
        }
        with atomic_files.replacing(self.out / "did_entropy.json") as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result

    def _sampler(self, source: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Sampler:
        return Sampler(source, self.device, self.dtype, tokenizer)

    def _sampling(self, draw: int, n: int | None = None) -> Sampling:
        """Of draw 0, 1 or 2, which are independent only if they share no random numbers."""
        s = self.sampling
        return replace(s, seed=3 * s.seed + draw, n=n or s.n)

    @property
    def _merged(self) -> Path:
        return self.out / "reference"  # written where the reference is an adapter

    def _config(self, policy: Sampler) -> configs.Config:
        """The config of pi'; ConfigError for an override at fault."""
        start = str(self._merged) if is_adapter(self.reference) else self.reference
        context = context_length(policy.policy)
        values = {
            "model": {
                "path": start,
                "tokenizer": policy.tokenizer.name_or_path,
                "dtype": policy.dtype,
            },
            "data": {
                "train": str(self.out / "pairs.jsonl"),
                "cache": str(self.out / "cache"),
                "add_eos": False,  # the pairs end with it where it was drawn
                **({} if context is None else {"max_length": context}),
            },
            "loss": LOSS,
            "optim": {"name": "rmsprop", "lr": 1e-6, "warmup_steps": 150},
            "training": {
                "batch_size": 64,
                "seed": self.sampling.seed,
                "device": self.device,
                "checkpoint_every": None,
                "output_dir": str(self.out / "training"),
            },
        }
        with tempfile.TemporaryDirectory() as folder:  # what is refused leaves `out` empty
            path = Path(folder) / "config.yaml"
            path.write_text(yaml.safe_dump(values), encoding="utf-8")
            return configs.load(path, list(self.overrides))

    def _log_ratios(
        self, drawn: Sequence[Completion], tokenizer: PreTrainedTokenizerBase, display: Display
    ) -> Tensor:
        """log pi(y) - log ref(y) of samples of pi', (P, K), nats."""
        prompts, ids = [each.prompt for each in drawn], [each.ids for each in drawn]
        policy, reference = (
            self._sampler(source, tokenizer).logps(prompts, ids, self.sampling.batch_size, display)
            for source in (self.policy, self.reference)
        )
        return by_prompt((policy.double() - reference.double()).tolist(), self.sampling.n)


def _advise_on_warmup(config: configs.Config, pairs: int, display: Display) -> None:
    t, warmup = config.training, config.optim.warmup_steps
    steps = t.steps or t.epochs * -(-pairs // t.batch_size)
    if steps <= warmup:
        display.note(
            f"note: training ends at step {steps:,}, within the {warmup:,} of the warm-up, so pi' "
            "may stay near the reference; give more prompts, or --set optim.warmup_steps"
        )


def write_pairs(
    path: Path, chosen: Sequence[Completion], rejected: Sequence[Completion], eos: str
) -> None:
    """Rows of preference data; plain text ends with EOS where that was drawn, as it is trained."""

    def response(each: Completion) -> Any:
        prompt = each.prompt.text.prompt
        ending = eos if each.finished and isinstance(prompt, str) else ""
        return response_to(prompt, each.text + ending)

    with path.open("w", encoding="utf-8") as file:
        for w, l in zip(chosen, rejected, strict=True):  # noqa: E741
            text = w.prompt.text
            row = {"prompt": text.prompt, "chosen": response(w), "rejected": response(l)}
            if text.tools:
                row["tools"] = text.tools
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def by_prompt(values: list[float], n: int) -> Tensor:
    """Values of samples in order, `n` of each prompt, as (P, n) fp64."""
    return torch.tensor(values, dtype=torch.float64).view(-1, n)


def entropy(logps: Tensor) -> tuple[float, float | None]:
    """-mean log p(y) of K samples of each of P prompts, (P, K), and its standard error, in nats.

    The standard error is that of a mean over prompts, whose samples are not independent of one
    another; None for a single prompt.
    """
    means = -logps.mean(1)
    error = None if len(means) < 2 else (means.std() / math.sqrt(len(means))).item()
    return means.mean().item(), error


def slopes(log_ratios: Tensor, logps: Tensor) -> Tensor:
    """a of log pi' = a log(pi / ref) + c by least squares over K samples, (P, K) twice -> (P,).

    NaN for a prompt whose log-ratios are all the same.
    """
    x = log_ratios - log_ratios.mean(1, keepdim=True)
    same = log_ratios.amax(1) - log_ratios.amin(1) < _ROUNDING
    return ((x * logps).sum(1) / x.square().sum(1)).masked_fill(same, math.nan)


def summary(drawn: Sequence[Completion], n: int) -> dict[str, Any]:
    """Entropy of the model that was sampled, and what it rests on."""
    value, error = entropy(by_prompt([each.logps for each in drawn], n))
    return {
        "entropy": value,
        "standard_error": error,
        "prompts": len(drawn) // n,
        "samples": len(drawn),
        "tokens": sum(len(each.ids) for each in drawn) / len(drawn),
        "cut": sum(not each.finished for each in drawn) / len(drawn),
    }


def slope_summary(found: Tensor) -> dict[str, Any]:
    """Share of slopes >= 0 and their median, of the prompts that have one."""
    known = found[~found.isnan()]
    if len(known) == 0:
        return {"prompts": 0, "share_nonnegative": None, "median": None}
    share = (known >= 0).double().mean().item()
    return {"prompts": len(known), "share_nonnegative": share, "median": known.median().item()}


def table(result: dict[str, Any]) -> Table:
    """The three entropies and the slopes, for a terminal."""
    made = Table("", title="entropy of responses (nats)")
    for heading in ("entropy", "standard error", "samples", "tokens", "cut"):
        made.add_column(heading, justify="right")
    names = {"did": "differential information (pi')", "policy": "policy", "reference": "reference"}
    for key, name in names.items():
        row = result[key]
        error = "–" if row["standard_error"] is None else f"{row['standard_error']:.2f}"
        counts = (f"{row['samples']:,}", f"{row['tokens']:.1f}", f"{row['cut']:.1%}")
        made.add_row(name, f"{row['entropy']:.2f}", error, *counts)
    fit = result["slopes"]
    made.caption = "no prompt determines a slope of log pi' on log(pi / ref)"
    if fit["prompts"]:
        made.caption = (
            f"log pi' = a log(pi / ref) + c: a >= 0 for {fit['share_nonnegative']:.1%} of "
            f"{fit['prompts']:,} prompts, median {fit['median']:+.3f}"
        )
    return made
