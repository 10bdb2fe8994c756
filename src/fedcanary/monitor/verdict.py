"""From evidence to a verdict: each mode's state, whether the failure is silent, and what the policy says.

A failure is *silent* when a mode is in alarm while the utility that a dashboard shows has not become worse than the
base's: nobody who looks at loss or accuracy would have noticed (mission, section A). Where privacy noise is in the
utility too, it has become worse only when it fell by more than two standard deviations of that noise.

Adapters are numbered by the round that made them; 0 is the initial one, with which every model is the base.
    hold       the alarming round's adapter is not adopted; the one before it stays.
    roll_back  back to an adapter that a verdict vouches for. A round's verdict is about the models made from the
               adapter its clients *received*, and a `clear` rests on a window of rounds: it says that not all of them
               were beyond the margin, so that after a sudden harm the rounds before it still carry it. What it
               vouches for, if harm once done stays, is the adapter with which its window began.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedcanary.monitor.base import WINDOW
from fedcanary.types import Evidence, Mode, Release, State, Verdict

UTILITY = "utility"
Policy = Literal["report", "hold", "roll_back"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What the policy remembers of a complete round: each mode's state, and which adapter was adopted after it."""

    states: Mapping[Mode, State]
    adopted: int


def utility_gain(release: Release | None) -> tuple[float, float]:
    """Mean over the answering clients of what personalization gained in utility, and the std of its privacy noise.

    NaN without a release.
    """
    if release is None or release.answered() < 0.5:
        return float("nan"), float("nan")
    return release.mean_answered("score_gain"), release.noise("score_gain") / release.answered()


def judge(
    evidence: Sequence[Evidence], utility: Release | None, on_alarm: Policy, past: Sequence[Past] = ()
) -> Verdict:
    """The verdict on the round that comes after the `past` ones, which are all there were, in order."""
    gain, noise = utility_gain(utility)
    fine = gain + 2 * noise >= 0
    states = {e.mode: e.state for e in evidence}
    silent = {e.mode: e.state == "alarm" and fine for e in evidence}
    alarms = [mode for mode, state in states.items() if state == "alarm"]
    reasons = tuple(f"{mode} is in alarm" for mode in alarms)
    if not alarms or on_alarm == "report":
        return Verdict(states=states, silent=silent, action="adopt", reasons=reasons, adopted=len(past) + 1)
    adopted, clear = (lineage(past)[0], None) if on_alarm == "hold" else last_clear(past, alarms)
    return Verdict(states=states, silent=silent, action=on_alarm, reasons=reasons, adopted=adopted, clear_round=clear)


def lineage(past: Sequence[Past]) -> list[int]:
    """The adapter now adopted, the one it was trained from, and so on down to 0; without rounds that were dropped."""
    line = [past[-1].adopted if past else 0]
    while line[-1] > 0:
        before = line[-1] - 1
        line.append(past[before - 1].adopted if before else 0)
    return line


def last_clear(past: Sequence[Past], modes: Collection[Mode]) -> tuple[int, int | None]:
    """The adapter to roll back to, and the last round that was clear in all of these modes and in alarm in none.

    (0, None) if there is no such round. Rounds that were dropped before do not count: their adapters are given up.
    """
    line = lineage(past)
    for round in line[:-1]:
        states = past[round - 1].states
        if "alarm" not in states.values() and all(states[mode] == "clear" for mode in modes):
            began = max(round - WINDOW + 1, 1)
            return max(adapter for adapter in line if adapter < began), round
    return 0, None
