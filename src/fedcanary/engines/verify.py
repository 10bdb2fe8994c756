"""Check a finished run's folder: the record's chain, and that every round's shared adapter is the recorded one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedcanary.errors import BadInput, Problem
from fedcanary.models import adapters
from fedcanary.record import RunRecord


def verify(folder: Path) -> dict[str, Any]:
    """Facts about an intact run.

    Raises:
        BadInput: the record was changed, or an adapter is missing or is not the one of its round.
    """
    record = RunRecord.load(folder)
    problems = []
    charged = {body["id"] for body in record.of("charge")}
    for body in record.of("release"):
        if body["charge_id"] not in charged:
            problems.append(
                Problem(f"round {body['round']}", f"{body['probe']} was released without a charge", "distrust this run")
            )
    for body in record.of("round"):
        place = folder / "adapters" / f"round-{int(body['round']):03d}"
        try:
            found = adapters.digest(adapters.load(place))
        except (OSError, ValueError) as error:
            problems.append(Problem(str(place), f"cannot be read ({error})", "restore the folder from a backup"))
            continue
        if found != body["adapter"]:
            problems.append(Problem(str(place), "is not the adapter of the record", "restore it from a backup"))
    if problems:
        raise BadInput(problems)
    return {"entries": len(record.entries), "rounds": record.rounds, "ended": record.ended, "digest": record.digest}
