"""Whether two contenders did the same job; needs only numpy.

The distance of two results is the L2 norm of the difference of their shared adapters over the norm of what the
reference's adapter moved in all, and the largest relative difference of a round's mean loss. AdamW divides by the
gradient's size, so rounding grows where a gradient is nearly zero: single coordinates may be far apart, and the norm of
the whole is what can be held to a bound. TOLERANCE lies between what float32 itself leaves open and the smallest
mistake there can be. `speed.py --calibrate` does a job twice with peft, the second time with each batch's rows in
reverse (the same sums in another order), and README.md shows how far apart the two are; Flower, whose clients run
peft's own code, is off by .0011 at 400 clients, as it averages whole float32 adapters and not what they moved. One
client of 400 dropped is off by at least 1/400. Ours is held to peft within 1e-10 in float64 by the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Arrays = Mapping[str, np.ndarray]
TOLERANCE = {"adapter": 1.5e-3, "loss": 2e-5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far a result is from the reference: see the module."""

    adapter: float
    loss: float

    @property
    def same(self) -> bool:
        """Whether both did the same job."""
        return self.adapter <= TOLERANCE["adapter"] and self.loss <= TOLERANCE["loss"]  # False for NaN


def distance(reference: Arrays, result: Arrays, start: Arrays) -> Distance:
    """Compare two results as `job.finish` writes them; infinite where names or shapes differ."""
    shapes = {f"adapter/{name}": array.shape for name, array in start.items()}
    for found in (reference, result):
        if {n: a.shape for n, a in found.items() if n.startswith("adapter/")} != shapes:
            return Distance(adapter=float("inf"), loss=float("inf"))
    moved, apart = 0.0, 0.0
    for name, array in start.items():
        mine, other = (np.asarray(found[f"adapter/{name}"], dtype=np.float64) for found in (reference, result))
        moved += float(np.square(mine - array).sum())
        apart += float(np.square(mine - other).sum())
    losses, others = reference["losses"], result["losses"]
    if losses.shape != others.shape:
        return Distance(adapter=float("inf"), loss=float("inf"))
    loss = float(np.max(np.abs(others - losses) / np.abs(losses), initial=0.0))
    if not moved:  # no rounds: nothing may have moved
        return Distance(adapter=0.0 if not apart else float("inf"), loss=loss)
    return Distance(adapter=float(np.sqrt(apart / moved)), loss=loss)
