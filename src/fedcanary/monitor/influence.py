"""The influence graph of the six modes (Oh & Bui, arXiv 2606.00947), and how well it explains the alarms of a run.

For a mode in alarm, each parent that is in alarm too is weighed against "it arose on its own". Two ratios, multiplied:
    strength  along the edge the child's excess is normal-ish about slope x the parent's excess, by so much as it was in
              planted federations (a Student t, whose scale holds the spread between federations, the slope's error, how
              much slopes differ between methods, and both estimates' own errors). On its own the excess is one that
              planted failures have: log-Student over all six modes, seen with the estimate's error.
    order     along the edge the child's alarm comes `lag` rounds after the parent's: at once, or with a constant hazard
              in each round after (or before: the child's test may be the more powerful one), as it was in recorded
              planted federations. On its own it comes in any round alike, or, as likely, it began when the parent did,
              as do failures that are in the data from the first round.
An excess is (estimate / margin) less what it is where nothing was planted. All numbers are fitted on federations of
the bundled world, where each effect is known because it was planted: benchmarks/edges.py, with its figures in
benchmarks/silentbench/edges.md, and tests/monitor/test_influence.py computes them again. An edge without a measured
effect has a slope near zero and so speaks against a strong child. All this says where to look first. It proves nothing:
two failures with one cause outside the graph look like an edge, and other worlds have other slopes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from fedcanary.types import Array, Mode

PRIMARY: tuple[tuple[Mode, Mode], ...] = (
    (Mode.AMPLIFIED_BIAS, Mode.CONFIDENCE_MISCALIBRATION),
    (Mode.AMPLIFIED_BIAS, Mode.FAIRNESS_COLLAPSE),
    (Mode.CONFIDENCE_MISCALIBRATION, Mode.ADAPTATION_MISALIGNMENT),
    (Mode.CONFIDENCE_MISCALIBRATION, Mode.OUT_OF_DOMAIN_DEGRADATION),
    (Mode.FAIRNESS_COLLAPSE, Mode.ALIGNMENT_EROSION),
    (Mode.OUT_OF_DOMAIN_DEGRADATION, Mode.ALIGNMENT_EROSION),
)
FEEDBACK: tuple[tuple[Mode, Mode], ...] = (
    (Mode.FAIRNESS_COLLAPSE, Mode.ADAPTATION_MISALIGNMENT),
    (Mode.ADAPTATION_MISALIGNMENT, Mode.ALIGNMENT_EROSION),
    (Mode.ALIGNMENT_EROSION, Mode.AMPLIFIED_BIAS),
)
TINY: Final = 1e-300  # a chance that would underflow after thousands of rounds
LAST: Final = 3  # rounds whose mean is a mode's strength, as in the federations that the model was fitted on


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What a planted parent did to a child: `slope` margins of the child's for each of the parent's, with its error.

    `spread` is the standard deviation between federations of what the slope leaves unexplained, in the child's margins.
    """

    slope: float
    error: float
    spread: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Lags:
    """How many rounds one alarm comes after another: chances of 0 and of more, and the hazard of each further round."""

    at_once: float
    later: float
    hazard_later: float
    hazard_earlier: float

    def chance(self, lag: int) -> float:
        """Of this lag, over all integers.

        >>> lags = Lags(at_once=0.5, later=0.3, hazard_later=0.4, hazard_earlier=0.9)
        >>> round(sum(lags.chance(k) for k in range(-99, 100)), 6)
        1.0
        """
        if lag == 0:
            return self.at_once
        if lag > 0:
            return float(self.later * self.hazard_later * (1 - self.hazard_later) ** (lag - 1))
        earlier = 1 - self.at_once - self.later
        return float(earlier * self.hazard_earlier * (1 - self.hazard_earlier) ** (-lag - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Everything fitted. `unplanted` holds each mode's mean and standard deviation, in margins, with nothing planted.

    `own` is the mean and standard deviation of the logarithm of a planted mode's excess, with `own_degrees` of freedom;
    `settings` how much an edge's slope differs between methods and strengths (standard deviation).
    """

    effects: Mapping[tuple[Mode, Mode], Effect]
    degrees: int
    unplanted: Mapping[Mode, tuple[float, float]]
    own: tuple[float, float]
    own_degrees: int
    settings: float
    along: Lags
    together: Lags


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """The round in which a mode's alarm was raised, and how bad it is: estimate over margin, and its standard error."""

    round: int
    strength: float  # NaN if it was not measured since
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """A parent in alarm, with the log10 likelihood ratios of "by this edge" against "on its own".

    `weight` is the share of this edge among all explanations (on its own, and each edge), equally likely beforehand.
    """

    mode: Mode
    edge: Literal["primary", "feedback"]
    order: float
    strength: float
    weight: float

    @property
    def log10_ratio(self) -> float:
        """Order and strength together."""
        return self.order + self.strength


# Printed by benchmarks/edges.py, which says what each number was measured on.
FITTED: Final = Fit(
    effects={
        (Mode.AMPLIFIED_BIAS, Mode.CONFIDENCE_MISCALIBRATION): Effect(slope=0.9196, error=0.0609, spread=0.7321),
        (Mode.AMPLIFIED_BIAS, Mode.FAIRNESS_COLLAPSE): Effect(slope=-0.0097, error=0.0097, spread=0.1165),
        (Mode.CONFIDENCE_MISCALIBRATION, Mode.ADAPTATION_MISALIGNMENT): Effect(
            slope=0.0473, error=0.015, spread=0.4405
        ),
        (Mode.CONFIDENCE_MISCALIBRATION, Mode.OUT_OF_DOMAIN_DEGRADATION): Effect(
            slope=0.1063, error=0.0097, spread=0.2834
        ),
        (Mode.FAIRNESS_COLLAPSE, Mode.ALIGNMENT_EROSION): Effect(slope=0.0007, error=0.0023, spread=0.0198),
        (Mode.OUT_OF_DOMAIN_DEGRADATION, Mode.ALIGNMENT_EROSION): Effect(slope=0.023, error=0.0058, spread=0.0391),
        (Mode.FAIRNESS_COLLAPSE, Mode.ADAPTATION_MISALIGNMENT): Effect(slope=-0.0481, error=0.0235, spread=0.2073),
        (Mode.ADAPTATION_MISALIGNMENT, Mode.ALIGNMENT_EROSION): Effect(slope=0.1892, error=0.0285, spread=0.2467),
        (Mode.ALIGNMENT_EROSION, Mode.AMPLIFIED_BIAS): Effect(slope=-0.0012, error=0.003, spread=0.1101),
    },
    degrees=19,
    unplanted={
        Mode.AMPLIFIED_BIAS: (0.115, 0.1101),
        Mode.CONFIDENCE_MISCALIBRATION: (-1.5171, 0.2547),
        Mode.FAIRNESS_COLLAPSE: (0.026, 0.1165),
        Mode.ADAPTATION_MISALIGNMENT: (0.2337, 0.2073),
        Mode.OUT_OF_DOMAIN_DEGRADATION: (0.1535, 0.1355),
        Mode.ALIGNMENT_EROSION: (-0.0028, 0.0188),
    },
    own=(0.9727, 0.6206),
    own_degrees=5,
    settings=0.0672,
    along=Lags(at_once=0.223, later=0.481, hazard_later=0.203, hazard_earlier=0.249),
    together=Lags(at_once=0.111, later=0.444, hazard_later=0.219, hazard_earlier=0.219),
)


def alarm(since: int, curve: Sequence[tuple[float, float, float]], margin: float) -> Alarm:
    """A mode's alarm from each round's (estimate, low, high), a 95% normal interval; NaN where nothing was measured.

    The strength is the mean over the last rounds of the alarm. Its error is that of a single one of them: with the same
    clients asked again, three rounds say no more than one.
    """
    last = [row for row in curve[max(since - 1, len(curve) - LAST) :] if all(map(math.isfinite, row))]
    if not last:
        return Alarm(round=since, strength=math.nan, error=math.nan)
    errors = [(high - low) / (2 * 1.96) for _, low, high in last]
    return Alarm(
        round=since,
        strength=sum(row[0] for row in last) / len(last) / margin,
        error=math.sqrt(sum(e**2 for e in errors) / len(errors)) / margin,
    )


def upstream(child: Mode, alarms: Mapping[Mode, Alarm], rounds: int, fit: Fit = FITTED) -> tuple[Upstream, ...]:
    """Every parent in alarm of a child in alarm, likeliest first. `rounds` are those complete; pure.

    Those with a positive `log10_ratio` explain the child's alarm better than its having arisen on its own.
    """
    if child not in alarms:
        return ()
    found = [
        Upstream(
            mode=parent,
            edge="primary" if (parent, child) in PRIMARY else "feedback",
            order=_order(fit, alarms[parent], alarms[child], rounds),
            strength=_strength(fit, parent, child, alarms),
            weight=0.0,
        )
        for parent in alarms
        if (parent, child) in fit.effects
    ]
    ratios = [0.0, *(u.log10_ratio for u in found)]  # the first: on its own
    whole = sum(10 ** (ratio - max(ratios)) for ratio in ratios)
    weighed = [replace(u, weight=10 ** (u.log10_ratio - max(ratios)) / whole) for u in found]
    return tuple(sorted(weighed, key=lambda u: -u.log10_ratio))


def _order(fit: Fit, parent: Alarm, child: Alarm, rounds: int) -> float:
    """log10 of the lag's chance along the edge over that on its own, given that both alarms came by now."""
    lag, possible = child.round - parent.round, range(1 - parent.round, rounds - parent.round + 1)
    along, together = (dist.chance(lag) / sum(dist.chance(k) for k in possible) for dist in (fit.along, fit.together))
    return math.log10(max(along, TINY) / ((1 / len(possible) + together) / 2))


def _strength(fit: Fit, parent: Mode, child: Mode, alarms: Mapping[Mode, Alarm]) -> float:
    """log10 of the density of the child's excess along the edge over that on its own; 0 where one was not measured."""
    up, own, effect = alarms[parent], alarms[child], fit.effects[parent, child]
    if not (math.isfinite(up.strength) and math.isfinite(own.strength)):
        return 0.0
    (mean, std), cause = fit.unplanted[child], up.strength - fit.unplanted[parent][0]
    excess, seen = own.strength - mean, own.error**2
    between = effect.spread**2 + (effect.error**2 + fit.settings**2) * cause**2
    scale = math.sqrt(between + (effect.slope * up.error) ** 2 + seen)
    along = float(_log_t(np.array((excess - effect.slope * cause) / scale), fit.degrees)) - math.log(scale)
    z = np.linspace(-12.0, 12.0, 8001)  # beyond: less than 1e-4 of a t with 5 degrees
    weights, noise = _log_t(z, fit.own_degrees), math.sqrt(seen + std**2)
    u = (excess - np.exp(fit.own[0] + fit.own[1] * z)) / noise
    logs = weights - u**2 / 2 - math.log(noise * math.sqrt(2 * math.pi))
    top = float(logs.max())
    alone = top + math.log(float(np.exp(logs - top).sum() / np.exp(weights).sum()))
    return (along - alone) / math.log(10)


def _log_t(x: Array, degrees: int) -> Array:
    """Log density of Student's t."""
    constant = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(degrees * math.pi) / 2
    return np.asarray(constant - (degrees + 1) / 2 * np.log1p(x**2 / degrees))
