"""The planner's predictions against windows that are played out, message by message.

    python benchmarks/planner.py [--windows 300] [--out benchmarks/planner]     both tables, six CPU-minutes
    python benchmarks/planner.py --clients                                      what the planner's default clients are
    python benchmarks/planner.py --demonstration                                which size the demonstration needs

Nothing of the planner is used to play a window: readings of made-up clients -> `Encoding.message` -> every client's
share of discrete noise, from a seed -> `Encoding.read` -> releases -> `monitor.step`. Clients are drawn from a pool of
20,000 messages, made once for each effect. The pool's differences are the normal quantiles in a random order for each
part: a random pool is off by std / sqrt(20,000) in all its windows alike, which moves `clear` near its threshold.
Allowed: 20% of what is played; for shares (power, clear) also .05; for mean rounds (delay, clear_round) below 3 also
half a round. Rounds are compared where at least 30 windows give one.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist, mean

import numpy as np

from fedcanary import study as studies
from fedcanary.cli_privacy import DEMONSTRATION
from fedcanary.monitor import base as monitor
from fedcanary.monitor.forecast import MEASURED, Clients
from fedcanary.monitor.planner import ModeForecast, PanelForecast, Wish, plan
from fedcanary.privacy import noise
from fedcanary.privacy.encode import UNIT, Encoding
from fedcanary.privacy.release import restore
from fedcanary.probes import Probe, probes, suites
from fedcanary.probes.base import CLIP, SEVERE, SEVERE_NAME, asked, merge
from fedcanary.rng import stream
from fedcanary.study import MarginTable
from fedcanary.types import Mode, Release, Role, missing_bit

HERE = Path(__file__).parent
POOL = 20_000
ROUNDS, CHANGE, DELTA, TAIL = 12, 4, 1e-6, 0.05
ENOUGH = 30
LARGE = 1000  # clients of a panel from which on half as many windows are played
GRID = ((40, 100, 200, 1000), (1.0, 4.0), (0.03, 0.05, 0.1))
MODE = Mode.ALIGNMENT_EROSION  # of the grid: three parts, one of which the effect is in


def instruments() -> tuple[Probe, ...]:
    """The packaged suites' probes."""
    loaded = [suites.load(name) for name in suites.packaged()]
    return probes({role: merge(loaded, role) for role in Role}, TAIL)


class Federation:
    """Clients that only exist as readings."""

    def __init__(self, clients: Mapping[Mode, Clients], seed: int, severe: float = 0.03) -> None:
        self.probes = instruments()
        self.clients = clients
        self.seed = seed
        self.severe = severe
        self.encoding = Encoding({p.name: asked(p.coords, severe > 0) for p in self.probes})
        self._pools: dict[tuple[Mode | None, float], np.ndarray] = {}

    def pool(self, mode: Mode | None = None, effect: float = 0.0) -> np.ndarray:
        """(POOL, K + 1) messages of clients, with an effect on the first part of a mode if one is named."""
        if (mode, effect) not in self._pools:
            rng = stream(self.seed, "pool", str(mode), str(effect))
            columns = {p.name: self._readings(rng, p, effect if p.mode == mode else None) for p in self.probes}
            self._pools[mode, effect] = self.encoding.messages(columns)
        return self._pools[mode, effect]

    def _readings(self, rng: np.random.Generator, probe: Probe, effect: float | None) -> np.ndarray:
        """(POOL, K_p) values of one probe."""
        table = dict.fromkeys((c.name for c in probe.coords), np.zeros(POOL))
        if probe.mode is None:
            table["score_base"] = np.clip(rng.normal(0.6, 0.05, POOL), 0, 1)
            table["score_gain"] = np.clip(rng.normal(0.1, 0.06, POOL), -1, 1)
        elif probe.mode == Mode.FAIRNESS_COLLAPSE:
            share = self.clients[probe.mode].tail if effect is None else effect
            table["tail"] = (rng.permutation(POOL) < share * POOL).astype(float)
        else:
            c = self.clients[probe.mode]
            for at, part in enumerate(probe.parts):
                center = (c.drift if effect is None else -effect) if at == 0 else 0.0
                normal = [NormalDist().inv_cdf((i + 0.5) / POOL) for i in range(POOL)]
                d = np.clip(center + c.std * rng.permutation(normal), -CLIP, CLIP)
                silent = rng.permutation(POOL) < c.missing * POOL
                square = {"delta": "square"}.get(part, f"{part}_square")
                if part.startswith("contrast:"):
                    square = part.replace("contrast", "square")
                table[part], table[square] = np.where(silent, 0.0, d), np.where(silent, 0.0, d**2)
                table[missing_bit(part) if missing_bit(part) in table else "missing"] = silent.astype(float)
                table[SEVERE_NAME] = np.maximum(table[SEVERE_NAME], (table[part] < -SEVERE).astype(float))
        return np.stack(list(table.values()), axis=1)


def releases(
    federation: Federation, total: np.ndarray, n: int, std: float, round: int, mode: Mode
) -> dict[str, Release]:
    """One mode's release, as the door makes it."""
    sums, lost, lost_std = federation.encoding.read(total, n, std)
    body = {
        "round": round,
        "probe": mode,
        "coords": sums[mode].coords,
        "total": sums[mode].total,
        "count": n,
        "noise_std": sums[mode].noise_std,
        "sensitivity": 1.0,
        "event": "x",
        "charge_id": "x",
        "lost": lost,
        "lost_std": lost_std,
    }
    return {mode: restore(body)}


def play(
    federation: Federation, judged: monitor.Plan, panel: PanelForecast, mode: Mode, effect: float, windows: int
) -> dict[str, float]:
    """What windows of one kind of panel really show, with the effect from round CHANGE on, and without it (clear)."""
    n = panel.size
    share = noise.share_std(panel.noise_multiplier * UNIT, panel.floor)
    calm, hurt = federation.pool(), federation.pool(mode, effect)
    found: dict[str, list[float]] = {name: [] for name in ("noise", "width", "delay", "clear", "clear_round")}
    alarms = kept = 0
    coord = next(p for p in judged.modes if p.mode == mode).streams[0].coord
    for window in range(windows):
        rng = stream(federation.seed, "window", panel.kind, n, f"{panel.noise_multiplier:.4g}", f"{effect:g}", window)
        states = {wrong: monitor.start(judged) for wrong in (True, False)}
        first, clears, who = 0, [], rng.integers(POOL, size=n)
        for t in range(1, ROUNDS + 1):
            if panel.kind == "rotating":
                who = rng.integers(POOL, size=n)
            noised = noise.simulated_gaussian(rng, share, (n, federation.encoding.size)).sum(axis=0)
            for wrong in (True, False):
                exact = (hurt if wrong and t >= CHANGE else calm)[who].sum(axis=0)
                now = releases(federation, exact + noised, n, share * math.sqrt(n), t, mode)
                states[wrong], evidence = monitor.step(judged, states[wrong], now)
                (one,) = (e for e in evidence if e.mode == mode)
                if not wrong:
                    clears.append(one.state == "clear")
                    continue
                truth = federation.encoding.read(exact, n, 0.0)[0][mode]
                at = truth.coords.index(coord)
                found["noise"].append((now[mode].sum(coord) - float(truth.total[at])) / n)
                first = first or (t if one.state == "alarm" else 0)
                if t >= CHANGE:
                    found["width"].append(one.interval[1] - one.interval[0])
        found["clear"].append(clears[-1])
        if any(clears):
            found["clear_round"].append(clears.index(True) + 1)
        if first == 0 or first >= CHANGE:
            kept += 1
            alarms += first > 0
            if first:
                found["delay"].append(first - CHANGE + 1)
    result = {name: mean(map(float, values)) if values else math.nan for name, values in found.items()}
    widths = [math.inf if math.isnan(width) else width for width in found["width"]]  # no estimate, no interval
    late = len(found["delay"]) < ENOUGH
    rare = len(found["clear_round"]) < ENOUGH
    return {
        **result,
        "noise": float(np.std(found["noise"])),
        "width": float(np.median(widths)),
        "power": alarms / max(kept, 1),
        "delay": math.nan if late else result["delay"],
        "clear_round": math.nan if rare else result["clear_round"],
    }


def misses(predicted: ModeForecast, played: Mapping[str, float]) -> list[str]:
    """Which of the figures are further off than is allowed."""
    found = []
    for name, real in played.items():
        said = getattr(predicted, name)
        if math.isnan(real):
            continue
        allowed = 0.2 * abs(real)
        if name in ("power", "clear"):
            allowed = max(allowed, 0.05)
        if name in ("delay", "clear_round") and real < 3:
            allowed = max(allowed, 0.5)
        if said != real and not abs(said - real) <= allowed:
            found.append(name)
    return found


def cell(
    federation: Federation, size: int, epsilon: float, kind: str, mode: Mode, effect: float | None, windows: int
) -> tuple[ModeForecast, dict[str, float]]:
    """Prediction and play of one mode under one kind of panel."""
    margins = MarginTable().model_dump()
    if effect is not None:
        margins[mode] = effect / 2
    people = size * ROUNDS if kind == "rotating" else size
    wish = Wish(
        clients=people,
        epsilon=epsilon,
        delta=DELTA,
        rounds=ROUNDS,
        change=CHANGE,
        power=1e-9,
        seed=federation.seed,
        severe=federation.severe,
    )  # so little power asked that no search for remedies begins
    planned = plan(wish, federation.probes, margins, federation.clients)
    panel = next(p for p in planned.panels if p.kind == kind)
    predicted = next(m for m in panel.modes if m.mode == mode)
    judged = monitor.plan(
        margins,
        {p.mode: p.parts for p in federation.probes if p.mode is not None},
        {p.name: p.unit for p in federation.probes},
        wish.alpha,
        ROUNDS,
        groups={part.removeprefix("contrast:"): 0.0 for p in federation.probes for part in p.parts if ":" in part},
        severe=federation.severe,
    )
    return predicted, play(federation, judged, panel, mode, predicted.effect, windows if size < LARGE else windows // 2)


COLUMNS = ("noise", "width", "power", "delay", "clear", "clear_round")


def table(rows: Sequence[tuple[str, ModeForecast, Mapping[str, float]]]) -> list[str]:
    """Markdown: for each figure `predicted / played`; what is too far off is bold."""
    lines = ["| " + " | ".join(("case", *COLUMNS)) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    worst = dict.fromkeys(COLUMNS, 1.0)
    failed = 0
    for name, predicted, played in rows:
        off = misses(predicted, played)
        failed += len(off)
        cells = []
        for column in COLUMNS:
            said, real = getattr(predicted, column), played[column]
            digits = ".4f" if column == "noise" else ".3f" if column == "width" else ".2f"
            text = "-" if math.isnan(real) else f"{said:{digits}} / {real:{digits}}"
            cells.append(f"**{text}**" if column in off else text)
            counts = not math.isnan(real) and (column not in ("power", "clear") or min(real, said) >= 0.2)
            if counts and said != real and abs(math.log(said / real)) > abs(math.log(worst[column])):
                worst[column] = said / real
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("| *worst ratio* | " + " | ".join(f"{worst[c]:.3f}" for c in COLUMNS) + " |")
    return [*lines, "", f"Outside the allowance: {failed} of {sum(len(r[2]) for r in rows)} figures."]


def run(windows: int, out: Path) -> None:
    began = time.process_time()
    wide = {mode: replace(c, std=0.1, drift=0.0) for mode, c in MEASURED.items()}
    federation = Federation(wide, seed=7, severe=0.0)  # at a std of .1 more than that are severe with nothing wrong
    grid = [
        (f"{kind} {n}, epsilon {epsilon:g}, effect {effect:g}", n, epsilon, kind, effect)
        for kind in ("rotating", "same")
        for n in GRID[0]
        for epsilon in GRID[1]
        for effect in GRID[2]
    ]
    first, second = [], []
    for name, n, epsilon, kind, effect in grid:
        first.append((name, *cell(federation, n, epsilon, kind, MODE, effect, windows)))
        print(name, f"{time.process_time() - began:.0f} s", *misses(*first[-1][1:]), flush=True)
    bundled = Federation(MEASURED, seed=11)
    for n in (40, 60, 80):
        for mode in Mode:
            name = f"rotating {n}, {mode}"
            second.append((name, *cell(bundled, n, 4.0, "rotating", mode, None, windows)))
            print(name, f"{time.process_time() - began:.0f} s", *misses(*second[-1][1:]), flush=True)
    seconds = time.process_time() - began
    text = [
        f"`OMP_NUM_THREADS=1 python benchmarks/planner.py --windows {windows}`: {seconds:.0f} CPU-seconds. "
        "Each figure is predicted / played. Worst ratios leave out shares below .2.",
        "",
        f"## {MODE} with margin = effect / 2, {ROUNDS} rounds, change in round {CHANGE}, std between clients .1",
        *("", *table(first), ""),
        f"## All modes of the bundled world at its margins, effect twice the margin, epsilon 4, delta {DELTA:g}",
        *("", *table(second)),
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "tables.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))


# What the bundled plants do at strength 1, and the calibration that unplanted personalization gains (`--clients`).
PLANTED = dict(zip(Mode, (0.225, 0.134, 0.25, 0.054, 0.119, 0.156), strict=True))
GAINED = replace(MEASURED[Mode.CONFIDENCE_MISCALIBRATION], std=0.032, drift=0.05)


def demonstration() -> None:
    """Print power and clear for the demonstration's possible sizes: its own rounds and privacy, rotating panels."""
    own = studies.load(DEMONSTRATION)
    sizes = (40, 60, 80, 100)
    print("| mode | margin | effect | " + " | ".join(f"{own.rounds * n} clients, {n} a round" for n in sizes) + " |")
    print("|---|---|---|" + "---|" * len(sizes))
    margins, federation = MarginTable().model_dump(), Federation(MEASURED, seed=1)
    for what, effects in (("twice the margin", {}), ("planted, from round 1", PLANTED)):
        planned = []
        for n in sizes:
            wish = Wish(
                clients=own.rounds * n,
                epsilon=own.privacy.epsilon,
                delta=own.privacy.delta,
                rounds=own.rounds,
                per_round=n,
                dropouts=own.privacy.dropouts,
                effects=effects,
                change=1 if effects else 0,
            )
            clients = MEASURED if not effects else {**MEASURED, Mode.CONFIDENCE_MISCALIBRATION: GAINED}
            planned.append({m.mode: m for m in plan(wish, federation.probes, margins, clients).panels[0].modes})
        for mode in Mode:
            cells = []
            for m in (p[mode] for p in planned):
                rounds = [f"{x:.1f}" if math.isfinite(x) else "-" for x in (m.delay, m.clear_round)]
                cells.append(f"alarm {m.power:.2f} after {rounds[0]}, clear {m.clear:.2f} from {rounds[1]}")
            print(f"| {mode} | {margins[mode]:g} | {planned[0][mode].effect:g} ({what}) | " + " | ".join(cells) + " |")


def measure(count: int = 32, rounds: int = 8) -> None:
    """Print mean and standard deviation between clients of every tested difference, unplanted and by plant."""
    import tempfile

    import plants

    from fedcanary import pipeline
    from fedcanary.engines.setup import prepare

    for plant in (plants.NONE, *plants.SHORT):
        rows: list[Mapping[str, np.ndarray]] = []

        def tap(round: int, client: int, readings: Mapping, rows: list = rows) -> None:
            if round > rounds - 3:
                rows.append({name: r.values for name, r in readings.items()})

        with tempfile.TemporaryDirectory() as folder:
            setup = prepare(studies.parse(plants.study(plant, 501, clients=count, rounds=rounds)), Path(folder) / "c")
            pipeline.run(setup, Path(folder) / "run", oracle_tap=tap)
        for probe in setup.probes:
            names = [c.name for c in probe.coords]
            for part in (
                () if probe.mode is None else ("tail",) if probe.mode == Mode.FAIRNESS_COLLAPSE else probe.parts
            ):
                values = np.array([row[probe.name][names.index(part)] for row in rows])
                print(
                    f"{plant:28s}{probe.name:28s}{part:16s}mean {values.mean():+.4f}  std {values.std():.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--windows", type=int, default=300)
    arguments.add_argument("--out", type=Path, default=HERE / "planner")
    arguments.add_argument("--clients", action="store_true")
    arguments.add_argument("--demonstration", action="store_true")
    given = arguments.parse_args()
    if given.clients:
        measure()
    elif given.demonstration:
        demonstration()
    else:
        run(given.windows, given.out)
