"""Both ways of a thing in turns, and what the ratios of neighbours say."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedcanary.types import Array

REPEATS = 11
MISSED = 0.02  # chance that the interval of a gain misses the true median, at most
CHECKED = 1e-4  # relative difference that losses may have where both ways should say the same
Kinds = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True, slots=True)
class Gain:
    """Median of before / after over the repeats, and an interval around it; above 1 the second is cheaper."""

    low: float
    middle: float
    high: float

    @property
    def verdict(self) -> str:
        """What the interval says."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "within noise"


def gain(before: Array, after: Array) -> Gain:
    """Of neighbouring measurements (repeats,). The interval holds the median ratio's true value with probability
    1 - MISSED or more, whatever the distribution: it reaches from the (d+1)-th smallest ratio to the (d+1)-th largest,
    and misses with twice the probability of at most d heads in so many throws of a coin.
    """
    ratios, n = np.sort(before / after), len(before)
    below = np.cumsum([math.comb(n, d) for d in range(n)]) / 2**n
    d = int(np.sum(2 * below <= MISSED)) - 1
    if d < 0:
        raise ValueError(f"{n} repeats say nothing at a chance of {MISSED:g}: measure more often")
    return Gain(float(ratios[d]), float(np.median(ratios)), float(ratios[n - 1 - d]))


def race(kinds: Kinds, *, same: bool = False, clock: Callable[[], float] = time.process_time) -> dict[str, Array]:
    """Seconds of each kind, (repeats,), in turns that begin with another each time; the first call does not count.

    `same`: what the kinds return should be the same numbers, and is an error if it is not.
    """
    said = [run() for run in kinds.values()]
    for other in said[1:] if same else ():
        np.testing.assert_allclose(other, said[0], rtol=CHECKED, atol=CHECKED)
    names, times = list(kinds), {name: np.empty(REPEATS) for name in kinds}
    for repeat in range(REPEATS):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            began = clock()
            kinds[name]()
            times[name][repeat] = clock() - began
    return times


def percent(x: float) -> str:
    return f"{float(f'{100 * x:.2g}'):g}%"
