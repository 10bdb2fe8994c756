"""The tests' plan of a study: what the server's monitor judges by, and each client's guard its own readings."""

from __future__ import annotations

import math
from collections.abc import Callable

from fedcanary.engines.setup import Setup
from fedcanary.monitor import base as monitor
from fedcanary.probes.bias import AmplifiedBias, contrasts, favourable_of
from fedcanary.types import Array, Item, Role


def plan_of(setup: Setup, base_answers: Callable[[Role], tuple[tuple[Item, ...], Array]]) -> monitor.Plan:
    """`base_answers` are the base's on a role's items; its own gaps between groups are public like both."""
    items, table = base_answers(Role.BIAS)
    bias = next(p for p in setup.probes if isinstance(p, AmplifiedBias))
    gaps = contrasts(items, favourable_of(items, table), bias.groups)
    study = setup.study
    return monitor.plan(
        margins=study.probes.margins.model_dump(),
        parts={p.mode: p.parts for p in setup.probes if p.mode is not None},
        units={p.mode: p.unit for p in setup.probes if p.mode is not None},
        alpha=study.alphas[0],
        horizon=study.rounds,
        groups={group: gap for group, gap in zip(bias.read_groups, gaps.tolist(), strict=False) if math.isfinite(gap)},
        severe=study.monitor.severe,
        spread=study.monitor.spread,
        pooled=study.monitor.pooled,
        epochs=1 + study.monitor.rebaselines,
    )
