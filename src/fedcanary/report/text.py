"""From a summary to the few lines a terminal shows at the end of a run."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any, Final

from fedcanary.report import slices
from fedcanary.report.actions import command, spared, where
from fedcanary.report.html import amount, evidence, percent, sentence, short, unsigned, upstream
from fedcanary.types import Mode

WIDTH: Final = 96
PAINT: Final[Mapping[str, str]] = {"alarm": "1;31", "clear": "36", "unknown": "33", "red": "1;31", "soft": "2"}
HEAD: Final = ("mode", "state", "estimate", "margin", "95% interval", "since", "")


def terminal(summary: Mapping[str, Any], colour: bool = False) -> str:
    """The six modes, utility and privacy, at most 96 columns wide; ANSI colours only if asked for."""

    def paint(text: str, tone: str) -> str:
        return f"\x1b[{PAINT[tone]}m{text}\x1b[0m" if colour else text

    lines = [line for said in summary["headline"] for line in textwrap.wrap(short(said, 600), WIDTH)]
    lines += ["", paint(_row(*HEAD).rstrip(), "soft")]
    for mode in Mode:
        m = summary["modes"][mode]
        low, high = m["interval"]
        cells = (
            m["label"].lower(),
            m["state"],
            amount(m["estimate"], m["unit"]),
            unsigned(m["margin"]),
            "–" if low is None or high is None else f"[{amount(low, m['unit'])}, {amount(high, m['unit'])}]",
            "–" if m["since_round"] is None else f"round {m['since_round']}",
            "silent" if m["silent"] else "",
        )
        row = _row(*cells)
        lines.append(row.replace(f" {m['state']} ", f" {paint(m['state'], m['state'])} ", 1).rstrip())
    lines.append("")
    lines += _wrapped("utility", _utility(summary["utility"]))
    lines += _wrapped("errors", _errors(summary["error"]))
    privacy = summary["privacy"]
    noiseless = privacy["trust"] == "none" or privacy["epsilon"] == "inf"
    lines += [paint(line, "red") if noiseless else line for line in _wrapped("privacy", _privacy(privacy, noiseless))]
    if summary["action"] not in (None, "adopt") or summary["rebaselines"]["made"]:
        lines += [paint(line, "red") for line in _wrapped("adopted", where(summary))]
    if command(summary):
        lines += _wrapped("go on", command(summary))
    if spared(summary):
        lines += _wrapped("guard", spared(summary))
    for mode in Mode:
        if said := upstream(summary["modes"][mode], summary):
            lines += _wrapped("upstream", f"{summary['modes'][mode]['label'].lower()}: {said}")
    for said in slices.lines(summary, amount):
        lines += _wrapped("slices", short(said, 2000))
    if slices.cost(summary):
        lines += _wrapped("cost", slices.cost(summary))
    clients = summary["clients"]
    if clients["refused"]:
        lines += _wrapped("refused", ", ".join(f"{n} {short(why)}" for why, n in clients["refused"].items()))
    for round, why in clients["not_opened"].items():
        lines += _wrapped("closed", f"round {round}: {short(why)}")
    for m in summary["modes"].values():
        if m["state"] == "alarm" and m["why"]:
            lines += _wrapped("alarm", f"{m['label'].lower()}: {short(m['why'])}")
    unsure: dict[str, list[str]] = {}
    for mode in Mode:
        m = summary["modes"][mode]
        if m["state"] == "unknown":
            why = short(m["why"]).partition(" (")[0].partition(";")[0]
            unsure.setdefault(f"{why}; {short(m['next'])}", []).append(m["label"].lower())
    for said, names in unsure.items():
        lines += _wrapped("unknown", f"{', '.join(names)}: {said}")
    return "\n".join(lines) + "\n"


def _row(mode: str, state: str, estimate: str, margin: str, interval: str, since: str, silent: str) -> str:
    return f"{mode:<27}{state:<9}{estimate:>9}{margin:>9}  {interval:<19}{since:<10}{silent}"


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{name:<9}", subsequent_indent=" " * 9)


def _utility(utility: Mapping[str, Any]) -> str:
    accuracy = utility["accuracy"]
    return (
        f"{short(utility['metric'])}: {unsigned(utility['base'])} -> {unsigned(utility['last'])}; "
        f"accuracy: {unsigned(accuracy['base'])} -> {unsigned(accuracy['last'])}"
    )


def _errors(error: Mapping[str, Any]) -> str:
    return (
        f"any false alarm, all modes and rounds: at most {percent(error['parts']['modes'])}; "
        f"evidence: alarm {evidence(error['alarm_at'])}, clear {evidence(error['clear_at'])}"
        + (f"; of the slices named, wrongly: at most {percent(named)}" if (named := error["parts"]["slices"]) else "")
    )


def _privacy(privacy: Mapping[str, Any], noiseless: bool) -> str:
    if noiseless and privacy["charges"]:
        return "NONE: sums left the clients without noise, epsilon is infinite"
    if noiseless:
        return "NONE: nothing has left a client yet; whatever leaves will leave without noise"
    budget = f" of {privacy['budget']['epsilon']:.3g}" if privacy["budget"] else ""
    said = (
        f"epsilon {privacy['epsilon']:.3g}{budget}, delta {privacy['delta']:.3g} per {privacy['unit']}; "
        f"the server sees {short(privacy['server_sees'])}"
    )
    if privacy["updates"].startswith("the app's own"):
        said += "; it does not cover the app's own updates, which are outside of the contract"
    elif not privacy["updates_private"]:
        said += "; the adapter updates left as exact sums, which this epsilon does not cover"
    if privacy["noise"] == "simulated":
        said += "; noise from the study's seed: a simulation"
    return sentence(said).removesuffix(".")
