"""The nine edges of the influence graph: plant the parent, measure the child; and what the monitor makes of it.

    python benchmarks/edges.py [--readings FILE|DIR ...] [--out benchmarks/silentbench]     a minute
    python benchmarks/edges.py --record DIR [--seeds 4]          40 CPU-seconds for each of 6 plants x seeds

Effects are paired differences over the 140 federations of benchmarks/plants: how much worse the child is with the
parent planted than in the federation of the same seed with nothing planted. Without --readings the lags of alarms are
those of OUT/edges.json; with it they are taken again from recorded federations (SilentBench's, and what --record
makes), whose clients are drawn with replacement into panels that the monitor judges. Writes OUT/edges.json and
OUT/edges.md, and prints the constants of src/fedcanary/monitor/influence.py.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from plants import NONE, SHORT, read
from scipy import optimize, stats

from fedcanary.monitor import base as monitor
from fedcanary.monitor import influence
from fedcanary.monitor.influence import FEEDBACK, PRIMARY, Alarm, Effect, Fit, Lags
from fedcanary.privacy import accounting, noise
from fedcanary.privacy.encode import UNIT, Encoding
from fedcanary.privacy.release import restore
from fedcanary.rng import stream
from fedcanary.study import MarginTable
from fedcanary.types import Mode, Release

HERE = Path(__file__).parent
MARGINS = MarginTable().model_dump()
EDGES = (*PRIMARY, *FEEDBACK)
PAIRS = tuple(permutations(Mode, 2))
PANELS = ((100, math.inf), (400, math.inf), (400, 4.0), (1600, 1.0))  # clients of a panel, epsilon
FIRST = 411  # seed of the recorded federations
WINDOWS = 8  # drawn for each recorded federation and kind of panel
Runs = Sequence[Mapping[str, Any]]
Pairs = Mapping[tuple[int, int, int], float]  # round of the first alarm, of the second, rounds: weight
Curves = Mapping[Mode, list[tuple[float, float, float]]]


# --- strengths: the 140 runs of benchmarks/plants


def in_margins(runs: Runs, plant: str, mode: Mode) -> np.ndarray:
    """(seeds,) how much worse the mode is, in its margins, with the plant."""
    chosen = sorted((r for r in runs if r["plant"] == plant), key=lambda r: r["seed"])
    return np.array([r["judged"][mode] for r in chosen]) / MARGINS[mode]


def excess(runs: Runs, plant: str, mode: Mode) -> np.ndarray:
    """(seeds,) the same, less what it is at the same seed with nothing planted."""
    return in_margins(runs, plant, mode) - in_margins(runs, NONE, mode)


def effect(runs: Runs, parent: Mode, child: Mode) -> dict[str, Any]:
    """The child's change when the parent is planted, in its unit, with a 95% t interval over seeds."""
    change = excess(runs, parent, child) * MARGINS[child]
    half = stats.t.ppf(0.975, len(change) - 1) * change.std(ddof=1) / math.sqrt(len(change))
    mean = float(change.mean())
    return {
        "parent": str(parent),
        "child": str(child),
        "edge": "primary" if (parent, child) in PRIMARY else "feedback" if (parent, child) in FEEDBACK else "none",
        "effect": mean,
        "interval": [mean - half, mean + half],
        "seeds": len(change),
        "in_margins": mean / MARGINS[child],
        "beyond_margin": int((in_margins(runs, parent, child) > 1).sum()),
    }


def slope(runs: Runs, parent: Mode, child: Mode) -> Effect:
    """Child's excess for each of the parent's: a ratio of means, with the delta method's error."""
    cause, change = excess(runs, parent, parent), excess(runs, parent, child)
    ratio = float(change.mean() / cause.mean())
    left = float((change - ratio * cause).std(ddof=1))
    floor = float(in_margins(runs, NONE, child).std(ddof=1))  # an effect cannot be seen finer than what varies anyway
    return Effect(
        slope=round(ratio, 4),
        error=round(left / math.sqrt(len(cause)) / float(cause.mean()), 4),
        spread=round(max(left, floor), 4),
    )


def strengths(runs: Runs) -> dict[str, Any]:
    """The fields of `Fit` that the runs alone say."""
    logs = [np.log(excess(runs, mode, mode)) for mode in Mode]
    means = np.array([each.mean() for each in logs])
    within = float(np.mean([each.var(ddof=1) for each in logs]))
    unplanted = {mode: in_margins(runs, NONE, mode) for mode in Mode}
    return {
        "effects": {edge: slope(runs, *edge) for edge in EDGES},
        "degrees": len(unplanted[Mode.AMPLIFIED_BIAS]) - 1,
        "unplanted": {m: (round(float(x.mean()), 4), round(float(x.std(ddof=1)), 4)) for m, x in unplanted.items()},
        # a seventh failure: the spread between the six, and within one over seeds
        "own": (round(float(means.mean()), 4), round(math.sqrt(float(means.var(ddof=1)) * 7 / 6 + within), 4)),
        "own_degrees": len(means) - 1,
    }


# --- order: alarms over panels drawn from recorded federations


class Recorded:
    """A recorded federation as the monitor may come to see it."""

    def __init__(self, recording: Any, instruments: Sequence[Any]) -> None:
        self.federation = recording.federation
        self.rounds = len(recording.values)
        # a recording may be older than a coordinate that these tests do not read
        kept = {p.name: tuple(c for c in p.coords if c.name in recording.layout[p.name]) for p in instruments}
        self.encoding = Encoding(kept)
        modes = {p.mode: p for p in instruments if p.mode is not None}
        self.plan = monitor.plan(
            margins=MARGINS,
            parts={m: p.parts for m, p in modes.items()},
            units={m: p.unit for m, p in modes.items()},
            alpha=0.05,
            horizon=self.rounds,
            groups=recording.gaps,
        )
        cuts = np.cumsum([len(coords) for coords in recording.layout.values()])[:-1]
        self.sent = [
            np.array(
                [
                    self.encoding.message(dict(zip(recording.layout, np.split(x.astype(float), cuts), strict=True)))
                    for x in said[~np.isnan(said).any(axis=1)]
                ]
            )
            for said in recording.values
        ]

    def play(self, n: int, epsilon: float, rng: np.random.Generator | None) -> tuple[dict[Mode, int], Curves]:
        """Since when the monitor is in alarm, and each round's estimate with its interval. Without rng: all clients."""
        std = 0.0 if math.isinf(epsilon) else accounting.gaussian_std(epsilon, 1e-6, 1.0) * UNIT
        state, curves = monitor.start(self.plan), defaultdict(list)
        for t, messages in enumerate(self.sent, start=1):
            drawn = messages if rng is None else messages[rng.integers(len(messages), size=n)]
            total = drawn.sum(axis=0)
            if std and rng is not None:
                total = total + noise.simulated_gaussian(rng, std, self.encoding.size)
            state, evidence = monitor.step(self.plan, state, self.releases(t, total, len(drawn), std))
            for e in evidence:
                curves[e.mode].append((e.estimate, *e.interval))
        return {Mode(mode): round for mode, round in state.since.items()}, curves

    def releases(self, round: int, total: np.ndarray, n: int, std: float) -> dict[str, Release]:
        """A round's sums, as the door makes them."""
        sums, lost, lost_std = self.encoding.read(total, n, std)
        made = {"round": round, "count": n, "sensitivity": 1.0, "event": "", "charge_id": "", "lost": lost}
        return {
            name: restore(
                {
                    **made,
                    "probe": name,
                    "coords": each.coords,
                    "total": each.total,
                    "noise_std": each.noise_std,
                    "lost_std": lost_std,
                }
            )
            for name, each in sums.items()
        }

    def excess(self) -> dict[Mode, float]:
        """How much worse each mode is, in margins, over all clients and the last rounds."""
        _, curves = self.play(0, math.inf, None)
        return {m: float(np.mean([e for e, *_ in curves[m][-influence.LAST :]])) / MARGINS[m] for m in Mode}

    def alarms(self, n: int, epsilon: float, window: int) -> dict[Mode, Alarm]:
        """What the monitor raises over one window."""
        rng = stream(1, "edges", self.federation.name, n, f"{epsilon:g}", window)
        since, curves = self.play(n, epsilon, rng)
        return {m: influence.alarm(t, curves[m], MARGINS[m]) for m, t in since.items()}


@dataclass(frozen=True, slots=True)
class Seen:
    """A recorded federation, what it does to each mode, and the alarms in each window of each kind of panel."""

    federation: Any
    rounds: int
    excess: Mapping[Mode, float]
    windows: Mapping[tuple[int, float], Sequence[Mapping[Mode, Alarm]]]

    @property
    def planted(self) -> Mode | None:
        """What was planted."""
        return None if self.federation.plant == NONE else Mode(self.federation.plant)


def seen(paths: Iterable[Path]) -> list[Seen]:
    """Every recorded federation, played."""
    from planner import instruments

    from fedcanary.bench import federations

    files = [f for path in paths for f in (sorted(path.glob("*.npz")) if path.is_dir() else [path])]
    found = []
    for recording in (r for file in files for r in federations.load(file)):
        one = Recorded(recording, instruments())
        windows = {kind: [one.alarms(*kind, window) for window in range(WINDOWS)] for kind in PANELS}
        found.append(Seen(one.federation, one.rounds, one.excess(), windows))
    return found


def record(folder: Path, seeds: int) -> None:
    """Run and record each plant at its full strength, and nothing planted, at seeds that nothing was fitted on."""
    from fedcanary.bench import federations

    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(FIRST, FIRST + seeds):
        for plant in (*Mode, *([NONE] if seed == FIRST else [])):
            federation = federations.Federation(plant=str(plant), clients=16, seed=seed)
            path = folder / f"{federation.name.replace('/', '_')}.npz"
            if not path.exists():
                federations.save([federations.run(federation)], path)
                print(federation.name, flush=True)


def along(federations: Sequence[Seen]) -> Pairs:
    """Secondary alarms after planted ones; every federation and child weighs 1 over its windows."""
    pairs: Counter[tuple[int, int, int]] = Counter()
    for one in federations:
        for child in Mode:
            both = [w for ws in one.windows.values() for w in ws if one.planted in w and child in w]
            for w in both if child != one.planted else ():
                pairs[w[one.planted].round, w[child].round, one.rounds] += 1 / len(both)
    return dict(sorted(pairs.items()))


def together(federations: Sequence[Seen]) -> Pairs:
    """Own alarms of two federations that are alike but for the plant; they weigh as many as there are with an alarm."""
    alike: dict[Any, list[Seen]] = defaultdict(list)
    for one in federations:
        if any(one.planted in w for ws in one.windows.values() for w in ws):
            f = one.federation
            alike[f.method, f.strength, f.clients, f.seed, one.rounds].append(one)
    pairs: Counter[tuple[int, int, int]] = Counter()
    for a, b in (pair for group in alike.values() for pair in permutations(group, 2)):
        both = [
            (x[a.planted].round, y[b.planted].round, a.rounds)
            for kind in PANELS
            for x, y in zip(a.windows[kind], b.windows[kind], strict=True)
            if a.planted in x and b.planted in y
        ]
        for pair in both:
            pairs[pair] += 1 / len(both)
    share = sum(len(group) for group in alike.values() if len(group) > 1) / sum(pairs.values()) if pairs else 0.0
    return {pair: weight * share for pair, weight in sorted(pairs.items())}


def lags(pairs: Pairs, symmetric: bool = False) -> Lags:
    """Likeliest lags given that both alarms came by the last round, with one pseudo-observation of each outcome.

    Symmetric: neither of the two alarms is the other's cause, so sooner and later are alike.
    """

    def unpack(free: np.ndarray) -> Lags:
        x = np.array([free[0], free[0], free[1], free[1]]) if symmetric else free
        chances = np.exp([0.0, *x[:2]])
        at_once, later, _ = (chances / chances.sum()).tolist()
        hazards = (1 / (1 + np.exp(-x[2:]))).tolist()
        return Lags(at_once=at_once, later=later, hazard_later=hazards[0], hazard_earlier=hazards[1])

    def loss(x: np.ndarray) -> float:
        fit = unpack(x)
        told = math.log(fit.at_once * fit.later * (1 - fit.at_once - fit.later))
        told += sum(math.log(h * (1 - h)) for h in (fit.hazard_later, fit.hazard_earlier))
        for (first, second, rounds), weight in pairs.items():
            possible = sum(fit.chance(k) for k in range(1 - first, rounds - first + 1))
            told += weight * math.log(fit.chance(second - first) / possible)
        return -told

    best = unpack(
        optimize.minimize(
            loss, np.zeros(2 if symmetric else 4), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9}
        ).x
    )
    return Lags(**{name: round(value, 3) for name, value in asdict(best).items()})


def settings(federations: Sequence[Seen], fitted: Mapping[tuple[Mode, Mode], Effect]) -> float:
    """Standard deviation of an edge's slope between methods and strengths, beyond the spread between federations."""
    base = {(f.federation.method, f.federation.clients): f.excess for f in federations if f.planted is None}
    over = weight = 0.0
    for one in federations:
        nothing = base.get((one.federation.method, one.federation.clients))
        for (parent, child), e in fitted.items():
            if nothing is None or parent != one.planted:
                continue
            cause, change = (one.excess[m] - nothing[m] for m in (parent, child))
            over += (change - e.slope * cause) ** 2 - e.spread**2 - (e.error * cause) ** 2
            weight += cause**2
    return round(math.sqrt(max(over, 0.0) / weight), 4) if weight else 0.0


# --- how often the planted mode is named


def old_rule(child: Mode, alarms: Mapping[Mode, Alarm]) -> list[Mode]:
    """Parents in alarm no later than the child, in the graph's order."""
    return [p for p, c in EDGES if c == child and p in alarms and alarms[p].round <= alarms[child].round]


Case = tuple[str, float, float, float, float]


def judge(planted: Mode, alarms: Mapping[Mode, Alarm], rounds: int, fit: Fit) -> Iterable[Case]:
    """For each alarm that has a choice: which sort it is, and whether its cause is named by the likelihood, comes first
    among its parents in alarm, is named by the old rule, and by chance.

    The cause is the planted mode where an edge leads from it to the alarm, or else a parent in between that is in alarm
    too; where there is neither, or it was planted itself, it is nothing in the graph.
    """
    for child in alarms:
        choices = [p for p, c in EDGES if c == child and p in alarms]
        if not choices:
            continue
        between = {p for p in choices if (planted, p) in EDGES}
        if child == planted:
            sort, right = "the planted mode itself", {None}
        elif planted in choices:
            sort, right = "its child by an edge", {planted}
        elif between:
            sort, right = "its grandchild", between
        else:
            sort, right = "another mode", {None}
        ranked = influence.upstream(child, alarms, rounds, fit)
        best = ranked[0].mode if ranked[0].log10_ratio > 0 else None
        old = (*old_rule(child, alarms), None)[0]
        yield sort, best in right, ranked[0].mode in right, old in right, len(right) / (len(choices) + 1)


def tally(cases: Iterable[tuple[float, Case]]) -> dict[str, dict[str, float]]:
    """Weighted shares by sort of alarm, and over all of them."""
    table: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(5))
    for weight, (sort, *named) in cases:
        for name in (sort, "all"):
            table[name] += weight * np.array([1.0, *named])
    keys = ("alarms", "likelihood", "first", "old_rule", "chance")
    shares = {sort: [x[0], *(x[1:] / x[0])] for sort, x in sorted(table.items())}
    return {sort: dict(zip(keys, map(float, each), strict=True)) for sort, each in shares.items()}


def by_strength(runs: Runs, base: Fit) -> dict[str, dict[str, float]]:
    """The 140 runs, each half of the seeds judged by what was fitted on the other; who alarmed first is not known."""
    seeds = sorted({r["seed"] for r in runs})
    cases = []
    for half in (0, 1):
        fit = replace(base, **strengths([r for r in runs if seeds.index(r["seed"]) % 2 != half]))
        for r in runs:
            if seeds.index(r["seed"]) % 2 == half and r["plant"] != NONE:
                worse = {m: r["judged"][m] / MARGINS[m] for m in Mode if r["judged"][m] > MARGINS[m]}
                alarms = {m: Alarm(round=1, strength=x, error=0.0) for m, x in worse.items()}
                cases += [(1.0, case) for case in judge(Mode(r["plant"]), alarms, 1, fit)]
    return tally(cases)


def by_both(federations: Sequence[Seen], base: Fit) -> dict[str, dict[str, float]]:
    """The recorded federations, each judged with lags and settings of all others; its windows weigh 1 together."""
    cases = []
    for one in (f for f in federations if f.planted):
        others = [f for f in federations if f is not one]
        windows = [w for ws in one.windows.values() for w in ws]
        fit = replace(
            base,
            along=lags(along(others)),
            together=lags(together(others), symmetric=True),
            settings=settings(others, base.effects),
        )
        cases += [(1 / len(windows), case) for w in windows for case in judge(one.planted, w, one.rounds, fit)]
    return tally(cases)


# --- results


def constants(fit: Fit) -> str:
    """The fit as Python, for influence.py."""

    def mode(m: Mode) -> str:
        return f"Mode.{m.name}"

    lines = ["FITTED: Final = Fit(", "    effects={"]
    lines += [
        f"        ({mode(p)}, {mode(c)}): Effect(slope={e.slope}, error={e.error}, spread={e.spread}),"
        for (p, c), e in fit.effects.items()
    ]
    lines += ["    },", f"    degrees={fit.degrees},", "    unplanted={"]
    lines += [f"        {mode(m)}: {pair}," for m, pair in fit.unplanted.items()]
    rest = ("own", "own_degrees", "settings", "along", "together")
    return "\n".join([*lines, "    },", *(f"    {name}={getattr(fit, name)!r}," for name in rest), ")"])


def pairs_of(rows: Iterable[Sequence[float]]) -> Pairs:
    """Pairs of alarms as edges.json keeps them."""
    return {(int(first), int(second), int(rounds)): weight for first, second, rounds, weight in rows}


def orders(alarms: Mapping[str, Iterable[Sequence[float]]]) -> dict[str, Lags]:
    """The fields of `Fit` that pairs of alarms say."""
    return {name: lags(pairs_of(alarms[name]), symmetric=name == "together") for name in ("along", "together")}


def by_lag(pairs: Pairs) -> dict[int, float]:
    """Weight of each lag."""
    table: Counter[int] = Counter()
    for (first, second, _), weight in pairs.items():
        table[second - first] += weight
    return table


def number(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}f}"


def markdown(found: Mapping[str, Any]) -> str:
    """The tables."""

    def row(e: Mapping[str, Any], kind: str = "") -> str:
        low, high = e["interval"]
        shown = f"{number(e['effect'], 4)} [{number(low, 4)}, {number(high, 4)}]"
        names = f"| {SHORT[e['parent']]} → {SHORT[e['child']]}{kind}"
        word = "yes" if low > 0 else "the other way" if high < 0 else "no"
        return f"{names} | {shown} | {number(e['in_margins'], 2)} | {e['beyond_margin']} of {e['seeds']} | {word} |"

    others = [e for e in found["others"] if e["interval"][0] > 0 or e["interval"][1] < 0]
    others.sort(key=lambda e: -abs(e["in_margins"]))
    head = "| effect on the child [95%] | in its margins | beyond its margin | measured |"
    lines = [
        "## The nine edges, planted",
        "",
        f"`python benchmarks/edges.py`. {found['runs']} federations of `benchmarks/plants`, all-seeing oracle: the "
        "child with the parent planted at strength 1, less the child at the same seed with nothing planted; mean of "
        "paired differences with a 95% t interval, in the child's unit (positive is worse). Intervals are one by one, "
        "not joint.",
        "",
        f"| edge | kind {head}",
        "|---|---|---|---|---|---|",
        *(row(e, f" | {e['edge']}") for e in found["edges"]),
        "",
        "Effects the graph has no edge for, whose interval leaves zero out:",
        "",
        f"| pair {head}",
        "|---|---|---|---|---|",
        *(row(e) for e in others),
        "",
        "## Which alarm came first",
        "",
        f"Lags over {len(found['federations'])} recorded federations (`--readings`): clients drawn with replacement "
        f"into panels of {', '.join(found['panels'])}, {WINDOWS} windows each, judged by the monitor. Weight of each "
        "lag, in federations.",
        "",
        "| lag in rounds | secondary alarm after the planted one | two plants that begin together |",
        "|---|---|---|",
    ]
    tables = [by_lag(pairs_of(found["alarms"][name])) for name in ("along", "together")]
    for lag in sorted({*tables[0], *tables[1]}):
        lines.append(f"| {lag:+d} | {tables[0].get(lag, 0.0):.2f} | {tables[1].get(lag, 0.0):.2f} |")
    lines += [
        "",
        "## Is the cause named?",
        "",
        "Every alarm with at least one parent in alarm has a choice: on its own, or by one of its edges. Right is the "
        "planted mode where the graph has that edge (for its grandchildren the mode in between), and nothing where it "
        "has none or the mode was planted itself. Likelihood: a parent whose ratio favours it over nothing. First: the "
        "right parent comes first, favoured or not. Old rule: the first parent in alarm no later. Chance: one choice "
        "at random.",
        "",
        "| judged on | alarms of | number | likelihood | first | old rule | chance |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, table in found["named"].items():
        for sort, t in table.items():
            shares = [f"{t[k]:.2f}" for k in ("likelihood", "first", "old_rule", "chance")]
            shares[1] = shares[1] if sort.startswith("its") else "–"
            lines.append(f"| {name} | {sort} | {t['alarms']:.1f} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compute, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readings", type=Path, nargs="+", default=[], metavar="FILE|DIR")
    parser.add_argument("--out", type=Path, default=HERE / "silentbench")
    parser.add_argument("--record", type=Path, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=4)
    chosen = parser.parse_args()
    if chosen.record:
        record(chosen.record, chosen.seeds)
        return
    runs, path = read(HERE / "plants"), chosen.out / "edges.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    said = strengths(runs)
    if chosen.readings:
        federations = seen(chosen.readings)
        pairs = {"along": along(federations), "together": together(federations)}
        found |= {
            "federations": sorted(f.federation.name for f in federations),
            "panels": [f"{n} (epsilon {epsilon:g})" for n, epsilon in PANELS],
            "alarms": {name: [[*pair, weight] for pair, weight in each.items()] for name, each in pairs.items()},
            "settings": settings(federations, said["effects"]),
        }
    fit = Fit(**said, **orders(found["alarms"]), settings=found["settings"])
    named = {"strength alone, 140 runs, other seeds": by_strength(runs, fit)}
    if chosen.readings:
        named["order and strength, recorded windows"] = by_both(federations, fit)
    found = {
        "schema": 1,
        "made_by": "python benchmarks/edges.py --readings FILE",
        "runs": len(runs),
        "edges": [effect(runs, *edge) for edge in EDGES],
        "others": [effect(runs, *pair) for pair in PAIRS if pair not in EDGES],
        **{k: found[k] for k in ("federations", "panels", "alarms", "settings")},
        "named": {**found.get("named", {}), **named},
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    (chosen.out / "edges.md").write_text(markdown(found))
    print(markdown(found))
    print(constants(fit))


if __name__ == "__main__":
    main()
