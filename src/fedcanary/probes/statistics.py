"""The numbers probes and reports are made of: pure functions of arrays.

Notation: n items, B bins, K clients. An item that could not be scored is NaN. Such items never count, neither as right
nor as wrong: every function leaves them out, says in its result how many were left where it returns more than a
number, and returns NaN (not 0) where nothing is left. Every threshold and every bin is the caller's to fix beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import bdtr, ndtr, ndtri, stdtrit

from fedcanary.types import Array

ROUNDING = 1e-9  # how far a probability may lie outside [0, 1] before it is an error
CHUNK = 1 << 22  # bootstrap draws held in memory at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """The mean of a group's values, each in [0, 1], and over how many items."""

    mean: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its interval, over n pairs that could be scored."""

    estimate: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class McNemar:
    """Items only A got right, items only B got right, items both were scored on, and the exact two-sided p-value."""

    only_a: int
    only_b: int
    n: int
    p_value: float


def scored(*columns: Array) -> tuple[Array, ...]:
    """The columns (n,) with every item dropped that is NaN in one of them."""
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    if any(array.ndim != 1 or array.shape != arrays[0].shape for array in arrays):
        raise ValueError(f"columns of different shapes: {[array.shape for array in arrays]}")
    keep = ~np.any([np.isnan(array) for array in arrays], axis=0)
    return tuple(array[keep] for array in arrays)


def _probability(values: Array, name: str) -> Array:
    if values.size and (values.min() < -ROUNDING or values.max() > 1 + ROUNDING):
        raise ValueError(f"{name} outside [0, 1]: {values.min()} to {values.max()}")
    return np.clip(values, 0.0, 1.0)


def bin_sums(confidence: Array, correct: Array, bins: int) -> Array:
    """(B, 3): for each equal-width bin ((b-1)/B, b/B] the number of items, their confidences' and their hits' sums.

    The first bin takes confidence 0 as well. Sums of several clients' tables are the pooled table, which is why a
    client sends this and not its ECE. Bounds: 0 <= columns 1 and 2 <= column 0, whose sum is the items scored.
    """
    if bins < 1:
        raise ValueError(f"{bins} bins")
    confidence, correct = scored(confidence, correct)
    confidence, correct = _probability(confidence, "confidence"), _probability(correct, "correct")
    inner = np.arange(1, bins) / bins
    index = np.searchsorted(inner, confidence, side="left")
    columns = [np.bincount(index, weights=weight, minlength=bins) for weight in (None, confidence, correct)]
    return np.stack(columns, axis=1).astype(np.float64)


def ece_from_bins(sums: Array) -> float:
    """Expected calibration error of a table (B, 3), in [0, 1]: sum over bins of |conf - correct|, over the items.

    The table may be a sum over clients, normalised or noised; NaN where the items are not more than zero.
    """
    items = float(sums[:, 0].sum())
    return float(np.abs(sums[:, 1] - sums[:, 2]).sum() / items) if items > 0 else float("nan")


def ece(confidence: Array, correct: Array, bins: int) -> float:
    """Expected calibration error with equal-width bins, in [0, 1] (Guo et al. 2017, section 2, equation 3).

    Biased upward in small samples: compare models on the same items and bins, not against zero.

    >>> round(ece(np.array([0.9, 0.9]), np.array([1.0, 0.0]), 10), 3)
    0.4
    """
    return ece_from_bins(bin_sums(confidence, correct, bins))


def brier(confidence: Array, correct: Array) -> float:
    """Mean of (confidence - correct)^2, in [0, 1]: Brier (1950) for the event "the model's own choice is right"."""
    confidence, correct = scored(confidence, correct)
    return float(np.mean((confidence - correct) ** 2)) if confidence.size else float("nan")


def overconfidence(confidence: Array, correct: Array) -> float:
    """Mean confidence minus accuracy, in [-1, 1]; its absolute value is at most the ECE."""
    confidence, correct = scored(confidence, correct)
    return float(np.mean(confidence - correct)) if confidence.size else float("nan")


def masking_gap(client_sums: Array, by: Literal["client", "item"] = "client") -> float:
    """Mean of the clients' ECEs minus the ECE of the pool, from tables (K, B, 3); in [0, 1].

    Errors of opposite sign cancel in the pool and not in the mean, so this is the miscalibration that pooling hides.
    By *client* every client weighs the same, in the mean and in the pool (its table is divided by its items, as the
    release does); by *item* it weighs as many items as it has. Mixing the two would lose "never negative", which is
    the triangle inequality. Clients without scored items are left out.
    """
    items = client_sums[:, :, 0].sum(axis=1)  # (K,)
    tables, items = client_sums[items > 0], items[items > 0]
    if not len(tables):
        return float("nan")
    weights = np.ones_like(items) if by == "client" else items
    weights = weights / weights.sum()
    error = (tables[:, :, 1] - tables[:, :, 2]) / items[:, None]  # (K, B)
    apart = float(weights @ np.abs(error).sum(axis=1))
    pooled = float(np.abs(weights @ error).sum())
    return max(0.0, apart - pooled)


def group_rates(positive_probability: Array, group: Sequence[str | None]) -> dict[str, Rate]:
    """Each group's mean probability (or 0/1 decision) of the favourable outcome; items without a group are left out.

    A group all of whose items are NaN is there with mean NaN and n = 0, so that its absence shows.
    """
    values = np.asarray(positive_probability, dtype=np.float64)
    if values.shape != (len(group),):
        raise ValueError(f"{values.shape} values for {len(group)} groups")
    names = np.array(["" if name is None else name for name in group], dtype=object)
    known = np.array([name is not None for name in group], dtype=bool)
    rates = {}
    for name in sorted({name for name in group if name is not None}):
        (own,) = scored(values[known & (names == name)])
        own = _probability(own, "positive_probability")
        rates[name] = Rate(mean=float(own.mean()) if own.size else float("nan"), n=int(own.size))
    return rates


def rate_gap(rates: Mapping[str, Rate]) -> float:
    """Largest group mean minus the smallest, in [0, 1]: the demographic parity difference if the rates are decisions.

    NaN with fewer than two groups, or if one of them has no scored item: an unseen group may be the worst. A maximum
    over few items is biased upward; compute it once, on aggregated counts, and do not average clients' gaps.
    """
    means = [rate.mean for rate in rates.values()]
    return max(means) - min(means) if len(means) > 1 and not np.isnan(means).any() else float("nan")


def tpr_gap(positive_probability: Array, truth: Array, group: Sequence[str | None]) -> float:
    """Rate gap among the items whose truth is positive (equal opportunity, Hardt et al. 2016, section 2), in [0, 1].

    `truth` (n,) is 1 where the favourable outcome is the right one, else 0; NaN where there is no right answer. NaN if
    a group has no item whose truth is positive: its true-positive rate is not known.
    """
    deserved = np.asarray(truth, dtype=np.float64) == 1
    values = np.where(deserved, np.asarray(positive_probability, dtype=np.float64), np.nan)
    return rate_gap(group_rates(values, group))


def mcnemar(correct_a: Array, correct_b: Array) -> McNemar:
    """Whether two models err on the same items equally often (McNemar 1947), by the exact binomial test.

    Conditional on the b + c items on which they differ, b is Binomial(b + c, 1/2); the p-value is twice the smaller
    tail, at most 1. Two models that never differ have p = 1, which is absence of evidence, not evidence of equality.
    """
    a, b = scored(correct_a, correct_b)
    if not np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
        raise ValueError("mcnemar wants 0, 1 or NaN")
    only_a, only_b = int(np.sum(a > b)), int(np.sum(b > a))
    p_value = min(1.0, 2.0 * float(bdtr(float(min(only_a, only_b)), only_a + only_b, 0.5)))
    return McNemar(only_a=only_a, only_b=only_b, n=int(a.size), p_value=p_value)


def paired_bootstrap(d: Array, level: float, rng: np.random.Generator, repeats: int = 2000) -> Interval:
    """BCa interval for the mean of paired differences d (n,) (Efron 1987; Efron & Tibshirani 1993, section 14.3).

    Items are resampled as pairs, so what the two models share cancels. With fewer than two items the interval is NaN,
    and so it is when all d are equal: resampling then has nothing to say, and [m, m] would be false certainty.
    """
    if not 0 < level < 1 or repeats < 1:
        raise ValueError(f"level {level}, {repeats} repeats")
    (d,) = scored(d)
    n = d.size
    estimate = float(d.mean()) if n else float("nan")
    if n < 2 or np.ptp(d) == 0:
        return Interval(estimate=estimate, low=float("nan"), high=float("nan"), n=n)
    means = np.empty(repeats)
    rows = max(1, CHUNK // n)
    for start in range(0, repeats, rows):
        part = means[start : start + rows]
        part[:] = d[rng.integers(0, n, size=(len(part), n))].mean(axis=1)  # (rows, n) -> (rows,)
    below = (np.sum(means < estimate) + np.sum(means <= estimate)) / (2 * repeats)
    bias = float(ndtri(np.clip(below, 0.5 / repeats, 1 - 0.5 / repeats)))
    centred = (d - estimate) / np.ptp(d)  # the jackknife of a mean is linear in these, and the unit cancels
    acceleration = float(np.sum(centred**3) / (6 * np.sum(centred**2) ** 1.5))
    z = bias + ndtri([(1 - level) / 2, (1 + level) / 2])
    adjusted = ndtr(bias + z / (1 - acceleration * z))
    low, high = np.quantile(means, adjusted)
    return Interval(estimate=estimate, low=float(low), high=float(high), n=n)


def minimum_detectable_effect(d: Array, alpha: float, power: float) -> float:
    """The smallest true mean of paired differences d (n,) that a two-sided test would find, in the unit of d.

    (t(1-alpha/2) + t(power)) s / sqrt(n) with Student quantiles of n - 1 degrees of freedom (Bloom 1995). A test that
    found nothing is to be read beside this number. NaN with fewer than two items, and when all d are equal: a spread
    that was not seen is not zero.
    """
    if not 0 < alpha < 1 or not 0 < power < 1:
        raise ValueError(f"alpha {alpha}, power {power}")
    (d,) = scored(d)
    if d.size < 2 or np.ptp(d) == 0:
        return float("nan")
    quantiles = stdtrit(d.size - 1, [1 - alpha / 2, power])
    return float(quantiles.sum() * d.std(ddof=1) / np.sqrt(d.size))
