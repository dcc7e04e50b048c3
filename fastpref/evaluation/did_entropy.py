"""`fastpref did-entropy`: the entropy of the differential information (DID) of an update.

The distribution q(y) ∝ pi(y) / ref(y) turns a reference into a policy. Its normalizer cannot be
estimated well, but q can be learned from pairs that need no preference labels, and then sampled:

    y_w ~ pi, y_l ~ ref          among such pairs p(y_w > y_l) = q(y_w) / (q(y_w) + q(y_l))
    pi' minimizes -log sigmoid(log pi'(y_w) - log pi'(y_l)), whose minimum is at pi' = q
    H(q) ≈ -mean log pi'(y), y ~ pi'

q satisfies log pi' = a log(pi / ref) + c with a = 1, which tests how near pi' came to it: for each
prompt, a is fitted by least squares to samples of pi'; the share of prompts with a >= 0 is
reported.

Source: "Differential Information", arXiv:2505.23761, Appendix K: one epoch, batches of 64, RMSprop
at 1e-6 after 150 steps of warm-up, 4 samples of a prompt for the fit, the entropy on unseen
prompts. The paper leaves some settings open; they are chosen here: the initial weights of pi' (the
reference's), the temperature (1, for which the mean is an entropy), the samples of a prompt for the
entropy (the same 4; a review of the paper says 32). The paper decodes its pairs greedily; here they
are sampled, as in its derivation.
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
    """One estimate of H(q), with all its settings. Raises UserError that names the option."""

    policy: str
    reference: str
    prompts: str  # file or Hub data set
    out: Path  # folder for pairs, the run of pi' and did_entropy.json
    sampling: Sampling  # n samples of pi' for each prompt
    pairs: int = 1  # for each prompt
    held_out: str | None = None  # prompts to sample pi' on, instead of its training prompts
    limit: int | None = None
    overrides: tuple[str, ...] = ()  # of the config of pi', such as optim.lr=1e-5
    device: str = "auto"
    dtype: str | None = None

    def __post_init__(self) -> None:
        temperature, n = self.sampling.temperature, self.sampling.n
        require("temperature", temperature, temperature > 0, "> 0, to sample")
        require("responses", n, n >= 2, "a number >= 2, to fit a slope")

    def run(self, display: Display) -> dict[str, Any]:
        """Draw pairs, train pi' on them and sample it; return the contents of did_entropy.json.

        Raises UserError in one line.
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
        write_pairs(Path(str(config.data.train)), chosen, rejected, tokenizer.eos_token or "")
        display.note("2. pi', trained on them from the reference")
        _advise_on_warmup(config.training, config.optim.warmup_steps, len(chosen), display)
        model = train(config, display)
        display.note(f"3. {self.sampling.n} samples of pi' for each of {len(measured):,} prompts")
        samples = self._sampler(str(model), tokenizer).draw(measured, self._sampling(2), display)
        logps = by_prompt([sample.logps for sample in samples], self.sampling.n)
        log_ratios = self._log_ratios(samples, tokenizer, display)
        result = {
            "did": summary(samples, self.sampling.n),
            "policy": summary(chosen, self.pairs),
            "reference": summary(rejected, self.pairs),
            "slopes": slope_summary(slopes(log_ratios, logps)),
            "estimate": {**asdict(self), "out": str(self.out)},
            "config": yaml.safe_load(config.to_yaml()),
        }
        with atomic_files.replacing(self.out / "did_entropy.json") as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return result

    def _sampler(self, source: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Sampler:
        return Sampler(source, self.device, self.dtype, tokenizer)

    def _sampling(self, draw: int, n: int | None = None) -> Sampling:
        """Options of draw 0, 1 or 2; different seeds make the draws independent."""
        s = self.sampling
        return replace(s, seed=3 * s.seed + draw, n=n or s.n)

    @property
    def _merged(self) -> Path:
        return self.out / "reference"  # written if the reference is an adapter

    def _config(self, policy: Sampler) -> configs.Config:
        """Config of pi'; raises ConfigError for an invalid override."""
        initial_model = str(self._merged) if is_adapter(self.reference) else self.reference
        data: dict[str, Any] = {
            "train": str(self.out / "pairs.jsonl"),
            "cache": str(self.out / "cache"),
            "add_eos": False,  # a pair ends with EOS if EOS was drawn
        }
        context = context_length(policy.policy)
        if context is not None:
            data["max_length"] = context
        values = {
            "model": {
                "path": initial_model,
                "tokenizer": policy.tokenizer.name_or_path,
                "dtype": policy.dtype,
            },
            "data": data,
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
        # A config that is refused leaves `out` empty.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.yaml"
            path.write_text(yaml.safe_dump(values), encoding="utf-8")
            return configs.load(path, list(self.overrides))

    def _log_ratios(
        self, samples: Sequence[Completion], tokenizer: PreTrainedTokenizerBase, display: Display
    ) -> Tensor:
        """log pi(y) - log ref(y) of samples of pi', (P, K), nats."""
        prompts, ids = [sample.prompt for sample in samples], [sample.ids for sample in samples]
        policy, reference = (
            self._sampler(source, tokenizer).logps(prompts, ids, self.sampling.batch_size, display)
            for source in (self.policy, self.reference)
        )
        return by_prompt((policy.double() - reference.double()).tolist(), self.sampling.n)


def _advise_on_warmup(
    training: configs.Training, warmup: int, pairs: int, display: Display
) -> None:
    steps = training.steps or training.epochs * math.ceil(pairs / training.batch_size)
    if steps <= warmup:
        display.note(
            f"note: training ends at step {steps:,}, within the warm-up of {warmup:,} steps, so "
            "pi' may stay near the reference; give more prompts, or --set optim.warmup_steps"
        )


def write_pairs(
    path: Path, chosen: Sequence[Completion], rejected: Sequence[Completion], eos: str
) -> None:
    """Write rows of preference data; plain text ends with EOS if EOS was drawn."""

    def response(completion: Completion) -> Any:
        prompt = completion.prompt.text.prompt
        ending = eos if completion.finished and isinstance(prompt, str) else ""
        return response_to(prompt, completion.text + ending)

    with path.open("w", encoding="utf-8") as file:
        for w, l in zip(chosen, rejected, strict=True):  # noqa: E741
            text = w.prompt.text
            row = {"prompt": text.prompt, "chosen": response(w), "rejected": response(l)}
            row |= text.template_columns
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def by_prompt(values: list[float], n: int) -> Tensor:
    """Reshape values of samples, `n` of each prompt in order, to (P, n) fp64."""
    return torch.tensor(values, dtype=torch.float64).view(-1, n)


def entropy(logps: Tensor) -> tuple[float, float | None]:
    """-mean log p(y) of K samples of each of P prompts, (P, K), and its standard error, in nats.

    The standard error is that of a mean over prompts, since samples of the same prompt are not
    independent; None for a single prompt.
    """
    means = -logps.mean(1)
    error = None if len(means) < 2 else (means.std() / math.sqrt(len(means))).item()
    return means.mean().item(), error


def slopes(log_ratios: Tensor, logps: Tensor) -> Tensor:
    """Fit a of log pi' = a log(pi / ref) + c by least squares over K samples, (P, K) twice -> (P,).

    NaN for a prompt whose log-ratios are all the same.
    """
    x = log_ratios - log_ratios.mean(1, keepdim=True)
    same = log_ratios.amax(1) - log_ratios.amin(1) < _ROUNDING
    return ((x * logps).sum(1) / x.square().sum(1)).masked_fill(same, math.nan)


def summary(samples: Sequence[Completion], n: int) -> dict[str, Any]:
    """Entropy of the sampled model, its standard error, and the size of the samples."""
    value, error = entropy(by_prompt([sample.logps for sample in samples], n))
    return {
        "entropy": value,
        "standard_error": error,
        "prompts": len(samples) // n,
        "samples": len(samples),
        "tokens": sum(len(sample.ids) for sample in samples) / len(samples),
        "cut": sum(not sample.finished for sample in samples) / len(samples),
    }


def slope_summary(slopes: Tensor) -> dict[str, Any]:
    """Share of slopes >= 0 and their median, over the prompts that have a slope."""
    slopes = slopes[~slopes.isnan()]
    if len(slopes) == 0:
        return {"prompts": 0, "share_nonnegative": None, "median": None}
    share = (slopes >= 0).double().mean().item()
    return {"prompts": len(slopes), "share_nonnegative": share, "median": slopes.median().item()}


def table(result: dict[str, Any]) -> Table:
    """The three entropies and the slopes, for a terminal."""
    table = Table("", title="entropy of responses (nats)")
    for heading in ("entropy", "standard error", "samples", "tokens", "cut"):
        table.add_column(heading, justify="right")
    names = {"did": "differential information (pi')", "policy": "policy", "reference": "reference"}
    for key, name in names.items():
        row = result[key]
        error = "–" if row["standard_error"] is None else f"{row['standard_error']:.2f}"
        counts = (f"{row['samples']:,}", f"{row['tokens']:.1f}", f"{row['cut']:.1%}")
        table.add_row(name, f"{row['entropy']:.2f}", error, *counts)
    fit = result["slopes"]
    table.caption = "no prompt determines a slope of log pi' on log(pi / ref)"
    if fit["prompts"]:
        table.caption = (
            f"log pi' = a log(pi / ref) + c: a >= 0 for {fit['share_nonnegative']:.1%} of "
            f"{fit['prompts']:,} prompts, median {fit['median']:+.3f}"
        )
    return table
