"""Windows that have not happened: the monitor's own e-values over simulated sums of stated clients.

A round's sums over a panel of n clients are drawn from the normal distribution with n times the moments of one client's
message (mean and covariance, shrinkage included), noised as the door would noise them, and judged by the monitor's
formulas and thresholds. Many windows at once, on one core, in milliseconds.

Assumed: everybody answers; what a client's coordinates say is independent; an effect comes at once, stays, and is in
one part of its mode; mode 1's groups are level in the base; asked again, the same clients say the same but for the
effect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Final, Literal, cast

import numpy as np
import numpy.typing as npt

from fedcanary.monitor import base as monitor
from fedcanary.monitor.base import ModePlan
from fedcanary.privacy.encode import Encoding
from fedcanary.probes.base import CLIP, SEVERE
from fedcanary.rng import stream
from fedcanary.types import Array, Mode, Release, missing_bit

Kind = Literal["rotating", "same"]

PATHS: Final = 1000  # windows of a forecast: a share of them has a standard error of at most .016
FEWEST: Final = 200  # of them in long windows (.035), and those whose intervals are looked at
ROUNDS: Final = 24 * PATHS  # simulated rounds up to which there are all of PATHS
BESIDE: Final = 0.12  # root mean square of what is sent beside the modes (utility), less its zero: as measured
MOMENTS: Final = 5  # of a client's message that a stream's sums are made of
SAMPLE: Final = 4096  # clients from whom it is seen how much else a message carries
NORMAL: Final[Array] = np.array([NormalDist().inv_cdf((i + 0.5) / 801) for i in range(801)])  # quantiles
LEVELS: Final[Array] = (np.arange(64) + 0.5) / 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Clients:
    """What clients' readings of a mode look like.

    `std` is the standard deviation between clients of a part's paired difference, `drift` the mean of the first part
    where nothing is wrong (negative is worse), `tail` the share left behind then, `missing` of those who cannot say.
    """

    std: float = 0.0
    drift: float = 0.0
    tail: float = 0.0
    missing: float = 0.0


# Of the bundled world (benchmarks/planner/README.md): the largest std of a part with nothing planted or with the mode's
# own plant, and the worst part's drift with nothing planted, rounded up. No drift for the better is counted on.
MEASURED: Final[Mapping[Mode, Clients]] = {
    Mode.AMPLIFIED_BIAS: Clients(std=0.04, drift=-0.022),
    Mode.CONFIDENCE_MISCALIBRATION: Clients(std=0.075),
    Mode.FAIRNESS_COLLAPSE: Clients(tail=0.01),
    Mode.ADAPTATION_MISALIGNMENT: Clients(std=0.05, drift=-0.012),
    Mode.OUT_OF_DOMAIN_DEGRADATION: Clients(std=0.05, drift=-0.015),
    Mode.ALIGNMENT_EROSION: Clients(std=0.02, drift=-0.003),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """What a panel of n adds to its sums: noise std of each coordinate by probe, and of the lost mass."""

    n: int
    noises: Mapping[str, Mapping[str, float]]
    lost_std: float

    @classmethod
    def of(cls, encoding: Encoding, n: int, std: float) -> Door:
        """`std` is that of the integers' noise in the sum of n messages."""
        sums, _, lost_std = encoding.read(np.zeros(encoding.size, dtype=np.int64), n, std)
        noises = {probe: dict(zip(s.coords, s.noise_std.tolist(), strict=True)) for probe, s in sums.items()}
        return cls(n=n, noises=noises, lost_std=lost_std)


@dataclass(frozen=True, slots=True)
class Sums:
    """Stands in for a `Release` where the monitor reads one: sums of many windows, (rounds, paths), or of one."""

    count: float
    lost: Any
    lost_std: float
    values: Mapping[str, Any]
    noises: Mapping[str, float]

    def missing_coord(self, coord: str = "") -> str:
        """As `Release.missing_coord`."""
        return next((bit for bit in (missing_bit(coord), "missing") if bit in self.values), "")

    def sum(self, coord: str) -> Any:
        """As `Release.sum`."""
        return self.values[coord]

    def noise(self, coord: str) -> float:
        """As `Release.noise`."""
        return self.noises[coord]

    def answered(self, coord: str) -> Any:
        """As `Release.answered`."""
        bit = self.missing_coord(coord)
        return self.count - self.lost - (self.values[bit] if bit else 0.0)

    def mean_answered(self, coord: str) -> Any:
        """As `Release.mean_answered`."""
        answered = self.answered(coord)
        return self.values[coord] / answered if answered >= 0.5 else math.nan


def walk(plan: monitor.Plan, mode_plan: ModePlan, release: Release, shape: tuple[int, int]) -> tuple[Array, Array]:
    """A mode's e-values, worse and clear, (rounds, paths) each: what `monitor.step` says of every window.

    `release` gives each sum as (rounds, paths). The bets are the monitor's; only adding them up over the rounds of many
    windows at once is done here, and held to `monitor.step` by tests/monitor/test_planner.py.
    """
    rounds, horizon = shape[0], plan.horizon
    worse, clear = np.zeros(shape), np.full(shape, math.inf)
    for s in mode_plan.streams:
        bets, passes = (np.stack([np.broadcast_to(e, shape) for e in logs]) for logs in monitor.log_values(s, release))
        kept = np.full((len(bets), shape[1]), -math.inf)  # (lambdas, paths)
        for t in range(rounds):
            kept = np.logaddexp(kept, -math.log(horizon)) + bets[:, t]
            worse[t] += (_mean_exp(kept) + max(horizon - t - 1, 0) / horizon) / len(mode_plan.streams)
        recent = passes.copy()  # (lambdas, rounds, paths)
        for back in range(1, min(monitor.WINDOW, rounds)):
            recent[:, back:] += passes[:, :-back]
        clear = np.minimum(clear, _mean_exp(recent))
    return worse, clear


def _mean_exp(logs: Array) -> Array:
    """Mean of exp(logs) over the first axis, cut where it would overflow."""
    return np.asarray(np.exp(np.minimum(logs, 600.0)).sum(axis=0) / len(logs))


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Everything about a window but its panels: monitor, message, clients, and the first round with an effect.

    The random draws depend on the seed and the mode alone, not on n, noise or effect, so that these can be compared.
    """

    plan: monitor.Plan
    encoding: Encoding
    clients: Mapping[Mode, Clients]
    change: int
    seed: int
    _cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def paths(self) -> int:
        """How many windows are simulated."""
        return min(PATHS, max(FEWEST, ROUNDS // self.plan.horizon))

    def power(self, kind: Kind, mode_plan: ModePlan, door: Door, effect: float) -> tuple[float, float]:
        """Share of windows with an alarm from the change to the horizon, and its mean delay (1: at once; NaN if none).

        Windows in alarm before the change are left out.
        """
        worse, _ = self._run(kind, mode_plan, door, effect)
        alarmed = worse >= self.plan.alarm_at  # (rounds, paths)
        kept = alarmed[self.change - 1 :, ~alarmed[: self.change - 1].any(axis=0)]
        found = kept[:, kept.any(axis=0)]
        return found.shape[1] / max(kept.shape[1], 1), _first(found)

    def cleared(self, kind: Kind, mode_plan: ModePlan, door: Door) -> tuple[float, float]:
        """Where nothing is wrong: share of windows clear at the horizon; mean first round that is (NaN if none)."""
        worse, e = self._run(kind, mode_plan, door, None)
        clear = (e >= self.plan.clear_at) & ~np.logical_or.accumulate(worse >= self.plan.alarm_at)
        return float(clear[-1].mean()), _first(clear[:, clear.any(axis=0)])

    def width(self, kind: Kind, mode_plan: ModePlan, door: Door, effect: float) -> float:
        """Median width of a round's 95% interval, under the effect; infinite if there usually is none."""
        drawn, found = self._draw(kind, mode_plan, door, effect), []
        for at in ((self.change - 1, path) for path in range(FEWEST)):
            values = {name: float(sums[at]) for name, sums in drawn.values.items()}
            one = Sums(drawn.count, float(drawn.lost[at]), drawn.lost_std, values, drawn.noises)
            _, (low, high), _ = monitor.headline(mode_plan, cast(Release, one))
            found.append(math.inf if math.isnan(low) else high - low)
        return float(np.median(found))

    def _run(self, kind: Kind, mode_plan: ModePlan, door: Door, effect: float | None) -> tuple[Array, Array]:
        drawn = self._draw(kind, mode_plan, door, effect)
        return walk(self.plan, mode_plan, cast(Release, drawn), (self.plan.horizon, self.paths))

    def _draw(self, kind: Kind, mode_plan: ModePlan, door: Door, effect: float | None) -> Sums:
        """A mode's sums, (rounds, paths) each; nothing is wrong if the effect is None."""
        people, noises = self._normals(kind, mode_plan)
        stds, calm_rounds = door.noises[mode_plan.mode], self.plan.horizon if effect is None else self.change - 1
        values: dict[str, Array] = {}
        lost = np.zeros(people.shape[2:])
        for i, coord in enumerate(tested(mode_plan)):
            sums = np.empty(people.shape[1:])  # (MOMENTS, rounds, paths)
            for rounds, e in ((slice(calm_rounds), None), (slice(calm_rounds, None), effect)):
                mean, root = self._moments(mode_plan, i, e if i == 0 else None)
                spread = math.sqrt(door.n) * np.tensordot(root, people[i][:, rounds], 1)
                sums[:, rounds] = door.n * mean[:, None, None] + spread
            if i == 0:
                lost = sums[0] + door.lost_std * noises[0, 0]
            for name, k in self._names(mode_plan, coord).items():
                if name not in values:
                    values[name] = sums[k] + stds[name] * noises[i, k]
        return Sums(float(door.n), lost, door.lost_std, values, stds)

    def _normals(self, kind: Kind, mode_plan: ModePlan) -> tuple[Array, Array]:
        """Standard normal draws for people and for noise, (coordinates, MOMENTS, rounds, paths) each."""
        key = (kind, mode_plan.mode)
        if self._cache.get("whose normals") != key:  # only the last are kept: they are large
            rng = stream(self.seed, "plan", mode_plan.mode)
            shape = (len(tested(mode_plan)), MOMENTS, self.plan.horizon, self.paths)
            people, noises = (rng.standard_normal(shape) for _ in range(2))
            if kind == "same":
                people[:] = people[:, :, :1].copy()
            people[:, 0] = people[0, 0].copy()  # a message loses mass once, not once for each coordinate
            self._cache.update({"whose normals": key, "normals": (people, noises)})
        found: tuple[Array, Array] = self._cache["normals"]
        return found

    def _moments(self, mode_plan: ModePlan, i: int, effect: float | None) -> tuple[Array, Array]:
        """One client's (1 - f, f x, f x^2, f k, f b) for the i-th tested coordinate x: mean (5,), Cholesky root (5, 5).

        x is a clipped normal difference around -effect, or a bit that is 1 with probability `effect`; k says that the
        client cannot say x, b that it is severely harmed. f is averaged over what the rest of the message may weigh.
        """
        key = (mode_plan.mode, i, effect)
        if key not in self._cache:
            c, rest = self.clients[mode_plan.mode], self._rest()[(mode_plan.mode, i)]
            if mode_plan.streams[0].kind == "share":
                ones = c.tail if effect is None else effect
                x, weight = np.array([0.0, 1.0]), np.array([1 - ones, ones])
            else:
                center = (c.drift if i == 0 else 0.0) if effect is None else -effect
                x = np.clip(center + c.std * NORMAL, -CLIP, CLIP)
                weight = np.full(len(x), 1 / len(x))
            own = np.append(self._weight(mode_plan, i, x), self._missing(mode_plan, i))
            x, k = np.append(x, 0.0), np.append(np.zeros(len(x)), 1.0)  # the last kind of client cannot say it
            mass = np.append(weight * (1 - c.missing), c.missing)[:, None] / len(rest)
            f = np.minimum(1.0, 2 / (1 + own[:, None] + rest))  # (kinds of clients, rests)
            b = (x < -SEVERE).astype(np.float64)
            sent = np.stack([1 - f, *(f * each[:, None] for each in (x, x**2, k, b))])
            mean = (sent * mass).sum(axis=(1, 2))
            off = (sent - mean[:, None, None]).reshape(MOMENTS, -1)
            spread = np.broadcast_to(mass, f.shape).reshape(-1)
            root = np.linalg.cholesky((off * spread) @ off.T + 1e-14 * np.eye(MOMENTS))  # bits may have no spread
            self._cache[key] = mean, root
        found: tuple[Array, Array] = self._cache[key]
        return found

    def _rest(self) -> dict[tuple[Mode, int], Array]:
        """By mode and tested coordinate: quantiles of the squared norm of all else that clients send when all is well.

        The norm is the message's before shrinkage (W in encode.py).
        """
        if "rest" not in self._cache:
            rng, own = stream(self.seed, "plan", "rest"), {}
            for p in self.plan.modes:
                c = self.clients[p.mode]
                for i, _ in enumerate(tested(p)):
                    x = np.clip((c.drift if i == 0 else 0.0) + c.std * rng.standard_normal(SAMPLE), -CLIP, CLIP)
                    if p.streams[0].kind == "share":
                        x = (rng.random(SAMPLE) < c.tail).astype(np.float64)
                    weight = self._weight(p, i, x)
                    own[p.mode, i] = np.where(rng.random(SAMPLE) < c.missing, self._missing(p, i), weight)
            beside = [c.scale for probe, c in self.encoding.sent if probe not in self.clients and c.name != "missing"]
            total = np.sum([*own.values(), np.zeros(SAMPLE)], axis=0) + sum((BESIDE / (s or 1.0)) ** 2 for s in beside)
            self._cache["rest"] = {name: np.quantile(total - weight, LEVELS) for name, weight in own.items()}
        found: dict[tuple[Mode, int], Array] = self._cache["rest"]
        return found

    def _weight(self, mode_plan: ModePlan, i: int, x: Array) -> Array:
        """What a tested value and its square weigh in the squared norm."""
        scales, names = self._scales(mode_plan.mode), self._names(mode_plan, tested(mode_plan)[i])
        value: dict[int, Array] = {1: x, 2: x**2, 4: np.where(x < -SEVERE, 1.0, 0.0)}
        parts = [value[k] / scales[name] for name, k in names.items() if k in value]
        return np.asarray(np.sum(np.square(parts), axis=0))

    def _missing(self, mode_plan: ModePlan, i: int) -> float:
        scales, names = self._scales(mode_plan.mode), self._names(mode_plan, tested(mode_plan)[i])
        return sum(scales[name] ** -2 for name, k in names.items() if k == 3)

    def _scales(self, mode: Mode) -> dict[str, float]:
        return {c.name: c.scale for c in self.encoding.layout[mode] if c.scale is not None}

    def _names(self, mode_plan: ModePlan, coord: str) -> dict[str, int]:
        """What is sent of a tested coordinate, and which of its moments each is. The first brings the severe bit."""
        sent = self._scales(mode_plan.mode)
        square = next(s.square for s in mode_plan.streams if s.coord == coord)
        bit = missing_bit(coord) if missing_bit(coord) in sent else "missing"
        severe = mode_plan.streams[0].severe if coord == mode_plan.streams[0].coord else ""
        return {name: k for k, name in enumerate((coord, square, bit, severe), start=1) if name in sent}


def _first(found: npt.NDArray[np.bool_]) -> float:
    """Mean over windows of the first round (from 1) that is true, of (rounds, paths) with one in every window."""
    return float(found.argmax(axis=0).mean() + 1) if found.shape[1] else math.nan


def tested(mode_plan: ModePlan) -> list[str]:
    """The coordinates that a mode's streams read, each once."""
    return list(dict.fromkeys(s.coord for s in mode_plan.streams))
