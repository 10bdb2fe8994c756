"""E-values for bounded sums: evidence that may be read after every round without spending its error rate twice.

An e-value is a non-negative statistic whose mean is at most 1 when the null hypothesis holds; products over rounds
keep that property given the past, and by Ville's inequality the chance that such a product ever reaches 1/alpha is at
most alpha (Ramdas, Grünwald, Vovk & Shafer 2023, arXiv 2210.01948, section 2).

Notation: n clients with paired differences d_i in [-c, c], S = sum d_i, Q = sum d_i^2, B = sum of bits, m a margin.
kappa(h) = (-ln(1 - h) - h) / h^2, for which ln(1 + x) >= x - kappa(h) x^2 whenever x >= -h (Fan, Grama & Liu 2015,
lemma 4.1; used as in Howard et al. 2020, arXiv 1808.03204, and Waudby-Smith & Ramdas 2023, arXiv 2010.09686).

Assumption of every function here: the values are bounded as said. Nothing is assumed about their variance, shape or
dependence: with y_i = d_i + m, prod (1 - lambda y_i) <= ((1/n) sum (1 - lambda y_i))^n <= exp(-lambda (S + n m)), so
the statements hold for the mean of the very clients that answered, and in expectation for independently drawn ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedcanary.probes.base import CLIP

WORSE_LAMBDAS = (0.4, 0.8, 1.5, 2.4, 3.1)
CLEAR_LAMBDAS = (0.4, 0.8, 1.5, 2.4, 4.2)
BIT_LAMBDAS = (0.25, 0.5, 1.0, 2.0)


def kappa(h: float) -> float:
    """See the module's notation; 0 < h < 1.

    >>> round(kappa(1e-6), 3), round(kappa(0.5), 3)
    (0.5, 0.773)
    """
    return (-math.log1p(-h) - h) / h**2 if h > 1e-4 else 0.5 + h / 3


def log_worse(n: float, s: float, q: float, margin: float, lam: float, clip: float = CLIP) -> float:
    """Log e-value against "the mean of d is at least -margin", i.e. evidence that it is worse than the margin.

    With y = d + margin <= clip + margin and h = lambda (clip + margin),
    prod (1 - lambda y) >= exp(-lambda sum y - kappa(h) lambda^2 sum y^2); the left side has mean at most 1.
    """
    h = lam * (clip + margin)
    y, yy = s + n * margin, q + 2 * margin * s + n * margin**2
    return -lam * y - kappa(h) * lam**2 * yy if h < 1 else -math.inf


def log_clear(n: float, s: float, q: float, margin: float, lam: float, clip: float = CLIP) -> float:
    """Log e-value against "the mean of d is at most -margin", i.e. evidence that it is not that bad.

    With y = d + margin >= -(clip - margin), prod (1 + lambda y) >= exp(lambda sum y - kappa(h) lambda^2 sum y^2),
    h = lambda (clip - margin).
    """
    h = lam * (clip - margin)
    y, yy = s + n * margin, q + 2 * margin * s + n * margin**2
    return lam * y - kappa(h) * lam**2 * yy if h < 1 else -math.inf


def log_bits_above(n: float, b: float, share: float, lam: float) -> float:
    """Log e-value against "the share of ones is at most `share`": the Bernoulli bound of Chernoff (Hoeffding 1963)."""
    return lam * b - n * math.log1p(share * math.expm1(lam))


def log_bits_below(n: float, b: float, share: float, lam: float) -> float:
    """Log e-value against "the share of ones is at least `share`"."""
    return -lam * b - n * math.log1p(share * math.expm1(-lam))


def log_mean_exp(logs: Sequence[float]) -> float:
    """Log of the mean of exp(logs), without overflow."""
    top = max(logs)
    return top if math.isinf(top) else top + math.log(sum(math.exp(v - top) for v in logs) / len(logs))
