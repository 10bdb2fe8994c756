"""The report's pictures: pure functions from numbers to SVG, with no scripts and nothing to fetch.

Every picture has a title and a description, says each state by shape or word as well as by colour, and takes its
colours from the page's CSS classes, so that light, dark and print need no second drawing. Text is escaped by
construction: all markup goes through `tag`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from markupsafe import Markup

from fedcanary.monitor.influence import FEEDBACK, PRIMARY
from fedcanary.types import Mode

WIDTH: Final = 340.0
WIDE: Final = 430.0
HEIGHT: Final = 168.0
LEFT, RIGHT, TOP, BOTTOM = 42.0, 8.0, 18.0, 34.0
POINTS: Final = 300  # a curve of more rounds is thinned to about so many
STATES: Final = ("alarm", "clear", "unknown")

Number = float | None
Point = tuple[float, float]


def tag(name: str, *children: str | Markup, **attributes: str | float) -> Markup:
    """One element; attribute names lose a trailing underscore, and other underscores become hyphens.

    >>> print(tag("text", "a < b", class_="x", text_anchor="end", y=1.50))
    <text class="x" text-anchor="end" y="1.5">a &lt; b</text>
    """
    pairs = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _short(value)) for key, value in attributes.items()
    )
    return Markup("<{}{}>{}</{}>").format(name, pairs, Markup("").join(children), name)


def _short(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


def picture(key: str, title: str, desc: str, width: float, height: float, *children: Markup) -> Markup:
    """An SVG that a screen reader can say; `key` makes its ids unique in the page."""
    return tag(
        "svg",
        tag("title", title, id=f"{key}-t"),
        tag("desc", desc, id=f"{key}-d"),
        *children,
        viewBox=f"0 0 {_short(width)} {_short(height)}",
        role="img",
        aria_labelledby=f"{key}-t {key}-d",
    )


def icon(state: str) -> Markup:
    """A triangle with a stroke, a disc with a tick, or a ring with a question mark; the word stands beside it."""
    shapes = {
        "alarm": [
            tag("path", d="M8 1 15.4 14.4H.6Z", class_="fill"),
            tag("path", d="M8 5.6v4.4M8 11.8v.9", class_="cut"),
        ],
        "clear": [
            tag("circle", cx=8, cy=8, r=7, class_="fill"),
            tag("path", d="M4.7 8.3 7 10.6 11.4 5.8", class_="cut"),
        ],
        "unknown": [
            tag("circle", cx=8, cy=8, r=6.3, class_="ring"),
            tag("path", d="M6.2 6.4a1.9 1.9 0 1 1 2.6 1.8c-.5.2-.8.5-.8 1.1M8 11.2v.8", class_="mark"),
        ],
    }
    return tag("svg", *shapes[state], class_=f"icon s-{state}", viewBox="0 0 16 16", aria_hidden="true")


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most about `most` round numbers between low and high.

    >>> ticks(0.0, 0.3), ticks(0.55, 0.62)
    ([0.0, 0.1, 0.2, 0.3], [0.56, 0.58, 0.6, 0.62])
    """
    span = (high - low) / most
    power = 10.0 ** math.floor(math.log10(span))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= span * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def round_ticks(rounds: int) -> list[int]:
    """Which rounds the horizontal axis names.

    >>> round_ticks(12), round_ticks(3)
    ([1, 3, 6, 9, 12], [1, 2, 3])
    """
    step = next(s * 10**p for p in range(9) for s in (1, 2, 3, 5) if rounds / (s * 10**p) <= 5)
    return [1, *(r for r in range(step, rounds + 1, step) if r > 1)]


def thin(length: int) -> list[int]:
    """Indices of the rounds a picture or table shows: all, or evenly spaced with both ends."""
    if length <= POINTS:
        return list(range(length))
    return sorted({round(i * (length - 1) / (POINTS - 1)) for i in range(POINTS)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Where rounds and values lie in a picture."""

    rounds: int
    low: float
    high: float
    width: float = WIDTH
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM

    def x(self, round: float) -> float:
        """Middle of a round's column."""
        return LEFT + (self.width - LEFT - RIGHT) * (round - 0.5) / max(self.rounds, 1)

    def y(self, value: float) -> float:
        """Height of a value; never outside the plot."""
        share = (value - self.low) / (self.high - self.low)
        return self.bottom - (self.bottom - self.top) * min(max(share, 0.0), 1.0)

    def axes(self, say: Callable[[float], str], named: bool = True) -> list[Markup]:
        """Grid lines with their values, and the rounds below."""
        parts = []
        for value in ticks(self.low, self.high):
            y = self.y(value)
            parts.append(
                tag("path", d=f"M{LEFT:.0f} {y:.1f}H{self.width - RIGHT:.0f}", class_="zero" if value == 0 else "grid")
            )
            parts.append(tag("text", say(value), x=LEFT - 6, y=y + 3.5, class_="tick end"))
        if named:
            for r in round_ticks(self.rounds):
                parts.append(tag("text", str(r), x=self.x(r), y=self.bottom + 27, class_="tick mid"))
        return parts


def frame_for(
    values: Sequence[Number], rounds: int, *, least: float, around: Sequence[float] = (), width: float = WIDTH
) -> Frame:
    """A frame that holds the finite values and `around`, at least `least` high."""
    finite = [v for v in (*values, *around) if v is not None and math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    grow = max(least - (high - low), 0.0) / 2
    pad = 0.06 * (high - low + 2 * grow)
    return Frame(rounds=rounds, low=low - grow - pad, high=high + grow + pad, width=width)


def _segments(points: Sequence[Point | None]) -> list[list[Point]]:
    """The runs between gaps."""
    runs = [[p for p in run if p is not None] for there, run in groupby(points, lambda p: p is not None) if there]
    return [run for run in runs if run]


def line(frame: Frame, values: Sequence[Number], class_: str) -> list[Markup]:
    """A curve over rounds; it breaks where there is no value, and a lone value is a dot."""
    shown = [
        (frame.x(i + 1), frame.y(v)) if (v := values[i]) is not None and math.isfinite(v) else None
        for i in thin(len(values))
    ]
    parts = []
    for run in _segments(shown):
        if len(run) == 1:
            parts.append(tag("circle", cx=run[0][0], cy=run[0][1], r=2.6, class_=f"dot {class_}"))
        else:
            parts.append(tag("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in run), class_=f"line {class_}"))
    return parts


def band(frame: Frame, lows: Sequence[Number], highs: Sequence[Number]) -> list[Markup]:
    """The area between two curves; a lone round is a bar."""
    shown: list[tuple[float, float, float] | None] = []
    for i in thin(len(lows)):
        low, high = lows[i], highs[i]
        there = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
        shown.append(
            (frame.x(i + 1), frame.y(low), frame.y(high)) if there and low is not None and high is not None else None
        )
    parts = []
    for there, group in groupby(shown, lambda p: p is not None):
        run = [p for p in group if p is not None]
        if not there:
            continue
        if len(run) == 1:
            x, low_y, high_y = run[0]
            parts.append(tag("rect", x=x - 3, y=high_y, width=6, height=max(low_y - high_y, 1), class_="band"))
            continue
        up = "L".join(f"{x:.1f} {h:.1f}" for x, _, h in run)
        down = "L".join(f"{x:.1f} {low_y:.1f}" for x, low_y, _ in reversed(run))
        parts.append(tag("path", d=f"M{up}L{down}Z", class_="band"))
    return parts


def states_strip(frame: Frame, states: Sequence[str]) -> list[Markup]:
    """The verdict of each round below a plot: a full bar for alarm, a thin bar for clear, a hollow one for unknown."""
    parts, begin = [], 0
    half = (frame.x(2) - frame.x(1)) / 2
    for state, run in groupby(states):
        length = len(list(run))
        left, right = frame.x(begin + 1) - half + 0.5, frame.x(begin + length) + half - 0.5
        height = {"alarm": 8.0, "clear": 4.0, "unknown": 6.0}[state]
        y = frame.bottom + 10 - height / 2
        parts.append(
            tag("rect", x=left, y=y, width=max(right - left, 0.6), height=height, rx=1.5, class_=f"run s-{state}")
        )
        begin += length
    return parts


def alarm_marks(frame: Frame, since: Mapping[int, Sequence[int]]) -> list[Markup]:
    """A line at each round in which an alarm was raised, with the modes' numbers above it."""
    parts = []
    for round, numbers in since.items():
        x = frame.x(round)
        parts.append(tag("path", d=f"M{x:.1f} {frame.top:.1f}V{frame.bottom:.1f}", class_="since"))
        parts.append(tag("text", "▲" + ",".join(map(str, numbers)), x=x, y=frame.top - 5, class_="flag mid"))
    return parts


def share(value: float) -> str:
    """A tick's text, as short as it can be without losing a digit."""
    return f"{value:.3f}".rstrip("0").rstrip(".").replace("-", "−") or "0"


def utility_chart(
    key: str, title: str, base: Sequence[Number], now: Sequence[Number], since: Mapping[int, Sequence[int]]
) -> Markup:
    """Personalized models against the base, with the rounds in which alarms were raised."""
    frame = frame_for([*base, *now], len(now), least=0.04)
    desc = f"{title} by round: personalized models {_ends(now)}; base model {_ends(base)}."
    parts = [*frame.axes(share), *alarm_marks(frame, since), *line(frame, base, "base"), *line(frame, now, "now")]
    return picture(key, title, desc, WIDTH, HEIGHT, *parts)


def mode_chart(
    key: str, title: str, curve: Sequence[Sequence[Number | str]], margin: float, since: int | None
) -> Markup:
    """One mode's estimate with its interval, the margin, and the verdict of every round."""
    estimates, lows, highs = ([_number(row[i]) for row in curve] for i in range(3))
    states = [str(row[3]) for row in curve]
    frame = frame_for([*estimates, *lows, *highs], len(curve), least=0.0, around=(0.0, margin * 1.5, -margin / 2))
    edge = frame.y(margin)

    def room(values: Sequence[Number]) -> float:  # between them and a word above the margin
        return min((abs(frame.y(value) - edge + 8) for value in values if value is not None), default=math.inf)

    first = room(estimates[:2]) > room(estimates[-2:])
    x, class_ = (LEFT + 3, "flag") if first else (WIDTH - RIGHT - 3, "flag end")
    parts = [
        tag("rect", x=LEFT, y=frame.top, width=WIDTH - LEFT - RIGHT, height=edge - frame.top, class_="beyond"),
        *frame.axes(share),
        *band(frame, lows, highs),
        tag("path", d=f"M{LEFT:.0f} {edge:.1f}H{WIDTH - RIGHT:.0f}", class_="margin"),
        tag("text", "margin", x=x, y=edge - 4, class_=class_),
        *(alarm_marks(frame, {since: []}) if since else []),
        *line(frame, estimates, "now"),
        *states_strip(frame, states),
    ]
    when = f" An alarm was raised in round {since}." if since else ""
    counts = ", ".join(f"{states.count(s)} {s}" for s in STATES if states.count(s))
    desc = f"How much worse by round: {_ends(estimates)}; margin {margin:.3g}. Rounds by verdict: {counts}.{when}"
    return picture(key, title, desc, WIDTH, HEIGHT, *parts)


def clients_chart(key: str, asked: Sequence[int], answered: Sequence[float]) -> Markup:
    """How many clients were asked in a round, and how many are in its sums."""
    frame = Frame(rounds=len(asked), low=0.0, high=max([*asked, *answered, 1]) * 1.12)
    half = min(max((frame.x(2) - frame.x(1)) * 0.36, 0.4), 16.0)
    bars = []
    for i in thin(len(asked)):
        for value, class_ in ((float(asked[i]), "asked"), (answered[i], "answered")):
            y = frame.y(value)
            bars.append(
                tag("rect", x=frame.x(i + 1) - half, y=y, width=2 * half, height=frame.bottom - y, class_=class_)
            )
    lost = sum(asked) - sum(answered)
    desc = f"{_ends([float(a) for a in asked])} clients asked; {lost:.0f} answers missing over all rounds."
    return picture(key, "Clients in each round", desc, WIDTH, HEIGHT, *frame.axes(lambda v: f"{v:g}"), *bars)


def spread_chart(key: str, means: Sequence[Number], sds: Sequence[Number]) -> Markup:
    """Mean and one standard deviation of the clients' scores."""
    lows = [m - s if m is not None and s is not None else None for m, s in zip(means, sds, strict=True)]
    highs = [m + s if m is not None and s is not None else None for m, s in zip(means, sds, strict=True)]
    frame = frame_for([*lows, *highs], len(means), least=0.04, width=WIDE)
    desc = f"Mean score {_ends(means)}; standard deviation {_ends(sds)}."
    parts = [*frame.axes(share), *band(frame, lows, highs), *line(frame, means, "now")]
    return picture(key, "Spread of the clients' scores by round", desc, WIDE, HEIGHT, *parts)


def share_chart(key: str, title: str, shares: Sequence[Number]) -> Markup:
    """A share of the clients in each round, as bars."""
    top = max([v for v in shares if v is not None] + [0.08]) * 1.15
    frame = Frame(rounds=len(shares), low=0.0, high=top, width=WIDE)
    half = min(max((frame.x(2) - frame.x(1)) * 0.3, 0.4), 16.0)
    bars = []
    for i in thin(len(shares)):
        if (v := shares[i]) is not None:
            x, y = frame.x(i + 1) - half, frame.y(v)
            bars.append(tag("rect", x=x, y=y, width=2 * half, height=frame.bottom - y, class_="left-behind"))
    parts = [*frame.axes(lambda v: f"{v * 100:.3g}%"), *bars]
    return picture(key, title, f"{title}: {_ends(shares)}.", WIDE, HEIGHT, *parts)


NODES: Final[Mapping[Mode, Point]] = {
    Mode.AMPLIFIED_BIAS: (126, 46),
    Mode.CONFIDENCE_MISCALIBRATION: (344, 46),
    Mode.FAIRNESS_COLLAPSE: (126, 186),
    Mode.ADAPTATION_MISALIGNMENT: (344, 186),
    Mode.ALIGNMENT_EROSION: (126, 326),
    Mode.OUT_OF_DOMAIN_DEGRADATION: (344, 326),
}
HALF_WIDTH, HALF_HEIGHT = 90.0, 38.0
AROUND: Final[Mapping[tuple[Mode, Mode], str]] = {  # edges that go round a node; the others are straight
    (Mode.CONFIDENCE_MISCALIBRATION, Mode.OUT_OF_DOMAIN_DEGRADATION): "M434 58C478 110 478 262 439 312",
    (Mode.ALIGNMENT_EROSION, Mode.AMPLIFIED_BIAS): "M36 314C-8 262 -8 110 31 60",
}


def influence_graph(key: str, modes: Mapping[str, Mapping[str, object]]) -> Markup:
    """The six modes and what tends to bring what; an edge between two alarms stands out."""
    parts = [
        tag("defs", *(_arrow(f"{key}-{end}", f"head {end}") for end in ("rest", "lit"))),
    ]
    lit_edges = []
    for kind, edges in (("primary", PRIMARY), ("feedback", FEEDBACK)):
        for parent, child in edges:
            lit = modes[parent]["state"] == modes[child]["state"] == "alarm"
            if lit:
                lit_edges.append(f"{modes[parent]['label']} to {modes[child]['label']}")
            end = "lit" if lit else "rest"
            path = AROUND.get((parent, child)) or _straight(NODES[parent], NODES[child])
            parts.append(tag("path", d=path, class_=f"edge {kind} {end}", marker_end=f"url(#{key}-{end})"))
    for number, mode in enumerate(Mode, start=1):
        parts += _node(
            number, str(modes[mode]["label"]), str(modes[mode]["layer"]), str(modes[mode]["state"]), NODES[mode]
        )
    alarms = [str(modes[m]["label"]) for m in Mode if modes[m]["state"] == "alarm"]
    desc = f"In alarm: {', '.join(alarms) or 'none'}. Edges between two alarms: {', '.join(lit_edges) or 'none'}."
    return picture(key, "How the six modes influence one another", desc, 470, 372, *parts)


def _arrow(id: str, class_: str) -> Markup:
    return tag(
        "marker",
        tag("path", d="M0 0 8 4 0 8Z", class_=class_),
        id=id,
        viewBox="0 0 8 8",
        refX=6,
        refY=4,
        markerWidth=8,
        markerHeight=8,
        markerUnits="userSpaceOnUse",
        orient="auto",
    )


def _straight(start: Point, end: Point) -> str:
    """From the border of one box to a little before the border of another."""
    (x0, y0), (x1, y1) = start, end
    dx, dy = x1 - x0, y1 - y0
    reach = min(HALF_WIDTH / abs(dx) if dx else math.inf, HALF_HEIGHT / abs(dy) if dy else math.inf)
    gap = 5 / math.hypot(dx, dy)
    a, b = reach, 1 - reach - gap
    return f"M{x0 + a * dx:.1f} {y0 + a * dy:.1f}L{x0 + b * dx:.1f} {y0 + b * dy:.1f}"


def _node(number: int, label: str, layer: str, state: str, at: Point) -> list[Markup]:
    x, y = at[0] - HALF_WIDTH, at[1] - HALF_HEIGHT
    first, _, second = label.partition(" ")
    return [
        tag("rect", x=x, y=y, width=2 * HALF_WIDTH, height=2 * HALF_HEIGHT, rx=8, class_=f"node s-{state}"),
        tag("text", f"{number} · {layer}", x=x + 12, y=y + 20, class_="layer"),
        tag("text", {"alarm": "▲ alarm", "clear": "✓ clear", "unknown": "? unknown"}[state],
            x=x + 2 * HALF_WIDTH - 12, y=y + 19, class_=f"word end s-{state}"),
        tag("text", first, x=x + 12, y=y + 43, class_="name"),
        tag("text", second, x=x + 12, y=y + 61, class_="name"),
    ]  # fmt: skip


def _number(value: Number | str) -> Number:
    return value if isinstance(value, int | float) else None


def _ends(values: Sequence[Number]) -> str:
    there = [v for v in values if v is not None and math.isfinite(v)]
    if not there:
        return "not measured"
    return f"{there[0]:.3g} at first, {there[-1]:.3g} at last" if len(there) > 1 else f"{there[0]:.3g}"
