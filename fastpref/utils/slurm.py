"""Tasks that `srun` starts without torchrun, as ranks: SLURM's variables as those of torchrun."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping

from fastpref.utils.errors import UserError

_STEP = ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_ID", "SLURM_STEPID")
_FIRST_PORT, _PORTS = 20_000, 10_000  # below those that Linux gives to outgoing connections


def adopt(environ: MutableMapping[str, str]) -> None:
    """Set what torchrun sets, in a task of `srun` with several tasks; else leave all as it is.

    MASTER_ADDR is the first node of the step, and MASTER_PORT depends on job and step, unless they
    are set. Raises UserError if SLURM's variables do not say it.
    """
    if "WORLD_SIZE" in environ or not _is_task(environ):
        return
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS", "1")
    if tasks == "1":
        return
    rank = _number(environ, "SLURM_PROCID")
    ranks = {
        "WORLD_SIZE": tasks,
        "RANK": str(rank),
        "LOCAL_RANK": str(_number(environ, "SLURM_LOCALID")),
        "LOCAL_WORLD_SIZE": str(_tasks_on_this_node(environ)),
    }
    if "MASTER_ADDR" not in environ:
        ranks["MASTER_ADDR"] = _first_node(environ)
    if "MASTER_PORT" not in environ:
        job, step = _digits(environ, "SLURM_JOB_ID"), _digits(environ, "SLURM_STEP_ID")
        ranks["MASTER_PORT"] = str(_FIRST_PORT + (job + 7 * step) % _PORTS)
    environ.update(ranks)


def lone_task(environ: Mapping[str, str]) -> str | None:
    """Sentence about the other tasks of a job, in its batch script, where only one process runs."""
    tasks = environ.get("SLURM_NTASKS", "1")
    if tasks == "1" or "WORLD_SIZE" in environ or "SLURM_PROCID" not in environ:
        return None
    return f"the job has {tasks} tasks, and this is one process without srun; start it with srun"


def _is_task(environ: Mapping[str, str]) -> bool:
    """Whether srun has started this process: a batch script has a SLURM_PROCID, too."""
    has_step = any(name in environ for name in _STEP)
    return "SLURM_PROCID" in environ and (has_step or environ.get("ENVIRONMENT") != "BATCH")


def _first_node(environ: Mapping[str, str]) -> str:
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    nodes = next((environ[name] for name in names if environ.get(name)), "")
    # Of node[003-010,12]-ib,other the node003-ib; without brackets, the first name.
    match = re.match(r"([^\[\],\s]+)(?:\[(\w+)[^\]]*\]([^\[\],\s]*))?(?=,|$)", nodes)
    if match is None:
        raise UserError(
            f"SLURM_STEP_NODELIST: no name of a first node in {nodes!r}; set MASTER_ADDR, or start "
            "the ranks with torchrun"
        )
    return "".join(part or "" for part in match.groups())


def _tasks_on_this_node(environ: Mapping[str, str]) -> int:
    """Number of tasks of this node, of a list such as `8(x2),4`; 1 if SLURM does not say."""
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    nodes = list(_repeated(counts))
    node = _digits(environ, "SLURM_NODEID")
    return nodes[node] if node < len(nodes) else 1


def _repeated(counts: str) -> Iterator[int]:
    for match in re.finditer(r"(\d+)(?:\(x(\d+)\))?", counts):
        yield from [int(match[1])] * int(match[2] or 1)


def _digits(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "0")
    return int(value) if value.isdecimal() else 0


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not value.isdecimal():
        raise UserError(
            f"{name}: must be a whole number in a task of srun, got {value!r}; start the ranks "
            "with srun or torchrun"
        )
    return int(value)
