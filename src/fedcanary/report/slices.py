"""Where a mode in alarm is worse: what the drill-downs found, what they took of the messages, and of alpha."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedcanary.drill import ledger_of
from fedcanary.monitor import base as monitor
from fedcanary.monitor.error_ledger import MODES, body
from fedcanary.probes.slices import SLICES
from fedcanary.record import RunRecord
from fedcanary.types import Mode

WORSE, FEW = "worse than the margin", "too few to say"


def slices_of(record: RunRecord) -> dict[str, Any] | None:
    """The summary's block `slices`; None where a study has none."""
    plan = record.header.get(SLICES)
    if plan is None:
        return None
    rounds = list(record.of("round"))
    attributes: dict[str, list[str]] = {}
    for label in plan["slices"]:
        attribute, _, value = label.partition("=")
        attributes.setdefault(attribute, []).append(value)
    found = []
    for evidence in rounds[-1][SLICES]["evidence"] if rounds else ():
        attribute, _, value = evidence["slice"].partition("=")
        found.append({**{k: v for k, v in evidence.items() if k != "slice"}, "attribute": attribute, "value": value})
    asked = [{"round": b["round"], **b[SLICES]["asked"]} for b in rounds if b[SLICES]["asked"] is not None]
    return {
        "attributes": attributes,
        "floor": plan["floor"],
        "asked": asked,
        "lost": _lost(record, {int(one["round"]) for one in asked}),
        "found": found,
    }


def _lost(record: RunRecord, asked: set[int]) -> dict[str, float | None]:
    """Mean share of a message that the bound on its norm took away, in the rounds that asked and in the others."""

    def over(releases: Sequence[Any]) -> float | None:
        count = sum(r.count for r in releases)
        return sum(r.lost for r in releases) / count if count else None

    table = [(round, by[SLICES]) for round, by in record.releases().items() if SLICES in by]
    return {
        "in_drill_downs": over([r for round, r in table if round in asked]),
        "otherwise": over([r for round, r in table if round not in asked]),
    }


def error_of(record: RunRecord, plan: monitor.Plan) -> dict[str, Any]:
    """The summary's block `error`: one alpha, what has been charged to it, and the e-values that decide."""
    ledger = ledger_of(record)
    read = record.rounds > 0
    return {
        "alpha": ledger.budget.alpha,
        "parts": {MODES: plan.alpha, SLICES: ledger.budget.parts.get(SLICES, 0.0)},
        "spent": ledger.spent() if read else 0.0,  # one budget for all rounds: stopping early gives nothing back
        "charges": [body(charge) for charge in ledger.rows()] if read else [],
        "alarm_at": plan.alarm_at,
        "clear_at": plan.clear_at,
        "window": monitor.WINDOW,
    }


def worse(summary: Mapping[str, Any]) -> dict[str, list[str]]:
    """The slices that are named, by mode, in words."""
    named: dict[str, list[str]] = {}
    for one in (summary["slices"] or {}).get("found", ()):
        if one["state"] == WORSE:
            named.setdefault(one["mode"], []).append(f"{one['attribute']} {one['value']}")
    return named


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """What the drill-downs found, for the headline; nothing where nothing was asked."""
    block = summary["slices"]
    if block is None or not block["found"]:
        return []
    named = worse(summary)
    asked = dict.fromkeys(one["mode"] for one in block["found"])
    said = []
    for mode in asked:
        label = summary["modes"][mode]["label"]
        if mode in named:
            said.append(f"{label} was shown to be worse than its margin in {' and '.join(named[mode])}.")
        else:
            said.append(f"Asked where, no slice of the clients was shown to be worse in {label.lower()}.")
    return said


def lines(summary: Mapping[str, Any], amount: Any) -> list[str]:
    """One line for each mode that was asked about, every slice in it; `amount` writes a number of a unit."""
    by_mode: dict[tuple[str, str], dict[str, list[str]]] = {}
    for one in (summary["slices"] or {}).get("found", ()):
        name = f"{one['attribute']} {one['value']}"
        if one["state"] != FEW:
            low, high = (amount(end, one["unit"]) for end in one["interval"])
            name = f"{name} {amount(one['estimate'], one['unit'])} [{low}, {high}]"
        by_mode.setdefault((one["mode"], one["part"]), {}).setdefault(one["state"], []).append(name)
    return [
        f"{summary['modes'][mode]['label'].lower()}, {part}: "
        + "; ".join(f"{state}: {', '.join(names)}" for state, names in states.items())
        for (mode, part), states in by_mode.items()
    ]


def cost(summary: Mapping[str, Any]) -> str:
    """What the questions cost, in words; empty where none was asked."""
    block = summary["slices"]
    if block is None or not block["asked"]:
        return ""
    n = len(block["asked"])
    said = f"asked in {n} round{'s' * (n > 1)}, at no further epsilon"
    now, before = block["lost"]["in_drill_downs"], block["lost"]["otherwise"]
    if summary["privacy"]["trust"] != "none" and now is not None:
        said += f"; of a client's message {max(now, 0.0):.1%} did not fit in then"
        said += f", {max(before, 0.0):.1%} in the other rounds" if before is not None else ""
    return said


def table(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The slices as a page shows them, each with its mode's name."""
    found = (summary["slices"] or {}).get("found", ())
    return [{**one, "label": summary["modes"][Mode(one["mode"])]["label"]} for one in found]
