"""The probes: one file per mode, and the utility curve beside them."""

from collections.abc import Sequence

from fedcanary.probes.adaptation import AdaptationMisalignment
from fedcanary.probes.base import Answers, ClientView, Probe
from fedcanary.probes.bias import AmplifiedBias, groups_of
from fedcanary.probes.calibration import Miscalibration
from fedcanary.probes.domain import OutOfDomain
from fedcanary.probes.erosion import AlignmentErosion
from fedcanary.probes.fairness import FairnessCollapse
from fedcanary.probes.utility import Utility
from fedcanary.types import Item


def probes(bias_items: Sequence[Item], tail: float, generate: bool = False) -> tuple[Probe, ...]:
    """Every probe of a study. The groups of mode 1 are those of the public bias items."""
    return (
        Utility(),
        AmplifiedBias(groups_of(bias_items), tail),
        Miscalibration(tail),
        FairnessCollapse(tail),
        AdaptationMisalignment(tail),
        OutOfDomain(tail),
        AlignmentErosion(tail, generate),
    )


__all__ = ["Answers", "ClientView", "Probe", "probes"]
