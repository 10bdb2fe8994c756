"""What SilentBench measures: every cell, on as many processes as asked."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedcanary.bench import scenarios
from fedcanary.bench.federations import METHODS, NONE, Recording, load
from fedcanary.bench.measure import OURS, Cell, measure
from fedcanary.bench.people import Scheme
from fedcanary.bench.scenarios import NULLS, WORKED, Scenario
from fedcanary.probes import Probe, probes, suites
from fedcanary.probes.base import merge
from fedcanary.study import MarginTable, ProbesTable
from fedcanary.types import Mode, Role

HORIZON: Final = 50
CHANGE: Final = 10
READINGS: Final = Path(__file__).with_name("readings.npz")
PANELS: Final = (50, 200, 1000, 10_000)
EPSILONS: Final = (0.5, 1.0, 4.0, 8.0, math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured. `wide`: every method, every epsilon, both kinds of panel; else FedAvg at epsilon 1."""

    wide: bool = True
    nulls: int = 10_000  # windows of a cell in which nothing is wrong
    runs: int = 1000  # windows of a cell in which something is
    panels: tuple[int, ...] = PANELS


QUICK: Final = Size(wide=False, nulls=2000, runs=300, panels=(50, 200, 1000))


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Cells of one population: `key` says which, `cells` (n, epsilon, scheme, windows) each."""

    kind: str  # "worked", "null", "first" (the worked setting under the first design) or "recorded"
    key: tuple[str, ...]
    cells: tuple[tuple[int, float, Scheme, int], ...]
    readings: Path = READINGS


def tasks(size: Size, readings: Sequence[Recording], path: Path = READINGS) -> list[Task]:
    """Everything to be done, the longest first."""
    found = [
        Task(kind="null", key=(name,), cells=tuple((n, 1.0, "rotating", size.nulls) for n in size.panels))
        for name in NULLS
    ]
    found += [
        Task(kind=kind, key=(name,), cells=tuple((n, 1.0, "rotating", size.runs) for n in size.panels))
        for kind in ("worked", "first")
        for name in (*WORKED, *(["nothing"] if kind == "first" else []))
    ]
    for recording in readings:
        f = recording.federation
        if f.seed != readings[0].federation.seed or (f.method != METHODS[0] and not size.wide):
            continue
        windows = size.nulls if f.plant == NONE and f.method == METHODS[0] else size.runs
        full = size.wide and f.method == METHODS[0]
        found += [
            Task(
                kind="recorded",
                key=(f.method, f.plant, f"{f.strength:g}"),
                cells=tuple(
                    (n, epsilon, scheme, windows)
                    for epsilon in (EPSILONS if full else (1.0, 4.0) if size.wide else (1.0,))
                    for scheme in _schemes(full)
                ),
                readings=path,
            )
            for n in (size.panels if full or not size.wide else (200, 1000))
        ]
    return sorted(found, key=lambda t: -sum(n_windows for *_, n_windows in t.cells))


def _schemes(full: bool) -> tuple[Scheme, ...]:
    return ("rotating", "same") if full else ("rotating",)


def run(todo: Iterable[Task], jobs: int, watch: Callable[[Task], None] = lambda task: None) -> Iterator[dict[str, Any]]:
    """Measure; yields rows. With more than one job each task runs in a process of its own."""
    todo = list(todo)
    if jobs <= 1:
        for task in todo:
            watch(task)
            yield from do(task)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for task, rows in zip(todo, pool.map(do, todo), strict=True):
            watch(task)
            yield from rows


def do(task: Task) -> list[dict[str, Any]]:
    """One task's rows, without those that no table asks for.

    Left out: what other rules say of modes that the change leaves alone, and of recorded readings elsewhere than at
    epsilon 1 in rotating panels.
    """
    scenario = _scenario(task)
    change = 0 if task.kind == "null" and task.key[0] != "variance burst, sd .03 to .2" else CHANGE
    if task.key[0] == "nothing" or (task.kind == "recorded" and task.key[1] == NONE):
        change = 0
    kept = []
    for n, epsilon, scheme, windows in task.cells:
        cell = Cell(scenario=scenario, n=n, epsilon=epsilon, scheme=scheme, paths=windows, change=change)
        planted = task.key[1] if task.kind == "recorded" else str(next(iter(Mode)))
        usual = task.kind != "recorded" or (epsilon == 1.0 and scheme == "rotating")
        for row in measure(cell):
            ours = row["rule"] == OURS
            if (row["mode"] in ("any", planted) and (ours or usual)) or (ours and planted == NONE):
                kept.append({"setting": task.kind, **row})
    return kept


def _scenario(task: Task) -> Scenario:
    if task.kind in ("worked", "first"):
        design = scenarios.NOW if task.kind == "worked" else scenarios.FIRST_DESIGN
        return scenarios.worked(task.key[0], WORKED.get(task.key[0]), HORIZON, seed=1, design=design)
    if task.kind == "null":
        before, after, share = NULLS[task.key[0]]
        return scenarios.worked(task.key[0], after, HORIZON, seed=1, calm=before, share=share)
    recordings: Mapping[tuple[str, ...], Recording] = {
        (r.federation.method, r.federation.plant, f"{r.federation.strength:g}"): r
        for r in reversed(load(task.readings))  # of two seeds the first
    }
    method, plant, _ = task.key
    calm = recordings[method, NONE, "1"]
    planted = None if plant == NONE else recordings[task.key]
    return scenarios.recorded(calm, planted, instruments(), MarginTable().model_dump(), HORIZON)


def instruments() -> tuple[Probe, ...]:
    """The packaged suites' probes."""
    loaded = [suites.load(name) for name in suites.packaged()]
    return probes({role: merge(loaded, role) for role in Role}, ProbesTable().tail)
