"""The summary's `privacy` block: what was spent, from the record's charges alone, and what protected the rest."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

from fedcanary.record import RunRecord, number

SEEN: Final = {  # what the server sees under each trust
    "secure_aggregation": "only masked vectors and their noised sum",
    "central": "every client's exact vector, and adds the noise itself",
    "local": "every client's vector with noise already in it",
    "none": "exact numbers",
}
HIDDEN: Final = {
    "zeroed": "whether a client's message was there",
    "substituted": "which of any two messages a client sent",
}


def privacy_of(record: RunRecord) -> dict[str, Any]:
    """What the run's releases cost and how they were made."""
    header = record.header
    study = header["study"]
    table, charges = study["privacy"], list(record.of("charge"))
    protected = table["trust"] != "none"
    spent = charges[-1]["spent"] if charges else {"epsilon": 0.0, "delta": 0.0}
    readings = _last(charges, "readings")
    updates, training = _last(charges, "update"), _last(charges, "training")
    return {
        "trust": table["trust"],
        "unit": table.get("unit", "client"),
        "epsilon": number(spent["epsilon"]),
        "delta": number(spent["delta"]),
        "budget": {"epsilon": table["epsilon"], "delta": table["delta"]} if protected else None,
        "hides": _hides(table),
        "server_sees": SEEN[table["trust"]],
        "mechanism": _mechanism(readings, training) if protected else "none: exact sums, no noise",
        "panel": _panel(study, header["clients"], protected),
        "updates": _updates(table, header, updates, protected),
        "updates_private": "attached" not in header
        and (not header["shared_parameters"] or _noised(table) or _trained(table)),
        "noise": table["noise"] if protected else "none",
        "charges": len(charges),
    }


def _hides(table: Mapping[str, Any]) -> str:
    if table["trust"] == "none":
        return "nothing"
    substituted = table["trust"] == "local" or table["neighbours"] == "substituted"
    if table.get("unit") == "example":
        return "which of any two examples a client had" if substituted else "whether a client had an example"
    return HIDDEN["substituted" if substituted else "zeroed"]


def _last(charges: list[Mapping[str, Any]], purpose: str) -> Mapping[str, Any] | None:
    return next((json.loads(c["event"]) for c in reversed(charges) if c["purpose"] == purpose), None)


def _mechanism(event: Mapping[str, Any] | None, training: Mapping[str, Any] | None) -> str:
    if event is None:
        return "discrete Gaussian noise"
    std = event["share_std"] * math.sqrt(event["shares"]) / event["sensitivity"]
    said = f"discrete Gaussian noise, {std:.3g} times the bound on a client's whole message"
    said = f"{said}, in {event['shares']} shares" if event["shares"] > 1 else said
    if training is None:
        return said
    return f"{training['count']} steps of noised training a round (DP-SGD), and on held-out examples {said}"


def _panel(study: Mapping[str, Any], population: int, protected: bool) -> str:
    per_round = study["clients"]["per_round"]
    if protected and study["privacy"]["panel"] == "rotating":
        return "rotating panels: a client answers at most once, so the run costs it one round"
    if per_round is None or per_round >= population:
        return "every client answers in every round"
    return f"{per_round} of {population} clients, drawn anew for every round; not counted as amplification"


def _trained(table: Mapping[str, Any]) -> bool:
    """Whether training itself protected what is made of it."""
    return table["trust"] != "none" and table.get("unit") == "example"


def _noised(table: Mapping[str, Any]) -> bool:
    return table["trust"] != "none" and table["updates"] is not None and table["updates"]["noise"] != "none"


def _updates(
    table: Mapping[str, Any], header: Mapping[str, Any], event: Mapping[str, Any] | None, protected: bool
) -> str:
    if "attached" in header:
        return str(header["attached"]["updates"])
    if not header["shared_parameters"]:
        return "none: no part of the adapter is shared"
    if not protected:
        return "exact sums, no noise"
    if _trained(table):
        return "exact sums of what noised training gave: post-processing, at no further cost"
    if not _noised(table):
        return "exact sums, no noise: differentially private at no finite epsilon, and not in the epsilon above"
    noise = table["updates"]["noise"] if event is None else event["share_std"] * math.sqrt(event["shares"])
    noise = noise if event is None else noise / event["sensitivity"]
    return f"clipped to norm {table['updates']['clip']:g}, with {noise:.3g} times that in noise; in the epsilon above"
