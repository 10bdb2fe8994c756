"""The client's side of an app that exists: what its own training made of the arrays it got, read and sealed.

The app trains in its own handler, as ever. What it received and what it returns are then read here, in copies, on the
public items and on the client's own; one bounded message is sealed under the contract that the study comes to, charged
to the client's own ledger, and journalled before it leaves, by the same `Node` as in a study of our own.

    folder/clients/<client>/ledger.sqlite   what this client has spent: outlives every run
    folder/clients/<client>/policy.toml     what it allows, whatever a contract says; agrees to the study without one
    folder/runs/<run>/base.safetensors      theta_0, as it first came: another one in the same run is refused
    folder/runs/<run>/clients/<client>/     its journal of the run
    folder/clients/<client>/identity.pem    its key, for secure aggregation (`fedcanary deploy keys`)
    folder/registry.toml                    everybody's public halves; without it, what `attach.registry` names
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.torch import load_file, save_file

from fedcanary.engines import privacy_terms
from fedcanary.engines.clients import Clients, Sent, Work
from fedcanary.engines.consent import Consent
from fedcanary.engines.flower import attach
from fedcanary.engines.flower.attach import AppSetup, Attached, Named
from fedcanary.engines.flower.certificates import IDENTITY, REGISTRY, load_registry
from fedcanary.engines.flower.journal import Journal
from fedcanary.engines.flower.node import Host, Node, Wrong
from fedcanary.engines.flower.reading import Own, call, own_of, undisturbed
from fedcanary.engines.flower.wire import Ask
from fedcanary.engines.places import CLIENTS, place
from fedcanary.errors import BadInput
from fedcanary.models import adapters
from fedcanary.models.adapters import Adapter
from fedcanary.privacy import contract as contracts
from fedcanary.privacy import secagg
from fedcanary.privacy.contract import Request
from fedcanary.privacy.seal import Message, Sealed, seal
from fedcanary.probes.base import Answers, ClientView
from fedcanary.types import Array, Item, Role

SEALED_HERE: Final = "sealed"  # what a client says instead of a vector that waits for its secure sum
NO_ARRAYS, OTHER_ARRAYS, NO_BASE, OTHER_BASE = "no_arrays", "other_arrays", "no_base", "other_base"
WORDS: Final = frozenset({NO_ARRAYS, OTHER_ARRAYS, NO_BASE, OTHER_BASE})
RUN: Final = re.compile(r"[0-9a-f]{16}")
BASE, POLICY = "base.safetensors", "policy.toml"


def own(folder: Path, client: int) -> Path:
    """A client's own folder."""
    return place(folder / CLIENTS, client)


@dataclass(frozen=True, slots=True)
class Trained:
    """One client's round: what it received, what its training returned, and how to get what it holds."""

    received: Adapter
    returned: Adapter
    held_out: Callable[[], Own]


class Public:
    """What models said to the public items: the same for every client that one process plays."""

    def __init__(self, setup: AppSetup) -> None:
        self._setup = setup
        self._items = {role: items for role, items in setup.items.items() if items}
        self._known: dict[str, Mapping[Role, Array]] = {}

    def answers(self, base: Adapter, received: Adapter, returned: Adapter) -> dict[Role, Answers]:
        """What three models say to every suite."""
        tables = [self._kept(base), self._kept(received), self._said(returned)]
        return {
            role: Answers(items=items, base=tables[0][role], received=tables[1][role], personalized=tables[2][role])
            for role, items in self._items.items()
        }

    def _kept(self, arrays: Adapter) -> Mapping[Role, Array]:
        """What the base said, and the model that clients received last: others of the process ask for it too."""
        name = adapters.digest(arrays)
        if name not in self._known:
            if len(self._known) > 1:  # the base's came first, and stays
                self._known.popitem()
            self._known[name] = self._said(arrays)
        return self._known[name]

    def _said(self, arrays: Adapter) -> Mapping[Role, Array]:
        """(n, C) of each role, for a model with these arrays."""
        whole = tuple(item for items in self._items.values() for item in items)
        table, found, at = self._setup.reader.said(arrays, Own(whole)), {}, 0
        for role, items in self._items.items():
            found[role] = table[at : at + len(items)]
            at += len(items)
        return found


class AppClients(Clients):
    """The app's clients that this process plays, one at a time; `trained` is whose turn it is."""

    def __init__(self, setup: AppSetup, folder: Path) -> None:
        self.consent = Consent(setup, lambda client: own(folder, client))
        self._setup, self._layout, self._public = setup, privacy_terms.layout(setup), Public(setup)
        self.trained: Trained | None = None

    def base_answers(self, role: Role) -> tuple[tuple[Item, ...], Array]:
        """See `Clients.base_answers`."""
        items = self._setup.items[role]
        return items, self._setup.reader.said(self._setup.theta_0, Own(items))

    def work(self, asked: Work) -> Iterator[list[Sent]]:
        """What the client whose turn it is seals, if it does not refuse."""
        for client, request in asked.requests.items():
            if reasons := self.consent.refuses(client, request):
                yield [Sent(client, None, reasons)]
                continue
            view = self._view()
            readings = {probe.name: probe.read(view).values for probe in self._setup.probes}
            message = Message(readings=readings, update=np.ones(1))  # a weight, and no change: updates are the app's
            yield [Sent(client, seal(message, self._layout, asked.terms, request.round, client))]

    def _view(self) -> ClientView:
        if self.trained is None:
            raise Wrong(NO_ARRAYS)
        three = (self._setup.theta_0, self.trained.received, self.trained.returned)
        held, reader = self.trained.held_out(), self._setup.reader
        base, received, returned = (reader.said(arrays, held) for arrays in three)
        local = Answers(items=held.items, base=base, received=received, personalized=returned)
        return ClientView(local=local, suites=self._public.answers(*three), domains=held.domains)


class AppHost(Host):
    """What the clients of one process have in common in one run."""

    def __init__(self, app: App, run: str, policy: Path | None) -> None:
        folder = app.folder / "runs" / run
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(app.study, folder)
        self._app, self._policy = app, policy

    @property
    def base(self) -> Path:
        """The file that theta_0 is kept in."""
        return self.folder / BASE

    def begin(self, theta_0: Adapter, digest: object) -> None:
        """Keep what the run begins with, if that it is; the first that came is never replaced.

        Raises:
            Wrong: it is not what the server says the run begins with.
        """
        if not self.base.exists():
            if attach.setup_of(self._app.attached, self._app.named, theta_0).base.digest != digest:
                raise Wrong(NO_BASE)
            draft = self.base.with_suffix(f".{os.getpid()}")
            save_file({name: tensor.contiguous() for name, tensor in theta_0.items()}, draft)
            draft.replace(self.base)

    @cached_property
    def setup(self) -> AppSetup:
        """The study's parts, with the base as this client has it."""
        if not self.base.exists():
            raise Wrong(NO_BASE)
        return attach.setup_of(self._app.attached, self._app.named, load_file(self.base))

    @cached_property
    def clients(self) -> Any:
        """Those who answer, one at a time."""
        clients = AppClients(self.setup, self._app.folder)
        if self._policy is not None:
            policy = contracts.load_policy(self._policy, clients.consent.contract.probes)
            clients.consent.hold_to(lambda client: policy)
        return clients

    @cached_property
    def registry(self) -> secagg.Registry:
        """Everybody's keys: by this node's own list, or where it has none by the one that came with the app."""
        named, file = self._app.attached.attach.registry, self._app.folder / REGISTRY
        if not file.exists():
            if named is None:
                raise BadInput.of(str(file), "is not there", "it is what fedcanary deploy keys printed for all clients")
            file = self._app.study.parent / named
        members = load_registry(file)
        return secagg.Registry(keys={client: member.key for client, member in members.items()})


@dataclass(frozen=True, slots=True)
class App:
    """A study of an app, where it lies, what it names, and the folder of the clients that this process plays."""

    study: Path
    folder: Path
    attached: Attached
    named: Named

    def held_out(self, known: Mapping[str, Any]) -> Own:
        """A client's own examples, from the app's function; `known` is what that may ask for by name."""
        table = self.attached.attach
        with undisturbed():
            return own_of(call(self.named.items, known), self.attached.model.labels, table.held_out)


@lru_cache(maxsize=4)
def app_of(study: Path, folder: Path) -> App:
    """The app of a study's file; kept for as long as the process plays its clients."""
    attached = attach.load(study)
    return App(study, folder, attached, attach.named(attached, study))


@lru_cache(maxsize=2)
def _host(study: Path, folder: Path, run: str, policy: Path | None) -> AppHost:
    return AppHost(app_of(study, folder), run, policy)


def host_of(study: Path, folder: Path, client: int, run: str) -> AppHost:
    """The host of a client in a run.

    Raises:
        Wrong: the run's name is none.
    """
    if not RUN.fullmatch(run):
        raise Wrong("malformed")
    policy = own(folder, client) / POLICY
    return _host(study, folder, run, policy if policy.exists() else None)


class AppNode(Node):
    """One client of the app."""

    def __init__(self, host: AppHost, client: int, folder: Path) -> None:
        super().__init__(host, client, own(folder, client) / IDENTITY)
        self._app_host = host

    def _hello(self) -> dict[str, Any]:
        return {"client": self._client}

    def _measured(self, request: Request, ask: Ask) -> tuple[Sealed | None, Sequence[str]]:
        clients, setup = self._app_host.clients, self._app_host.setup
        trained = clients.trained
        if trained is None:
            raise Wrong(NO_ARRAYS)
        if ask.fields.get("arrays") != adapters.digest(trained.received):
            raise Wrong(OTHER_ARRAYS)
        if ask.fields.get("base") != setup.base.digest:
            raise Wrong(OTHER_BASE)
        terms = privacy_terms.terms(setup.study, request.cohort, setup.probes)
        ((sent,),) = clients.work(Work(request, [self._client], {}, terms))
        return sent.vector, sent.refused

    def _session(self, journal: Journal, ask: Ask, round: int) -> tuple[str, secagg.Client, int]:
        if "sum" not in ask.fields:  # sealed with the training; the secure sum comes after it
            raise Wrong(SEALED_HERE)
        return super()._session(journal, ask, round)
