"""Charging: what a window may still cost, decided and written before anything is released.

Used alike by a server (for a population) and by a client (for itself). Entries hold no times and no chance, so equal
runs have equal ledgers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

from fedcanary.errors import FedcanaryError, Refused
from fedcanary.privacy.ledger.anchor import Head
from fedcanary.privacy.ledger.chain import SCHEMA, Chain
from fedcanary.privacy.ledger.charges import (
    Budget,
    Charge,
    Fits,
    Outcome,
    Row,
    Spent,
    by_addition,
    check,
    from_entry,
    plain,
    to_entry,
)

_ROUNDING: Final = 1e-12  # relative; lets ten charges of 0.1 fit a budget of 1, and nothing that anyone could measure
_REASON: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
_REASONS_MAX: Final = 64
_NOISE: Final = ("noise_multiplier", "share_std")  # what a mechanism may call its noise


class OverBudget(Refused):
    """The charge does not fit its window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Proof that a charge is on disk: its entry is the last one of `head`.

    `repeated`: this id was charged before and its outcome is not known, so an earlier attempt may have come as far as
    releasing. Going on costs no more only if nothing was seen of that attempt, or if the very same release is made
    again; fresh noise would be a second look at the data, and needs an id and a charge of its own.
    """

    id: str
    head: Head
    repeated: bool = field(compare=False)


class Ledger:
    """An open ledger; close it, or use it in a `with` statement. Safe for threads; open it anew after a fork.

    >>> import tempfile
    >>> spend = dict(window=1, panel="a", mechanism={"kind": "gaussian"}, purpose="probes", delta=1e-7)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Ledger.open(Path(folder, "l.sqlite"), owner="town", budget=Budget(epsilon=1, delta=1e-6)) as ledger:
    ...         receipt = ledger.charge(Charge(id="round 1", round=1, epsilon=0.75, **spend))  # now release
    ...         ledger.spent(1).epsilon
    0.75
    """

    owner: str  # whose privacy it guards
    budget: Budget  # of every window

    def __init__(self, path: Path, first: dict[str, Any], spent: Spent, fits: Fits | None) -> None:
        """Not for callers: see `open`."""
        self._spent, self._fits = spent, fits
        self._rows: dict[str, Row] = {}
        self._windows: dict[int, list[Charge]] = {}
        self._chain = Chain(path, self._fold, first)

    @classmethod
    def open(
        cls, path: Path, *, owner: str, budget: Budget, spent: Spent = by_addition, fits: Fits | None = None
    ) -> Self:
        """Make a ledger, or open the one that is there and check every entry of it.

        `owner` says whose privacy it guards (a population, a client); `spent` how a window's charges compose (the same
        rule for the whole life of a ledger); `fits` what to advise when one does not fit.

        Raises:
            BadInput: not a ledger, another schema's, another owner's, another budget's, or it cannot be written.
            Damaged: it was changed or rolled back since it was written.
        """
        opening = {"kind": "opened", "schema": SCHEMA, "owner": owner, "budget": plain(budget)}
        ledger = cls(path, opening, spent, fits)
        found = {"owner": f"is {ledger.owner!r}, not {owner!r}"} if ledger.owner != owner else {}
        if ledger.budget != budget:
            found["budget"] = f"is {ledger.budget}, not {budget}"
        if found:
            ledger.close()
            check(str(path), found, "name the ledger's own, or take another file")
        return ledger

    def charge(self, charge: Charge) -> Receipt:
        """Pay for a release; when this returns, the charge is on disk, and only then may anything be released.

        The same charge again returns the same receipt and costs nothing, until its outcome is settled.

        Raises:
            OverBudget: it does not fit its window; says what is left and what would fit.
            Refused: the id was charged with other content or settled, or the charge could not be written.
            Damaged: the ledger was changed or rolled back.
        """
        with self._chain.writing():
            known = self._rows.get(charge.id)
            if known is None:
                self._afford(charge)
                self._chain.append({"kind": "charge", **to_entry(charge)})
            elif to_entry(known.charge) != to_entry(charge):
                raise Refused(f"{self._chain.path}: charge {charge.id!r} was made before, for something else")
            elif known.status != "charged":
                raise Refused(
                    f"{self._chain.path}: charge {charge.id!r} was {known.status} before and is closed\n"
                    "    remedy: use the release that was made, or pay for another under a new id"
                )
        return Receipt(id=charge.id, head=self._rows[charge.id].head, repeated=known is not None)

    def check(self, charge: Charge) -> None:
        """Raise OverBudget if the charge would not fit its window now; nothing is written."""
        with self._chain.reading():
            self._afford(charge)

    def settle(self, id: str, outcome: Outcome) -> None:
        """Close a charge: its release was made and is kept, or will never be made. The charge stays spent.

        Raises:
            Refused: there is no such charge, or it has the other outcome.
        """
        with self._chain.writing():
            row = self._rows.get(id)
            if row is None:
                raise Refused(f"{self._chain.path}: there is no charge {id!r}")
            if row.status not in ("charged", outcome):
                raise Refused(f"{self._chain.path}: charge {id!r} was {row.status}, so it cannot be {outcome}")
            if row.status == "charged":
                self._chain.append({"kind": "outcome", "id": id, "status": outcome})

    def note_refusal(self, reason: str) -> None:
        """Count a request that was refused, by a reason of the caller's own making (snake_case, at most 64 of them).

        The counts are kept on disk but outside the chain, so that a stranger who asks a million times cannot make it
        grow; nothing guards them.
        """
        with self._chain.writing():
            known = self._chain.tallies()
            if (reason not in known and len(known) >= _REASONS_MAX) or not _REASON.fullmatch(reason):
                raise FedcanaryError(f"{reason!r} is not one of at most {_REASONS_MAX} snake_case reasons")
            self._chain.tally(reason)

    def rows(self) -> tuple[Row, ...]:
        """Every charge, in the order they were made."""
        with self._chain.reading():
            return tuple(self._rows.values())

    def refusals(self) -> dict[str, int]:
        """How many requests were refused, by reason."""
        with self._chain.reading():
            return self._chain.tallies()

    def spent(self, window: int) -> Budget:
        """What a window has cost so far."""
        with self._chain.reading():
            epsilon, delta = self._spent(tuple(self._windows.get(window, ())))
            return Budget(epsilon=epsilon, delta=delta)

    @property
    def head(self) -> Head:
        """Where the chain stands. Kept elsewhere (the run's record) it is the witness against a rollback."""
        with self._chain.reading():
            return self._chain.head

    def verify(self, expected: Head | None = None) -> Head:
        """Check every entry on disk again, and that `expected`, a head seen before, lies on the chain.

        Raises:
            Damaged: it does not; the ledger was changed or rolled back.
        """
        return self._chain.verify(expected)

    def close(self) -> None:
        """Let go of the file."""
        self._chain.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fold(self, entry: dict[str, Any], head: Head) -> None:
        match entry.pop("kind"):
            case "opened" if head.count == 1:
                costs = {name: float(entry["budget"][name]) for name in ("epsilon", "delta")}
                self.owner, self.budget = entry["owner"], Budget(**costs)
            case "charge" if head.count > 1 and entry["id"] not in self._rows:
                charge = from_entry(entry)
                self._rows[charge.id] = Row(charge=charge, status="charged", head=head)
                self._windows.setdefault(charge.window, []).append(charge)
            case "outcome" if entry["status"] in ("released", "aborted"):
                self._rows[entry["id"]] = replace(self._rows[entry["id"]], status=entry["status"])
            case other:
                raise ValueError(f"kind {other!r} has no place here")

    def _pays(self, charges: Sequence[Charge]) -> bool:
        epsilon, delta = self._spent(charges)
        if math.isfinite(self.budget.epsilon) and any(math.isinf(c.epsilon) for c in charges):
            return False  # whatever a rule says
        return _within(epsilon, self.budget.epsilon) and _within(delta, self.budget.delta)

    def _afford(self, charge: Charge) -> None:
        """Raise OverBudget unless the window can pay. Called with a lock held."""
        before, budget = tuple(self._windows.get(charge.window, ())), self.budget
        if self._pays((*before, charge)):
            return
        (was, used), (epsilon, delta) = self._spent(before), self._spent((*before, charge))
        # a rule may state every epsilon at one delta, which is then not used up
        left = f"at delta {delta:.3g}" if used == delta else f"and delta {_down(max(0.0, budget.delta - used))}"
        raise OverBudget(
            f"{self._chain.path}: the ledger of {self.owner!r} refuses charge {charge.id!r} ({charge.purpose}): window "
            f"{charge.window} would reach epsilon {epsilon:.6g} of {budget.epsilon:.6g} and delta {delta:.3g} of "
            f"{budget.delta:.3g}\n    left: epsilon {_down(max(0.0, budget.epsilon - was))} {left}\n"
            f"    would fit: {self._advice(before, charge)}"
        )

    def _advice(self, before: tuple[Charge, ...], refused: Charge) -> str:
        """What would fit instead of a refused charge: each way is tried by the ledger's own rule before it is said."""
        if math.isinf(refused.epsilon) and math.isfinite(self.budget.epsilon):
            return 'a mechanism with a finite epsilon; "no privacy" needs an infinite budget'
        ways = []
        if (factor := _least(lambda f: self._pays((*before, _softer(refused, f))))) is not None:
            noisy = any(name in refused.mechanism for name in _NOISE)
            less = f"with {math.ceil(factor * 1e3) / 1e3:g} times the noise"
            ways.append(f"the same {less if noisy else f'at epsilon {_down(refused.epsilon / factor)}'}")
        unused = max((c.panel for c in before), key=len, default="")[len(refused.panel) :] + "+"
        if self._pays((*before, replace(refused, panel=refused.panel + unused))):
            ways.append(f"the same from a panel not yet charged in window {refused.window}")
        if before and self._pays((refused,)):
            ways.append("the same in the next window")
        if self._fits is not None:
            ways.append(self._fits(before, refused, self.budget))
        return "; ".join(ways) or f"nothing of this kind within epsilon {self.budget.epsilon:.6g} a window"


def _softer(charge: Charge, factor: float) -> Charge:
    """A charge with so many times the noise. It costs at most 1/factor of the epsilon (Gaussian or Laplace noise)."""
    noisier = {n: v * factor if n in _NOISE and v else v for n, v in charge.mechanism.items()}
    return replace(charge, epsilon=charge.epsilon / factor, mechanism=noisier)


def _least(pays: Callable[[float], bool]) -> float | None:
    """The least factor up to a million that pays, rounded up by less than one part in 10,000; None if there is none."""
    low, high = 0.0, 20.0  # its logarithm to base 2
    if not pays(math.exp2(high)):
        return None
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if pays(math.exp2(middle)) else (middle, high)
    return math.exp2(high)


def _within(value: float, limit: float) -> bool:
    return value <= limit * (1 + _ROUNDING)  # a NaN is within nothing


def _down(value: float) -> str:
    """At most six digits, never more than the value."""
    text = f"{value:.6g}"
    return text if float(text) <= value else f"{value * (1 - 1e-5):.6g}"
