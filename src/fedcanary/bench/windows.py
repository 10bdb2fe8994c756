"""Many windows at once through the monitor's own formulas: who is in alarm, who is clear, and since when."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from fedcanary.monitor import base as monitor
from fedcanary.monitor.forecast import Sums, walk
from fedcanary.privacy.encode import UNIT, Encoding
from fedcanary.types import Array, Mode, Release

Bits = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Walked:
    """What the monitor says of every window: (rounds, paths) each, by mode."""

    alarm: Mapping[Mode, Bits]
    clear: Mapping[Mode, Bits]


def sums_of(encoding: Encoding, totals: Array, n: int, std: float) -> dict[str, Sums]:
    """Noised integer sums (rounds, paths, K + 1) as the monitor reads them; `std` is over a message's norm."""
    read, lost, lost_std = encoding.read(cast("npt.NDArray[np.int64]", totals), n, std * UNIT)
    return {
        probe: Sums(
            float(n),
            lost,
            lost_std,
            dict(zip(s.coords, np.moveaxis(s.total, -1, 0), strict=True)),
            dict(zip(s.coords, s.noise_std.tolist(), strict=True)),
        )
        for probe, s in read.items()
    }


def judge(plan: monitor.Plan, sums: Mapping[str, Sums]) -> Walked:
    """The monitor over all windows: an alarm stays, and no clear is said while it does."""
    alarm, clear = {}, {}
    for mode_plan in plan.modes:
        shape = next(iter(sums[mode_plan.mode].values.values())).shape
        worse, passes = walk(plan, mode_plan, cast(Release, sums[mode_plan.mode]), shape)
        alarm[mode_plan.mode] = np.logical_or.accumulate(worse >= plan.alarm_at, axis=0)
        clear[mode_plan.mode] = (passes >= plan.clear_at) & ~alarm[mode_plan.mode]
    return Walked(alarm=alarm, clear=clear)


def first(found: Bits) -> Array:
    """(paths,) first round, from 1, that is true of (rounds, paths); infinite where none is."""
    return np.where(found.any(axis=0), found.argmax(axis=0) + 1.0, math.inf)


def delays(alarm: Bits, change: int) -> Array:
    """Rounds from the change (a round, from 1) to the alarm: 1 at once, infinite never; NaN if it came before."""
    at = first(alarm)
    return np.where(at < change, math.nan, at - change + 1)
