"""What the loop asks of the clients of a run, wherever they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedcanary.engines.consent import Consent
from fedcanary.engines.protection import Cohort
from fedcanary.models.adapters import Adapter
from fedcanary.privacy.contract import Request
from fedcanary.privacy.release import Masked
from fedcanary.privacy.seal import Sealed, Terms
from fedcanary.types import Array, Item, Role


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
    remembers: ClassVar[bool] = False
    masked: Masked | None = None
    upcoming: Callable[[int], Cohort]
    there: Callable[[int], Callable[[int], bool]] | None = None

    @abstractmethod
    def base_answers(self, role: Role) -> tuple[tuple[Item, ...], Array]:
        """The base's choice probabilities (n, C) on a role's public items: public, the same for everyone."""

    @abstractmethod
    def work(
        self,
        request: Request,
        cohort: Sequence[int],
        shared: Adapter,
        terms: Terms,
        line: Container[int] | None = None,
        trainers: Sequence[int] = (),
    ) -> Iterator[list[Sent]]:
        """One round of those in `cohort` who do not refuse the request; yields what each sent, as it comes.

        `trainers` are asked for an update alone, and read nothing. `line` are the rounds that led to `shared`, if not
        all before: what is private goes on from the last of them.
        """
