"""The smallest step that would turn an unknown into an answer: more rounds, more clients, or a looser margin.

The monitor itself is asked, over the recorded releases changed as each step would change them; nothing of it is
recorded or shown as measured. Steps are ordered by what they ask of the clients, in answers over the whole run:
    panels   k more rounds like the last WINDOW ones, in a run planned that long (a longer horizon raises the bar a bit)
    clients  f times the clients in every round: sums and counts times f, noise as it was
    margin   the same releases against a looser margin: no further answer, but of a weaker question, so it comes last
Each supposes clients who answer alike. A record ends with its plan, so panels and clients both mean another run; its
first rounds may be these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from fedcanary.monitor import base as monitor
from fedcanary.privacy.release import restore
from fedcanary.record import RunRecord, number
from fedcanary.types import Mode, Release, State

MORE_PANELS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24)
TIMES_CLIENTS: Final = (1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
TIMES_MARGIN: Final = (1.25, 1.5, 2)
ROLES: Final[Mapping[Mode, str]] = {  # what a client must have been given to score the mode
    Mode.AMPLIFIED_BIAS: "a suite of role bias whose items name at least two groups",
    Mode.CONFIDENCE_MISCALIBRATION: "a suite of role calibration, or held-out items with choices",
    Mode.FAIRNESS_COLLAPSE: "held-out items at every client",
    Mode.ADAPTATION_MISALIGNMENT: "a suite of role general or safety",
    Mode.OUT_OF_DOMAIN_DEGRADATION: "a suite of role domain with domains the clients do not have",
    Mode.ALIGNMENT_EROSION: "a suite of role safety or persona",
}

Rounds = Sequence[Mapping[str, Release]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One way out of an unknown: how far (rounds, a factor, a margin), to which answer, for how many more answers."""

    kind: Literal["panels", "clients", "margin"]
    size: float
    state: State
    answers: float

    @property
    def cost(self) -> tuple[bool, float]:
        """What steps are ordered by."""
        return self.kind == "margin", self.answers


def steps(record: RunRecord, plan: monitor.Plan, unsure: Sequence[Mode]) -> dict[Mode, tuple[Step, ...]]:
    """For each unknown mode, the smallest step of each kind that settles it, cheapest first."""
    read = [{m: r for m, r in releases.items() if m in unsure} for _, releases in sorted(record.releases().items())]
    opened, fresh = [releases for releases in read if releases], record.rebaselines()
    if not opened or not unsure:
        return {}
    answers = sum(_count(releases) for releases in opened)
    last = opened[-monitor.WINDOW :]
    found: dict[Mode, list[Step]] = {mode: [] for mode in unsure}

    def look(kind: Literal["panels", "clients", "margin"], sizes: Sequence[float], ask: Callable[[float], Any]) -> None:
        left = set(unsure)
        for size in sizes:
            if not left:
                return
            states, more, said = ask(size)
            for mode in [m for m in unsure if m in left and states[m] != "unknown"]:
                left.remove(mode)
                found[mode].append(Step(kind=kind, size=said(mode), state=states[mode], answers=more))

    def panels(size: float) -> Any:
        further = [last[i % len(last)] for i in range(int(size))]
        longer = replace(plan, horizon=max(plan.horizon, len(read) + len(further)))
        return _states(longer, [*read, *further], fresh), sum(map(_count, further)), lambda mode: size

    def clients(size: float) -> Any:
        more = [{name: _times(release, size) for name, release in releases.items()} for releases in read]
        return _states(plan, more, fresh), (size - 1) * answers, lambda mode: size

    def margin(size: float) -> Any:
        loose = {p.mode: p for p in (_looser(p, size) for p in plan.modes)}
        return _states(replace(plan, modes=tuple(loose.values())), read, fresh), 0.0, lambda mode: loose[mode].margin

    look("panels", MORE_PANELS, panels)
    look("clients", TIMES_CLIENTS, clients)
    look("margin", TIMES_MARGIN, margin)
    return {mode: tuple(sorted(ways, key=lambda s: s.cost)) for mode, ways in found.items()}


def _count(releases: Mapping[str, Release]) -> float:
    return max((release.count for release in releases.values()), default=0.0)


def _states(plan: monitor.Plan, rounds: Rounds, fresh: Mapping[int, Sequence[Mode]]) -> dict[Mode, State]:
    """Where the monitor ends after these rounds; after a round in `fresh`, some modes' tests began anew."""
    state, states = monitor.start(plan), dict[Mode, State]()
    for round, releases in enumerate(rounds, start=1):
        state, evidence = monitor.step(plan, state, releases)
        states = {e.mode: e.state for e in evidence}
        if round in fresh:
            state = monitor.rebaseline(plan, state, fresh[round])
    return states


def _times(release: Release, times: float) -> Release:
    """The release of so many times the clients, answering alike, under the same noise."""
    body = {name: getattr(release, name) for name in release.__dataclass_fields__}
    scaled = {"total": release.total * times, "count": release.count * times, "lost": release.lost * times}
    return restore({**body, **scaled})


def _looser(mode_plan: monitor.ModePlan, times: float) -> monitor.ModePlan:
    """A mode with so many times the margin, as far as one can be set; where a public fact moved it, moved as far.

    Streams in another unit (a variance, a pooled error) have a margin of their own, which stays.
    """
    top = monitor.REACH if any(s.kind == "mean" for s in mode_plan.streams) else 1.0
    wider = max(min(mode_plan.margin * times, top) - mode_plan.margin, 0.0)
    streams = (replace(s, margin=s.margin + wider * (s.kind in ("mean", "share"))) for s in mode_plan.streams)
    return replace(mode_plan, margin=mode_plan.margin + wider, streams=tuple(streams))


def sentence(
    record: RunRecord,
    mode: Mode,
    seen: Mapping[str, Any] | None,
    rounds: Sequence[Mapping[str, Any]],
    ways: Sequence[Step],
) -> str:
    """The smallest step in words, and the others after it. `seen` is the mode's last evidence, `ways` are its steps."""
    if seen is None:
        return "complete one round"
    why, last = str(seen["why"]), rounds[-1]
    if why.startswith("no public items"):
        return f"give the study {ROLES[mode]}"
    if why.startswith("no release"):
        if last.get("aborted"):
            return f"let more clients answer: the last round was not opened ({last['aborted']})"
        failed, asked = last["failed"], last["clients"]
        return f"mend the clients: {failed} of {asked} failed in the last round" if failed else "let the clients answer"
    if "could not score" in why:
        return f"give the clients {ROLES[mode]}"
    if not record.ended:
        return "finish the run"
    if not ways:
        return (
            f"neither answer is near: {max(MORE_PANELS)} more rounds, {max(TIMES_CLIENTS):g} times the clients and "
            f"{max(TIMES_MARGIN):g} times the margin all leave it unknown"
        )
    answered = last["clients"] - last["failed"]
    return "; or ".join(_say(step, answered, len(rounds)) for step in ways)


def _say(step: Step, answered: int, rounds: int) -> str:
    end = "clear" if step.state == "clear" else "in alarm"
    match step.kind:
        case "panels":
            more = f"{step.size:g} more round{'s' * (step.size > 1)} like the last ones"
            return f"with {more} ({rounds + step.size:g} in all) it would be {end}"
        case "clients":
            more = f"{step.size:g} times the clients (about {math.ceil(step.size * answered)} a round)"
            return f"with {more} that answer alike, it would be {end}"
        case _:
            return f"against a margin of {number(step.size):.3g} it would have been {end}"
