"""Slices: what a client says about its own place in the federation, in a drill-down and never else.

A slice is a value of a client's attribute, such as `region=north`; of each attribute a client has one value or none.
A drill-down asks about one stream of one mode. For each of its values a client then says the stream's number (mirrored
where less is better, so that negative is worse), the number's square, and that it is one of those who could say it;
everything else it says of slices is 0, and outside a drill-down everything is. Zeros use nothing of the message's
norm, so that these coordinates cost something only in the rounds in which they are asked for (see `cost`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

import numpy as np

from fedcanary.probes.base import CLIP, DIFFERENCE, SQUARE
from fedcanary.types import Array, Coord

SLICES: Final = "slices"  # the name among the releases
VERSION: Final = "1"
# A count's noise is this times the readings' noise. It enters the tests times the margin, so it may be coarse, and
# leave the message's norm to what is tested.
MEMBER: Final = 2.0
Kind = Literal["mean", "share"]
Values = Mapping[str, Sequence[str]]  # attribute -> its values


def labels(values: Values) -> tuple[str, ...]:
    """Every slice by name: `attribute=value`."""
    return tuple(f"{attribute}={value}" for attribute, known in values.items() for value in known)


def difference_of(label: str) -> str:
    """Name of a slice's sum of differences."""
    return f"difference:{label}"


def square_of(label: str) -> str:
    """Name of a slice's sum of squares."""
    return f"square:{label}"


def clients_of(label: str) -> str:
    """Name of a slice's count."""
    return f"clients:{label}"


def coords(values: Values) -> tuple[Coord, ...]:
    """Three coordinates for each slice."""
    return tuple(
        coord
        for label in labels(values)
        for coord in (
            Coord(
                name=difference_of(label),
                low=-CLIP,
                high=CLIP,
                purpose=f"only in a drill-down: the stream asked for, if the client is {label}; negative is worse",
                scale=DIFFERENCE,
            ),
            Coord(
                name=square_of(label),
                low=0.0,
                high=CLIP**2,
                purpose=f"only in a drill-down: {difference_of(label)} squared, for the tests' variance",
                scale=SQUARE,
                up=True,
            ),
            Coord(
                name=clients_of(label),
                low=0.0,
                high=1.0,
                purpose=f"only in a drill-down: 1 if the client is {label} and could say what was asked",
                scale=MEMBER,
                up=True,
            ),
        )
    )


def nothing(values: Values) -> Array:
    """(3 slices,) what a client says outside a drill-down, or when it cannot say what is asked."""
    return np.zeros(3 * len(labels(values)))


def answer(values: Values, own: Mapping[str, str], number: float, kind: Kind, sign: int) -> Array:
    """(3 slices,) what a client with the attributes `own` says when its number of the stream asked for is `number`.

    A share's number is a bit, 1 being bad; it is said as a difference of -CLIP, and needs no square.
    """
    bad = kind == "share"
    said = -CLIP * number if bad else sign * number
    found = []
    for attribute, known in values.items():
        for value in known:
            found += [said, 0.0 if bad else said**2, 1.0] if own.get(attribute) == value else [0.0, 0.0, 0.0]
    return np.array(found, dtype=np.float64)


def cost(attributes: int, other: float = 1.0) -> tuple[float, float]:
    """What a drill-down takes of a client's message: the share lost at the least and at the most.

    Of a message whose squared norm is `other` without it, and with a value in so many attributes: the bits alone, or
    also differences at the clip. The rule is that of `privacy.encode`: f = min(1, 2 / (1 + W^2)), and 1 - f is lost.

    >>> [round(lost, 3) for lost in cost(1)], [round(lost, 3) for lost in cost(2)]
    ([0.111, 0.241], [0.2, 0.389])
    """
    bits = attributes / MEMBER**2
    differences = attributes * ((CLIP / DIFFERENCE) ** 2 + (CLIP**2 / SQUARE) ** 2)
    least, most = (1 - min(1.0, 2 / (1 + other + more)) for more in (bits, bits + differences))
    return least, most
