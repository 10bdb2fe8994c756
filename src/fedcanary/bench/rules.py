"""What others would have said: rules in use elsewhere, and someone who sees everything. All on the same windows.

    utility       the mean gain in utility fell below zero: all that a dashboard of loss and accuracy shows
    exact mean    a round's mean, without any noise, is beyond the margin: a dashboard that sees the modes
    z-test        a round's noised mean is beyond the margin by 1.645 standard errors, read every round
    Bonferroni    the same at alpha / (modes x streams x rounds)
    3 sd          a round's noised mean is below the mean of the rounds before the change by 3 of their standard
                  deviations (the rule of NannyML's reference period)
    oracle        exact, unclipped, without noise, of known variance: the Gaussian e-process averaged with that of the
                  severe bits, at the same alpha, with the same start rounds
Each speaks of every stream of a mode; any stream alarms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np

from fedcanary.bench.people import Panels, People
from fedcanary.bench.windows import Bits
from fedcanary.monitor import base as monitor
from fedcanary.monitor.base import ModePlan, Stream
from fedcanary.monitor.forecast import Sums
from fedcanary.types import Array, Mode

ORACLE_EFFECTS: Final = (0.02, 0.04, 0.08, 0.16, 0.25)
ORACLE_TILTS: Final = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What the rules look at: noised sums by probe, exact panels, and the population they were drawn from."""

    plan: monitor.Plan
    sums: Mapping[str, Sums]
    panels: Panels
    people: People
    change: int  # the first changed round, from 1; 0: none


Rule = Callable[[Window, ModePlan], Bits]


def _mean(w: Window, mode: Mode, s: Stream) -> tuple[Array, Array]:
    """A stream's noised mean, signed so that more is worse, and its standard error: (rounds, paths) each."""
    sums = w.sums[mode]
    n = sums.count - sums.lost - (sums.values[bit] if (bit := sums.missing_coord(s.coord)) else 0.0)
    n = np.maximum(n, 1.0)
    mean = (1 if s.kind == "share" else -s.sign) * sums.values[s.coord] / n
    second = mean if s.kind == "share" else sums.values[s.square] / n
    spread = np.sqrt(np.maximum(second - mean**2, 0.0) / n + (sums.noises[s.coord] / n) ** 2)
    return mean, spread


def _any(w: Window, mode_plan: ModePlan, of: Callable[[Stream], Bits]) -> Bits:
    found: Bits = np.logical_or.reduce([of(s) for s in mode_plan.streams])
    return found


def utility(w: Window, mode_plan: ModePlan) -> Bits:
    """Dashboards show loss or accuracy; the worked setting has none, so nothing is ever seen there."""
    key = ("utility", "score_gain")
    shape = next(iter(w.panels.exact.values())).shape
    return w.panels.exact[key] < 0 if key in w.panels.exact else np.zeros(shape, dtype=bool)


def exact_mean(w: Window, mode_plan: ModePlan) -> Bits:
    """No noise, no test."""

    def of(s: Stream) -> Bits:
        mean = w.panels.exact[mode_plan.mode, s.coord] / w.panels.n
        return mean > s.margin if s.kind == "share" else -s.sign * mean > s.margin

    return _any(w, mode_plan, of)


def _z(w: Window, mode_plan: ModePlan, level: float) -> Bits:
    quantile = NormalDist().inv_cdf(1 - level)

    def of(s: Stream) -> Bits:
        mean, error = _mean(w, mode_plan.mode, s)
        found: Bits = (mean - s.margin) > quantile * error
        return found

    return _any(w, mode_plan, of)


def z_test(w: Window, mode_plan: ModePlan) -> Bits:
    """One-sided at alpha in every round, for every stream."""
    return _z(w, mode_plan, w.plan.alpha)


def bonferroni(w: Window, mode_plan: ModePlan) -> Bits:
    """The same, corrected for modes, streams and rounds."""
    return _z(w, mode_plan, w.plan.alpha / (len(w.plan.modes) * len(mode_plan.streams) * w.plan.horizon))


def three_sd(w: Window, mode_plan: ModePlan) -> Bits:
    """Against the window's own first rounds, which raise nothing themselves."""
    calm = w.change - 1 if w.change > 2 else max(w.plan.horizon // 5, 2)

    def of(s: Stream) -> Bits:
        mean, _ = _mean(w, mode_plan.mode, s)
        before = mean[:calm]
        found = mean > before.mean(axis=0) + 3 * before.std(axis=0, ddof=1)
        found[:calm] = False
        return np.asarray(found)

    return _any(w, mode_plan, of)


def oracle(w: Window, mode_plan: ModePlan) -> Bits:
    """Sees what nobody may see. `delays` are held against its."""
    plan, n, logs = w.plan, w.panels.n, []
    for s in mode_plan.streams:
        exact, bit = w.panels.exact[mode_plan.mode, s.coord], s.coord if s.kind == "share" else s.severe
        if s.kind == "mean":
            population = w.people.exact[mode_plan.mode, s.coord]
            v = max(float(np.nanmax(np.nanvar(population, axis=1))), 1e-6)
            for effect in ORACLE_EFFECTS:
                lam = effect / v
                logs.append(-lam * (s.sign * exact + n * s.margin) - lam**2 * v * n / 2)
        if bit:
            share, ones = (s.margin if s.kind == "share" else s.share), w.panels.exact[mode_plan.mode, bit]
            logs += [tilt * ones - n * math.log1p(share * math.expm1(tilt)) for tilt in ORACLE_TILTS]
    rounds = plan.horizon
    kept = np.full((len(logs), w.panels.messages.shape[1]), -math.inf)
    found = np.zeros(w.panels.messages.shape[:2], dtype=bool)
    for t in range(rounds):
        kept = np.logaddexp(kept, -math.log(rounds)) + np.stack([log[t] for log in logs])
        capital = np.exp(np.minimum(kept, 600.0)).mean(axis=0) + (rounds - t - 1) / rounds
        found[t] = capital >= plan.alarm_at
    return found


RULES: Final[Mapping[str, Rule]] = {
    "utility": utility,
    "exact mean": exact_mean,
    "z-test": z_test,
    "Bonferroni": bonferroni,
    "3 sd": three_sd,
    "oracle": oracle,
}
