"""What clients do in a round: train, compare models, and hand over one bounded message each.

Everything here runs at the clients (this machine plays all of them). Nothing in this file is visible to server-side
code except the sealed vectors it yields, which go straight into the door. A client's private tensors are kept in its
own folder under `clients/`, which stands for its own disk, and are written nowhere else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from fedcanary.engines import guard, privacy_terms, slices
from fedcanary.engines.clients import Clients, Sent, Work
from fedcanary.engines.consent import Consent
from fedcanary.engines.places import place
from fedcanary.engines.plan import plan_of
from fedcanary.engines.reference import base_probabilities
from fedcanary.engines.setup import Setup
from fedcanary.engines.stacking import Pacer, limits
from fedcanary.engines.store import Store
from fedcanary.errors import ClientFailed, Problem
from fedcanary.models import stacked
from fedcanary.models.adapters import Adapter, save
from fedcanary.models.base import Rows
from fedcanary.models.generate import replies
from fedcanary.personalize import Held
from fedcanary.personalize.base import Trained
from fedcanary.personalize.fit import Recipe, fit
from fedcanary.personalize.private_fit import fit_private
from fedcanary.privacy.contract import Request
from fedcanary.privacy.seal import Message, Terms, seal, seal_update
from fedcanary.probes.base import Answers, ClientView, OwnProbe, Probe, relevant
from fedcanary.probes.slices import SLICES
from fedcanary.rng import derive, stream
from fedcanary.types import Array, Item, Reading, Role, Scores

T = TypeVar("T")
Tap = Callable[[int, int, Mapping[str, Reading]], None]
KEPT = 4096  # values about clients (their items, token rows, readings of the base) that stay in memory


class _Recent:
    """The values of the last so many keys."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, object] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._values:
            self._values[key] = make()
            if len(self._values) > self._size:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]  # type: ignore[return-value]  # a key's own `make` gave it its type


class LocalClients(Clients):
    """All the clients that this process plays."""

    def __init__(self, setup: Setup, folder: Path, tap: Tap | None = None) -> None:
        self._study, self._base, self._lora, self._method = setup.study, setup.base, setup.lora, setup.method
        self._population, self._probes, self._tap = setup.population, setup.probes, tap
        self._values = setup.slices
        self._layout, self._record_level = privacy_terms.layout(setup), privacy_terms.training(setup.study)
        self._private = Store(folder, "private", everything=self._study.policy.on_alarm == "roll_back")
        self._good, self._place = Store(folder, "good"), partial(place, folder)
        self.consent = Consent(setup, self._place)
        self._initial, self._first_private = setup.initial, setup.method.split(setup.initial).private
        self._roles = {role: items for role, items in setup.items.items() if items}
        self._items = tuple(item for items in self._roles.values() for item in items)
        self._recipe = Recipe(**{name: getattr(self._study.personalize, name) for name in Recipe.__dataclass_fields__})
        self._recent = _Recent(KEPT)
        self._known: dict[Hashable, Rows] = {}  # with what the layers below the first adapter say
        self._room = float(self._study.engine.memory * 2**20)  # bytes that may still be kept of that
        self._pacer = self._begin(setup, folder.parent / "engine.json")
        self._public = self._base.rows(self._items)
        self._public = self._below([self._public])[0]
        self._base_public = base_probabilities(setup, self._pacer.pace.tokens)
        self._embedded = stacked.embed(self._base, self._public) if self._method.needs_embedding else np.zeros((0, 0))
        asked = self._study.probes.generate and self._base.task == "causal"
        self._unsafe = [i for i, item in enumerate(self._items) if asked and self._is_unsafe(i, item)]
        self._base_replies = replies(self._base, [self._items[i] for i in self._unsafe])[0]
        self._guard = guard.Guard.of(setup, plan_of(setup, self.base_answers)) if self._study.guard else None

    def base_answers(self, role: Role) -> tuple[tuple[Item, ...], Array]:
        """From the readings that are kept on disk, if they are."""
        start, stop = self._slices().get(role, (0, 0))
        return self._items[start:stop], self._base_public[start:stop]

    def work(self, asked: Work) -> Iterator[list[Sent]]:
        """In stacks; yields what each client sealed."""
        shared, terms, line, round = asked.shared, asked.terms, asked.lineage, asked.request.round
        requests = asked.requests
        answers = {client: self.consent.refuses(client, request) for client, request in requests.items()}
        if refused := [Sent(client, None, reasons) for client, reasons in answers.items() if reasons]:
            yield refused
        cohort = [c for c, request in requests.items() if request.probes and not answers[c]]
        trainers = [c for c, request in requests.items() if not request.probes and not answers[c]]
        common = None
        if not self._first_private:  # then everyone holds the same model at the round's start
            held = Held(stacked.repeat(shared, 1), {})
            common = self._probabilities(self._score(held, [self._public], [self._embedded]))[0]
        for clients in self._stacks(cohort, round):
            messages = self._stack(round, clients, shared, common, line)
            sent = []
            for client, said in messages.items():
                whole = None if said is None else self._whole(said, terms, asked.request, client)
                sealed = None if whole is None else seal(whole, self._layout, terms, round, client)
                sent.append(Sent(client, sealed))
            yield sent
        for clients in self._stacks(trainers, round):
            data, _, trained = self._train(round, clients, shared, line)
            updates = [self._kept(round, client, j, data, shared, trained, line) for j, client in enumerate(clients)]
            yield [
                Sent(client, None if update is None else seal_update(update, self._layout, terms))
                for client, update in zip(clients, updates, strict=True)
            ]

    def _begin(self, setup: Setup, file: Path) -> Pacer:
        """The pacer of the run's file, or a new one by the training rows of the first clients."""
        engine, first = self._study.engine, range(min(4, len(setup.population)))
        everyone = len(setup.population) // (self._study.rounds if self._study.privacy.rotates else 1)
        cohort = min(self._study.clients.per_round or everyone, everyone)
        return Pacer.kept(
            file,
            lambda: limits(
                self._base,
                self._lora,
                setup.initial,
                [self._train_rows(client, 1) for client in first],
                self._recipe,
                stack=engine.stack or None,
                threads=engine.threads,
                memory=engine.memory,
                clients=max(1, cohort),
            ),
        )

    def _stacks(self, cohort: Sequence[int], round: int) -> Iterator[list[int]]:
        """The cohort in stacks of clients who have about as much to train on, so that few wait for others."""
        left, near = list(cohort), list[int]()
        while left or near:
            size = self._pacer.next(round)
            if not near:
                near, left = left[: 4 * size], left[4 * size :]
                rows = {client: self._train_rows(client, round) for client in near}
                near.sort(key=lambda c: (len(rows[c]), sum(map(len, rows[c].ids)), c))
            yield near[:size]
            near = near[size:]

    def _below(self, rows: Sequence[Rows], names: Sequence[Hashable] = (None,)) -> list[Rows]:
        """The rows with what the base's layers below the first adapter say of them, as far as memory allows.

        What has a name is kept for the rounds to come.
        """
        found, room = [], self._study.engine.memory * 2**20 / len(rows)
        for one, name in zip(rows, names, strict=True):
            known = self._known.get(name) or stacked.below(self._base, self._lora, one, self._pacer.pace.tokens, room)
            size = sum(states.nbytes for states in known.hidden or ())
            if name is not None and name not in self._known and 0 < size <= self._room:
                self._known[name], self._room = known, self._room - size
            found.append(known)
        return found

    def _whole(self, said: Message, terms: Terms, request: Request, client: int) -> Message:
        """With the client's word on slices and on its update's norm, where the study has these."""
        more = {}
        if SLICES in self._layout:
            own = self._population.attributes(client)
            more[SLICES] = slices.said(self._values, own, request.drill_down, self._probes, said.readings)
        if privacy_terms.CLIPPING in self._layout:
            weight, change = said.update[-1], said.update[:-1]
            within = weight <= 0 or float(np.linalg.norm(change / weight)) <= terms.update_clip
            more[privacy_terms.CLIPPING] = np.array([float(within)])
        return replace(said, readings={**said.readings, **more})

    def _stack(
        self, round: int, clients: Sequence[int], shared: Adapter, common: Array | None, line: Container[int]
    ) -> dict[int, Message | None]:
        """What each client of a stack has to say; None if its training failed."""
        k, again = len(clients), not self._study.privacy.rotates  # who answers once need not be remembered
        names = [("eval", c) if again else None for c in clients]
        local_rows = self._below([self._eval(c)[1] for c in clients], names)
        data, held, trained = self._train(round, clients, shared, line)
        own_z, public_z = [np.zeros((0, 0))] * k, [self._embedded] * k
        if self._method.needs_embedding:
            own_z = [stacked.embed(self._base, rows) for rows in local_rows]
        public = [self._asked(self._domains(c)) for c in clients]
        received_local = self._probabilities(self._score(held, local_rows, own_z))
        received = [common] * k if common is not None else self._probabilities(self._score(held, public, public_z))
        base_local = self._base_local(clients, local_rows)
        after_local = self._probabilities(self._score(trained.held, local_rows, own_z))
        after = self._probabilities(self._score(trained.held, public, public_z))
        said = self._replies(held, public_z) if self._unsafe else None
        messages: dict[int, Message | None] = {}
        for j, client in enumerate(clients):
            update = self._kept(round, client, j, data, shared, trained, line)
            if update is None:
                messages[client] = None
                continue
            view = self._view(client, base_local[j], received_local[j], after_local[j], received[j], after[j])
            if said is not None:
                view = replace(view, replies={"base": self._base_replies, "received": said[j]})
            readings = {probe.name: self._read(probe, view) for probe in self._probes}
            model = Held(stacked.unstack(trained.held.shared, j), stacked.unstack(trained.held.private, j))
            if self._guard is not None:
                readings[guard.GUARD], model = self._guarded(self._guard, client, round, view, model)
            if self._tap is not None:
                self._tap(round, client, readings)
            messages[client] = Message(
                readings={name: reading.values for name, reading in readings.items()}, update=update
            )
            if round == self._study.rounds and client < self._study.personalize.save_personalized:
                self._keep_personalized(client, model)
        return messages

    def _train(
        self, round: int, clients: Sequence[int], shared: Adapter, line: Container[int]
    ) -> tuple[list[Rows], Held, Trained]:
        """A stack of clients' rows, what they hold at the round's start, and what training makes of it."""
        k, method = len(clients), self._method
        data = [self._train_rows(c, round) for c in clients]
        private = [self._private.load(c, line) or self._first_private for c in clients]
        held = Held(stacked.repeat(shared, k), stacked.stack(private) if self._first_private else {})
        if method.needs_embedding:
            held = method.prepare(held, [stacked.embed(self._base, rows) for rows in data])
        if self._record_level is None:
            # examples of its own in a round are not kept, nor those of a client who trains once
            same = not self._study.privacy.rotates and self._study.clients.max_examples is None
            if same or self._recipe.epochs * method.fits > 1:  # else they would be computed once anyway
                data = self._below(data, [("train", c) if same else None for c in clients])

        def order(j: int, epoch: int) -> np.random.Generator:
            return stream(self._study.seed, "order", clients[j], round, epoch)

        def coins(j: int) -> torch.Generator:
            return torch.Generator().manual_seed(derive(self._study.seed, "dropout", clients[j], round))

        sources = self._sources(clients, round)

        def local_fit(start: Adapter, **how: Any) -> object:
            # `how` is what the method chose among fit's own keywords; fit checks them.
            if self._record_level is None:
                return fit(self._base, self._lora, start, data, self._recipe, order, coins=coins, **how)
            return fit_private(self._base, self._lora, start, data, self._recipe, self._record_level, sources, **how)

        with self._pacer.timed(k, sum(len(ids) for rows in data for ids in rows.ids)):
            return data, held, method.train(held, local_fit)

    def _kept(
        self,
        round: int,
        client: int,
        j: int,
        data: Sequence[Rows],
        shared: Adapter,
        trained: Trained,
        line: Container[int],
    ) -> Array | None:
        """The update of client j of a stack, whose private tensors are written to its disk; None if it failed."""
        if trained.failed[j]:
            self._failed(client, round)
            return None
        if self._first_private:
            self._private.save(client, round, stacked.unstack(trained.held.private, j), line)
        weight = float(len(data[j])) if self._study.personalize.weighting == "examples" else 1.0
        return self._update(shared, trained.held.shared, j, weight)

    def _failed(self, client: int, round: int) -> None:
        if self._study.personalize.on_failure == "stop":
            raise ClientFailed(
                [
                    Problem(
                        f"client {self._population.name(client)!r}, round {round}",
                        "its training loss is not finite",
                        'lower personalize.lr, check the client\'s data, or set personalize.on_failure = "drop"',
                    )
                ]
            )

    def _view(
        self, client: int, base_local: Array, received_local: Array, after_local: Array, received: Array, after: Array
    ) -> ClientView:
        items, _ = self._eval(client)
        suites = {
            role: Answers(
                items=self._items[a:b],
                base=self._base_public[a:b],
                received=received[a:b],
                personalized=after[a:b],
            )
            for role, (a, b) in self._slices().items()
        }
        local = Answers(items=items, base=base_local, received=received_local, personalized=after_local)
        return ClientView(local=local, suites=suites, domains=self._domains(client))

    def _read(self, probe: Probe, view: ClientView) -> Reading:
        """One probe's reading. Where examples are the unit, what leaves exactly never sees the client's own items, and
        what is about them is read so that one of them moves it little, and not at all below the agreed number.
        """
        record = self._study.privacy.record
        if self._record_level is None or record is None:
            return probe.read(view)
        if isinstance(probe, OwnProbe) and len(view.local) >= record.min_held_out:
            return probe.read_by_item(view)
        return probe.read(view.public())

    def _domains(self, client: int) -> frozenset[str]:
        """The client's domains; none where they are hidden, as they tell of its examples."""
        record = self._study.privacy.record
        hidden = self._record_level is not None and record is not None and record.domains == "hidden"
        return frozenset() if hidden else self._population.domains(client)

    def _sources(self, clients: Sequence[int], round: int) -> list[np.random.Generator] | None:
        """Coins and noise of private training: seeded in a simulation, else the operating system's."""
        if self._study.privacy.noise == "system":
            return None
        return [stream(self._study.seed, "dpsgd", client, round) for client in clients]

    def _asked(self, domains: frozenset[str]) -> Rows:
        """The public rows that a client with these domains is asked: what no probe would look at costs nothing."""

        def make() -> Rows:
            pairs = [(role, item) for role, items in self._roles.items() for item in items]
            return self._public.only([relevant(role, item, domains) for role, item in pairs])

        return self._recent.get(("asked", domains), make)

    def _is_unsafe(self, at: int, item: Item) -> bool:
        start, stop = self._slices().get(Role.SAFETY, (0, 0))
        return start <= at < stop and item.answer == 0

    def _replies(self, held: Held, embedded: Sequence[Array]) -> list[list[str]]:
        """K clients' replies to the unsafe prompts, from the models they received."""
        weights = self._method.weights(held, embedded) if self._method.needs_embedding else None
        return replies(
            self._base,
            [self._items[i] for i in self._unsafe],
            lora=self._lora,
            adapters=self._method.adapters(held),
            weights=None if weights is None else [w[:, self._unsafe] for w in weights],
            k=len(embedded),
        )

    def _slices(self) -> dict[Role, tuple[int, int]]:
        slices, at = {}, 0
        for role, items in self._roles.items():
            slices[role] = (at, at + len(items))
            at += len(items)
        return slices

    def _train_rows(self, client: int, round: int) -> Rows:
        limit = self._study.clients.max_examples
        items = self._recent.get(("items", client), lambda: self._population.items(client, "train"))
        if limit is not None and len(items) > limit:
            picked = stream(self._study.seed, "examples", client, round).choice(len(items), limit, replace=False)
            return self._base.targets([items[i] for i in sorted(picked)])
        return self._recent.get(("train", client), lambda: self._base.targets(items))

    def _eval(self, client: int) -> tuple[tuple[Item, ...], Rows]:
        def make() -> tuple[tuple[Item, ...], Rows]:
            items = self._population.items(client, "eval")
            return items, self._base.rows(items)

        return self._recent.get(("eval", client), make)

    def _base_local(self, clients: Sequence[int], rows: Sequence[Rows]) -> list[Array]:
        """What the base says to clients' own held-out items, asked once of each client."""
        known = {j for j, client in enumerate(clients) if ("base", client) in self._recent}
        said = {j: self._recent.get(("base", clients[j]), lambda: np.zeros((0, 0))) for j in known}
        new = [j for j in range(len(clients)) if j not in known]
        if new:
            asked = [rows[j] for j in new]
            scores = stacked.score(self._base, self._lora, [], asked, tokens=self._pacer.pace.tokens)
            said |= dict(zip(new, self._probabilities(scores), strict=True))
        return [self._recent.get(("base", client), partial(said.__getitem__, j)) for j, client in enumerate(clients)]

    def _score(self, held: Held, rows: Sequence[Rows], embedded: Sequence[Array]) -> list[Scores]:
        """Scores of K clients' models on K row lists."""
        adapters = self._method.adapters(held)
        weights = None
        if self._method.needs_embedding:
            widest = max(len(z) for z in embedded)
            padded = [np.pad(z, ((0, widest - len(z)), (0, 0)), constant_values=np.nan) for z in embedded]
            weights = self._method.weights(held, padded)
        return stacked.score(self._base, self._lora, adapters, rows, weights=weights, tokens=self._pacer.pace.tokens)

    @staticmethod
    def _probabilities(scores: Sequence[Scores]) -> list[Array]:
        return [s.choice_probability() for s in scores]

    @staticmethod
    def _update(before: Adapter, after: Adapter, j: int, weight: float) -> Array:
        """(weight * change of every shared number..., weight), float64, in the order of the names."""
        changes = [(after[name][j] - tensor).double().reshape(-1).numpy() for name, tensor in sorted(before.items())]
        return np.concatenate([*(weight * change for change in changes), np.array([weight])])

    def _guarded(
        self, guarding: guard.Guard, client: int, round: int, view: ClientView, model: Held
    ) -> tuple[Reading, Held]:
        """What the client's guard says of the model just trained, and the model that the client deploys."""
        new = guarding.losses(view if self._record_level is None else view.public())
        if not guarding.fails(new):
            self._good.save(client, round, guard.together(model, new), range(round))
            return guard.said(kept=False), model
        found = self._good.load(client, range(round))
        model, old = (self._method.split(self._initial), {}) if found is None else guard.apart(found)
        return guard.said(kept=True, avoided=guarding.avoided(new, old)), model

    def _keep_personalized(self, client: int, model: Held) -> None:
        """Write the adapter that the client deploys (its own, in a mixture) to its own folder, in peft's format."""
        save(self._place(client) / "adapter", self._method.adapters(model)[-1], self._lora, self._base)


def apply_update(shared: Adapter, total: Array) -> Adapter:
    """The server's step: add the released weighted mean change to the shared tensors.

    Noise may leave no weight, or less; then there is no mean, and the shared tensors stay.
    """
    weight = total[-1]
    if not weight > 0:
        return shared
    new, at = {}, 0
    for name, tensor in sorted(shared.items()):
        change = torch.from_numpy(total[at : at + tensor.numel()] / weight).reshape(tensor.shape)
        new[name] = (tensor.double() + change).to(tensor.dtype)
        at += tensor.numel()
    return new
