"""Noise as it is added: integers, drawn by OpenDP from randomness seeded by the operating system.

Integer noise on integer data has none of the floating-point holes of Mironov 2012 (CCS). Names that begin with
`simulated_` draw the same distributions from a seeded generator: repeatable, hence no protection; for simulation only,
and the record says so. What noise costs is in `accounting.py`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedcanary.errors import BadInput
from fedcanary.privacy.accounting import MIN_SHARE_STD, SMOOTHING, randomized_response_truth

Integers = npt.NDArray[np.int64]
Bits = npt.NDArray[np.bool_]

MAX_SCALE: Final = 2.0**50  # ten thousand draws of it, summed, stay inside 64 bits


def share_std(total_std: float, survivors: int) -> float:
    """Std of each client's share, such that `survivors` shares protect at least like one Gaussian of `total_std`.

    Both in integer units. `survivors` is the smallest number of honest clients whose shares can be in an opened sum;
    more survivors only add noise. The discreteness of the noise is paid for here (`SMOOTHING`): at a total of 1000 it
    raises the std by 2e-6.

    Raises:
        BadInput: the share is below `MIN_SHARE_STD`. Sums of small shares are not Gaussian: 200 shares of std 0.3 under
            counts (total 4.2) cost epsilon 2.29 where a Gaussian costs 1.
    """
    _check("total_std", total_std)
    if survivors < 1:
        raise BadInput.of("survivors", f"{survivors} clients add no noise", "keep a cohort floor of at least 1")
    # One part in 1e12 up, so that rounding never lands below.
    std = math.sqrt((total_std**2 + SMOOTHING**2) / survivors) * (1 + 1e-12)
    if std < MIN_SHARE_STD:
        scale = math.ceil(MIN_SHARE_STD * math.sqrt(survivors) / total_std)
        raise BadInput.of(
            "share_std",
            f"a share of {std:.3g} is below the safe {MIN_SHARE_STD:g}",
            f"multiply the integers (and total_std with them) by {scale} or more",
        )
    return std


def gaussian_noise(std: float, size: int) -> Integers:
    """(size,) discrete Gaussian noise, P(x) proportional to exp(-x^2 / (2 std^2)); a client's share or the server's.

    Exact sampling (Canonne, Kamath & Steinke 2020, arXiv 2004.00010) by OpenDP, about 10 microseconds a number.
    """
    return _drawn(_gaussian(_check("std", std)), size)


def laplace_noise(scale: float, size: int) -> Integers:
    """(size,) discrete Laplace noise, P(x) proportional to exp(-|x| / scale): for a single count, not for sums."""
    return _drawn(_laplace(_check("scale", scale)), size)


def randomized_response(bits: Bits, epsilon: float) -> Bits:
    """Each bit said truthfully with probability 1/(1 + e^-epsilon), flipped otherwise; the bits cost `epsilon` each."""
    answer = _response(randomized_response_truth(epsilon))
    flat = [bool(answer(bool(bit))) for bit in bits.ravel()]
    return np.array(flat, dtype=np.bool_).reshape(bits.shape)


def simulated_gaussian(rng: np.random.Generator, std: float, size: int | tuple[int, ...]) -> Integers:
    """Discrete Gaussian from a seeded generator: simulation only.

    Rejection from discrete Laplace (Canonne, Kamath & Steinke 2020, Algorithm 3), vectorised; exact up to the 53 bits
    of the generator's uniforms. About 0.1 microseconds a number.
    """
    _check("std", std)
    t = math.floor(std) + 1
    total = int(np.prod(size))
    parts: list[Integers] = []
    missing = total
    while missing > 0:
        proposed = _two_sided(rng, float(t), int(missing * 1.6) + 16)
        distance = np.abs(proposed) - std**2 / t
        kept = proposed[rng.random(len(proposed)) < np.exp(-(distance**2) / (2 * std**2))]
        parts.append(kept[:missing])
        missing -= len(parts[-1])
    return np.concatenate([*parts, np.empty(0, dtype=np.int64)]).reshape(size)


def simulated_laplace(rng: np.random.Generator, scale: float, size: int | tuple[int, ...]) -> Integers:
    """Discrete Laplace from a seeded generator, as a difference of two geometric draws: simulation only."""
    return _two_sided(rng, _check("scale", scale), size)


def simulated_randomized_response(rng: np.random.Generator, bits: Bits, epsilon: float) -> Bits:
    """`randomized_response` from a seeded generator: simulation only."""
    return np.asarray(bits ^ (rng.random(bits.shape) >= randomized_response_truth(epsilon)), dtype=np.bool_)


def _two_sided(rng: np.random.Generator, scale: float, size: int | tuple[int, ...]) -> Integers:
    p = -math.expm1(-1 / scale)
    return np.asarray(rng.geometric(p, size) - rng.geometric(p, size), dtype=np.int64)


def _check(name: str, value: float) -> float:
    if not 0 < value <= MAX_SCALE:  # also refuses NaN
        raise BadInput.of(name, f"{value!r} is not a noise scale", f"give a number above 0 and at most {MAX_SCALE:g}")
    return float(value)


def _drawn(measurement: Any, size: int) -> Integers:
    # OpenDP adds its noise to data; the data here are zeros, as plain integers (it takes no numpy arrays).
    return np.array(measurement([0] * size), dtype=np.int64)


@lru_cache(maxsize=64)
def _gaussian(std: float) -> Any:
    dp = _opendp()
    return (dp.vector_domain(dp.atom_domain(T="i64")), dp.l2_distance(T=float)) >> dp.m.then_gaussian(scale=std)


@lru_cache(maxsize=64)
def _laplace(scale: float) -> Any:
    dp = _opendp()
    return (dp.vector_domain(dp.atom_domain(T="i64")), dp.l1_distance(T="i64")) >> dp.m.then_laplace(scale=scale)


@lru_cache(maxsize=64)
def _response(truth: float) -> Any:
    return _opendp().m.make_randomized_response_bool(prob=truth)


def _opendp() -> Any:
    import opendp.prelude as dp  # here, because importing it takes a second or two

    dp.enable_features("contrib")
    return dp
