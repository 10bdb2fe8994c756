"""The command `landscape`: the matrix as a table, or as one JSON document."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedcanary.errors import EXIT_OK
from fedcanary.types import Mode

if TYPE_CHECKING:  # pydantic is heavy, and every command imports this file
    from fedcanary.landscape.matrix import Cell, Evidence, Figure, Row

WIDTH: Final = 116
SHORT: Final[Mapping[Mode, str]] = {
    Mode.AMPLIFIED_BIAS: "bias",
    Mode.CONFIDENCE_MISCALIBRATION: "calibration",
    Mode.FAIRNESS_COLLAPSE: "fairness",
    Mode.ADAPTATION_MISALIGNMENT: "adaptation",
    Mode.OUT_OF_DOMAIN_DEGRADATION: "domain",
    Mode.ALIGNMENT_EROSION: "erosion",
}
FOCUS: Final = "Silent failures, private"  # of row 13


def add(commands: Any) -> None:
    """The command and its options."""
    command = commands.add_parser("landscape", help="which benchmarks measure which mode, and what ours has earned")
    command.add_argument("--evidence", type=Path, metavar="FILE", help="default: the packaged figures")
    command.add_argument("--json", action="store_true", help="print one JSON document")
    command.set_defaults(action=_landscape)


def _landscape(arguments: argparse.Namespace) -> int:
    from fedcanary.landscape import matrix

    evidence = matrix.read(arguments.evidence or matrix.EVIDENCE)
    rows, cells = matrix.published(), matrix.ours(evidence)
    if arguments.json:
        print(json.dumps(document(rows, evidence, cells), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print(text(rows, evidence, cells))
    return EXIT_OK


def document(rows: tuple[Row, ...], evidence: Evidence, cells: Mapping[Mode, Cell]) -> dict[str, Any]:
    """All 13 rows as plain data; a cell of ours has the ids of its figures, which are listed once."""
    from fedcanary.landscape import matrix

    levels = {mode: cell.level for mode, cell in cells.items()}
    ours = matrix.Row(category="Federated", benchmark=matrix.NAME, focus=FOCUS, cells=levels)
    table: list[dict[str, Any]] = [
        {"category": r.category, "benchmark": r.benchmark, "focus": r.focus, "cells": dict(r.cells)}
        for r in (*rows, ours)
    ]
    earned = {f.id: f for cell in cells.values() for f in cell.earned}
    return {
        "schema": matrix.SCHEMA,
        "provenance": matrix.provenance(),
        "rule": {"alpha": matrix.ALPHA, "null_runs": matrix.NULL_RUNS, "power": matrix.POWER},
        "rows": table,
        "evidence": {"made_by": evidence.made_by, "environment": evidence.environment, "read": len(evidence.figures)},
        "cells": {
            str(m): {"level": c.level, "figures": [f.id for f in c.earned], "missing": [*c.missing]}
            for m, c in cells.items()
        },
        "figures": {id: f.model_dump(mode="json") for id, f in earned.items()},
    }


def text(rows: tuple[Row, ...], evidence: Evidence, cells: Mapping[Mode, Cell]) -> str:
    """The 13 rows, at most 120 columns wide, then what earns each of ours."""
    from fedcanary.landscape import matrix

    lines = [_row("", "benchmark", "primary focus", SHORT), "-" * WIDTH]
    lines += [_row(r.category, r.benchmark, r.focus, r.cells) for r in rows]
    lines += ["-" * WIDTH, _row("Federated", matrix.NAME, FOCUS, {m: c.level for m, c in cells.items()}), ""]
    lines += _wrapped(" ".join(matrix.provenance().split()), "")
    lines += ["", f"row 13, from {_plain(evidence.made_by) or 'no benchmark yet'}, {len(evidence.figures)} figures:"]
    alike: dict[Cell, list[str]] = {}
    for mode, cell in cells.items():
        alike.setdefault(cell, []).append(SHORT[mode])
    for cell, names in alike.items():
        lines.append(f"  {', '.join(names)}: {cell.level}")
        named = matrix.shown(cell)
        for figure in named:
            lines += _wrapped(_figure(figure), "    ")
        if len(cell.earned) > len(named):
            lines.append(f"    and {len(cell.earned) - len(named)} more (--json)")
        for lack in cell.missing:
            lines += _wrapped(f"missing: {_plain(lack)}", "    ")
    return "\n".join(lines)


def _row(category: str, benchmark: str, focus: str, cells: Mapping[Mode, str]) -> str:
    return (f"{category:<12}{benchmark:<15}{focus:<25}" + "".join(f"{cells[m]:<12}" for m in Mode)).rstrip()


def _figure(f: Figure) -> str:
    what = {"false_alarm": "false alarms", "power": "power"}[f.kind]
    said = (
        f"{f.id}: {what} {f.value:.3g} [{f.interval[0]:.3g}, {f.interval[1]:.3g}], {f.runs:,} runs, {f.clients:,} "
        f"clients, epsilon {f.epsilon:g}, {f.source}{'; ' * bool(f.condition)}{f.condition}; {f.where}"
    )
    return _plain(said)


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  " * bool(indent))
