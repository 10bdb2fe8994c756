"""What the loop asks of the clients of a run, wherever they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

from fedcanary.engines.consent import Consent
from fedcanary.engines.protection import Cohort
from fedcanary.models.adapters import Adapter
from fedcanary.privacy.contract import Request
from fedcanary.privacy.release import Masked
from fedcanary.privacy.seal import Sealed, Terms
from fedcanary.types import Array, Item, Role


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked in a round: of `cohort` all that the request names; `trainers` give an update, and read nothing.

    `line` are the rounds that led to `shared`, if not all before: what is private goes on from the last of them.
    """

    request: Request
    cohort: Sequence[int]
    shared: Adapter
    terms: Terms
    line: Container[int] | None = None
    trainers: Sequence[int] = ()

    @property
    def lineage(self) -> Container[int]:
        """Whatever `line` says, or all rounds before this one."""
        return range(self.request.round) if self.line is None else self.line

    @property
    def requests(self) -> dict[int, Request]:
        """Each client's own. Whose has no probes only trains: all do, where the request itself has none."""
        training = self.request.model_copy(update={"probes": (), "drill_down": None})
        said = self.request if self.request.probes else training
        return dict.fromkeys(self.cohort, said) | dict.fromkeys(self.trainers, training)


@dataclass(frozen=True, slots=True)
class Sent:
    """One client's part in a round: what it sealed; None if it stayed at the client, under masks (`masked`), if its
    training failed, or if it refused, with the reasons.
    """

    client: int
    vector: Sealed | None
    refused: Sequence[str] = ()
    masked: bool = False

    @property
    def failed(self) -> bool:
        """Whether nothing came of this client, though it did not refuse."""
        return self.vector is None and not self.masked and not self.refused


class Clients(ABC):
    """A run's clients, as the server reaches them.

    `remembers`: asked for the same round again, they send what they sent before, to the byte. `masked` is where their
    vectors are after `work`, if they mask them themselves. `upcoming` tells who takes part in a round to come. `there`
    tells for a round who can be drawn for it, where not the study says who is there but an app it is attached to.
    """

    consent: Consent
    remembers: bool = False
    masked: Masked | None = None
    upcoming: Callable[[int], Cohort]
    there: Callable[[int], Callable[[int], bool]] | None = None

    @abstractmethod
    def base_answers(self, role: Role) -> tuple[tuple[Item, ...], Array]:
        """The base's choice probabilities (n, C) on a role's public items: public, the same for everyone."""

    @abstractmethod
    def work(self, asked: Work) -> Iterator[list[Sent]]:
        """One round of those who do not refuse what they are asked; yields what each sent, as it comes."""
