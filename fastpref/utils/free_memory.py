"""Memory that this process can still use: of a GPU, or of the CPU within its limits."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import torch

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Free bytes of a GPU; on a CPU the least of what its machine and its limits leave.

    Limits are those of `ulimit` on the address space or the data of the process, and of its control
    groups, whose reclaimable page cache counts as free.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min((*_of_machine(), *_of_limits(), *_of_cgroups())))


def _of_machine() -> Iterator[int]:
    yield _kibibytes(_PROC / "meminfo")["MemAvailable"]


def _of_limits() -> Iterator[int]:
    status = _kibibytes(_PROC / "self/status")
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            yield soft - status[used]


def _kibibytes(path: Path) -> dict[str, int]:
    """Sizes in bytes by name, from lines such as `VmSize:  1234 kB`."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[-1] == "kB"}


def _of_cgroups() -> Iterator[int]:
    """Bytes left in each control group of the process and in their parents, versions 1 and 2."""
    try:
        lines = (_PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.lstrip("/")
        # In a container the path can be that of the host; its own group is then the root.
        for folder in (group, *group.parents):
            left = _left(folder, *names)
            if left is not None:
                yield left
            if folder == root:
                break


def _left(folder: Path, limit: str, used: str, reclaimable: str) -> int | None:
    try:
        most = int((folder / limit).read_text())
        now = int((folder / used).read_text())
        rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return most - now + int(dict(rows).get(reclaimable, 0))
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None
