"""The distillation module on padded and packed batches."""

from __future__ import annotations

import pytest
import torch

from fastpref.fused import FusedDistillationLoss
from fastpref.ops.divergence import linear_divergence

S, L, D, E, V = 3, 5, 4, 6, 11


def _batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in {
            "hidden": (S, L, D),
            "weight": (V, D),
            "teacher_hidden": (S, L, E),
            "teacher_weight": (V, E),
        }.items()
    }
    labels = torch.randint(V, (S, L), generator=generator)
    labels[0, 3:] = labels[1, 1] = -100
    return batch | {"labels": labels}


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_the_loss_is_the_mean_over_the_scored_tokens(kind: str) -> None:
    batch = _batch()
    scored = batch["labels"] != -100
    expected = linear_divergence(
        batch["hidden"][scored], batch["weight"],
        batch["teacher_hidden"][scored], batch["teacher_weight"], kind,  # type: ignore[arg-type]
    )  # fmt: skip
    module = FusedDistillationLoss(kind)  # type: ignore[arg-type]
    loss, metrics = module(**batch)
    assert loss.item() == pytest.approx(expected.mean().item(), abs=1e-14)
    assert metrics["tokens"] == 12 and metrics["divergence"] == loss
    packed = {name: x.flatten(0, 1) if x.dim() == 3 else x for name, x in batch.items()}
    packed |= {"labels": batch["labels"].flatten(), "cu_seqlens": torch.tensor([0, 5, 10, 15])}
    assert module(**packed)[0].item() == pytest.approx(loss.item(), abs=1e-14)


def test_shifted_labels_are_those_of_the_next_position() -> None:
    batch = _batch()
    shifted = torch.full((S, L), -100)
    shifted[:, :-1] = batch["labels"][:, 1:]
    module = FusedDistillationLoss()
    expected, _ = module(**{**batch, "labels": shifted})
    assert module(**batch, shift=True)[0].item() == pytest.approx(expected.item(), abs=1e-14)


def test_accumulated_calls_divide_by_the_tokens_of_the_step() -> None:
    batch = _batch()
    module = FusedDistillationLoss()
    whole, _ = module(**batch)
    rows = [
        {name: x if name.endswith("weight") else x[k : k + 1] for name, x in batch.items()}
        for k in range(S)
    ]
    parts = [module(**row, num_items_in_batch=12)[0].item() for row in rows]
    assert sum(parts) == pytest.approx(whole.item(), abs=1e-14)


def test_no_scored_token_gives_a_loss_and_a_gradient_of_0() -> None:
    batch = _batch()
    batch["hidden"].requires_grad_()
    loss, _ = FusedDistillationLoss()(**{**batch, "labels": torch.full((S, L), -100)})
    loss.backward()
    assert loss == 0 and batch["hidden"].grad is not None and not batch["hidden"].grad.any()


def test_wrong_options_are_refused_at_once_and_wrong_shapes_by_name() -> None:
    with pytest.raises(ValueError, match="kind: expected 'forward', 'reverse' or 'jsd'"):
        FusedDistillationLoss("kl")  # type: ignore[arg-type]
    batch = _batch()
    with pytest.raises(ValueError, match=r"teacher_hidden: expected shape \(S, L, D\)"):
        FusedDistillationLoss()(**{**batch, "teacher_hidden": batch["teacher_hidden"][0]})
    with pytest.raises(ValueError, match=r"labels: expected shape \(3, 5\) like the positions of"):
        FusedDistillationLoss()(**{**batch, "labels": batch["labels"][:, :4]})
