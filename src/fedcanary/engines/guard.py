"""Local guards: a client judges the model it would deploy by its own exact readings, which stay with it.

A guarded mode fails if its worst part is beyond the limit, or if the client can score none: unknown passes no gate.
A client that refuses keeps deploying its last good model (the base, if it never had one); it trains and answers all
the same, so that the monitor sees the truth. What leaves are two numbers: whether it kept, and how much worse the mode
that failed worst is with the new model than with the one it keeps.

What is judged is the personalized model: where a mode speaks of the received one (3 and 6), the personalized takes its
place. Adaptation misalignment stays the loss within the round. Of fairness collapse, which asks for the share of
clients left behind, a single client reads the loss that leaves it behind. Both sides of a comparison were read on the
same items: the kept model when it was made. Of the base there is nothing to lose.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from fedcanary.engines.setup import Setup
from fedcanary.errors import BadInput, Problem
from fedcanary.models.adapters import Adapter
from fedcanary.monitor.base import ModePlan, Plan, worst
from fedcanary.personalize import Held
from fedcanary.probes import Probe
from fedcanary.probes.base import BIT, CLIP, DIFFERENCE, Answers, ClientView
from fedcanary.study import Study
from fedcanary.types import Coord, Mode, Reading, missing_bit

GUARD: Final = "guard"  # its name among what leaves a client
VERSION: Final = "1"
# Coarse, because no test leans on them and they can be pooled over rounds. At BIT and DIFFERENCE, clients with two bad
# failures at once lost 23% more of all else they say to the bound on their message; like this, 7%.
KEPT: Final = Coord(
    name="kept", low=0.0, high=1.0, purpose="1 if the client refused the new adapter and keeps its last", scale=2 * BIT
)
AVOIDED: Final = Coord(
    name="avoided",
    low=0.0,
    high=CLIP,
    purpose="by how much its worst guarded mode would be worse with the new adapter; clipped",
    scale=2 * DIFFERENCE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """The limits of a study's guarded modes, and what reads and judges them."""

    limits: Mapping[Mode, float]
    plans: Mapping[Mode, ModePlan]
    probes: Sequence[Probe]

    @classmethod
    def of(cls, setup: Setup, plan: Plan) -> Guard:
        """The guard of a study that has one. Raises BadInput where the public items cannot read a mode it names."""
        limits = limits_of(setup.study, {p.mode for p in plan.modes if p.streams})
        return cls(
            limits=limits,
            plans={p.mode: p for p in plan.modes if p.mode in limits},
            probes=[p for p in setup.probes if p.mode in limits],
        )

    def losses(self, view: ClientView) -> dict[Mode, float]:
        """How much worse than the base each guarded mode is at this client, worst part first; NaN if not scored."""
        alone = replace(
            view, local=_deployed(view.local), suites={role: _deployed(a) for role, a in view.suites.items()}
        )
        found = {}
        for probe in self.probes:
            mode = Mode(str(probe.mode))
            reading = probe.read(view if mode == Mode.ADAPTATION_MISALIGNMENT else alone)
            found[mode] = _loss(probe, self.plans[mode], reading)
        return found

    def fails(self, losses: Mapping[Mode, float]) -> list[Mode]:
        """Modes that are not known to be within their limit."""
        return [mode for mode, loss in losses.items() if not loss <= self.limits[mode]]

    def avoided(self, new: Mapping[Mode, float], kept: Mapping[Mode, float]) -> float:
        """What the client is spared in the mode that fails by the largest multiple of its limit; in [0, CLIP]."""
        known = [mode for mode in self.fails(new) if math.isfinite(new[mode])]
        if not known:
            return 0.0
        worst_of = max(known, key=lambda mode: new[mode] / self.limits[mode])
        return float(np.clip(new[worst_of] - kept.get(worst_of, 0.0), 0.0, CLIP))


def limits_of(study: Study, readable: Collection[Mode]) -> dict[Mode, float]:
    """The limit of each guarded mode.

    Raises:
        BadInput: every mode that the guard names and no public item can read.
    """
    table = study.guard
    if table is None:
        return {}
    lost = [mode for mode in Mode if mode not in readable and (mode in (table.modes or ()) or mode in table.limits)]
    if lost:
        what, remedy = "can be read from none of the public items", "give the study a suite for it, or leave it out"
        raise BadInput(Problem("guard", f"{mode} {what}", remedy) for mode in lost)
    usual = study.probes.margins.model_dump() | {Mode.FAIRNESS_COLLAPSE: study.probes.tail}
    chosen = set(table.modes or readable)
    return {mode: table.limits.get(mode, usual[mode]) for mode in Mode if mode in chosen}


def check(setup: Setup) -> None:
    """Raise BadInput, before anything is written, where a study's guard cannot read what it guards."""
    limits_of(setup.study, {probe.mode for probe in setup.probes if probe.mode is not None and probe.parts})


def said(kept: bool, avoided: float = 0.0) -> Reading:
    """What a client says about its guard."""
    return Reading(probe=GUARD, values=np.array([float(kept), avoided]), scored=0, unscoreable=0)


def together(model: Held, losses: Mapping[Mode, float]) -> Adapter:
    """A client's last good model as one file: its tensors, and how it was read."""
    parts = {"shared": model.shared, "private": model.private}
    tensors = {f"{part} {name}": tensor for part, held in parts.items() for name, tensor in held.items()}
    return tensors | {f"loss {mode}": torch.tensor(loss, dtype=torch.float64) for mode, loss in losses.items()}


def apart(tensors: Adapter) -> tuple[Held, dict[Mode, float]]:
    """Inverse of `together`."""
    parts: dict[str, Adapter] = {"shared": {}, "private": {}, "loss": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(" ")
        parts[part][name] = tensor
    return Held(parts["shared"], parts["private"]), {Mode(m): float(loss) for m, loss in parts["loss"].items()}


def _deployed(answers: Answers) -> Answers:
    return replace(answers, received=answers.personalized)


def _loss(probe: Probe, plan: ModePlan, reading: Reading) -> float:
    values: dict[str, float] = dict(zip((c.name for c in probe.coords), reading.values.tolist(), strict=True))

    def value(coord: str) -> float:
        return math.nan if values.get("missing") or values.get(missing_bit(coord)) else values[coord]

    if plan.mode == Mode.FAIRNESS_COLLAPSE:
        return -value("delta")
    return worst(plan, lambda stream: value(stream.coord))[0]
