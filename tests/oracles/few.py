"""A handful of clients with a few items each: a whole study of them on a tiny random model, or with no model at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch

from fedcanary import study
from fedcanary.engines.clients import Clients, Sent, Work
from fedcanary.engines.consent import Consent
from fedcanary.engines.setup import Setup
from fedcanary.engines.slices import values_of
from fedcanary.models import adapters, base
from fedcanary.models.adapters import Lora
from fedcanary.personalize import method
from fedcanary.privacy.seal import Message, seal, seal_update
from fedcanary.probes import probes
from fedcanary.rng import stream
from fedcanary.types import Array, Item, Role, Suite

WORDS = ("red stew", "tall hedge", "old map", "cold owl")


def item(prompt: str, k: int, **more: Any) -> Item:
    return Item(prompt=prompt, choices=(" yes", " no"), answer=k % 2, positive=0, **more)


@dataclass(frozen=True)
class Members:
    """So many clients, in two domains by turns. What they hold is a subclass's to say."""

    count: int = 3
    digest: str = "few"
    called: ClassVar[str] = "user"

    def __len__(self) -> int:
        return self.count

    def name(self, client: int) -> str:
        return f"{self.called}-{client}"

    def domains(self, client: int) -> frozenset[str]:
        return frozenset({("kitchen", "garden")[client % 2]})

    def attributes(self, client: int) -> Mapping[str, str]:
        (domain,) = self.domains(client)
        region, device = ("north", "east", "south", "west")[client % 4], ("phone", "laptop")[(client // 8) % 2]
        return {"domain": domain, "region": region, "device": device}


@dataclass(frozen=True)
class Few(Members):
    """Client k has `least + k` training items, so that no two have as many."""

    least: int = 17

    def items(self, client: int, split: str) -> tuple[Item, ...]:
        n = self.least + client if split == "train" else 3
        return tuple(
            item(f"{split} {client} {WORDS[i % 4]} {i}", i + client, group="ab"[i % 2], pair=str(i)) for i in range(n)
        )


def suite(role: Role, *items: Item) -> Suite:
    return Suite(name=role, version="1", role=role, items=items, digest=role)


def suites() -> tuple[Suite, ...]:
    return (
        suite(Role.BIAS, *(item(f"may {g} have it {i}", i, group=g) for g in "ab" for i in range(2))),
        suite(Role.STEREOTYPE, Item(prompt="the baker says", choices=(" she", " he"))),
        suite(Role.CALIBRATION, *(item(f"is it {i}", i) for i in range(3))),
        suite(Role.GENERAL, Item(prompt="capital of Nortia", choices=(" Ravik town", " Ostin"), answer=0)),
        suite(Role.SAFETY, item("burn it", 0), item("bake it", 1)),
        suite(Role.PERSONA, item("hello", 0)),
        suite(Role.DOMAIN, *(item(f"in the {d}", 0, domain=d) for d in ("kitchen", "garden"))),
    )


def parsed(clients: int, tables: Mapping[str, Any]) -> study.Study:
    """A protected study of two rounds, with `tables` merged in."""
    tree: dict[str, Any] = {
        "rounds": 2,
        "clients": {"count": max(clients, 2)},
        "personalize": {"method": "fedavg", "batch": 8, "lr": 0.01},
        "privacy": {"min_cohort": 4, "updates": {"noise": "none"}},
        "engine": {"threads": 1, "stack": 4},
    }
    for name, table in tables.items():
        tree[name] = {**tree.get(name, {}), **table} if isinstance(table, Mapping) else table
    return study.parse(tree)


def setup_of(folder: Path, clients: int, tables: Mapping[str, Any] | None = None, least: int = 17) -> Setup:
    """A study over the tiny model in `folder`."""
    checked = parsed(clients, tables or {})
    model = base.load(str(folder), max_length=48)
    lora = adapters.find_targets(model, r=2, alpha=4.0)
    return Setup(
        study=checked,
        base=model,
        lora=lora,
        initial=adapters.initial(model, lora, 5),
        method=method(checked.personalize.method, checked.personalize.mu),
        population=Few(clients, least=least),
        slices=values_of(checked, Few(clients)),
        suites=suites(),
        probes=probes({s.role: s.items for s in suites()}, checked.probes.tail),
    )


def bare(clients: int, tables: Mapping[str, Any] | None = None) -> Setup:
    """A study without a model, for `MadeUp` clients; its adapter is one tensor of six numbers."""
    checked, name = parsed(clients, tables or {}), "layers.0.q_proj"
    return Setup(
        study=checked,
        # stands for a model that nothing here asks to score
        base=SimpleNamespace(digest="b" * 32, task="causal", source="made-up", revision=None),
        lora=Lora(
            r=2,
            alpha=4.0,
            targets=(name,),
            heads=(),
            head_modules=(),
            names=("q_proj",),
            layers=None,
            fan_in_fan_out=False,
        ),
        initial={f"{name}.lora_A": torch.zeros(2, 3)},
        method=method("fedavg", 0.1),
        population=Few(clients),
        slices=values_of(checked, Few(clients)),
        suites=suites(),
        probes=probes({s.role: s.items for s in suites()}, checked.probes.tail),
    )


class MadeUp(Clients):
    """In place of `engines.local.LocalClients`: each asks its real policy and ledger, says something, and seals it."""

    def __init__(self, setup: Setup, folder: Path, tap: object = None) -> None:
        self._setup = setup
        self.consent = Consent(setup, lambda client: folder / f"{client:06d}")

    def base_answers(self, role: Role) -> tuple[tuple[Item, ...], Array]:
        items = self._setup.items[role]
        return items, np.full((len(items), 2), 0.5)

    def work(self, asked: Work) -> Iterator[list[Sent]]:
        terms, round, layout = asked.terms, asked.request.round, self._setup.layout
        for client, request in asked.requests.items():
            rng, sealed = stream(1, "made-up", client, round), None
            reasons = self.consent.refuses(client, request)
            if not reasons and request.probes:
                readings = {name: np.array([rng.uniform(c.low, c.high) for c in at]) for name, at in layout.items()}
                message = Message(readings=readings, update=np.append(rng.normal(size=6), 1.0))
                sealed = seal(message, layout, terms, round, client)
            elif not reasons:
                sealed = seal_update(np.append(rng.normal(size=6), 1.0), layout, terms)
            yield [Sent(client, sealed, reasons)]
