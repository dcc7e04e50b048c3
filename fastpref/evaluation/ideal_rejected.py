"""`fastpref data rejected`: pairs whose rejected responses come from the ideal distribution.

If chosen responses are samples of the reference, DPO at beta converges to a target policy exactly
where the rejected ones come from

    π_l(y) ∝ ref(y) · (ref(y) / target(y))^beta

which no model samples directly. Candidates y_1 … y_K of the reference with the weights

    w_k = (ref(y_k) / target(y_k))^beta / Σ_j (ref(y_j) / target(y_j))^beta

are samples of it by importance resampling, exact as K grows. The effective number of candidates,
1 / Σ w_k², says whether K is large enough: it falls with beta times the spread of the log-ratios.
The target is a stand-in for the policy that one wants, such as a stronger model of the same family.

Source: "Differential Information", arXiv:2505.23761, Eq. 1 and Theorem L.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref.data.prompts import read_prompts
from fastpref.evaluation.did_entropy import by_prompt, write_pairs
from fastpref.evaluation.sample import Completion, Sampler
from fastpref.model.generate import Sampling, require
from fastpref.utils import atomic_files
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display

_FEW = 2.0  # effective candidates below which a rejected response is nearly a fixed one


def log_weights(target: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Logarithms of the weights of candidates, (P, K), normalized over K.

    target, reference: log-probs of the candidates, (P, K), nats. Raises ValueError for other shapes
    or a beta that is not positive.
    """
    if target.dim() != 2 or target.shape != reference.shape:
        raise ValueError(
            f"reference: expected the shape (P, K) of target, got {tuple(reference.shape)} for "
            f"{tuple(target.shape)}"
        )
    if not 0 < beta < math.inf:
        raise ValueError(f"beta: expected a number > 0, got {beta}")
    return (beta * (reference - target).double()).log_softmax(1)


def resample(log_weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw indices of candidates of each prompt by their weights, (P, K) -> (P, count)."""
    return torch.multinomial(log_weights.exp(), count, replacement=True, generator=generator)


def effective_candidates(log_weights: Tensor) -> Tensor:
    """1 / Σ w², (P, K) -> (P,), between 1 and K."""
    return (-(2 * log_weights).logsumexp(1)).exp()


@dataclass(frozen=True)
class IdealRejected:
    """One file of pairs, with all its settings. Raises UserError that names the option."""

    target: str
    reference: str
    prompts: str  # file or Hub data set
    out: Path
    beta: float = 0.1
    candidates: int = 16  # of each prompt
    pairs: int = 1  # of each prompt
    max_new_tokens: int = 256
    batch_size: int = 8
    seed: int = 0
    limit: int | None = None
    device: str = "auto"
    dtype: str | None = None

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "a number > 0")
        require(
            "candidates", self.candidates, self.candidates >= 2, "a number >= 2, to choose from"
        )
        self._sampling(0, self.pairs)

    def run(self, display: Display) -> dict[str, Any]:
        """Write the pairs to `out` and return a summary. Raises UserError if `out` exists."""
        if self.out.exists():
            raise UserError(f"--out: {self.out} is already there; choose another file")
        display.note(f"1. chosen responses and {self.candidates} candidates from {self.reference}")
        sampler = Sampler(self.reference, self.device, self.dtype)
        tokenizer = sampler.tokenizer
        prompts = read_prompts(self.prompts, tokenizer, self.limit)
        chosen = sampler.draw(prompts, self._sampling(0, self.pairs), display)
        candidates = sampler.draw(prompts, self._sampling(1, self.candidates), display)
        del sampler  # one model in memory at a time
        display.note(f"2. their log-probs under {self.target}")
        target = Sampler(self.target, self.device, self.dtype, tokenizer)
        weights = self._log_weights(candidates, target, display)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = resample(weights, self.pairs, generator).tolist()
        rejected = [candidates[p * self.candidates + k] for p, row in enumerate(drawn) for k in row]
        with atomic_files.replacing(self.out) as temporary:
            write_pairs(temporary, chosen, rejected, tokenizer.eos_token or "")
        return self._summary(weights, len(rejected), display)

    def _sampling(self, draw: int, n: int) -> Sampling:
        """Options of draw 0 or 1; different seeds make the draws independent.

        Samples must come from the distribution that scores them, so no vllm.
        """
        return Sampling(
            n,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            seed=2 * self.seed + draw,
            engine="transformers",
        )

    def _log_weights(
        self, candidates: Sequence[Completion], target: Sampler, display: Display
    ) -> Tensor:
        prompts, ids = [c.prompt for c in candidates], [c.ids for c in candidates]
        logps = target.logps(prompts, ids, self.batch_size, display).double()
        by_target, by_reference = (
            by_prompt(values, self.candidates)
            for values in (logps.tolist(), [c.logps for c in candidates])
        )
        return log_weights(by_target, by_reference, self.beta)

    def _summary(self, weights: Tensor, pairs: int, display: Display) -> dict[str, Any]:
        effective = effective_candidates(weights)
        summary = {
            "pairs": pairs,
            "prompts": len(effective),
            "candidates": self.candidates,
            "effective_candidates": effective.median().item(),
            "few": (effective < _FEW).double().mean().item(),
        }
        display.note(
            f"{pairs:,} pairs of {summary['prompts']:,} prompts; of {self.candidates} candidates "
            f"{summary['effective_candidates']:.1f} are effective (median)"
        )
        if summary["few"] > 0.1:
            display.note(
                f"note: {summary['few']:.0%} of the prompts have fewer than {_FEW:g}; raise "
                "--candidates, lower --beta, or use a target that is closer to the reference"
            )
        return summary
