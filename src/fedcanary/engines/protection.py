"""The server's side of a run's privacy: who is drawn, each round's gate, and the ledger that pays before it opens."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedcanary.clients import panel
from fedcanary.engines import privacy_terms
from fedcanary.engines.setup import Setup
from fedcanary.errors import BadInput
from fedcanary.privacy import accounting, secagg
from fedcanary.privacy import ledger as ledgers
from fedcanary.privacy.accounting import Mechanism, Neighbours
from fedcanary.privacy.ledger import Budget, Head, Ledger
from fedcanary.privacy.release import Charge, Gate
from fedcanary.privacy.seal import READINGS, TRAINING
from fedcanary.record import RunRecord, fields
from fedcanary.study import Study

LEDGER = "ledger.sqlite"
TRAINED, HELD_OUT = " trained", " held-out"  # ends of a panel's name in the ledger
Unit = Literal["client", "example"]


@dataclass(frozen=True, slots=True)
class Cohort:
    """A round's clients, who train and answer; where there are none, why. `trainers` train and say nothing else."""

    clients: list[int]
    why_none: str = ""
    trainers: tuple[int, ...] = ()


class Protection:
    """The server's side of a run's privacy; `close` it, or use it in a `with` statement.

    Raises:
        BadInput: not even the first round could open anything, or the ledger is another's.
        Refused: the ledger was changed or rolled back.
    """

    _there: Callable[[int], Callable[[int], bool]] | None = None

    def __init__(
        self,
        setup: Setup,
        record: RunRecord,
        remembered: bool = False,
        there: Callable[[int], Callable[[int], bool]] | None = None,
    ) -> None:
        """`remembered`: a round begun again gets from its clients what they said before, to the byte.

        `there`: who can be drawn for a round, if not the study says it; asked once for each round, in their order.
        """
        privacy_terms.check(setup)
        self._remembered = remembered and setup.study.privacy.trust != "central"  # whose noise is the server's
        self._study, self._layout, self._probes = setup.study, privacy_terms.layout(setup), setup.probes
        self._record, self._run = record, setup.study.digest
        self._clients, self._there = len(setup.population), there
        self._used: set[int] = set()
        self._drawn: dict[int, Cohort] = {}
        self._given_up: set[int] = set()
        masked = setup.study.privacy.trust == "secure_aggregation"
        self._registration = secagg.register(range(self._clients)) if masked else None
        self._ledger = open_ledger(setup, record.path.parent / LEDGER)
        for round in range(1, record.rounds + 1):
            self.cohort(round)
        if self._ledger is not None:
            self._catch_up(self._ledger)

    def _catch_up(self, ledger: Ledger) -> None:
        """Bring ledger and record together after a crash between the two."""
        heads = [Head(**body["ledger"]) for body in self._record.of("charge") if body["ledger"]]
        if heads:  # finds a ledger that was rolled back with its anchor
            ledger.verify(max(heads, key=lambda head: head.count))
        if self._record.rounds:
            last = self._record.rounds
            self.settle(last, released=bool(self._record.releases()[last]))
        if self._study.privacy.noise == "system" and not self._remembered:
            # A round that was paid for may have been seen. Fresh noise would be a second look: its budget is lost.
            for row in self._rows():
                if row.charge.round > self._record.rounds:
                    self._given_up.add(row.charge.round)
                    self._note(_as_noted(row.charge), row.head)

    def __enter__(self) -> Protection:
        return self

    def __exit__(self, *error: object) -> None:
        if self._ledger is not None:
            self._ledger.close()

    def cohort(self, round: int) -> Cohort:
        """Who trains and answers. Under rotating panels they are used up: ask for the rounds in order."""
        if round not in self._drawn:
            self._drawn[round] = self._draw(round)
        return self._drawn[round]

    def _draw(self, round: int) -> Cohort:
        study, privacy = self._study, self._study.privacy
        if self._there is not None:
            there = self._there(round)
        else:
            there = panel.available(study.seed, round, self._clients, study.clients.available)
        if not privacy.rotates:
            drawn = panel.draw(study.seed, round, self._clients, study.clients.per_round, there)
        else:
            size = privacy_terms.panel_size(study, self._clients)
            drawn = panel.rotate(study.seed, self._clients, size, self._used, there)
        least = 1 if privacy.trust == "none" else privacy.min_cohort
        if len(drawn) < least:
            return Cohort([], f"{len(drawn)} clients could be drawn, and no sum over fewer than {least} is opened")
        if privacy.rotates:
            self._used.update(drawn)
        if round in self._given_up:
            return Cohort([], "was interrupted after it was paid for; fresh noise would be a second look")
        also = study.clients.also_train
        return Cohort(drawn, trainers=panel.others(study.seed, round, self._clients, drawn, also, there))

    def gate(self, round: int, cohort: Cohort) -> Gate:
        """The round's way through the door."""
        agreed = privacy_terms.terms(self._study, len(cohort.clients), self._probes, self._clip(round))
        return Gate(
            round,
            self._layout,
            agreed,
            self._pay,
            cohort={*cohort.clients, *cohort.trainers},
            panel=set(cohort.clients) if cohort.trainers else None,
            run=self._run,
            registration=self._registration,
        )

    def _clip(self, round: int) -> float | None:
        """The round's bound on updates where it adapts: from the recorded releases alone, as a resumed run has them."""
        updates = self._study.privacy.updates
        if updates is None or updates.quantile is None or updates.clip is None:
            return None
        clip, past = updates.clip, self._record.releases()
        for earlier in range(1, round):
            within = past.get(earlier, {}).get(privacy_terms.CLIPPING)
            clip = privacy_terms.next_clip(clip, updates.quantile, within)
        return clip

    def settle(self, round: int, released: bool) -> None:
        """Say in the ledger what became of a round's charges, once the record says it too."""
        if self._ledger is not None:
            for row in self._rows():
                if row.charge.round == round and row.status == "charged":
                    self._ledger.settle(row.charge.id, "released" if released else "aborted")

    def _rows(self) -> list[ledgers.Row]:
        """This run's charges."""
        rows = () if self._ledger is None else self._ledger.rows()
        return [row for row in rows if row.charge.panel.startswith(self._run)]

    def _pay(self, charge: Charge) -> None:
        """Called by a gate before it opens anything: the charge goes to the ledger, then into the record.

        Exact updates have no finite cost. The study said so, no budget could hold it, and it is only recorded.
        """
        head = None
        if self._ledger is not None and math.isfinite(charge.epsilon):
            head = self._ledger.charge(_to_pay(charge, self._study)).head
        self._note(charge, head)

    def _note(self, charge: Charge, head: Head | None) -> None:
        """Write a charge into the record: once, however often its round is begun."""
        if charge.id in {body["id"] for body in self._record.of("charge")}:
            return
        nothing = Budget(epsilon=math.inf, delta=0.0)
        spent = nothing if self._ledger is None else self._ledger.spent(self._study.privacy.window)
        after = {"ledger": None if head is None else fields(head), "spent": fields(spent)}
        self._record.append("charge", {**fields(charge), **after})


def open_ledger(setup: Setup, place: Path) -> Ledger | None:
    """The study's ledger, or one at `place`; None where nothing is protected and nothing can be spent.

    Raises:
        BadInput: it is another population's, or holds what cannot be added up with this study's charges.
        Refused: it was changed or rolled back.
    """
    privacy, hides = setup.study.privacy, privacy_terms.neighbours(setup.study)
    if privacy.trust == "none":
        return None
    path = Path(privacy.ledger) if privacy.ledger else place
    budget = Budget(epsilon=privacy.epsilon, delta=privacy.delta)
    ledger = Ledger.open(path, owner=setup.population.digest, budget=budget, spent=spent_by(hides))
    for name, own, paid in (
        ("unit", privacy.unit, {_unit(row.charge.panel) for row in ledger.rows()}),
        ("neighbours", hides, {row.charge.panel.split(" ")[2] for row in ledger.rows()}),
    ):
        if other := paid - {own}:
            ledger.close()
            what = f"{path} holds what was paid for {name} {', '.join(other)}, which cannot be added up with {own}"
            raise BadInput.of(f"privacy.{name}", what, f"name another privacy.ledger, or the ledger's own {name}")
    return ledger


def check_ledger(setup: Setup) -> None:
    """What a ledger that is there already has against this study, before anything is written.

    Raises:
        BadInput: as `open_ledger`.
        Refused: as `open_ledger`; or the window cannot pay the first round.
    """
    study = setup.study
    if study.privacy.ledger is None or not Path(study.privacy.ledger).exists():
        return
    ledger = open_ledger(setup, Path(study.privacy.ledger))
    if ledger is None:
        return
    with ledger:
        if any(row.charge.panel.startswith(study.digest) for row in ledger.rows()):
            return  # this very run was begun before, and goes on
        size = privacy_terms.panel_size(study, len(setup.population))
        terms = privacy_terms.terms(study, size, setup.probes)
        for purpose, mechanism in ((READINGS, terms.mechanism(size)), (TRAINING, terms.training)):
            if mechanism is not None:
                cost = terms.epsilon(mechanism)
                first = Charge(
                    id=f"{study.digest} first",
                    round=1,
                    purpose=purpose,
                    event=mechanism.to_json(),
                    epsilon=cost,
                    delta=terms.delta,
                )
                ledger.check(_to_pay(first, study))


def _to_pay(charge: Charge, study: Study) -> ledgers.Charge:
    """A charge of the gate as the ledger takes it: with its window, and the panel that pays."""
    privacy, hides = study.privacy, privacy_terms.neighbours(study)
    who = charge.round if privacy.rotates else "all"
    return ledgers.Charge(
        id=charge.id,
        window=privacy.window,
        panel=f"{study.digest} {who} {hides}" + _whose(charge, privacy.unit),
        round=charge.round,
        mechanism=json.loads(charge.event),
        purpose=charge.purpose,
        epsilon=charge.epsilon,
        delta=charge.delta,
    )


def _as_noted(charge: ledgers.Charge) -> Charge:
    """A charge of the ledger as the gate made it."""
    event = Mechanism.from_json(json.dumps(dict(charge.mechanism))).to_json()
    names = ("id", "round", "purpose", "epsilon", "delta")
    return Charge(event=event, **{name: getattr(charge, name) for name in names})


def _whose(charge: Charge, unit: Unit) -> str:
    """Which of a client's examples pay. None is both trained on and held out, so these are panels apart."""
    return "" if unit == "client" else TRAINED if charge.purpose == TRAINING else HELD_OUT


def _unit(panel: str) -> Unit:
    return "example" if panel.endswith((TRAINED, HELD_OUT)) else "client"


def spent_by(hides: Neighbours) -> ledgers.Spent:
    """How a window's charges compose. Panels of a run are disjoint, so each run costs what its dearest panel costs;
    panels of two runs may share clients, so runs add up.

    Gaussian mechanisms have one order at every delta, and the trainings of a run are all alike; but which of the two is
    dearer may change when runs are added up, so every choice of one for each run is tried.
    """

    def spent(charges: Sequence[ledgers.Charge]) -> tuple[float, float]:
        if not charges:
            return 0.0, 0.0
        delta = max(charge.delta for charge in charges)
        runs: dict[str, dict[bool, dict[str, list[Mechanism]]]] = {}
        for charge in charges:
            kinds = runs.setdefault(charge.panel.partition(" ")[0], {})
            panels = kinds.setdefault(charge.purpose == TRAINING, {})
            panels.setdefault(charge.panel, []).append(Mechanism.from_json(json.dumps(dict(charge.mechanism))))

        def cost(panel: Sequence[Mechanism]) -> float:
            return accounting.compose(panel, delta, neighbours=hides)

        dearest = [[max(panels.values(), key=cost) for panels in kinds.values()] for kinds in runs.values()]
        return max(cost([m for panel in choice for m in panel]) for choice in itertools.product(*dearest)), delta

    return spent
