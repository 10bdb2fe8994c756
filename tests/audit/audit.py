"""Lower bounds on epsilon from what a mechanism did: a bound above the stated epsilon is a bug, found by attack."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats


def clopper_pearson(successes, trials: int, confidence: float):
    """Exact interval for a probability (Clopper & Pearson 1934); each end is wrong with at most half of the rest.

    Takes and gives arrays: (..., ) successes -> two arrays of the same shape.
    """
    k, miss = np.asarray(successes, dtype=float), (1 - confidence) / 2
    low = np.where(k > 0, stats.beta.ppf(miss, np.maximum(k, 1e-9), trials - k + 1), 0.0)
    high = np.where(k < trials, stats.beta.isf(miss, k + 1, np.maximum(trials - k, 1e-9)), 1.0)
    return low, high


def epsilon_lower_bound(samples_a, samples_b, delta: float, confidence: float, candidates: int = 200) -> float:
    """Epsilon that a mechanism has at least at `delta`, from one score per run on each of two neighbouring inputs.

    An (epsilon, delta) mechanism has P(event) <= e^epsilon Q(event) + delta in both directions. The event (a threshold,
    a side, a direction) is chosen on the first half of the samples and measured on the second, so the bound exceeds
    the truth with probability at most 1 - confidence. Samples must be independent and identically distributed.
    """
    a, b = np.asarray(samples_a, dtype=float), np.asarray(samples_b, dtype=float)
    halves = [(x[: len(x) // 2], x[len(x) // 2 :]) for x in (a, b)]
    scouts, judges = zip(*halves, strict=True)
    thresholds = np.unique(np.quantile(np.concatenate(scouts), np.linspace(0, 1, candidates), method="nearest"))

    def bounds(pair, at):
        """(side, direction, thresholds) lower bounds."""
        above = [len(x) - np.searchsorted(np.sort(x), at, side="left") for x in pair]
        rows = []
        for counts in (above, [len(x) - k for x, k in zip(pair, above, strict=True)]):
            intervals = [clopper_pearson(k, len(x), confidence) for k, x in zip(counts, pair, strict=True)]
            for p, q in (intervals, intervals[::-1]):
                rows.append(np.log(np.maximum(p[0] - delta, 1e-300)) - np.log(q[1]))
        return np.array(rows)

    scouted = bounds(scouts, thresholds)
    row, column = np.unravel_index(np.argmax(scouted), scouted.shape)
    return max(0.0, float(bounds(judges, thresholds[column : column + 1])[row, 0]))


def one_run_p_value(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """The most probable that `correct` or more of `guesses` can be, if the mechanism is (epsilon, delta).

    Steinke, Nasr & Jagielski 2023 (arXiv 2305.08846), Theorem 5.2: as if every guess were right by a coin of its own,
    e^epsilon : 1, and delta let an adversary who just missed, by i guesses, buy them at 2 `canaries` delta / i.
    """
    truth = 1 / (1 + math.exp(-epsilon))
    lucky = float(stats.binom.sf(correct - 1, guesses, truth))
    just_missed = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, truth))
    bought = float(np.max(just_missed / np.arange(1, correct + 1), initial=0.0))
    return min(1.0, lucky + 2 * canaries * delta * bought)


def one_run_lower_bound(coins, scores, guesses: int, delta: float, confidence: float = 0.95) -> float:
    """Epsilon that a mechanism has at least at `delta`, from one run; wrong with probability at most 1 - confidence.

    `coins` (m,) in {-1, +1}: canary i (one unit's whole contribution) was in (+1) or zeroed (-1) by a fair coin of its
    own, and every other input was fixed before. `scores` (m,): how much the output looks as if canary i was in; any
    function of the output, but not of the coins. Only the `guesses` most extreme scores are guessed, the upper half to
    be in; that number must be fixed before the run. Canaries may be spread over the panels of a run, one panel each.
    """
    coins, scores = np.asarray(coins), np.asarray(scores, dtype=float)
    if coins.shape != scores.shape or not np.isin(coins, (-1, 1)).all() or not np.isfinite(scores).all():
        raise ValueError("one coin, -1 or +1, and one finite score for each canary")
    if not 2 <= guesses <= len(coins):
        raise ValueError(f"{guesses} guesses about {len(coins)} canaries")
    order, half = np.argsort(scores, kind="stable"), guesses // 2
    correct = int((coins[order[half - guesses :]] == 1).sum() + (coins[order[:half]] == -1).sum())

    def surprising(epsilon: float) -> bool:
        return one_run_p_value(correct, guesses, len(coins), epsilon, delta) <= 1 - confidence

    low, high = 0.0, 30.0
    if not surprising(low):
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if surprising(middle) else (low, middle)
    return low
