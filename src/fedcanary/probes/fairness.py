"""Mode 3, fairness collapse: aggregating adapters of divergent clients widens the gap between clients.

A client's score is the mean probability of the right answer on its own held-out items, of the model it *received*
(what aggregation gave it, before local training repairs it), against the base on the same items. Federations improve
on average while some clients fall behind, so the mean is blind (mission table A, mode 3): what is tested is the share
of clients whose score fell by more than tau; the spread (variance of the change) is reported beside it.
q-fair allocation, Li et al. 2020 (arXiv 1905.10497), section 3, measures the same spread over clients.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from fedcanary.probes.base import (
    BIT,
    ClientView,
    bounded,
    change,
    mean,
    paired_coords,
    paired_values,
    reading,
    unscored,
)
from fedcanary.types import Coord, Mode, Reading


@dataclass(frozen=True, slots=True)
class FairnessCollapse:
    """`tail` is tau: a client whose received score is lower than the base's by more has been left behind.

    With `spread`, the change of score and its square leave too, so that their variance over clients can be tested.
    """

    tail: float = 0.1
    spread: bool = False

    parts: ClassVar[tuple[str, ...]] = ("delta",)
    mode: ClassVar[Mode | None] = Mode.FAIRNESS_COLLAPSE
    name: ClassVar[str] = "fairness_collapse"
    version: ClassVar[str] = "1"
    unit: ClassVar[str] = "share of clients left behind"
    own: ClassVar[bool] = True

    @property
    def coords(self) -> tuple[Coord, ...]:
        """The paired four, the score with its square, and the gain that local training brings."""
        delta, square, tail, severe, missing = paired_coords("received model's score minus the base's, own items")
        return (
            delta if self.spread else replace(delta, scale=None),  # the mean itself is not tested
            square if self.spread else replace(square, scale=None),
            replace(tail, scale=BIT),
            replace(severe, scale=None),
            missing,
            Coord(name="score", low=0.0, high=1.0, purpose="received model's score"),
            Coord(name="score_square", low=0.0, high=1.0, purpose="its square, for the variance over clients"),
            Coord(name="after_training", low=-1.0, high=1.0, purpose="personalized model's score minus the base's"),
        )

    @property
    def reach(self) -> Mapping[str, float]:
        """Of the ramp of `read_by_item` over m of n items with changes c_i in [-1, 1] and the sum S.

        n u = m ramp(S / m) = the median of 0, -S / tau - m / 2 and m. Without one item the second moves by at most
        1 / tau + 1 / 2, the third by 1, and a median moves no further than the one of them that moves most.
        """
        return {"tail": 1 / self.tail + 0.5, "missing": 1.0}

    def read_by_item(self, view: ClientView) -> Reading:
        """As `read`, but left behind by degrees: from 0 at a loss of tau / 2, one half at tau, to 1 at 3 tau / 2.

        A bit would jump with a single item. `missing` is the share of items that could not be scored.
        """
        behind = -change(view.local, "base", "received") / self.tail - 0.5
        soft = {"tail": bounded(behind, 0.0, 1.0), "missing": unscored(view.local.change("base", "received"))}
        values = dict(zip((c.name for c in self.coords), self.read(view).values.tolist(), strict=True))
        return reading(self, [*(values | soft).values()], view.local)

    def read(self, view: ClientView) -> Reading:
        """Measure one client."""
        local = view.local
        score = bounded(mean(local.right("received")), 0.0, 1.0)
        values = [
            *paired_values(change(local, "base", "received"), self.tail),
            score,
            score**2,
            bounded(change(local, "base", "personalized")),
        ]
        return reading(self, values, local)
