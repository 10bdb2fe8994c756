"""The influence graph of the six modes (Oh & Bui, arXiv 2606.00947): which failure tends to bring which."""

from collections.abc import Mapping

from fedcanary.types import Mode, State

PRIMARY: tuple[tuple[Mode, Mode], ...] = (
    (Mode.AMPLIFIED_BIAS, Mode.CONFIDENCE_MISCALIBRATION),
    (Mode.AMPLIFIED_BIAS, Mode.FAIRNESS_COLLAPSE),
    (Mode.CONFIDENCE_MISCALIBRATION, Mode.ADAPTATION_MISALIGNMENT),
    (Mode.CONFIDENCE_MISCALIBRATION, Mode.OUT_OF_DOMAIN_DEGRADATION),
    (Mode.FAIRNESS_COLLAPSE, Mode.ALIGNMENT_EROSION),
    (Mode.OUT_OF_DOMAIN_DEGRADATION, Mode.ALIGNMENT_EROSION),
)
FEEDBACK: tuple[tuple[Mode, Mode], ...] = (
    (Mode.FAIRNESS_COLLAPSE, Mode.ADAPTATION_MISALIGNMENT),
    (Mode.ADAPTATION_MISALIGNMENT, Mode.ALIGNMENT_EROSION),
    (Mode.ALIGNMENT_EROSION, Mode.AMPLIFIED_BIAS),
)


def likely_upstream(mode: Mode, states: Mapping[Mode, State], since: Mapping[Mode, int | None]) -> tuple[Mode, ...]:
    """Modes in alarm that the graph puts directly before `mode` and that were in alarm no later than it."""
    own = since.get(mode)
    if states.get(mode) != "alarm" or own is None:
        return ()
    return tuple(
        parent
        for parent, child in (*PRIMARY, *FEEDBACK)
        if child == mode and states.get(parent) == "alarm" and (since.get(parent) or own + 1) <= own
    )
