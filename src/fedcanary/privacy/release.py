"""THE ONLY DOOR: nothing a client measured or trained reaches the server except through `Gate.close`.

Clients put their messages in; sums come out, after the charge for them has been written down. Everything a server-side
function receives is a `Release`, and this file is the only one that builds them (tests/contracts/test_door.py reads
the source tree to keep that true).

Trust `none` sends sums without noise. It protects nothing: its event is `NonPrivate` and its epsilon is infinite.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedcanary.errors import FedcanaryError
from fedcanary.types import Array, Coord, Release

Trust = Literal["none"]
UPDATE = "update"  # the adapter update's name among the releases


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What a round's releases cost, written to the ledger before they are made."""

    id: str
    round: int
    event: str
    epsilon: float
    delta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What one client puts into the sum: a vector for each probe, and the weighted update of its shared tensors.

    `update` is (weight * change..., weight), so that the sum carries its own divisor.
    """

    readings: Mapping[str, Array]
    update: Array


class Gate:
    """One round's passage through the door: `put` every client's message, then `close` once."""

    def __init__(
        self, round: int, layout: Mapping[str, Sequence[Coord]], trust: Trust, charge: Callable[[Charge], None]
    ) -> None:
        if trust != "none":
            raise FedcanaryError(f"no mechanism for trust {trust!r}")
        self._round = round
        self._layout = {name: tuple(coords) for name, coords in layout.items()}
        self._charge = charge
        self._totals: dict[str, Array] = {}
        self._count = 0
        self._closed = False

    def put(self, message: Message) -> None:
        """Add a client's message to the sums.

        Whatever the layout does not say, and values outside their bounds, are the client's bug: the message is refused
        whole.
        """
        if self._closed:
            raise FedcanaryError("a message came after its round was closed")
        if message.readings.keys() != self._layout.keys():
            raise FedcanaryError(f"a message with {sorted(message.readings)} where {sorted(self._layout)} may pass")
        for name, coords in self._layout.items():
            values = message.readings[name]
            low, high = np.array([[c.low, c.high] for c in coords]).reshape(-1, 2).T
            if values.shape != low.shape or not np.all((values >= low) & (values <= high)):  # also refuses NaN
                raise FedcanaryError(f"a reading of {name} lies outside its bounds")
        before = self._totals.get(UPDATE, message.update)
        if message.update.ndim != 1 or message.update.shape != before.shape or not np.all(np.isfinite(message.update)):
            raise FedcanaryError("an update is not finite, or not of the others' size")
        for name, values in {**message.readings, UPDATE: message.update}.items():
            total = self._totals.get(name)
            self._totals[name] = values.astype(np.float64) if total is None else total + values
        self._count += 1

    def close(self) -> dict[str, Release]:
        """Write the charge, then release the sums, by probe name; empty if no client sent anything.

        A gate closes once: a second look at the same sums would be a second release.
        """
        if self._closed:
            raise FedcanaryError(f"round {self._round} was released before")
        self._closed = True
        if self._count == 0:
            return {}
        digest = hashlib.blake2b(f"{self._round}".encode(), digest_size=8)
        for name in sorted(self._totals):
            digest.update(f"|{name}:{len(self._totals[name])}".encode())
        charge = Charge(id=digest.hexdigest(), round=self._round, event="NonPrivate", epsilon=math.inf, delta=0.0)
        self._charge(charge)
        return {name: self._release(name, total, charge) for name, total in self._totals.items()}

    def _release(self, name: str, total: Array, charge: Charge) -> Release:
        return Release(
            round=self._round,
            probe=name,
            coords=tuple(coord.name for coord in self._layout.get(name, ())),
            total=total,
            count=float(self._count),
            noise_std=np.zeros_like(total),
            sensitivity=math.inf,
            event=charge.event,
            charge_id=charge.id,
        )


def restore(body: Mapping[str, Any]) -> Release:
    """A release read back from a record, exactly as it was made; nothing passes the door a second time."""
    return Release(
        round=int(body["round"]),
        probe=str(body["probe"]),
        coords=tuple(body["coords"]),
        total=np.array(body["total"], dtype=np.float64),
        count=float(body["count"]),
        noise_std=np.array(body["noise_std"], dtype=np.float64),
        sensitivity=float(body["sensitivity"]),
        event=str(body["event"]),
        charge_id=str(body["charge_id"]),
    )
