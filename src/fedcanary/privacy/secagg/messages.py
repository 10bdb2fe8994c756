"""The nine messages as values and as bytes; whatever else arrives is refused as `malformed`."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcanary.privacy.secagg.terms import VERSION, Refusal, Step

Rows = tuple[tuple[int, bytes], ...]  # one entry per client: its id and what concerns it


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """`session` is the terms' digest until the roster is known, and the session's from then on."""

    session: bytes

    def to_bytes(self) -> bytes:
        """Tag, then the fields in order: 8 bytes for an integer, a length before bytes, a count before rows."""
        parts = [bytes([VERSION, MESSAGES.index(type(self))])]
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int):
                parts.append(struct.pack("<Q", value))
            elif isinstance(value, bytes):
                parts += (struct.pack("<I", len(value)), value)
            else:
                parts.append(struct.pack("<I", len(value)))
                for client, content in value:
                    parts += (struct.pack("<QI", client, len(content)), content)
        return b"".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Upward(Message):
    """A message from a client, which names itself."""

    client: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Advert(Upward):
    """A client's keys for this round, signed with its long-lived key."""

    mask_key: bytes
    seal_key: bytes
    commitment: bytes  # to the seed of its own mask, so that a false share of it is found out
    signature: bytes

    def signed(self) -> bytes:
        """What the signature is over; the terms' digest stands for version, round and contract."""
        return b"".join(
            [
                *(b"fedcanary advert", self.session, struct.pack("<Q", self.client)),
                *(self.mask_key, self.seal_key, self.commitment),
            ]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster(Message):
    """Everybody who takes part (increasing ids, uint32), and the adverts of the receiver's neighbours."""

    ids: bytes
    adverts: Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares(Upward):
    """For each neighbour, sealed: its shares of the key's seed and of the own mask's seed."""

    sealed: Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery(Message):
    """What the neighbours sealed for the receiver."""

    sealed: Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedInput(Upward):
    """The masked vector, and for each neighbour it is masked with the word that shows this to that neighbour."""

    values: bytes
    acks: Rows

    @property
    def peers(self) -> set[int]:
        """The neighbours it is masked with."""
        return {peer for peer, _ in self.acks}


@dataclass(frozen=True, slots=True, kw_only=True)
class Survivors(Message):
    """Everybody whose masked input is in the sum (increasing ids, uint32), and the receiver's neighbours' words."""

    ids: bytes
    acks: Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement(Upward):
    """A signature over the survivors."""

    signature: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreements(Message):
    """The committee's signatures."""

    signatures: Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmasking(Upward):
    """The seed of the own mask, and one share for each neighbour: which kind follows from the survivors."""

    seed: bytes
    shares: Rows


MESSAGES: tuple[type[Message], ...] = (
    *(Advert, Roster, Shares, Delivery, MaskedInput, Survivors, Agreement, Agreements, Unmasking),
)
ANSWERS: Mapping[Step, type[Upward]] = dict(zip(Step, (Advert, Shares, MaskedInput, Agreement, Unmasking), strict=True))


def decode(data: bytes) -> Message:
    """The message that `to_bytes` wrote. Raises Refusal (`malformed`) on anything else."""
    try:
        if data[0] != VERSION:
            raise ValueError
        kind, at = MESSAGES[data[1]], 2
        values: dict[str, Any] = {}
        for item in fields(kind):
            if item.type == "int":
                (values[item.name],) = struct.unpack_from("<Q", data, at)
                at += 8
            elif item.type == "bytes":
                values[item.name], at = _sized(data, at)
            else:
                (count,) = struct.unpack_from("<I", data, at)
                at += 4
                rows = []
                for _ in range(count):
                    (client,) = struct.unpack_from("<Q", data, at)
                    content, at = _sized(data, at + 8)
                    rows.append((client, content))
                values[item.name] = tuple(rows)
        if at != len(data):
            raise ValueError
    except (ValueError, IndexError, struct.error):
        raise Refusal("malformed") from None
    return kind(**values)


def _sized(data: bytes, at: int) -> tuple[bytes, int]:
    (size,) = struct.unpack_from("<I", data, at)
    end = at + 4 + size
    if end > len(data):
        raise ValueError
    return bytes(data[at + 4 : end]), end


def pack_ids(ids: Iterable[int]) -> bytes:
    """Ids as little-endian uint32."""
    return np.fromiter(ids, dtype="<u4").tobytes()


def unpack_ids(data: bytes, known: npt.NDArray[np.uint32], reason: str) -> set[int]:
    """Increasing ids out of those `known`; anything else is refused."""
    if len(data) % 4:
        raise Refusal(reason, "not a list of ids")
    ids = np.frombuffer(data, dtype="<u4").astype(np.uint32)
    if np.any(ids[1:] <= ids[:-1]):
        raise Refusal(reason, "ids not increasing")
    at = np.searchsorted(known, ids)
    if len(ids) and (at[-1] >= len(known) or np.any(known[at] != ids)):
        raise Refusal(reason, "an id that does not belong there")
    return set(ids.tolist())


def statement(session: bytes, survivors: bytes) -> bytes:
    """What an agreement's signature is over."""
    return b"fedcanary survivors" + session + hashlib.sha256(survivors).digest()
