"""Mode 5, out-of-domain degradation: over-specialization weakens what the model can do outside the client's domain.

The paired difference is the mean probability of the right answer on public items of the domains the client has no
data of, of its personalized model minus the base. The in-domain gain is reported beside it, and the change on
zero-shot capability probes.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedcanary.probes.adaptation import change
from fedcanary.probes.base import ClientView, bounded, paired_coords, paired_values, reading
from fedcanary.types import Coord, Mode, Reading, Role


@dataclass(frozen=True, slots=True)
class OutOfDomain:
    """`tail` is tau."""

    tail: float = 0.1

    mode: ClassVar[Mode | None] = Mode.OUT_OF_DOMAIN_DEGRADATION
    name: ClassVar[str] = "out_of_domain_degradation"
    version: ClassVar[str] = "1"
    unit: ClassVar[str] = "change of score outside the client's domains"

    @property
    def coords(self) -> tuple[Coord, ...]:
        """The paired four, and the two beside them."""
        return (
            *paired_coords("score on other domains' items, personalized minus base"),
            Coord(name="in_domain", low=-1.0, high=1.0, purpose="gain on the client's own items"),
            Coord(name="zero_shot", low=-1.0, high=1.0, purpose="change on the public capability suite"),
        )

    def read(self, view: ClientView) -> Reading:
        """Measure one client."""
        outside = view.suite(Role.DOMAIN)
        values = [
            *paired_values(change(outside, "base", "personalized"), self.tail),
            bounded(change(view.local, "base", "personalized")),
            bounded(change(view.suite(Role.GENERAL), "base", "personalized")),
        ]
        return reading(self, values, outside)
