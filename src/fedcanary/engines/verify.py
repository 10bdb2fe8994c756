"""Check a run's folder: the record's chain, every shared adapter and which is adopted, the contract, the ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedcanary import act
from fedcanary.engines.protection import LEDGER
from fedcanary.errors import BadInput, Problem
from fedcanary.models import adapters
from fedcanary.privacy import contract as contracts
from fedcanary.privacy.ledger import Budget, Head, Ledger
from fedcanary.record import RunRecord


def verify(folder: Path) -> dict[str, Any]:
    """Facts about an intact run.

    Raises:
        BadInput: the record was changed, or what it names is missing or is not what it names.
        Damaged: the ledger was changed or rolled back.
    """
    record = RunRecord.load(folder)
    problems = []
    charged = {body["id"] for body in record.of("charge")}
    for body in record.of("release"):
        if body["charge_id"] not in charged:
            problems.append(
                Problem(f"round {body['round']}", f"{body['probe']} was released without a charge", "distrust this run")
            )
    pointer, made = act.pointer(record), {}
    if pointer is not None:
        made = {int(body["round"]): str(body["adapter"]) for body in record.of("round")}
        made[0] = record.header["digests"][act.INITIAL]
        problems += _pointer_problems(folder, pointer)
    for round, digest in sorted(made.items()):
        place = act.round_folder(folder, round)
        try:
            found = adapters.digest(adapters.load(place))
        except (OSError, ValueError) as error:
            problems.append(Problem(str(place), f"cannot be read ({error})", "restore the folder from a backup"))
            continue
        if found != digest:
            problems.append(Problem(str(place), "is not the adapter of the record", "restore it from a backup"))
    problems += _contract_problems(folder, record)
    problems += _ledger_problems(folder, record)
    if problems:
        raise BadInput(problems)
    return {
        "entries": len(record.entries),
        "rounds": record.rounds,
        "ended": record.ended,
        **({} if pointer is None else {"adopted": pointer["adopted"]}),
        "digest": record.digest,
    }


def _pointer_problems(folder: Path, pointer: dict[str, Any]) -> list[Problem]:
    """Whoever deploys reads the pointer, so it must name what the record adopted."""
    place, remedy = folder / "adapters" / act.ADOPTED, f"deploy {pointer['folder']}, and restore the file"
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [Problem(str(place), f"cannot be read ({error})", remedy)]
    return [] if found == pointer else [Problem(str(place), "is not what the record adopted", remedy)]


def _contract_problems(folder: Path, record: RunRecord) -> list[Problem]:
    agreed = record.header["digests"].get("contract")
    if agreed is None:
        return []
    place = folder / "contract.toml"
    try:
        found = contracts.load(place).digest
    except BadInput as error:
        return list(error.problems)
    return [] if found == agreed else [Problem(str(place), "is not the contract of the record", "restore it")]


def _ledger_problems(folder: Path, record: RunRecord) -> list[Problem]:
    """The ledger must hold every charge that the record says it holds, and go on from the head it names."""
    privacy = record.header["study"]["privacy"]
    heads = {str(body["id"]): body["ledger"] for body in record.of("charge") if body.get("ledger")}
    if privacy["trust"] == "none" or not heads:
        return []
    place = Path(privacy["ledger"]) if privacy.get("ledger") else folder / LEDGER
    if not place.exists():
        return [Problem(str(place), "the privacy ledger is missing", "restore it from a backup: it says what is spent")]
    owner = str(record.header["digests"]["population"])
    budget = Budget(epsilon=float(privacy["epsilon"]), delta=float(privacy["delta"]))
    with Ledger.open(place, owner=owner, budget=budget) as ledger:
        ledger.verify(Head(**max(heads.values(), key=lambda head: int(head["count"]))))
        lost = heads.keys() - {row.charge.id for row in ledger.rows()}
    return [Problem(str(place), f"does not hold charge {id}", "restore it from a backup") for id in sorted(lost)]
