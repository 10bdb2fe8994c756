"""The monitor: a pure `start` and `step`; releases in, evidence out.

For each mode one or more streams, each a one-sided question about a mean or a share ("is it beyond the margin?").
    alarm   each stream's e-process mixes bets b (how much worse?) and, uniformly over the horizon T, start rounds:
            acc_t(b) = (acc_{t-1}(b) + 1/T) e_t(b),  E_t = mean over bets of acc_t + (T - t)/T,
            an e-detector (Shin, Ramdas & Rinaldo 2023, arXiv 2203.03532, section 2) with a finite horizon. A mode's
            evidence is the mean of its streams'; it alarms for good when that reaches 6 / alpha. By Ville's inequality
            the chance of any false alarm, over all modes and rounds, is at most alpha.
    clear   the product over the last WINDOW rounds against "beyond the margin"; all streams of a mode must pass
            6 T / alpha, so the chance of any false `clear`, over all modes and rounds, is at most alpha. It expires
            with its window: having been fine in round 3 says nothing about round 30. The bound is about windows
            whose rounds are all beyond the margin; in the WINDOW - 1 rounds after a sudden drop, the good rounds
            before it can still carry a `clear`.
    unknown otherwise, and whenever a release is absent.
A client that could not score a stream is counted in its `missing` bit; for `clear` it is the worst possible client.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Final

import numpy as np

from fedcanary.monitor import eprocess
from fedcanary.probes.base import CLIP, SEVERE, SEVERE_NAME
from fedcanary.probes.calibration import BINS, SIGNED
from fedcanary.types import Evidence, Mode, Release, State, missing_bit

WINDOW = 3
SIGNS: Final = tuple(product((1, -1), repeat=BINS))  # patterns of signs over the calibration bins
REACH = SEVERE  # a margin at or beyond the clip cannot be seen in clipped values, so no `clear` leans on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One question. `sign=-1` mirrors the coordinate, so that "negative is worse" always holds.

    kind      coord            the alarm is against
    mean      a difference     mean >= -margin; and, if there is a bit `severe`, a share of it of at most `share`
    share     a bit            share of ones <= margin
    spread    a difference     variance over the clients <= margin, whatever the mean
    pooled    "signed"         sum over bins of |mean of signed:bin| <= margin: the error of all clients pooled
    """

    name: str
    kind: str
    coord: str
    square: str = ""
    margin: float
    sign: int = 1
    severe: str = ""
    share: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModePlan:
    """How a mode is judged: by its streams, any of which alarms, and all of which must be clear."""

    mode: Mode
    unit: str
    margin: float
    streams: tuple[Stream, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything the monitor decides beforehand."""

    modes: tuple[ModePlan, ...]
    alpha: float
    horizon: int
    epochs: int = 1  # times that the tests may begin: at the start, and after each re-baseline; they share alpha

    @property
    def alarm_at(self) -> float:
        """E-value at which a mode alarms."""
        return len(self.modes) * self.epochs / self.alpha

    @property
    def clear_at(self) -> float:
        """E-value of a window at which a mode is clear."""
        return len(self.modes) * self.epochs * self.horizon / self.alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamState:
    """Log accumulated evidence for each bet, and the last rounds' log clear values for each bet."""

    worse: tuple[float, ...] = ()
    window: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorState:
    """After `round` rounds: each stream's state by mode, and since when a mode has been in alarm."""

    round: int
    streams: Mapping[str, tuple[StreamState, ...]]
    since: Mapping[str, int]


def plan(
    margins: Mapping[str, float],
    parts: Mapping[Mode, Sequence[str]],
    units: Mapping[str, str],
    alpha: float,
    horizon: int,
    *,
    groups: Mapping[str, float],
    severe: float = 0.0,
    spread: float = 0.0,
    pooled: float = 0.0,
    epochs: int = 1,
) -> Plan:
    """The default plan: a stream for each part of a mode.

    `severe` is the share of clients that may fall by more than `probes.base.SEVERE`, `spread` the variance of the
    clients' change of score that mode 3 allows, `pooled` the calibration error of all clients pooled that mode 2 does;
    0: that is not asked.

    `groups` maps a group that mode 1 reads to the base's own contrast of it.
    For a group whose base contrast is r, widening means |r + mean change| > |r| + margin: upwards the change may go to
    |r| - r + margin, downwards to -(|r| + r + margin); narrowing an existing gap is no alarm.
    """
    modes = []
    for mode in Mode:
        margin = margins[mode]
        if mode == Mode.AMPLIFIED_BIAS:
            streams = [
                Stream(
                    name=f"{group} {'gains' if sign < 0 else 'loses'}",
                    kind="mean",
                    coord=f"contrast:{group}",
                    square=f"square:{group}",
                    margin=abs(r) + sign * r + margin,
                    sign=sign,
                    severe=SEVERE_NAME if severe else "",
                    share=severe,
                )
                for group, r in groups.items()
                for sign in (1, -1)
            ]
        elif mode == Mode.FAIRNESS_COLLAPSE:
            streams = [Stream(name="left behind", kind="share", coord="tail", margin=margin)]
            if spread:
                streams.append(Stream(name="spread", kind="spread", coord="delta", square="square", margin=spread))
        else:
            streams = [_part(part, margin, severe) for part in parts[mode]]
            if pooled and mode == Mode.CONFIDENCE_MISCALIBRATION:
                streams.append(Stream(name="pooled", kind="pooled", coord=SIGNED, square="ece_square", margin=pooled))
        modes.append(ModePlan(mode=mode, unit=units[mode], margin=margin, streams=tuple(streams)))
    return Plan(modes=tuple(modes), alpha=alpha, horizon=horizon, epochs=epochs)


def _part(part: str, margin: float, severe: float) -> Stream:
    name, square = ("mean", "square") if part == "delta" else (part, f"{part}_square")
    bit = SEVERE_NAME if severe else ""
    return Stream(name=name, kind="mean", coord=part, square=square, margin=margin, severe=bit, share=severe)


def start(plan: Plan) -> MonitorState:
    """No evidence yet."""
    return MonitorState(
        round=0, streams={p.mode: tuple(StreamState() for _ in p.streams) for p in plan.modes}, since={}
    )


def rebaseline(plan: Plan, state: MonitorState, modes: Collection[Mode]) -> MonitorState:
    """Begin these modes' tests anew after a fix: their evidence and alarms are gone, the others' stay.

    Each of `plan.epochs` beginnings has its share of alpha, so the bound on any false alarm holds over all of them.
    """
    fresh = start(plan).streams
    return MonitorState(
        round=state.round,
        streams={mode: fresh[mode] if mode in modes else kept for mode, kept in state.streams.items()},
        since={mode: since for mode, since in state.since.items() if mode not in modes},
    )


def step(plan: Plan, state: MonitorState, releases: Mapping[str, Release]) -> tuple[MonitorState, tuple[Evidence, ...]]:
    """Take in one round's releases. Pure: the same plan, state and releases give the same result."""
    round = state.round + 1
    streams, since, evidence = {}, dict(state.since), []
    for mode_plan in plan.modes:
        mode = mode_plan.mode
        release = releases.get(mode)
        old = state.streams[mode]
        new = tuple(_advance(plan, s, o, release) for s, o in zip(mode_plan.streams, old, strict=True))
        streams[str(mode)] = new
        remaining = max(plan.horizon - round, 0) / plan.horizon
        worse = _mean([_capital(s.worse, remaining) for s in new])
        clear = min((_window_value(s) for s in new), default=0.0)
        if worse >= plan.alarm_at and mode not in since:
            since[mode] = round
        verdict: State = "unknown"
        if mode in since:
            verdict = "alarm"
        elif clear >= plan.clear_at:
            verdict = "clear"
        evidence.append(_evidence(mode_plan, release, verdict, worse, clear, since.get(mode), plan))
    return MonitorState(round=round, streams=streams, since=since), tuple(evidence)


def _advance(plan: Plan, stream: Stream, old: StreamState, release: Release | None) -> StreamState:
    bets = len(bets_of(stream))
    before = old.worse or (-math.inf,) * bets
    worse: tuple[float, ...]
    clear: tuple[float, ...]
    if release is None:  # a round without an answer: nothing is learned, and nothing fresh supports a clear
        worse, clear = (0.0,) * bets, (-math.inf,)
    else:
        worse, clear = log_values(stream, release)
    begin = -math.log(plan.horizon)
    return StreamState(
        worse=tuple(eprocess.log_mean_exp([a, begin]) + math.log(2) + e for a, e in zip(before, worse, strict=True)),
        window=(*old.window, clear)[-WINDOW:],
    )


def bets_of(stream: Stream) -> Sequence[object]:
    """What a stream's alarm bets on, one for each of `StreamState.worse`."""
    if stream.kind == "pooled":
        return [(signs, effect) for signs in SIGNS for effect in eprocess.PLAIN]
    if stream.kind == "mean":
        return eprocess.WORSE if stream.severe else eprocess.PLAIN
    return eprocess.ABOVE


def log_values(stream: Stream, release: Release) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A round's log e-values, worse and clear, one for each bet."""
    margin, missing = stream.margin, release.missing_coord(stream.coord)
    x = eprocess.Sums(
        n=release.count,
        missing=release.sum(missing) if missing else 0.0,
        missing_std=release.noise(missing) if missing else 0.0,
        lost=release.lost,
        lost_std=release.lost_std,
    )
    if stream.square:
        x = replace(x, q=release.sum(stream.square), q_std=release.noise(stream.square))
    if stream.kind == "pooled":
        return _pooled_logs(x, margin, release)
    bit = stream.coord if stream.kind == "share" else stream.severe
    if bit:
        x = replace(x, b=release.sum(bit), b_std=release.noise(bit))
    if stream.kind == "share":
        return (
            tuple(eprocess.log_bits_above(x, margin, lam) for lam in eprocess.above_bets(x, margin)),
            tuple(eprocess.log_bits_below(x, margin, lam) for lam in eprocess.below_bets(x, margin)),
        )
    x = replace(x, s=stream.sign * release.sum(stream.coord), s_std=release.noise(stream.coord))
    if stream.kind == "spread":
        share, as_bit = min(margin / CLIP**2, 0.5), replace(x, b_std=x.q_std / CLIP**2)
        return (
            tuple(eprocess.log_spread_above(x, margin, lam) for lam in eprocess.above_bets(as_bit, share)),
            tuple(eprocess.log_spread_below(x, margin, lam) for lam in eprocess.below_bets(as_bit, share)),
        )
    share_of, near = stream.share if stream.severe else None, min(margin, REACH)
    bets = eprocess.worse_bets(x, margin, share_of)
    return (
        tuple(eprocess.log_worse(x, margin, lam, tilt, share_of or 0.0) for lam, tilt in bets),
        tuple(eprocess.log_clear(x, near, lam) for lam in eprocess.clear_bets(x, near)),
    )


def _pooled_logs(x: eprocess.Sums, margin: float, release: Release) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of sum over bins |mean_b| against the margin: it is the largest, over all patterns of signs, of the signed sums.

    So whatever the truth, each pattern's mean is within the margin if the pooled error is, and one e-value against
    each is evidence: no maximum is taken over noise. For clear all patterns must be within it: the least over them.
    """
    bins = [release.sum(f"{SIGNED}:{b}") for b in range(BINS)]
    std = math.hypot(*(release.noise(f"{SIGNED}:{b}") for b in range(BINS)))
    each = [replace(x, s=-sum(g * v for g, v in zip(signs, bins, strict=True)), s_std=std) for signs in SIGNS]
    worse = [
        eprocess.log_worse(y, margin, lam, clip=1.0)
        for y in each
        for lam, _ in eprocess.worse_bets(y, margin, None, clip=1.0)
    ]
    bets = eprocess.clear_bets(each[0], margin, clip=1.0)
    clear = [np.minimum.reduce([eprocess.log_clear(y, margin, lam, clip=1.0) for y in each]) for lam in bets]
    return tuple(worse), tuple(clear)


def _capital(worse: Sequence[float], remaining: float) -> float:
    return math.exp(min(eprocess.log_mean_exp(worse), 600.0)) + remaining


def _window_value(state: StreamState) -> float:
    if len(state.window) == 0 or any(len(w) != len(state.window[-1]) for w in state.window):
        return 0.0
    totals = [sum(column) for column in zip(*state.window, strict=True)]
    return math.exp(min(eprocess.log_mean_exp(totals), 600.0))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _evidence(
    mode_plan: ModePlan,
    release: Release | None,
    state: State,
    worse: float,
    clear: float,
    since: int | None,
    plan: Plan,
) -> Evidence:
    if release is None or not mode_plan.streams:
        why = "no release in this round" if mode_plan.streams else "no public items of this mode's role"
        estimate, interval, part, details = math.nan, (math.nan, math.nan), "", {}
    else:
        estimate, interval, part = headline(mode_plan, release)
        details = {c: release.mean_answered(c) for c in release.coords if not _auxiliary(c)}
        why = _why(state, clear, release, plan, mode_plan, estimate)
    return Evidence(
        mode=mode_plan.mode,
        state=state,
        estimate=estimate,
        interval=interval,
        unit=mode_plan.unit,
        e_worse=worse,
        e_not_worse=clear,
        since_round=since,
        why=why,
        part=part,
        details=details,
    )


def _auxiliary(coord: str) -> bool:
    return "square" in coord or coord == "missing" or coord.endswith(missing_bit("")) or SIGNED in coord


def _why(state: State, clear: float, release: Release, plan: Plan, mode_plan: ModePlan, estimate: float) -> str:
    streams = mode_plan.streams
    if state == "alarm" and estimate <= mode_plan.margin:  # what else than the estimate raised it, or that it is over
        found = [(release.sum(s.severe) / max(release.answered(s.coord), 1.0), s.share) for s in streams if s.severe]
        share, allowed = max(found, default=(0.0, 0.0))
        if share > allowed:
            return f"the mean is within its margin, but {share:.0%} of the clients lost more than {SEVERE:g}"
        return "this round is within the margin; an alarm stays"
    if state != "unknown":
        return ""
    missing = max((release.missing(s.coord) for s in streams), default=release.missing()) / release.count
    if missing >= 0.5:
        return f"{missing:.0%} of the clients could not score it"
    have = f"for clear: {clear:.3g} of {plan.clear_at:.0f}"
    return f"neither test has enough evidence ({have}); more clients or rounds would help"


def worst(mode_plan: ModePlan, mean_of: Callable[[Stream], float]) -> tuple[float, Stream | None]:
    """The mode's headline: how much worse its worst stream is, in the mode's unit, given each stream's mean.

    A stream whose margin was moved by a public fact (mode 1: the base's own gap) is measured from there, so that the
    headline compares with the mode's margin. NaN if no stream has a mean.
    """
    found = [
        (value if stream.kind == "share" else -stream.sign * value - (stream.margin - mode_plan.margin), stream)
        for stream in mode_plan.streams
        if stream.kind in ("mean", "share") and math.isfinite(value := mean_of(stream))
    ]
    return max(found, key=lambda pair: pair[0], default=(math.nan, None))


def cut(noised: float) -> float:
    """A share or probability that noise may have carried beyond 0 or 1, where none is; NaN stays."""
    return min(max(noised, 0.0), 1.0)


def headline(mode_plan: ModePlan, release: Release) -> tuple[float, tuple[float, float], str]:
    """The mode's estimate over the round's clients with a 95% normal interval, and the stream it is of."""
    value, stream = worst(mode_plan, lambda s: release.mean_answered(s.coord))
    if stream is None:  # nobody could score it: there is no estimate, least of all zero
        return math.nan, (math.nan, math.nan), ""
    n = release.answered(stream.coord)
    mean = release.mean_answered(stream.coord)
    second = mean if stream.kind == "share" else release.sum(stream.square) / n
    half = 1.96 * math.sqrt(max(second - mean**2, 0.0) / n + (release.noise(stream.coord) / n) ** 2)
    low, high = value - half, value + half
    if stream.kind == "share":
        low, value, high = map(cut, (low, value, high))
    return value, (low, high), stream.name


def plan_body(plan: Plan) -> dict[str, Any]:
    """The plan as the record keeps it."""
    return asdict(plan)


def plan_from(body: Mapping[str, Any]) -> Plan:
    """Inverse of `plan_body`."""
    modes = tuple(
        ModePlan(
            mode=Mode(mode["mode"]),
            unit=mode["unit"],
            margin=mode["margin"],
            streams=tuple(Stream(**stream) for stream in mode["streams"]),
        )
        for mode in body["modes"]
    )
    return Plan(modes=modes, alpha=body["alpha"], horizon=body["horizon"], epochs=body.get("epochs", 1))
