"""E-values for bounded sums: evidence that may be read after every round without spending its error rate twice.

An e-value is a non-negative statistic whose mean is at most 1 when the null hypothesis holds; products over rounds
keep that property given the past, and by Ville's inequality the chance that such a product ever reaches 1/alpha is at
most alpha (Ramdas, Grünwald, Vovk & Shafer 2023, arXiv 2210.01948, section 2).

Notation: n clients with paired differences d_i in [-c, c], S = sum d_i, Q = sum d_i^2, B = sum of bits, m a margin.
kappa(h) = (-ln(1 - h) - h) / h^2, for which ln(1 + x) >= x - kappa(h) x^2 whenever x >= -h (Fan, Grama & Liu 2015,
lemma 4.1; used as in Howard et al. 2020, arXiv 1808.03204, and Waudby-Smith & Ramdas 2023, arXiv 2010.09686).

Joint bets on a mean and on a share of severe clients (`log_worse` with a tilt) see harm that is concentrated in few
clients, which moves the mean little.

Assumption of every function here: the values are bounded as said. Nothing is assumed about their variance, shape or
dependence: with y_i = d_i + m, prod (1 - lambda y_i) <= ((1/n) sum (1 - lambda y_i))^n <= exp(-lambda (S + n m)), so
the statements hold for the mean of the very clients that answered, and in expectation for independently drawn ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from fedcanary.probes.base import CLIP

# What is bet on: by how much the mean is beyond its margin, and the share of severe clients beyond theirs.
PLAIN: Final = tuple((mean, 0.0) for mean in (0.006, 0.012, 0.025, 0.05, 0.12))  # where no severe bit is sent
WORSE: Final = (*PLAIN, (0.0, 0.05), (0.01, 0.032), (0.02, 0.064), (0.04, 0.128))
ABOVE: Final = (0.03, 0.06, 0.12, 0.25)  # by how much a share is beyond its own
WITHIN: Final = (0.3, 0.6, 1.0)  # by how much of its margin a mean, or of its share a share, is within it
VARIANCE = 0.01  # of a client's difference; only the bets' sizes rest on it
SAFE = 0.8  # of the largest bet that could lose everything
STEEPEST = 3.0  # bet on a share
CENTERS: Final = tuple(k / 5 for k in range(-5, 6))  # around which a spread is taken, in units of the clip
LEAST = 0.005  # effect that a bet is made for


def kappa(h: float) -> float:
    """See the module's notation; 0 < h < 1.

    >>> round(kappa(1e-6), 3), round(kappa(0.5), 3)
    (0.5, 0.773)
    """
    return (-math.log1p(-h) - h) / h**2 if h > 1e-4 else 0.5 + h / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What one round says of a stream. n clients sent f_i (d_i, d_i^2, k_i, b_i) with a shrinkage f_i in (0, 1].

    `s`, `q`, `b` are the sums of f d, f d^2 and f b (a bit), `missing` of f k (k = 1 if the client cannot say: its
    other values are 0), `lost` of 1 - f; each with the standard deviation of its noise, which must be sub-Gaussian with
    that parameter and independent from sum to sum (Gaussian and discrete Gaussian noise are: Canonne, Kamath & Steinke
    2020, arXiv 2004.00010, section 2). Exact sums have all those at 0, and `lost` too. Where `step` is not 0, the noise
    on every sum is discrete Laplace on its multiples instead (one count alone is best noised so).
    """

    n: float
    s: float = 0.0
    q: float = 0.0
    b: float = 0.0
    missing: float = 0.0
    lost: float = 0.0
    s_std: float = 0.0
    q_std: float = 0.0
    b_std: float = 0.0
    missing_std: float = 0.0
    lost_std: float = 0.0
    step: float = 0.0


def log_worse(x: Sums, margin: float, lam: float, tilt: float = 0.0, share: float = 0.0, clip: float = CLIP) -> Any:
    """Log e-value against "the mean of what was reported is at least -margin, and at most `share` of it is severe".

    A bet on both: z = lam (f d + margin) - tilt (f b - share) has mean at least 0 under the hypothesis and z <= h =
    lam (clip + margin) + tilt share, so prod (1 - z) >= exp(-sum z - kappa(h) sum z^2), whose left side has mean at
    most 1. Squares are at most (f d + margin)^2 <= f d^2 + 2 margin f d + margin^2; (f b - share)^2 <= (1 - 2 share)
    f b + share^2; -(f d + margin) (f b - share) <= max(clip - margin, 0) f b + share (f d + margin). The noise on a sum
    that enters with a factor a has mean E exp(a noise) <= exp(a^2 std^2 / 2), which is paid for.
    """
    h = lam * (clip + margin) + tilt * share
    if h >= 1:
        return -math.inf
    k, cross = kappa(h), 2 * lam * tilt
    y = x.s + x.n * margin
    yy = x.q + 2 * margin * x.s + x.n * margin**2
    bb = (1 - 2 * share) * x.b + x.n * share**2
    zz = lam**2 * yy + cross * (max(clip - margin, 0.0) * x.b + share * y) + tilt**2 * bb
    paid = noise_cost(
        x.step,
        (lam + k * (2 * margin * lam**2 + cross * share), x.s_std),
        (k * lam**2, x.q_std),
        (tilt - k * (cross * max(clip - margin, 0.0) + tilt**2 * (1 - 2 * share)), x.b_std),
    )
    return -lam * y + tilt * (x.b - x.n * share) - k * zz - paid


def log_clear(x: Sums, margin: float, lam: float, clip: float = CLIP) -> Any:
    """Log e-value against "the mean of the clients' d, unshrunken, is at most -margin": evidence that it is not so bad.

    Whoever cannot say counts as -clip, and so does the share that shrinkage took: y = f d - clip (1 - f) - clip f k +
    margin <= d + margin, y >= margin - clip, and sum y^2 <= Q + 2 clip^2 F + clip^2 X + 2 margin (S - clip F - clip X)
    + n margin^2, where Q, S, X, F are the sums of f d^2, f d, f k and 1 - f. Then as in `log_worse`, with prod (1 +
    lambda y) and h = lambda (clip - margin).
    """
    h = lam * (clip - margin)
    if h >= 1:
        return -math.inf
    a = kappa(h) * lam**2
    y = x.s - clip * (x.lost + x.missing) + x.n * margin
    lost, missing = 2 * clip**2 - 2 * margin * clip, clip**2 - 2 * margin * clip
    yy = x.q + 2 * margin * x.s + x.n * margin**2 + lost * x.lost + missing * x.missing
    return (
        lam * y
        - a * yy
        - noise_cost(
            x.step,
            (lam - 2 * a * margin, x.s_std),
            (a, x.q_std),
            (lam * clip + a * lost, x.lost_std),
            (lam * clip + a * missing, x.missing_std),
        )
    )


def log_bits_above(x: Sums, share: float, lam: float) -> Any:
    """Log e-value against "the share of ones is at most `share`": the Bernoulli bound of Chernoff (Hoeffding 1963).

    f b <= b, so shrinkage can only hide ones here.
    """
    return lam * x.b - x.n * math.log1p(share * math.expm1(lam)) - noise_cost(x.step, (lam, x.b_std))


def log_bits_below(x: Sums, share: float, lam: float) -> Any:
    """Log e-value against "the share of ones is at least `share`", where missing and shrunken clients count as ones.

    b <= f b + f k + (1 - f) for b or k in {0, 1}.
    """
    ones = x.b + x.missing + x.lost
    paid = noise_cost(x.step, (lam, x.b_std), (lam, x.missing_std), (lam, x.lost_std))
    return -lam * ones - x.n * math.log1p(share * math.expm1(-lam)) - paid


def log_spread_above(x: Sums, variance: float, lam: float, clip: float = CLIP) -> Any:
    """Log e-value against "the clients' variance of d is at most `variance`", whatever their mean is.

    For any center m, u = (d - m)^2 / (clip + |m|)^2 is in [0, 1], and for one of CENTERS within half a step of the
    mean E u <= (variance + (step / 2)^2) / (clip + |m|)^2 under the hypothesis: then the Bernoulli bound of
    `log_bits_above` holds, as u is bounded (Hoeffding 1963). The least over the centers is below the right one's.
    f (d - m)^2 <= (d - m)^2, so shrinkage can only hide spread; who cannot say adds none.
    """
    step = CENTERS[1] - CENTERS[0]
    logs = []
    for m in (clip * c for c in CENTERS):
        square = (clip + abs(m)) ** 2
        share = min((variance + (clip * step / 2) ** 2) / square, 1.0)
        a = lam / square
        u = a * (x.q - 2 * m * x.s + m**2 * (x.n - x.lost - x.missing))
        paid = noise_cost(x.step, (a, x.q_std), (2 * a * m, x.s_std), (a * m**2, x.lost_std), (a * m**2, x.missing_std))
        logs.append(u - x.n * math.log1p(share * math.expm1(lam)) - paid)
    return np.minimum.reduce(logs)


def log_spread_below(x: Sums, variance: float, lam: float, clip: float = CLIP) -> Any:
    """Log e-value against "the clients' variance of d is at least `variance`", missing and lost ones at the worst.

    Then E (d - m)^2 >= variance for every m, and the mean of e-values over CENTERS is one.
    """
    logs = []
    for m in (clip * c for c in CENTERS):
        square = (clip + abs(m)) ** 2
        a = lam / square
        worst = x.missing + x.lost
        u = a * (x.q - 2 * m * x.s + m**2 * (x.n - worst)) + lam * worst
        rest = lam - a * m**2
        paid = noise_cost(x.step, (a, x.q_std), (2 * a * m, x.s_std), (rest, x.lost_std), (rest, x.missing_std))
        share = min(variance / square, 1.0)
        logs.append(-u - x.n * math.log1p(share * math.expm1(-lam)) - paid)
    return np.logaddexp.reduce(logs) - math.log(len(logs))


def worse_bets(x: Sums, margin: float, share: float | None, clip: float = CLIP) -> list[tuple[float, float]]:
    """(lam, tilt) of `log_worse` for each of WORSE, or of PLAIN where no severe bit is sent (`share` is None).

    Each is near the best bet on its effect under this noise (see `_bet`). All bets here rest on n and the noise alone,
    which are known before the sums are opened, so that an e-value stays one.
    """
    found = []
    for mean, more in PLAIN if share is None else WORSE:
        lam = _bet(mean, mean / VARIANCE, x.s_std**2 / x.n) if mean else 0.0
        tilt = _bet(more, more / ((share or 0.0) + more), x.b_std**2 / x.n) if more else 0.0
        less = SAFE / max(lam * (clip + margin) + tilt * (share or 0.0), SAFE)
        found.append((lam * less, tilt * less))
    return found


def clear_bets(x: Sums, margin: float, clip: float = CLIP) -> list[float]:
    """Bets of `log_clear`, one for each of WITHIN; `margin` is below the clip."""
    noise = (x.s_std**2 + clip**2 * (x.lost_std**2 + x.missing_std**2)) / x.n
    gaps = [r * max(margin, LEAST) for r in WITHIN]
    return [min(_bet(gap, gap / VARIANCE, noise), SAFE / (clip - margin)) for gap in gaps]


def above_bets(x: Sums, share: float) -> list[float]:
    """Bets of `log_bits_above`, one for each of ABOVE."""
    return [_bet(more, _log_odds(share, share + more), x.b_std**2 / x.n) for more in ABOVE]


def below_bets(x: Sums, share: float) -> list[float]:
    """Bets of `log_bits_below`, one for each of WITHIN."""
    noise = (x.b_std**2 + x.missing_std**2 + x.lost_std**2) / x.n
    near = max(share, LEAST)
    return [_bet(r * near, _log_odds(near * (1 - r), near), noise) for r in WITHIN]


def _bet(effect: float, alone: float, noise: float) -> float:
    """Near the bet that grows fastest on an effect, given the best one without noise and a client's part of the noise.

    Exactly so for a normal difference of variance v: alone = effect / v gives effect / (v + noise).
    """
    return 1 / (1 / alone + noise / effect)


def _log_odds(low: float, high: float) -> float:
    """Log odds ratio of two shares, at most STEEPEST: the best bet on the one against the other (Kelly)."""
    if low <= 0 or high >= 1:
        return STEEPEST
    return min(math.log(high / (1 - high) * (1 - low) / low), STEEPEST)


def noise_cost(step: float, *terms: tuple[float, float]) -> float:
    """What noise of standard deviation std, entering the exponent with a factor, costs: its log moment function.

    `terms` are (factor, std) of independent noises on multiples of `step`; 0: Gaussian or discrete Gaussian.

    Gaussian: half the squares' sum, which also bounds discrete Gaussian noise. Discrete Laplace of variance v (in steps
    squared): -log(1 - v (cosh(a) - 1)) at a factor of a per step, from its probabilities (1 - p) / (1 + p) p^|k| with v
    = 2 p / (1 - p)^2 (Inusah & Kozubowski 2006, section 2); infinite where it has no such moment.
    """
    if not step:
        return math.fsum((factor * std) ** 2 for factor, std in terms) / 2
    left = [1 - (std / step) ** 2 * (math.cosh(factor * step) - 1) for factor, std in terms]
    return math.inf if min(left) <= 0 else -math.fsum(map(math.log, left))


def log_mean_exp(logs: Sequence[float]) -> float:
    """Log of the mean of exp(logs), without overflow."""
    top = max(logs)
    return top if math.isinf(top) else top + math.log(sum(math.exp(v - top) for v in logs) / len(logs))
