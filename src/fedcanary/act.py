"""What a verdict leads to: which adapter is adopted, that a held run ends, and how it goes on after a fix.

All of it is read from the record, so that a resumed run knows what an uninterrupted one knew. Adapters are numbered by
the round that made them; 0 is the initial one, with which every model is the base.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from fedcanary.errors import BadInput, Problem, Refused
from fedcanary.monitor import base as monitor
from fedcanary.monitor.verdict import Past
from fedcanary.record import RunRecord
from fedcanary.types import Evidence, Mode

ADOPTED: Final = "adopted.json"  # beside the adapters: which of them is to be used
INITIAL: Final = "initial_adapter"  # its digest, among the header's


def round_folder(out: Path, round: int) -> Path:
    """Where a round's shared adapter is; round 0's is the initial one."""
    return out / "adapters" / f"round-{round:03d}"


def past(record: RunRecord) -> list[Past]:
    """The complete rounds as the policy remembers them."""
    verdicts = [body["verdict"] for body in record.of("round")]
    return [
        Past(states={Mode(mode): state for mode, state in v["states"].items()}, adopted=int(v["adopted"]))
        for v in verdicts
    ]


def judged(
    record: RunRecord, plan: monitor.Plan
) -> tuple[monitor.MonitorState, list[tuple[int, tuple[Evidence, ...]]]]:
    """The monitor's state after all that is recorded, and each round's evidence, computed from the releases alone."""
    state, table, anew = monitor.start(plan), [], record.rebaselines()
    for round, releases in sorted(record.releases().items()):
        state, evidence = monitor.step(plan, state, releases)
        table.append((round, evidence))
        if round in anew:
            state = monitor.rebaseline(plan, state, anew[round])
    return state, table


def held(record: RunRecord) -> bool:
    """Whether the policy ended the run at its last round, and no re-baseline came after it."""
    last = next((e for e in reversed(record.entries) if e.kind in ("round", "rebaseline")), None)
    return last is not None and last.kind == "round" and last.body["verdict"]["action"] != "adopt"


def end(record: RunRecord) -> None:
    """Say in the record how the run ended, once."""
    if not record.ended:
        record.append("end", {"status": "held" if held(record) else "finished"})


def pointer(record: RunRecord) -> dict[str, Any] | None:
    """Which adapter is adopted after the record's last round, by number, folder and digest; None if there are none."""
    if INITIAL not in record.header["digests"]:
        return None
    made = {int(body["round"]): body for body in record.of("round")}
    number, action = 0, "adopt"
    if made:
        number, action = (made[max(made)]["verdict"][key] for key in ("adopted", "action"))
    digest = made[number]["adapter"] if number else record.header["digests"][INITIAL]
    folder = round_folder(Path(), number).name
    return {"adopted": number, "folder": folder, "adapter": digest, "after_round": len(made), "action": action}


def point(out: Path, record: RunRecord) -> None:
    """Write the pointer beside the adapters."""
    if (found := pointer(record)) is None:
        return
    path = out / "adapters" / ADOPTED
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


def rebaseline(record: RunRecord, reason: str) -> None:
    """After a fix, let a held run go on: the tests of the modes in alarm begin anew, from the adopted adapter.

    Raises:
        BadInput: the run is not held, has no round left, or the reason says nothing; every problem at once.
        Refused: the study declared fewer re-baselines, so that one more would not keep the error rate.
    """
    out, bodies = record.path.parent, list(record.of("round"))
    study, used = record.header["study"], record.rebaselines()
    problems = []
    if not reason.strip():
        problems.append(Problem("--rebaseline", "does not say what was fixed", 'write for example "labels mended"'))
    if not held(record):
        problems.append(Problem(str(out), *_not_held(record, len(bodies), used)))
    elif len(bodies) >= study["rounds"]:
        what = f"is held after the last of its {study['rounds']} rounds"
        problems.append(Problem(str(out), what, "start a new run of the mended study in another --out"))
    if problems:
        raise BadInput(problems)
    end(record)  # a run that was killed before it could
    declared, alpha = int(study["monitor"]["rebaselines"]), study["monitor"]["alpha"]
    if len(used) >= declared:
        raise Refused(
            f"{out}: the study declared {declared} re-baseline{'s' * (declared != 1)} and has made {len(used)}; one "
            f"more would not keep the chance of any false alarm at {alpha:g}\n"
            f"    would fit: a new run in another --out of the mended study, with monitor.rebaselines = "
            f"{len(used) + 1} or more declared from its start"
        )
    verdict = bodies[-1]["verdict"]
    modes = [mode for mode, state in verdict["states"].items() if state == "alarm"]
    record.append(
        "rebaseline",
        {"round": len(bodies), "modes": modes, "adopted": verdict["adopted"], "reason": reason.strip()},
    )


def _not_held(record: RunRecord, rounds: int, used: dict[int, tuple[Mode, ...]]) -> tuple[str, str]:
    if record.ended:
        return "has finished; only a run that an alarm ended is re-baselined", "start a new run in another --out"
    go_on = f"leave out --rebaseline: fedcanary run --resume {record.path.parent}"
    if used and rounds - max(used) == 0:
        return f"was re-baselined after round {rounds} and has not gone on since", go_on
    return "was interrupted, and no alarm ended it", go_on
