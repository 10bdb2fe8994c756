"""What noise costs: every (epsilon, delta) the program states is computed here, with dp-accounting's PLDs.

A `Mechanism` says what was done to the data; `compose` says what any list of them costs together. A ledger row keeps
the mechanism, so its cost can be recomputed at any time.

Neighbours, and what a sensitivity means
    zeroed       one unit's whole contribution is present, or replaced by zero: distance at most its norm cap C.
    substituted  one unit's contribution is replaced by any other: distance at most 2 C.
Mechanisms are written for `zeroed` (noise over C); `compose` doubles the distance for `substituted`.

What is exact and what is a bound
    Continuous Gaussian, any dimension: the PLD is exact but for its grid, which errs upwards only (Doroshenko et al.
    2022, arXiv 2207.04380). Several Gaussians cost what one of 1/z^2 = sum of 1/z_i^2 costs.
    Discrete Gaussian in one dimension: dp-accounting has its exact PLD; the tests hold the bound below to it.
    Sum of n independent discrete Gaussian shares N_Z(0, s^2) in each of d integer coordinates: a bound, as follows.
      1. By Poisson summation, a Gaussian of std v summed over the integers, however shifted, varies by a factor of
         at most 1 +- 2.1 exp(-2 pi^2 v^2). Hence n shares are, in each coordinate, within a factor exp(+-tau/2) of one
         N_Z(0, n s^2), tau = 10 sum_{k<n} exp(-2 pi^2 s^2 k/(k+1)) (Kairouz, Liu & Steinke 2021, arXiv 2102.06387).
      2. Likewise N_Z(x, t^2) is within exp(+-5 exp(-2 pi^2 h^2)) of this: add N(0, t^2 - h^2) to x, then draw a
         discrete Gaussian of std h around the outcome (the convolution theorem of Peikert 2010, Crypto, Theorem 3.1).
         The second step never sees x: it is post-processing.
      3. Being within exp(+-k) of a mechanism costs 2k in epsilon and a factor exp(k) in delta. So the sum is at least
         as private as a continuous Gaussian of std sqrt(n s^2 - h^2), but for k = d (tau/2 + 5 exp(-2 pi^2 h^2)).
         With h = `SMOOTHING` = 2 and s >= `MIN_SHARE_STD` = 4, k < 1e-24 for a billion shares and coordinates: less
         than the last digit of any epsilon, and not added.
    The price of discreteness is h^2 alone: at a total std t >= 1000 we state the cost of 1 - 2e-6 of the true noise.
    (There the discrete and the continuous Gaussian differ by exp(-2 pi^2 t^2), e to the minus 19.7 million.)
    The published bound for the same sum is `distributed_gaussian_epsilon`: valid for smaller shares, about 8% larger.

Sampling lowers the cost only in kind "poisson_gaussian", whose draw must be secret: see `dpsgd_epsilon`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, Final, Literal, get_args

import numpy as np

from fedcanary.errors import BadInput, Problem, did_you_mean

Neighbours = Literal["zeroed", "substituted"]
Kind = Literal["none", "gaussian", "discrete_gaussian", "poisson_gaussian", "discrete_laplace", "randomized_response"]

SMOOTHING: Final = 2.0  # h above, in integer units
MIN_SHARE_STD: Final = 4.0  # sums of smaller shares are not Gaussian, and cost more than they seem to
MIN_DELTA: Final = 1e-12  # below it the rounding of PLD convolutions could show

_NEEDS: Final[dict[str, tuple[str, ...]]] = {
    "none": (),
    "gaussian": ("noise_multiplier",),
    "discrete_gaussian": ("share_std", "shares", "sensitivity"),
    "poisson_gaussian": ("noise_multiplier", "sample_rate"),
    "discrete_laplace": ("noise_multiplier",),
    "randomized_response": ("epsilon",),
}
_LEAST: Final = {"share_std": MIN_SHARE_STD}
_MOST: Final = {"sample_rate": 1.0, "epsilon": 30.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """What was done, `count` times: enough to recompute its cost, and nothing about the data. 0 means not of this kind.

    none                 released as it is; costs infinity
    gaussian             `noise_multiplier`: noise std over the L2 norm cap
    discrete_gaussian    integer vectors summed with `shares` independent discrete Gaussians of `share_std` in every
                         coordinate; `sensitivity`: L2 norm cap, in the same integer units. A central mechanism has one
                         share. Count only shares the adversary does not know (of honest clients that survive).
    poisson_gaussian     `gaussian` over a secret Poisson sample at `sample_rate`; see `dpsgd_epsilon`
    discrete_laplace     `noise_multiplier`: scale over the L1 norm cap
    randomized_response  `epsilon` of one bit between its two values: its cost under either relation

    Raises:
        BadInput: a number that the kind needs is missing or out of range, or one that it does not have is given.
    """

    kind: Kind
    count: int = 1
    noise_multiplier: float = 0.0
    share_std: float = 0.0
    shares: int = 0
    sensitivity: float = 0.0
    sample_rate: float = 0.0
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in _NEEDS:
            raise BadInput.of("mechanism", f"unknown kind {self.kind!r}", did_you_mean(str(self.kind), _NEEDS))
        problems = []
        for name in (field.name for field in fields(self)[1:]):
            value, where = getattr(self, name), f"{self.kind}.{name}"
            least, most = _LEAST.get(name, 0.0), _MOST.get(name, math.inf)
            types = int if name in ("count", "shares") else int | float
            if name != "count" and name not in _NEEDS[self.kind]:
                if value != 0:
                    problems.append(Problem(where, "does not belong to this kind", "leave it out"))
            elif not (isinstance(value, types) and least <= value <= most and 0 < value < math.inf):
                problems.append(Problem(where, f"{value!r} is out of range", f"above 0, from {least:g} to {most:g}"))
        if problems:
            raise BadInput(problems)

    def to_json(self) -> str:
        """One line that `from_json` reads back as an equal mechanism."""
        return json.dumps({name: value for name, value in asdict(self).items() if value})

    @classmethod
    def from_json(cls, text: str) -> Mechanism:
        """Inverse of `to_json`. Raises BadInput if `text` is no mechanism.

        >>> m = Mechanism(kind="gaussian", noise_multiplier=4.0, count=3)
        >>> m.to_json(), Mechanism.from_json(m.to_json()) == m
        ('{"kind": "gaussian", "count": 3, "noise_multiplier": 4.0}', True)
        """
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise BadInput.of("mechanism", f"{text[:80]!r} is not one", "restore the row it came from") from error


def compose(mechanisms: Iterable[Mechanism], delta: float, *, neighbours: Neighbours) -> float:
    """Epsilon at `delta` of everything listed together.

    What a mechanism asks may depend on the results before it; how noisy it is, and how many there are, must not.
    """
    _check_delta(delta)
    merged: Counter[Mechanism] = Counter()
    for mechanism in mechanisms:
        merged[replace(mechanism, count=1)] += mechanism.count
    parts = sorted((replace(one, count=count) for one, count in merged.items()), key=Mechanism.to_json)
    return _compose(tuple(parts), delta, sensitivity(1.0, neighbours))


def parallel(panels: Iterable[Sequence[Mechanism]], delta: float, *, neighbours: Neighbours) -> float:
    """Epsilon at `delta` of disjoint panels: the dearest panel's.

    Holds only if no unit answers in two of them, and if who is in which does not depend on private data.
    """
    return max((compose(panel, delta, neighbours=neighbours) for panel in panels), default=0.0)


def sensitivity(norm: float, neighbours: Neighbours) -> float:
    """Distance between neighbouring sums when each unit's contribution has norm at most `norm`.

    >>> sensitivity(1.0, "zeroed"), sensitivity(1.0, "substituted")
    (1.0, 2.0)
    """
    if neighbours not in get_args(Neighbours):
        raise BadInput.of("neighbours", f"{neighbours!r} is unknown", did_you_mean(neighbours, get_args(Neighbours)))
    return _positive("norm", norm) * (2.0 if neighbours == "substituted" else 1.0)


def gaussian_epsilon(std: float, sensitivity: float, delta: float, compositions: int = 1) -> float:
    """Epsilon at `delta` of `compositions` Gaussian releases; `std` and the L2 `sensitivity` in the same unit.

    For local noise: the std on one message, and `sensitivity(norm, "substituted")`.
    """
    multiplier = std / _positive("sensitivity", sensitivity)
    spent = Mechanism(kind="gaussian", noise_multiplier=multiplier, count=compositions)
    return compose([spent], delta, neighbours="zeroed")


def gaussian_std(epsilon: float, delta: float, sensitivity: float, compositions: int = 1) -> float:
    """Smallest noise std (to 1e-6 relative) whose `gaussian_epsilon` is at most `epsilon`."""
    one = _multiplier(_positive("epsilon", epsilon), _check_delta(delta))
    std = one * _positive("sensitivity", sensitivity) * math.sqrt(_positive("compositions", compositions))
    while gaussian_epsilon(std, sensitivity, delta, compositions) > epsilon:  # a last digit lost in the product
        std *= 1 + 1e-9
    return std


def dpsgd_epsilon(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float, *, neighbours: Neighbours
) -> float:
    """Epsilon at `delta`, per record, of `steps` of DP-SGD, each over a fresh Poisson sample.

    Every record must enter every batch independently with probability `sample_rate`, and who entered must stay secret:
    shuffled or fixed batches, or a draw the server knows (a panel), do not earn this number. "zeroed" also covers
    adding or removing a record.
    """
    step = Mechanism(kind="poisson_gaussian", noise_multiplier=noise_multiplier, sample_rate=sample_rate, count=steps)
    return compose([step], delta, neighbours=neighbours)


def distributed_gaussian_epsilon(
    share_std: float, shares: int, dimension: int, sensitivity: float, delta: float
) -> float:
    """The published bound on what a sum of discrete Gaussian shares costs, which also holds for small shares.

    Kairouz, Liu & Steinke 2021 (arXiv 2102.06387), Proposition 14, in Renyi divergence, then to epsilon at `delta`.
    `sensitivity` is the L2 distance in integer units; integer vectors then differ by at most min(sqrt(d) D2, D2^2) in
    L1. Looser than kind "discrete_gaussian", and the way to see what shares below `MIN_SHARE_STD` would cost.

    Raises:
        BadInput: `share_std` below 1/2, where the proposition says nothing.
    """
    from dp_accounting.rdp import compute_epsilon

    if not share_std >= 0.5:
        raise BadInput.of("share_std", f"{share_std:g} is below 1/2", "scale the integers up")
    orders = np.geomspace(1.01, 1025.0, 300)
    tau, std = _tau(share_std, shares), share_std * math.sqrt(shares)
    l2 = _positive("sensitivity", sensitivity) / std
    l1 = l2 * min(math.sqrt(dimension), sensitivity)
    half = min(l2**2 + 2 * l1 * tau + tau**2 * dimension, (l2 + tau * math.sqrt(dimension)) ** 2) / 2
    rdp = np.minimum(orders / 2 * l2**2 + tau * dimension, orders * half)
    return float(compute_epsilon(orders, rdp, _check_delta(delta))[0])


def randomized_response_truth(epsilon: float) -> float:
    """Probability of the true bit at cost `epsilon` (delta 0): e^epsilon / (1 + e^epsilon), rounded down.

    >>> round(randomized_response_truth(math.log(3)), 6)
    0.75
    """
    if not 0 < epsilon <= _MOST["epsilon"]:  # beyond, a lie is rarer than double precision can say
        raise BadInput.of("epsilon", f"{epsilon!r} is out of range", f"above 0, to {_MOST['epsilon']:g}")
    return max(0.5, math.nextafter(1 / (1 + math.exp(-epsilon)), 0.0))


def laplace_scale(epsilon: float, sensitivity: float = 1.0) -> float:
    """Scale of the discrete Laplace noise that releases one count at cost `epsilon` (delta 0)."""
    return _positive("sensitivity", sensitivity) / _positive("epsilon", epsilon)


def _check_delta(delta: float) -> float:
    if not MIN_DELTA <= delta < 1:
        raise BadInput.of("delta", f"{delta!r} is not in [{MIN_DELTA:g}, 1)", "1e-6 is usual")
    return delta


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise BadInput.of(name, f"{value!r} is not a positive number", "give one above 0")
    return float(value)


@lru_cache(maxsize=1024)
def _tau(share_std: float, shares: int) -> float:
    k = np.arange(1, shares, dtype=np.float64)
    return 10.0 * float(np.exp(-2 * math.pi**2 * share_std**2 * k / (k + 1)).sum())


def _precision(m: Mechanism) -> float:
    """Sum of 1/z^2 over the uses of a mechanism; 0 if it is no Gaussian."""
    if m.kind == "gaussian":
        return m.count / m.noise_multiplier**2
    if m.kind == "discrete_gaussian":
        return m.count * m.sensitivity**2 / (m.shares * m.share_std**2 - SMOOTHING**2)
    return 0.0


def _pure(m: Mechanism, factor: float) -> float:
    """Epsilon of one use at delta 0; 0 if it has none."""
    return factor / m.noise_multiplier if m.kind == "discrete_laplace" else m.epsilon


@lru_cache(maxsize=4096)
def _compose(parts: tuple[Mechanism, ...], delta: float, factor: float) -> float:
    if any(m.kind == "none" for m in parts):
        return math.inf
    precision = factor**2 * sum(_precision(m) for m in parts)
    # The grid follows the width of the total loss; subsampled steps, whose own is far smaller, bring theirs.
    spread = math.sqrt(precision + sum(m.count * _pure(m, factor) ** 2 for m in parts))
    grid = 2e-4 * max(1.0, spread) if any(m.sample_rate for m in parts) else 2e-3 * spread
    grid = 2.0 ** math.floor(math.log2(grid)) if grid else 1.0  # few grids, so that parts are found in the cache
    plds = [_pld(m, factor, grid) for m in parts if not _precision(m)]
    if precision:
        merged = Mechanism(kind="gaussian", noise_multiplier=1 / math.sqrt(precision))
        plds.insert(0, _pld(merged, 1.0, grid))
    if not plds:
        return 0.0
    total = plds[0]
    for pld in plds[1:]:
        total = total.compose(pld)
    epsilon = float(total.get_epsilon_for_delta(delta))
    # Pure mechanisms never cost more than their sum, which the grid may overshoot by its width.
    pure = [m.count * _pure(m, factor) for m in parts]
    return min(epsilon, sum(pure)) if all(pure) else epsilon


@lru_cache(maxsize=256)
def _pld(m: Mechanism, factor: float, grid: float) -> Any:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution as pld

    if m.kind in ("gaussian", "poisson_gaussian"):
        relation = NeighboringRelation.REPLACE_SPECIAL if factor == 1 else NeighboringRelation.REPLACE_ONE
        one = pld.from_gaussian_mechanism(
            m.noise_multiplier,
            value_discretization_interval=grid,
            sampling_prob=m.sample_rate or 1.0,
            neighboring_relation=relation,
        )
    else:
        # Randomized response is the worst of all mechanisms with its epsilon, and discrete Laplace at distance 1 has
        # the same two losses: exact for bits and single counts, a bound for larger distances.
        one = pld.from_discrete_laplace_mechanism(
            _pure(m, factor), value_discretization_interval=grid, use_connect_dots=True
        )
    return one.self_compose(m.count) if m.count > 1 else one


@lru_cache(maxsize=1024)
def _multiplier(epsilon: float, delta: float) -> float:
    from scipy.optimize import brentq

    # epsilon <= a^2/2 + a sqrt(2 ln(1/delta)) with a = 1/z (Bun & Steinke 2016, arXiv 1605.02065, Proposition 1.3)
    wide = math.sqrt(2 * math.log(1 / delta))
    high = (wide + math.sqrt(wide**2 + 2 * epsilon)) / (2 * epsilon)
    low = high / 2
    while gaussian_epsilon(low, 1.0, delta) <= epsilon:
        high, low = low, low / 2
    found = float(brentq(lambda z: gaussian_epsilon(z, 1.0, delta) - epsilon, low, high, rtol=1e-8, xtol=1e-8 * low))
    while gaussian_epsilon(found, 1.0, delta) > epsilon:
        found *= 1 + 1e-7
    return found
