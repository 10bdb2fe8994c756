"""SilentBench's charts, from its results.

pip install -e '.[charts]'; python benchmarks/charts.py [--results benchmarks/silentbench/results.jsonl]
[--out docs/silentbench]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

from fedcanary.bench.measure import OURS
from fedcanary.bench.rules import RULES
from fedcanary.bench.tables import SHORT, Results
from fedcanary.record import number

HERE = Path(__file__).parent
COLORS = ("#0b6e99", "#d9730d", "#6940a5", "#0f7b6c", "#ad1a72", "#7a5c00")
NEVER = 41  # rounds that a window has after the change
NAMED = {"svg.hashsalt": "silentbench", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def read(path: Path) -> Results:
    """Rows with their infinite numbers as numbers again."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return Results({k: number(v) if v in ("inf", None) else v for k, v in row.items()} for row in rows)


def panels(results: Results, out: Path) -> None:
    """Median delay on each planted mode against the clients of a panel, for each epsilon."""
    wanted: dict[str, Any] = {"setting": "recorded", "method": "fedavg", "strength": 1.0, "scheme": "rotating"}
    eps = [e for e in results.values("epsilon", **wanted, rule=OURS) if not math.isinf(e)]
    figure, axes = plt.subplots(1, len(eps), figsize=(2.3 * len(eps), 3.0), sharey=True, squeeze=False)
    for axis, epsilon in zip(axes[0], eps, strict=True):
        for (mode, name), color in zip(SHORT.items(), COLORS, strict=True):
            rows = results.all(**wanted, rule=OURS, epsilon=epsilon, plant=mode, mode=mode)
            rows = sorted((r for r in rows if "power" in r), key=lambda r: r["n"])
            ns, style = [r["n"] for r in rows], {"ms": 3, "color": color}
            axis.plot(ns, [min(r["delay_median"], NEVER) for r in rows], "o-", lw=1.2, label=name, **style)
            axis.plot(ns, [min(r["oracle_delay_median"], NEVER) for r in rows], ":", lw=1, **style)
        axis.set(xscale="log", yscale="log", title=f"ε = {epsilon:g}", xlabel="clients in a panel")
        axis.set_yticks([1, 2, 5, 10, 20, NEVER], ["1", "2", "5", "10", "20", "never"])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("median rounds to the alarm")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=6, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    _save(figure, out / "rounds.svg", "Median rounds to the alarm on each planted mode, by panel size and epsilon")


def wrong(results: Results, out: Path) -> None:
    """False alarms of every rule on the worked null, with exact 95% intervals."""
    names = (OURS, *RULES)
    ns = [n for n in results.values("n", setting="null", rule=OURS) if n in (200, 1000)]
    figure, axis = plt.subplots(figsize=(6.4, 2.8))
    for k, (n, color) in enumerate(zip(ns, COLORS, strict=False)):
        rows = [results.one(setting="null", scenario="nothing", n=n, rule=name, mode="any") for name in names]
        at = [i + 0.36 * (k - 0.5) for i in range(len(names))]
        found = [r["false_alarm"] if r else math.nan for r in rows]
        low = [r["false_alarm"] - r["false_alarm_low"] if r else 0 for r in rows]
        high = [r["false_alarm_high"] - r["false_alarm"] if r else 0 for r in rows]
        axis.bar(at, found, 0.34, yerr=[low, high], color=color, label=f"N = {n:,}", error_kw={"lw": 0.8})
    axis.axhline(0.05, color="#b00020", lw=1, ls="--")
    axis.text(len(names) - 0.5, 0.055, "α = 0.05", color="#b00020", ha="right", va="bottom")
    axis.set(yscale="symlog", ylabel="windows with a false alarm", ylim=(0, 1.3))
    axis.set_yscale("symlog", linthresh=0.01)
    axis.set_yticks([0, 0.01, 0.05, 0.1, 1.0], ["0", "0.01", "0.05", "0.1", "1"])
    axis.set_xticks(range(len(names)), names)
    figure.legend(loc="upper center", frameon=False, ncols=4)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    _save(figure, out / "false-alarms.svg", "Share of windows of 50 rounds with any false alarm, by rule")


def slow(results: Results, out: Path) -> None:
    """Median delay over the oracle's, by what happens."""
    rows = [r for r in results.all(setting="worked", rule=OURS) if "delay_median" in r and not math.isinf(r["ratio"])]
    ns = sorted({r["n"] for r in rows})
    names = list(dict.fromkeys(r["scenario"] for r in rows))
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    for k, (n, color) in enumerate(zip(ns, COLORS, strict=False)):
        found = {r["scenario"]: r["ratio"] for r in rows if r["n"] == n}
        at = [i + 0.2 * (k - (len(ns) - 1) / 2) for i in range(len(names))]
        axis.barh(at, [found.get(name, 0) for name in names], 0.19, color=color, label=f"N = {n:,}")
    axis.axvline(1, color="#333", lw=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel="median delay / the oracle's (no bar: never)")
    figure.legend(loc="upper center", frameon=False, ncols=4)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    _save(figure, out / "delays.svg", "Median delay over the oracle's, by scenario and panel size")


def _save(figure: Any, path: Path, title: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Title": title, "Date": None}, facecolor="white")
    plt.close(figure)
    print(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """All charts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "silentbench" / "results.jsonl")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "silentbench")
    chosen = parser.parse_args(arguments)
    results = read(chosen.results)
    with mpl.rc_context(NAMED):
        for draw in (panels, wrong, slow):
            draw(results, chosen.out)


if __name__ == "__main__":
    main()
