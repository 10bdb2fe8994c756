"""A comparison as text for a terminal, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from typing import Final

import numpy as np

from fedcanary.compare import Comparison, Refusals
from fedcanary.compare_read import READ, ModeReading, Part
from fedcanary.types import Mode

WIDTH: Final = 98
NUMBER: Final = {mode: at for at, mode in enumerate(Mode, start=1)}
HEAD: Final = ("", "base", "adapted", "worse by", "interval", "would find", "n", "flips", "p")
LAYOUT: Final = "  {:<24.24}{:>7}{:>9}{:>9}  {:<14}{:>11}{:>6}{:>7}{:>8}"


def table(comparison: Comparison) -> str:
    """The table: a verdict for each mode, its numbers, and in words what is not known."""
    lines = [*_what(comparison), ""]
    if comparison.adapter is not None:
        lines += [LAYOUT.format(*HEAD).rstrip()]
    for reading in comparison.modes:
        lines += _mode(reading, compared=comparison.adapter is not None)
    lines += _beside(comparison)
    if comparison.adapter is not None:
        lines += ["", *_legend(comparison)]
    return "\n".join(lines)


def _what(comparison: Comparison) -> list[str]:
    base, adapter = comparison.base, comparison.adapter
    revision = f" at {base['revision']}" if base["revision"] else ""
    lines = _wrap(f"base     {base['source']}{revision}  ({base['task']}, digest {base['digest'][:12]})", 9)
    if adapter is not None:
        lines += _wrap(f"adapter  {adapter['folder']}  ({adapter['kind']}, digest {adapter['digest'][:12]})", 9)
    asked = ", ".join(f"{suite['name']} {suite['version']} ({suite['items']})" for suite in comparison.suites)
    lines += _wrap(f"suites   {asked}", 9)
    if comparison.own_domains:
        lines += _wrap(f"own      {', '.join(comparison.own_domains)}", 9)
    for note in comparison.notes:
        lines += _wrap(f"note     {note}", 9)
    return lines


def _mode(reading: ModeReading, *, compared: bool) -> list[str]:
    title = f"{NUMBER[reading.mode]} {reading.mode.replace('_', ' ')}"
    if not compared:
        lines = [title] + _wrap(f"  {reading.why}", 2) * (not reading.parts)
        return lines + [f"  {part.name:<24.24}{_number(part.base):>7}   {_items(part)} items" for part in reading.parts]
    word = reading.verdict.upper() if reading.verdict == "worse" else reading.verdict
    lines = [f"{title}: {word}" + (f"  (margin {reading.margin:g})" if reading.parts else "")]
    lines += [_row(part) for part in reading.parts]
    return lines + (_wrap(f"  why: {reading.why}", 7) if reading.why else [])


def _row(part: Part) -> str:
    known = np.isfinite([part.low, part.high]).all()
    flips, p = "", ""
    if part.flips is not None and part.flips.n:
        flips, p = f"{part.flips.only_a}/{part.flips.only_b}", f"{part.flips.p_value:.2g}"
    cells = (
        part.name if part.decides else f"  {part.name}",
        _number(part.base),
        _number(part.adapted),
        _number(part.worse_by, signed=True),
        f"{part.low:+.3f} {part.high:+.3f}" if known else "too few items",
        _number(part.detectable),
        _items(part),
        flips,
        p,
    )
    return LAYOUT.format(*cells).rstrip()


def _beside(comparison: Comparison) -> list[str]:
    lines = []
    for preference in comparison.pct_stereotype:
        change = f"{preference.base:.1%}"
        if comparison.adapter is not None:
            change += f" -> {preference.adapted:.1%}"
        lines += _wrap(f"pct_stereotype {change}  of {preference.items} items of {preference.suite}", 2)
    lines += [line for read in comparison.refusals for line in _refusals(read)]
    return ["", *lines] if lines else []


def _refusals(read: Refusals) -> list[str]:
    sides = [("base", read.base, read.corrected_base), ("adapted", read.adapted, read.corrected_adapted)]
    said = []
    for name, matched, corrected in sides:
        if matched is None:
            continue
        text = f"{name} {matched.refusals}/{matched.scored}"
        if matched.unscoreable:
            text += f" and {matched.unscoreable} blank"
        if corrected is not None and np.isfinite(corrected.rate):
            text += f", corrected {corrected.rate:.2f} (standard error {corrected.std_error:.2f})"
        elif corrected is not None:
            text += f", no corrected rate: {corrected.why}"
        said.append(text)
    source = "uncorrected" if read.calibration == "uncorrected" else f"matcher calibrated on {read.calibration}"
    line = f"refusals in replies to the {read.prompts} prompts: {'; '.join(said)}  ({source}; no part of a verdict)"
    return _wrap(line, 2)


def _legend(comparison: Comparison) -> list[str]:
    unseen = [part for reading in comparison.modes for part in reading.parts if part.decides and part.scored]
    text = (
        f"worse by: positive is worse. An interval wholly beyond the margin is worse, wholly inside is not worse, else "
        f"unknown; all {len(READ)} verdicts hold together with confidence {comparison.level:.0%}. would find: the "
        f"smallest true change told from none with power {comparison.power:.0%} at a joint alpha of "
        f"{comparison.alpha:g}. flips: items that only the base / only the adapted model answered rightly (mode 1: "
        "favourably, or with the stereotype), with McNemar's exact p."
    )
    if unseen:
        worst = max(unseen, key=lambda part: part.unseen)
        text += (
            f" No suite shows what its items do not meet: up to {worst.unseen:.0%} of questions like those of "
            f"{worst.name!r} may behave in any way without one of its {worst.scored} items showing it."
        )
    return _wrap(text, 0)


def _items(part: Part) -> str:
    return f"{part.scored}" + (f"-{part.unscoreable}" if part.unscoreable else "")


def _number(value: float, *, signed: bool = False) -> str:
    if not np.isfinite(value):
        return "-"
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def _wrap(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, drop_whitespace=True)
