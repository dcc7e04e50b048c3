"""The head inside FSDP2 on two ranks: the loss and the gradients of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpref import ops
from tests.helpers import rank_processes

RANKS, T, D, V = 2, 7, 8, 27  # neither rank's shard of the head nor its tokens are a round number
CASES = [(tied, trained) for tied in (False, True) for trained in (False, True)]


class LanguageModel(nn.Module):
    """Embedding, a body of two blocks, a head; tied or not. Its forward returns log-probs."""

    def __init__(self, tied: bool, trained: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.head = nn.Linear(D, V, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.head.requires_grad_(trained)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return ops.linear_logps(x, self.head.weight, labels)


def batch(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, labels and an uneven upstream gradient for the tokens of one rank."""
    g = torch.Generator().manual_seed(rank)
    tokens = T + rank
    ids, labels = (torch.randint(V, (tokens,), generator=g) for _ in range(2))
    labels[rank] = -100
    return ids, labels, torch.randn(tokens, generator=g)


def one_process(tied: bool, trained: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model = LanguageModel(tied, trained)
    ids, labels, grad_logps = (
        torch.cat(parts) for parts in zip(*map(batch, range(RANKS)), strict=True)
    )
    loss = model(ids, labels) @ grad_logps
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def shard(model: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # the root owns embedding and head: gathered in its forward
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gradients are summed, as in one process
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def rank_of_two(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS
    )
    for tied, trained in CASES:
        model = LanguageModel(tied, trained)
        shard(model)
        with pytest.raises(ValueError, match="weight: got a DTensor"):
            ops.linear_logps(torch.zeros(2, D), model.head.weight, torch.zeros(2).long())
        ids, labels, grad_logps = batch(rank)
        loss = model(ids, labels) @ grad_logps
        loss.backward()
        dist.all_reduce(total := loss.detach().clone())
        grads = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
        torch.save((total, grads), Path(folder) / f"{tied}-{trained}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the results of each rank and case; starting the ranks takes most of the time."""
    folder = tmp_path_factory.mktemp("ranks")
    rank_processes.start(rank_of_two, RANKS, str(folder))
    return folder


@pytest.mark.parametrize(("tied", "trained"), CASES)
def test_two_ranks_equal_one_process(two_ranks, tied, trained) -> None:
    loss, grads = one_process(tied, trained)
    assert ("head.weight" in grads) == (trained and not tied)
    assert ("embedding.weight" in grads) == (trained or not tied)
    for rank in range(RANKS):
        total, sharded = torch.load(two_ranks / f"{tied}-{trained}-{rank}.pt")
        torch.testing.assert_close(total, loss, rtol=1e-6, atol=1e-6)
        assert sharded.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(sharded[name], grad, rtol=1e-5, atol=1e-6)
