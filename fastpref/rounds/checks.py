"""Refuse, before anything is loaded, what `fastpref rounds` does not do."""

from __future__ import annotations

from fastpref.config import Config, ConfigError, Data
from fastpref.distributed import started_ranks
from fastpref.losses.groupwise import PROS
from fastpref.losses.normalized import SFT
from fastpref.losses.on_policy import GSPO, RLOO, NashMD

# Options of the data that concern prompts.
_OF_PROMPTS = {
    "train",
    "eval",
    "max_length",
    "chat_template",
    "template_date",
    "cache",
}


def check(config: Config) -> None:
    """Raise ConfigError for an option that has no meaning in rounds, or no code."""
    rounds = config.rounds
    if rounds is None:
        raise ConfigError(
            "rounds: is missing; fastpref rounds needs a section such as rounds: {count: 3, "
            "scorer: {reward_model: NAME}}"
        )
    ranks = started_ranks()
    if ranks > 1:
        raise ConfigError(
            f"rounds: run in one process, and there are {ranks} ranks; start one without torchrun "
            "or srun (servers may draw the samples on other GPUs)"
        )
    _check_data(config.data)
    for option, is_set in {
        "training.steps": config.training.steps is not None,
        "training.epochs": config.training.epochs != 1,
        "training.eval_every": config.training.eval_every is not None,
        **{f"evaluation.{name}": True for name in config.evaluation.options_set()},
    }.items():
        if is_set:
            raise ConfigError(
                f"{option}: rounds have steps and evaluations of their own, rounds.steps and "
                "rounds.eval_prompts; remove it"
            )
    loss = config.build_loss()
    if isinstance(loss, SFT | PROS) or loss.of_rewards:
        raise ConfigError(
            f"loss: {loss.name} is not for rounds, whose data are scored samples of a round; use "
            "another objective"
        )
    if isinstance(loss, RLOO | NashMD) and rounds.steps == 1 and rounds.reference_mode == "round":
        raise ConfigError(
            f"rounds.reference: the penalty of {loss.name} has no gradient in the only step of a "
            "round if it pulls to the round's own start; set rounds.reference=start, or raise "
            "rounds.steps"
        )
    if isinstance(loss, GSPO) and rounds.reference_mode != "round":
        raise ConfigError(
            f"rounds.reference: the ratios of {loss.name} are to the policy that sampled, got "
            f"{rounds.reference_mode}; set rounds.reference=round"
        )
    if config.model.path is None and config.model.tokenizer is None:
        raise ConfigError(
            "model.tokenizer: rounds train no tokenizer on prompts; name one, or set model.path"
        )
    if config.reference == "cached" and rounds.reference_mode in ("every", "ema"):
        raise ConfigError(
            f"reference: cached, but rounds.reference: {rounds.reference_mode} changes the "
            "reference within a round; remove reference"
        )
    _check_server(config)


def _check_data(data: Data) -> None:
    for name in ("train", "eval"):
        value = getattr(data, name)
        if value is not None and not isinstance(value, str):
            raise ConfigError(
                f"data.{name}: rounds read the prompts of one source; write them into one file"
            )
    for name in type(data).model_fields:
        if name in _OF_PROMPTS:
            continue
        if getattr(data, name) != type(data).model_fields[name].default:
            raise ConfigError(
                f"data.{name}: is for preference data, and rounds read prompts; remove it"
            )


def _check_server(config: Config) -> None:
    assert config.rounds is not None
    sampling = config.rounds.sampling
    if sampling.engine != "server" or sampling.update_command is not None:
        return
    if config.adapter is None and sampling.protocol == "openai":
        raise ConfigError(
            "rounds.sampling.update_command: servers cannot be given full weights without one; set "
            "a command with {folder}, or train an adapter"
        )
