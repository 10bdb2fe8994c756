"""A cell of the benchmark: one scenario, so many clients, so much privacy; what the monitor and the rules make of it.

False alarms are alarms on a mode that nothing harms in the whole window. Power is the share of windows in which a
harmed mode is in alarm at the end, delay the rounds from the change to its alarm (1: at once), over windows in which
no alarm came before the change. Run length is the mean of the first round with a false alarm, cut at the horizon.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from scipy.stats import beta

from fedcanary.bench import people, rules, windows
from fedcanary.bench.people import Scheme
from fedcanary.bench.scenarios import Scenario
from fedcanary.bench.windows import Bits
from fedcanary.privacy import accounting
from fedcanary.rng import stream
from fedcanary.types import Array, Mode

DELTA: Final = 1e-6
CHUNK: Final = 500  # windows at a time: bounds memory
OURS: Final = "fedcanary"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What is measured: `change` is the first changed round (0: none), `paths` the number of windows."""

    scenario: Scenario
    n: int
    epsilon: float = 1.0
    scheme: Scheme = "rotating"
    change: int = 10
    paths: int = 1000
    seed: int = 1
    against: tuple[str, ...] = tuple(rules.RULES)

    @property
    def multiplier(self) -> float:
        """Noise std over a message's norm; a window's epsilon is shared out over the rounds if all are always asked."""
        if math.isinf(self.epsilon):
            return 0.0
        times = self.scenario.alarms.horizon if self.scheme == "same" else 1
        return accounting.gaussian_std(self.epsilon, DELTA, 1.0, times)


@dataclass(slots=True, kw_only=True)
class Tally:
    """Of one rule and mode: first alarms (windows,), from 1; infinite where there is none."""

    alarms: list[Array] = field(default_factory=list)
    clears: list[Array] = field(default_factory=list)  # first clear round
    ends: list[Array] = field(default_factory=list)  # clear in the last round


def measure(cell: Cell) -> list[dict[str, Any]]:
    """One row for each rule and mode, and one for each rule over all modes that nothing harms."""
    found: dict[str, dict[Mode, Tally]] = {}
    all_clear: list[Array] = []
    for alarm, clear in _chunks(cell):
        for rule, by_mode in alarm.items():
            for mode, bits in by_mode.items():
                found.setdefault(rule, {}).setdefault(mode, Tally()).alarms.append(windows.first(bits))
        for mode, bits in clear.items():
            found[OURS][mode].clears.append(windows.first(bits))
            found[OURS][mode].ends.append(bits[-1])
        all_clear.append(windows.first(np.logical_and.reduce(list(clear.values()))))
    return _rows(cell, found, np.concatenate(all_clear))


def _chunks(cell: Cell) -> Iterator[tuple[dict[str, dict[Mode, Bits]], dict[Mode, Bits]]]:
    """Alarms by rule and mode, and the monitor's clears, of some windows at a time."""
    scenario, horizon, std = cell.scenario, cell.scenario.alarms.horizon, cell.multiplier
    phase_of = scenario.phase_of(horizon, cell.change)
    for first in range(0, cell.paths, CHUNK):
        rng = stream(cell.seed, "silentbench", scenario.name, cell.n, cell.scheme, first)
        paths = min(CHUNK, cell.paths - first)
        panels = people.draw(scenario.people, phase_of, cell.n, paths, cell.scheme, rng)
        totals = people.noised(panels, std, rng)
        sums = windows.sums_of(scenario.people.encoding, totals, cell.n, std)
        walked = windows.judge(scenario.alarms, sums)
        clear = walked.clear
        if scenario.clears is not scenario.alarms:
            clear = windows.judge(scenario.clears, sums).clear
        window = rules.Window(
            plan=scenario.alarms, sums=sums, panels=panels, people=scenario.people, change=cell.change
        )
        alarm = {OURS: dict(walked.alarm)}
        for name in cell.against:
            rule = rules.RULES[name]
            alarm[name] = {p.mode: rule(window, p) for p in scenario.alarms.modes}
        yield alarm, dict(clear)


def _rows(cell: Cell, found: Mapping[str, Mapping[Mode, Tally]], all_clear: Array) -> list[dict[str, Any]]:
    scenario, horizon = cell.scenario, cell.scenario.alarms.horizon
    common = {
        "scenario": scenario.name,
        "n": cell.n,
        "epsilon": cell.epsilon,
        "scheme": cell.scheme,
        "rounds": horizon,
        "change": cell.change,
        "paths": cell.paths,
        **scenario.noted,
    }
    rows, sane = [], [m for m in Mode if m not in scenario.harmed]
    firsts = {rule: {m: np.concatenate(t.alarms) for m, t in by.items()} for rule, by in found.items()}
    for rule, by_mode in firsts.items():
        early = np.min([by_mode[m] for m in sane], axis=0) if sane else np.full(cell.paths, math.inf)
        row = {
            **common,
            "rule": rule,
            "mode": "any",
            **rate("false_alarm", int(np.isfinite(early).sum()), cell.paths),
            "run_length": float(np.minimum(early, horizon).mean()),
        }
        if rule == OURS:
            row |= _clear("clear", all_clear)
        rows.append(row)
        for mode in Mode:
            row = {**common, "rule": rule, "mode": str(mode), "harmed": mode in scenario.harmed}
            if mode in scenario.harmed:
                row |= _power(by_mode[mode], firsts.get("oracle", {}).get(mode), cell.change)
            else:
                row |= rate("false_alarm", int(np.isfinite(by_mode[mode]).sum()), cell.paths)
            if rule == OURS:
                row |= _clear("clear", np.concatenate(found[rule][mode].clears))
                row["clear_at_end"] = float(np.concatenate(found[rule][mode].ends).mean())
            rows.append(row)
    return rows


def _power(at: Array, oracle: Array | None, change: int) -> dict[str, Any]:
    kept = at >= max(change, 1)
    delay = at[kept] - max(change, 1) + 1
    row = rate("power", int(np.isfinite(delay).sum()), len(delay))
    row |= {"early": float(1 - kept.mean()), **_delay("delay", delay)}
    if oracle is not None:
        theirs = oracle[oracle >= max(change, 1)] - max(change, 1) + 1
        row["oracle_delay_median"], row["oracle_delay_mean"] = _delay("", theirs).values()
        ratio = row["delay_median"] / row["oracle_delay_median"] if row["oracle_delay_median"] else math.nan
        row["ratio"] = ratio if math.isfinite(ratio) else math.inf
    return row


def _delay(name: str, delay: Array) -> dict[str, float]:
    """Median over all windows (infinite if most never alarm), mean over those that do."""
    some = delay[np.isfinite(delay)]
    middle = float(np.median(delay)) if len(delay) else math.nan
    return {f"{name}_median": middle, f"{name}_mean": float(some.mean()) if len(some) else math.nan}


def _clear(name: str, at: Array) -> dict[str, float]:
    ordered = np.sort(at)
    return {
        f"{name}_median": float(ordered[len(ordered) // 2]),
        f"{name}_p90": float(ordered[math.ceil(0.9 * len(ordered)) - 1]),
        f"{name}_within_1": float((at <= 1).mean()),
        f"{name}_within_3": float((at <= 3).mean()),
    }


def rate(name: str, hits: int, runs: int) -> dict[str, Any]:
    """A share with its exact 95% interval (Clopper & Pearson 1934)."""
    low = float(beta.ppf(0.025, hits, runs - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, runs - hits)) if hits < runs else 1.0
    return {name: hits / runs if runs else math.nan, f"{name}_low": low, f"{name}_high": high, f"{name}_runs": runs}
