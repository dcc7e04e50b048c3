"""Devices that a run can be planned for: speed, bandwidth and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fastpref.utils.errors import UserError

# Memory that a run cannot use: CUDA context and libraries, and a share lost to fragmentation.
RUNTIME_BYTES = 2**30
FRAGMENTED = 0.05


@dataclass(frozen=True)
class Device:
    """Speed, bandwidth and memory of one device.

    flops: peak dense bf16 FLOPs per second; attainable: the share of it that a whole training step
    reaches; bandwidth: bytes per second; memory: bytes.
    """

    name: str
    flops: float
    attainable: float
    bandwidth: float
    memory: int

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"

    @property
    def usable(self) -> int:
        """Bytes that a run can use."""
        return int((self.memory - RUNTIME_BYTES) * (1 - FRAGMENTED))


def _gpu(name: str, tflops: float, attainable: float, gbytes: float, mib: int) -> Device:
    return Device(name, tflops * 1e12, attainable, gbytes * 1e9, mib * 2**20)


# Peaks and bandwidths: NVIDIA's data sheets, SXM versions, without sparsity; memory: as nvidia-smi
# reports it. Attainable: model FLOP utilization that public training runs of 7B to 70B models
# report, rounded down (Llama 3, arXiv:2407.21783: 0.38 to 0.43 on thousands of H100s; more on
# single machines); none of these numbers was measured here.
_GPUS = (
    _gpu("h100", 989, 0.45, 3350, 81559),
    _gpu("h200", 989, 0.45, 4800, 143771),
    _gpu("b200", 2250, 0.40, 8000, 183359),
    _gpu("a100-80gb", 312, 0.50, 2039, 81920),
    _gpu("a100-40gb", 312, 0.50, 1555, 40960),
    _gpu("l40s", 362, 0.45, 864, 46068),
    _gpu("4090", 165, 0.50, 1008, 24564),
)
GPUS = {device.name: device for device in _GPUS}


def find_device(name: str, dtype: torch.dtype) -> Device:
    """A device by name; `cpu` is this machine, whose GEMMs in `dtype` are timed for a moment.

    Raises UserError for an unknown name.
    """
    if name == "cpu":
        return _this_cpu(dtype)
    if name not in GPUS:
        raise UserError(f"--device: must be one of cpu, {', '.join(GPUS)}, got {name}")
    return GPUS[name]


def this_device(device: torch.device, memory: int) -> Device:
    """The device of a run, with `memory` bytes; of a GPU that is not listed the speed is a guess.

    A run compares settings on one device, for which the ratio of FLOPs and bandwidth suffices.
    """
    if device.type != "cuda":
        return Device("cpu", 1e11, 0.7, 2e10, memory)
    words = torch.cuda.get_device_name(device).lower().replace("-", " ").split()
    known = (gpu for gpu in _GPUS if gpu.name.split("-")[0] in words)
    return replace(next(known, GPUS["h100"]), memory=memory)


def _this_cpu(dtype: torch.dtype) -> Device:
    # bf16 is slow on CPUs without instructions for it.
    side = 256 if dtype == torch.bfloat16 else 768
    a = torch.ones(side, side, dtype=dtype)
    source, target = torch.ones(2, 2**23)
    gemm = min(_seconds(lambda: a @ a) for _ in range(4))
    copy = min(_seconds(lambda: target.copy_(source)) for _ in range(4))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", 2 * side**3 / gemm, 0.7, 2 * source.nbytes / copy, memory)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
