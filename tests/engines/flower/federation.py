"""A whole run on Flower in this process: made-up clients, each behind a node and a journal of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedcanary import pipeline
from fedcanary.engines.consent import Consent
from fedcanary.engines.flower import enrol
from fedcanary.engines.flower.certificates import IDENTITY, REGISTRY, load_registry
from fedcanary.engines.flower.clients import FlowerClients, Patience
from fedcanary.engines.flower.exchange import Link
from fedcanary.engines.flower.grid import InProcessGrid
from fedcanary.engines.flower.node import Host, Node
from fedcanary.engines.flower.wire import data_of, decode_asks, encode, record
from fedcanary.engines.places import place
from fedcanary.engines.setup import Setup
from fedcanary.privacy.secagg import Registry
from fedcanary.record import RunRecord
from fedcanary.types import Array, Item, Role
from oracles.few import MadeUp

FIRST = 100  # node ids are client numbers and this


class MadeUpHost(Host):
    """A host whose clients measure nothing, so that it needs no model."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        study = folder / "study.toml"
        folder.mkdir(parents=True, exist_ok=True)
        study.write_text(setup.study.toml(), encoding="utf-8")
        super().__init__(study, folder)
        self.setup = setup

    @cached_property
    def clients(self) -> Any:
        made = MadeUp(self.setup, self.folder / "clients")
        made.consent = Consent(self.setup, lambda client: place(self.folder / "clients", client))
        return made


class Server(FlowerClients):
    """FlowerClients without a base model."""

    def base_answers(self, role: Role) -> tuple[tuple[Item, ...], Array]:
        items = self._setup.items[role]
        return items, np.full((len(items), 2), 0.5)


class Federation:
    """Nodes that outlive the server: `run` it as often as it is killed."""

    def __init__(self, setup: Setup, out: Path, **grid: Any) -> None:
        self.setup, self.out = setup, out
        self.host = MadeUpHost(setup, out)
        enrol.everybody(out / "clients", len(setup.population))
        self.app = ClientApp()
        self.app.train()(self._answer)
        self.app.query("fedcanary")(self._answer)
        self.asked: list[tuple[int, str, int]] = []  # client, kind, round: what reached a node, in order
        self.grid = InProcessGrid({FIRST + c: {"client": c} for c in range(len(setup.population))}, self.app, **grid)

    def node(self, client: int) -> Node:
        return Node(self.host, client, place(self.out / "clients", client) / IDENTITY)

    def _answer(self, message: Message, context: Context) -> Message:
        client = int(context.node_config["client"])
        asks = decode_asks(data_of(message.content), 1 << 24)
        self.asked += [(client, ask.kind, int(ask.fields.get("round", 0))) for ask in asks]
        return Message(record(encode(self.node(client).answer(asks))), reply_to=message)

    def server(self, **more: Any) -> FlowerClients:
        members = load_registry(self.out / REGISTRY)
        self.link = Link(self.grid, poll=0.0)
        registry = Registry(keys={client: member.key for client, member in members.items()})
        patience = more.pop("patience", Patience(train=5.0, step=5.0, nodes=5.0))
        return Server(self.setup, self.out, self.link, registry, patience=patience, **more)

    def run(self, watch: Callable[..., None] = lambda progress: None, **more: Any) -> RunRecord:
        return pipeline.run(self.setup, self.out, clients=self.server(**more), watch=watch)
