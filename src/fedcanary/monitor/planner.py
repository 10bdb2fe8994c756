"""What a monitor of so many clients would see, before anything is spent; and what would help if that is too little.

    rotating  clients / rounds of them answer in a round, each once in the window. The panels are disjoint, so the
              window costs what one panel costs (parallel composition).
    same      all clients answer in every round, and epsilon is shared out over the rounds.

Of a given population, R rounds of `same` see R times as many clients a round through sqrt(R) times the noise: better
evidence, for R times the answers. With a given number of answers a round (`per_round`) rotating panels see more.

Delay and power are simulated with the monitor's own e-values (`forecast.py`, which states what is assumed of clients);
benchmarks/planner.py holds them to messages, integer noise and the monitor itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, get_args

from fedcanary.errors import BadInput, Problem, did_you_mean
from fedcanary.monitor import base as monitor
from fedcanary.monitor.base import ModePlan
from fedcanary.monitor.forecast import MEASURED, Clients, Door, Kind, Windows, tested
from fedcanary.privacy import accounting, noise
from fedcanary.privacy.accounting import MIN_DELTA, Neighbours
from fedcanary.privacy.encode import UNIT, Encoding
from fedcanary.probes.base import CLIP, Probe, asked
from fedcanary.types import Mode

Trust = Literal["secure_aggregation", "central", "local"]

MOST_CLIENTS: Final = 1_000_000  # how far plans and searches for a remedy go
MOST_EPSILON: Final = 50.0
MOST_ROUNDS: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is to be planned.

    `effects` are by mode, in the unit of its paired difference (a share, for mode 3); twice the margin where absent.
    `change` is the first round with the effect (0: a quarter into the window), `power` what counts as enough, `spread`
    the standard deviation between clients, for every mode. `per_round` is the most clients that can be asked in a round
    (0: no limit). The rest is as in the study's privacy table.
    """

    clients: int
    epsilon: float
    delta: float = 1e-6
    rounds: int = 12
    per_round: int = 0
    effects: Mapping[Mode, float] = field(default_factory=dict)
    alpha: float = 0.05
    severe: float = 0.03
    power: float = 0.8
    change: int = 0
    spread: float | None = None
    trust: Trust = "secure_aggregation"
    neighbours: Neighbours = "zeroed"
    min_cohort: int = 10
    dropouts: float = 0.3
    seed: int = 1

    @property
    def first(self) -> int:
        """The first round with the effect."""
        return self.change or 1 + self.rounds // 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeForecast:
    """What to expect of a mode.

    `noise` is the std of the noise on a panel's mean, `width` the median of a round's 95% intervals. `power` is the
    share of windows with an alarm between change and horizon, `delay` their mean number of rounds to it (1: in the
    first round with the effect). `clear` is the share that say so at the horizon where nothing is wrong, `clear_round`
    the mean of the first round that does. NaN where there is nothing to average.
    """

    mode: Mode
    effect: float
    margin: float
    noise: float
    width: float
    power: float
    delay: float
    clear: float
    clear_round: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PanelForecast:
    """One way to ask: `size` clients a round. `why` says why nothing would be opened, if so.

    `noise_multiplier` is the std over a message's norm that is asked of `floor` clients' shares.
    """

    kind: Kind
    size: int
    floor: int
    noise_multiplier: float
    modes: tuple[ModeForecast, ...]
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmet:
    """A wish that cannot be met, and the least of each thing that alone would meet it; None: not within reach.

    `what` is "alarm", "clear", or "panel" (too few clients in a round to open anything).
    """

    what: Literal["alarm", "clear", "panel"]
    mode: Mode | None
    reason: str
    clients: int | None = None
    epsilon: float | None = None
    effect: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Both ways to ask, the better one (None if neither opens anything), and what that one cannot do.

    `false_alarm` bounds the chance of any false alarm, over all modes and rounds. Under `same` it is about the clients
    that are asked: if they are worse than the population they were drawn from, they are so in every round.
    """

    wish: Wish
    panels: tuple[PanelForecast, ...]
    recommended: Kind | None
    reason: str
    false_alarm: float
    unmet: tuple[Unmet, ...]


def plan(
    wish: Wish, probes: Sequence[Probe], margins: Mapping[str, float], clients: Mapping[Mode, Clients] = MEASURED
) -> Plan:
    """Forecast both kinds of panel, for the modes that `probes` can read. The same wish gives the same plan.

    Raises:
        BadInput: every number of the wish that is out of range.
    """
    _check(wish, margins)
    planner = _Planner(wish, probes, margins, clients)
    panels = tuple(planner.forecast(kind) for kind in get_args(Kind))
    best = max(panels, key=lambda p: _merit(p, wish.power))
    closed = [planner.closed(p) for p in panels if p.why]
    return Plan(
        wish=wish,
        panels=panels,
        recommended=None if best.why else best.kind,
        reason="; ".join(_said(p, wish) for p in sorted(panels, key=lambda p: p is not best)),
        false_alarm=wish.alpha,
        unmet=(*closed, *planner.unmet(best)),
    )


def parse_effects(texts: Iterable[str]) -> dict[Mode, float]:
    """Effects by mode from "X" (for every mode) and "MODE=X". Raises BadInput with every text that is neither.

    >>> parse_effects(["0.1", "fairness_collapse=0.3"])[Mode.FAIRNESS_COLLAPSE]
    0.3
    """
    found: dict[Mode, float] = {}
    problems = []
    for text in sorted(texts, key=lambda t: "=" in t):
        name, _, value = text.rpartition("=")
        if name and name not in set(Mode):
            problems.append(Problem("effect", f"{name!r} is no mode", did_you_mean(name, Mode)))
            continue
        try:
            found.update(dict.fromkeys([Mode(name)] if name else Mode, float(value)))
        except ValueError:
            problems.append(Problem("effect", f"{value!r} is no number", "give a size, or MODE=size"))
    if problems:
        raise BadInput(problems)
    return found


def _top(mode: Mode) -> float:
    """The largest effect that a mode's values can show."""
    return 1.0 if mode == Mode.FAIRNESS_COLLAPSE else CLIP


def _check(wish: Wish, margins: Mapping[str, float]) -> None:
    def one_of(value: str, known: Sequence[str]) -> tuple[bool, str]:
        return value in known, did_you_mean(str(value), known)

    rules: list[tuple[str, object, bool, str]] = [
        ("clients", wish.clients, 1 <= wish.clients <= MOST_CLIENTS, f"from 1 to {MOST_CLIENTS}"),
        ("epsilon", wish.epsilon, 0 < wish.epsilon <= MOST_EPSILON, f"above 0, to {MOST_EPSILON:g}; 1 to 4 is usual"),
        ("delta", wish.delta, MIN_DELTA <= wish.delta < 1e-2, f"from {MIN_DELTA:g}, below 0.01; 1e-6 is usual"),
        ("rounds", wish.rounds, 1 <= wish.rounds <= MOST_ROUNDS, f"from 1 to {MOST_ROUNDS}"),
        ("per_round", wish.per_round, 0 <= wish.per_round <= MOST_CLIENTS, "at least 1, or 0 for no limit"),
        ("alpha", wish.alpha, 0 < wish.alpha < 1, "between 0 and 1; 0.05 is usual"),
        ("severe", wish.severe, 0 <= wish.severe <= 0.5, "from 0 to 0.5; 0.03 is usual"),
        ("power", wish.power, 0 < wish.power < 1, "between 0 and 1; 0.8 is usual"),
        ("change", wish.change, 0 <= wish.change <= max(wish.rounds, 0), "a round of the window, or leave it out"),
        ("spread", wish.spread, wish.spread is None or 0 <= wish.spread <= CLIP, f"from 0 to {CLIP:g}"),
        ("trust", wish.trust, *one_of(wish.trust, get_args(Trust))),
        ("neighbours", wish.neighbours, *one_of(wish.neighbours, get_args(Neighbours))),
        ("min_cohort", wish.min_cohort, 2 <= wish.min_cohort <= MOST_CLIENTS, "at least 2"),
        ("dropouts", wish.dropouts, 0 <= wish.dropouts < 0.5, "from 0, below 0.5"),
        *((f"effect {m}", x, 0 < x <= _top(m), f"above 0, to {_top(m):g}") for m, x in wish.effects.items()),
        *((f"margin {m}", None, False, "every mode needs one") for m in Mode if m not in margins),
    ]
    problems = [Problem(name, f"{value} is out of range", remedy) for name, value, good, remedy in rules if not good]
    if problems:
        raise BadInput(problems)


class _Planner:
    def __init__(
        self, wish: Wish, probes: Sequence[Probe], margins: Mapping[str, float], clients: Mapping[Mode, Clients]
    ) -> None:
        self.wish = wish
        modes = [(p, p.mode) for p in probes if p.mode is not None]
        judged = monitor.plan(
            margins,
            {mode: p.parts for p, mode in modes},
            {mode: p.unit for p, mode in modes},
            wish.alpha,
            wish.rounds,
            groups={part.removeprefix("contrast:"): 0.0 for p, _ in modes for part in p.parts if ":" in part},
            severe=wish.severe,
        )
        self.modes = [p for p in judged.modes if p.streams]
        self.windows = Windows(
            plan=judged,
            encoding=Encoding({p.name: asked(p.coords, wish.severe > 0) for p in probes}),
            clients={m: c if wish.spread is None else replace(c, std=wish.spread) for m, c in clients.items()},
            change=wish.first,
            seed=wish.seed,
        )
        self.norm = accounting.sensitivity(1.0, "substituted" if wish.trust == "local" else wish.neighbours)

    def times(self, kind: Kind) -> int:
        """How often a client answers in the window."""
        return 1 if kind == "rotating" else self.wish.rounds

    def panels(self, kind: Kind) -> int:
        """How many disjoint panels there are."""
        return self.wish.rounds if kind == "rotating" else 1

    def multiplier(self, kind: Kind, epsilon: float) -> float:
        return accounting.gaussian_std(epsilon, self.wish.delta, self.norm, self.times(kind))

    def size(self, kind: Kind) -> int:
        """Clients in a round."""
        return min(self.wish.clients // self.panels(kind), self.wish.per_round or MOST_CLIENTS)

    def floor(self, n: int) -> int:
        return max(self.wish.min_cohort, math.ceil((1 - self.wish.dropouts) * n))

    def door(self, n: int, multiplier: float) -> Door:
        """Shares suffice in a sum of `floor` clients: when all n answer, there is more noise than was asked for."""
        trust = self.wish.trust
        share = noise.share_std(multiplier * UNIT, self.floor(n) if trust == "secure_aggregation" else 1)
        return Door.of(self.windows.encoding, n, share * (1.0 if trust == "central" else math.sqrt(n)))

    def effect(self, mode_plan: ModePlan) -> float:
        return self.wish.effects.get(mode_plan.mode, min(2 * mode_plan.margin, _top(mode_plan.mode)))

    def forecast(self, kind: Kind) -> PanelForecast:
        n, multiplier = self.size(kind), self.multiplier(kind, self.wish.epsilon)
        why = ""
        modes: tuple[ModeForecast, ...] = ()
        if n < self.wish.min_cohort:
            why = f"{n} clients in a round, and no sum of fewer than {self.wish.min_cohort} is opened"
        else:
            modes = tuple(self.mode(kind, p, self.door(n, multiplier)) for p in self.modes)
        return PanelForecast(kind=kind, size=n, floor=self.floor(n), noise_multiplier=multiplier, modes=modes, why=why)

    def mode(self, kind: Kind, mode_plan: ModePlan, door: Door) -> ModeForecast:
        effect = self.effect(mode_plan)
        power, delay = self.windows.power(kind, mode_plan, door, effect)
        clear, clear_round = self.windows.cleared(kind, mode_plan, door)
        return ModeForecast(
            mode=mode_plan.mode,
            effect=effect,
            margin=mode_plan.margin,
            noise=door.noises[mode_plan.mode][tested(mode_plan)[0]] / door.n,
            width=self.windows.width(kind, mode_plan, door, effect),
            power=power,
            delay=delay,
            clear=clear,
            clear_round=clear_round,
        )

    def closed(self, panel: PanelForecast) -> Unmet:
        least = self.wish.min_cohort * self.panels(panel.kind)
        return Unmet(what="panel", mode=None, reason=f"{panel.kind}: {panel.why}", clients=least)

    def unmet(self, panel: PanelForecast) -> list[Unmet]:
        """Modes whose alarm or clear is too rare, each with its remedies."""
        found, wanted = [], self.wish.power
        for m, p in zip(panel.modes, self.modes, strict=bool(panel.modes)):
            if m.power < wanted:
                reason = f"power {m.power:.2f} at the horizon, where {wanted:g} is wanted"
                if m.effect <= m.margin:
                    reason = f"an effect of {m.effect:g} is within the margin of {m.margin:g}: no alarm is due"
                found.append(self.remedy(panel, p, "alarm", reason))
            if m.clear < wanted:
                reason = f"clear at the horizon in {m.clear:.2f} of windows, where {wanted:g} is wanted"
                found.append(self.remedy(panel, p, "clear", reason))
        return found

    def remedy(self, panel: PanelForecast, mode_plan: ModePlan, what: Literal["alarm", "clear"], reason: str) -> Unmet:
        """The least number of clients, epsilon or effect that alone would do."""
        kind, effect = panel.kind, self.effect(mode_plan)

        def enough(n: float, multiplier: float, effect: float) -> bool:
            door = self.door(math.ceil(n), multiplier)
            if what == "clear":
                return self.windows.cleared(kind, mode_plan, door)[0] >= self.wish.power
            return self.windows.power(kind, mode_plan, door, effect)[0] >= self.wish.power

        most = min(MOST_CLIENTS // self.panels(kind), self.wish.per_round or MOST_CLIENTS)
        size = _least(panel.size, most, lambda n: enough(n, panel.noise_multiplier, effect))
        quiet = 1 / self.multiplier(kind, MOST_EPSILON)
        precision = _least(1 / panel.noise_multiplier, quiet, lambda z: enough(panel.size, 1 / z, effect))
        larger = None
        if what == "alarm":
            top = _top(mode_plan.mode)
            larger = _least(effect, top, lambda x: enough(panel.size, panel.noise_multiplier, x))
        epsilon = None
        if precision is not None:
            epsilon = accounting.gaussian_epsilon(1 / precision, self.norm, self.wish.delta, self.times(kind))
        return Unmet(
            what=what,
            mode=mode_plan.mode,
            reason=reason,
            clients=None if size is None else math.ceil(size) * self.panels(kind),
            epsilon=None if epsilon is None else min(math.ceil(epsilon * 100) / 100, MOST_EPSILON),
            effect=None if larger is None else min(math.ceil(larger * 1000) / 1000, _top(mode_plan.mode)),
        )


def _least(low: float, high: float, enough: Callable[[float], bool]) -> float | None:
    """Smallest number between that is enough, to one part in a hundred and upwards; None if `high` is not."""
    if low >= high or not enough(high):
        return None
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _merit(panel: PanelForecast, power: float) -> tuple[float, ...]:
    """Whether it opens anything; modes that would alarm, that would be clear; power; and fewer answers."""
    alarms, clears = _counts(panel, power)
    return float(not panel.why), alarms, clears, round(sum(m.power for m in panel.modes), 1), -panel.size


def _counts(panel: PanelForecast, power: float) -> tuple[int, int]:
    return sum(m.power >= power for m in panel.modes), sum(m.clear >= power for m in panel.modes)


def _said(panel: PanelForecast, wish: Wish) -> str:
    alarms, clears = _counts(panel, wish.power)
    able = f"would alarm in {alarms} of {len(panel.modes)} modes and clear {clears}"
    return f"{panel.kind}: {panel.why or f'{able}, with {panel.size * wish.rounds} answers'}"
