"""The teacher of on-policy distillation: loaded once, frozen, with the tokens of the policy."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastpref.config import Config, ConfigError
from fastpref.model.load import load_policy
from fastpref.model.policy import Policy
from fastpref.training.setup import device_of
from fastpref.utils.errors import ModelError
from fastpref.utils.progress import Display


def load_teacher(
    config: Config, path: str, tokenizer: PreTrainedTokenizerBase, display: Display
) -> Policy:
    """Load the model at `path` with the options of `model`, its weights in the compute dtype.

    Raises ConfigError for a model with another tokenizer, and ModelError if it cannot be loaded.
    """
    path = os.path.expanduser(path)
    _check_tokens(config, path, tokenizer, display)
    model = config.model.model_copy(update={"path": path, "init": "pretrained", "config": None})
    device = device_of(config.training.device)
    try:
        teacher = load_policy(model, tokenizer, device, config.training, config.parallel)
    except ModelError as error:
        raise ModelError(str(error).replace("model.path", "loss.teacher", 1)) from None
    for parameter in teacher.parameters():
        parameter.data = parameter.data.to(teacher.compute_dtype)
    count = sum(parameter.numel() for parameter in teacher.parameters())
    display.note(f"teacher: {path}, {count:,} weights, stays in memory")
    return teacher.eval().requires_grad_(False)


def check_vocabulary(teacher: Policy, policy: Policy) -> None:
    """Raise ConfigError for heads of different sizes."""
    if teacher.vocabulary != policy.vocabulary:
        raise ConfigError(
            f"loss.teacher: its head has {teacher.vocabulary:,} tokens, and that of the model "
            f"{policy.vocabulary:,}; use two models of one family"
        )


def _check_tokens(
    config: Config, path: str, tokenizer: PreTrainedTokenizerBase, display: Display
) -> None:
    trusts = config.model.trust_remote_code
    try:
        theirs: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=trusts)
    # transformers and the Hub raise unrelated types.
    except Exception:
        display.note(f"note: {path} has no tokenizer to compare; its tokens must be the model's")
        return
    ours, others = (
        {index: token for token, index in each.get_vocab().items()} for each in (tokenizer, theirs)
    )
    for index in sorted(ours.keys() & others.keys()):
        if ours[index] != others[index]:
            raise ConfigError(
                f"loss.teacher: token {index:,} is {others[index]!r} in {path} and {ours[index]!r} "
                "in the model; use two models with one tokenizer"
            )
