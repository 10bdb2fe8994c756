"""What happens to the clients: recorded federations, and made-up ones whose truth is known to the last digit.

A scenario's windows have a change at some round. Before it nothing is wrong; from it on, `harmed` modes are beyond
their margins (whichever those are is computed from the population, never declared).

    worked     six modes of one normal paired difference each, sd .1: the setting in which the tests were designed.
               Alarms are about any loss at all (margin 0), clears about a margin of .05.
    recorded   clients of real federations (federations.py) under the default plan: its streams, its margins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Final

import numpy as np

from fedcanary.bench.federations import Recording
from fedcanary.bench.people import People
from fedcanary.monitor import base as monitor
from fedcanary.monitor.base import ModePlan, Stream
from fedcanary.privacy.encode import Encoding
from fedcanary.probes import Probe
from fedcanary.probes.base import (
    CLIP,
    DIFFERENCE,
    MISSING,
    SEVERE,
    SEVERE_BIT,
    SQUARE,
    difference_coord,
    missing_coord,
    severe_coord,
    square_coord,
)
from fedcanary.rng import stream
from fedcanary.types import Array, Coord, Mode

MADE: Final = 32_768  # clients of a made-up population
SD: Final = 0.1
SHARE: Final = 0.0228  # of N(0, .1) below -.2
CLEAR_MARGIN: Final = 0.05
BESIDE: Final = ("beside", 9, 0.03)  # what else a message carries: so many numbers of this sd, in units of its norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Clients in phases, what is asked of them, and which modes the change harms.

    `alarms` and `clears` are the plans by which alarms and clears are judged. Before the change a window is in the
    phases of `before` (round by round, the last one staying), from it on in those of `after`.
    """

    name: str
    people: People
    alarms: monitor.Plan
    clears: monitor.Plan
    harmed: frozenset[Mode]
    before: tuple[int, ...] = (0,)
    after: tuple[int, ...] = (0,)
    noted: Mapping[str, object] = field(default_factory=dict)

    def phase_of(self, rounds: int, change: int) -> list[int]:
        """The phase of each round; `change` is a round, from 1; 0: none."""
        calm = rounds if not change else change - 1
        early = [self.before[min(t, len(self.before) - 1)] for t in range(calm)]
        return early + [self.after[min(t, len(self.after) - 1)] for t in range(rounds - calm)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """How a message's norm is shared out in the worked setting: scales (see `Coord.scale`); None: not sent."""

    name: str
    difference: float = DIFFERENCE
    square: float = SQUARE
    severe: float | None = SEVERE_BIT
    missing: float | None = MISSING


NOW: Final = Design(name="now")
# The joint vector that the first figures were worked out on: no severe bit, and simulated without missing bits.
FIRST_DESIGN: Final = Design(name="first", difference=0.4, square=0.2, severe=None, missing=None)


# --- the worked setting -----------------------------------------------------------------------------------------

Change = Callable[[Array, np.random.Generator], Array]  # (M, 6) differences before -> after


def shift(size: float, modes: Sequence[int] = (0,)) -> Change:
    """Every client loses this much."""

    def change(d: Array, rng: np.random.Generator) -> Array:
        after = d.copy()
        after[:, np.array(modes)] -= size
        return after

    return change


def tail(share: float, size: float = 0.3, modes: Sequence[int] = (0,)) -> Change:
    """A share of the clients, the same in all modes, loses much."""

    def change(d: Array, rng: np.random.Generator) -> Array:
        after, hit = d.copy(), rng.permutation(len(d))[: round(share * len(d))]
        after[np.ix_(hit, np.array(modes))] -= size
        return after

    return change


def spread(sd: float) -> Change:
    """One mode's differences spread out around an unchanged mean."""

    def change(d: Array, rng: np.random.Generator) -> Array:
        after = d.copy()
        after[:, 0] *= sd / SD
        return after

    return change


def scaled(sd: float) -> Change:
    """All modes' differences at another sd around an unchanged mean."""
    return lambda d, rng: np.asarray(d * (sd / SD))


def skewed(d: Array, rng: np.random.Generator) -> Array:
    """A null of mean zero in which one client in 25 loses .24 and the others gain .01."""
    after = np.full_like(d, 0.01)
    for j in range(d.shape[1]):
        after[rng.permutation(len(d))[: len(d) // 25], j] = -0.24
    return np.asarray(after - after.mean(axis=0))


# Nulls: name -> (before, after, severe share allowed). Each is on the very edge of what its tests allow.
NULLS: Final[Mapping[str, tuple[Change | None, Change | None, float]]] = {
    "nothing": (None, None, SHARE),
    "variance burst, sd .03 to .2": (scaled(0.03), scaled(0.2), NormalDist(0, 0.2).cdf(-SEVERE)),
    "skewed": (skewed, None, 0.04),
}
WORKED: Final[Mapping[str, Change]] = {
    "shift .03": shift(0.03),
    "shift .05": shift(0.05),
    "shift .10": shift(0.10),
    "tail 5% x .3": tail(0.05),
    "tail 10% x .3": tail(0.10),
    "tail 20% x .3": tail(0.20),
    "spread .1 to .2": spread(0.2),
    "shift .05 in all six": shift(0.05, range(6)),
    "tail 10% x .3, same clients in all six": tail(0.10, modes=range(6)),
}


def worked(
    name: str,
    change: Change | None,
    horizon: int,
    seed: int,
    *,
    calm: Change | None = None,
    share: float = SHARE,
    design: Design = NOW,
) -> Scenario:
    """A made-up population, before and after a change. Its differences are normal quantiles in random order.

    `share` is that of severely harmed clients which the tests allow.
    """
    rng = stream(seed, "silentbench", name)
    quantiles = np.array([NormalDist(0, SD).inv_cdf((i + 0.5) / MADE) for i in range(MADE)])
    d = np.stack([rng.permutation(quantiles) for _ in Mode], axis=1)
    beside = rng.normal(0.0, BESIDE[2], (MADE, BESIDE[1]))
    phases = [d if calm is None else calm(d, rng)]
    phases.append(phases[0] if change is None else change(d, rng))
    encoding = Encoding(_worked_layout(design))
    people = People.of(
        encoding,
        [_worked_readings(phase, beside) for phase in phases],
        {
            (mode, coord): np.stack([make(phase[:, j]) for phase in phases])
            for j, mode in enumerate(Mode)
            for coord, make in _WORKED_EXACT.items()
        },
    )
    plans = [_worked_plan(margin, share, horizon, design) for margin in (0.0, CLEAR_MARGIN)]
    harmed = {m for m in Mode if _beyond(people, plans[0], m, phase=1)}
    return Scenario(
        name=name,
        people=people,
        alarms=plans[0],
        clears=plans[1],
        harmed=frozenset(harmed),
        before=(0,),
        after=(1,),
        noted={"design": design.name},
    )


def _worked_layout(design: Design) -> dict[str, tuple[Coord, ...]]:
    scales = {"delta": design.difference, "square": design.square, "severe": design.severe, "missing": design.missing}
    each = tuple(
        replace(coord, scale=scales[coord.name])
        for coord in (
            difference_coord("delta", "paired difference"),
            square_coord("square", "delta"),
            severe_coord("delta"),
            missing_coord("missing", "cannot say"),
        )
    )
    name, count, _ = BESIDE
    return {mode: each for mode in Mode} | {
        name: tuple(Coord(name=f"b{i}", low=-1.0, high=1.0, purpose="beside", scale=1.0) for i in range(count))
    }


def _clipped(d: Array) -> Array:
    return np.clip(d, -CLIP, CLIP)


def _severe(d: Array) -> Array:
    return (d < -SEVERE).astype(np.float64)


_WORKED_EXACT: Final[Mapping[str, Callable[[Array], Array]]] = {
    "delta": lambda d: d,
    "square": np.square,
    "severe": _severe,
}


def _worked_readings(d: Array, beside: Array) -> dict[str, Array]:
    found: dict[str, Array] = {BESIDE[0]: beside}
    for j, mode in enumerate(Mode):
        clipped = _clipped(d[:, j])
        found[mode] = np.stack([clipped, clipped**2, _severe(d[:, j]), np.zeros(len(d))], axis=1)
    return found


def _worked_plan(margin: float, share: float, horizon: int, design: Design) -> monitor.Plan:
    bit = "severe" if design.severe is not None else ""
    stream_ = Stream(name="mean", kind="mean", coord="delta", square="square", margin=margin, severe=bit, share=share)
    modes = tuple(ModePlan(mode=mode, unit="paired difference", margin=margin, streams=(stream_,)) for mode in Mode)
    return monitor.Plan(modes=modes, alpha=0.05, horizon=horizon)


# --- recorded federations ---------------------------------------------------------------------------------------


def recorded(
    calm: Recording, planted: Recording | None, probes: Sequence[Probe], margins: Mapping[str, float], horizon: int
) -> Scenario:
    """Clients of real federations: `calm` before the change, `planted` from its first round on.

    Without `planted`, the window is the unplanted federation, its last round staying.
    """
    layout = {p.name: p.coords for p in probes}
    chosen = [calm] if planted is None else [calm, planted]
    rounds = calm.federation.rounds
    values = np.concatenate([r.values.astype(np.float64) for r in chosen])
    if planted is not None:
        values = values[rounds - 1 :]  # the unplanted federation's last round, then the planted one's
    columns = {(probe, coord): (calm.at(probe, coord)) for probe, names in calm.layout.items() for coord in names}
    phases = [
        {p: np.stack([phase[:, columns[p, c.name]] for c in coords], axis=1) for p, coords in layout.items()}
        for phase in values
    ]
    people = People.of(Encoding(layout), phases, {key: values[..., k] for key, k in columns.items()})
    plan = monitor.plan(
        margins,
        {p.mode: p.parts for p in probes if p.mode is not None},
        {p.mode: p.unit for p in probes if p.mode is not None},
        alpha=0.05,
        horizon=horizon,
        groups=calm.gaps,
        severe=0.03,
    )
    every = range(len(phases))
    harmed = {m for m in Mode if any(_beyond(people, plan, m, phase) for phase in every)}
    after = tuple(range(1, len(phases))) if planted is not None else (len(phases) - 1,)
    before = (0,) if planted is not None else tuple(every)
    last = chosen[-1].federation
    return Scenario(
        name=f"{last.method}, {last.plant}" + (f" x {last.strength:g}" if planted is not None else ""),
        people=people,
        alarms=plan,
        clears=plan,
        harmed=frozenset(harmed),
        before=before,
        after=after,
        noted={"method": last.method, "plant": last.plant, "strength": last.strength},
    )


def _beyond(people: People, plan: monitor.Plan, mode: Mode, phase: int) -> bool:
    """Whether a mode's null hypothesis is false of the population in a phase."""
    mode_plan = next(p for p in plan.modes if p.mode == mode)
    for s in mode_plan.streams:
        mean = s.sign * people.mean(mode, s.coord, phase)
        if (mean > s.margin) if s.kind == "share" else (mean < -s.margin - 1e-12):
            return True
        if s.severe and people.mean(mode, s.severe, phase) > s.share + 1e-4:
            return True
    return False
