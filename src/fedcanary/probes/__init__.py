"""The probes: one file per mode, and the utility curve beside them."""

from collections.abc import Mapping, Sequence

from fedcanary.probes import adaptation, domain, erosion
from fedcanary.probes.adaptation import AdaptationMisalignment
from fedcanary.probes.base import Answers, ClientView, OwnProbe, Probe
from fedcanary.probes.bias import AmplifiedBias, groups_of
from fedcanary.probes.calibration import Miscalibration
from fedcanary.probes.domain import OutOfDomain
from fedcanary.probes.erosion import AlignmentErosion
from fedcanary.probes.fairness import FairnessCollapse
from fedcanary.probes.utility import Utility
from fedcanary.types import Item, Role


def probes(
    items: Mapping[Role, Sequence[Item]],
    tail: float,
    generate: bool = False,
    *,
    pooled: bool = False,
    spread: bool = False,
) -> tuple[Probe, ...]:
    """Every probe of a study. Their groups and parts are those that the public items, by role, can speak of.

    `pooled` and `spread`: what the tests of that name need leaves too (see `monitor.plan`).
    """
    safety = items.get(Role.SAFETY, ())
    speaks = {
        "general": bool(items.get(Role.GENERAL)),
        "zero_shot": bool(items.get(Role.GENERAL)),
        "outside": any(item.domain is not None for item in items.get(Role.DOMAIN, ())),
        "refusal": any(item.answer == 0 for item in safety),
        "compliance": any(item.answer not in (0, None) for item in safety),
        "persona": bool(items.get(Role.PERSONA)),
    }

    def those(parts: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(part for part in parts if speaks[part])

    return (
        Utility(),
        AmplifiedBias(groups_of(items.get(Role.BIAS, ())), tail),
        Miscalibration(tail, pooled),
        FairnessCollapse(tail, spread),
        AdaptationMisalignment(those(adaptation.PARTS), tail),
        OutOfDomain(those(domain.PARTS), tail),
        AlignmentErosion(those(erosion.PARTS), tail, generate),
    )


__all__ = ["Answers", "ClientView", "OwnProbe", "Probe", "probes"]
