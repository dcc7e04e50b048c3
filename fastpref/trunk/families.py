"""Reads a decoder layer of Hugging Face: its modules and constants, by name.

Everything in a layer must be known: its children, their types, hooks, dropout, adapters. Anything
else raises `UnknownLayer`, so that no part of a model is silently left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from torch import nn

from fastpref.trunk.attention import AttentionLayer, Heads
from fastpref.trunk.block import Block
from fastpref.trunk.gated import Activation
from fastpref.trunk.layer import NormModule
from fastpref.trunk.linear import LinearGroup, UnknownLayer, active_adapter, base_layer
from fastpref.trunk.mlp import MlpLayer
from fastpref.trunk.norm import Norm

# Names of a layer's norms, in the roles of attention (N1 and N2) and of MLP (N3 and N4).
_PRE_NORM = {"input": "input_layernorm"}, {"input": "post_attention_layernorm"}
_POST_NORM = {"output": "post_attention_layernorm"}, {"output": "post_feedforward_layernorm"}
_FOUR_NORMS = (
    {"input": "input_layernorm", "output": "post_attention_layernorm"},
    {"input": "pre_feedforward_layernorm", "output": "post_feedforward_layernorm"},
)
FAMILIES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "phi3": _PRE_NORM,
    "gemma2": _FOUR_NORMS,
    "gemma3": _FOUR_NORMS,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
}
# Families whose layers read their window from the config of the model.
_WINDOW_OF_CONFIG = frozenset({"mistral", "phi3"})


def family_of(layer: nn.Module) -> str:
    """Name of a decoder layer's architecture; raises UnknownLayer for one that is not known."""
    package, _, _ = type(layer).__module__.rpartition(".")
    parent, _, family = package.rpartition(".")
    if parent != "transformers.models" or family not in FAMILIES:
        raise UnknownLayer(f"layers of type {type(layer).__name__} are not known")
    if not type(layer).__name__.endswith("DecoderLayer"):
        raise UnknownLayer(f"{type(layer).__name__} is no decoder layer")
    return family


def read_block(layer: nn.Module) -> Block:
    """Read a decoder layer, possibly with LoRA adapters; raises UnknownLayer."""
    family = family_of(layer)
    attention_norms, mlp_norms = FAMILIES[family]
    parts: Any = layer
    for module in layer.modules():
        check_hooks(module)
    for module in (layer, parts.self_attn, parts.mlp):
        _check_forward(module, family)
    norm_names = {*attention_norms.values(), *mlp_norms.values()}
    _check_children(layer, {"self_attn", "mlp", *norm_names}, optional=_dropouts(layer))
    return Block(
        layer,
        _read_attention(parts.self_attn, _read_norms(parts, attention_norms, family), family),
        _read_mlp(parts.mlp, _read_norms(parts, mlp_norms, family)),
        getattr(parts.self_attn, "layer_type", getattr(parts.self_attn, "attention_type", None)),
    )


def read_norm(module: Any, family: str) -> NormModule:
    """Read an RMSNorm; raises UnknownLayer for another norm."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    names = [name for name, _ in module.named_parameters()]
    if not type(module).__name__.endswith("RMSNorm") or eps is None or names != ["weight"]:
        raise UnknownLayer(f"the norm {type(module).__name__} is not known")
    check_hooks(module)
    _check_forward(module, family)
    return NormModule(module, Norm(eps, 1.0 if family.startswith("gemma") else 0.0))


def _read_attention(attention: Any, norms: Mapping[str, NormModule], family: str) -> AttentionLayer:
    fused = ["qkv_proj"] if family == "phi3" else ["q_proj", "k_proj", "v_proj"]
    normalizes = hasattr(attention, "q_norm")
    expected = {*fused, "o_proj", *(("q_norm", "k_norm") if normalizes else ())}
    _check_children(attention, expected)
    config = attention.config
    if not attention.is_causal:
        raise UnknownLayer("attention that is not causal is not known")
    if attention.attention_dropout:
        raise UnknownLayer("dropout in the attention is not known")
    if normalizes:
        norms = {
            **norms,
            "q": read_norm(attention.q_norm, family),
            "k": read_norm(attention.k_norm, family),
        }
    window = config if family in _WINDOW_OF_CONFIG else attention
    layers = {"qkv" if family == "phi3" else name[0]: _linear(attention, name) for name in fused}
    heads = Heads(
        queries=config.num_attention_heads,
        keys=config.num_key_value_heads,
        size=attention.head_dim,
        norm_each=normalizes and len(attention.q_norm.weight) == attention.head_dim,
        scale=attention.scaling,
        window=getattr(window, "sliding_window", None),
        softcap=attention.attn_logit_softcapping if family == "gemma2" else None,
    )
    o = LinearGroup({"o": _linear(attention, "o_proj")})
    return AttentionLayer(LinearGroup(layers), o, norms, heads)


def _read_mlp(mlp: Any, norms: Mapping[str, NormModule]) -> MlpLayer:
    fused = hasattr(mlp, "gate_up_proj")
    names = ["gate_up_proj"] if fused else ["gate_proj", "up_proj"]
    activation = "activation_fn" if fused else "act_fn"
    _check_children(mlp, {*names, "down_proj", activation})
    return MlpLayer(
        gate_up=LinearGroup({name.removesuffix("_proj"): _linear(mlp, name) for name in names}),
        down=LinearGroup({"down": _linear(mlp, "down_proj")}),
        norms=norms,
        activation=_read_activation(getattr(mlp, activation)),
    )


def _read_norms(layer: Any, names: Mapping[str, str], family: str) -> dict[str, NormModule]:
    return {role: read_norm(getattr(layer, name), family) for role, name in names.items()}


def _linear(parent: nn.Module, name: str) -> nn.Module:
    """A linear layer with what its adapter may have; raises UnknownLayer."""
    layer: Any = getattr(parent, name)
    base = base_layer(layer)
    # bitsandbytes' type is compared by name, since the package may not be installed.
    if type(base) is not nn.Linear and type(base).__name__ != "Linear4bit":
        raise UnknownLayer(f"{name} is a {type(base).__name__}, which is not known")
    if layer is base:
        return base
    if type(layer).forward.__module__.rpartition(".")[0] != "peft.tuners.lora":
        raise UnknownLayer(f"{name} has an adapter that is not LoRA ({type(layer).__name__})")
    if layer.lora_variant or layer.lora_magnitude_vector:
        raise UnknownLayer(f"{name} has a variant of LoRA, such as DoRA")
    if any(type(dropout) is not nn.Identity for dropout in layer.lora_dropout.values()):
        raise UnknownLayer(f"{name} has dropout before its adapter")
    if any(layer.lora_bias.values()) or layer.fan_in_fan_out or layer.merged:
        raise UnknownLayer(f"{name} has an adapter with a bias, or one that is merged")
    active_adapter(name, layer)
    return layer


def _read_activation(module: nn.Module) -> Activation:
    name = type(module).__name__
    if name in ("SiLUActivation", "SiLU"):
        return "silu"
    if name == "GELUTanh":
        return "gelu_tanh"
    raise UnknownLayer(f"the activation {name} is not known")


def _check_children(
    module: nn.Module, expected: Set[str], optional: Set[str] = frozenset()
) -> None:
    """Raise UnknownLayer unless a module has these children, and no parameter of its own."""
    children = {name for name, _ in module.named_children()}
    unexpected = (children ^ expected) - optional
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if unexpected or own:
        part = min([*unexpected, *own])
        raise UnknownLayer(f"{type(module).__name__} with or without a part {part} is not known")


def _dropouts(layer: nn.Module) -> set[str]:
    """Names of a layer's dropouts, which must drop nothing."""
    return {
        name
        for name, module in layer.named_children()
        if isinstance(module, nn.Dropout) and module.p == 0
    }


def _check_forward(module: nn.Module, family: str) -> None:
    """Raise UnknownLayer if the forward pass of a module's class is not that of transformers."""
    package: str = type(module).forward.__module__
    if not package.startswith(f"transformers.models.{family}."):
        raise UnknownLayer(f"the forward pass of {type(module).__name__} is one of {package}")


def check_hooks(module: nn.Module) -> None:
    """Raise UnknownLayer for a module with hooks, or whose forward pass was replaced."""
    if any(hook_tables(module)):
        raise UnknownLayer(f"a hook of {type(module).__name__} would not run")
    if "forward" in vars(module):
        raise UnknownLayer(f"the forward pass of {type(module).__name__} was replaced")


def hook_tables(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """Hooks of a module by their numbers, one live mapping for each kind."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
