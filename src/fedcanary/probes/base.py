"""What a probe is: it compares models on the same items and says K bounded numbers.

Probes see choice probabilities, never models or tokens, so each of the six modes is a page of numpy.

Laws (tests/contracts/test_probes.py holds every probe to them)
    every value lies within its coordinate's bounds, whatever the view
    the same view gives the same reading, and the order of a client's own items does not matter
    items that cannot be scored are counted in `unscoreable` and never enter a value
    a client that can say nothing says so: `missing` is 1, and so is every other missing bit; all else is 0
    what a client cannot say of a part is 0 with that part's own missing bit at 1, so that a mean can leave it out
    a probe that is not `own` is the same whatever the client's own items are, but for its details (no scale)
    `read_by_item` of a probe that is `own`: one own item moves what is sent by at most `reach` over their number
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from fedcanary.types import Array, Coord, Item, Mode, Reading, Role, Suite, missing_bit

Which = Literal["base", "received", "personalized"]
CLIP = 0.25  # bound on a client's paired difference; see docs/modes.md
# How the norm of a private message is shared out (see `Coord.scale`): chosen so that unplanted clients stay below it.
DIFFERENCE, SQUARE, BIT, SEVERE_BIT, MISSING, LEVEL = 0.45, 0.225, 1.25, 2.5, 0.6, 1.0
SEVERE_NAME = "severe"
SEVERE = 0.8 * CLIP  # a client that loses more is severely harmed, in any mode
NATS = 1.0  # bound on the change of one free text's likelihood, which has no scale of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Choice probabilities (n, C) of three models on the same n items; an unscoreable item is a row of NaN.

    An item that one of the models could not score is unscoreable for all: every comparison is on the same items.
    """

    items: tuple[Item, ...]
    base: Array
    received: Array
    personalized: Array

    def __post_init__(self) -> None:
        tables = {"base": self.base, "received": self.received, "personalized": self.personalized}
        blank = np.any([np.isnan(table).any(axis=1) for table in tables.values()], axis=0)
        if blank.any():
            for which, table in tables.items():
                object.__setattr__(self, which, np.where(blank[:, None], np.nan, table))

    def probability(self, which: Which) -> Array:
        """(n, C) of one model."""
        table: Array = getattr(self, which)
        return table

    def right(self, which: Which) -> Array:
        """(n,) probability of the right answer; NaN where there is none or the item could not be scored."""
        answers = np.array([-1 if item.answer is None else item.answer for item in self.items], dtype=np.int64)
        table = self.probability(which)
        picked = table[np.arange(len(answers)), np.maximum(answers, 0)] if len(answers) else np.zeros(0)
        return np.where(answers >= 0, picked, np.nan)

    def correct(self, which: Which) -> Array:
        """(n,) 1 where the right answer is the likeliest, 0 where not, NaN as in `right`; per-token for free text."""
        right, table = self.right(which), self.probability(which)
        best = np.nanmax(np.where(np.isnan(table), -1.0, table), axis=1) if len(table) else np.zeros(0)
        alone = np.array([len(item.choices) == 1 for item in self.items], dtype=bool)
        hit = np.where(alone, right, (right >= best - 1e-12).astype(float))
        return np.where(np.isnan(right), np.nan, hit)

    def change(self, before: Which, after: Which) -> Array:
        """(n,) what the right answer gained from one model to the other; NaN as in `right`.

        With choices, the difference of its probability. A free text's likelihood per token has no fixed scale (.04 is
        a good one), so it is compared in logarithms: nats per token, clipped to [-NATS, NATS].
        """
        old, new = self.right(before), self.right(after)
        alone = np.array([len(item.choices) == 1 for item in self.items], dtype=bool)
        tiny = np.finfo(np.float64).tiny
        nats = np.log(np.maximum(new, tiny)) - np.log(np.maximum(old, tiny))
        return np.where(alone, np.clip(nats, -NATS, NATS), new - old)

    def only(self, keep: Sequence[bool] | np.ndarray) -> Answers:
        """The items that are to be kept."""
        mask = np.asarray(keep, dtype=bool)
        return Answers(
            items=tuple(item for item, k in zip(self.items, mask, strict=True) if k),
            base=self.base[mask],
            received=self.received[mask],
            personalized=self.personalized[mask],
        )

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientView:
    """All that a client's probes may look at: its own held-out items, and the public suites by role."""

    local: Answers
    suites: Mapping[Role, Answers]
    domains: frozenset[str] = frozenset()  # the client's own domains
    replies: Mapping[Which, Sequence[str]] | None = None  # to the unsafe prompts, if the study asks for replies

    def public(self) -> ClientView:
        """What is left without the client's own items: nothing of it depends on them, but for the three models."""
        return replace(self, local=self.local.only(np.zeros(len(self.local), dtype=bool)))

    def suite(self, role: Role) -> Answers | None:
        """Answers on a role's items that this client is asked, or None if there are none."""
        answers = self.suites.get(role)
        if answers is None:
            return None
        kept = [relevant(role, item, self.domains) for item in answers.items]
        return answers if all(kept) else answers.only(kept) if any(kept) else None


class Probe(Protocol):
    """One mode's instrument. `own`: what it sends is about the client's own items (then it is an `OwnProbe`)."""

    mode: ClassVar[Mode | None]
    name: ClassVar[str]
    version: ClassVar[str]
    unit: ClassVar[str]
    own: ClassVar[bool]

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the mode that are tested apart; empty where the public items allow none."""

    @property
    def coords(self) -> tuple[Coord, ...]:
        """The K numbers that may leave a client."""

    def read(self, view: ClientView) -> Reading:
        """Measure one client."""


@runtime_checkable
class OwnProbe(Probe, Protocol):
    """A probe of the client's own n items, which can also be read so that no single item moves it far.

    Then `missing` is the share of the items that could not be scored, and a coordinate x that is sent stands for
    u = (1 - missing) (x - zero): a mean over all n items, to which those that could not be scored add nothing.
    """

    @property
    def reach(self) -> Mapping[str, float]:
        """For every coordinate that is sent: n times how far u moves, at most, when one item becomes unscoreable.

        Replacing an item by another is two such moves. With `missing` itself it is the bit that moves.
        """

    def read_by_item(self, view: ClientView) -> Reading:
        """Measure one client, with the same coordinates and bounds as `read`."""


def relevant(role: Role, item: Item, domains: frozenset[str]) -> bool:
    """Whether a client with these domains is asked the item: calibration inside its domains, mode 5 outside them.

    Items without a domain, and clients that name none, are asked everything but mode 5.
    """
    if role == Role.DOMAIN:
        return item.domain is not None and item.domain not in domains
    return role != Role.CALIBRATION or not domains or item.domain is None or item.domain in domains


def paired_coords(what: str) -> tuple[Coord, ...]:
    """The coordinates of a mode with a single part: a clipped difference, its square, two bits of harm, missing."""
    return (
        *_difference("delta", "square", what),
        Coord(name="tail", low=0.0, high=1.0, purpose="1 if delta is beyond -tau"),
        severe_coord("delta"),
        missing_coord("missing", "1 if the client could not score this mode"),
    )


def paired_values(delta: float, tail: float) -> list[float]:
    """Values of `paired_coords` for an unclipped difference; NaN means the client has nothing to say."""
    if not np.isfinite(delta):
        return [0.0, 0.0, 0.0, 0.0, 1.0]
    clipped = float(np.clip(delta, -CLIP, CLIP))
    return [clipped, clipped**2, float(delta < -tail), float(delta < -SEVERE), 0.0]


def parts_coords(parts: Mapping[str, str]) -> tuple[Coord, ...]:
    """Coordinates of a mode with several parts that are tested apart, because a gain in one must not hide a loss.

    `parts` maps a part's name to what it is. Each has a clipped difference, its square, and its own missing bit.
    """
    return (
        *(
            coord
            for name, what in parts.items()
            for coord in (
                *_difference(name, f"{name}_square", what),
                missing_coord(missing_bit(name), f"1 if the client could not say {name}"),
            )
        ),
        Coord(name="tail", low=0.0, high=1.0, purpose="1 if any part is beyond -tau"),
        severe_coord("any part"),
        Coord(name="missing", low=0.0, high=1.0, purpose="1 if the client could score no part of this mode"),
    )


def parts_values(deltas: Sequence[float], tail: float) -> list[float]:
    """Values of `parts_coords` for the parts' unclipped differences; NaN means nothing to say about that part."""
    values, beyond, severe = [], 0.0, 0.0
    for delta in deltas:
        clipped, square, below, far, missing = paired_values(delta, tail)
        values += [clipped, square, missing]
        beyond, severe = max(beyond, below), max(severe, far)
    return [*values, beyond, severe, float(not np.isfinite(deltas).any())]


def beside(name: str, purpose: str, low: float = -1.0, high: float = 1.0) -> tuple[Coord, Coord]:
    """A number beside a mode that a client may be unable to say, and the bit that says so."""
    said = Coord(name=missing_bit(name), low=0.0, high=1.0, purpose=f"1 if the client could not say {name}")
    return Coord(name=name, low=low, high=high, purpose=purpose), said


def beside_value(value: float, low: float = -1.0, high: float = 1.0) -> list[float]:
    """Values of `beside`; NaN means the client could not say it."""
    return [bounded(value, low, high), float(not np.isfinite(value))]


def difference_coord(name: str, what: str) -> Coord:
    """A clipped paired difference that is tested."""
    return Coord(name=name, low=-CLIP, high=CLIP, purpose=what, scale=DIFFERENCE)


def square_coord(name: str, of: str) -> Coord:
    """Its square, without which no test knows its variance."""
    what = f"{of} squared, for the tests' variance"
    return Coord(name=name, low=0.0, high=CLIP**2, purpose=what, scale=SQUARE, up=True)


def severe_coord(of: str) -> Coord:
    """The bit of a severely harmed client, without which a mean would hide harm that is concentrated in few."""
    purpose = f"1 if {of} fell by more than {SEVERE:g}"
    return Coord(name=SEVERE_NAME, low=0.0, high=1.0, purpose=purpose, scale=SEVERE_BIT)


def asked(coords: Sequence[Coord], severe: bool) -> tuple[Coord, ...]:
    """The coordinates as they are sent: a severe bit that no test asks for stays at the client."""
    return tuple(replace(c, scale=None) if c.name == SEVERE_NAME and not severe else c for c in coords)


def missing_coord(name: str, what: str) -> Coord:
    """The bit of a client that cannot say what is tested."""
    return Coord(name=name, low=0.0, high=1.0, purpose=what, scale=MISSING)


def _difference(name: str, square: str, what: str) -> tuple[Coord, Coord]:
    return difference_coord(name, f"{what}; negative is worse; clipped"), square_coord(square, name)


def bounded(value: float, low: float = -1.0, high: float = 1.0) -> float:
    """The value inside its bounds; 0 (or the nearest bound) where it is not finite."""
    return float(np.clip(value, low, high)) if np.isfinite(value) else float(np.clip(0.0, low, high))


def mean(values: Array) -> float:
    """Mean of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def unscored(values: Array) -> float:
    """Share of NaN among n values; 1 if there are none."""
    return float(np.isnan(values).mean()) if values.size else 1.0


def change(answers: Answers | None, before: Which, after: Which) -> float:
    """Mean of `Answers.change` over the items that could be scored; NaN if there are none."""
    return float("nan") if answers is None else mean(answers.change(before, after))


def split_safety(safety: Answers | None) -> dict[str, Answers | None]:
    """The unsafe prompts, whose right answer is to refuse (choice 0), and their safe look-alikes, apart."""
    if safety is None:
        return {"refusal": None, "compliance": None}
    refuse = np.array([item.answer == 0 for item in safety.items], dtype=bool)
    comply = np.array([item.answer is not None and item.answer != 0 for item in safety.items], dtype=bool)
    return {"refusal": safety.only(refuse), "compliance": safety.only(comply)}


def reading(probe: Probe, values: Sequence[float], *answers: Answers | None) -> Reading:
    """Build a reading, counting what was scored and what was not in the answers it looked at.

    Where the values say `missing`, so do all the others: nothing that only some of the clients could say is in a mean.
    """
    names = [coord.name for coord in probe.coords]
    if "missing" in names and values[names.index("missing")] == 1.0:
        values = [float(name.endswith("missing")) for name in names]
    tables = [a.personalized for a in answers if a is not None]
    unscoreable = sum(int(np.isnan(t).all(axis=1).sum()) for t in tables if len(t))
    return Reading(
        probe=probe.name,
        values=np.asarray(values, dtype=np.float64),
        scored=sum(len(t) for t in tables) - unscoreable,
        unscoreable=unscoreable,
    )


def merge(suites: Sequence[Suite], role: Role) -> tuple[Item, ...]:
    """All items of a role, in the order of the suites."""
    return tuple(item for suite in suites if suite.role == role for item in suite.items)
