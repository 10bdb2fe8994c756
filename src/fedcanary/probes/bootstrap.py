"""How far a statistic of many items may be off: bootstrap intervals over units of items that belong together.

Notation: n items, U units, m sums, R bootstrap draws, G groups, B bins. A statistic is any function of m sums over
units (`Sums`), so a draw is one product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri, stdtrit

from fedcanary.probes.calibration import BINS
from fedcanary.types import Array

Both = tuple[Array, Array]  # base, adapted; each (n,)

REPEATS: Final = 10_000  # bootstrap draws: 50 lie beyond each end of a 99% interval
ROUNDING: Final = 1e-12  # differences below it are float64's, not the models'
SURE: Final = 3.0  # standard errors
CHUNK: Final = 1 << 22  # draws times units held in memory at once
LEAST_UNITS: Final = 10  # ours: below it a bootstrap interval is not worth its name


@dataclass(frozen=True, slots=True)
class Sums:
    """A statistic that depends on the items only through sums: `table` is (U, m), `value` maps (R, m) to (R,).

    It combines `means` means, of which the smallest group has `smallest` units, and moves by at most `reach` times
    the share of the units that change.
    """

    table: Array
    value: Callable[[Array], Array]
    smallest: int
    means: int = 1
    reach: float = 1.0
    at_most: Callable[[Array], Array] | None = None  # bounds `value` from above, where that errs towards reassurance

    @property
    def estimate(self) -> float:
        """The statistic of all units."""
        return float(self.value(self.table.sum(axis=0, keepdims=True))[0])

    def without_each(self) -> Array:
        """(U,) the statistic with each unit left out: the jackknife."""
        return self.value(self.table.sum(axis=0) - self.table)


@dataclass(frozen=True, slots=True)
class Spread:
    """Where a statistic may lie, and its standard error; NaN where the items cannot say."""

    low: float = float("nan")
    high: float = float("nan")
    std_error: float = float("nan")


def spread(sums: Sums, error: float, rng: np.random.Generator) -> Spread:
    """BCa bootstrap interval over units at level 1 - error (Efron 1987), for any function of sums.

    The normal quantiles are widened to sqrt(U / (U - 1)) times Student's, which a bootstrap of few units needs
    (Hesterberg 2015, arXiv 1411.5279, section 3.3, the expanded percentile interval).
    NaN with fewer than `LEAST_UNITS` units, or where the statistic is undefined without some unit. Where no unit
    differs there is nothing to resample: the interval is then the reach of what may have gone unseen,
    +-reach (1 - (error / means)^(1 / smallest)), about 3 / n at 95% (the "rule of three").
    """
    units = len(sums.table)
    if units < LEAST_UNITS or sums.smallest < 2:
        return Spread()
    estimate, without = sums.estimate, sums.without_each()
    if not np.isfinite(without).all():
        return Spread()
    apart = without.mean() - without
    if np.abs(apart).max() < ROUNDING:
        if abs(estimate) >= ROUNDING:
            return Spread()
        half = sums.reach * (1 - (error / sums.means) ** (1 / sums.smallest))
        return Spread(-half, half)
    drawn = np.empty(REPEATS)
    rows = max(1, CHUNK // units)
    for start in range(0, REPEATS, rows):
        part = drawn[start : start + rows]
        picks = rng.integers(0, units, size=(len(part), units)) + np.arange(len(part))[:, None] * units
        counts = np.bincount(picks.reshape(-1), minlength=len(part) * units).reshape(len(part), units)
        part[:] = sums.value(counts @ sums.table)  # (rows, U) @ (U, m) -> (rows,)
    if np.isnan(drawn).mean() > error / 10:  # a small group was often not drawn at all
        return Spread()
    drawn = drawn[np.isfinite(drawn)]
    below = (np.sum(drawn < estimate) + np.sum(drawn <= estimate)) / (2 * drawn.size)
    bias = float(ndtri(np.clip(below, 0.5 / drawn.size, 1 - 0.5 / drawn.size)))
    scaled = apart / np.abs(apart).max()  # the acceleration has no unit; scaling keeps its powers from vanishing
    acceleration = float(np.sum(scaled**3) / (6 * np.sum(scaled**2) ** 1.5))
    z = bias + np.sqrt(units / (units - 1)) * stdtrit(units - 1, [error / 2, 1 - error / 2])
    low, high = np.quantile(drawn, ndtr(bias + z / (1 - acceleration * z)))
    if sums.at_most is not None:
        high = max(high, spread(replace(sums, value=sums.at_most, at_most=None), error, rng).high)
    return Spread(float(low), float(high), float(drawn.std() * np.sqrt(units / (units - 1))))


def detectable(std_error: float, units: int, alpha: float, power: float) -> float:
    """Minimum detectable effect, (t(1 - alpha/2) + t(power)) se, as `statistics.minimum_detectable_effect` has it."""
    return float(stdtrit(units - 1, [1 - alpha / 2, power]).sum() * std_error) if units > 1 else float("nan")


def units_of(pairs: Sequence[tuple[int, str | None]]) -> npt.NDArray[np.int64]:
    """(n,) the unit of each item, from its suite's number and its `pair`.

    >>> units_of([(0, "a"), (0, None), (0, "a"), (1, "a")]).tolist()
    [0, 1, 0, 2]
    """
    numbers: dict[tuple[int, str | int], int] = {}
    keys = [(suite, at if pair is None else pair) for at, (suite, pair) in enumerate(pairs)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _by_unit(columns: Sequence[Array], units: npt.NDArray[np.int64]) -> Array:
    """(U, m): each column summed within every unit."""
    _, index = np.unique(units, return_inverse=True)
    return np.stack([np.bincount(index, weights=column) for column in columns], axis=1)


def _ratio(above: Array, below: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(above / below)


def mean_of(d: Array, units: npt.NDArray[np.int64]) -> Sums:
    """The mean of d (n,)."""
    table = _by_unit([d, np.ones_like(d)], units)
    return Sums(table, lambda s: _ratio(s[:, 0], s[:, 1]), len(table))


def contrast_of(
    d: Array, groups: Sequence[str], group: str, of: npt.NDArray[np.str_], units: npt.NDArray[np.int64]
) -> Sums:
    """The mean of d in a group minus the mean of the other groups' means."""
    member = [(of == name).astype(float) for name in groups]  # G arrays (n,)
    at, g = list(groups).index(group), len(groups)

    def value(s: Array) -> Array:
        rates = _ratio(s[:, :g], s[:, g:])  # (R, G)
        return np.asarray(rates[:, at] - np.delete(rates, at, axis=1).mean(axis=1))

    table = _by_unit([*(d * m for m in member), *member], units)
    return Sums(table, value, int((table[:, g:] > 0).sum(axis=0).min(initial=len(table))), means=g, reach=2.0)


def ece_change_of(confidence: Both, correct: Both, units: npt.NDArray[np.int64]) -> Sums:
    """ECE of the adapted model minus that of the base, equal-width bins as in `statistics.bin_sums`.

    A calibrated base's ECE is biased upwards by its noise, so the difference looks too good. Its upper end is
    therefore taken from a sum over bins that is never below the true change: |after| - |before| in bins where the
    base is off by `SURE` standard errors or more, and |after - before| in the others (triangle inequality).
    """
    columns = []
    for c, r in zip(confidence, correct, strict=True):
        index = np.searchsorted(np.arange(1, BINS) / BINS, c, side="left")
        columns += [np.where(index == b, c - r, 0.0) for b in range(BINS)]
    table = _by_unit([*columns, np.ones_like(confidence[0])], units)
    before = table[:, :BINS]
    sure = np.abs(before.sum(axis=0)) >= SURE * np.sqrt(np.sum(before**2, axis=0)) if len(table) else np.zeros(BINS)

    def change(s: Array) -> Array:
        off = np.abs(s[:, BINS:-1]) - np.abs(s[:, :BINS])  # (R, B)
        return _ratio(off.sum(axis=1), s[:, -1])

    def at_most(s: Array) -> Array:
        off = np.abs(s[:, BINS:-1]) - np.abs(s[:, :BINS])
        moved = np.abs(s[:, BINS:-1] - s[:, :BINS])
        return _ratio(np.where(sure & (s[:, :BINS] != 0), off, moved).sum(axis=1), s[:, -1])

    return Sums(table, change, len(table), reach=2.0, at_most=at_most)
