"""DPO-PG's projection: Theorems H.4 and H.5, the step it stands for, and shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from fastpref.dynamics.dpo_pg import exchange, inner_product, project_
from tests.helpers import rank_processes


def draw(seed: int, correlation: float = 0.0, dtype=torch.float64) -> tuple[list, list]:
    """g_w and g_l of two parameters, eleven numbers: cosines of every size and sign come up."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((2, 4), (3,))
    chosen = [torch.randn(shape, generator=g, dtype=dtype) for shape in shapes]
    rejected = [torch.randn(s, generator=g, dtype=dtype) + correlation * c
                for s, c in zip(shapes, chosen, strict=True)]  # fmt: skip
    return chosen, rejected


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


@pytest.mark.parametrize("correlation", [-0.3, 0.0, 0.3, 30.0])
def test_the_chosen_descend_and_the_rejected_do_not(correlation):
    seen = set()
    for seed in range(100):
        chosen, rejected = draw(seed, correlation)
        g_w, g_l = flat(chosen), flat(rejected)
        coefficient = project_(chosen, rejected)
        g = flat(chosen)
        projects = (g_w @ g_l).item() > 0
        seen.add(projects)
        # Relative to the vectors' sizes, a dozen fp64 roundings of one another's multiples.
        room = 1e-14 * (g_w.norm() * (g_l.norm() + g_w.norm())).item()
        if projects:  # case 1: H.4's value, and orthogonal to the rejected
            sine = 1 - cosine(g_w, g_l) ** 2
            assert (g_w @ g).item() == pytest.approx((g_w @ g_w).item() * sine, abs=room)
            assert abs((g_l @ g).item()) <= room
            assert coefficient.item() == pytest.approx((g_w @ g_l / (g_l @ g_l)).item())
        else:  # case 2: the gradient as it was
            assert torch.equal(g, g_w) and coefficient == 0
        assert (g_w @ g).item() > 0  # H.4: -g descends the chosen negative log-likelihood
        assert (g_l @ g).item() <= room  # H.5: and does not descend the rejected one
        assert torch.equal(flat(rejected), g_l)
    # Both cases come up, but where a correlation leaves only one.
    assert seen == ({True, False} if correlation < 1 else {True})


def test_a_small_step_raises_the_chosen_and_not_the_rejected():
    """On log-probs themselves: two outcomes under softmaxes of nine."""
    unprojected = []
    for seed in range(50):
        g = torch.Generator().manual_seed(seed)
        theta = torch.randn(9, generator=g, dtype=torch.float64).requires_grad_()
        features = torch.randn(2, 9, 9, generator=g, dtype=torch.float64)

        def logps(at: Tensor, features: Tensor = features) -> Tensor:
            return (features @ at).log_softmax(1)[:, 0]  # of a chosen and a rejected outcome

        before = logps(theta)
        g_w, g_l = (torch.autograd.grad(-z, theta, retain_graph=True)[0] for z in before)
        step = 1e-6
        unprojected.append((logps(theta - step * g_w) - before)[1].item())
        project_([g_w], [g_l])
        chosen, rejected = (logps(theta - step * g_w) - before).tolist()
        # First-order changes are some 1e-5; the second order, step^2 |g|^2 |Hessian|, is 1e-10.
        assert chosen > 1e-8 and rejected <= 1e-9
    assert max(unprojected) > 1e-6  # which the gradient of the chosen alone does not keep


def test_collinear_gradients_leave_nothing_and_a_zero_one_changes_nothing():
    chosen, _ = draw(0)
    rejected = [2 * g for g in chosen]
    kept = [g.clone() for g in chosen]
    project_(kept, rejected)
    assert flat(kept).abs().max() <= 1e-15
    coefficient = project_(chosen, [torch.zeros_like(g) for g in chosen])
    assert coefficient == 0 and torch.equal(flat(chosen), flat(draw(0)[0]))


def test_half_precision_products_are_summed_wide():
    step = 1 + 2**-7  # a bf16 number whose square is none
    many = [torch.full((3000,), step, dtype=torch.bfloat16)]
    assert inner_product(many, many) == 3000 * step**2
    a, b = draw(3, dtype=torch.float32)
    exact = flat(a).double() @ flat(b).double()
    assert inner_product(a, b).dtype == torch.float64
    # One fp32 rounding of each product.
    assert abs(inner_product(a, b) - exact) <= 6e-8 * (flat(a).abs() @ flat(b).abs())


def test_nothing_is_read_from_the_device():
    """A tensor on the meta device has no values: reading one raises."""
    chosen, rejected = (
        [torch.empty(4, 2, device="meta"), torch.empty(3, device="meta")] for _ in range(2)
    )
    assert project_(chosen, rejected).shape == ()


def test_lists_of_other_lengths_are_refused():
    chosen, rejected = draw(0)
    with pytest.raises(ValueError, match="rejected: expected 2 gradients"):
        project_(chosen, rejected[:1])


def test_two_gradients_accumulate_over_micro_batches():
    """Three micro-batches, one forward pass each: the sums of both sides' gradients."""
    weight = torch.nn.Parameter(torch.tensor([[0.3, -0.2], [0.5, 0.1]], dtype=torch.float64))
    unused = torch.nn.Parameter(torch.ones(1))
    parameters = [weight, unused]
    inputs = torch.arange(12, dtype=torch.float64).view(3, 2, 2) / 10
    rest: list[Tensor | None] = [None, None]
    for chosen, rejected in ((weight @ x).tanh().sum(1) for x in inputs):
        (-chosen).backward(retain_graph=True)
        rest = exchange(parameters, rest)
        (-rejected).backward()
        rest = exchange(parameters, rest)
    for row, found in enumerate((weight.grad, rest[0])):
        total = sum((weight @ x).tanh().sum(1)[row] for x in inputs)
        (expected,) = torch.autograd.grad(-total, weight)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-15)
    assert unused.grad is None and rest[1] is None


RANKS = 2
PLACEMENTS = (Shard(0), Replicate())  # a replicated parameter must not be counted once a rank


def rank_of_two(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    chosen, rejected = (
        [distribute_tensor(g, mesh, [p]) for g, p in zip(side, PLACEMENTS, strict=True)]
        for side in draw(1, correlation=1.0)
    )
    coefficient = project_(chosen, rejected)
    result = coefficient, [g.full_tensor() for g in chosen]
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_shards_on_two_ranks_are_the_whole(tmp_path):
    rank_processes.start(rank_of_two, RANKS, str(tmp_path))
    chosen, rejected = draw(1, correlation=1.0)
    expected = project_(chosen, rejected)
    assert expected > 0
    for rank in range(RANKS):
        coefficient, gradients = torch.load(tmp_path / f"{rank}.pt")
        # Another order of eleven fp64 sums.
        torch.testing.assert_close(coefficient, expected, rtol=1e-14, atol=0)
        torch.testing.assert_close(gradients, chosen, rtol=1e-14, atol=1e-14)
