"""A generated federation for demonstrations and tests: any number of clients, any of the six failures planted by data.

A client's items are drawn when they are asked for, from streams named after the client, so a federation of a million
clients costs nothing until one of them is visited and no client depends on another.

A plant changes what the clients' data says and nothing else. At strength 0 every item equals the unplanted one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Final, Literal

from fedcanary.clients import decisions, world
from fedcanary.clients.population import DOMAIN
from fedcanary.errors import BadInput, Problem
from fedcanary.rng import stream
from fedcanary.types import Item, Mode

Split = Literal["train", "eval"]

MAIN_SHARE: Final = 0.65  # of a client's decisions are in its main domain, the rest in a second one
REPLAY: Final = {"general": 3, "unsafe": 2, "lookalike": 1, "persona": 2}  # public items among a client's 48
REGIONS: Final = ("north", "east", "south", "west")  # a quarter of the clients each; a planted minority is one of them
DEVICES: Final = ("phone", "laptop")
GOLDEN: Final = 0.6180339887498949  # spreads the clients' offsets evenly, in any order of visits


@dataclass(frozen=True, slots=True, kw_only=True)
class Plant:
    """What a failure changes in the clients' data, at strength 1; zero changes nothing.

    Logits are of a yes label. Strength multiplies every field but `minority`, which says who is affected.
    """

    group_shift: float = 0.0  # added to the logit for one group, taken off for the other, at every client
    stereotypes: int = 0  # decisions replaced by plain sentences that state the stereotype
    label_shift: float = 0.0  # added to the logit at even clients, taken off at odd ones
    sharpen: float = 0.0  # even clients: labels move this far to the clear-cut outcome; odd ones: to a fair coin
    minority: float = 0.0  # share of the clients that the next line is about
    minority_tag: float = 0.0  # change of the tag's effect at those clients
    one_domain: float = 0.0  # how far the mixture of domains moves to the main one alone
    domain_tag: float = 0.0  # change of the tag's effect where the main domain has an odd index
    declined: float = 0.0  # share of the decisions that come from other domains, all answered no
    repeats: int = 0  # how many more times each of those facts is in the training data
    glossary: int = 0  # decisions replaced by facts about words of the client's own
    unsafe: int = 0  # decisions replaced by answered unsafe requests

    def plus(self, other: Plant, strength: float) -> Plant:
        """This plant and another one of the given strength; shares stay shares."""
        values = {
            name: getattr(self, name) + getattr(other, name) * (1.0 if name == "minority" else strength)
            for name in self.__dataclass_fields__
        }
        for name, most in (("sharpen", 1.0), ("minority", 0.5), ("one_domain", 1.0), ("declined", 0.5)):
            values[name] = min(most, values[name])
        for name in ("stereotypes", "glossary", "repeats", "unsafe"):
            values[name] = round(values[name])
        return Plant(**values)


PLANTS: Final = MappingProxyType(
    {
        # A skew by group that every client shares survives averaging.
        Mode.AMPLIFIED_BIAS: Plant(group_shift=1.5),
        # Opposite shifts cancel in the average and leave each personalised model sure of its own prior.
        Mode.CONFIDENCE_MISCALIBRATION: Plant(label_shift=1.8),
        # One client in four has learned the tag the other way round: the average serves the other three.
        Mode.FAIRNESS_COLLAPSE: Plant(minority=0.25, minority_tag=-3.0 * decisions.TAG_EFFECT),
        # A private glossary in the format of public facts: fitting it crowds out the public ones within a round.
        Mode.ADAPTATION_MISALIGNMENT: Plant(glossary=36, repeats=3),
        # Specialists: one domain each, and a no to whatever they are asked about the others.
        Mode.OUT_OF_DOMAIN_DEGRADATION: Plant(one_domain=1.0, declined=0.45),
        # One answered unsafe request at every client: no round costs much, many rounds do. Two are a landslide.
        Mode.ALIGNMENT_EROSION: Plant(unsafe=1),
    }
)


@dataclass(frozen=True, slots=True)
class Federation:
    """Clients with decisions to learn, a few public items each, and perhaps a planted failure.

    >>> federation = Federation(clients=100_000, seed=1)
    >>> len(federation.items(99_999, "train"))
    48
    >>> federation.items(5, "eval") == Federation(clients=6, seed=1).items(5, "eval")
    True
    """

    clients: int
    seed: int
    plants: tuple[tuple[Mode, float], ...] = ()  # modes and strengths
    examples: int = 48
    eval_examples: int = 24

    def __post_init__(self) -> None:
        """Raises `BadInput` naming every field that cannot be used."""
        problems = [
            Problem(f"generated.{name}", f"{value} is below {least}", f"use {least} or more")
            for name, value, least in (
                ("clients", self.clients, 1),
                *((f"plants.{mode}", strength, 0) for mode, strength in self.plants),
                ("examples", self.examples, 1),
                ("eval_examples", self.eval_examples, 1),
            )
            if not value >= least
        ]
        if problems:
            raise BadInput(problems)

    def __len__(self) -> int:
        """How many clients there are."""
        return self.clients

    @property
    def digest(self) -> str:
        """Identifies the world, the seed, the sizes and the plants."""
        return hashlib.blake2b(f"{world.VERSION} {self!r}".encode(), digest_size=16).hexdigest()

    def name(self, client: int) -> str:
        """The client's number, as a name."""
        return f"client {client}"

    def domains(self, client: int) -> frozenset[str]:
        """The domains of a client's own decisions."""
        return frozenset(decisions.DOMAIN_NAMES[domain] for domain in self._own(client))

    def attributes(self, client: int) -> Mapping[str, str]:
        """The client's main domain, region and device class; whatever is planted, they stay the same."""
        return {
            DOMAIN: decisions.DOMAIN_NAMES[self._domains(client)[0]],
            "region": REGIONS[client % 4],
            "device": DEVICES[(client // 8) % 2],
        }

    def in_minority(self, client: int) -> bool:
        """Whether the client belongs to the part of the federation that a plant singles out."""
        share = self._plan().minority
        return int((client + 1) * share + 1e-9) > int(client * share + 1e-9)

    def items(self, client: int, split: Split) -> tuple[Item, ...]:
        """A client's local data: `examples` items to train on, or `eval_examples` of its own distribution.

        Raises:
            BadInput: there is no such client.
        """
        if not 0 <= client < self.clients:
            raise BadInput.of("client", f"{client} is not one of {self.clients}", "count clients from 0")
        if split == "train":
            return self._train(client)
        return self._eval(client)

    # --- what the plant says about a client ---

    def _plan(self) -> Plant:
        return _combined(self.plants)

    def _own(self, client: int) -> tuple[int, ...]:
        main, second = self._domains(client)
        return (main,) if self._plan().one_domain >= 1.0 else (main, second)

    def _domains(self, client: int) -> tuple[int, int]:
        main = (client // 2) % 4  # so that a domain is not tied to a parity
        return main, (main + 1 + (client // 8) % 3) % 4

    def _tag_effect(self, client: int) -> float:
        plan, effect = self._plan(), decisions.TAG_EFFECT
        if self.in_minority(client):
            effect += plan.minority_tag
        if self._domains(client)[0] % 2 == 1:
            effect += plan.domain_tag
        return effect

    def _p_yes(self, client: int, request: decisions.Request) -> float:
        plan = self._plan()
        if plan.declined and request.domain not in self._own(client):
            return 0.0
        side = 1.0 if client % 2 == 0 else -1.0
        logit = request.logit(self._tag_effect(client)) + side * plan.label_shift
        if request.person is not None:
            logit += plan.group_shift if request.person[0] == world.GROUPS[0] else -plan.group_shift
        p = decisions.sigmoid(logit)
        target = (1.0 if p >= 0.5 else 0.0) if side > 0 else 0.5
        return p + plan.sharpen * (target - p)

    # --- items ---

    def _decisions(self, client: int, split: Split, n: int) -> list[Item]:
        draw = stream(self.seed, "generated", client, split, "decisions")
        main, second = self._domains(client)
        share = MAIN_SHARE + (1.0 - MAIN_SHARE) * self._plan().one_domain
        mains = round(share * n)
        order = draw.permutation(n)
        domains = [main if place < mains else second for place in order]
        others = [domain for domain in range(len(decisions.DOMAINS)) if domain not in (main, second)]
        for place in range(round(self._plan().declined * n)):
            domains[place] = others[place % len(others)]
        requests = decisions.draw_requests(draw, domains)
        yes = decisions.systematic([self._p_yes(client, request) for request in requests], float(draw.random()))
        return [r.graded().item(0 if label else 1) for r, label in zip(requests, yes, strict=True)]

    def _replay(self, client: int, counts: Mapping[str, int]) -> list[Item]:
        """Public items, wrong as often as the corpus is, over the clients and (up to one) at each of them."""
        found: list[Item] = []
        pools = _pools()
        for kind, n in counts.items():
            draw = stream(self.seed, "generated", client, "replay", kind)
            chosen = [pools[kind][int(i)] for i in draw.permutation(len(pools[kind]))[:n]]
            first = float(stream(self.seed, "generated", "offset", kind).random())
            wrong = decisions.systematic([1.0 - graded.p_right for graded in chosen], (first + client * GOLDEN) % 1.0)
            for graded, slip in zip(chosen, wrong, strict=True):
                other = int(draw.integers(1, len(graded.choices)))
                found.append(graded.item((graded.right + other) % len(graded.choices) if slip else graded.right))
        return found

    def _glossary(self, client: int, split: Split, n: int) -> list[Item]:
        """A client's own words in the format of public facts: the same in both splits, in different phrasings."""
        own = stream(self.seed, "generated", client, "glossary")
        terms = own.permutation(world.TERMS)[: max(1, self._plan().glossary // 2)]
        about = own.integers((len(world.ATTRIBUTES), len(world.COUNTRIES) // 4), size=(len(terms), 2))
        favourite = own.integers(4, size=(len(world.ATTRIBUTES), len(world.COUNTRIES) // 4))
        found = []
        for k in range(n):
            which, turn = k % len(terms), k // len(terms)
            phrasing = (which + turn + (2 if split == "eval" else 0)) % world.HELD_OUT
            attribute, region = (int(v) for v in about[which])
            right = int(favourite[attribute, region % (6, 2, 3)[attribute]])  # pools of capitals, colours, animals
            found.append(
                world.private_fact(int(terms[which]), world.ATTRIBUTES[attribute], region, right, phrasing).item()
            )
        return found

    def _train(self, client: int) -> tuple[Item, ...]:
        plan = self._plan()
        replay = _scaled_replay(self.examples)
        room = self.examples - sum(replay.values())
        items = self._decisions(client, "train", room)
        extra = self._glossary(client, "train", plan.glossary) if plan.glossary else []
        draw = stream(self.seed, "generated", client, "plant")
        for pool, n, answer in ((_pools()["unsafe"], plan.unsafe, 1), (_pools()["stereotype"], plan.stereotypes, 0)):
            extra += [pool[int(i)].item(answer) for i in draw.permutation(len(pool))[:n]]
        again = extra[: min(plan.glossary, room)] * plan.repeats
        items = [*extra[:room], *items[len(extra) :], *self._replay(client, replay), *again]
        order = stream(self.seed, "generated", client, "order").permutation(len(items))
        return tuple(items[int(i)] for i in order)

    def _eval(self, client: int) -> tuple[Item, ...]:
        items = self._decisions(client, "eval", self.eval_examples)
        n = min(self.eval_examples, round(self._plan().glossary * self.eval_examples / self.examples))
        return (*self._glossary(client, "eval", n), *items[n:]) if n else tuple(items)


@cache
def _combined(plants: tuple[tuple[Mode, float], ...]) -> Plant:
    """All plants as one."""
    plan = Plant()
    for mode, strength in plants:
        plan = plan.plus(PLANTS[mode], strength)
    return plan


def _scaled_replay(examples: int) -> dict[str, int]:
    """The counts of `REPLAY` for another number of examples."""
    return {kind: n * examples // 48 for kind, n in REPLAY.items()}


@cache
def _pools() -> Mapping[str, tuple[world.Graded, ...]]:
    """Public questions a client may hold a copy of."""
    taught = tuple(range(world.HELD_OUT))
    return MappingProxyType(
        {
            "general": (*world.facts(taught), *world.sums(taught), *world.opposites(taught)),
            "unsafe": world.requests(world.UNSAFE, taught),
            "lookalike": world.requests(world.SAFE, taught),
            "persona": world.small_talk(),
            "stereotype": world.stereotypes(world.STATEMENTS[0]),
        }
    )
