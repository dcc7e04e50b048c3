"""Measurements from per-example values: means, differences and statistics of several runs.

A quantity is a value for each held-out pair or each sample of a run, (N,). Runs of one seed have
the same examples in the same order, so a difference of two runs is a mean of differences, whose
error is smaller than that of two separate means. Examples of one cluster, such as a prompt, are not
independent; errors are those of a mean over clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastpref.reproduce import sample_scores
from fastpref.reproduce.claims import Measurement, Missing
from fastpref.reproduce.study import START, Column, Runs

Values = np.ndarray
RESAMPLES = 400


@dataclass(frozen=True)
class Quantity:
    """A value for each example of the run with a label.

    family: the examples, such as `pairs` or `samples`; the array `FAMILY/cluster` of the run, or of
    the start, groups those that are not independent.
    """

    family: str
    of: Callable[[Runs, str], Values]

    def __call__(self, runs: Runs, label: str) -> Values:
        return self.of(runs, label)

    def clusters(self, runs: Runs, label: str, count: int) -> Values:
        """The cluster of each example, (N,); without such an array each example is one."""
        name = f"{self.family}/cluster"
        for outcome in (runs[label], runs.get(START)):
            if outcome is not None and name in outcome.arrays:
                return np.asarray(outcome.arrays[name], dtype=int)
        return np.arange(count)


def _of_pairs(function: Callable[[Runs, str], Values]) -> Quantity:
    return Quantity("pairs", function)


def _array(runs: Runs, label: str, name: str) -> Values:
    values = runs[label].arrays.get(name)
    if values is None:
        raise Missing(f"{label} has no {name}")
    return np.asarray(values, dtype=float)


def array(name: str) -> Quantity:
    """The values that a run recorded under a name, such as `samples/win`."""

    return Quantity(name.partition("/")[0], lambda runs, label: _array(runs, label, name))


WIN, MALFORMED, TOKENS = map(
    array, (sample_scores.WIN, sample_scores.MALFORMED, sample_scores.TOKENS)
)


@_of_pairs
def margin(runs: Runs, label: str) -> Values:
    """z_w − z_l of held-out pairs, nats."""
    return _array(runs, label, "pairs/chosen") - _array(runs, label, "pairs/rejected")


@_of_pairs
def accuracy(runs: Runs, label: str) -> Values:
    """1 where the policy prefers the chosen response, 1/2 where it prefers neither."""
    return (1 + np.sign(margin(runs, label))) / 2


@_of_pairs
def reward_accuracy(runs: Runs, label: str) -> Values:
    """1 where the margin has grown since the start, 1/2 where it is what it was."""
    return (1 + np.sign(margin(runs, label) - margin(runs, START))) / 2


@_of_pairs
def chosen_change(runs: Runs, label: str) -> Values:
    """Change of the chosen log-prob since the start, nats."""
    return _array(runs, label, "pairs/chosen") - _array(runs, START, "pairs/chosen")


@_of_pairs
def rejected_change(runs: Runs, label: str) -> Values:
    """Change of the rejected log-prob since the start, nats."""
    return _array(runs, label, "pairs/rejected") - _array(runs, START, "pairs/rejected")


@_of_pairs
def entropy(runs: Runs, label: str) -> Values:
    """Mean entropy of the token distributions of a pair, nats per token."""
    return _array(runs, label, "pairs/entropy")


@_of_pairs
def kl(runs: Runs, label: str) -> Values:
    """KL of Bernoulli(p) to the policy's Bernoulli(σ(z_w − z_l)), nats."""
    own_pairs = "pairs/p" in runs[label].arrays
    p, m = _array(runs, label if own_pairs else START, "pairs/p"), margin(runs, label)
    cross_entropy = p * np.logaddexp(0, -m) + (1 - p) * np.logaddexp(0, m)
    return cross_entropy + _x_log_x(p) + _x_log_x(1 - p)


def _x_log_x(x: Values) -> Values:
    """x log x, which is 0 at 0."""
    return x * np.log(np.where(x > 0, x, 1.0))


@_of_pairs
def pci(runs: Runs, label: str) -> Values:
    """min(ph, 1 − ph) of the policy's probability ph; its mean is the preference collapse index."""
    return np.exp(-np.logaddexp(0, np.abs(margin(runs, label))))


def contrast(quantity: Quantity, weights: Mapping[str, float]) -> Callable[[Runs], Measurement]:
    """The weighted sum of the means of a quantity over runs, as a mean over examples."""

    def value(runs: Runs) -> Measurement:
        parts = [weight * quantity(runs, label) for label, weight in weights.items()]
        total = np.sum(parts, axis=0)
        return _mean(total, quantity.clusters(runs, next(iter(weights)), len(total)))

    return value


def level(quantity: Quantity) -> Callable[[Runs, str], float]:
    """The mean of a quantity in the run with a label, for tables and pictures."""
    return lambda runs, label: float(quantity(runs, label).mean())


def column(title: str, quantity: Quantity, digits: int = 3) -> Column:
    """Column of the mean of a quantity."""
    return Column(title, level(quantity), digits)


def mean_of(quantity: Quantity, label: str) -> Callable[[Runs], Measurement]:
    """The mean of a quantity in one run."""
    return contrast(quantity, {label: 1.0})


def difference(quantity: Quantity, more: str, less: str) -> Callable[[Runs], Measurement]:
    """The mean of a quantity in the run `more`, less that in `less`."""
    return contrast(quantity, {more: 1.0, less: -1.0})


def statistic(
    of: Callable[[Values], float], quantities: Sequence[Quantity], labels: Sequence[str]
) -> Callable[[Runs], Measurement]:
    """A function of the table of means, (quantities, labels), with its bootstrap error.

    For what is no sum of means: a correlation over runs, a largest or smallest one.
    """

    def value(runs: Runs) -> Measurement:
        table = np.array([[quantity(runs, label) for label in labels] for quantity in quantities])
        clusters = quantities[0].clusters(runs, labels[0], table.shape[-1])
        sums, counts = _by_cluster(table, clusters)
        random = np.random.default_rng(0)
        resampled = []
        for _ in range(RESAMPLES):
            drawn = random.integers(len(counts), size=len(counts))
            weights = np.bincount(drawn, minlength=len(counts))
            resampled.append(of(sums @ weights / (counts @ weights)))
        error = float(np.std(resampled, ddof=1))
        return Measurement(float(of(table.mean(-1))), error, table.shape[-1])

    return value


def _by_cluster(values: Values, clusters: Values) -> tuple[Values, Values]:
    """Sums of values over clusters, (…, C), and the size of each cluster, (C,)."""
    _, index = np.unique(clusters, return_inverse=True)
    counts = np.bincount(index).astype(float)
    sums = np.zeros((*values.shape[:-1], len(counts)))
    np.add.at(np.moveaxis(sums, -1, 0), index, np.moveaxis(values, -1, 0))
    return sums, counts


def _mean(values: Values, clusters: Values) -> Measurement:
    """The mean of values and its error, clusters being independent."""
    mean = float(values.mean())
    sums, counts = _by_cluster(values, clusters)
    if len(counts) < 2:
        return Measurement(mean, math.inf, len(values))
    residuals = sums - mean * counts
    variance = float((residuals**2).sum()) * len(counts) / (len(counts) - 1)
    return Measurement(mean, math.sqrt(variance) / len(values), len(values))
