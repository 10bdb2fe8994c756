"""Shamir shares of 16-byte seeds, and how many of their holders must answer.

The field is GF(2^128) as pycryptodome has it, and pycryptodome recovers. It takes 4 ms to make 30 shares, which each
client does twice; evaluating the same polynomial on Python's integers takes 0.2 ms, so that is done here (the test
recovers with the library, and holds every share to one that the library makes). The coefficients always come from the
operating system, also where everything else in a simulation is seeded: they never change a sum.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import comb

from Crypto.Protocol.SecretSharing import Shamir

SEED = 16  # bytes of a seed, and of a share of one
FAILURE = 10_000  # one round in this many may fail for unlucky dropouts, when as many drop out as are tolerated
LOW = (1 << 128) - 1


def share(secret: bytes, threshold: int, holders: int) -> list[bytes]:
    """Shares of a 16-byte secret for `holders` holders; any `threshold` of them recover it, fewer say nothing of it."""
    random = os.urandom(SEED * (threshold - 1))
    parts = [random[i : i + SEED] for i in range(0, len(random), SEED)]
    coefficients = [int.from_bytes(part, "big") for part in (*parts, secret)]
    return [_evaluate(coefficients, place).to_bytes(SEED, "big") for place in range(1, holders + 1)]


def _evaluate(coefficients: Sequence[int], place: int) -> int:
    """The polynomial (highest coefficient first) at a small place: Horner without carries, reduced once at the end."""
    shifts = [bit for bit in range(place.bit_length()) if place >> bit & 1]
    value = 0
    for coefficient in coefficients:
        product = coefficient
        for shift in shifts:
            product ^= value << shift
        value = product
    while high := value >> 128:  # z^128 = z^7 + z^2 + z + 1
        value = (value & LOW) ^ high ^ high << 1 ^ high << 2 ^ high << 7
    return value


def recover(
    shares: Sequence[tuple[int, bytes]], threshold: int, right: Callable[[bytes], bool]
) -> tuple[bytes | None, int]:
    """The secret that `right` accepts, and how many selections of shares gave a wrong one before it.

    `shares` are (place among the holders from 0, share). Every run of `threshold` neighbouring shares (cyclically) is
    tried, so one false share is always survived if one more than the threshold arrived, and more of them mostly.
    """
    runs = len(shares) if len(shares) > threshold else int(len(shares) == threshold)
    for start in range(runs):
        chosen = [shares[(start + i) % len(shares)] for i in range(threshold)]
        secret = Shamir.combine([(place + 1, piece) for place, piece in chosen], ssss=False)
        if right(secret):
            return secret, start
    return None, runs


@lru_cache(maxsize=256)
def threshold(population: int, holders: int, dropped: int, trials: int = 1) -> int:
    """How many of `holders`, drawn at random from `population`, can be asked to answer when `dropped` of them do not.

    The largest number not above 2/3 of the holders plus one (Bonawitz et al. 2017, section 6.2, for a malicious server)
    that in `trials` such draws is reached every time, but for a probability of 1 / FAILURE: the exact hypergeometric
    tail and a union bound, as in Bell et al. 2020, section 3.
    """
    ceiling = 2 * holders // 3 + 1
    draws = comb(population, holders)
    short = 0  # draws in which fewer than t + 1 holders answer
    for t in range(max(holders - dropped, 0), ceiling):
        short += comb(population - dropped, t) * comb(dropped, holders - t)
        if short * trials * FAILURE > draws:
            return max(t, 1)
    return ceiling
