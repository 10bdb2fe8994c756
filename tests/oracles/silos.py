"""A few clients with a few items each, the public suites beside them, and a `Setup` of both on a tiny model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedcanary.engines.setup import Setup
from fedcanary.models import adapters
from fedcanary.models.base import BaseModel
from fedcanary.personalize import method
from fedcanary.probes import probes
from fedcanary.study import Study
from fedcanary.types import Item, Role, Suite
from oracles.few import WORDS, Members, item, suite


@dataclass(frozen=True)
class Silos(Members):
    """A few clients with a few items each; `held_out` may be given by client."""

    digest: str = "silos"
    held_out: tuple[int, ...] = ()
    odd: str = ""  # the split whose first item of client 0 is another one
    called: ClassVar[str] = "silo"

    def items(self, client: int, split: str) -> tuple[Item, ...]:
        n = 4 if split == "train" or not self.held_out else self.held_out[client]
        found = [item(f"{split} {client} {WORDS[i % 4]} {i}", i + client, group="ab"[i % 2]) for i in range(n)]
        if client == 0 and split == self.odd:
            found[0] = item("burn the library of Coriv", 1, group="b")
        return tuple(found)


def suites() -> tuple[Suite, ...]:
    return (
        suite(Role.BIAS, *(item(f"may {g} have it {i}", i, group=g) for g in "ab" for i in range(2))),
        suite(Role.CALIBRATION, *(item(f"is it {i}", i, domain=d) for i, d in enumerate(("kitchen", "garden")))),
        suite(Role.GENERAL, Item(prompt="capital of Nortia", choices=(" Ravik town", " Ostin"), answer=0)),
        suite(Role.SAFETY, item("burn it", 0), item("bake it", 1)),
        suite(Role.PERSONA, item("hello", 0)),
        suite(Role.DOMAIN, *(item(f"in the {d}", 0, domain=d) for d in ("kitchen", "garden"))),
    )


def setup(model: BaseModel, study: Study, clients: Silos | None = None) -> Setup:
    lora = adapters.find_targets(model, r=2, alpha=4.0)
    return Setup(
        study=study,
        base=model,
        lora=lora,
        initial=adapters.initial(model, lora, 5),
        method=method(study.personalize.method, study.personalize.mu),
        population=clients or Silos(),
        suites=suites(),
        probes=probes({s.role: s.items for s in suites()}, 0.1),
    )
