"""What the rest of the program may ask of a population of clients, wherever their data comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, Protocol, TypeAlias

from fedcanary.types import Item

Split: TypeAlias = Literal["train", "eval"]
DOMAIN: Final = "domain"  # the attribute that is the domain most of a client's examples come from


class Population(Protocol):
    """Clients 0..n-1 with local data.

    Laws: the same client and split give the same items every time; `train` and `eval` of a client share no example;
    equal `digest` means equal items for every client.
    """

    @property
    def digest(self) -> str:
        """Identifies the data and who has which of it."""

    def __len__(self) -> int:
        """How many clients there are."""

    def name(self, client: int) -> str:
        """What a person calls this client."""

    def items(self, client: int, split: Split) -> tuple[Item, ...]:
        """The client's examples of one split."""

    def domains(self, client: int) -> frozenset[str]:
        """The domains the client's examples come from; empty where the data names none."""

    def attributes(self, client: int) -> Mapping[str, str]:
        """What the client is, by name (`DOMAIN`, a region, a device class): one value of each, or none.

        Everyone may know which values there are, and nobody which of them a client has.
        """
