"""Bootstrap intervals, against the slow and the known."""

from __future__ import annotations

import numpy as np
import pytest

from fedcanary.probes import bootstrap, statistics
from fedcanary.probes.bias import contrasts
from fedcanary.probes.bootstrap import contrast_of, detectable, ece_change_of, mean_of, spread, units_of
from fedcanary.types import Item


def test_a_mean_agrees_with_the_plain_paired_bootstrap():
    d = np.random.default_rng(1).normal(0.02, 0.1, 300)
    sums = mean_of(d, np.arange(300))
    found = spread(sums, 0.05, np.random.default_rng(2))
    known = statistics.paired_bootstrap(d, 0.95, np.random.default_rng(3), repeats=10_000)
    assert sums.estimate == pytest.approx(known.estimate)
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=0.001)
    least = detectable(found.std_error, 300, 0.05, 0.8)
    assert least == pytest.approx(statistics.minimum_detectable_effect(d, 0.05, 0.8), rel=0.05)


def test_pairs_are_kept_together():
    """Asking every question twice, as a pair, teaches nothing: the interval does not become narrower."""
    d = np.random.default_rng(1).normal(0.02, 0.1, 100)
    once = spread(mean_of(d, np.arange(100)), 0.05, np.random.default_rng(2))
    twice = np.repeat(d, 2)
    paired = spread(mean_of(twice, units_of([(0, str(i // 2)) for i in range(200)])), 0.05, np.random.default_rng(2))
    apart = spread(mean_of(twice, np.arange(200)), 0.05, np.random.default_rng(2))
    assert (paired.low, paired.high) == pytest.approx((once.low, once.high))
    assert apart.high - apart.low < 0.8 * (once.high - once.low)


def test_sums_are_the_statistics_they_stand_for():
    rng = np.random.default_rng(1)
    conf = rng.uniform(0, 1, 200), rng.uniform(0, 1, 200)
    hit = (rng.random(200) < 0.6).astype(float), (rng.random(200) < 0.5).astype(float)
    ece = [statistics.ece(c, h, bootstrap.BINS) for c, h in zip(conf, hit, strict=True)]
    assert ece_change_of(conf, hit, np.arange(200)).estimate == pytest.approx(ece[1] - ece[0])
    groups = ("x", "y", "z")
    items = [Item(prompt="", choices=("a",), group=groups[i % 3]) for i in range(200)]
    of = np.array([item.group for item in items])
    expected = contrasts(items, conf[0], groups)
    for at, group in enumerate(groups):
        assert contrast_of(conf[0], groups, group, of, np.arange(200)).estimate == pytest.approx(expected[at])


@pytest.mark.statistical
def test_a_change_of_exactly_the_margin_is_seldom_called(monkeypatch):
    """1,000 trials, seeds 0 to 999, 99% intervals: each wrong word has chance .005 (skewed: about .01). A correct
    program exceeds 25 of 1,000 with probability below 1e-4 (binomial, .01)."""
    monkeypatch.setattr(bootstrap, "REPEATS", 2000)
    rng = np.random.default_rng(0)
    wrong = np.zeros((2, 2), dtype=int)
    for trial in range(1000):
        for at, d in enumerate((rng.normal(0.05, 0.1, 60), rng.beta(0.5, 9.5, 100))):
            found = spread(mean_of(d, np.arange(len(d))), 0.01, np.random.default_rng(trial))
            wrong[at] += found.low > 0.05, found.high < 0.05
    assert wrong.max() <= 25


@pytest.mark.statistical
def test_a_loss_of_calibration_of_exactly_the_margin_is_seldom_called_not_worse(monkeypatch):
    """The base is calibrated, so its ECE is all bias: the plain difference would say `not worse` in every tenth run.

    200 trials for each n, seed 0: with chance at most .005 each, a correct program exceeds 6 with probability 1e-4.
    """
    monkeypatch.setattr(bootstrap, "REPEATS", 2000)
    rng = np.random.default_rng(0)
    for n in (96, 500, 2000):
        wrong = 0
        for trial in range(200):
            truth = rng.uniform(0.5, 0.9, n)
            hit = (rng.random(n) < truth).astype(float)
            base = np.clip(truth + rng.normal(0, 0.02, n), 0, 1)
            found = spread(
                ece_change_of((base, truth + 0.031), (hit, hit), np.arange(n)), 0.01, np.random.default_rng(trial)
            )
            wrong += found.high < 0.03
        assert wrong <= 6
