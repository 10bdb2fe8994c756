"""What was tried against the monitor's weak spots, and what each attempt gave.

    python benchmarks/attempts.py [--runs 1000] [--out benchmarks/silentbench]     four minutes

All in SilentBench's worked setting: six modes, one panel of N clients a round for 50 rounds, epsilon 1, the change in
round 10. Power by the end, median (mean) delay in rounds. The last rows are of tests that no run uses.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedcanary.bench import people, scenarios, windows
from fedcanary.bench.measure import OURS, Cell, measure
from fedcanary.bench.scenarios import SHARE, Design, Scenario
from fedcanary.monitor import base as monitor
from fedcanary.monitor import eprocess
from fedcanary.monitor.base import ModePlan, Stream
from fedcanary.privacy import accounting
from fedcanary.privacy.encode import Encoding
from fedcanary.probes.calibration import BINS, ECE_SQUARE_SCALE, SIGNED, SIGNED_SCALE
from fedcanary.rng import stream
from fedcanary.types import Array, Coord, Mode

HERE = Path(__file__).parent
ROUNDS, CHANGE = 50, 10
STD = accounting.gaussian_std(1.0, 1e-6, 1.0, 1)
FIRST = next(iter(Mode))
ITEMS = 40  # of a client, for calibration
LIMIT, POOLED = 0.05, 0.10  # pooled error allowed, and after the change
TAILS = ("tail 5% x .3", "tail 10% x .3", "tail 20% x .3", "shift .03", "spread .1 to .2")


def said(delay: Array) -> str:
    """Power, median and mean of delays; NaN is an alarm before the change."""
    kept = delay[~np.isnan(delay)]
    found = kept[np.isfinite(kept)]
    middle = np.median(kept) if len(kept) else math.nan
    text = "never" if math.isinf(middle) else f"{middle:.0f}"
    return f"{len(found) / max(len(kept), 1):.3f} / {text}" + (f" ({found.mean():.1f})" if len(found) else "")


def worked(name: str, design: Design, n: int, runs: int, streams: Sequence[Stream] | None = None) -> str:
    """A scenario under a design; `streams` in place of the design's own."""
    scenario = scenarios.worked(name, scenarios.WORKED[name], ROUNDS, seed=1, design=design)
    if streams is not None:
        modes = tuple(
            ModePlan(mode=p.mode, unit=p.unit, margin=p.margin, streams=tuple(streams)) for p in scenario.alarms.modes
        )
        scenario = replace(scenario, alarms=replace(scenario.alarms, modes=modes))
    rows = measure(Cell(scenario=scenario, n=n, paths=runs, change=CHANGE, against=()))
    row = next(r for r in rows if r["rule"] == OURS and r["mode"] == FIRST)
    if "power" not in row:
        return "-"
    middle = "never" if math.isinf(row["delay_median"]) else f"{row['delay_median']:.0f}"
    return f"{row['power']:.3f} / {middle}" + (f" ({row['delay_mean']:.1f})" if row["power"] else "")


def mean_only(severe: bool) -> Stream:
    """The question about the mean, with or without the joint bet on the severe share."""
    bit, share = ("severe", SHARE) if severe else ("", 0.0)
    return Stream(name="mean", kind="mean", coord="delta", square="square", margin=0.0, severe=bit, share=share)


def tails(runs: int) -> list[str]:
    """Harm concentrated in few clients, in one mode."""
    bit = Stream(name="severe", kind="share", coord="severe", margin=SHARE)
    wide = Stream(name="spread", kind="spread", coord="delta", square="square", margin=scenarios.SD**2)
    designs: list[tuple[str, Design, Sequence[Stream] | None]] = [
        ("mean alone, no severe bit", scenarios.FIRST_DESIGN, None),
        ("severe bit sent and not used", scenarios.NOW, [mean_only(False)]),
        ("severe bit as a test of its own, e-values averaged", scenarios.NOW, [mean_only(False), bit]),
        ("joint bet (in use, scale 2.5)", scenarios.NOW, None),
        *(
            (f"joint bet, severe bit at scale {scale:g}", Design(name=f"b{scale}", severe=scale), None)
            for scale in (1.0, 1.25, 1.6, 2.0, 3.2)
        ),
        ("joint bet, differences at scale .36", Design(name="d", difference=0.36, square=0.18), None),
        ("joint bet and the variance test averaged", scenarios.NOW, [mean_only(True), wide]),
        ("mean and the variance test averaged, no severe bit", scenarios.FIRST_DESIGN, [mean_only(False), wide]),
    ]
    lines = []
    for n in (200, 1000):
        lines += [f"| N = {n:,}: what is tested | {' | '.join(TAILS)} |", "|---|" + "---|" * len(TAILS)]
        for name, design, streams in designs:
            lines.append(f"| {name} | {' | '.join(worked(t, design, n, runs, streams) for t in TAILS)} |")
            print(lines[-1], flush=True)
        lines.append("")
    return lines


def accumulated(logs: Array, rounds: int) -> Array:
    """(rounds, paths) capital of the bets' log e-values (bets, rounds, paths), start rounds mixed as in the monitor."""
    kept, found = np.full((logs.shape[0], logs.shape[2]), -math.inf), np.empty(logs.shape[1:])
    for t in range(rounds):
        kept = np.logaddexp(kept, -math.log(rounds)) + logs[:, t]
        found[t] = np.exp(np.minimum(kept, 600.0)).mean(axis=0) + (rounds - t - 1) / rounds
    return found


def together(runs: int) -> list[str]:
    """The same tenth of the clients loses .3 in all six modes."""
    name = "tail 10% x .3, same clients in all six"
    lines = ["| tests | N = 200 | N = 1,000 |", "|---|---|---|"]
    rows: dict[str, list[str]] = {}
    for n in (200, 1000):
        for label, design in (
            ("any of the six modes' joint bets", scenarios.NOW),
            ("any of the six modes' joint bets, severe bit at scale 1.6", Design(name="scale 1.6", severe=1.6)),
            ("any of the six modes' means, no severe bit", scenarios.FIRST_DESIGN),
        ):
            scenario = scenarios.worked(name, scenarios.WORKED[name], ROUNDS, seed=1, design=design)
            sums, walked = play(scenario, n, runs)
            alarm = np.logical_or.reduce(list(walked.alarm.values()))
            rows.setdefault(label, []).append(said(windows.delays(alarm, CHANGE)))
            one = next(iter(sums.values()))
            x = eprocess.Sums(n=n, b=one.lost, b_std=one.lost_std)
            for share in (0.02, 0.01):
                bets = eprocess.above_bets(x, share)
                logs = np.stack([np.asarray(eprocess.log_bits_above(x, share, lam)) for lam in bets])
                lost = np.logical_or.accumulate(accumulated(logs, ROUNDS) >= 7 / 0.05)
                rows.setdefault(f"lost mass beyond {share:.0%}, a seventh test ({design.name} design)", []).append(
                    said(windows.delays(lost, CHANGE))
                )
    lines += [f"| {label} | {' | '.join(cells)} |" for label, cells in rows.items()]
    print("\n".join(lines))
    return lines


def small(runs: int) -> list[str]:
    """Mean shifts of .01 and .03, by the smallest effect that is bet on."""
    shifts, used = (0.01, 0.03), eprocess.WORSE
    severe = tuple(effect for effect in used if effect[1])
    lines = [f"| effects bet on | {' | '.join(f'shift {x:g}, N = {n:,}' for n in (200, 1000) for x in shifts)} |"]
    lines.append("|---|" + "---|" * 4)
    made = [scenarios.worked(f"shift {x:g}", scenarios.shift(x), ROUNDS, seed=1, design=scenarios.NOW) for x in shifts]
    for means in ((0.02, 0.035, 0.07, 0.15), (0.008, 0.02, 0.05, 0.12), tuple(m for m, more in used if not more)):
        eprocess.WORSE = (*((m, 0.0) for m in means), *severe)  # type: ignore[misc]  # a constant, but here
        cells = [
            said(windows.delays(play(scenario, n, runs)[1].alarm[FIRST], CHANGE))
            for n in (200, 1000)
            for scenario in made
        ]
        lines.append(f"| {', '.join(f'{m:g}' for m in means)} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    eprocess.WORSE = used  # type: ignore[misc]
    return lines


def play(scenario: Scenario, n: int, runs: int) -> tuple[dict[str, windows.Sums], windows.Walked]:
    """Noised sums of many windows, and what the monitor says of them."""
    rng = stream(1, "attempts", scenario.name, n)
    panels = people.draw(scenario.people, scenario.phase_of(ROUNDS, CHANGE), n, runs, "rotating", rng)
    sums = windows.sums_of(scenario.people.encoding, people.noised(panels, STD, rng), n, STD)
    return sums, windows.judge(scenario.alarms, sums)


def pooled(runs: int) -> list[str]:
    """Every client's bins over-confident by .02: a pooled error of .1, which clients' own ECE hides in its bias."""
    rng = stream(1, "attempts", "pooled")
    made = 20_000
    sd = 0.45 / math.sqrt(ITEMS * BINS)
    calm = rng.normal(0.0, sd, (made, BINS))
    calm -= calm.mean(axis=0)
    phases = [calm, calm + POOLED / BINS]
    lines = [
        "| signed bins at scale | N = 50 | N = 200 | N = 1,000 | noise alone reads (N = 200) |",
        "|---|---|---|---|---|",
    ]
    for scale in (1.0, SIGNED_SCALE):
        bins = [Coord(name=f"{SIGNED}:{b}", low=-1, high=1, purpose="x", scale=scale) for b in range(BINS)]
        square = Coord(name="ece_square", low=0, high=1, purpose="x", scale=ECE_SQUARE_SCALE, up=True)
        mode = Mode.CONFIDENCE_MISCALIBRATION
        encoding = Encoding({mode: (*bins, square)})
        readings = [
            {mode: np.concatenate([p, (np.abs(p).sum(axis=1) ** 2)[:, None]], axis=1).clip(-1, 1)} for p in phases
        ]
        found = people.People.of(encoding, readings, {("x", "y"): np.zeros((2, made))})
        asked = Stream(name="pooled", kind="pooled", coord=SIGNED, square="ece_square", margin=LIMIT)
        six = tuple(ModePlan(mode=m, unit="", margin=LIMIT, streams=(asked,)) for m in Mode)
        plan = monitor.Plan(modes=six, alpha=0.05, horizon=ROUNDS)
        cells = []
        for n in (50, 200, 1000):
            panels = people.draw(found, [0] * (CHANGE - 1) + [1] * (ROUNDS - CHANGE + 1), n, runs, "rotating", rng)
            sums = windows.sums_of(encoding, people.noised(panels, STD, rng), n, STD)
            one = replace(plan, modes=tuple(p for p in plan.modes if p.mode == mode))
            walked = windows.judge(replace(one, alpha=0.05 / 6), sums)  # the threshold of six modes
            cells.append(said(windows.delays(walked.alarm[mode], CHANGE)))
        alone = BINS * scale * STD * math.sqrt(2 / math.pi) / 200
        lines.append(f"| {scale:g} | {' | '.join(cells)} | {alone:.3f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """All attempts, to the terminal and to OUT/attempts.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=HERE / "silentbench")
    arguments = parser.parse_args()
    parts: list[tuple[str, Callable[[int], list[str]]]] = [
        ("Tails and spread in one mode", tails),
        ("The same clients in all six modes", together),
        ("Pooled calibration error", pooled),
        ("Small shifts", small),
    ]
    lines = [
        "# What was tried where the monitor is weak",
        "",
        f"`python benchmarks/attempts.py --runs {arguments.runs}`; worked setting, ε = 1. Power / median (mean) delay.",
    ]
    for title, part in parts:
        lines += ["", f"## {title}", "", *part(arguments.runs)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "attempts.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
