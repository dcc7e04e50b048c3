"""Everything that stays in memory over the rounds of a run: policy, tokenizer, prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from fastpref import distributed
from fastpref.config import Config
from fastpref.data.prompts import Prompt
from fastpref.data.tokenizers import tokenizer_of
from fastpref.evaluation.sample import end_tokens
from fastpref.losses import Objective
from fastpref.losses.rollout import DistillationOptions
from fastpref.model.batch_layout import choose_layout, use_layout
from fastpref.model.coverage import announce_coverage
from fastpref.model.load import announce_code, load_policy
from fastpref.model.policy import Policy, context_length
from fastpref.rounds.keys import prompts_key
from fastpref.rounds.pairing import worst_case
from fastpref.rounds.prompts import load_prompts, prompts_of_round
from fastpref.rounds.reference import RoundReference, needs_copy
from fastpref.rounds.teacher import check_vocabulary, load_teacher
from fastpref.training.memory_budget import MemoryBudget, usable_bytes
from fastpref.training.optim import check_eight_bit
from fastpref.training.rank_checks import check_same_rows
from fastpref.training.setup import device_of
from fastpref.utils.atomic_files import sha256
from fastpref.utils.progress import Display


class Prompts(NamedTuple):
    """Prompts to train on and, if the config has any, held-out ones."""

    train: list[Prompt]
    held_out: list[Prompt]


class Session:
    """Policy and everything around it, loaded once.

    resumed: run directory, if the run is resumed.

    Raises UserError in one line for what cannot be loaded.
    """

    def __init__(self, config: Config, display: Display, resumed: Path | None) -> None:
        assert config.rounds is not None
        self.config, self.rounds, self.display = config, config.rounds, display
        self.folder = Path(config.training.output_dir)
        self.cache = Path(config.data.cache).expanduser()
        self.loss: Objective = config.build_loss()
        announce_code(config.model, display.note)
        self.tokenizer: PreTrainedTokenizerBase = tokenizer_of(
            config.model, config.data, "pairwise"
        )
        self.device = device_of(config.training.device)
        check_eight_bit(config.optim, self.device)
        self.teacher: Policy | None = None
        if isinstance(self.loss, DistillationOptions):
            # Its memory is not for the steps.
            self.teacher = load_teacher(config, str(self.loss.teacher), self.tokenizer, display)
        usable = usable_bytes(self.device)
        self.policy = self._load_policy(with_adapter=True)
        if self.teacher is not None:
            check_vocabulary(self.teacher, self.policy)
        announce_coverage(self.policy, config.adapter, display.note)
        with distributed.main_process_first():  # which may download them
            self.prompts = self._load_prompts()
        self._prompts_key = prompts_key(self.prompts.train)
        check_same_rows("data.train", config.data.train, self._prompts_key)
        check_same_rows("data.eval", config.data.eval, prompts_key(self.prompts.held_out))
        self._plan_memory(usable, resumed)
        self.ends = end_tokens(
            self.policy, self.tokenizer, self.prompts.train, str(config.data.train)
        )
        self.reference = RoundReference(config, self.policy, self._load_start, display)
        # Dropout of the steps, which differs between ranks; samples have seeds of their own.
        torch.manual_seed(config.training.seed + distributed.rank())

    @property
    def prompts_per_round(self) -> int:
        return self.rounds.prompts or len(self.prompts.train)

    @property
    def steps_per_round(self) -> int:
        return self.rounds.steps_of_round(self.prompts_per_round, self.config.training.batch_size)

    def prompts_of(self, number: int) -> list[Prompt]:
        """Prompts of round `number`, from 1."""
        return [self.prompts.train[index] for index in self._indices(number)]

    def prompt_keys(self) -> list[str]:
        """Keys of the prompts of all rounds."""
        return [
            sha256(self._prompts_key, json.dumps(self._indices(number)))
            for number in range(1, self.rounds.count + 1)
        ]

    def _indices(self, number: int) -> list[int]:
        seed = self.config.training.seed
        return prompts_of_round(len(self.prompts.train), number, self.prompts_per_round, seed)

    def _load_policy(self, with_adapter: bool) -> Policy:
        config = self.config
        follows = needs_copy(config) and self.rounds.reference_mode != "start"
        return load_policy(
            config.model,
            self.tokenizer,
            self.device,
            config.training,
            config.parallel,
            adapter=config.adapter if with_adapter else None,
            keep_initial_adapter=True,
            copy_adapter=follows,
        )

    def _load_start(self) -> Policy:
        """The model before the first step, of a run without an adapter."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            policy = self._load_policy(with_adapter=False)
        policy.batch_invariant = self.policy.batch_invariant
        use_layout(policy, self.policy.layout)
        if self.policy.trunk is None:
            policy.use_transformers(self.policy.not_fused)
        return policy

    def _load_prompts(self) -> Prompts:
        data, models = self.config.data, filter(None, (self.policy, self.teacher))
        contexts = [length for length in map(context_length, models) if length is not None]
        longest = min([data.max_length, *contexts])
        room = longest - self.rounds.sampling.max_new_tokens
        note: Callable[[str], object] = self.display.note
        train = load_prompts("data.train", str(data.train), self.tokenizer, room, note)
        held_out: list[Prompt] = []
        if data.eval is not None:
            held_out = load_prompts(
                "data.eval", str(data.eval), self.tokenizer, room, note, self.rounds.eval_prompts
            )
        return Prompts(train, held_out)

    def _plan_memory(self, usable: int, resumed: Path | None) -> None:
        """Choose layout and micro-batch by the largest group that a round may have."""
        config, sampling = self.config, self.rounds.sampling
        longest = max(self.prompts.train, key=lambda prompt: len(prompt.ids))
        largest = worst_case(
            self.loss.kind,
            self.cache,
            longest.ids.tolist(),
            sampling.max_new_tokens,
            sampling.samples,
        )
        for policy in filter(None, (self.policy, self.teacher)):
            choose_layout(
                policy,
                config.training,
                config.model.attn_implementation,
                [largest],
                self.display,
                notes_savings=False,
            )
        self.memory = MemoryBudget(
            config, self.policy, len(self.tokenizer), usable, [largest], self.display, resumed
        )
