"""The policy over many ranks: FSDP2, from weights that no rank ever holds in full.

Every block is gathered for its own passes and then freed again; what is left, the embeddings, the
last norm and the head, belongs to the root and is there for the whole of a forward pass, so that
the head's log-probs, and the scores of Reward Calibration, are taken while it is gathered. Trained
weights are fp32, what is gathered and computed has the compute dtype, gradients are added up in
fp32. They are summed, not averaged: the loss of a step is divided by its groups on all ranks.

Adapters are small and stay whole on every rank: their gradients are added up once per step, by
`fastpref.training.step_gradient`. So are those of all weights where nothing is cut
(`parallel.shard: 1`), as it must be for a quantised base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from fastpref import config as configs
from fastpref import distributed
from fastpref.config import ConfigError
from fastpref.model.policy import Policy
from fastpref.utils.errors import ModelError


def make_mesh(options: configs.Parallel, device: torch.device) -> DeviceMesh | None:
    """The mesh of all ranks; None where each has the whole model, such as a rank alone.

    Raises ConfigError where `replicate · shard` is not their number.
    """
    world = distributed.world_size()
    replicate, shard_size = options.sizes(world)
    if replicate * shard_size != world:
        raise ConfigError(
            f"parallel: replicate {replicate} · shard {shard_size} needs {replicate * shard_size} "
            f"ranks, and there {'is' if world == 1 else 'are'} {world}"
        )
    if shard_size == 1:
        return None
    if replicate == 1:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(
        device.type, (replicate, shard_size), mesh_dim_names=("replicate", "shard")
    )


def shard(policy: Policy, mesh: DeviceMesh, options: configs.Parallel) -> None:
    """Cut the policy's weights over the mesh, in place; they may still be on the meta device."""
    compute = policy.compute_dtype
    offload = options.cpu_offload and mesh.device_type != "cpu"  # there they are already
    shared: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=torch.promote_types(compute, torch.float32)
        ),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
        "ignored_params": set(policy.adapter_parameters()),
    }
    for block in policy.blocks():
        fully_shard(block, reshard_after_forward=options.reshard_after_forward, **shared)
    fully_shard(policy, **shared)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for method in ("check_head", "packing_error"):  # also forward passes of the root
        register_fsdp_forward_method(policy, method)
    policy.sharded = True


def materialize(policy: Policy, device: torch.device) -> None:
    """Give shards on the meta device memory, without values; tied ones share it."""
    made: dict[int, nn.Parameter] = {}
    for module in policy.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = _empty(parameter, device)
            setattr(module, name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def load(policy: Policy, folder: Path) -> None:
    """Read this rank's shards of the base from the safetensors files of a Hugging Face folder.

    Raises ModelError where the files lack a weight under the name that the model has for it.
    """
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    state = base_weights(policy)
    missing = sorted(state.keys() - stored.keys())
    if missing:
        raise ModelError(
            f"model.path: {folder} has no weights named {missing[0]} (of {len(missing)} that are "
            "missing) in safetensors files, as loading on many ranks needs them; load it on one "
            "rank and save it again"
        )
    dcp.load(state, storage_reader=reader)


def base_weights(policy: Policy) -> dict[str, Tensor]:
    """Weights and buffers of the base by their names without adapters; tied ones once."""
    policy.reshard()
    base = policy.base
    adapters = {id(parameter) for parameter in policy.adapter_parameters()}
    persistent = base.state_dict().keys()
    named = [
        (name, tensor.detach())
        for name, tensor in base.named_parameters()
        if id(tensor) not in adapters
    ]
    named += [(name, tensor) for name, tensor in base.named_buffers() if name in persistent]
    return {name.replace(".base_layer", ""): tensor for name, tensor in named}


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor on every rank, which must all ask for it."""
    if not isinstance(tensor, DTensor):
        return tensor
    home: Any = tensor.to(tensor.device_mesh.device_type)  # shards may be offloaded
    full: Tensor = home.full_tensor()
    return full


def _empty(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    local: Any = parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
    made: Any = torch.empty_like(local, device=device)
    if isinstance(parameter, DTensor):
        made = DTensor.from_local(
            made,
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    return nn.Parameter(made, requires_grad=parameter.requires_grad)
