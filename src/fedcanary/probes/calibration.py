"""Mode 2, confidence miscalibration: under shift, confidence stops tracking accuracy.

Read on public items of the client's own domains, as they will be met after deployment. Confidence is the top choice's
probability; ECE = sum over equal-width bins of (n_b / n) |accuracy_b - confidence_b| (Guo et al. 2017, arXiv
1706.04599, equation 3). The paired difference is -(ECE of the personalized model - ECE of the base) on the same items,
whose finite-sample biases cancel to first order. Beside it: signed over-confidence, Brier score, and for every fixed
bin (n, sum of confidence, sum of correct) / items, from which the aggregate's pooled ECE and the masking gap
mean_k ECE_k - ECE_pooled >= 0 follow: averaging over clients hides opposite errors.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedcanary.probes import statistics
from fedcanary.probes.base import Answers, ClientView, Which, bounded, paired_coords, paired_values, reading
from fedcanary.types import Array, Coord, Mode, Reading, Role

BINS = 5
SIGNED = "signed"  # confidence minus correctness in a bin / items
SIGNED_SCALE, ECE_SQUARE_SCALE = 0.35, 0.5


def confidence(answers: Answers, which: Which) -> tuple[Array, Array]:
    """(m,) top probability and (m,) 0/1 correctness of the scoreable items that have at least two choices."""
    keep = np.array([len(item.choices) > 1 for item in answers.items], dtype=bool) & ~np.isnan(answers.correct(which))
    return answers.probability(which)[keep].max(axis=1, initial=0.0), answers.correct(which)[keep]


@dataclass(frozen=True, slots=True)
class Miscalibration:
    """`tail` is tau. With `pooled`, what the calibration error of all clients pooled is made of leaves too."""

    tail: float = 0.1
    pooled: bool = False

    parts: ClassVar[tuple[str, ...]] = ("delta",)
    mode: ClassVar[Mode | None] = Mode.CONFIDENCE_MISCALIBRATION
    name: ClassVar[str] = "confidence_miscalibration"
    version: ClassVar[str] = "1"
    unit: ClassVar[str] = "change of expected calibration error"
    own: ClassVar[bool] = False

    @property
    def coords(self) -> tuple[Coord, ...]:
        """The paired ones, the client's own readings, and three sums for each bin."""
        return (
            *paired_coords("minus the change of ECE"),
            Coord(name="ece", low=0.0, high=1.0, purpose="ECE of the personalized model"),
            Coord(name="overconfidence", low=-1.0, high=1.0, purpose="change of mean confidence minus accuracy"),
            Coord(name="brier", low=-1.0, high=1.0, purpose="change of the Brier score"),
            *(
                Coord(name=f"{what}:{b}", low=0.0, high=1.0, purpose=f"{what} in confidence bin {b} / items")
                for what in ("n", "conf", "correct")
                for b in range(BINS)
            ),
            *(self._pooled_coords() if self.pooled else ()),
        )

    def _pooled_coords(self) -> tuple[Coord, ...]:
        return (
            *(
                Coord(
                    name=f"{SIGNED}:{b}",
                    low=-1.0,
                    high=1.0,
                    purpose=f"confidence minus correctness in bin {b} / items",
                    scale=SIGNED_SCALE,
                )
                for b in range(BINS)
            ),
            Coord(
                name="ece_square",
                low=0.0,
                high=1.0,
                purpose="ECE of the personalized model squared, for the tests' variance",
                scale=ECE_SQUARE_SCALE,
                up=True,
            ),
        )

    def read(self, view: ClientView) -> Reading:
        """Measure one client."""
        answers = view.suite(Role.CALIBRATION) or view.local
        before, right0 = confidence(answers, "base")
        after, right1 = confidence(answers, "personalized")
        if not len(after) or len(before) != len(after):
            empty = [0.0] * (len(self.coords) - 5)
            return reading(self, [*paired_values(float("nan"), self.tail), *empty], answers)
        ece0, ece1 = (statistics.ece(c, r, BINS) for c, r in ((before, right0), (after, right1)))
        sums = statistics.bin_sums(after, right1, BINS) / len(after)
        values = [
            *paired_values(ece0 - ece1, self.tail),
            bounded(ece1, 0.0, 1.0),
            bounded(statistics.overconfidence(after, right1) - statistics.overconfidence(before, right0)),
            bounded(statistics.brier(after, right1) - statistics.brier(before, right0)),
            *np.clip(sums.T.reshape(-1), 0.0, 1.0),
        ]
        if self.pooled:
            values += [*np.clip(sums[:, 1] - sums[:, 2], -1.0, 1.0), bounded(ece1**2, 0.0, 1.0)]
        return reading(self, values, answers)
