"""The tables and the targets, from recorded runs alone. A run is one line of results.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from cells import CONTENDERS, EVERY, start
from check import TOLERANCE
from job import TARGETS, Job

RIVALS = tuple(name for name in CONTENDERS if name != "ours")
NAMES = {"llama128": "Llama, hidden 128", "llama256": "Llama, hidden 256", "minilm": "MiniLM"}


class DifferentJobs(Exception):
    """Contenders did not do the same job, so their times cannot be compared."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The runs of one contender on one job."""

    cpu: tuple[float, ...]  # seconds of the whole process tree
    mib: float  # median of the peaks
    net: float  # milliseconds per client-step, without the start: the process's own word, else less a run of no rounds

    @property
    def median(self) -> float:
        """CPU-seconds."""
        return median(self.cpu)


Table = Mapping[tuple[str, str], Measured]  # (job's name, contender)


def refuse_different(runs: Iterable[Mapping[str, Any]]) -> None:
    """Raise unless every run's adapter and losses are the reference's within the tolerance."""
    off = [
        f"{run['contender']} on {run['job']}: {key} off by {run['off'][key]:.2g} (allowed {limit:g})"
        for run in runs
        for key, limit in TOLERANCE.items()
        if run["off"] is not None and not run["off"][key] <= limit  # NaN too
    ]
    if off:
        raise DifferentJobs("; ".join(off))


def table(runs: Sequence[Mapping[str, Any]], jobs: Iterable[Job], *, compared: bool = True) -> Table:
    """What was measured of these jobs, by runs whose result was compared with the reference's, or by the others."""
    refuse_different(runs)
    runs = [run for run in runs if (run["off"] is not None) == compared]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["job"], run["contender"]), []).append(run)
    found = {}
    for job in jobs:
        for contender in CONTENDERS:
            mine, begun = groups.get((job.name, contender)), groups.get((start(job).name, contender))
            if not mine:
                continue
            cpu, own = tuple(run["cpu"] for run in mine), [run["net"] for run in mine]
            if None in own:  # many processes
                net = median(cpu) - median(run["cpu"] for run in begun) if begun else float("nan")
            else:
                net = median(own)
            peak = median(run["mib"] for run in mine)
            found[job.name, contender] = Measured(cpu, peak, 1000 * net / job.client_steps)
    return found


def ratio(table: Table, job: Job, rival: str, of: Callable[[Measured], float]) -> float | None:
    """A rival's cost over ours; None where one of the two was not measured."""
    mine, other = table.get((job.name, "ours")), table.get((job.name, rival))
    return of(other) / of(mine) if mine and other else None


def cpu(measured: Measured) -> float:
    """CPU-seconds of the whole process tree."""
    return measured.median


def net(measured: Measured) -> float:
    """The same per client-step, without the start."""
    return measured.net


def memory(measured: Measured) -> float:
    """Peak MiB."""
    return measured.mib


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on a ratio in each of some cells."""

    says: str
    rival: str
    of: Callable[[Measured], float]
    least: float
    beyond: bool = False  # the ratio must exceed the bound
    where: Callable[[Job], bool] = lambda job: True

    def judge(self, table: Table, jobs: Sequence[Job]) -> str:
        """`met`, `not met` with the worst cells, or `not measured` with how many cells are missing."""
        chosen = [job for job in jobs if self.where(job)]
        ratios = {job.name: ratio(table, job, self.rival, self.of) for job in chosen}
        known = {name: value for name, value in ratios.items() if value is not None}
        short = {name: value for name, value in known.items() if not self.enough(value)}
        if short:
            worst = sorted(short.items(), key=lambda pair: pair[1])[:3]
            listed = ", ".join(f"{name} {value:.2f}" for name, value in worst)
            return f"**not met** in {len(short)} of {len(chosen)} cells: {listed}"
        missing = len(chosen) - len(known)
        if missing or not chosen:
            return f"**not measured** in {missing} of {len(chosen)} cells"
        return f"met in all {len(chosen)} cells (least {min(known.values()):.2f})"

    def enough(self, value: float) -> bool:
        """Whether one ratio reaches the bound; NaN does not."""
        return value > self.least if self.beyond else value >= self.least


def _small(job: Job) -> bool:
    return job.model == "llama128" and job.batch * job.tokens <= 4 * 32


def _larger(job: Job) -> bool:
    return (job.model, job.batch, job.tokens) == ("llama128", 8, 32)


def _middle(job: Job) -> bool:
    return (job.clients, job.batch, job.tokens) == (100, 4, 32)


TARGET_LIST = [
    Target("at least 2x peft's loop, hidden 128, batch up to 4x32 (1x64 too)", "peft", net, 2.0, where=_small),
    Target("at least 1.3x peft's loop, hidden 128, batch 8x32", "peft", net, 1.3, where=_larger),
    Target("at least 1.0x peft's loop everywhere", "peft", net, 1.0),
    Target("the same with the start of the process", "peft", cpu, 1.0),
    Target("at least 3x Flower's simulation at 4x32 with 100 clients", "flower", net, 3.0, where=_middle),
    Target("the same with the start of all processes", "flower", cpu, 3.0, where=_middle),
    Target("at most a third of Flower's memory there", "flower", memory, 3.0, where=_middle),
    Target("ahead of pfl in every cell", "pfl", net, 1.0, beyond=True),
    Target("the same with the start of the process", "pfl", cpu, 1.0, beyond=True),
]


def _line(*fields: object) -> str:
    return "| " + " | ".join(map(str, fields)) + " |"


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _spread(values: Sequence[float]) -> str:
    middle = median(values)
    return f"{middle:.1f}" if len(values) == 1 else f"{middle:.1f} ({min(values):.1f} to {max(values):.1f})"


def cell_tables(table: Table, jobs: Sequence[Job]) -> str:
    """One table for each model: a row for each cell that was measured."""
    parts = []
    for model in TARGETS:
        mine = [job for job in jobs if job.model == model and (job.name, "ours") in table]
        if not mine:
            continue
        heads = ["clients", "batch", "steps x rounds", "runs", "ours, CPU-s"]
        heads += [f"{r}/ours" for r in RIVALS] + ["ours, ms per client-step"] + [f"{r}/ours, net" for r in RIVALS]
        heads += [f"MiB {c}" for c in ("ours", *RIVALS)]
        lines = [_line(*heads), _line(*["---"] * len(heads))]
        for job in mine:
            own = table[job.name, "ours"]
            peaks = [table[job.name, c].mib if (job.name, c) in table else None for c in ("ours", *RIVALS)]
            lines.append(
                _line(
                    job.clients,
                    f"{job.batch}x{job.tokens}",
                    f"{job.steps} x {job.rounds}",
                    len(own.cpu),
                    _spread(own.cpu),
                    *(_number(ratio(table, job, r, cpu)) for r in RIVALS),
                    f"{own.net:.1f}",
                    *(_number(ratio(table, job, r, net)) for r in RIVALS),
                    *(_number(p, ".0f") for p in peaks),
                )
            )
        parts.append(f"### {NAMES[model]}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def target_table(table: Table, jobs: Sequence[Job] = EVERY) -> str:
    """Each target, and whether it is met in all of the cells that it names."""
    lines = [_line("target", "basis", "result"), _line("---", "---", "---")]
    basis = {net: "CPU net of start", cpu: "CPU, whole tree", memory: "peak memory"}
    lines += [_line(t.says, basis[t.of], t.judge(table, jobs)) for t in TARGET_LIST]
    return "\n".join(lines)


def growth_table(runs: Sequence[Mapping[str, Any]], jobs: Sequence[Job]) -> str:
    """Ours alone, by clients and by rounds."""
    found = table(runs, jobs, compared=False)
    lines = [_line("clients", "rounds", "CPU-s", "net ms per client-round", "peak MiB"), _line(*["---"] * 5)]
    for job in jobs:
        if own := found.get((job.name, "ours")):
            cells = (job.clients, job.rounds, _spread(own.cpu), f"{own.net * job.steps:.1f}", f"{own.mib:.0f}")
            lines.append(_line(*cells))
    return "\n".join(lines)


def start_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """What it costs to start and end, by model."""
    lines = [_line("model", *(f"{c}, CPU-s" for c in CONTENDERS)), _line(*["---"] * (1 + len(CONTENDERS)))]
    for model in TARGETS:
        name = start(next(job for job in EVERY if job.model == model)).name
        values = [[r["cpu"] for r in runs if (r["job"], r["contender"]) == (name, c)] for c in CONTENDERS]
        if any(values):
            lines.append(_line(NAMES[model], *(_spread(v) if v else "" for v in values)))
    return "\n".join(lines)


def distance_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """The largest distance of each contender from peft's result."""
    lines = [_line("contender", "runs", "adapter", "loss"), _line(*["---"] * 4)]
    for contender in CONTENDERS:
        offs = [run["off"] for run in runs if run["contender"] == contender and run["off"] is not None]
        if offs:
            worst = [f"{max(off[key] for off in offs):.1e}" for key in TOLERANCE]
            lines.append(_line(contender, len(offs), *worst))
    lines.append(_line("allowed", "", *(f"{limit:.1e}" for limit in TOLERANCE.values())))
    return "\n".join(lines)


def quick(runs: Sequence[Mapping[str, Any]], jobs: Sequence[Job]) -> str:
    """The short form, for the terminal."""
    return "\n\n".join([cell_tables(table(runs, jobs), jobs), distance_table(runs)])
