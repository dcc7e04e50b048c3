"""Refuse, before anything is loaded, what `fastpref rounds` does not do."""

from __future__ import annotations

from fastpref.config import Config, ConfigError, Data
from fastpref.distributed import started_ranks
from fastpref.losses import Objective
from fastpref.losses.groupwise import PROS
from fastpref.losses.normalized import SFT
from fastpref.losses.on_policy import GSPO, RLOO, NashMD
from fastpref.losses.rollout import DistillationOptions, GRPOOptions, PPOOptions

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
    ranks = started_ranks()
    if loss.of_rollouts and ranks > 1:
        raise ConfigError(
            f"loss: {loss.name} runs on one rank here, and there are {ranks}; start one process "
            "without torchrun or srun (servers may draw the samples on other GPUs)"
        )
    if loss.of_rollouts:
        _check_rollouts(config, loss)
    pulls = loss.needs_reference and isinstance(loss, RLOO | NashMD | GRPOOptions)
    if pulls and _has_one_step(config) and rounds.reference_mode == "round":
        raise ConfigError(
            f"rounds.reference: the penalty of {loss.name} has no gradient in the only step of a "
            "round if it pulls to the round's own start; set rounds.reference=start, or raise "
            "rounds.steps"
        )
    if pulls and rounds.reference in ({"every": 1}, {"ema": 0.0}):
        raise ConfigError(
            f"rounds.reference: the penalty of {loss.name} has no gradient if the reference is set "
            f"to the policy before every step, got {rounds.reference}; set rounds.reference=start"
        )
    if isinstance(loss, GSPO) and rounds.reference_mode != "round":
        raise ConfigError(
            f"rounds.reference: the ratios of {loss.name} are to the policy that sampled, got "
            f"{rounds.reference_mode}; set rounds.reference=round"
        )
    compares = not loss.of_rollouts or isinstance(loss, GRPOOptions)
    if rounds.sampling.samples < 2 and compares:
        raise ConfigError(
            f"rounds.sampling.samples: {loss.name} compares the completions of a prompt, got 1; "
            "set 2 or more"
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


def _check_rollouts(config: Config, loss: Objective) -> None:
    rounds = config.rounds
    assert rounds is not None
    for option in ("pairs", "min_gap"):
        if getattr(rounds, option) != type(rounds).model_fields[option].default:
            raise ConfigError(
                f"rounds.{option}: {loss.name} learns from all completions and has no pairs; "
                "remove it"
            )
    if isinstance(loss, DistillationOptions) and not loss.teacher:
        raise ConfigError(
            "loss.teacher: is missing; name the folder or Hub name of a model with the same tokens"
        )
    if isinstance(loss, DistillationOptions) and config.reference_mode != "none":
        raise ConfigError(
            f"reference: {config.reference_mode}, but distillation has a teacher and no reference; "
            "remove it"
        )
    if config.reference_mode == "none":
        if rounds.reference_mode != "round":
            raise ConfigError(
                f"rounds.reference: {loss.name} has no KL penalty here and no other use of a "
                "reference; remove it"
            )
    elif isinstance(loss, PPOOptions) and loss.kl_coef and rounds.reference_mode != "start":
        raise ConfigError(
            f"rounds.reference: the KL penalty of {loss.name} is that of the policy which sampled, "
            f"got {rounds.reference_mode}, to which it is 0 or nearly so; set "
            "rounds.reference=start, or loss.kl_coef=0"
        )
    elif isinstance(loss, NashMD):
        _check_mixture(config, loss.name)


def _check_mixture(config: Config, name: str) -> None:
    rounds = config.rounds
    assert rounds is not None
    if rounds.reference_mode == "round":
        raise ConfigError(
            f"rounds.reference: the opponents of {name} are drawn from the policy and the "
            "reference, which is the policy at the start of a round; set rounds.reference=start, "
            "or loss.mixture=0"
        )
    for option, usual in {"engine": "transformers", "temperature": 1.0, "top_p": 1.0}.items():
        value = getattr(rounds.sampling, option)
        if value != usual:
            raise ConfigError(
                f"rounds.sampling.{option}: the opponents of {name} are drawn in this process, at "
                f"temperature 1, got {value}; remove it, or set loss.mixture=0"
            )


def _has_one_step(config: Config) -> bool:
    """Whether a round has certainly one optimizer step."""
    rounds = config.rounds
    assert rounds is not None
    if rounds.prompts is None:
        return rounds.steps == 1
    return rounds.steps_of_round(rounds.prompts, config.training.batch_size) == 1


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
