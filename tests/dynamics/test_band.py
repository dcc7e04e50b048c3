"""The Disentanglement Band against what one step of gradient descent does to log-probs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastpref import losses, ops
from fastpref.dynamics.band import (
    BAND_METRICS,
    PAIR_BAND_METRICS,
    band,
    band_metrics,
    band_sums,
    pair_band_sums,
    parameter_geometry,
    parameter_scores,
)
from fastpref.logps import SequenceLogps
from fastpref.ops import ScoreGeometry

D, V = 6, 11  # a head of 66 weights: scores of a few tokens have cosines of every sign


class Head:
    """A model whose one parameter is its head: pairs of responses over fixed hidden states."""

    def __init__(self, pairs: int = 4, seed: int = 0, shared: float = 0.0) -> None:
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 7, (2 * pairs,), generator=g)
        self.ends = torch.tensor([0, *lengths.cumsum(0).tolist()])
        tokens = int(self.ends[-1])
        self.hidden = torch.randn(tokens, D, generator=g, dtype=torch.float64) + shared
        self.labels = torch.randint(V, (tokens,), generator=g)
        self.weight = torch.randn(V, D, generator=g, dtype=torch.float64).requires_grad_()
        self.lengths = lengths

    def logps(self, weight: Tensor | None = None) -> SequenceLogps:
        used = self.weight if weight is None else weight
        tokens = ops.linear_logps(self.hidden, used, self.labels, impl="reference")
        return SequenceLogps.from_sequences(ops.segment_sum(tokens, self.ends), self.lengths)

    def geometry(self, per_pair: bool = True) -> ScoreGeometry:
        return ops.score_geometry(
            self.hidden, self.weight, self.labels, self.ends, per_pair=per_pair, impl="reference"
        )


def ratios(geometry: ScoreGeometry, *distances: float) -> list[Tensor]:
    """Incentives d_w (B,) at d_l = 1, at so many half-widths from the middle of each band."""
    middle = geometry.rejected_norm / geometry.chosen_norm
    return [middle * geometry.cosine.abs() ** -x for x in distances]


@pytest.mark.parametrize("seed", range(20))
def test_one_step_changes_the_log_probs_as_predicted(seed):
    """Each pair takes its own step along d_w s_w - d_l s_l, with incentives of every sign."""
    model = Head(seed=seed, shared=(seed % 3) * 0.5)
    policy, geometry = model.logps(), model.geometry()
    draws = torch.Generator().manual_seed(seed)
    d_w, d_l = torch.randn(2, 4, generator=draws, dtype=torch.float64)
    predicted = band(d_w, d_l, geometry)
    rate = 1e-6
    for i in range(4):
        objective = d_w[i] * policy.chosen[i] - d_l[i] * policy.rejected[i]
        (step,) = torch.autograd.grad(objective, model.weight, retain_graph=True)
        moved = model.logps(model.weight.detach() + rate * step)
        # Second order: rate |step|^2 times a curvature of up to |h|^2 of each token.
        room = rate * (1 + step.norm().item()) ** 2 * 100
        for side, dz in (
            ("chosen", predicted.dz_chosen),
            ("rejected", predicted.dz_rejected),
        ):
            change = (getattr(moved, side)[i] - getattr(policy, side)[i]) / rate
            assert abs(change - dz[i]) <= room
            assert room < 0.1  # changes are of order 10


def test_the_band_is_where_the_chosen_rise_and_the_rejected_fall():
    """By exact steps at ratios a little inside and outside both edges of the band."""
    checked = 0
    for seed in range(40):
        model = Head(seed=seed, shared=0.5)
        policy, geometry = model.logps(), model.geometry()
        settings = zip((-1.2, -0.8, 0.0, 0.8, 1.2), (2, 3, 3, 3, 1), strict=True)
        for distance, pathway in settings:
            (d_w,) = ratios(geometry, distance)
            d_l = torch.ones_like(d_w)
            found = band(d_w, d_l, geometry)
            between = (found.lower <= found.log_r) & (found.log_r <= found.upper)
            assert torch.equal(found.inside, between)
            for i in (geometry.cosine > 0.1).nonzero().flatten().tolist():
                assert found.pathway[i] == pathway
                objective = d_w[i] * policy.chosen[i] - d_l[i] * policy.rejected[i]
                (step,) = torch.autograd.grad(objective, model.weight, retain_graph=True)
                moved = model.logps(model.weight.detach() + 1e-8 * step)
                ups = (moved.chosen[i] > policy.chosen[i], moved.rejected[i] > policy.rejected[i])
                expected = {1: (True, True), 2: (False, False), 3: (True, False)}[pathway]
                assert tuple(bool(up) for up in ups) == expected
                checked += 1
    assert checked > 300  # of 800: the rest have a cosine of 0.1 or less


def test_scores_at_a_right_angle_or_more_have_no_edges():
    geometry = ScoreGeometry(*(torch.tensor(x) for x in ([2.0] * 3, [3.0] * 3, [0.0, -0.5, -1.0])))
    for ratio in (1e-6, 1.0, 1e6):
        found = band(torch.full((3,), ratio), torch.ones(3), geometry)
        assert found.inside.all() and (found.pathway == 3).all()
        assert (found.lower == -math.inf).all() and (found.upper == math.inf).all()


def test_the_edges_by_hand():
    geometry = ScoreGeometry(*(torch.tensor([x]) for x in (2.0, 6.0, 0.5)))
    found = band(torch.tensor([3.0]), torch.tensor([1.0]), geometry)
    values = [value.item() for value in found]
    # log 3 in the middle of log 3 -/+ log 2; <s_w, s_l> = 6.
    expected = [math.log(3), math.log(3), 0.5, math.log(1.5), math.log(6), 3 * 4 - 6, 3 * 6 - 36]
    assert values == pytest.approx(expected, rel=1e-12)
    on_edge = band(torch.tensor([1.5]), torch.tensor([1.0]), geometry)
    assert on_edge.dz_chosen == 0 and on_edge.inside and on_edge.pathway == 3


def test_negative_incentives_have_no_ratio_but_a_pathway():
    geometry = ScoreGeometry(*(torch.tensor(x) for x in ([1.0] * 3, [1.0] * 3, [0.5] * 3)))
    d_w, d_l = torch.tensor([[-1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]])
    found = band(d_w, d_l, geometry)
    assert found.log_r.isnan().all()
    # Both negative: the pair is undone. One of each: both log-probs go the same way.
    assert found.pathway.tolist() == [0, 2, 1]
    assert found.inside.tolist() == [False] * 3


def test_metrics_are_means_over_the_pairs_that_have_the_value():
    geometry = ScoreGeometry(*(torch.tensor(x) for x in ([1.0, 1, 2], [1.0, 2, 1], [0.5, -0.5, 0])))
    d_w, d_l = torch.tensor([[1.0, 2.0, -1.0], [1.0, 1.0, 1.0]])
    bands = band(d_w, d_l, geometry)
    sums = band_sums(bands)
    assert sums.shape == (2 * len(BAND_METRICS),) and sums.dtype == torch.float64
    found = {name: value.item() for name, value in band_metrics(BAND_METRICS, sums).items()}
    assert tuple(found) == BAND_METRICS
    log2 = math.log(2)
    expected = {
        "band/log_r": log2 / 2,  # the third has none
        "band/log_r_star": (0 + log2 - log2) / 3,
        "band/cosine": 0.0,
        "band/lower": -log2,  # the first alone has edges
        "band/upper": log2,
        "band/inside": 2 / 3,
        "band/dz_chosen": ((1 - 0.5) + (2 + 1) + -4) / 3,
        "band/dz_rejected": ((0.5 - 1) + (-2 - 4) + -1) / 3,
    }
    assert found == pytest.approx(expected, abs=1e-12)
    singles = [band(d_w[i], d_l[i], ScoreGeometry(*(x[i] for x in geometry))) for i in range(3)]
    torch.testing.assert_close(sum(map(band_sums, singles)), sums, rtol=1e-15, atol=0)
    pair_sums = sum(map(pair_band_sums, singles))
    torch.testing.assert_close(pair_sums, pair_band_sums(bands), rtol=1e-15, atol=0)
    shares = {n: x.item() for n, x in band_metrics(PAIR_BAND_METRICS, pair_sums).items()}
    assert shares == pytest.approx(
        {
            "pair_band/inside": 2 / 3,
            "pair_band/both_up": 0.0,
            "pair_band/both_down": 1 / 3,
            "pair_band/crossed": 0.0,
            **{f"pair_{name}": expected[name] for name in ("band/log_r", "band/log_r_star")},
            "pair_band/cosine": 0.0,
        },
        abs=1e-12,
    )


def test_incentives_of_objectives_are_taken_as_they_are():
    """dpo has the ratio 1; the log-prob of the chosen falls just where r* rho is above it."""
    model = Head(pairs=64, shared=1.0)
    policy, geometry = model.logps(), model.geometry()
    incentives = losses.incentives(losses.build("dpo"), policy, policy.detach())
    found = band(*incentives, geometry)
    assert (found.log_r == 0).all()
    falls = geometry.rejected_norm / geometry.chosen_norm * geometry.cosine > 1
    assert 0 < falls.sum() < 64
    assert torch.equal(found.dz_chosen < 0, falls)


@pytest.mark.parametrize("per_pair", [True, False])
def test_scores_by_autograd_are_those_of_the_head(per_pair):
    """The head is all that is trained, so both geometries are the same; fp64."""
    model = Head(pairs=5, seed=1)
    model.ends[2] = model.ends[1]  # an empty chosen response: its score is zero
    policy = model.logps()
    unused = torch.ones(3, requires_grad=True)
    found = parameter_geometry(policy, [model.weight, unused], per_pair=per_pair)
    expected = model.geometry(per_pair)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert model.weight.grad is None
    policy.chosen.sum().backward()  # the graph is still there
    if per_pair:
        assert found.chosen_norm[1] == 0 and found.cosine[1] == 0


def test_scores_by_autograd_count_every_parameter():
    """Two layers: squared norms of the blocks add up."""
    g = torch.Generator().manual_seed(0)
    first, second = (
        torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
        for shape in ((D, D), (V, D))
    )
    inputs = torch.randn(8, D, generator=g, dtype=torch.float64)
    logits = ((inputs @ first).tanh() @ second.T).log_softmax(1)
    z = torch.stack([part.sum() for part in logits[:, 0].split(2)])
    policy = SequenceLogps.from_sequences(z, torch.full((4,), 2))
    whole, *blocks = (parameter_geometry(policy, p) for p in ([first, second], [first], [second]))
    squares = sum(block.rejected_norm.square() for block in blocks)
    torch.testing.assert_close(whole.rejected_norm.square(), squares, rtol=1e-14, atol=0)
    products = [b.cosine * b.chosen_norm * b.rejected_norm for b in (whole, *blocks)]
    torch.testing.assert_close(products[0], products[1] + products[2], rtol=1e-13, atol=1e-13)


def test_what_autograd_cannot_answer_is_refused():
    model = Head()
    with pytest.raises(ValueError, match="parameters: expected at least one"):
        parameter_geometry(model.logps(), [])
    with pytest.raises(ValueError, match="policy: expected log-probs with a gradient"):
        parameter_geometry(model.logps().detach(), [model.weight])


def test_nothing_is_read_from_the_device():
    """A tensor on the meta device has no values: reading one raises."""
    columns = [torch.empty(5, device="meta") for _ in range(5)]
    pairs = band(*columns[:2], ScoreGeometry(*columns[2:]))
    assert band_metrics(BAND_METRICS, band_sums(pairs))["band/inside"].shape == ()
    shares = band_metrics(PAIR_BAND_METRICS, pair_band_sums(pairs))
    assert shares["pair_band/inside"].shape == ()


def test_sums_of_scores_are_those_of_the_heads_op():
    model = Head(pairs=3)
    sums = parameter_scores(model.logps(), [model.weight])
    _, expected = ops.linear_logps_and_scores(
        model.hidden, model.weight, model.labels, int(model.ends[3]), rows=None
    )
    torch.testing.assert_close(sums, expected.flatten(1), rtol=1e-12, atol=1e-12)
    mean = parameter_geometry(model.logps(), [model.weight], per_pair=False)
    for value, exact in zip(ops.batch_geometry(sums, 3), mean, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=0)
