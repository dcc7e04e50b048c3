"""Adapters of reward models: which of them have a head, and which may go without.

peft keeps the head of a classifier beside the adapter, as a module that is saved in full. An
adapter that lost it, such as one that was trained without `modules_to_save`, is not the model that
was trained: with a random head, its rewards mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastpref import config as configs
from fastpref.model.policy import Policy
from fastpref.model.reward_policy import HEAD, RewardPolicy
from fastpref.utils.errors import ModelError

# Names of heads; peft adds all of them to the adapter of any classifier.
_HEADS = {HEAD, "classifier"}


def has_only_heads(adapter_config: Any) -> bool:
    """Whether an adapter saves modules in full, and these are heads of a classifier."""
    saved = set(adapter_config.modules_to_save or ())
    return HEAD in saved and saved <= _HEADS


def check_head_of_adapter(adapter_config: Any, model_config: Any, path: str) -> None:
    """Raise ModelError for an adapter that was trained with a head that it has lost.

    The adapter of a language model never had one, and beside the adapter of a classifier may be the
    trained head of its base.
    """
    kind = getattr(adapter_config.task_type, "value", adapter_config.task_type)
    if has_only_heads(adapter_config) or kind == "CAUSAL_LM" or is_classifier(model_config):
        return
    raise ModelError(
        f"adapter.path: {path} has no head ({HEAD}) and is no adapter of a language model (its "
        f"task_type is {kind}); train it again with modules_to_save: [{HEAD}], or use an adapter "
        "with a head"
    )


def is_classifier(model_config: Any) -> bool:
    """Whether the files of a model are those of a sequence classifier."""
    kinds = getattr(model_config, "architectures", None) or ()
    return any(kind.endswith("ForSequenceClassification") for kind in kinds)


def announce_head(
    policy: Policy, adapter: configs.Adapter | None, say: Callable[[str], None]
) -> None:
    """Note where an adapter that goes on brings no head."""
    if not isinstance(policy, RewardPolicy) or adapter is None or adapter.path is None:
        return
    if not policy.has_loaded_head:
        source = "that of the model" if is_classifier(policy.base.config) else "a random one"
        say(f"note: the adapter at {adapter.path} has no head; training begins with {source}")
