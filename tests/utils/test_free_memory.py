"""Free memory within the limits of a machine, of `ulimit` and of control groups."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from fastpref.utils import free_memory

CPU = torch.device("cpu")
KIB, GIB = 2**10, 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of a machine with 8 GiB available and a process of 1 GiB, without limits."""
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {8 * GIB // KIB} kB\n")
    (proc / "self/status").write_text(
        f"Name:\tpython\nVmSize:\t{GIB // KIB} kB\nVmData:\t{GIB // 2 // KIB} kB\n"
    )
    monkeypatch.setattr(free_memory, "_PROC", proc)
    monkeypatch.setattr(free_memory, "_CGROUPS", tmp_path / "cgroup")
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: unlimited)
    return tmp_path


def test_without_limits_it_is_what_the_machine_has_available(machine: Path) -> None:
    assert free_memory.free_bytes(CPU) == 8 * GIB


@pytest.mark.parametrize(
    ("limit", "used"), [(resource.RLIMIT_AS, GIB), (resource.RLIMIT_DATA, GIB // 2)]
)
def test_ulimit_leaves_what_the_process_does_not_use(
    machine: Path, monkeypatch: pytest.MonkeyPatch, limit: int, used: int
) -> None:
    infinite = resource.RLIM_INFINITY
    monkeypatch.setattr(
        resource, "getrlimit", lambda k: (3 * GIB if k == limit else infinite, infinite)
    )
    assert free_memory.free_bytes(CPU) == 3 * GIB - used


def group(folder: Path, limit: str, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{2 * GIB}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{names[2]} {GIB}\n")


def test_a_control_group_counts_its_page_cache_as_free(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("0::/a/b\n")
    group(machine / "cgroup/a/b", str(4 * GIB))
    assert free_memory.free_bytes(CPU) == 3 * GIB


def test_the_parents_of_a_control_group_limit_it(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("0::/a/b\n")
    group(machine / "cgroup/a/b", "max")
    group(machine / "cgroup/a", str(5 * GIB))
    assert free_memory.free_bytes(CPU) == 4 * GIB


def test_in_a_container_the_root_is_its_own_group(machine: Path) -> None:
    """There the path of the process is that of the host."""
    (machine / "proc/self/cgroup").write_text("0::/docker/0123\n")
    group(machine / "cgroup", str(3 * GIB))
    assert free_memory.free_bytes(CPU) == 2 * GIB


def test_version_1_of_control_groups(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("5:cpu:/x\n4:memory,hugetlb:/x\n")
    group(machine / "cgroup/memory/x", str(3 * GIB), version=1)
    assert free_memory.free_bytes(CPU) == 2 * GIB


def test_it_is_never_negative(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("0::/a\n")
    group(machine / "cgroup/a", str(GIB // 2))
    assert free_memory.free_bytes(CPU) == 0


def test_this_machine() -> None:
    assert 2**20 < free_memory.free_bytes(CPU) < 2**50
