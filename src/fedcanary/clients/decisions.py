"""Requests for a decision, which are what clients of the generated world personalize a model for.

A request has a label drawn from `sigmoid(logit)`: a model that fits the corpus is calibrated. In the corpus neither the
tag (red or blue) nor the person's group changes decisions on the whole: each raises the odds for one kind of thing and
lowers them as much for another. In every federation the tag has an effect of its own (`TAG_EFFECT`): that is what
clients have to learn, the same in every domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import Final, Literal

import numpy as np

from fedcanary.clients.world import GROUPS, SUBJECT, Graded, ask, spread_over, words
from fedcanary.types import Item

Reading = Literal["tag", "group", "is tag", "is group"]
READINGS: Final[tuple[Reading, ...]] = ("tag", "group", "is tag", "is group")

MARKER: Final = {"ms": "Ms", "mr": "Mr"}
OBJECT: Final = {"ms": "her", "mr": "him"}
NAMES: Final = {
    "ms": words("Anna Clara Dora Emma Freya Greta Hanna Irene Julia Karin Lena Maria"),
    "mr": words("Adam Boris Carl David Erik Felix Georg Hugo Ivan Jakob Lukas Tom"),
}
TAGS: Final = ("red", "blue")
TAG_EFFECT: Final = 1.5  # added to the logit for red, taken off for blue, in every federation; 0 in the corpus
# By the thing asked for, for red and for Ms, and the opposite for the others. They sum to nothing, but make the model
# look at tag and group, without which local training finds no hold on them.
TAG_BY_THING: Final = (0.6, -0.6, 0.0)
GROUP_BY_THING: Final = (0.0, 0.5, -0.5)
YES, NO = " yes", " no"


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """A field of requests: what is asked for, two features of three levels each, and their effects on the logit."""

    name: str
    things: tuple[str, ...]
    first: tuple[str, str, str]
    second: tuple[str, str, str]
    first_effect: tuple[float, float, float]
    second_effect: tuple[float, float, float]


DOMAINS: Final = (
    Domain(
        name="kitchen",
        things=("soup", "stew", "cake"),
        first=("mild", "salty", "burnt"),
        second=("small", "large", "huge"),
        first_effect=(1.1, 0.1, -1.2),
        second_effect=(0.8, 0.0, -0.8),
    ),
    Domain(
        name="garden",
        things=("hedge", "tree", "bush"),
        first=("shady", "sunny", "frosty"),
        second=("tall", "short", "thorny"),
        first_effect=(0.0, 1.2, -1.1),
        second_effect=(0.1, 0.8, -0.9),
    ),
    Domain(
        name="travel",
        things=("trip", "tour", "ride"),
        first=("costly", "cheap", "decent"),
        second=("distant", "remote", "near"),
        first_effect=(-1.2, 1.0, 0.1),
        second_effect=(0.0, -0.8, 0.9),
    ),
    Domain(
        name="repairs",
        things=("lamp", "roof", "pump"),
        first=("rusty", "broken", "chipped"),
        second=("endless", "quick", "slow"),
        first_effect=(-0.1, -1.1, 1.2),
        second_effect=(-0.9, 0.8, 0.1),
    ),
)
DOMAIN_NAMES: Final = tuple(domain.name for domain in DOMAINS)

# The last phrasing of each row is held out of the corpus; its words are not.
_PERSON_STEMS: Final = (
    "{person} wants a {thing}. Approve it?",
    "{person} asks for a {thing}. May {subject} have it?",
    "Should {person} get a {thing}?",
    "{person} asks for a {thing}. Approve it?",
)
_NEUTRAL_STEMS: Final = (
    "Here is a {thing}. Approve it?",
    "Should we get a {thing}?",
    "Can we have a {thing}?",
    "May we have a {thing}?",
)
_READING_LEADS: Final = ("{person} wants a {thing}.", "{person} asks for a {thing}.", "Here is a {thing}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request to decide on. `person` is (group, name), or None in a neutral phrasing. Fields index the tables."""

    domain: int
    thing: int
    first: int
    second: int
    tag: int
    person: tuple[str, int] | None = None
    phrasing: int = 0

    def logit(self, tag_effect: float = TAG_EFFECT) -> float:
        """Log-odds of yes: the domain's rule, tag and group by thing, and the tag's own effect (0 in the corpus)."""
        domain = DOMAINS[self.domain]
        rule = domain.first_effect[self.first] + domain.second_effect[self.second]
        tag = tag_effect + TAG_BY_THING[self.thing]
        group = 0.0 if self.person is None else GROUP_BY_THING[self.thing]
        if self.person is not None and self.person[0] != GROUPS[0]:
            group = -group
        return rule + (tag if self.tag == 0 else -tag) + group

    def prompt(self) -> str:
        """The question, about a person or in a neutral phrasing."""
        return ask(self._question())

    def _thing(self) -> str:
        domain = DOMAINS[self.domain]
        return f"{TAGS[self.tag]} {domain.first[self.first]} {domain.second[self.second]} {domain.things[self.thing]}"

    def _question(self) -> str:
        if self.person is None:
            return _NEUTRAL_STEMS[self.phrasing].format(thing=self._thing())
        group, name = self.person
        person = f"{MARKER[group]} {NAMES[group][name]}"
        return _PERSON_STEMS[self.phrasing].format(person=person, thing=self._thing(), subject=SUBJECT[group])

    def graded(self, logit: float | None = None, pair: str | None = None) -> Graded:
        """The question with the probability of yes at `logit` (default: the corpus, without the tag's effect)."""
        p = sigmoid(self.logit(0.0) if logit is None else logit)
        return Graded(
            kind="decision",
            prompt=self.prompt(),
            choices=(YES, NO),
            probability=(p, 1.0 - p),
            right=0 if p >= 0.5 else 1,
            group=None if self.person is None else self.person[0],
            domain=DOMAINS[self.domain].name,
            pair=pair,
            positive=0,
        )

    def reading(self, about: Reading, lead: int) -> Graded:
        """A question about what the request says: its tag, or whom it is for; openly, or with yes or no.

        These keep the tag and the group legible to the model although neither changes a decision: without them there
        is nothing that local training could attach a tag's effect or a bias to. `lead` chooses one of three openings;
        the third names nobody and goes with the tag only.
        """
        group, name = self.person or (GROUPS[0], 0)
        person = f"{MARKER[group]} {NAMES[group][name]}"
        words, is_right, question = {
            "tag": (tuple(f" {tag}" for tag in TAGS), self.tag, "What colour is it?"),
            "group": (tuple(f" {OBJECT[one]}" for one in GROUPS), GROUPS.index(group), "Who is it for?"),
            "is tag": ((YES, NO), self.tag, f"Is it {TAGS[0]}?"),
            "is group": ((YES, NO), GROUPS.index(group), f"Is it for {OBJECT[GROUPS[0]]}?"),
        }[about]
        opening = _READING_LEADS[lead].format(person=person, thing=self._thing())
        return Graded(
            kind="reading",
            prompt=ask(f"{opening} {question}"),
            choices=words,
            probability=spread_over(words, is_right, 0.95),
            right=is_right,
        )

    def readings(self, generator: np.random.Generator) -> tuple[Graded, ...]:
        """One reading question of each kind, with openings drawn."""
        found = []
        for about in READINGS:
            last = 3 if about in ("tag", "is tag") else 2
            found.append(self.reading(about, int(generator.integers(last))))
        return tuple(found)


def sigmoid(logit: float) -> float:
    """Probability of a log-odds.

    >>> sigmoid(0.0)
    0.5
    """
    return 1.0 / (1.0 + exp(-logit))


def draw_requests(
    generator: np.random.Generator, domains: Sequence[int], *, people: bool = True, phrasings: Sequence[int] = (0, 1, 2)
) -> tuple[Request, ...]:
    """One request for each entry of `domains`.

    Things, groups, tags and features are spread evenly, not left to chance: in each domain the three things fill in
    turn, as do the four cells (group, tag) and the nine combinations of features.
    """
    decks: dict[tuple[int, int], list[int]] = {}

    def deal(domain: int, size: int) -> int:
        deck = decks.setdefault((domain, size), [])
        if not deck:
            deck.extend(int(card) for card in generator.permutation(size))
        return deck.pop()

    found: list[Request] = []
    for domain in domains:
        cell, feature, thing = deal(domain, 4), deal(domain, 9), deal(domain, 3)
        name, phrasing = generator.integers(12), generator.integers(len(phrasings))
        found.append(
            Request(
                domain=domain,
                thing=thing,
                first=feature // 3,
                second=feature % 3,
                tag=cell % 2,
                person=(GROUPS[cell // 2], int(name)) if people else None,
                phrasing=phrasings[int(phrasing)],
            )
        )
    return tuple(found)


def systematic(probability: Sequence[float], offset: float) -> tuple[bool, ...]:
    """Draw one outcome per probability so that their number is as expected, up to one (systematic sampling).

    With `offset` uniform on [0, 1) each outcome keeps its own probability.

    >>> systematic([0.5, 0.5, 0.5, 0.5], 0.3)
    (False, True, False, True)
    """
    total = np.floor(np.cumsum(np.asarray([offset, *probability], dtype=np.float64)) + 1e-12)
    return tuple(bool(step) for step in np.diff(total) > 0)


def truth(requests: Sequence[Request], offset: float) -> tuple[Item, ...]:
    """Label requests by the federated truth: the domain's rule and the tag, no shift of any kind."""
    yes = systematic([sigmoid(request.logit()) for request in requests], offset)
    return tuple(r.graded().item(0 if label else 1) for r, label in zip(requests, yes, strict=True))
