"""The server's side of an app that exists: its rounds are the app's, and what clients say comes with their training.

The app's loop and ours take turns (`Turns`): ours is `pipeline.run`, as in every study. It waits until the app has
drawn a round's nodes, says what they are to be asked, and waits for the replies of the app's own training messages.

    trust                    exchanges beside the app's own
    local, central, none     none: the sealed vector is in the training's reply
    secure_aggregation       four: share, train (the masked vector), agree, unmask. The advert of the round's keys is in
                             the training's reply, so who falls out while it trains costs nothing. And one more for
                             nodes that were not seen before: who are you

A client's number is the order in which its node was first drawn; under secure aggregation it is the client's own word,
which its key confirms.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, Final

from safetensors.torch import load_file, save_file

from fedcanary.engines.clients import Sent, Work
from fedcanary.engines.flower import attach_node
from fedcanary.engines.flower.attach import AppSetup
from fedcanary.engines.flower.attach_node import BASE, NO_BASE, SEALED_HERE
from fedcanary.engines.flower.clients import (
    QUERY,
    FlowerClients,
    Group,
    Patience,
    Sum,
    UnderMasks,
    advance,
)
from fedcanary.engines.flower.exchange import Link
from fedcanary.engines.flower.journal import Entry, Journal
from fedcanary.engines.flower.node import TRAIN, WORDS
from fedcanary.engines.flower.reading import Own
from fedcanary.engines.flower.wire import LARGEST, Answer, Ask, Malformed, Value, decode_answers, encode
from fedcanary.engines.protection import Cohort
from fedcanary.models.adapters import Adapter
from fedcanary.privacy import secagg
from fedcanary.privacy.release import Paying
from fedcanary.privacy.seal import Terms
from fedcanary.record import RunRecord
from fedcanary.types import Array, Item, Role

FILE: Final = "attach.sqlite"
NODE, DRAWN, NAME = "node", "drawn", "run"  # kinds of entries in it
ALWAYS: Final = 1  # the round that they are of: nothing in this file is forgotten


class Closed(Exception):
    """The app's loop has ended."""


class Turns:
    """Two loops in two threads, of which one runs at a time."""

    def __init__(self) -> None:
        self._to_ours: SimpleQueue[Any] = SimpleQueue()
        self._to_app: SimpleQueue[Any] = SimpleQueue()

    def wait(self) -> Any:
        """The app's: until it is its turn; gives what our loop said, or raises what that ended with."""
        said = self._to_app.get()
        if isinstance(said, BaseException):
            raise said
        return said

    def give(self, value: Any) -> Any:
        """The app's: say something, and wait."""
        self._to_ours.put(value)
        return self.wait()

    def take(self, said: Any) -> Any:
        """Ours: say something, and wait. Raises Closed if the app's loop has ended."""
        self._to_app.put(said)
        given = self._to_ours.get()
        if given is Closed:
            raise Closed
        return given

    def end(self, said: Any) -> None:
        """Ours: say the last thing."""
        self._to_app.put(said)

    def close(self) -> None:
        """The app's: there is no next round."""
        self._to_ours.put(Closed)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The nodes that the app trains in a round, each with the digest of the arrays it is sent."""

    arrays: Mapping[int, str]


def theta_0(out: Path, arrays: Adapter) -> Adapter:
    """What the run in a folder began with: these arrays, unless it began before."""
    file = out / BASE
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".part")
        save_file({name: tensor.contiguous() for name, tensor in arrays.items()}, draft)
        draft.replace(file)
    found: Adapter = load_file(file)
    return found


class AppServer(FlowerClients):
    """The clients of the app, as our loop reaches them. `run` names the run to them."""

    words: ClassVar[frozenset[str]] = WORDS | attach_node.WORDS

    def __init__(
        self,
        setup: AppSetup,
        out: Path,
        link: Link,
        registry: secagg.Registry | None,
        turns: Turns,
        patience: Patience,
    ) -> None:
        super().__init__(setup, out, link, registry, patience=patience)
        self.remembers = False  # a round begun again is another training, and another look
        self._app, self._turns = setup, turns
        self._kept = Journal(out / FILE)
        self._done = RunRecord.open(out).rounds
        self._drawn: Mapping[int, str] = {}
        self.begun: set[int] = set()  # nodes that have what the run began with
        self.there = self._drawn_for
        if (name := self._kept.get(NAME, NAME)) is None:
            name = secrets.token_hex(8).encode()
            self._kept.put(Entry(NAME, NAME, ALWAYS, name))
        self.run = name.decode()

    def base_answers(self, role: Role) -> tuple[tuple[Item, ...], Array]:
        """As theta_0 reads them here: its readings are public."""
        items = self._app.items[role]
        return items, self._app.reader.said(self._app.theta_0, Own(items))

    def _drawn_for(self, round: int) -> Callable[[int], bool]:
        """Who the app trains in a round: known of those that are complete, else as soon as it has drawn them."""
        kept = self._kept.get(DRAWN, str(round)) if round <= self._done else None
        if kept is not None:
            numbers = set(json.loads(kept))
        else:
            drawn: Drawn = self._turns.take(None)
            self._drawn = drawn.arrays
            numbers = set(self._numbers(drawn.arrays))
            self._kept.put(Entry(DRAWN, str(round), ALWAYS, json.dumps(sorted(numbers)).encode()))
        return numbers.__contains__

    def _numbers(self, nodes: Container[int]) -> dict[int, int]:
        """The node of each client, of those nodes that are one of ours."""
        if self._registry is not None:
            return {client: node for client, node in self._reached().items() if node in nodes}
        known = {int(entry.key): int(entry.body) for entry in self._kept.of(NODE, ALWAYS)}
        for node in sorted(self._drawn.keys() - known.keys()):
            known[node] = len(known)
            self._kept.put(Entry(NODE, str(node), ALWAYS, str(known[node]).encode()))
        return {client: node for node, client in known.items() if node in nodes}

    def _known(self, node: int, answer: Answer) -> int | None:
        client = answer.fields.get("client")
        if isinstance(client, int) and self._registry is not None and client in self._registry.keys:
            return client
        self.refused["unknown_client"] += 1
        return None

    def work(self, asked: Work) -> Iterator[list[Sent]]:
        """What came with the app's training; under secure aggregation two exchanges after it."""
        t, cohort, terms, self.masked = asked.request.round, asked.cohort, asked.terms, None
        self._journal.forget(t)
        node_of = self._numbers(self._drawn)
        sum = self._begun(t, Cohort(list(cohort))) if terms.trust == "secure_aggregation" and cohort else None
        keys = {} if sum is None else self._group(sum).asks
        asks = {}
        for client in cohort:
            fields: dict[str, Value] = {"round": t, "run": self.run, "request": asked.request.model_dump_json()}
            fields |= {"arrays": self._drawn[node_of[client]], "base": self._app.base.digest}
            asks[client] = Ask(TRAIN, fields)
        parcels = {client: [ask, *([keys[client]] if keys else ())] for client, ask in asks.items()}
        said: Mapping[int, bytes] = self._turns.take({node_of[c]: encode(parcel) for c, parcel in parcels.items()})
        ready, refused = set(), {}
        for client in cohort:
            answers = self._read(said.get(node_of[client]), parcels[client])
            if answers and not any(answer.refused == NO_BASE for answer in answers):
                self.begun.add(node_of[client])
            for answer in answers:
                if answer.refused == SEALED_HERE and answer.ask == asks[client].id:
                    ready.add(client)
                elif answer.refused:
                    self.refused[self._word(answer.refused)] += 1
                elif answer.ask != asks[client].id:
                    if (
                        sum is not None
                        and client in ready
                        and isinstance(advert := answer.fields.get("message"), bytes)
                    ):
                        sum.server.collect(client, advert)
                elif (one := self._sent(client, answer, None, terms)) is not None:
                    refused[client] = one
        yield [*refused.values()]
        heard = set(refused)
        if sum is not None:
            for one in self._summed(sum, {client: asks[client] for client in ready}, terms):
                heard.add(one.client)
                yield [one]
        if missing := [Sent(client, None) for client in cohort if client not in heard]:
            yield missing

    def close(self) -> None:
        """Close its files."""
        with self._kept, self._journal:
            pass

    def _read(self, data: bytes | None, parcel: Sequence[Ask]) -> Sequence[Answer]:
        """The answers that came with a training's reply, in the order of what was asked."""
        if data is None:
            return ()
        try:
            answers = {answer.ask: answer for answer in decode_answers(data, LARGEST)}
        except Malformed:
            self.refused["malformed"] += 1
            return ()
        return [answers[ask.id] for ask in parcel if ask.id in answers]

    def _summed(self, sum: Sum, asks: Mapping[int, Ask], terms: Terms) -> Iterator[Sent]:
        """Shares, then the masked vectors of those who have sealed theirs."""
        self.masked = UnderMasks(sum, self._step, lambda: None)
        try:
            advance(sum)
            self._step(sum)
        except secagg.Aborted as error:
            self.masked = Given(sum.server.terms.length, error)
            return
        asked = {
            client: Ask(TRAIN, {**asks[client].fields, "sum": sum.name, "message": message.to_bytes()})
            for client, message in sum.inbox.items()
            if message is not None and client in asks
        }
        for _, client, answer in self._exchange(QUERY, self._patience.step, Group(TRAIN, sum.round, sum.name, asked)):
            if (one := self._sent(client, answer, sum, terms)) is not None:
                yield one

    def _group(self, sum: Sum) -> Group:
        """As ever, and each ask says of which run it is: a client's state is the run's."""
        group = super()._group(sum)
        asks = {client: Ask(ask.kind, {**ask.fields, "run": self.run}) for client, ask in group.asks.items()}
        return replace(group, asks=asks)


@dataclass(slots=True)
class Given:
    """A secure sum that was given up before anybody masked anything."""

    length: int
    why: secagg.Aborted

    def open(self, pay: Paying) -> secagg.Outcome:
        """See `release.Masked`."""
        raise self.why
