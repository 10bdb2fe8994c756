"""Secure sums asked of nodes without a transport, by a server that may do as it likes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from federation import Federation
from safetensors.torch import save

from fedcanary.engines.flower.node import AGREE, KEYS, SHARE, TRAIN, UNMASK
from fedcanary.engines.flower.wire import Answer, Ask, Value
from fedcanary.engines.places import place
from fedcanary.engines.protection import LEDGER
from fedcanary.privacy import ledger as ledgers
from fedcanary.privacy import secagg
from fedcanary.privacy.secagg.messages import Message


@contextmanager
def memory() -> Iterator[Path]:
    """A folder that no disk has to be waited for, where there is one."""
    room = Path("/dev/shm")  # noqa: S108  # memory; files in it have names of their own
    with tempfile.TemporaryDirectory(dir=room if room.is_dir() else None) as folder:
        yield Path(folder)


def train_fields(far: Federation, round: int, cohort: int, **changed: Value) -> dict[str, Value]:
    """What an honest server asks with a training."""
    name = far.setup.lora.targets[0]
    request = far.host.clients.consent.request(round, cohort)
    shared = save({f"{name}.lora_A": torch.zeros(2, 3)})
    line = ",".join(map(str, range(round)))
    return {"round": round, "request": request.model_dump_json(), "shared": shared, "line": line, **changed}


class Greedy(secagg.Server):
    """Closes every step with whatever it has."""

    def _close(self, step: secagg.Step, needed: int) -> dict[int, Any]:
        return super()._close(step, 0)


class Sum:
    """One secure sum of one round, step by step. `asked` and `answers` are the latest step's, by client."""

    def __init__(
        self,
        far: Federation,
        name: str = "a",
        round: int = 1,
        clients: Collection[int] | None = None,
        cohort: int | None = None,
        server: type[secagg.Server] = secagg.Server,
    ) -> None:
        self.far, self.name, self.round = far, name, round
        self.clients = list(range(len(far.setup.population)) if clients is None else clients)
        self.cohort = cohort or len(self.clients)
        self.server = server(far.node(0)._terms(name, self.cohort), far.host.registry, self.clients)
        self.inputs: dict[int, bytes] = {}
        self.asked: dict[int, Ask] = {}
        self.answers: dict[int, Answer] = {}

    def ask(self, client: int, kind: str, **fields: Value) -> Answer:
        self.asked[client] = Ask(kind, {"round": self.round, "sum": self.name, **fields})
        (self.answers[client],) = self.far.node(client).answer([self.asked[client]])
        return self.answers[client]

    def step(
        self,
        kind: str,
        inbox: Mapping[int, Message | None],
        clients: Collection[int] | None = None,
        heard: Collection[int] | None = None,
        **fields: Value,
    ) -> dict[int, Answer]:
        """Ask these clients; the server collects the answers of those it wants to have heard."""
        self.asked, self.answers = {}, {}
        for client, message in inbox.items():
            if clients is None or client in clients:
                said = {} if message is None else {"message": message.to_bytes()}
                told = self.ask(client, kind, **fields, **said).fields.get("message")
                if told is not None and (heard is None or client in heard):
                    self.server.collect(client, told)
        return self.answers

    def keys(self, **how: Any) -> dict[int, Answer]:
        return self.step(KEYS, dict.fromkeys(self.clients), cohort=self.cohort, **how)

    def share(self, **how: Any) -> dict[int, Answer]:
        return self.step(SHARE, self.server.roster(), **how)

    def train(self, **how: Any) -> dict[int, Answer]:
        self.deliveries = self.server.deliveries()
        fields = train_fields(self.far, self.round, self.cohort)
        return self.step(TRAIN, self.deliveries, **fields, **how)

    def agree(self, **how: Any) -> dict[int, Answer]:
        return self.step(AGREE, self.server.survivor_list(), **how)

    def unmask(self, **how: Any) -> dict[int, Answer]:
        return self.step(UNMASK, self.server.agreements(), **how)

    def to(self, last: str) -> Sum:
        """The steps up to one of them, honestly."""
        for kind in (KEYS, SHARE, TRAIN, AGREE, UNMASK):
            getattr(self, kind)()
            if kind == last:
                break
        return self


def refusals(answers: Mapping[int, Answer] | Sequence[Answer]) -> set[str]:
    """The words that these answers are refused with; "" for those that are not."""
    found = answers.values() if isinstance(answers, Mapping) else answers
    return {answer.refused for answer in found}


def charges(far: Federation, client: int = 0) -> list:
    path = place(far.out / "clients", client) / LEDGER
    if not path.exists():
        return []
    with ledgers.Ledger.open(
        path, owner=f"client {client}", budget=ledgers.Budget(epsilon=math.inf, delta=1.0)
    ) as ledger:
        ledger.verify()
        return [row.charge.round for row in ledger.rows()]


def disk(far: Federation, client: int = 0) -> Path:
    return place(far.out / "clients", client)


def vectors(far: Federation, round: int, cohort: int) -> dict[int, np.ndarray]:
    """What each client seals, as only its own disk knows."""
    found = {}
    for client in range(len(far.setup.population)):
        one = far.node(client)
        ask = Ask(TRAIN, train_fields(far, round, cohort))
        found[client] = one._measured(far.host.clients.consent.request(round, cohort), ask)[0]
    return found


def wrong(far: Federation, asked: Sum, **changed) -> Ask:
    """A training that is right but for some fields."""
    fields = {**train_fields(far, 1, 4), "sum": "a", "message": asked.deliveries[0].to_bytes(), **changed}
    return Ask(TRAIN, {name: value for name, value in fields.items() if value is not None})
