"""Collectives and errors of ranks, in one process and in two."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore, TCPStore

from fastpref import distributed
from fastpref.utils.errors import UserError
from tests.helpers import rank_processes


def test_alone_nothing_changes() -> None:
    values = torch.tensor([1.0, 2.0])
    with distributed.process_group(), distributed.main_process_first():
        assert (distributed.world_size(), distributed.rank(), distributed.is_main_process()) == (
            1,
            0,
            True,
        )
        assert distributed.all_reduce_sum_(values) is values and values.tolist() == [1.0, 2.0]
        assert distributed.gather(values) is values
        assert distributed.all_reduce_max(-2.0) == -2.0 and distributed.all_equal(3.0)
        assert distributed.on_main_process(lambda: (1, 2)) == (1, 2)
        assert distributed.all_ranks(True) and not distributed.all_ranks(False)
        distributed.all_reduce_sum_coalesced_([values])
        distributed.barrier()


def refuse() -> None:
    assert distributed.is_main_process()
    raise UserError("only the first knows")


def fill_disk() -> None:
    raise OSError(28, "No space left on device", "a.jsonl")


def of_two(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    printed: list[bool] = []
    try:
        with distributed.process_group():
            whole = torch.tensor([1.0 + rank]), torch.full((2, 2), 10.0 * rank)
            distributed.all_reduce_sum_coalesced_(whole)
            assert whole[0].tolist() == [3.0] and whole[1].tolist() == [[10.0, 10.0]] * 2
            assert distributed.gather(torch.arange(2.0 + rank)).tolist() == [0, 1, 0, 1, 2]
            assert distributed.all_reduce_max(float(-rank)) == 0.0
            assert not distributed.all_ranks(rank == 0) and not distributed.all_equal(float(rank))
            log = folder / "order.txt"
            with distributed.main_process_first(), log.open("a") as file:
                file.write(f"{rank}\n")
            assert distributed.on_main_process(lambda: [rank, "é"]) == [0, "é"]
            with pytest.raises(UserError, match="only the first knows"):
                distributed.on_main_process(refuse)
            with pytest.raises(UserError, match=r"a\.jsonl: No space left on device; check path"):
                distributed.on_main_process(fill_disk)
            raise UserError("the same on both")
    except UserError as error:
        printed.append(error.should_print)
    (folder / f"printed-{rank}").write_text(str(printed))


def test_two_processes(tmp_path: Path) -> None:
    rank_processes.start(of_two, 2, tmp_path)
    assert (tmp_path / "order.txt").read_text() == "0\n1\n"
    printed = sorted((tmp_path / f"printed-{rank}").read_text() for rank in range(2))
    assert printed == ["[False]", "[True]"], "one of them prints it"


@pytest.mark.parametrize("words", distributed._LOST)
def test_a_rank_that_is_gone_is_one_line(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_meet", lambda device: None)
    with (
        pytest.raises(distributed.LostRank, match="rank 0: lost the connection"),
        distributed.process_group(),
    ):
        raise RuntimeError(f"[gloo/pair.cc:1] {words} [127.0.0.1]:1")
    with (
        pytest.raises(distributed.LostRank, match="rank 0: lost the connection"),
        distributed.process_group(),
    ):
        raise UserError(f"cannot write step-4: {words}")
    with pytest.raises(RuntimeError, match="something else"), distributed.process_group():
        raise RuntimeError("something else")


def test_a_rank_prints_its_error_when_the_store_is_gone() -> None:
    class Gone:
        def compare_set(self, *words: str) -> bytes:
            raise RuntimeError("Failed to recv, got 0 bytes")

    assert distributed._reports_first(Gone(), UserError("the disk is full"))


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> int:
    """Set the environment of the second of two ranks and return the port of the first."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    variables = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**variables, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    return port


def test_a_rank_that_goes_before_the_ranks_have_met_is_one_line(second_of_two: int) -> None:
    of_the_first = [TCPStore("127.0.0.1", second_of_two, 2, True, wait_for_workers=False)]
    gone = threading.Timer(1.0, of_the_first.clear)
    gone.start()
    with (
        pytest.raises(distributed.LostRank, match="rank 1: lost the connection"),
        distributed.process_group(),
    ):
        pass
    gone.join()


def test_a_port_that_is_taken_is_one_line(
    second_of_two: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    message = "rank 0: cannot connect to the other ranks at 127.0.0.1:.*address already in use; "
    with (
        socket.create_server(("127.0.0.1", second_of_two)),
        pytest.raises(UserError, match=message),
        distributed.process_group(),
    ):
        pass


def test_ranks_without_an_address_of_the_first_are_told(
    second_of_two: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASTER_ADDR")
    message = "MASTER_ADDR: must name the machine of rank 0 in the environment of several ranks, "
    with pytest.raises(UserError, match=message), distributed.process_group():
        pass


def no_such_name(*arguments: object) -> None:
    raise socket.gaierror(-2, "Name or service not known")


def no_answer(*arguments: object) -> None:
    time.sleep(3)


@pytest.mark.parametrize(
    ("look_up", "reason"),
    [(no_such_name, "Name or service not known"), (no_answer, "the name server does not answer")],
)
def test_a_host_without_an_address_is_one_line(
    second_of_two: int, monkeypatch: pytest.MonkeyPatch, look_up: object, reason: str
) -> None:
    assert distributed._LOOK_UP < 10
    monkeypatch.setattr(distributed, "_LOOK_UP", 0.2)
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    monkeypatch.setattr(distributed.socket, "getaddrinfo", look_up)
    message = f"MASTER_ADDR: rank 1 finds no address of nowhere.invalid: .*{reason}; use a name or "
    with pytest.raises(UserError, match=message), distributed.process_group():
        pass


def test_a_name_that_is_published_later_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [socket.gaierror(-2, "Name or service not known"), None]

    def look_up(*arguments: object) -> None:
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    monkeypatch.setenv("MASTER_ADDR", "first")
    monkeypatch.setattr(distributed.socket, "getaddrinfo", look_up)
    distributed._check_address(1)
    assert answers == []


def start_of_three(store: HashStore, ranks: tuple[int, ...] = (0, 1, 2)) -> list[str]:
    names: list[str] = []
    threads = [
        threading.Thread(target=lambda r=rank: names.append(distributed._attempt(store, r, 3)))
        for rank in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return names


def test_ranks_that_are_started_again_meet_under_a_new_name() -> None:
    store = HashStore()
    store.set("fastpref/asks/2", "of a rank that was killed before it got an answer")
    first, second = start_of_three(store), start_of_three(store)
    assert [len(first), len(second)] == [3, 3]
    assert len({*first}) == len({*second}) == 1 and first[0] != second[0]


def of_two_tasks(rank: int, port: int) -> None:
    os.environ |= {"SLURM_NTASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    os.environ |= {"SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port)}
    with distributed.process_group():
        assert (distributed.rank(), distributed.world_size()) == (rank, 2)
        assert distributed.gather_objects(f"task {rank}") == ["task 0", "task 1"]
        assert distributed.broadcast(f"task {rank}") == "task 0"


def test_tasks_of_srun_are_ranks() -> None:
    rank_processes.start(of_two_tasks, 2)


@pytest.mark.parametrize(
    ("environment", "gpus", "gpu"),
    [
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, 8, 3),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "SLURM_LOCALID": "3"}, 1, 0),
    ],
)
def test_each_rank_has_a_gpu(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], gpus: int, gpu: int
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert distributed.gpu_of_rank() == gpu


def test_more_ranks_than_gpus_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "10", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = "rank 10: number 2 of the ranks of this machine, which shows 2 GPUs; start as many "
    with pytest.raises(UserError, match=message):
        distributed.gpu_of_rank()
