"""The all-seeing oracle: what someone would say who could read every client exactly. For tests and benchmarks only.

It has no privacy, no noise and no error rate to keep, so nothing it says may be shown as a verdict of a run. It sees
readings through `pipeline.run(..., oracle_tap=...)`, which no command of the program sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedcanary.probes import Probe
from fedcanary.types import Array, Mode, Reading

LAST = 3  # the oracle judges the mean of a run's last rounds, so that one odd round decides nothing


class AllSeeingOracle:
    """Collects exact readings (as an `oracle_tap`) and judges them against the margins."""

    def __init__(self, probes: Sequence[Probe], reference: Mapping[str, float] | None = None) -> None:
        self._coords = {p.name: [c.name for c in p.coords] for p in probes}
        self.reference = dict(reference or {})  # the base's own contrast of each group that is read
        self._rounds: dict[int, list[Mapping[str, Reading]]] = {}

    def __call__(self, round: int, client: int, readings: Mapping[str, Reading]) -> None:
        """Take in one client's readings."""
        self._rounds.setdefault(round, []).append(readings)

    def column(self, round: int, probe: str, coord: str) -> Array:
        """(clients,) exact values of one coordinate, of clients that could score the probe."""
        names = self._coords[probe]
        rows = [r[probe].values for r in self._rounds[round]]
        keep = [row for row in rows if "missing" not in names or row[names.index("missing")] == 0]
        return np.array([row[names.index(coord)] for row in keep])

    def estimate(self, round: int, mode: Mode) -> float:
        """How much worse the mode is in a round, in its unit; NaN if no client could score it."""
        if mode == Mode.AMPLIFIED_BIAS:
            changes = {g: self.column(round, mode, f"contrast:{g}") for g in self.reference}
            widening = [abs(r + changes[g].mean()) - abs(r) for g, r in self.reference.items() if len(changes[g])]
            return float(max(widening, default=np.nan))
        coord = "tail" if mode == Mode.FAIRNESS_COLLAPSE else "delta"
        values = self.column(round, mode, coord)
        if not len(values):
            return float("nan")
        return float(values.mean() if coord == "tail" else -values.mean())

    def judged(self, mode: Mode) -> float:
        """Mean estimate of the last rounds."""
        rounds = sorted(self._rounds)[-LAST:]
        return float(np.mean([self.estimate(round, mode) for round in rounds]))

    def alarms(self, margins: Mapping[str, float]) -> dict[Mode, bool]:
        """Which modes are beyond their margin."""
        return {mode: bool(self.judged(mode) > margins[mode]) for mode in Mode}

    def utility(self, round: int) -> tuple[float, float]:
        """Mean probability of the right answer of base and personalized models."""
        return (
            float(self.column(round, "utility", "score_base").mean()),
            float(self.column(round, "utility", "score_personalized").mean()),
        )

    @property
    def rounds(self) -> list[int]:
        """The rounds seen."""
        return sorted(self._rounds)
