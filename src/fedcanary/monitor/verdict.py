"""From evidence to a verdict: each mode's state, whether the failure is silent, and what the policy says.

A failure is *silent* when a mode is in alarm while the utility that a dashboard shows has not become worse than the
base's: nobody who looks at loss or accuracy would have noticed (mission, section A). Where privacy noise is in the
utility too, it has become worse only when it fell by more than two standard deviations of that noise.
"""

from collections.abc import Sequence
from typing import Literal

from fedcanary.types import Evidence, Release, Verdict

UTILITY = "utility"


def utility_gain(release: Release | None) -> tuple[float, float]:
    """Mean over the answering clients of what personalization gained in utility, and the std of its privacy noise.

    NaN without a release.
    """
    if release is None or release.answered() < 0.5:
        return float("nan"), float("nan")
    return release.mean_answered("score_gain"), release.noise("score_gain") / release.answered()


def judge(evidence: Sequence[Evidence], utility: Release | None, on_alarm: Literal["report", "stop"]) -> Verdict:
    """The round's verdict."""
    gain, noise = utility_gain(utility)
    fine = gain + 2 * noise >= 0
    states = {e.mode: e.state for e in evidence}
    silent = {e.mode: e.state == "alarm" and fine for e in evidence}
    alarms = [mode for mode, state in states.items() if state == "alarm"]
    hold = bool(alarms) and on_alarm == "stop"
    reasons = tuple(f"{mode} is in alarm" for mode in alarms)
    return Verdict(states=states, silent=silent, action="hold" if hold else "adopt", reasons=reasons)
