"""The server's side of a run whose clients are behind Flower nodes.

A round under secure aggregation is three exchanges, training included, and its keys are its own:
    train    with what the neighbours sealed for each client; masked inputs come back
    agree    the survivors; and the next round's clients are asked for their keys
    unmask   the signatures; and the next round's clients are sent the roster, and seal their shares
The first round of a run, and one after a round that was given up, need two more before. Under any other trust a round
is one exchange. Nodes that were not seen before are asked who they are, in one more.

Every answer is in the journal before it is used, and what follows is a function of the answers alone: a run that was
cut off anywhere goes on with the answers that had come, asks only for the others, and opens what it would have opened.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
from safetensors.torch import save

from fedcanary.engines import privacy_terms
from fedcanary.engines.clients import Clients, Sent, Work
from fedcanary.engines.consent import Consent
from fedcanary.engines.flower.exchange import Link
from fedcanary.engines.flower.journal import Entry, Journal
from fedcanary.engines.flower.node import AGREE, HELLO, KEYS, SHARE, TRAIN, UNMASK, WORDS
from fedcanary.engines.flower.wire import LARGEST, Answer, Ask, Value, decode_answers, encode
from fedcanary.engines.protection import Cohort
from fedcanary.engines.reference import base_probabilities
from fedcanary.engines.setup import Setup
from fedcanary.errors import BadInput
from fedcanary.privacy import secagg
from fedcanary.privacy.contract import Reason
from fedcanary.privacy.release import Paying
from fedcanary.privacy.seal import BITS, Terms, masking
from fedcanary.privacy.secagg.messages import Message
from fedcanary.record import NAME
from fedcanary.types import Array, Item, Role

QUERY: Final = "query.fedcanary"
TOKENS: Final = 1024  # of public items that the base reads at once
JOURNAL: Final = "flower.sqlite"
CLOSED, SUM = "closed", "sum"  # kinds of entries beside those of answers, which are the asks'
REASONS: Final = frozenset(reason.value for reason in Reason)
SETTLED: Final = 30.0  # seconds for those who are late where enough are there, and for a node to say who it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Seconds: for an exchange with training in it, for any other, and for enough nodes to come online."""

    train: float = 3600.0
    step: float = 300.0
    nodes: float = 600.0


@dataclass(frozen=True, slots=True)
class Group:
    """The same kind of ask of several clients, as part of an exchange; `label` tells it from all others of the kind."""

    kind: str
    round: int
    label: str
    asks: Mapping[int, Ask]


@dataclass(slots=True, eq=False)
class Sum:
    """A secure sum in the making: `step` is what its clients are asked next, and `inbox` what they are told with it."""

    name: str
    round: int
    size: int  # clients that are asked for readings
    server: secagg.Server
    step: str
    inbox: Mapping[int, Message | None]


class Unreachable(BadInput):
    """Too few nodes are online to go on; nothing is lost, and a run that is resumed goes on here."""


class FlowerClients(Clients):
    """A run's clients, over a `Link`.

    `registry` is the list of the clients' keys, for secure aggregation; `nodes` the client of each node by the key that
    it showed to Flower, where nodes have one: then they can speak for no other client. `note` is told what is under
    way: the step, how many have answered, of how many, and the round. `refused` counts answers by the word of their
    refusal.
    """

    words: ClassVar[frozenset[str]] = WORDS  # of refusal, as nodes of this kind say them

    def __init__(
        self,
        setup: Setup,
        out: Path,
        link: Link,
        registry: secagg.Registry | None,
        *,
        nodes: Mapping[int, int] | None = None,
        patience: Patience = Patience(),
        note: Callable[[str, int, int, int], None] = lambda step, done, clients, round: None,
    ) -> None:
        if setup.study.clients.also_train and setup.study.privacy.trust == "secure_aggregation":
            raise BadInput.of(
                "clients.also_train",
                "in a secure sum over messages, no client could see how many others have readings and noise in it",
                "leave it out, choose another trust, or run in one process",
            )
        self._setup, self._link, self._registry, self._patience, self._note = setup, link, registry, patience, note
        self._keys = nodes
        self.consent = Consent(setup, lambda client: out / "clients")
        self.refused: Counter[str] = Counter()
        # not where a run goes on without its journal: clients mask what they measured once, and in no other sum
        self.remembers = (out / JOURNAL).exists() or not (out / NAME).exists()
        self._journal = Journal(out / JOURNAL)
        self._client_of: dict[int, int | None] = {}  # by node; None for a node that is of no use here
        self._silent: set[int] = set()  # nodes that did not say who they are
        self._sums: dict[int, Sum] = {}
        self._round = 1  # that is under way
        self._shared = sum(tensor.numel() for tensor in setup.shared.values())

    def base_answers(self, role: Role) -> tuple[tuple[Item, ...], Array]:
        """As the base reads them here: its readings are public."""
        items = self._setup.items
        before = sum(len(items[r]) for r in list(Role)[: list(Role).index(role)])
        return items[role], base_probabilities(self._setup, TOKENS)[before : before + len(items[role])]

    def work(self, asked: Work) -> Iterator[list[Sent]]:
        """One exchange, with training in it; before it two for the keys, where they are not there yet."""
        t, terms, requests, self.masked = asked.request.round, asked.terms, asked.requests, None
        self._journal.forget(t)
        if not requests:
            return
        fields: dict[str, Value] = {
            "round": t,
            "shared": save({name: tensor.contiguous() for name, tensor in sorted(asked.shared.items())}),
            "line": ",".join(str(r) for r in range(t) if r in asked.lineage),
        }
        updates = self._setup.study.privacy.updates
        if updates is not None and updates.quantile is not None:
            fields["clip"] = terms.update_clip
        told = {c: fields | {"request": request.model_dump_json()} for c, request in requests.items()}
        label, sum = str(t), None
        least = min(privacy_terms.floor(self._setup.study, len(asked.cohort)), len(requests))
        begun = self._journal.get(SUM, str(t)) or str(t).encode()
        if self._journal.get(CLOSED, f"{TRAIN} {begun.decode()}") is None:
            self._gathered(list(requests), least)
        if terms.trust == "secure_aggregation":
            sum = self._agreed(t, Cohort(list(asked.cohort), trainers=tuple(asked.trainers)), least)
            self.masked = UnderMasks(sum, self._step, lambda: self._ahead(t + 1))
            told = {
                c: told[c] | {"sum": sum.name, "message": message.to_bytes()}
                for c, message in sum.inbox.items()
                if message is not None
            }
            label = sum.name
        group = Group(TRAIN, t, label, {c: Ask(TRAIN, fields) for c, fields in told.items()})
        heard = set()
        for _, client, answer in self._exchange("train", self._patience.train, group, least=least):
            if (one := self._sent(client, answer, sum, terms)) is not None:
                heard.add(client)
                yield [one]
        if missing := [Sent(c, None) for c in requests if c not in heard]:
            yield missing

    def _sent(self, client: int, answer: Answer, sum: Sum | None, terms: Terms) -> Sent | None:
        """What a client's answer to its training is; None if it is nothing that can be used."""
        said = answer.fields
        if isinstance(words := said.get("reasons"), str):
            return Sent(client, None, [word for word in words.split(",") if word in REASONS])
        message, vector = said.get("message"), said.get("vector")
        if sum is not None and isinstance(message, bytes):
            return Sent(client, None, masked=True) if sum.server.collect(client, message) else None
        if sum is None and isinstance(vector, bytes) and len(vector) == 8 * self._length(terms):
            kind = np.float64 if terms.trust == "none" else np.int64
            return Sent(client, np.frombuffer(vector, dtype=kind))
        return None

    # --- secure aggregation

    def _agreed(self, t: int, cohort: Cohort, least: int) -> Sum:
        """The round's secure sum, ready for training; what it lacks of its first two exchanges is made up for.

        Where too few take part it begins anew, under another name, for as long as there is patience.
        """
        end = self._link.clock() + self._patience.nodes
        while True:
            sum = self._sums.pop(t, None) or self._begun(t, cohort)
            try:
                while sum.step != TRAIN:
                    self._step(sum)
                return sum
            except secagg.Aborted as error:
                self._journal.delete(SUM, str(t))
                if self._link.clock() > end:
                    what = f"its clients could not agree on keys: {error}{self._words()}"
                    raise Unreachable.of(f"round {t}", what, "see why their nodes do not answer, and resume") from error
                self._link.sleep(self._link.poll)
                self._gathered([*cohort.clients, *cohort.trainers], least)

    def _ahead(self, t: int) -> Sum | None:
        """The secure sum of a round to come; None if there is no such round, or nobody for it."""
        cohort = self.upcoming(t) if t <= self._setup.study.rounds else Cohort([])
        return self._begun(t, cohort) if cohort.clients else None

    def _begun(self, t: int, cohort: Cohort) -> Sum:
        study, everyone = self._setup.study, [*cohort.clients, *cohort.trainers]
        if self._registry is None:
            raise BadInput.of("registry", "secure aggregation needs the clients' keys", "register them")
        if kept := self._journal.get(SUM, str(t)):
            name = kept.decode()
        else:
            name = f"{study.digest} {t} {secrets.token_hex(8)}"
            self._journal.put(Entry(SUM, str(t), t, name.encode()))
        terms = privacy_terms.terms(study, len(cohort.clients), self._setup.probes)
        agreed = masking(
            name,
            contract=self.consent.contract.digest,
            registry=self._registry,
            length=self._length(terms),
            floor=terms.floor,
            dropouts=terms.dropouts,
        )
        server = secagg.Server(agreed, self._registry, everyone)
        return Sum(name, t, len(cohort.clients), server, KEYS, dict.fromkeys(everyone))

    def _length(self, terms: Terms) -> int:
        """Of a sealed vector."""
        return terms.length(privacy_terms.layout(self._setup), self._shared)

    def _step(self, sum: Sum, ahead: Sum | None = None) -> Sum | None:
        """One exchange: the next step of a sum, and beside it of the one that comes after it.

        Returns the latter; None if there is none, or if too few took part in it: then it has to begin anew.

        Raises:
            Aborted: too few took part in the first.
        """
        sums = [one for one in (sum, ahead) if one is not None]
        by_label = {one.name: one for one in sums}
        # the round's vectors are in a sum that is at one of these steps, and lost if too few come to it
        least = sum.server.terms.minimum if sum.step in (AGREE, UNMASK) else 0
        for group, client, answer in self._exchange(QUERY, self._patience.step, *map(self._group, sums), least=least):
            message = answer.fields.get("message")
            if isinstance(message, bytes):
                by_label[group.label].server.collect(client, message)
        if ahead is not None:
            try:
                advance(ahead)
                self._sums[ahead.round] = ahead
            except secagg.Aborted:
                self._sums.pop(ahead.round, None)
                self._journal.delete(SUM, str(ahead.round))
                ahead = None
        advance(sum)
        return ahead

    def _group(self, sum: Sum) -> Group:
        fields: dict[str, Value] = {"round": sum.round, "sum": sum.name}
        if sum.step == KEYS:
            fields["cohort"] = max(sum.size, 1)
        asks = {
            client: Ask(sum.step, fields if message is None else fields | {"message": message.to_bytes()})
            for client, message in sum.inbox.items()
        }
        return Group(sum.step, sum.round, sum.name, asks)

    # --- exchanges

    def _exchange(
        self, message_type: str, timeout: float, *groups: Group, least: int = 0
    ) -> Iterator[tuple[Group, int, Answer]]:
        """Yield answers as they come, those first that had come before the run was cut off.

        An exchange that was closed is not opened again: what was made of its answers must be made of them again. It is
        not opened before so many of the first group's clients have answered or are online that it has `least` answers.

        Raises:
            Unreachable: they do not come.
        """
        waiting: dict[int, list[tuple[Group, Ask]]] = {}
        for group in groups:
            heard = set()
            for entry in self._journal.of(group.kind, group.round):
                label, _, number = entry.key.rpartition("/")
                client, answer = int(number), decode_answers(entry.body, LARGEST)[0]
                if label == group.label and (ask := group.asks.get(client)) and ask.id == answer.ask:
                    heard.add(client)
                    yield group, client, answer
            if self._journal.get(CLOSED, f"{group.kind} {group.label}") is None:
                for client in group.asks.keys() - heard:
                    waiting.setdefault(client, []).append((group, group.asks[client]))
            if group is groups[0] and waiting and len(heard) < least:
                self._gathered(list(waiting), least - len(heard), settled=0.0)
        done, everyone = 0, len(waiting)
        node_of = self._reached() if waiting else {}
        client_of = {node_of[client]: client for client in waiting if client in node_of}
        parcels = {node: [ask for _, ask in waiting[client]] for node, client in client_of.items()}
        step, self._round = " and ".join(group.kind for group in groups), groups[0].round
        self._note(step, done, everyone, self._round)
        for node, answers in self._link.exchange(parcels, message_type, timeout, str(groups[0].round)):
            client, asked = client_of[node], {ask.id: group for group, ask in waiting[client_of[node]]}
            self.refused.update(self._word(answer.refused) for answer in answers if answer.refused)
            told = [
                (asked[answer.ask], self._listed(asked[answer.ask], answer)) for answer in answers if not answer.refused
            ]
            self._journal.put(*(Entry(g.kind, f"{g.label}/{client}", g.round, encode([a])) for g, a in told))
            done += 1
            self._note(step, done, everyone, self._round)
            for group, answer in told:
                yield group, client, answer
        self._journal.put(*(Entry(CLOSED, f"{group.kind} {group.label}", group.round, b"") for group in groups))

    def _listed(self, group: Group, answer: Answer) -> Answer:
        """Of an answer, what answers of its kind say; the rest goes no further, and not into the journal."""
        kinds: dict[str, type] = {"message": bytes}
        if group.kind == TRAIN:
            kinds |= (
                {"reasons": str}
                if self.consent.contract.trust == "secure_aggregation"
                else {"reasons": str, "vector": bytes}
            )
        said = {name: value for name, value in answer.fields.items() if type(value) is kinds.get(name)}
        if isinstance(words := said.get("reasons"), str):
            said = {"reasons": ",".join(word for word in words.split(",") if word in REASONS)}
        return Answer(answer.ask, said)

    def _gathered(self, clients: Sequence[int], least: int, settled: float = SETTLED) -> None:
        """Wait until all of these are online, or for `settled` seconds as long as there are enough.

        Raises:
            Unreachable: there are not enough within the time there is.
        """
        start = self._link.clock()
        if settled:  # once a round: who was of no use, or silent, may have been started anew
            self._client_of = {node: client for node, client in self._client_of.items() if client is not None}
            self._silent.clear()
        while True:
            there = self._reached(clients, least).keys() & set(clients)
            passed = self._link.clock() - start
            if len(there) == len(clients) or (len(there) >= least and passed >= settled):
                return
            if passed >= self._patience.nodes:
                what = f"{len(there)} of {len(clients)} clients are online and of this contract, {least} are needed"
                raise Unreachable.of("nodes", what + self._words(), "start their nodes (see their logs), and resume")
            if len(there) < least:
                self._silent.clear()
            self._note("waiting for nodes", len(there), len(clients), self._round)
            self._link.sleep(min(self._link.poll, self._patience.nodes - passed))

    def _words(self) -> str:
        return "".join(f"; {word}: {times}" for word, times in sorted(self.refused.items()))

    def _reached(self, clients: Sequence[int] = (), least: int = 0) -> dict[int, int]:
        """The node of every client that is online; nodes that were not seen before are asked who they are, once.

        They have little time for it, but all that there is for a step while so many of these clients are not known yet:
        an answer to this takes a process and perhaps a model, and one that came too late would be asked for again.
        """
        online = self._link.nodes()
        # one that was gone and is back may be another than it was
        self._client_of = {node: client for node, client in self._client_of.items() if node in online}
        if new := [node for node in online if node not in self._client_of and node not in self._silent]:
            self._silent.update(new)
            known = set(self._client_of.values()) & set(clients)
            ask = Ask(HELLO, {})
            patience = self._patience.step if len(known) < least else min(self._patience.step, SETTLED)
            for node, (answer,) in self._link.exchange({node: [ask] for node in new}, QUERY, patience, HELLO):
                self._silent.discard(node)
                self._client_of[node] = self._known(node, answer)
        found: dict[int, int] = {}
        for node in online:
            client = self._client_of.get(node)
            if client is not None and found.setdefault(client, node) != node:
                self.refused["client_twice"] += 1
        return found

    def _known(self, node: int, answer: Answer) -> int | None:
        """The client that a node says it is, if its key is that client's, and its contract and base model are ours."""
        contract, client = self.consent.contract, answer.fields.get("client")
        ours = isinstance(client, int) and 0 <= client < len(self._setup.population)
        for word, same in (
            (self._word(answer.refused) if answer.refused else "unknown_client", ours),
            ("other_client", self._keys is None or self._keys.get(node) == client),
            ("other_model", answer.fields.get("model") == contract.model),
            (Reason.OTHER_CONTRACT.value, answer.fields.get("contract") == contract.digest),
        ):
            if not same:
                self.refused[word] += 1
                return None
        return client if isinstance(client, int) else None

    def _word(self, refused: str) -> str:
        """A node's word if it is one of those that nodes say; others are not repeated."""
        return refused if refused in self.words else "other"


def advance(sum: Sum) -> None:
    """Close a sum's step, for what its clients are told with the next."""
    server = sum.server
    if sum.step == KEYS:
        sum.inbox, sum.step = server.roster(), SHARE
    elif sum.step == SHARE:
        sum.inbox, sum.step = server.deliveries(), TRAIN
    elif sum.step == AGREE:
        sum.inbox, sum.step = server.agreements(), UNMASK


class UnderMasks:
    """Vectors that the server has masked and cannot read."""

    def __init__(
        self, sum: Sum, step: Callable[[Sum, Sum | None], Sum | None], ahead: Callable[[], Sum | None]
    ) -> None:
        self.length = sum.server.terms.length
        self._sum, self._step, self._ahead = sum, step, ahead

    def open(self, pay: Paying) -> secagg.Outcome:
        """See `release.Masked`."""
        sum, server = self._sum, self._sum.server
        sum.inbox, sum.step = server.survivor_list(), AGREE
        pay(server.survivors)
        self._step(sum, self._step(sum, self._ahead()))
        total = server.unmask()
        return secagg.Outcome(
            total=total, signed=secagg.decode_signed(total, BITS), survivors=server.survivors, refused=server.refused
        )
