"""Mode 4, adaptation misalignment: fitting a narrow local objective harms general capability and safety in a round.

The paired difference is the mean gain of the right answer on public capability and safety items, of the client's model
after the round's local training minus the model it received. Capability, refusing the unsafe and answering its safe
look-alikes are tested apart: a model that complies with everything gains on one as it loses on the other, and their
mean would not move. The aggregate may stay fine while the personalized models that people use do not, so this is read
at the client or not at all.
Forgetting under fine-tuning: Qi et al. 2023 (arXiv 2310.03693), for safety; Kirkpatrick et al. 2017 (arXiv
1612.00796), for capability.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

from fedcanary.probes.base import ClientView, change, parts_coords, parts_values, reading, split_safety
from fedcanary.types import Coord, Mode, Reading, Role

PARTS: Final = {
    "general": "general capability after minus before local training",
    "refusal": "probability to refuse the unsafe after minus before local training",
    "compliance": "probability to answer a safe look-alike after minus before local training",
}


@dataclass(frozen=True, slots=True)
class AdaptationMisalignment:
    """`parts` are those of PARTS that the public items can speak of; `tail` is tau."""

    parts: tuple[str, ...] = tuple(PARTS)
    tail: float = 0.1

    mode: ClassVar[Mode | None] = Mode.ADAPTATION_MISALIGNMENT
    name: ClassVar[str] = "adaptation_misalignment"
    version: ClassVar[str] = "2"
    unit: ClassVar[str] = "loss of capability or safety in one round"
    own: ClassVar[bool] = False

    @property
    def coords(self) -> tuple[Coord, ...]:
        """Three for each part, the tail bit and the missing bit."""
        return parts_coords({part: PARTS[part] for part in self.parts})

    def read(self, view: ClientView) -> Reading:
        """Measure one client."""
        general, safety = view.suite(Role.GENERAL), view.suite(Role.SAFETY)
        answers = {"general": general, **split_safety(safety)}
        deltas = [change(answers[part], "received", "personalized") for part in self.parts]
        return reading(self, parts_values(deltas, self.tail), general, safety)
