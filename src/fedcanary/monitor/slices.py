"""Drill-down: once a mode is in alarm, which slices of the federation is it worse in? E-values, and e-BH over them.

One slice, one round. Client i has a shrinkage f_i in (0, 1] (encode.py), u_i = 1 if it is in the slice and can say,
d_i its difference in [-c, c], m the margin. Released are S = sum f u d, Q = sum f u d^2 and n = sum f u, each with
noise of its own: independent, sub-Gaussian with parameter std (see eprocess.py). The count is noisy too: nobody may
know who is in a slice. H0: sum f u (d + m) >= 0, that is, the slice's mean difference, as reported, is at least -m.

Exact sums. z_i = f_i u_i (d_i + m) <= c + m and z_i^2 <= f_i u_i (d_i + m)^2. With h = lambda (c + m) < 1 and a =
kappa(h) lambda^2 (eprocess.py), 1 - lambda z_i >= exp(-lambda z_i - a z_i^2), and prod (1 - lambda z_i) <=
exp(-lambda sum z_i) <= 1 under H0, for the very clients, whoever they are. So exp(-lambda Y - a YY) <= 1 with
    Y = S + m n,    YY = Q + 2 m S + m^2 n >= sum z_i^2.
For clients drawn independently with E z_i >= 0 the same product has mean at most 1.
Noise. In the exponent S enters with the factor -(lambda + 2 a m), Q with -a, n with -(lambda m + a m^2). Noise with
the factor g has mean E exp(g noise) <= exp(g^2 std^2 / 2): half of all g^2 std^2 is subtracted, the mean stays at most
1.
Bits (b_i = 1 is bad, p the margin). H0: sum f u (b - p) <= 0. With L = ln(1 + p (e^lambda - 1)) and B = sum f u b, the
e-value is exp(lambda B - L n): under H0 lambda B - L n <= (lambda p - L) n <= 0, because L >= lambda p (Jensen). For
clients drawn independently, exp(f u (lambda b - L)) <= 1 + f u (b - p) (e^lambda - 1) e^-L, because exp is convex, and
that has mean at most 1. Noise costs (lambda std_B)^2 / 2 + (L std_n)^2 / 2.

Rounds. Each slice's e-process mixes lambda and the answer, among at most H, with which its bet begins: one half on the
first (the mode is in alarm already), the rest spread over the others. Given the past every factor has mean at most 1
under H0, whatever made the monitor ask: the noise is fresh, and H0 speaks of the very clients who answer.

Which slices are named. Drill-down j has alpha_j = alpha / (j (j + 1)), charged to the error ledger before it begins.
It names its k slices of largest e-value, for the largest k such that each is at least K / (alpha_j (R + k)), where K is
how many slices there are and R how many the drill-downs before it name. For a single drill-down this is e-BH (Wang &
Ramdas 2022, arXiv 2009.02824, section 4), for drill-downs of a single slice it is e-LOND (Xu & Ramdas 2024, arXiv
2311.06412, section 3); here sets come in a sequence, and each of the two covers half of that.
Guarantee: at every round, chosen however one likes, the expected share of wrong ones among all slices named (FDR) is
at most alpha, whatever depends on whatever. Where drill-down j names a null slice, 1 <= alpha_j (R + k) E / K, and
R + k is at most how many are named in all; so the share is at most the sum over j of alpha_j times the mean over its
slices of E for the nulls, and E[E] <= 1 at every stopping time. A slice may stop being named when later rounds speak
for it.

A slice whose noisy count less two standard deviations of its noise is below the cohort floor enters with e-value 0
(smaller than what it has, so nothing above changes) and is reported without any number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from fedcanary.monitor import base, eprocess, error_ledger
from fedcanary.probes.base import CLIP, SEVERE
from fedcanary.probes.slices import clients_of, difference_of, square_of
from fedcanary.types import Evidence, Mode, Release

LAMBDAS: Final = (0.2, 0.4, 0.8, 1.5, 2.4, 3.1)
BIT_LAMBDAS: Final = (0.1, 0.25, 0.5, 1.0, 2.0)
FIRST: Final = 0.5  # weight of the bet that begins with the first round
SliceState = Literal["worse than the margin", "not shown", "too few to say"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicePlan:
    """What is decided beforehand: the slices by name, their alpha, the floor, and how long a drill-down may be.

    `rounds` bounds the rounds of one drill-down (None: until the end, at `horizon`). `disjoint`: no client answers in
    two rounds, so that counts of rounds add up; else their mean is held to the floor.
    """

    slices: tuple[str, ...]
    alpha: float
    floor: int
    rounds: int | None
    horizon: int
    disjoint: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a drill-down asks: one stream of a mode that has been in alarm since some round."""

    mode: Mode
    since: int
    stream: base.Stream
    unit: str
    margin: float  # what the estimate compares with: the mode's own, from which a public fact may move the stream's


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What is known of a slice: sums of f u d, f u d^2 and f u, each with the std of its noise. Exact sums have 0."""

    n: float = 0.0
    s: float = 0.0
    q: float = 0.0
    n_std: float = 0.0
    s_std: float = 0.0
    q_std: float = 0.0

    def plus(self, other: Sums) -> Sums:
        """Both rounds together."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("n", "s", "q")}
        stds = {f"{name}_std": math.hypot(getattr(self, f"{name}_std"), getattr(other, f"{name}_std")) for name in sums}
        return Sums(**sums, **stds)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillDown:
    """One drill-down so far. `bets` are each slice's log accumulated evidence by lambda."""

    question: Question
    first: int  # the round in which it began
    last: int  # the round in which it was asked last
    rounds: int  # those that gave an answer
    most: int  # that it can have
    amount: float  # its share of alpha
    bets: tuple[tuple[float, ...], ...]
    sums: tuple[Sums, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Every drill-down so far, in the order they began; for each mode in alarm its first round, part and estimate."""

    round: int = 0
    drills: tuple[DrillDown, ...] = ()
    alarms: Mapping[str, tuple[int, str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceEvidence:
    """What is known of one slice about one mode, over the drill-down's rounds so far. NaN where too few are in it."""

    mode: Mode
    part: str
    unit: str
    margin: float
    slice: str
    state: SliceState
    estimate: float  # how much worse, in the unit; compare with the margin
    interval: tuple[float, float]
    clients: float  # noisy; over all rounds where panels are disjoint, else a round's mean
    e_worse: float
    since_round: int
    rounds: int


def log_worse(x: Sums, margin: float, lam: float, clip: float = CLIP) -> float:
    """Log e-value against "the slice's mean difference is at least -margin"; see the module."""
    h = lam * (clip + margin)
    if h >= 1:
        return -math.inf
    a = eprocess.kappa(h) * lam**2
    on_s, on_n = lam + 2 * a * margin, lam * margin + a * margin**2
    return -on_s * x.s - a * x.q - on_n * x.n - eprocess.noise_cost(0.0, (on_s, x.s_std), (a, x.q_std), (on_n, x.n_std))


def log_bits_above(x: Sums, share: float, lam: float, clip: float = CLIP) -> float:
    """Log e-value against "the slice's share of bad bits is at most `share`", where a bad bit was said as d = -clip."""
    on_b, on_n = lam, math.log1p(share * math.expm1(lam))
    return on_b * -x.s / clip - on_n * x.n - eprocess.noise_cost(0.0, (on_b, x.s_std / clip), (on_n, x.n_std))


def name(log_e: Sequence[float], amount: float, before: int) -> tuple[bool, ...]:
    """Which of a drill-down's K slices are named, given their log e-values and how many were named before it.

    >>> name([math.log(300), math.log(190), 0.0, -math.inf], 0.01, before=0)
    (False, False, False, False)
    >>> name([math.log(300), math.log(190), 0.0, -math.inf], 0.01, before=1)
    (True, True, False, False)
    """
    need = [math.log(len(log_e) / (amount * (before + k))) for k in range(1, len(log_e) + 1)]
    ordered = sorted(log_e, reverse=True)
    k = max((k for k, (e, least) in enumerate(zip(ordered, need, strict=True), start=1) if e >= least), default=0)
    return tuple(k > 0 and e >= need[k - 1] for e in log_e)


def start() -> State:
    """Nothing asked yet."""
    return State(alarms={})


def ask(plan: SlicePlan, modes: base.Plan, state: State) -> Question | None:
    """What the next round asks of slices; None if nothing.

    Of the modes in alarm whose drill-down is not over, the one not asked for the longest time: at first the one that
    alarmed first, then in turn.
    """
    found = []
    for order, mode_plan in enumerate(modes.modes):
        question = _question(mode_plan, *state.alarms.get(mode_plan.mode, (0, "", math.nan)))
        if question is None:
            continue
        drill = _drill(state, mode_plan.mode, question.since)
        if plan.rounds is None or drill is None or drill.rounds < plan.rounds:
            found.append(((drill.last if drill else 0, question.since, order), question))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def charge(plan: SlicePlan, state: State, question: Question) -> error_ledger.Charge:
    """The drill-down's charge, the same in each of its rounds; to be made before it is asked."""
    drill = _drill(state, question.mode, question.since)
    number = len(state.drills) + 1 if drill is None else state.drills.index(drill) + 1
    first = state.round + 1 if drill is None else drill.first
    return error_ledger.of_drill_down(question.mode, number, first, plan.alpha)


def step(
    plan: SlicePlan, state: State, question: Question | None, release: Release | None, evidence: Sequence[Evidence]
) -> State:
    """Take in a round: what was asked, what was released about it, and the modes' evidence after it. Pure."""
    round, drills = state.round + 1, state.drills
    if question is not None:
        drill = _drill(state, question.mode, question.since)
        new = _begun(plan, question, round, charge(plan, state, question).amount) if drill is None else drill
        new = replace(new, last=round)
        if release is not None:
            new = _advance(plan, new, release)
        drills = (*drills, new) if drill is None else tuple(new if d is drill else d for d in drills)
    alarms = {}
    for e in evidence:
        if e.state == "alarm" and e.since_round is not None:
            known = state.alarms.get(e.mode, (0, "", math.nan))
            alarms[str(e.mode)] = known if known[0] == e.since_round else (e.since_round, e.part, e.estimate)
    return State(round=round, drills=drills, alarms=alarms)


def evidence(plan: SlicePlan, state: State) -> tuple[SliceEvidence, ...]:
    """What is known of every slice of every drill-down that has had an answer."""
    found, before = [], 0
    for drill in state.drills:
        if not drill.rounds:
            continue
        few = [_too_few(plan, drill, x) for x in drill.sums]
        logs = [_log_capital(drill, bets) for bets in drill.bets]
        named = name([-math.inf if f else e for e, f in zip(logs, few, strict=True)], drill.amount, before)
        before += sum(named)
        for i, label in enumerate(plan.slices):
            found.append(_said(plan, drill, label, drill.sums[i], logs[i], few[i], named[i]))
    return tuple(found)


def _question(mode_plan: base.ModePlan, since: int, part: str, estimate: float) -> Question | None:
    """About the stream that an alarm's estimate spoke of, or else the mode's first that a slice can be asked about.

    Where the estimate was within its margin, it was the share of clients far beyond it that raised the alarm (see
    `base.Stream.severe`), and the question is where these are.
    """
    kinds = [s for s in mode_plan.streams if s.kind in ("mean", "share")]
    stream = next((s for s in kinds if s.name == part), next(iter(kinds), None))
    if not since or stream is None:
        return None
    unit, margin = mode_plan.unit, mode_plan.margin
    if stream.severe and estimate <= margin:
        unit, margin = f"share of clients that fell by more than {SEVERE:g}", stream.share
        stream = base.Stream(name=f"{stream.name}, severe", kind="share", coord=stream.severe, margin=margin)
    return Question(mode=mode_plan.mode, since=since, stream=stream, unit=unit, margin=margin)


def _drill(state: State, mode: Mode, since: int) -> DrillDown | None:
    return next((d for d in state.drills if (d.question.mode, d.question.since) == (mode, since)), None)


def _begun(plan: SlicePlan, question: Question, round: int, amount: float) -> DrillDown:
    left = max(plan.horizon - round + 1, 1)
    return DrillDown(
        question=question,
        first=round,
        last=round,
        rounds=0,
        most=left if plan.rounds is None else min(left, plan.rounds),
        amount=amount,
        bets=((-math.inf,) * len(_lambdas(question)),) * len(plan.slices),
        sums=(Sums(),) * len(plan.slices),
    )


def _lambdas(question: Question) -> tuple[float, ...]:
    return LAMBDAS if question.stream.kind == "mean" else BIT_LAMBDAS


def _weight(drill: DrillDown, place: int) -> float:
    """Weight of the bet that begins with the drill-down's answer of this number, counted from 1; they add up to 1."""
    if drill.most == 1:
        return 1.0
    return FIRST if place == 1 else (1 - FIRST) / (drill.most - 1)


def _advance(plan: SlicePlan, drill: DrillDown, release: Release) -> DrillDown:
    stream, begin = drill.question.stream, math.log(_weight(drill, drill.rounds + 1))
    value = log_worse if stream.kind == "mean" else log_bits_above
    bets, sums = [], []
    for label, before, so_far in zip(plan.slices, drill.bets, drill.sums, strict=True):
        x = read(release, label)
        sums.append(so_far.plus(x))
        gains = [value(x, stream.margin, lam) for lam in _lambdas(drill.question)]
        bets.append(tuple(_log_sum(b, begin) + gain for b, gain in zip(before, gains, strict=True)))
    return replace(drill, rounds=drill.rounds + 1, bets=tuple(bets), sums=tuple(sums))


def read(release: Release, label: str) -> Sums:
    """A slice's sums in one round's release."""
    names = {"n": clients_of(label), "s": difference_of(label), "q": square_of(label)}
    return Sums(
        **{name: release.sum(coord) for name, coord in names.items()},
        **{f"{name}_std": release.noise(coord) for name, coord in names.items()},
    )


def _log_capital(drill: DrillDown, bets: Sequence[float]) -> float:
    """Log of the e-process: all bets begun, and the weight of those that may still begin."""
    left = 1 - sum(_weight(drill, place) for place in range(1, drill.rounds + 1))
    return _log_sum(eprocess.log_mean_exp(bets), math.log(left) if left > 1e-12 else -math.inf)


def _log_sum(a: float, b: float) -> float:
    top = max(a, b)
    return top if math.isinf(top) else top + math.log(math.exp(a - top) + math.exp(b - top))


def _clients(plan: SlicePlan, drill: DrillDown, x: Sums) -> tuple[float, float]:
    """How many different clients a slice's sums are over, at the least, with the std of its noise."""
    rounds = 1 if plan.disjoint else drill.rounds
    return x.n / rounds, x.n_std / rounds


def _too_few(plan: SlicePlan, drill: DrillDown, x: Sums) -> bool:
    clients, std = _clients(plan, drill, x)
    return not clients - 2 * std >= plan.floor


def _said(
    plan: SlicePlan, drill: DrillDown, label: str, x: Sums, log_e: float, few: bool, named: bool
) -> SliceEvidence:
    question = drill.question
    estimate, interval = (math.nan, (math.nan, math.nan)) if few else _estimate(question, x)
    return SliceEvidence(
        mode=question.mode,
        part=question.stream.name,
        unit=question.unit,
        margin=question.margin,
        slice=label,
        state="too few to say" if few else "worse than the margin" if named else "not shown",
        estimate=estimate,
        interval=interval,
        clients=math.nan if few else _clients(plan, drill, x)[0],
        e_worse=math.nan if few else math.exp(min(log_e, 600.0)),
        since_round=drill.first,
        rounds=drill.rounds,
    )


def _estimate(question: Question, x: Sums, clip: float = CLIP) -> tuple[float, tuple[float, float]]:
    """How much worse, with a 95% normal interval: over clients, and over the noise of both sums of the quotient."""
    bits = question.stream.kind == "share"
    mean = x.s / x.n
    second = -mean * clip if bits else x.q / x.n
    half = 1.96 * math.hypot(math.sqrt(max(second - mean**2, 0.0) / x.n), x.s_std / x.n, abs(mean) * x.n_std / x.n)
    if bits:
        value, half = 0.0 - mean / clip, half / clip
        return value, (max(value - half, 0.0), min(value + half, 1.0))
    value = 0.0 - mean - (question.stream.margin - question.margin)
    return value, (value - half, value + half)


def plan_body(plan: SlicePlan) -> dict[str, Any]:
    """The plan as the record keeps it."""
    return asdict(plan)


def plan_from(body: Mapping[str, Any]) -> SlicePlan:
    """Inverse of `plan_body`."""
    return SlicePlan(**{**body, "slices": tuple(body["slices"])})
