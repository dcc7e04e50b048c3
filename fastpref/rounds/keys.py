"""Keys of the files of a run, each a hash of everything that determines the content.

The weights of a round are named by what made them: the start, and the pairs and the options of the
training of all rounds before.
"""

from __future__ import annotations

import json
from typing import Any

from fastpref.config import Config, ConfigError
from fastpref.data.dataset import tokenizer_fingerprint
from fastpref.data.prompts import Prompt
from fastpref.rounds.artifacts import Row
from fastpref.utils.atomic_files import sha256

# Fields without an effect on the files.
_WITHOUT_EFFECT = {
    "training": {
        "output_dir",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "export_every",
        "report_to",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "activation_checkpointing",
    },
    "data": {"train", "eval", "cache"},
    "parallel": True,
    "evaluation": True,
    "monitor": True,
    "resume": True,
    "rounds": {
        "count": True,
        "eval_prompts": True,
        "sampling": True,
        # What decides the answers is in the fingerprint of the scorer.
        "scorer": {"judge": True},
    },
}
_OF_SAMPLES = {"engine", "model", "samples", "temperature", "top_p", "max_new_tokens", "seed"}


class Keys:
    """Keys of one run.

    weights: fingerprints of the files that the run starts from. total_steps: of all rounds.
    """

    def __init__(
        self,
        config: Config,
        weights: dict[str, str],
        tokenizer: Any,
        scorer: str,
        total_steps: int,
    ) -> None:
        assert config.rounds is not None
        rounds = config.rounds
        self._training = config.model_dump(mode="json", exclude=_WITHOUT_EFFECT)  # type: ignore[arg-type]
        schedule = config.optim
        if schedule.schedule != "constant" or schedule.warmup_ratio is not None:
            self._training["total_steps"] = total_steps
        self._sampling = rounds.sampling.model_dump(include=_OF_SAMPLES)
        if rounds.sampling.engine == "transformers":
            self._sampling["batch_size"] = rounds.sampling.batch_size
        self._scorer = scorer
        self._start: list[Any] = [weights, tokenizer_fingerprint(tokenizer)]
        if config.model.init == "random":  # there are no files
            self._start.append([config.model.config, config.training.seed])

    def weights(self, number: int, prompts: list[str]) -> str:
        """Key of the weights after round `number`, 0 for the start.

        prompts: keys of the prompts of the rounds up to it.
        """
        taken = [self._training, self._sampling, self._scorer, prompts[:number]]
        return _key("weights", self._start, taken if number else [])

    def samples(self, weights: str, prompts: str, samples: int, seed: int) -> str:
        return _key("samples", weights, prompts, {**self._sampling, "samples": samples}, seed)

    def scores(self, samples: str) -> str:
        return _key("scores", samples, self._scorer, self._training["rounds"]["scorer"])

    def opponents(self, samples: str) -> str:
        return _key("opponents", samples, self._of_steps)

    def rollouts(self, scores: str) -> str:
        """Key of all that the steps of a round take from its start."""
        return _key("rollouts", scores, self._of_steps)

    @property
    def _of_steps(self) -> list[Any]:
        """Options that, with the weights, decide log-probs, the reference and what is asked of it.

        Those of the model and the adapter too: the same files in another dtype, or in 4 bits, have
        other log-probs.
        """
        training = self._training
        names = ("loss", "reference", "model", "adapter")
        return [*(training[name] for name in names), training["rounds"]["reference"]]

    def pairs(self, scores: str) -> str:
        rounds = self._training["rounds"]
        return _key("pairs", scores, rounds["pairs"], rounds["min_gap"], self._of_steps)

    @property
    def inputs(self) -> Row:
        """Everything that decides the files of the rounds, to compare with an earlier process."""
        return {
            "training": self._training,
            "sampling": self._sampling,
            "scorer": self._scorer,
            "start": self._start,
        }


def prompts_key(prompts: list[Prompt]) -> str:
    """Key of the prompts of a round."""
    return _key("prompts", [[prompt.row, prompt.ids.tolist()] for prompt in prompts])


def check_same(saved: Row, inputs: Row, folder: object) -> None:
    """Raise ConfigError where a run would go on with other inputs than it began with."""
    old, new = _flat(saved), _flat(inputs)
    differences = [
        f"{name}: {old.get(name)} → {new.get(name)}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    if differences:
        raise ConfigError(
            f"resume: the rounds in {folder} began with other settings ({', '.join(differences)}); "
            "restore them, or choose another training.output_dir"
        )


def _flat(values: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(values, dict):
        return {prefix.rstrip("."): str(values)}
    flat: dict[str, str] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.")
    return flat


def _key(*parts: Any) -> str:
    return sha256(*(json.dumps(part, sort_keys=True) for part in parts))
