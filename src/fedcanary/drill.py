"""Drill-downs over a run: what the next round asks of slices, and what is known of them, all from the record.

The error ledger is charged before a round asks, as the privacy ledger is before a release. Both the ledger and every
word about a slice follow from the recorded plan and releases alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from fedcanary.monitor import base as monitor
from fedcanary.monitor import error_ledger, slices
from fedcanary.monitor.error_ledger import Budget, Charge, ErrorLedger
from fedcanary.probes.slices import SLICES
from fedcanary.record import RunRecord, fields, plain
from fedcanary.types import Evidence, Release

Judged = Sequence[tuple[int, Sequence[Evidence]]]  # each round's evidence about the modes


class DrillDowns:
    """The server's side of drill-downs: `ask` before each round, `step` after it. Idle where a study has no slices.

    `ledger` is what the tests of modes and slices have spent of alpha so far.
    """

    def __init__(self, header: Mapping[str, Any]) -> None:
        self._modes = monitor.plan_from(header["plan"])
        self._plan = slices.plan_from(header[SLICES]) if SLICES in header else None
        self._state = slices.start()
        self._question: slices.Question | None = None
        self._charged: list[Charge] = []
        self._epochs: dict[str, int] = {}
        parts = {error_ledger.MODES: self._modes.alpha}
        if self._plan is not None:
            parts[error_ledger.SLICES] = self._plan.alpha
        self.ledger = ErrorLedger(Budget(alpha=header["study"]["monitor"]["alpha"], parts=parts))
        self.begin([mode_plan.mode for mode_plan in self._modes.modes], round=1)

    @classmethod
    def of(cls, record: RunRecord, judged: Judged) -> Self:
        """Where a recorded run stands."""
        found = cls(record.header)
        found._again(record, judged)
        return found

    @classmethod
    def again(cls, record: RunRecord, judged: Judged) -> list[dict[str, Any]]:
        """What each round of a recorded run says of slices, computed anew."""
        return cls(record.header)._again(record, judged)

    def _again(self, record: RunRecord, judged: Judged) -> list[dict[str, Any]]:
        releases, anew, table = record.releases(), record.rebaselines(), []
        for round, evidence in judged:
            self.ask()
            table.append(self.step(releases[round], evidence))
            self.begin(anew.get(round, ()), round + 1)
        return table

    def begin(self, modes: Iterable[str], round: int) -> None:
        """Pay for the tests of modes that begin with this round, or begin anew."""
        for mode in modes:
            self._epochs[mode] = epoch = self._epochs.get(mode, 0) + 1
            self._pay(error_ledger.of_mode(mode, epoch, round, 1 / self._modes.alarm_at))

    def _pay(self, charge: Charge) -> None:
        if charge not in self.ledger.rows():
            self.ledger.charge(charge)
            self._charged.append(charge)

    def ask(self) -> slices.Question | None:
        """What the next round asks of slices, paid for; None if nothing."""
        if self._plan is not None:
            self._question = slices.ask(self._plan, self._modes, self._state)
            if self._question is not None:
                self._pay(slices.charge(self._plan, self._state, self._question))
        return self._question

    def step(self, releases: Mapping[str, Release], evidence: Sequence[Evidence]) -> dict[str, Any]:
        """Take in a round; returns what the record says of slices after it, and nothing where a study has none."""
        if self._plan is None:
            return {}
        asked, charged = self._question, self._charged
        self._state = slices.step(self._plan, self._state, asked, releases.get(SLICES), evidence)
        self._charged = []
        said = {
            "asked": None if asked is None else {"mode": str(asked.mode), "part": asked.stream.name},
            "evidence": [fields(e) for e in slices.evidence(self._plan, self._state)],
            "charges": [error_ledger.body(charge) for charge in charged],
        }
        return {SLICES: plain(said)}


def ledger_of(record: RunRecord) -> ErrorLedger:
    """The error ledger as a record has it: its plan, its re-baselines, and the drill-downs that it paid for."""
    run = DrillDowns(record.header)
    for round, modes in sorted(record.rebaselines().items()):
        run.begin(modes, round + 1)
    charges = [error_ledger.body(charge) for charge in run.ledger.rows()]
    charges += [charge for body in record.of("round") for charge in body.get(SLICES, {}).get("charges", ())]
    return ErrorLedger.of(run.ledger.budget, charges)
