"""What ranks agree on; alone, and as two processes."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest
import rank_processes
import torch
from torch.distributed import TCPStore

from fastpref import ranks
from fastpref.errors import UserError


def test_alone_nothing_changes() -> None:
    values = torch.tensor([1.0, 2.0])
    with ranks.joined(), ranks.first_goes_first():
        assert (ranks.count(), ranks.rank(), ranks.is_first()) == (1, 0, True)
        assert ranks.sum_(values) is values and values.tolist() == [1.0, 2.0]
        assert ranks.gather(values) is values
        assert ranks.largest(-2.0) == -2.0 and ranks.all_equal(3.0)
        assert ranks.all_of(True) and not ranks.all_of(False)
        ranks.sum_all_([values])
        ranks.wait()


def of_two(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    news: list[bool] = []
    try:
        with ranks.joined():
            whole = torch.tensor([1.0 + rank]), torch.full((2, 2), 10.0 * rank)
            ranks.sum_all_(whole)
            assert whole[0].tolist() == [3.0] and whole[1].tolist() == [[10.0, 10.0]] * 2
            assert ranks.gather(torch.arange(2.0 + rank)).tolist() == [0, 1, 0, 1, 2]
            assert ranks.largest(float(-rank)) == 0.0
            assert not ranks.all_of(rank == 0) and not ranks.all_equal(float(rank))
            log = folder / "order.txt"
            with ranks.first_goes_first(), log.open("a") as file:
                file.write(f"{rank}\n")
            raise UserError("the same on both")
    except UserError as error:
        news.append(error.is_news)
    (folder / f"news-{rank}").write_text(str(news))


def test_two_processes(tmp_path: Path) -> None:
    rank_processes.start(of_two, 2, tmp_path)
    assert (tmp_path / "order.txt").read_text() == "0\n1\n"
    told = sorted((tmp_path / f"news-{rank}").read_text() for rank in range(2))
    assert told == ["[False]", "[True]"], "one of them says it"


@pytest.mark.parametrize("words", ranks._LOST)
def test_a_rank_that_is_gone_is_one_line(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda *a, **k: None)
    monkeypatch.setattr(ranks.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(ranks.dist.distributed_c10d, "_get_default_store", lambda: None)
    with pytest.raises(ranks.LostRank, match="rank 0: lost the connection"), ranks.joined():
        raise RuntimeError(f"[gloo/pair.cc:1] {words} [127.0.0.1]:1")
    with pytest.raises(ranks.LostRank, match="rank 0: lost the connection"), ranks.joined():
        raise UserError(f"cannot write step-4: {words}")
    with pytest.raises(RuntimeError, match="something else"), ranks.joined():
        raise RuntimeError("something else")


def test_what_a_rank_says_is_news_where_the_one_that_would_know_is_gone() -> None:
    class Gone:
        def compare_set(self, *words: str) -> bytes:
            raise RuntimeError("Failed to recv, got 0 bytes")

    assert ranks._says_first(Gone(), UserError("the disk is full"))


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> int:
    """The environment of the second of two ranks; returns the port that the first has to take."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    told = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**told, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    return port


def test_a_rank_that_goes_before_the_ranks_have_met_is_one_line(second_of_two: int) -> None:
    of_the_first = [TCPStore("127.0.0.1", second_of_two, 2, True, wait_for_workers=False)]
    gone = threading.Timer(1.0, of_the_first.clear)
    gone.start()
    with pytest.raises(ranks.LostRank, match="rank 1: lost the connection"), ranks.joined():
        pass
    gone.join()


def test_a_port_that_is_taken_is_one_line(
    second_of_two: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    said = "rank 0: cannot meet the others at 127.0.0.1:.*address already in use; give torchrun "
    with (
        socket.create_server(("127.0.0.1", second_of_two)),
        pytest.raises(UserError, match=said),
        ranks.joined(),
    ):
        pass
