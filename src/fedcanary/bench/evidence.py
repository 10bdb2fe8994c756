"""What the landscape's row 13 may cite: figures on readings of real federations under a finite epsilon."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from fedcanary.bench.federations import METHODS, NONE
from fedcanary.bench.measure import OURS
from fedcanary.types import Mode

SCHEMA: Final = 1
PANELS: Final = (200, 1000)
WHERE: Final = "benchmarks/silentbench/README.md"


def evidence(rows: Iterable[Mapping[str, Any]], made_by: str, environment: Mapping[str, Any]) -> dict[str, Any]:
    """The evidence file of `fedcanary landscape`, from the benchmark's rows; see landscape/matrix.py."""
    found, at = [], {m: i for i, m in enumerate(Mode, start=1)}
    for row in rows:
        if row["setting"] == "null" and row["rule"] == OURS and row["mode"] == "any" and row["scenario"] == "nothing":
            found += [_figure(row, mode, "false_alarm", "simulated", at[mode]) for mode in Mode]
        if (
            row["setting"] != "recorded"
            or row["rule"] != OURS
            or row["method"] != METHODS[0]
            or row["mode"] == "any"
            or row["n"] not in PANELS
            or row["scheme"] != "rotating"
            or row["strength"] != 1.0
            or math.isinf(row["epsilon"])
        ):
            continue
        mode = Mode(row["mode"])
        if row["plant"] == NONE and "false_alarm" in row:
            found.append(_figure(row, mode, "false_alarm", "recorded", at[mode]))
        elif row["plant"] == mode and "power" in row:
            found.append(_figure(row, mode, "power", "recorded", at[mode]))
    return {"schema": SCHEMA, "made_by": made_by, "environment": dict(environment), "figures": found}


def _figure(row: Mapping[str, Any], mode: Mode, kind: str, source: str, number: int) -> dict[str, Any]:
    planted = "nothing planted" if kind == "false_alarm" else f"{mode} planted at strength 1"
    return {
        "id": f"SB-{number}-{kind}-{source}-{row['n']}-{row['epsilon']:g}",
        "mode": str(mode),
        "kind": kind,
        "private": True,
        "epsilon": float(row["epsilon"]),
        "clients": row["n"],
        "source": source,
        "value": row[kind],
        "interval": [row[f"{kind}_low"], row[f"{kind}_high"]],
        "runs": row[f"{kind}_runs"],
        "condition": f"{planted}; windows of {row['rounds']} rounds, rotating panels, α = .05 over all modes",
        "where": f"{WHERE}#{'false-alarms' if kind == 'false_alarm' else 'planted-failures-of-real-federations'}",
    }
