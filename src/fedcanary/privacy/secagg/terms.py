"""What everybody knows before a round: the steps, the registration list, the terms; and how a round is refused."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcanary.errors import BadInput, Problem, Refused
from fedcanary.privacy import shamir

VERSION = 1


class Step(StrEnum):
    """The five exchanges, in order."""

    ADVERTISE = "advertise"
    SHARE = "share"
    MASK = "mask"
    AGREE = "agree"
    UNMASK = "unmask"


class Refusal(Refused):
    """A message or a request that one side does not accept; `reason` is the word it is counted under."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}" if detail else reason)


class Aborted(Refused):
    """Too few answered at a step: nothing is released, and the round cannot be taken up again."""

    def __init__(self, step: Step, answered: int, needed: int, what: str = "clients answered") -> None:
        self.step, self.answered, self.needed = step, answered, needed
        super().__init__(f"secure aggregation stopped at step {step!r}: {answered} {what}, {needed} needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """The registration list: each client's long-lived Ed25519 public key (32 raw bytes) by its id (below 2^32).

    Raises:
        BadInput: an id or a key out of range, or one key under two ids (a client that would count twice).
    """

    keys: Mapping[int, bytes]
    ids: npt.NDArray[np.uint32] = field(init=False, repr=False)
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        if any(not 0 <= client < 2**32 or len(key) != 32 for client, key in self.keys.items()):
            raise BadInput.of("registry", "an id outside [0, 2^32), or a key not of 32 bytes", "register it again")
        if len(set(self.keys.values())) < len(self.keys):
            raise BadInput.of("registry", "two clients with the same key", "register each with a key of its own")
        order = sorted(self.keys)
        content = b"".join(struct.pack("<I", client) + self.keys[client] for client in order)
        object.__setattr__(self, "ids", np.array(order, dtype=np.uint32))
        object.__setattr__(self, "digest", hashlib.sha256(b"registry" + content).digest())


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a client agrees to before the round; two parties with other terms refuse each other's messages.

    `round_id` names one aggregation and must never come twice; `contract` and `registry` are digests; vectors are
    (length,) modulo 2^bits; above 64 clients each has `degree` neighbours; `tolerated` is the share of the clients
    that advertised which may drop out; a client helps to unmask no sum of fewer than `minimum` clients. With a
    `bound`, a client masks only entries in [-bound, bound], and only in a round too small for them to overflow.
    """

    round_id: str
    contract: bytes
    registry: bytes
    length: int
    bits: int = 32
    degree: int = 30
    tolerated: float = 0.3
    minimum: int = 2
    bound: int | None = None

    def __post_init__(self) -> None:
        checks = (
            ("length", self.length >= 1, "at least 1"),
            ("bits", 2 <= self.bits <= 64, "between 2 and 64"),
            # with fewer, too many clients would by chance be left with less than half of their neighbours
            ("degree", self.degree >= 24 and self.degree % 2 == 0, "even and at least 24"),
            ("tolerated", 0 <= self.tolerated <= 0.3, "between 0 and 0.3"),
            ("minimum", self.minimum >= 2, "at least 2: a sum of one vector is that vector"),
            ("bound", self.bound is None or self.bound >= 1, "at least 1"),
        )
        wrong = [
            Problem(name, f"{getattr(self, name)} cannot be", f"choose it {rule}")
            for name, good, rule in checks
            if not good
        ]
        if wrong:
            raise BadInput(wrong)

    @property
    def digest(self) -> bytes:
        """SHA-256 of all of it and of the protocol's version."""
        values = [str(getattr(self, item.name)) for item in fields(self)]
        return hashlib.sha256(repr([VERSION, *values]).encode()).digest()

    @property
    def dtype(self) -> np.dtype[Any]:
        """Little-endian type of an entry."""
        return np.dtype("<u4" if self.bits <= 32 else "<u8")

    def needed(self, clients: int) -> int:
        """How many of so many clients must answer each step."""
        return max(self.minimum, shamir.threshold(clients, clients, self.dropped(clients)))

    def dropped(self, clients: int) -> int:
        """How many of so many clients may drop out."""
        return math.floor(self.tolerated * clients + 1e-9)

    def outside(self, vector: npt.NDArray[Any]) -> bool:
        """Whether an entry is not below 2^bits."""
        return bool(int(vector.max()) >> self.bits)
