"""What a dashboard shows: how well a client's own held-out items are answered. No mode, but the curve beside them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from fedcanary.probes.base import DIFFERENCE as GAIN
from fedcanary.probes.base import LEVEL, Answers, ClientView, bounded, mean, missing_coord, reading, unscored
from fedcanary.types import Coord, Mode, Reading

_SCORE: Final = "mean probability of the right answer, own items"
_ACCURACY: Final = "share of own items answered rightly"


@dataclass(frozen=True, slots=True)
class Utility:
    """Probability of the right answer (free text: likelihood per token) and accuracy, on the client's own items."""

    parts: ClassVar[tuple[str, ...]] = ()
    mode: ClassVar[Mode | None] = None
    name: ClassVar[str] = "utility"
    version: ClassVar[str] = "1"
    unit: ClassVar[str] = "probability of the right answer"
    own: ClassVar[bool] = True

    @property
    def coords(self) -> tuple[Coord, ...]:
        """The base's score and accuracy, and what personalization gained."""
        return (
            Coord(name="score_base", low=0.0, high=1.0, purpose=f"{_SCORE}, base", scale=LEVEL, zero=0.5),
            Coord(name="score_gain", low=-1.0, high=1.0, purpose=f"{_SCORE}, gain of the personalized", scale=GAIN),
            Coord(name="accuracy_base", low=0.0, high=1.0, purpose=f"{_ACCURACY}, base"),
            Coord(name="accuracy_gain", low=-1.0, high=1.0, purpose=f"{_ACCURACY}, gain of the personalized"),
            missing_coord("missing", "1 if the client has no item of its own to score"),
        )

    @property
    def reach(self) -> Mapping[str, float]:
        """Both are means of x - zero over all items, where x is in [0, 1] (zero 1/2) and in [-1, 1] (zero 0)."""
        return {"score_base": 0.5, "score_gain": 1.0, "missing": 1.0}

    def read_by_item(self, view: ClientView) -> Reading:
        """As `read`, and `missing` is the share of items that could not be scored."""
        return self._read(view.local, unscored(view.local.right("base")))

    def read(self, view: ClientView) -> Reading:
        """Measure one client."""
        local = view.local
        return self._read(local, float(not len(local) or bool(np.isnan(local.right("base")).all())))

    def _read(self, local: Answers, missing: float) -> Reading:
        values = []
        for what in (local.right, local.correct):
            before, now = mean(what("base")), mean(what("personalized"))
            values += [bounded(before, 0.0, 1.0), bounded(now - before)]
        return reading(self, [*values, missing], local)
