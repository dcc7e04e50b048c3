"""Completions of a few held-out prompts at every evaluation, for people to read.

They are greedy, so that they differ by the weights alone, and go to `samples.jsonl` of the run
directory: one JSON object per completion, with the step of the evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from transformers import PreTrainedTokenizerBase

from fastpref import distributed, metrics
from fastpref.config import ConfigError
from fastpref.config.evaluation import Evaluation
from fastpref.data.dataset import TokenGroup
from fastpref.model.generate import text_after, until_end
from fastpref.model.policy import Policy, context_length
from fastpref.training.setup import TrainingSetup
from fastpref.utils.errors import first_line

FILE = "samples.jsonl"
_SEARCHED = 10_000  # groups among which the prompts are looked for


class Samples:
    """Prompts of an evaluation, and the file of their completions."""

    def __init__(
        self,
        groups: list[TokenGroup],
        max_new_tokens: int,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        file: metrics.JsonLines | None,
        note: Callable[[str], object],
    ) -> None:
        self._groups, self._max_new_tokens = groups, max_new_tokens
        self._policy, self._tokenizer = policy, tokenizer
        self._file, self._note = file, note
        self._ends = _end_tokens(policy, tokenizer, groups)

    @classmethod
    def of(
        cls, options: Evaluation, run: TrainingSetup, step: int, note: Callable[[str], object]
    ) -> Samples:
        """Samples of a run that is at `step`, whose later completions are written again.

        Raises ConfigError if no prompt leaves room for a completion.
        """
        groups: list[TokenGroup] = []
        file = None
        if options.samples is not None and run.eval is not None:
            data = run.eval.groups
            count = min(len(data), _SEARCHED)
            context = context_length(run.policy)
            room = None if context is None else context - options.max_new_tokens
            groups = _different(map(data.__getitem__, range(count)), options.samples, room)
            if not groups:
                raise ConfigError(
                    "evaluation.samples: no prompt of data.eval leaves room for "
                    f"{options.max_new_tokens:,} tokens; lower evaluation.max_new_tokens, or "
                    "remove evaluation.samples"
                )
            if distributed.is_main_process():
                file = metrics.JsonLines(run.folder / FILE, step)
        return cls(groups, options.max_new_tokens, run.policy, run.tokenizer, file, note)

    def write(self, step: int) -> None:
        """Complete the prompts and write a line for each; on all ranks.

        Where the model cannot generate, the first failure is noted and later calls do nothing.
        """
        # Ranks that have all weights need not run the same passes.
        if not self._groups or (self._file is None and not self._policy.sharded):
            return
        prompts = [group.prompt.tolist() for group in self._groups]
        try:
            completions = self._policy.complete(prompts, self._ends, self._max_new_tokens)
        except Exception as error:  # architectures fail in generation in ways of their own
            self._groups = []
            self._note(f"note: no samples, for the model cannot generate: {first_line(error)}")
            return
        for group, tokens in zip(self._groups, completions, strict=True):
            ids = until_end(tokens, self._ends)
            if self._file is not None:
                self._file.log(
                    {
                        "step": step,
                        "prompt": self._tokenizer.decode(group.prompt.tolist()),
                        "completion": text_after(self._tokenizer, group.prompt, ids),
                        "tokens": len(ids),
                        "finished": int(ids[-1]) in self._ends,
                    }
                )


def _different(groups: Iterable[TokenGroup], count: int, room: int | None) -> list[TokenGroup]:
    """First groups with different prompts that are not empty and leave room for a completion."""
    chosen: dict[tuple[int, ...], TokenGroup] = {}
    for group in groups:
        if len(chosen) == count:
            break
        if len(group.prompt) and (room is None or len(group.prompt) <= room):
            chosen.setdefault(tuple(group.prompt.tolist()), group)
    return list(chosen.values())


def _end_tokens(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, groups: list[TokenGroup]
) -> set[int]:
    """Tokens that end a completion: of the model, the tokenizer, and responses of the data."""
    generation = getattr(policy.base, "generation_config", None)  # classifiers have none
    eos = generation.eos_token_id if generation is not None else None
    ends = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id}
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for group in groups:
        # A chat template may put a line break behind the token that ends an answer.
        for response in group.responses:
            ends.update(special.intersection(response[-2:].tolist()))
    return ends - {None}
