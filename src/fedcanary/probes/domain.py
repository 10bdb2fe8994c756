"""Mode 5, out-of-domain degradation: over-specialization weakens what the model can do outside the client's domain.

The paired difference is the mean gain of the right answer, of the client's personalized model minus the base, on public
items of the domains the client has no data of, and on zero-shot capability probes; the two are tested apart. The
in-domain gain is reported beside them.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

from fedcanary.probes.base import ClientView, beside, beside_value, change, parts_coords, parts_values, reading
from fedcanary.types import Coord, Mode, Reading, Role

PARTS: Final = {
    "outside": "score on other domains' items, personalized minus base",
    "zero_shot": "score on the public capability suite, personalized minus base",
}


@dataclass(frozen=True, slots=True)
class OutOfDomain:
    """`parts` are those of PARTS that the public items can speak of; `tail` is tau."""

    parts: tuple[str, ...] = tuple(PARTS)
    tail: float = 0.1

    mode: ClassVar[Mode | None] = Mode.OUT_OF_DOMAIN_DEGRADATION
    name: ClassVar[str] = "out_of_domain_degradation"
    version: ClassVar[str] = "2"
    unit: ClassVar[str] = "loss of score outside the client's domains"
    own: ClassVar[bool] = False

    @property
    def coords(self) -> tuple[Coord, ...]:
        """Three for each part, the tail bit and the missing bit, and the gain at home."""
        return (
            *parts_coords({part: PARTS[part] for part in self.parts}),
            *beside("in_domain", "gain on the client's own items"),
        )

    def read(self, view: ClientView) -> Reading:
        """Measure one client."""
        answers = {"outside": view.suite(Role.DOMAIN), "zero_shot": view.suite(Role.GENERAL)}
        deltas = [change(answers[part], "base", "personalized") for part in self.parts]
        home = change(view.local, "base", "personalized")
        return reading(self, [*parts_values(deltas, self.tail), *beside_value(home)], *answers.values())
