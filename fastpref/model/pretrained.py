"""Pretrained models: on any number of ranks the weights that `from_pretrained` loads on one.

transformers renames, converts and ties weights as the architecture and the files at hand demand:
it fuses the weights of single experts, for example, or keeps a head apart that the files have
although config.json says that it is the embeddings. For a sharded model only rank 0 calls it, on
the CPU, and `fsdp.load` sends one weight after the other to the ranks, which keep their shards.

So the main memory of the machine of rank 0 has to hold one copy of the model in its stored dtype,
whatever the number of ranks: 32 GB for 8B parameters in fp32, 280 GB for 70B, half of that in bf16
for adapters. Slices of the files read by every rank would take less, but a conversion can fuse,
transpose or split a weight along the dimension that is sharded, so that slices are not enough; and
which ones do differs between versions of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastpref import distributed
from fastpref.utils.errors import ModelError, UserError

CLASSIFIER_HEAD = "score.weight"  # of the sequence classifiers of transformers


class _Structure(NamedTuple):
    """Ties and dtypes of a loaded model, which rank 0 tells the other ranks."""

    owners: dict[str, str]  # for each parameter, the first name of the same parameter
    dtypes: dict[str, str]  # of parameters and buffers
    tied: list[bool | None]  # `tie_word_embeddings` of the configs


def auto_model(classifies: bool) -> Any:
    """The class of transformers that builds causal language models, or sequence classifiers."""
    return AutoModelForSequenceClassification if classifies else AutoModelForCausalLM


def read_pretrained(
    path: str, config: Any, options: dict[str, Any], classifies: bool = False
) -> Any:
    """Load a model with `from_pretrained`; its config says whether the head is really tied.

    options: arguments of `from_pretrained`.
    classifies: load a sequence classifier, whose head may be missing, and is then random.

    Raises ModelError for missing weights, which transformers would initialize at random.
    """
    loaded: Any = auto_model(classifies).from_pretrained(
        path, config=config, output_loading_info=True, **options
    )
    causal_lm, loading = loaded
    new = {CLASSIFIER_HEAD} if classifies else set()
    _check_complete(path, set(loading["missing_keys"]) - new)
    if not classifies and not _has_its_ties(causal_lm):
        _set_tied(causal_lm.config, [False, False])
    return causal_lm


def read_on_main_process(
    read: Callable[[], Any], config: Any, options: dict[str, Any], classifies: bool = False
) -> tuple[Any, dict[str, Tensor]]:
    """Empty model with the structure of the one that `read` loads on rank 0, a collective.

    Returns the model, whose weights are on the meta device, and on rank 0 also all weights and
    buffers by name, on the CPU. Raises the UserError of rank 0 on every rank.
    """
    source, structure, problem = None, None, ""
    if distributed.is_main_process():
        try:
            source = read()
            structure = _structure(source)
        except UserError as error:
            problem = str(error)
    structure, problem = distributed.broadcast((structure, problem))
    if structure is None:
        raise ModelError(problem)
    structure = _Structure(*structure)
    _set_tied(config, structure.tied)
    causal_lm = build_empty(config, options, classifies)
    _arrange(causal_lm, structure)
    if source is None:
        return causal_lm, {}
    # An export writes the names and shapes of the files, as `save_pretrained` does.
    causal_lm._weight_conversions = getattr(source, "_weight_conversions", None)
    return causal_lm, _named_tensors(source)


def build_empty(config: Any, options: dict[str, Any], classifies: bool = False) -> Any:
    """Build a model whose weights are on the meta device; buffers are allocated."""
    with init_empty_weights(include_buffers=False):
        causal_lm = auto_model(classifies).from_config(config, **options)
    causal_lm.tie_weights()
    return causal_lm


def _check_complete(path: str, missing: Collection[str]) -> None:
    """Raise ModelError for missing weights, which transformers would initialize at random."""
    if missing:
        raise ModelError(
            f"model.path: {path} has no weights named {min(missing)} (of {len(missing)} that are "
            "missing); are its files complete, and of this config.json?"
        )


def _has_its_ties(causal_lm: Any) -> bool:
    """Whether any of the weights are tied that the config says are; True if it says none are."""
    if not any(getattr(part, "tie_word_embeddings", False) for part in _configs(causal_lm.config)):
        return True
    parameters = dict(causal_lm.named_parameters(remove_duplicate=False))
    pairs = causal_lm.get_expanded_tied_weights_keys(all_submodels=True).items()
    ties = [(parameters[a], parameters[b]) for a, b in pairs if a in parameters and b in parameters]
    head, embeddings = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    if not ties:  # of an architecture that never ties them
        ties = [(getattr(head, "weight", None), getattr(embeddings, "weight", None))]
    return any(first is second for first, second in ties)


def _configs(config: Any) -> list[Any]:
    """A config and that of its text model, which may be the same."""
    return [config, config.get_text_config()]


def _set_tied(config: Any, tied: list[bool | None]) -> None:
    """Set `tie_word_embeddings` in the configs that have it."""
    for part, value in zip(_configs(config), tied, strict=True):
        if hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = value


def _named_tensors(causal_lm: Any) -> dict[str, Tensor]:
    """Parameters and buffers by all of their names, detached."""
    tensors = [
        *causal_lm.named_parameters(remove_duplicate=False),
        *causal_lm.named_buffers(remove_duplicate=False),
    ]
    return {name: tensor.detach() for name, tensor in tensors}


def _structure(causal_lm: Any) -> _Structure:
    first: dict[int, str] = {}
    owners = {
        name: first.setdefault(id(parameter), name)
        for name, parameter in causal_lm.named_parameters(remove_duplicate=False)
    }
    tensors = _named_tensors(causal_lm)
    dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()}
    tied = [getattr(part, "tie_word_embeddings", None) for part in _configs(causal_lm.config)]
    return _Structure(owners, dtypes, tied)


def _arrange(causal_lm: nn.Module, structure: _Structure) -> None:
    """Tie and cast the parameters and buffers of an empty model in place."""
    parameters = dict(causal_lm.named_parameters(remove_duplicate=False))
    owned: dict[str, nn.Parameter] = {}
    for name, owner in structure.owners.items():
        if owner not in owned:
            dtype = getattr(torch, structure.dtypes[owner])
            empty = torch.empty_like(parameters[owner].data, dtype=dtype)
            owned[owner] = nn.Parameter(empty, parameters[owner].requires_grad)
        _set(causal_lm, name, owned[owner])
    for name, buffer in list(causal_lm.named_buffers(remove_duplicate=False)):
        _set(causal_lm, name, buffer.to(getattr(torch, structure.dtypes[name])))


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, tensor)
