"""From the record to plain data: everything a report says, and nothing that is not in the record.

`summarise` is pure: the same record gives the same summary. The result is JSON-ready: what was not measured is null,
an infinite epsilon is "inf". `summary.schema.json` beside this file is its JSON Schema and docs/summary-schema.md its
description; the terminal's table and the HTML report are two renderings of it and read nothing else.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedcanary.monitor import base as monitor
from fedcanary.monitor import influence
from fedcanary.monitor.verdict import UTILITY, utility_gain
from fedcanary.probes.base import SEVERE
from fedcanary.probes.statistics import ece_from_bins
from fedcanary.probes.utility import Utility
from fedcanary.record import RunRecord, number, plain
from fedcanary.report import actions, next_step, slices
from fedcanary.report.privacy import privacy_of
from fedcanary.types import Mode, Release

SCHEMA: Final = 1

LABELS: Final[Mapping[Mode, str]] = {
    Mode.AMPLIFIED_BIAS: "Amplified bias",
    Mode.CONFIDENCE_MISCALIBRATION: "Confidence miscalibration",
    Mode.FAIRNESS_COLLAPSE: "Fairness collapse",
    Mode.ADAPTATION_MISALIGNMENT: "Adaptation misalignment",
    Mode.OUT_OF_DOMAIN_DEGRADATION: "Out-of-domain degradation",
    Mode.ALIGNMENT_EROSION: "Alignment erosion",
}
LAYERS: Final[Mapping[Mode, str]] = {
    Mode.AMPLIFIED_BIAS: "data",
    Mode.CONFIDENCE_MISCALIBRATION: "data",
    Mode.FAIRNESS_COLLAPSE: "model",
    Mode.ADAPTATION_MISALIGNMENT: "model",
    Mode.OUT_OF_DOMAIN_DEGRADATION: "system",
    Mode.ALIGNMENT_EROSION: "system",
}
SEVERELY: Final = f"share of clients that lost more than {SEVERE:g}"
DETAILS: Final[Mapping[Mode, Mapping[str, str]]] = {  # means over the clients that could answer, in the last round
    Mode.AMPLIFIED_BIAS: {
        "amplification": "predicted gap minus the data's own gap",
        "stereotype": "shift of preference for the stereotyped sentence",
        "tail": "share of clients where a gap moved beyond tau",
        "severe": SEVERELY,
    },
    Mode.CONFIDENCE_MISCALIBRATION: {
        "ece": "calibration error of the personalized models",
        "overconfidence": "change of confidence minus accuracy",
        "brier": "change of the Brier score",
        "tail": "share of clients beyond tau",
        "severe": SEVERELY,
    },
    Mode.FAIRNESS_COLLAPSE: {
        "delta": "mean change of score, received model against base",
        "after_training": "mean change of score after local training",
    },
    Mode.ADAPTATION_MISALIGNMENT: {
        "general": "change of general capability in the round",
        "refusal": "change of the probability to refuse the unsafe, in the round",
        "compliance": "change of the probability to answer a safe look-alike, in the round",
        "tail": "share of clients beyond tau",
        "severe": SEVERELY,
    },
    Mode.OUT_OF_DOMAIN_DEGRADATION: {
        "outside": "change on other domains' items",
        "zero_shot": "change on the public capability suite",
        "in_domain": "gain on the client's own items",
        "tail": "share of clients beyond tau",
        "severe": SEVERELY,
    },
    Mode.ALIGNMENT_EROSION: {
        "refusal": "change of the probability to refuse the unsafe",
        "compliance": "change of the probability to answer a safe look-alike",
        "persona": "change of the probability to stay in persona",
        "tail": "share of clients beyond tau",
        "severe": SEVERELY,
    },
}
COUNTS: Final = ("no", "one", "two", "three", "four", "five", "six")

Round = Mapping[str, Any]
Releases = Mapping[int, Mapping[str, Release]]


def schema() -> dict[str, Any]:
    """The JSON Schema of a summary."""
    text = Path(__file__).with_name("summary.schema.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def summarise(record: RunRecord) -> dict[str, Any]:
    """The whole record as plain data, schema 1.

    Raises:
        BadInput: the record has no header.
    """
    header, rounds, releases = record.header, list(record.of("round")), record.releases()
    study, plan = header["study"], monitor.plan_from(header["plan"])
    ends = [str(body["status"]) for body in record.of("end")]
    summary: dict[str, Any] = {
        "schema": SCHEMA,
        "title": study["title"],
        "status": ends[-1] if record.ended else "unfinished",
        "rounds": len(rounds),
        "rounds_planned": plan.horizon,
        "action": rounds[-1]["verdict"]["action"] if rounds else None,
        **actions.actions_of(record),
        "modes": _modes(record, plan, rounds, releases),
        "utility": _utility(rounds, releases),
        "privacy": privacy_of(record),
        "error": slices.error_of(record, plan),
        "slices": slices.slices_of(record),
        "clients": {
            "population": header["clients"],
            "asked": [body["clients"] for body in rounds],
            "also_trained": [body.get("also_trained", 0) for body in rounds],
            "failed": [body["failed"] for body in rounds],
            "answered": [_of(releases, body, UTILITY, lambda r: r.count, 0.0) for body in rounds],
            "refused": _refused(rounds),
            "not_opened": {str(body["round"]): body["aborted"] for body in rounds if body.get("aborted")},
        },
        "spread": _spread(rounds, releases, study["probes"]["tail"]),
        "digests": {"contract": None, **header["digests"], "record": record.digest},
        "suites": header["suites"],
        "study": study,
        "environment": header["environment"],
    }
    return dict(plain({"headline": headline(summary), **summary}))


def _refused(rounds: Sequence[Round]) -> dict[str, int]:
    """How many messages or requests were refused over all rounds, by reason; never by whom."""
    counts: Counter[str] = Counter()
    for body in rounds:
        counts.update(body.get("refused") or {})
    return dict(sorted(counts.items()))


def headline(summary: Mapping[str, Any]) -> list[str]:
    """The run in a few plain sentences; the first stands for the whole."""
    rounds, modes = summary["rounds"], summary["modes"]
    planned = summary["rounds_planned"]
    more = [*slices.sentences(summary), *actions.sentences(summary)]
    if summary["status"] == "unfinished":
        more.append(f"The run has not ended: {rounds} of {planned} rounds are complete.")
    plants = summary["study"]["clients"]["plants"]
    if plants:
        names = [f"{LABELS[Mode(p['mode'])].lower()} (strength {p['strength']:g})" for p in plants]
        what = "a failure was" if len(names) == 1 else "failures were"
        more.append(f"In this run {what} planted in the generated clients on purpose: {_list(names)}.")
    if not rounds:
        return ["No round is complete, so nothing is known about any of the six modes.", *more]
    alarms = [mode for mode in Mode if modes[mode]["state"] == "alarm"]
    clear = sum(modes[mode]["state"] == "clear" for mode in Mode)
    first = _utility_words(summary)
    if alarms:
        groups = (
            ("failed silently", [m for m in alarms if modes[m]["silent"]]),
            (_loudly(summary["utility"]), [m for m in alarms if not modes[m]["silent"]]),
        )
        said = [
            f"{'all ' * (len(g) == len(Mode))}{_count(len(g), 'mode')} {how}: {_since(g, modes)}"
            for how, g in groups
            if g
        ]
        first = f"{first}; {'; '.join(said)}."
        rest = len(Mode) - len(alarms)
        if rest:
            more.insert(0, f"{_rest(clear, rest - clear)}.")
        return [first, *more]
    if clear == len(Mode):
        tail = "All six modes are clear: each was shown to be within its margin."
    elif clear:
        tail = f"No mode is in alarm; {_clear_unknown(clear, len(Mode) - clear)}."
    else:
        tail = "No mode is in alarm, and none could be shown to be fine: all six are unknown, which is not a pass."
    return [f"{first}. {tail}", *more]


def _utility_words(summary: Mapping[str, Any]) -> str:
    base, last = number(summary["utility"]["base"]), number(summary["utility"]["last"])
    over = f"over {_count(summary['rounds'], 'round')}"
    if not (math.isfinite(base) and math.isfinite(last)):
        return "Utility is not known"
    noise = number(summary["utility"]["noise"])
    if 0 < abs(last - base) <= 2 * noise:
        return f"Utility did not move from {base:.2f} by more than privacy noise can {over}"
    if f"{base:.4f}" == f"{last:.4f}":
        return f"Utility stayed at {last:.2f} {over}"
    verb = "rose" if last > base else "fell"
    if f"{base:.2f}" == f"{last:.2f}":
        return f"Utility {verb} a little, from {base:.4f} to {last:.4f}, {over}"
    return f"Utility {verb} from {base:.2f} to {last:.2f} {over}"


def _loudly(utility: Mapping[str, Any]) -> str:
    known = math.isfinite(number(utility["base"])) and math.isfinite(number(utility["last"]))
    return "failed while utility fell too" if known else "failed, silently or not"


def _since(group: Sequence[Mode], modes: Mapping[str, Any]) -> str:
    rounds = {modes[m]["since_round"] for m in group}
    if len(group) > 1 and len(rounds) == 1:
        names = _list([LABELS[m].lower() for m in group])
        return f"{names}, {'both' if len(group) == 2 else 'all'} since round {rounds.pop()}"
    return _list([f"{LABELS[m].lower()} since round {modes[m]['since_round']}" for m in group])


def _clear_unknown(clear: int, unknown: int) -> str:
    counts = ((clear, "clear"), (unknown, "unknown"))
    said = [f"{COUNTS[n]} {'is' if n == 1 else 'are'} {word}" for n, word in counts if n]
    return " and ".join(said) + (", which is not a pass" if unknown else "")


def _rest(clear: int, unknown: int) -> str:
    """What the modes that are not in alarm are."""
    if clear and unknown:
        return f"Of the other {COUNTS[clear + unknown]}, {_clear_unknown(clear, unknown)}"
    said = _clear_unknown(clear, unknown).removeprefix(COUNTS[clear + unknown])
    return f"The other {'mode' if clear + unknown == 1 else COUNTS[clear + unknown]}{said}"


def _count(n: int, noun: str) -> str:
    return f"{COUNTS[n] if n < len(COUNTS) else n} {noun}{'' if n == 1 else 's'}"


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _modes(record: RunRecord, plan: monitor.Plan, rounds: Sequence[Round], releases: Releases) -> dict[str, Any]:
    history: dict[Mode, list[Any]] = {mode: [] for mode in Mode}
    for body in rounds:
        for evidence in body["evidence"]:
            history[Mode(evidence["mode"])].append(evidence)
    last = {mode: seen[-1] for mode, seen in history.items() if seen}
    states = {mode: evidence["state"] for mode, evidence in last.items()}
    since = {mode: evidence["since_round"] for mode, evidence in last.items()}
    unsure = [p.mode for p in plan.modes if states.get(p.mode, "unknown") == "unknown"]
    ways = next_step.steps(record, plan, unsure) if record.ended else {}
    study, table = record.header["study"], {}
    alarms = {
        p.mode: influence.alarm(since[p.mode], [_shown(e) for e in history[p.mode]], p.margin)
        for p in plan.modes
        if states.get(p.mode) == "alarm"
    }
    for mode_plan in plan.modes:
        mode, seen = mode_plan.mode, last.get(mode_plan.mode)
        curve = [[e["estimate"], *e["interval"], e["state"]] for e in history[mode]]
        release = releases[int(rounds[-1]["round"])].get(mode) if rounds else None
        table[str(mode)] = {
            "label": LABELS[mode],
            "layer": LAYERS[mode],
            "state": states.get(mode, "unknown"),
            "estimate": curve[-1][0] if curve else None,  # null, never 0, where no client could score the mode
            "interval": curve[-1][1:3] if curve else [None, None],
            "unit": mode_plan.unit,
            "part": seen["part"] if seen and len(mode_plan.streams) > 1 else "",
            "margin": mode_plan.margin,
            "e_worse": seen["e_worse"] if seen else None,
            "e_not_worse": seen["e_not_worse"] if seen else None,
            "since_round": since.get(mode),
            "silent": bool(rounds and rounds[-1]["verdict"]["silent"][mode]),
            **_upstream(influence.upstream(mode, alarms, len(rounds))),
            "why": seen["why"] if seen else "no round is complete",
            "next": next_step.sentence(record, mode, seen, rounds, ways.get(mode, ())) if mode in unsure else "",
            "missing": _missing(mode_plan, seen, release),
            "noise": _noise(mode_plan, seen, release),
            "details": _details(mode, release, curve, study["probes"]["per_step"]),
            "per_round": curve,
        }
    return {str(mode): table[mode] for mode in Mode}


def _shown(evidence: Mapping[str, Any]) -> tuple[float, float, float]:
    low, high = evidence["interval"]
    return number(evidence["estimate"]), number(low), number(high)


def _upstream(found: Sequence[influence.Upstream]) -> dict[str, Any]:
    """The parents that explain an alarm better than its having arisen on its own, and the numbers of all in alarm."""
    numbers = [
        {
            "mode": str(u.mode),
            "edge": u.edge,
            "log10_order": u.order,
            "log10_strength": u.strength,
            "log10_ratio": u.log10_ratio,
            "weight": u.weight,
        }
        for u in found
    ]
    return {"likely_upstream": [str(u.mode) for u in found if u.log10_ratio > 0], "upstream_evidence": numbers}


def _spoken_of(mode_plan: monitor.ModePlan, seen: Any) -> str:
    """The coordinate that a mode's estimate speaks of; "" before there is one."""
    return next((s.coord for s in mode_plan.streams if seen and s.name == seen["part"]), "")


def _missing(mode_plan: monitor.ModePlan, seen: Any, release: Release | None) -> float | None:
    """Share of the round's clients that could not score what the estimate speaks of; 0 if it may be noise alone."""
    if release is None or release.count <= 0:
        return None
    bit = release.missing_coord(_spoken_of(mode_plan, seen))
    share = release.sum(bit) / release.count if bit else 0.0
    return min(share, 1.0) if bit and share > 2 * release.noise(bit) / release.count else 0.0


def _noise(mode_plan: monitor.ModePlan, seen: Any, release: Release | None) -> float | None:
    """Standard deviation of the privacy noise on the round's mean that the estimate speaks of."""
    coord = _spoken_of(mode_plan, seen)
    answered = release.answered(coord) if release else 0.0
    return release.noise(coord) / answered if release and coord and answered >= 0.5 else None


def _details(mode: Mode, release: Release | None, curve: Sequence[Any], per_step: float) -> list[dict[str, Any]]:
    """The few numbers beside a mode's estimate, each with what it is."""
    if release is None:
        return []
    labels = {c: f"change of the gap: {c.partition(':')[2]}" for c in release.coords if c.startswith("contrast:")}
    labels |= DETAILS[mode]
    answered = release.answered()
    rows = [{"name": name, "label": label, "value": _mean(release, name)} for name, label in labels.items()]
    if mode == Mode.CONFIDENCE_MISCALIBRATION and answered > 0 and _bins(release):
        bins = [[release.sum(f"{what}:{b}") for what in ("n", "conf", "correct")] for b in _bins(release)]
        pooled = ece_from_bins(np.array(bins, dtype=np.float64).reshape(-1, 3))
        rows += [
            {"name": "ece_pooled", "label": "calibration error of all clients pooled", "value": pooled},
            {
                "name": "masking_gap",
                "label": "masking gap: clients' mean error minus the pooled one",
                "value": release.sum("ece") / answered - pooled,
            },
        ]
    if mode == Mode.ALIGNMENT_EROSION:
        estimates = [0.0, *(number(e[0]) for e in curve)]
        steps = [b - a for a, b in pairwise(estimates) if math.isfinite(b - a)]
        rows += [
            {"name": "largest_step", "label": "largest change in a single round", "value": max(steps, default=None)},
            {"name": "per_step", "label": "limit of a single round's change", "value": per_step},
        ]
    return rows


def _bins(release: Release) -> list[str]:
    return [coord.partition(":")[2] for coord in release.coords if coord.startswith("n:")]


def _of(releases: Releases, body: Round, probe: str, value: Any, otherwise: float = math.nan) -> float:
    release = releases[int(body["round"])].get(probe)
    return float(value(release)) if release is not None else otherwise


def _mean(release: Release, coord: str) -> float:
    """NaN where the contract did not let the coordinate leave."""
    return release.mean_answered(coord) if coord in release.coords else math.nan


def _utility(rounds: Sequence[Round], releases: Releases) -> dict[str, Any]:
    def block(what: str) -> dict[str, Any]:
        """The base's level is the same question in every round, so it is pooled over them: less noise."""
        told = [(_of(releases, b, UTILITY, lambda r: _mean(r, f"{what}_base")), b) for b in rounds]
        weight = [_of(releases, b, UTILITY, lambda r: max(r.answered(), 0.0), 0.0) for b in rounds]
        known = [(value, w) for (value, _), w in zip(told, weight, strict=True) if math.isfinite(value)]
        total = sum(w for _, w in known)
        base = monitor.cut(sum(value * w for value, w in known) / total if total else math.nan)
        gains = [_of(releases, b, UTILITY, lambda r: _mean(r, f"{what}_gain")) for b in rounds]
        now = [monitor.cut(base + gain) for gain in gains]
        each = [monitor.cut(value) for value, _ in told]
        return {"base": base, "last": now[-1] if now else math.nan, "per_round": now, "base_per_round": each}

    noise = utility_gain(releases[int(rounds[-1]["round"])].get(UTILITY))[1] if rounds else math.nan
    return {"metric": Utility.unit, **block("score"), "noise": noise, "accuracy": block("accuracy")}


def _spread(rounds: Sequence[Round], releases: Releases, tau: float) -> dict[str, Any]:
    """Mean and standard deviation over clients of the received model's score, and the share left behind."""
    rows: list[dict[str, float | None]] = []
    for body in rounds:
        release = releases[int(body["round"])].get(Mode.FAIRNESS_COLLAPSE)
        n = release.answered() if release is not None else 0.0
        if release is None or n <= 0:
            rows.append({"mean": None, "sd": None, "left_behind": None})
            continue
        left_behind = monitor.cut(release.sum("tail") / n)
        if "score" not in release.coords:  # a detail, which stayed at the clients
            rows.append({"mean": None, "sd": None, "left_behind": left_behind})
            continue
        mean = release.sum("score") / n
        variance = max(release.sum("score_square") / n - mean**2, 0.0)
        rows.append({"mean": mean, "sd": math.sqrt(variance), "left_behind": left_behind})
    return {"tau": tau, "per_round": rows}
