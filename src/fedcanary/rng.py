"""Named random streams: every draw in the program says what it is for.

Two streams with different names are independent; the same seed and names always give the same stream, on every
machine and in any order of use. That is what makes a resumed run equal to an uninterrupted one.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """A generator for the purpose spelled by `names`.

    >>> a, b = stream(1, "cohort", 3), stream(1, "cohort", 3)
    >>> bool(a.integers(1 << 30) == b.integers(1 << 30))
    True
    """
    return np.random.default_rng(derive(seed, *names))


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for libraries that want an integer (for example `torch.Generator`)."""
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
