"""What ranks do not share is named before the first step: config, data, folder."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastpref import distributed
from fastpref.config import ConfigError, parse
from fastpref.training import rank_checks, run_lock
from tests.helpers import rank_processes

CLONE_NEWNS = 0x00020000


def config_of(rank: int) -> dict[str, object]:
    """A config that differs between ranks 0 and 1 in three fields, one of which may differ."""
    return {
        "model": {"path": "llama"},
        "data": {"train": "pairs.jsonl", "cache": f"/scratch/{rank}"},
        "loss": {"name": "dpo", "beta": 0.1 + rank},
        "training": {"steps": 4 + rank, "output_dir": "run"},
    }


def refusal(check: object, *arguments: object) -> str:
    with pytest.raises(ConfigError) as error:
        check(*arguments)  # type: ignore[operator]
    return str(error.value)


def with_a_disk_of_its_own(folder: Path) -> bool:
    """Mount an empty disk at a folder, for this process only; False if that is not permitted."""
    if ctypes.CDLL(None).unshare(CLONE_NEWNS) != 0:
        return False
    commands = ["mount --make-rprivate /", f"mount -t tmpfs none {folder}"]
    return all(
        subprocess.run(each.split(), capture_output=True).returncode == 0 for each in commands
    )


def of_two(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    rank_checks._PATIENCE = 0.3
    with distributed.process_group():
        same, other = parse(config_of(0)), parse(config_of(rank))
        rank_checks.check_same_config([same])
        message = "the config of rank 1 is not that of rank 0: "
        said = refusal(rank_checks.check_same_config, [other])
        assert said == (
            f"{message}loss.beta: 0.1 → 1.1, training.steps: 4 → 5; start all ranks with the same "
            "config and overrides"
        )
        said = refusal(rank_checks.check_same_config, [same] * (1 + rank))
        assert said.startswith(f"{message}1 runs → 2 runs; start all")
        data = SimpleNamespace(source="pairs.jsonl", fingerprint="abc", labels=None)
        rank_checks.check_same_data("data.train", data)
        data.labels = f"of {rank}"
        said = refusal(rank_checks.check_same_data, "data.eval", data)
        assert re.fullmatch(
            r"data.eval: rank 1 reads other rows or tokens from pairs.jsonl than rank 0 "
            r"\(\w{8} → \w{8}\); give all nodes the same files and versions",
            said,
        )
        run = folder / "disk" / "run"
        with run_lock.hold(run):
            assert [path.name for path in run.iterdir()] == ["lock"]
        distributed.barrier()
        is_private = rank == 0 or with_a_disk_of_its_own(folder / "disk")
        if distributed.all_ranks(is_private):
            said = refusal(run_lock.hold(run).__enter__)
            assert said == (
                f"training.output_dir: rank 1 does not see the files that rank 0 writes to {run}; "
                "choose a folder that all nodes share"
            )
            (folder / f"refused-{rank}").touch()


def test_what_ranks_do_not_share_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    rank_processes.start(of_two, 2, tmp_path)
    refused = sorted(path.name for path in tmp_path.glob("refused-*"))
    if not refused:
        pytest.skip("a disk of its own needs a mount namespace, which is not permitted here")
    assert refused == ["refused-0", "refused-1"]
