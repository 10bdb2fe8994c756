"""The results as Markdown: what was measured, against what was to be reached."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from fedcanary.bench.federations import METHODS, NONE
from fedcanary.bench.measure import OURS
from fedcanary.bench.rules import RULES
from fedcanary.bench.scenarios import NULLS, WORKED
from fedcanary.types import Mode

Row = Mapping[str, Any]
SHORT: Final[Mapping[str, str]] = {
    Mode.AMPLIFIED_BIAS: "bias",
    Mode.CONFIDENCE_MISCALIBRATION: "calibration",
    Mode.FAIRNESS_COLLAPSE: "fairness",
    Mode.ADAPTATION_MISALIGNMENT: "adaptation",
    Mode.OUT_OF_DOMAIN_DEGRADATION: "out of domain",
    Mode.ALIGNMENT_EROSION: "erosion",
}
EVERY: Final = (OURS, *RULES)


class Results:
    """Rows that can be asked for."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    def one(self, **wanted: Any) -> Row | None:
        """The first row with these values."""
        return next(iter(self.all(**wanted)), None)

    def all(self, **wanted: Any) -> list[Row]:
        """All rows with these values."""
        return [r for r in self.rows if all(r.get(k) == v for k, v in wanted.items())]

    def values(self, key: str, **wanted: Any) -> list[Any]:
        """What a key takes on, sorted."""
        return sorted({r[key] for r in self.all(**wanted) if key in r})


def page(rows: Iterable[Row]) -> str:
    """All tables."""
    results = Results(rows)
    parts = (errors, delays, clears, real, rivals, schemes, methods)
    return "\n\n".join(text for part in parts if (text := part(results)))


def errors(results: Results) -> str:
    """False alarms."""
    ns = results.values("n", setting="null", rule=OURS, mode="any")
    lines = ["## False alarms", "", "Share of windows of 50 rounds with any false alarm, over all six modes, at ε = 1."]
    lines += ["", f"| null | rule | {' | '.join(f'N = {n:,}' for n in ns)} |", "|---|---|" + "---|" * len(ns)]
    for name in NULLS:
        for rule in EVERY:
            cells = [results.one(setting="null", scenario=name, n=n, rule=rule, mode="any") for n in ns]
            if any(cells):
                lines.append(f"| {name} | {rule} | {' | '.join(map(_rate, cells))} |")
    found = [r for r in results.all(setting="recorded", plant=NONE, rule=OURS, mode="any")]
    if found:
        worst = max(found, key=lambda r: r["false_alarm_high"])
        lines += [
            "",
            f"On the readings of unplanted real federations: {len(found)} cells (methods, N, ε, panels); the worst is "
            f"{_rate(worst)} ({worst['method']}, N = {worst['n']:,}, ε = {_eps(worst['epsilon'])}, "
            f"{worst['scheme']}, {worst['paths']:,} windows).",
        ]
    return "\n".join(lines)


def delays(results: Results) -> str:
    """Power and delay in the worked setting."""
    ns = results.values("n", setting="worked", rule=OURS)
    if not ns:
        return ""
    mode = str(next(iter(Mode)))
    lines = [
        "## Power and delay where the truth is known",
        "",
        "One panel of N clients a round, ε = 1, δ = 1e-6, α = .05 over all modes. Power, median (mean) delay in "
        "rounds, and in brackets the oracle's. Bold: within the target (power at least .98, and a median of at most "
        "twice the oracle's below N = 1,000 and 1.3 times from there on). `first` is the design that the figures to be "
        "reproduced were worked out on (scales .4 and .2, no severe bit); `now` is the package's.",
        "",
        f"| what happens | design | {' | '.join(f'N = {n:,}' for n in ns)} |",
        "|---|---|" + "---|" * len(ns),
    ]
    for name in WORKED:
        for setting, design in (("first", "first"), ("worked", "now")):
            cells = [results.one(setting=setting, scenario=name, n=n, rule=OURS, mode=mode) for n in ns]
            lines.append(f"| {name} | {design} | {' | '.join(_power(row) if row else '' for row in cells)} |")
    return "\n".join(lines)


def clears(results: Results) -> str:
    """How soon all six modes of an unplanted federation are clear."""
    ns = results.values("n", setting="null", rule=OURS, mode="any")
    cells = [
        (design, results.one(setting=setting, scenario="nothing", n=n, rule=OURS, mode="any"))
        for n in ns
        for design, setting in (("first", "first"), ("now", "null"))
    ]
    return "\n".join(
        [
            "## Clear",
            "",
            "All six modes clear at once where nothing is wrong (margin .05, worked setting, ε = 1).",
            "",
            "| N | design | median panel | 90% | within 1 | within 3 |",
            "|---|---|---|---|---|---|",
            *(
                f"| {r['n']:,} | {design} | {_number(r['clear_median'])} | {_number(r['clear_p90'])} | "
                f"{r['clear_within_1']:.2f} | {r['clear_within_3']:.2f} |"
                for design, r in cells
                if r
            ),
        ]
    )


def real(results: Results) -> str:
    """Planted failures of real federations, under FedAvg."""
    lines = [
        "## Planted failures of real federations",
        "",
        "Readings of federations that were run on the bundled model (FedAvg over LoRA; ten rounds, the last staying), "
        "drawn again into panels of N clients, under the default plan and margins. The plant comes in round 10 and "
        "grows, so the oracle needs some rounds too. Power at round 50, median delay (oracle's).",
    ]
    for strength in results.values("strength", setting="recorded", method=METHODS[0]):
        wanted = {"setting": "recorded", "method": METHODS[0], "strength": strength, "scheme": "rotating", "rule": OURS}
        cells = sorted({(r["n"], r["epsilon"]) for r in results.all(**wanted) if r["plant"] != NONE})
        ns, eps = sorted({n for n, _ in cells}), sorted({e for _, e in cells})
        if not cells:
            continue
        lines += ["", f"Strength {strength:g}:", ""]
        lines += [f"| planted | ε | {' | '.join(f'N = {n:,}' for n in ns)} |", "|---|---|" + "---|" * len(ns)]
        for mode, name in SHORT.items():
            for e in eps:
                found = [results.one(**wanted, plant=mode, mode=mode, n=n, epsilon=e) for n in ns]
                lines.append(f"| {name} | {_eps(e)} | {' | '.join(map(_real, found))} |")
    return "\n".join(lines)


def rivals(results: Results) -> str:
    """The same windows under every rule."""
    lines = ["## Other rules on the same windows", ""]
    base = {"setting": "recorded", "method": METHODS[0], "scheme": "rotating", "epsilon": 1.0}
    for n in results.values("n", **base):
        if n not in (200, 1000):
            continue
        header = [f"| {SHORT[m]} " for m in Mode]
        lines += [
            f"N = {n:,}, ε = 1, strength 1. False alarms in unplanted federations, mean rounds to the first one (of "
            "50), then power and median delay on the planted mode.",
            "",
            f"| rule | false alarms | run length {''.join(header)}|",
            "|---|---|---|" + "---|" * len(Mode),
        ]
        for rule in EVERY:
            null = results.one(**base, n=n, rule=rule, mode="any", plant=NONE)
            cells = [
                _real(results.one(**base, n=n, rule=rule, plant=str(m), mode=str(m), strength=1.0), oracle=False)
                for m in Mode
            ]
            length = f"{null['run_length']:.0f}" if null else ""
            lines.append(f"| {rule} | {_rate(null)} | {length} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def schemes(results: Results) -> str:
    """Rotating panels against the same clients every round."""
    wanted = {"setting": "recorded", "method": METHODS[0], "rule": OURS, "strength": 1.0, "epsilon": 1.0}
    ns = results.values("n", **wanted, scheme="same")
    if not ns:
        return ""
    lines = [
        "## Rotating panels against the same clients in every round",
        "",
        "The same number of clients a round, ε = 1 over the window of 50 rounds: asked every round, a client's answers "
        "share it. Power, median delay.",
        "",
        f"| planted | panel | {' | '.join(f'N = {n:,}' for n in ns)} |",
        "|---|---|" + "---|" * len(ns),
    ]
    for mode, name in SHORT.items():
        for scheme in ("rotating", "same"):
            found = [results.one(**wanted, scheme=scheme, n=n, plant=mode, mode=mode) for n in ns]
            lines.append(f"| {name} | {scheme} | {' | '.join(_real(r, oracle=False) for r in found)} |")
    return "\n".join(lines)


def methods(results: Results) -> str:
    """Every personalization method."""
    wanted = {"setting": "recorded", "rule": OURS, "strength": 1.0, "scheme": "rotating", "n": 1000, "epsilon": 4.0}
    names = [m for m in METHODS if results.all(**wanted, method=m)]
    if len(names) < 2:
        return ""
    lines = [
        "## Personalization methods",
        "",
        "N = 1,000, ε = 4. Power, median delay (oracle's) on the planted mode. A dash: under this method the plant "
        "takes the mode beyond no margin. `already`: it is beyond its margin with nothing planted (the margins are "
        "FedAvg's), and the alarm came before the plant. False alarms are on modes that are within their margins.",
        "",
        f"| method | false alarms | {' | '.join(SHORT.values())} |",
        "|---|---|" + "---|" * len(Mode),
    ]
    for method in names:
        null = results.one(**wanted, method=method, plant=NONE, mode="any")
        found = [results.one(**wanted, method=method, plant=str(m), mode=str(m)) for m in Mode]
        lines.append(f"| {method} | {_rate(null)} | {' | '.join(map(_real, found))} |")
    return "\n".join(lines)


def _rate(row: Row | None) -> str:
    if row is None or "false_alarm" not in row:
        return ""
    return f"{row['false_alarm']:.4f} [{row['false_alarm_low']:.4f}, {row['false_alarm_high']:.4f}]"


def _power(row: Row) -> str:
    if "power" not in row:
        return "-"
    limit = 1.3 if row["n"] >= 1000 else 2.0
    good = row["power"] >= 0.98 and row["delay_median"] <= limit * row["oracle_delay_median"]
    text = f"{row['power']:.3f} / {_number(row['delay_median'])} ({_number(row['delay_mean'], 1)})"
    theirs = f"[{_number(row['oracle_delay_median'])} ({_number(row['oracle_delay_mean'], 1)})]"
    return f"**{text}** {theirs}" if good else f"{text} {theirs}"


def _real(row: Row | None, oracle: bool = True) -> str:
    if row is None or "power" not in row:
        return "-"
    if row["early"] > 0.5:
        return "already"
    text = f"{row['power']:.2f} / {_number(row['delay_median'])}"
    return f"{text} ({_number(row['oracle_delay_median'])})" if oracle else text


def _number(value: float, digits: int = 0) -> str:
    return "never" if math.isinf(value) else "-" if math.isnan(value) else f"{value:.{digits}f}"


def _eps(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:g}"
