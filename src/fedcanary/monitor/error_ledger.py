"""The error ledger: one alpha over modes, slices and rounds, charged like epsilon and before anything is tested.

    part     a charge                          pays for
    modes    each mode, each epoch of it       any false alarm of that mode in that epoch, whatever the rounds (Ville)
    slices   each drill-down: round and mode   its share of the false discoveries among all slices named (slices.py)
Chances of a wrong word add up (the union bound for alarms, one more term of the sum that bounds the FDR for slices), so
charges do. Stopping early gives nothing back, and what is not charged stays for later.

The words are those of `privacy/ledger`: `Budget`, `Charge`, `check`, `charge`, `rows`, `spent`, `remaining`. This
ledger guards nobody's privacy, so it lives in memory: it is rebuilt from the charges in the run's record, and holding
those to what the monitor's pure steps say is what `fedcanary replay` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Final, Self

from fedcanary.errors import BadInput, Problem, Refused

MODES: Final = "modes"
SLICES: Final = "slices"
ROUNDING: Final = 1e-12  # relative; lets six charges of a sixth fit


class OverAlpha(Refused):
    """The charge does not fit its part of alpha."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """`alpha` in (0, 1), and how much of it each part may spend; what no part names, nobody can spend.

    Raises BadInput, naming every number that is not as it should be.
    """

    alpha: float
    parts: Mapping[str, float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", MappingProxyType(dict(self.parts)))
        found = {} if 0 < self.alpha < 1 else {"alpha": f"{self.alpha!r} is not in (0, 1)"}
        for part, amount in self.parts.items():
            if not 0 <= amount <= 1:
                found[part] = f"{amount!r} is not in [0, 1]"
        if not found and not _within(math.fsum(self.parts.values()), self.alpha):
            found["parts"] = f"{dict(self.parts)} add up to more than alpha = {self.alpha!r}"
        _check("error budget", found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What one test may err, and what it is. Raises BadInput, naming every field that is not as it should be.

    `id` names the test: charging an id again is the same charge. `part` is the part of the budget that pays, `round`
    the one before which it begins, `mode` what it is about, and `amount` in [0, 1] its share of alpha.
    """

    id: str
    part: str
    purpose: str
    round: int
    mode: str
    amount: float

    def __post_init__(self) -> None:
        found = {
            name: f"{value!r} is not a non-empty text"
            for name in ("id", "part", "purpose", "mode")
            if not isinstance(value := getattr(self, name), str) or not value
        }
        if not isinstance(self.round, int) or self.round < 1:
            found["round"] = f"{self.round!r} is not a round, counted from 1"
        if not 0 <= self.amount <= 1:
            found["amount"] = f"{self.amount!r} is not in [0, 1]"
        _check(f"error charge {self.id!r}", found)


class ErrorLedger:
    """What of alpha is spent.

    >>> ledger = ErrorLedger(Budget(alpha=0.05, parts={"modes": 0.04, "slices": 0.01}))
    >>> ledger.charge(Charge(id="a", part="slices", purpose="drill-down", round=3, mode="erosion", amount=0.005))
    0.005
    >>> round(ledger.remaining("slices"), 6), ledger.spent(), ledger.spent("modes")
    (0.005, 0.005, 0.0)
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._rows: dict[str, Charge] = {}

    @classmethod
    def of(cls, budget: Budget, charges: Iterable[Mapping[str, Any]]) -> Self:
        """The ledger that recorded charges make (see `body`). Raises as `charge` does, if they could not be made."""
        ledger = cls(budget)
        for charge in charges:
            ledger.charge(Charge(**charge))
        return ledger

    def charge(self, charge: Charge) -> float:
        """Pay for a test, before it is begun; returns what is spent of its part from then on.

        The same charge again costs nothing.

        Raises:
            OverAlpha: it does not fit; says what is left and what would fit.
            Refused: the id was charged before for something else.
        """
        self.check(charge)
        self._rows[charge.id] = charge
        return self.spent(charge.part)

    def check(self, charge: Charge) -> None:
        """Raise as `charge` would; nothing is spent."""
        known = self._rows.get(charge.id)
        if known == charge:
            return
        if known is not None:
            raise Refused(f"the error ledger: charge {charge.id!r} was made before, for something else")
        parts = self.budget.parts
        if charge.part not in parts:
            raise OverAlpha(
                f"the error ledger refuses charge {charge.id!r} ({charge.purpose}): no alpha is set aside for "
                f"{charge.part!r}\n    would fit: a charge to one of {', '.join(parts) or 'no part'}"
            )
        after, most = math.fsum((*self._amounts(charge.part), charge.amount)), parts[charge.part]
        if not _within(after, most):
            left = self.remaining(charge.part)
            fits = f"the same at {_down(left)} or less" if left > 0 else "nothing more: all of this part is spent"
            raise OverAlpha(
                f"the error ledger refuses charge {charge.id!r} ({charge.purpose}): {charge.part} would reach "
                f"{after:.6g} of {most:.6g}, of alpha {self.budget.alpha:.6g}\n    left: {_down(left)}\n"
                f"    would fit: {fits}"
            )

    def rows(self) -> tuple[Charge, ...]:
        """Every charge, in the order they were made."""
        return tuple(self._rows.values())

    def spent(self, part: str | None = None) -> float:
        """What a part, or all parts together, have spent."""
        return math.fsum(self._amounts(part))

    def remaining(self, part: str | None = None) -> float:
        """What a part, or alpha as a whole, can still pay; never below 0."""
        limit = self.budget.alpha if part is None else self.budget.parts.get(part, 0.0)
        return max(0.0, limit - self.spent(part))

    def _amounts(self, part: str | None) -> list[float]:
        return [c.amount for c in self._rows.values() if part in (None, c.part)]


def of_mode(mode: str, epoch: int, round: int, amount: float) -> Charge:
    """The charge for a mode's tests, made before the first round of each epoch, counted from 1."""
    purpose = "any false alarm" if epoch == 1 else f"any false alarm in epoch {epoch}"
    return Charge(id=f"{MODES} {mode} {epoch}", part=MODES, purpose=purpose, round=round, mode=mode, amount=amount)


def of_drill_down(mode: str, number: int, round: int, alpha: float) -> Charge:
    """The charge for the run's drill-down of this number, counted from 1: alpha / (number (number + 1)).

    These amounts add up to alpha however many there are, so a drill-down can always be paid, and the first, which is
    of the mode that alarmed first, has half.
    """
    return Charge(
        id=f"{SLICES} {mode} {round}",
        part=SLICES,
        purpose=f"false discoveries of drill-down {number}",
        round=round,
        mode=mode,
        amount=alpha / (number * (number + 1)),
    )


def body(charge: Charge) -> dict[str, Any]:
    """A charge as the record keeps it."""
    return asdict(charge)


def _check(where: str, found: Mapping[str, str]) -> None:
    if found:
        raise BadInput(Problem(f"{where}: {name}", what, "give a share of alpha") for name, what in found.items())


def _within(value: float, limit: float) -> bool:
    return value <= limit * (1 + ROUNDING)  # a NaN is within nothing


def _down(value: float) -> str:
    """At most six digits, never more than the value."""
    text = f"{value:.6g}"
    return text if float(text) <= value else f"{value * (1 - 1e-5):.6g}"
