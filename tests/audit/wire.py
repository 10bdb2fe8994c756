"""Everything the server's side receives in a run, and everything that a client may not have said to it.

The transport is in this process, so "the server's side" is: what `secagg.Server.collect` is given (as bytes), what a
`Server` object holds at any time, and what `LocalClients.work` hands on besides the sealed vector. The sealed vector
itself passes from `work` through `Gate.put` into `Gate._sealed`, from which `secagg` masks it: there the gate stands in
for the client, whose vector it is until it is masked. No `Server` is ever given it, which the tests hold too.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcanary import pipeline
from fedcanary.engines import local
from fedcanary.engines.setup import Setup
from fedcanary.privacy import secagg
from fedcanary.privacy.release import Gate
from fedcanary.privacy.seal import FIXED, seal
from fedcanary.privacy.secagg.messages import MaskedInput, Message

Walked = set[bytes]


@dataclass
class Wire:
    """What was captured. Secrets are numbers by what they are; windows of 8 bytes of each are looked for."""

    messages: list[tuple[int, Message]] = field(default_factory=list)  # in the order they arrived, with their sender
    beside: list[Mapping[str, Any]] = field(default_factory=list)  # attributes of each `Sent`, but for the vector
    held: Walked = field(default_factory=set)  # every value that a Server, or a Gate but for `_sealed`, ever held
    secrets: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    sealed: list[np.ndarray] = field(default_factory=list)
    counts: set[int] = field(default_factory=set)  # of training examples

    @property
    def masked(self) -> list[bytes]:
        """The masked vectors."""
        return [message.values for _, message in self.messages if isinstance(message, MaskedInput)]

    def needles(self) -> dict[str, np.ndarray]:
        """By kind, every way in which 8 bytes could say a secret number (for 4-byte types, two neighbours)."""
        found: dict[str, np.ndarray] = {}
        for kind, arrays in self.secrets.items():
            ways = []
            for values in arrays:
                exact = values[_telling(values)]
                ways += [exact.astype("<f8").view("<u8"), _pairs(values.astype("<f4")), _fixed(exact)]
            found[kind] = np.concatenate(ways)
        whole = np.concatenate(self.sealed or [np.zeros(0, dtype=np.int64)])
        found["sealed or encoded vector"] = whole[np.abs(whole) >= 1 << 12].view("<u8")  # modulo 2^64, too
        n = np.array(sorted(self.counts), dtype="<u8")
        found["number of examples"] = np.concatenate([n, n << np.uint64(32), n.astype("<f8").view("<u8")])
        return found

    def leaks(self, received: Iterable[bytes]) -> dict[str, int]:
        """How many secrets of each kind are in these bytes, at any offset."""
        windows = np.unique(np.concatenate([_windows(data) for data in received] or [np.zeros(0, dtype="<u8")]))
        counted = {kind: int(np.isin(needles, windows).sum()) for kind, needles in self.needles().items()}
        return {kind: count for kind, count in counted.items() if count}

    def said_in(self, text: str) -> dict[str, int]:
        """How many secrets of each kind a text says in decimals: in double precision, or in single."""
        tokens = re.findall(r"-?\d+\.\d+(?:e[-+]?\d+)?", text)
        said = np.unique(np.abs(np.array([float(token) for token in tokens])))
        found = {}
        for kind, arrays in self.secrets.items():
            values = np.abs(np.concatenate([a[_telling(a)] for a in arrays]))
            both = np.concatenate([values, values.astype("<f4").astype("<f8")])
            if count := int(np.isin(both, said).sum()):
                found[kind] = count
        return found

    def everything(self) -> list[bytes]:
        """All bytes of the server's side.

        A session's random bytes stand apart from the fields after them: a last byte of 17 before the eight zero bytes
        of sender 0 would read as a client's 17 examples, one run in twenty.
        """
        beside = set().union(*(walk(one) for one in self.beside)) if self.beside else set()
        sessions = {message.session for _, message in self.messages}
        plain = (dataclasses.replace(m, session=b"\xff" * len(m.session)).to_bytes() for _, m in self.messages)
        return [*plain, *sessions, *self.held, *beside]


def _telling(values: np.ndarray) -> np.ndarray:
    """Which numbers are somebody's: not 0, 1 or a bound, whose bytes mean nothing."""
    return np.array([float(f"{v:.6g}") != v for v in values.tolist()], dtype=bool)


def _pairs(values: np.ndarray) -> np.ndarray:
    both = np.stack([values[:-1], values[1:]], axis=1)
    return np.ascontiguousarray(both[_telling(both[:, 0]) & _telling(both[:, 1])]).view("<u8").ravel()


def _fixed(values: np.ndarray) -> np.ndarray:
    whole = np.trunc(values * FIXED).astype("<i8")
    return whole[np.abs(whole) >= 1 << 16].view("<u8")


def _windows(data: bytes) -> np.ndarray:
    parts = [np.frombuffer(data, dtype="<u8", offset=o, count=(len(data) - o) // 8) for o in range(8) if len(data) > o]
    return np.unique(np.concatenate(parts or [np.zeros(0, dtype="<u8")]))


def walk(value: Any, seen: set[int] | None = None) -> Walked:
    """The bytes of every text, number and array that can be reached from a value without calling anything."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return set()
    seen.add(id(value))
    match value:
        case None | bool():
            return set()
        case bytes() | bytearray():
            return {bytes(value)}
        case str():
            return {value.encode()}
        case int() | np.integer():
            return {int(value).to_bytes(40, "little", signed=True)}
        case float() | np.floating():
            return {struct.pack("<d", value)}
        case np.ndarray():
            return {value.tobytes()}
        case Mapping():
            parts: Iterator[Any] = iter([*value.keys(), *value.values()])
        case list() | tuple() | set() | frozenset():
            parts = iter(value)
        case _ if type(value).__module__.startswith(("fedcanary", "wire", "test_wire")) and not callable(value):
            names = {name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())}
            parts = iter(
                [getattr(value, n) for n in names | getattr(value, "__dict__", {}).keys() if hasattr(value, n)]
            )
        case _:
            return set()
    return set().union(*(walk(part, seen) for part in parts))


def tap(setup: Setup, out: Path, plant: Callable[[pytest.MonkeyPatch], None] | None = None) -> Wire:
    """Run the study with every wire tapped. `plant` patches a bug in before the taps are set."""
    wire = Wire()
    collect, close, work, train = secagg.Server.collect, Gate.close, local.LocalClients.work, setup.method.train

    with pytest.MonkeyPatch.context() as patch:
        if plant is not None:
            plant(patch)
            work = local.LocalClients.work

        def sealing(message, layout, terms, round, client):
            vector = seal(message, layout, terms, round, client)
            wire.secrets["reading"] += message.readings.values()
            wire.secrets["update"].append(message.update[:-1])
            wire.sealed += [vector, seal(message, layout, replace(terms, trust="central"), round, client)]
            return vector

        def collecting(self, sender, message):
            wire.messages.append((sender, secagg.decode(message) if isinstance(message, bytes) else message))
            taken = collect(self, sender, message)
            wire.held |= walk(self)
            return taken

        def closing(self, masked=None):
            found = close(self, masked)
            kept = {n: v for n, v in vars(self).items() if n not in ("_sealed", "_registration", "_charge")}
            wire.held |= walk(kept) | walk(found)
            return found

        def working(self, asked):
            for sent in work(self, asked):
                for one in sent:
                    names = {f.name for f in dataclasses.fields(one)} | getattr(one, "__dict__", {}).keys()
                    wire.beside.append({name: getattr(one, name) for name in names - {"vector"}})
                yield sent

        def training(held, fit):
            trained = train(held, fit)
            wire.secrets["loss"].append(np.asarray(trained.loss, dtype=np.float64))
            return trained

        patch.setattr(local, "seal", sealing)
        patch.setattr(secagg.Server, "collect", collecting)
        patch.setattr(Gate, "close", closing)
        patch.setattr(local.LocalClients, "work", working)
        patch.setattr(setup.method, "train", training)
        pipeline.run(setup, out)
    wire.counts = {len(setup.population.items(client, "train")) for client in range(len(setup.population))}
    return wire
