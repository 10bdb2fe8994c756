"""What a ledger is charged with, and the rules by which a window's charges add up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedcanary.errors import BadInput, Problem
from fedcanary.privacy.ledger.anchor import Head, canonical

Outcome = Literal["released", "aborted"]
Status = Literal["charged", "released", "aborted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Ceilings of every window: epsilon in [0, inf], delta in [0, 1]. Raises BadInput outside them."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        check("budget", _cost_problems(self.epsilon, self.delta))


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What one release costs, and what it pays for. Raises BadInput, naming every field that is not as it should be.

    `id` names the release: charging an id again is the same charge. `panel` names who is asked: panels that a rule
    takes for disjoint must be, so on a client's own ledger all charges name one panel. `mechanism` is whatever the rule
    needs to know, in JSON's types. `epsilon` in [0, inf] (inf: no privacy) and `delta` in [0, 1] are the charge's own.
    """

    id: str
    window: int
    panel: str
    round: int
    mechanism: Mapping[str, Any]
    purpose: str
    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        found = _cost_problems(self.epsilon, self.delta)
        for name in ("id", "panel", "purpose"):
            if not isinstance(value := getattr(self, name), str) or not value:
                found[name] = f"{value!r} is not a non-empty text"
        for name in ("window", "round"):
            if not isinstance(value := getattr(self, name), int):
                found[name] = f"{value!r} is not a whole number"
        try:
            canonical(dict(self.mechanism))
        except (TypeError, ValueError) as error:
            found["mechanism"] = f"has no JSON form ({error})"
        check(f"charge {self.id!r}", found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A charge as it stands in the ledger. An aborted charge stays spent."""

    charge: Charge
    status: Status
    head: Head


Spent = Callable[[Sequence[Charge]], tuple[float, float]]  # a window's charges -> its (epsilon, delta); pure
Fits = Callable[[Sequence[Charge], Charge, Budget], str]  # (the window's charges, the refused one, budget) -> advice


def by_addition(charges: Sequence[Charge]) -> tuple[float, float]:
    """Cost of a window: sums over each panel, the largest sum over panels.

    Basic sequential composition (Dwork & Roth 2014, Theorem 3.16) within a panel; parallel composition (McSherry 2009,
    Theorem 4) across panels, which holds only if no client is in two panels of the window.
    """
    panels: dict[str, list[Charge]] = {}
    for charge in charges:
        panels.setdefault(charge.panel, []).append(charge)
    return (
        max((math.fsum(c.epsilon for c in panel) for panel in panels.values()), default=0.0),
        max((math.fsum(c.delta for c in panel) for panel in panels.values()), default=0.0),
    )


def to_entry(charge: Charge) -> dict[str, Any]:
    """A charge in JSON's types, as it stands on disk."""
    names = ("id", "window", "panel", "round", "purpose")
    mechanism = json.loads(canonical(dict(charge.mechanism)))  # tuples become lists, as they do on disk
    return {"mechanism": mechanism, **{n: getattr(charge, n) for n in names}, **plain(charge)}


def from_entry(entry: Mapping[str, Any]) -> Charge:
    """Inverse of `to_entry`. Raises ValueError, LookupError, TypeError or BadInput if it is none."""
    return Charge(**{**entry, "epsilon": float(entry["epsilon"]), "delta": float(entry["delta"])})


def plain(cost: Budget | Charge) -> dict[str, Any]:
    """Epsilon and delta in JSON, which has no infinity."""
    return {name: "inf" if math.isinf(v := float(getattr(cost, name))) else v for name in ("epsilon", "delta")}


def _cost_problems(epsilon: float, delta: float) -> dict[str, str]:
    found = {}
    if not epsilon >= 0:  # also a NaN
        found["epsilon"] = f"{epsilon!r} is not in [0, inf]"
    if not 0 <= delta <= 1:
        found["delta"] = f"{delta!r} is not in [0, 1]"
    return found


def check(where: str, found: Mapping[str, str], remedy: str = "give it as its documentation says") -> None:
    """Raise BadInput with every problem found, by field."""
    if found:
        raise BadInput(Problem(f"{where}: {name}", what, remedy) for name, what in found.items())
