"""Shard the policy over ranks with FSDP2; no GPU ever holds the full weights.

Each block is gathered for its forward and backward pass and then resharded. The other weights
(embeddings, last norm, head) belong to the root module and stay gathered for a whole forward pass,
in which the head's log-probs and the scores of Reward Calibration are computed. Trained weights are
fp32, gathered weights and computation use the compute dtype, and gradients are reduced in fp32.
Gradients are summed, not averaged: the loss of a step is divided by its groups on all ranks.

Adapters are small and replicated on every rank; `fastpref.training.step_gradient` all-reduces their
gradients once per step. With `parallel.shard: 1`, which a quantized base needs, all weights are
replicated in this way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from fastpref import config as configs
from fastpref import distributed
from fastpref.config import ConfigError
from fastpref.model.policy import FORWARD_METHODS, Policy
from fastpref.trunk.model import BLOCK_METHOD


def make_mesh(options: configs.Parallel, device: torch.device) -> DeviceMesh | None:
    """Device mesh of all ranks, or None if each rank has the whole model.

    Raises ConfigError unless `replicate · shard` is the number of ranks.
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
    """Shard the policy's weights over the mesh in place; they may be on the meta device."""
    compute_dtype = policy.compute_dtype
    offload = options.cpu_offload and mesh.device_type != "cpu"
    fsdp_options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute_dtype,
            reduce_dtype=torch.promote_types(compute_dtype, torch.float32),
        ),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
        "ignored_params": set(policy.replicated_parameters()),
    }
    for block in policy.blocks():
        fully_shard(block, reshard_after_forward=options.reshard_after_forward, **fsdp_options)
        if policy.trunk is not None:
            register_fsdp_forward_method(block, BLOCK_METHOD)
    fully_shard(policy, **fsdp_options)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # These methods run forward passes of the root too.
    for method in FORWARD_METHODS:
        register_fsdp_forward_method(policy, method)
    policy.sharded = True


def materialize(policy: Policy, device: torch.device) -> None:
    """Allocate uninitialized memory for shards on the meta device; tied parameters stay tied."""
    allocated: dict[int, nn.Parameter] = {}
    for module in policy.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            if id(parameter) not in allocated:
                allocated[id(parameter)] = _empty_like(parameter, device)
            setattr(module, name, allocated[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


@torch.no_grad()
def load(policy: Policy, weights: dict[str, Tensor]) -> None:
    """Fill the base with the weights and buffers of rank 0, one after the other, a collective.

    weights: by name in the base, on rank 0; they are removed.
    """
    buffers = {_plain_name(name): buffer for name, buffer in policy.base.named_buffers()}
    for name, target in (base_weights(policy) | buffers).items():
        full = torch.empty(target.shape, dtype=target.dtype, device=_device_to_send_on(target))
        if distributed.is_main_process():
            full.copy_(weights.pop(name))
        dist.broadcast(full, 0)
        if isinstance(target, DTensor):
            shard = distribute_tensor(
                full, target.device_mesh, target.placements, src_data_rank=None
            )
            target.to_local().copy_(shard.to_local())
        else:
            target.copy_(full)


def _device_to_send_on(tensor: Tensor) -> torch.device:
    """Device of collectives: that of the mesh, although shards may be offloaded to the CPU."""
    if isinstance(tensor, DTensor):
        return torch.device(tensor.device_mesh.device_type)
    return tensor.device


def base_weights(policy: Policy) -> dict[str, Tensor]:
    """Weights and persistent buffers of the base by name, without adapters; tied ones once."""
    policy.to_shards()
    base = policy.base
    adapters = {id(parameter) for parameter in policy.adapter_parameters()}
    persistent = base.state_dict().keys()
    tensors = [
        (name, parameter.detach())
        for name, parameter in base.named_parameters()
        if id(parameter) not in adapters
    ]
    tensors += [(name, buffer) for name, buffer in base.named_buffers() if name in persistent]
    return {_plain_name(name): tensor for name, tensor in tensors}


def _plain_name(name: str) -> str:
    """Name in a model without adapters."""
    return name.replace(".base_layer", "")


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on every rank, a collective; return other tensors unchanged."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Shards may be offloaded to the CPU, whose collectives the mesh does not run.
    on_mesh: Any = tensor.to(tensor.device_mesh.device_type)
    full: Tensor = on_mesh.full_tensor()
    return full


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, in the same memory; other tensors unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _empty_like(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    local: Any = parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
    empty: Any = torch.empty_like(local, device=device)
    if isinstance(parameter, DTensor):
        empty = DTensor.from_local(
            empty,
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)
