"""A run's privacy: from the study's table to each round's panel, terms and gate, and the ledger that pays for them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedcanary.clients import panel
from fedcanary.engines.setup import Setup
from fedcanary.errors import BadInput
from fedcanary.privacy import accounting, secagg
from fedcanary.privacy import ledger as ledgers
from fedcanary.privacy.accounting import Mechanism, Neighbours
from fedcanary.privacy.ledger import Budget, Head, Ledger
from fedcanary.privacy.release import Charge, Gate
from fedcanary.privacy.seal import Terms
from fedcanary.study import Study

LEDGER = "ledger.sqlite"
Note = Callable[[Charge, Head | None, Budget], None]  # a charge, the ledger's head, and all that is spent by now


def neighbours(study: Study) -> Neighbours:
    """What the study's epsilon hides. A locally noised message must hide any value behind any other."""
    return "substituted" if study.privacy.trust == "local" else study.privacy.neighbours


def readings_noise(study: Study) -> float:
    """Noise multiplier of a round's readings, such that everything a client pays for in the window fits epsilon.

    Gaussians of multipliers z_i cost together what one of 1/z^2 = sum 1/z_i^2 costs.

    Raises:
        BadInput: noised updates alone cost more than the whole budget.
    """
    privacy = study.privacy
    times = study.rounds if privacy.panel == "same" else 1
    norm = accounting.sensitivity(1.0, neighbours(study))
    whole = accounting.gaussian_std(privacy.epsilon, privacy.delta, norm)
    updates = privacy.updates.noise if privacy.updates is not None else "none"
    left = 1 / whole**2 / times - (0.0 if updates == "none" else 1 / updates**2)
    if left <= 0:
        least = whole * math.sqrt(times)
        raise BadInput.of(
            "privacy.updates.noise",
            f"{updates} spends more than the whole epsilon of {privacy.epsilon:g}",
            f"give more than {least:.3g}, or a larger epsilon",
        )
    return math.sqrt(1 / left) * (1 + 1e-9)


def terms(study: Study, cohort: int) -> Terms:
    """How a round of so many clients is protected."""
    privacy = study.privacy
    if privacy.trust == "none":
        return Terms(trust="none")
    updates = privacy.updates
    return Terms(
        trust=privacy.trust,
        noise_multiplier=readings_noise(study),
        delta=privacy.delta,
        neighbours=neighbours(study),
        floor=floor(study, cohort),
        dropouts=privacy.dropouts,
        update_clip=math.inf if updates is None or updates.clip is None else updates.clip,
        update_noise=0.0 if updates is None or updates.noise == "none" else updates.noise,
        simulated=study.seed if privacy.noise == "simulated" else None,
    )


def floor(study: Study, cohort: int) -> int:
    """No sum over fewer of so many clients is opened; the noise suffices for as few."""
    privacy = study.privacy
    return max(privacy.min_cohort, math.ceil((1 - privacy.dropouts) * cohort - 1e-9))


def panel_size(study: Study, clients: int) -> int:
    """How many clients a round asks, if they are there."""
    if study.privacy.rotates:
        return study.clients.per_round or max(clients // study.rounds, 1)
    return min(study.clients.per_round or clients, clients)


@dataclass(frozen=True, slots=True)
class Cohort:
    """A round's clients; where there are none, why."""

    clients: list[int]
    why_none: str = ""


class Protection:
    """The server's side of a run's privacy; `close` it, or use it in a `with` statement.

    Raises:
        BadInput: not even the first round could open anything, or the ledger is another's.
        Refused: the ledger was changed or rolled back.
    """

    def __init__(self, setup: Setup, out: Path, complete: int, note: Note) -> None:
        self._study, self._layout, self._note = setup.study, setup.layout, note
        self._clients = len(setup.population)
        self._run = setup.study.digest
        self._used: set[int] = set()
        self._given_up: set[int] = set()
        masked = setup.study.privacy.trust == "secure_aggregation"
        self._registration = secagg.register(range(self._clients)) if masked else None
        self._ledger = self._open(setup.population.digest, out)
        for round in range(1, complete + 1):
            self.cohort(round)
        if self._ledger is not None and setup.study.privacy.noise == "system":
            # A round that was paid for may have been seen. Fresh noise would be a second look: its budget is lost.
            self._given_up = {row.charge.round for row in self._rows() if row.charge.round > complete}

    def __enter__(self) -> Protection:
        return self

    def __exit__(self, *error: object) -> None:
        if self._ledger is not None:
            self._ledger.close()

    def cohort(self, round: int) -> Cohort:
        """Who trains and answers. Under rotating panels they are used up; ask once for each round, in order."""
        study, privacy = self._study, self._study.privacy
        there = panel.available(study.seed, round, self._clients, study.clients.available)
        if not privacy.rotates:
            drawn = panel.draw(study.seed, round, self._clients, study.clients.per_round, there)
        else:
            drawn = panel.rotate(study.seed, self._clients, panel_size(study, self._clients), self._used, there)
        least = 1 if privacy.trust == "none" else privacy.min_cohort
        if len(drawn) < least:
            return Cohort([], f"{len(drawn)} clients could be drawn, and no sum over fewer than {least} is opened")
        if privacy.rotates:
            self._used.update(drawn)
        if round in self._given_up:
            return Cohort([], "was interrupted after it was paid for; fresh noise would be a second look")
        return Cohort(drawn)

    def gate(self, round: int, cohort: Cohort) -> Gate:
        """The round's way through the door."""
        agreed = terms(self._study, len(cohort.clients))
        asked = set(cohort.clients)
        return Gate(
            round, self._layout, agreed, self._pay, cohort=asked, run=self._run, registration=self._registration
        )

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

    def _open(self, owner: str, out: Path) -> Ledger | None:
        """None where nothing is protected and nothing can be spent."""
        privacy = self._study.privacy
        if privacy.trust == "none":
            return None
        size = panel_size(self._study, self._clients)
        if size < privacy.min_cohort or self._clients < privacy.min_cohort:
            raise BadInput.of(
                "privacy.min_cohort",
                f"{self._clients} clients in {self._study.rounds} {privacy.panel} panels are {size} in a round, and no "
                f"sum over fewer than {privacy.min_cohort} is opened",
                'take more clients, fewer rounds, or privacy.panel = "same" (see `fedcanary plan`)',
            )
        readings_noise(self._study)  # raises where the budget cannot hold the updates
        budget = Budget(epsilon=privacy.epsilon, delta=privacy.delta)
        path = Path(privacy.ledger) if privacy.ledger else out / LEDGER
        return Ledger.open(path, owner=owner, budget=budget, spent=spent_by(neighbours(self._study)))

    def _pay(self, charge: Charge) -> None:
        """Called by a gate before it opens anything: the charge goes to the ledger, then into the record.

        Exact updates have no finite cost. The study said so, no budget could hold it, and it is only recorded.
        """
        head, ledger, privacy = None, self._ledger, self._study.privacy
        if ledger is not None and math.isfinite(charge.epsilon):
            head = ledger.charge(
                ledgers.Charge(
                    id=charge.id,
                    window=privacy.window,
                    panel=f"{self._run} {charge.round if privacy.rotates else 'all'}",
                    round=charge.round,
                    mechanism=json.loads(charge.event),
                    purpose=charge.purpose,
                    epsilon=charge.epsilon,
                    delta=charge.delta,
                )
            ).head
        spent = Budget(epsilon=math.inf, delta=0.0) if ledger is None else ledger.spent(privacy.window)
        self._note(charge, head, spent)


def spent_by(hides: Neighbours) -> ledgers.Spent:
    """How a window's charges compose. Panels of a run are disjoint, so each run costs what its dearest panel costs;
    panels of two runs may share clients, so runs add up.
    """

    def spent(charges: Sequence[ledgers.Charge]) -> tuple[float, float]:
        if not charges:
            return 0.0, 0.0
        delta = max(charge.delta for charge in charges)
        runs: dict[str, dict[str, list[Mechanism]]] = {}
        for charge in charges:
            panels = runs.setdefault(charge.panel.partition(" ")[0], {})
            panels.setdefault(charge.panel, []).append(Mechanism.from_json(json.dumps(dict(charge.mechanism))))
        dearest = [
            max(panels.values(), key=lambda panel: accounting.compose(panel, delta, neighbours=hides))
            for panels in runs.values()
        ]
        return accounting.compose([m for panel in dearest for m in panel], delta, neighbours=hides), delta

    return spent
