"""What was done about the verdicts: which adapter is adopted, the re-baselines, and what the clients' guards did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedcanary import act
from fedcanary.record import RunRecord
from fedcanary.types import Mode, Release

GUARD, KEPT, AVOIDED = "guard", "kept", "avoided"  # as engines/guard.py names them, which this side does not import


def actions_of(record: RunRecord) -> dict[str, Any]:
    """The summary's blocks `adopted`, `rebaselines` and `guard`."""
    verdicts = [body["verdict"] for body in record.of("round")]
    adopted = None
    if verdicts and (found := act.pointer(record)) is not None:
        place = {"round": found["adopted"], "folder": f"adapters/{found['folder']}", "adapter": found["adapter"]}
        adopted = {**place, "clear_round": verdicts[-1]["clear_round"]}
    declared = record.header["study"]["monitor"]["rebaselines"]
    return {
        "adopted": adopted,
        "rebaselines": {"declared": declared, "made": list(record.of("rebaseline"))},
        "guard": _guard(record),
    }


def _guard(record: RunRecord) -> dict[str, Any] | None:
    table = record.header["study"]["guard"]
    if table is None:
        return None
    releases = [found.get(GUARD) for _, found in sorted(record.releases().items())]
    readable = [mode["mode"] for mode in record.header["plan"]["modes"] if mode["streams"]]
    return {
        "modes": [mode for mode in Mode if mode in (table["modes"] or readable)],
        **_over([release for release in releases if release is not None]),
        "per_round": [_over([] if release is None else [release]) for release in releases],
    }


def _over(releases: Sequence[Release]) -> dict[str, Any]:
    """Means over the answers of some rounds. Intervals allow for noise alone: they are about these very clients."""
    n = sum(release.answered() for release in releases)
    if n < 0.5:
        return {KEPT: None, "kept_interval": [None, None], AVOIDED: None, "noise": None, "interval": [None, None]}
    means = {coord: sum(release.sum(coord) for release in releases) / n for coord in (KEPT, AVOIDED)}
    noise = {coord: math.hypot(*(release.noise(coord) for release in releases)) / n for coord in (KEPT, AVOIDED)}
    ends = {coord: [mean + side * 1.96 * noise[coord] for side in (-1, 1)] for coord, mean in means.items()}
    return {
        KEPT: means[KEPT],
        "kept_interval": [min(max(end, 0.0), 1.0) for end in ends[KEPT]],
        AVOIDED: means[AVOIDED],
        "noise": noise[AVOIDED],
        "interval": ends[AVOIDED],
    }


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """What was done, for the headline; nothing where every round was adopted and no guard refused."""
    again = summary["rebaselines"]
    said = [
        f"After round {one['round']} the tests of {_names(summary, one['modes'])} began anew (re-baseline: "
        f"“{one['reason'].rstrip('.')}”), and training went on from {_adapter(one['adopted'])}."
        for one in again["made"]
    ]
    if summary["status"] == "held":
        said += [f"The run was held after round {summary['rounds']} of {summary['rounds_planned']}{_held(summary)}."]
        said.append(_go_on(summary))
    if spared(summary):
        said.append(f"Local guards: {spared(summary)}.")
    return said


def spared(summary: Mapping[str, Any]) -> str:
    """What the guards did over all rounds, in words; empty where there were none or nobody answered."""
    guard = summary["guard"]
    if guard is None or guard[KEPT] is None:
        return ""
    low, high = guard["interval"]
    around = f" (95% interval {low:.3f} to {high:.3f})" if high > low else ""
    return (
        f"{max(guard[KEPT], 0.0):.0%} of the answers came from clients that refused their new adapter and kept their "
        f"last good one; damage avoided in a client's worst guarded mode, on average over all: {guard[AVOIDED]:.3f}"
        f"{around}"
    )


def _held(summary: Mapping[str, Any]) -> str:
    """What became of the last rounds' adapters."""
    last, adopted = summary["rounds"], summary["adopted"]
    number, clear = adopted["round"], adopted["clear_round"]
    one = number == last - 1
    dropped = f"{_adapter(last)} is" if one else f"the adapters of rounds {number + 1} to {last} are"
    if summary["action"] == "hold":
        return f": {_adapter(number)} stays, and {dropped} not to be adopted"
    names = _names(summary, [mode for mode, m in summary["modes"].items() if m["state"] == "alarm"])
    if clear is None:
        why = f"no earlier round was clear in {names}"
    else:
        why = f"with it began the evidence by which {names} was last clear, in round {clear}"
    return f" and rolled back to {_adapter(number)}: {why}; {dropped} not to be adopted"


def _go_on(summary: Mapping[str, Any]) -> str:
    declared, left = summary["rebaselines"]["declared"], _left(summary)
    if summary["rounds"] >= summary["rounds_planned"]:
        return "No round is left: after a fix, start a new run."
    if not left:
        used = "its one re-baseline is" if declared == 1 else f"its {declared} re-baselines are"
        why = f"{used} used" if declared else "the study declared no re-baseline"
        return f"It cannot go on, because {why}: after a fix, start a new run."
    return f"After a fix it can go on with a re-baseline, {left} of {declared} being left."


def _left(summary: Mapping[str, Any]) -> int:
    return int(summary["rebaselines"]["declared"]) - len(summary["rebaselines"]["made"])


def command(summary: Mapping[str, Any]) -> str:
    """What lets a held run go on; empty if nothing does."""
    goes = summary["status"] == "held" and summary["rounds"] < summary["rounds_planned"] and _left(summary) > 0
    return 'after a fix: fedcanary run --resume DIR --rebaseline "what was fixed"' if goes else ""


def where(summary: Mapping[str, Any]) -> str:
    """The adopted adapter in a few words; empty before the first round."""
    adopted = summary["adopted"]
    if adopted is None:
        return ""
    how = {"adopt": "", "hold": ", held", "roll_back": ", rolled back"}[summary["action"]]
    return f"{adopted['folder']} ({'the base, ' * (adopted['round'] == 0)}after round {summary['rounds']}{how})"


def _adapter(number: int) -> str:
    return f"the adapter of round {number}" if number else "the base"


def _names(summary: Mapping[str, Any], modes: Sequence[str]) -> str:
    names = [summary["modes"][mode]["label"].lower() for mode in modes]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
