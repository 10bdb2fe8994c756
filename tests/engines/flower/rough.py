"""A federation in rough weather: whole runs in this process over time that passes only when somebody waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from federation import FIRST, Federation, Server
from flwr.app import Message

from fedcanary.engines.flower.certificates import REGISTRY, load_registry
from fedcanary.engines.flower.clients import FlowerClients, Patience
from fedcanary.engines.flower.exchange import Link
from fedcanary.engines.flower.grid import Fault
from fedcanary.engines.flower.node import Node
from fedcanary.engines.flower.wire import Ask, data_of, decode_asks
from fedcanary.engines.setup import Setup
from fedcanary.engines.verify import verify
from fedcanary.pipeline import replay
from fedcanary.privacy.secagg import Registry
from fedcanary.record import RunRecord
from oracles.few import bare

Faults = Callable[[Message], Fault | None]


class Clock:
    """Seconds that pass only in `sleep`."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.001)


class Rough(Federation):
    """A federation with a clock of its own."""

    def __init__(self, setup: Setup, out: Path, **grid: Any) -> None:
        self.clock = Clock()
        self.odd: dict[int, Node] = {}  # in place of a client's own node
        super().__init__(setup, out, clock=self.clock, **grid)

    def node(self, client: int) -> Node:
        return self.odd.get(client) or super().node(client)

    def server(self, **more: Any) -> FlowerClients:
        keys = {client: member.key for client, member in load_registry(self.out / REGISTRY).items()}
        self.link = Link(self.grid, poll=1.0, clock=self.clock, sleep=self.clock.sleep)
        patience = more.pop("patience", Patience(train=60.0, step=20.0, nodes=100.0))
        self.clients = Server(self.setup, self.out, self.link, Registry(keys=keys), patience=patience, **more)
        return self.clients


def study(count: int = 6, rounds: int = 3, **tables: Any) -> Setup:
    """Clients of one panel that may drop out by 30%, under secure aggregation with simulated noise."""
    privacy = {"min_cohort": 3, "panel": "same", "noise": "simulated", **tables.pop("privacy", {})}
    return bare(count, {"rounds": rounds, "seed": 5, "privacy": privacy, **tables})


def asks(message: Message) -> dict[str, Ask]:
    """What a message asks, by kind."""
    return {ask.kind: ask for ask in decode_asks(data_of(message.content), 1 << 24)}


def client_of(message: Message) -> int:
    return message.metadata.dst_node_id - FIRST


def on(kind: str, fault: Fault, clients: Iterable[int] = (2,), rounds: Iterable[int] = (2,), times: int = 1) -> Faults:
    """A fault in the first so many messages to each of these clients that ask this of this round."""
    left = {(client, round): times for client in clients for round in rounds}

    def decide(message: Message) -> Fault | None:
        ask = asks(message).get(kind)
        if ask is None:
            return None
        about = client_of(message), int(ask.fields.get("round", 0))
        if left.get(about, 0) <= 0:
            return None
        left[about] -= 1
        return fault

    return decide


def kept(out: Path) -> dict[str, bytes]:
    """The record and the adapters of a run."""
    files = [out / "record.jsonl", *sorted((out / "adapters").rglob("*.safetensors"))]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def intact(out: Path) -> RunRecord:
    """The record of a run that ended: verified, replayed, and no release below the floor or without its charge."""
    record = RunRecord.load(out)
    assert verify(out)["ended"]
    assert replay(record) == [(body["round"], body["evidence"]) for body in record.of("round")]
    assert [body["round"] for body in record.of("round")] == list(range(1, record.header["study"]["rounds"] + 1))
    floor = record.header["study"]["privacy"]["min_cohort"]
    for round, released in record.releases().items():
        assert all(release.count >= floor for release in released.values()), round
    charges = [body["id"] for body in record.of("charge")]
    assert len(charges) == len(set(charges))
    return record
