"""Secure aggregation without its masks, for tests of what is in the sum and not of how it is hidden."""

from __future__ import annotations

import numpy as np

from fedcanary.privacy import secagg


def plain_sum(vectors, bits, *, minimum, before_unmasking, **_):
    """`secagg.aggregate` without its masks: the same sum, survivors and charge (tests/audit/test_round.py)."""
    assert len(vectors) >= minimum
    before_unmasking(tuple(vectors))
    total = sum(vectors.values())
    return secagg.Outcome(total=total.astype(np.uint64), signed=total, survivors=tuple(vectors), refused={})
