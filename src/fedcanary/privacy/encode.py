"""A client's readings as one vector of integers whose norm is bounded, and the sums back again.

One bound for the whole message costs less noise than a bound for each number. Notation: K coordinates x_i with a scale
s_i and a zero z_i (`Coord`), w_i = (x_i - z_i) / s_i, W = |w|_2.
    shrink   f = min(1, 2 / (1 + W^2)); the message is v = (f w, 1 - f), of K + 1 coordinates. W <= 1: |v| = W <= 1.
             W > 1: |v|^2 = (4 W^2 + (W^2 - 1)^2) / (1 + W^2)^2 = 1. So |v|_2 <= 1 whatever a client measured, the last
             coordinate says how much was taken, and a client that says nothing is 0 (which is what `zeroed` neighbours
             differ by; for `substituted` ones the sensitivity is 2).
    round    u = (1 - sqrt(K + 1) / UNIT) v, times UNIT, every coordinate to an integer: toward zero, but squares and
             1 - f up, because the tests rely on their not being too small. A coordinate moves by less than 1, the
             vector by less than sqrt(K + 1), so the integers' norm is below UNIT.
Rounding moves a mean by less than one part in UNIT of its scale.

One item's part in a message (unit `example`): `shrink` never moves two w further apart than they were. Inside the unit
ball v is w; outside it is the inverse stereographic image, which scales lengths by 2 / (1 + W^2) <= 1; the two agree on
the sphere, and a straight path between any two w passes through both without ever being stretched. So where one of a
client's n items moves w by at most r / n, it moves v by at most min(2, r / n), and, every coordinate being rounded by
less than 1, the integers by less than UNIT min(2, r / n) + sqrt(K + 1): see `reach`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcanary.types import Array, Coord, missing_bit

Integers = npt.NDArray[np.int64]
UNIT = 1 << 16  # the integer that stands for 1; also the L2 sensitivity of the integer vector


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What a sum of messages says of one probe: total (K,) and noise std (K,) of its coordinates."""

    coords: tuple[str, ...]
    total: Array
    noise_std: Array


@dataclass(frozen=True, slots=True)
class Encoding:
    """Which coordinates of a layout are sent, in which order. The same layout gives the same encoding."""

    layout: Mapping[str, Sequence[Coord]]

    @property
    def sent(self) -> list[tuple[str, Coord]]:
        """(probe, coordinate) for each of the K numbers that leave; whatever has no scale stays."""
        return [(probe, c) for probe, coords in self.layout.items() for c in coords if c.scale is not None]

    @property
    def size(self) -> int:
        """K + 1: the coordinates and the lost mass."""
        return len(self.sent) + 1

    def message(self, readings: Mapping[str, Array]) -> Integers:
        """(K + 1,) integers of L2 norm at most UNIT, from values (K_p,) by probe. Raises ValueError unless finite."""
        found: Integers = self.messages({probe: values[None] for probe, values in readings.items()})[0]
        return found

    def messages(self, readings: Mapping[str, Array]) -> Integers:
        """(n, K + 1) integers for n clients at once, from values (n, K_p) by probe. Raises ValueError unless finite."""
        (sent, own, whole, up), zero, scale = _columns(tuple(map(tuple, self.layout.values())))
        said = [readings[probe] for probe in self.layout]
        table = np.concatenate([*said, np.zeros((len(said[0]), 1))], axis=1)  # the last column is 0: "no such bit"
        # `take` lays rows out one after the other, so that a row's sum is the same in whatever company it comes.
        unsaid = table.take(own, axis=1)
        unsaid = np.where(unsaid > 0, unsaid, table.take(whole, axis=1))
        # 0 for what a client could not say; less, in proportion, for what only some of its items could say
        w = (1.0 - unsaid) * (table.take(sent, axis=1) - zero) / scale
        if not np.isfinite(w).all():
            raise ValueError("a reading is not finite")
        scaled = (UNIT - math.sqrt(len(sent) + 1)) * shrink(w)
        scaled[:, up] = np.ceil(scaled[:, up])
        return np.asarray(scaled.astype(np.int64))  # toward zero

    def reach(self, items: int, moves: Mapping[str, Mapping[str, float]]) -> float:
        """How far one of a client's `items` own items, made unscoreable, moves its message; in units of UNIT.

        At most 2 (any message for any other), and less where each coordinate sent, by probe and name, moves by at most
        `moves` / items (see `OwnProbe.reach` of the probes) and by no more than its bounds allow.
        """
        return reach(min(moves[probe][c.name] / items, c.high - c.low) / (c.scale or 1.0) for probe, c in self.sent)

    def read(self, total: Integers, count: int, std: float) -> tuple[dict[str, Sums], Any, float]:
        """Sums by probe, the lost mass and its noise std, from the noised integer sum (K + 1,) over `count` clients.

        `std` is the standard deviation of the integers' noise. The sums are of f x over the clients that could say x.
        Of many sums (..., K + 1) at once it gives totals (..., K_p) and lost masses (...).
        """
        unit = UNIT - math.sqrt(self.size)
        real, noise = total.astype(np.float64) / unit, std / unit
        lost = real[..., -1]
        found, at = {}, 0
        for probe, coords in self.layout.items():
            sent = [c for c in coords if c.scale is not None]
            scale = np.array([c.scale for c in sent], dtype=np.float64)
            zero = np.array([c.zero for c in sent], dtype=np.float64)
            total_of = real[..., at : at + len(sent)] * scale
            names = tuple(c.name for c in sent)
            # Who could not say a coordinate is not in its sum: counted by its own bit, or else by the probe's.
            bits = [next((b for b in (missing_bit(n), "missing") if b in names), None) for n in names]
            missing = np.zeros_like(total_of)
            for k, bit in enumerate(bits):
                if bit:
                    missing[..., k] = total_of[..., names.index(bit)]
            spread = np.array([scale[names.index(b)] if b else 0.0 for b in bits])
            found[probe] = Sums(
                coords=names,
                total=total_of + zero * (count - lost[..., None] - missing),
                noise_std=np.sqrt(scale**2 + zero**2 * (1 + spread**2)) * noise,
            )
            at += len(sent)
        return found, lost, noise


def reach(steps: Iterable[float]) -> float:
    """How far a message moves, at most, when its K values w move by `steps`; in units of UNIT."""
    moves = list(steps)
    return min(2.0, math.hypot(*moves) + math.sqrt(len(moves) + 1) / UNIT)


def shrink(w: Array) -> Array:
    """(..., K + 1) of L2 norm at most 1: the inverse stereographic image of w (..., K) outside the unit ball."""
    f = np.minimum(1.0, 2.0 / (1.0 + np.square(w).sum(axis=-1, keepdims=True)))
    return np.concatenate([f * w, 1.0 - f], axis=-1)


@cache
def _columns(layout: tuple[tuple[Coord, ...], ...]) -> tuple[tuple[Integers, ...], Array, Array]:
    """Of each coordinate sent, in a table of all values: its column, its own missing bit's, its probe's (-1: none).

    Then which columns of a message are rounded up; and the coordinates' zeros and scales.
    """
    sent, own, whole, kept, first = [], [], [], [], 0
    for coords in layout:
        at = {c.name: first + k for k, c in enumerate(coords)}
        for c in coords:
            if c.scale is not None:
                kept.append(c)
                sent.append(at[c.name])
                own.append(at.get(missing_bit(c.name), -1))
                whole.append(-1 if c.name == "missing" else at.get("missing", -1))
        first += len(coords)
    up = [k for k, c in enumerate(kept) if c.up] + [len(kept)]
    columns = tuple(np.array(k, dtype=np.int64) for k in (sent, own, whole, up))
    zero, scale = (np.array([getattr(c, name) for c in kept], dtype=np.float64) for name in ("zero", "scale"))
    return columns, zero, scale
