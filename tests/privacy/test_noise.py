"""The noise that is added has the distribution that is paid for; its shares are safe or refused.

Tests of real (OpenDP) draws cannot be seeded: each fails a correct program with probability below 1e-6.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedcanary.errors import BadInput
from fedcanary.privacy.accounting import MIN_SHARE_STD, gaussian_std
from fedcanary.privacy.noise import (
    MAX_SCALE,
    gaussian_noise,
    laplace_noise,
    randomized_response,
    share_std,
    simulated_gaussian,
    simulated_laplace,
    simulated_randomized_response,
)
from fedcanary.rng import stream

SEED = 1
RARE = 1e-7  # probability that a correct sampler fails one of these tests


def seeded(sampler, name):
    return lambda scale, size: sampler(stream(SEED, name, str(scale)), scale, size)


GAUSSIANS = [pytest.param(gaussian_noise, 10_000, id="real"), pytest.param(seeded(simulated_gaussian, "g"), 200_000)]
LAPLACES = [pytest.param(laplace_noise, 10_000, id="real"), pytest.param(seeded(simulated_laplace, "l"), 200_000)]


def fits(draws, weight) -> float:
    """Chi-square p-value of integer draws against probabilities proportional to `weight`, over 40 or fewer bins."""
    reach = int(np.abs(draws).max()) + 40
    x = np.arange(-reach, reach + 1)
    p = weight(x)
    cumulative = np.cumsum(p / p.sum())
    ends = np.unique(np.searchsorted(cumulative, np.linspace(0.01, 0.99, 40)))
    expected = np.diff(np.concatenate([[0.0], cumulative[ends], [1.0]]))
    bins = np.searchsorted(x[ends], draws, side="left")
    return float(stats.chisquare(np.bincount(bins, minlength=len(expected)), expected * len(draws)).pvalue)


@pytest.mark.parametrize(("sampler", "size"), GAUSSIANS)
@pytest.mark.parametrize("std", [0.6, 4.225, 1000.0])
def test_gaussian_draws(sampler, size, std):
    draws = sampler(std, size)
    assert draws.dtype == np.int64 and draws.shape == (size,)
    assert fits(draws, lambda x: np.exp(-((x / std) ** 2) / 2)) > RARE
    if std > 1:  # chi-square does not see the tails
        deviation = stats.norm.isf(RARE / 2)
        assert abs(draws.mean()) < deviation * std / math.sqrt(size)
        assert abs(draws.std() / std - 1) < deviation / math.sqrt(2 * size)
        assert np.abs(draws).max() < std * stats.norm.isf(RARE / size / 2)


@pytest.mark.parametrize(("sampler", "size"), LAPLACES)
@pytest.mark.parametrize("scale", [0.5, 1.0, 300.0])
def test_laplace_draws(sampler, size, scale):
    draws = sampler(scale, size)
    assert draws.dtype == np.int64 and draws.shape == (size,)
    assert fits(draws, lambda x: np.exp(-np.abs(x) / scale)) > RARE
    assert np.abs(draws).max() < 2 + scale * math.log(size / RARE)


def test_randomized_response_lies_as_often_as_it_should():
    bits = stream(SEED, "bits").random((3, 700)) < 0.3
    for answers in (randomized_response(bits, 1.5), simulated_randomized_response(stream(SEED, "r"), bits, 1.5)):
        assert answers.shape == bits.shape and answers.dtype == np.bool_
        for value in (False, True):
            lies = int((answers != bits)[bits == value].sum())
            assert stats.binomtest(lies, int((bits == value).sum()), 1 / (1 + math.exp(1.5))).pvalue > RARE


def test_simulated_draws_repeat_and_real_ones_do_not():
    one, two = (simulated_gaussian(stream(SEED, "again"), 50.0, (20, 4)) for _ in range(2))
    assert one.shape == (20, 4) and np.array_equal(one, two)
    draws = []
    for _ in range(2):
        np.random.seed(SEED)  # noqa: NPY002  # the old global seed is what real noise must not follow
        draws.append([gaussian_noise(1e6, 20), laplace_noise(1e6, 20)])
    assert not np.array_equal(draws[0], draws[1])


@pytest.mark.parametrize("sampler", [gaussian_noise, seeded(simulated_gaussian, "wide")])
def test_wide_noise_stays_inside_64_bits(sampler):
    draws = sampler(MAX_SCALE, 1_000).astype(float)
    assert abs(draws.std() / MAX_SCALE - 1) < stats.norm.isf(RARE / 2) / math.sqrt(2_000)
    assert np.abs(draws).max() * 1e4 < 2.0**67 and np.abs(draws).max() < 7 * MAX_SCALE


def test_no_noise_is_not_a_scale():
    for bad in (0.0, -1.0, math.nan, math.inf, 2 * MAX_SCALE):
        for sampler in (gaussian_noise, laplace_noise, seeded(simulated_gaussian, "b"), seeded(simulated_laplace, "b")):
            with pytest.raises(BadInput, match="not a noise scale"):
                sampler(bad, 1)
        with pytest.raises(BadInput):
            share_std(bad, 10)
    with pytest.raises(BadInput):
        randomized_response(np.array([True]), 0.0)


def test_summed_shares_are_as_accurate_as_central_noise():
    """Two sums of 200 shares at the same epsilon: std within 10% of the central one (measured: within 1%).

    10,000 coordinates, so the measured std is within 3.8% with probability 1 - 1e-7.
    """
    central = gaussian_std(1.0, 1e-6, 65_536.0)
    share = share_std(central, 200)
    simulated = simulated_gaussian(stream(SEED, "shares"), share, (200, 10_000)).sum(axis=0)
    assert abs(simulated.std() / central - 1) < 0.038


@given(st.floats(100.0, 1e9), st.integers(1, 10_000))
def test_shares_of_any_split_are_safe_or_refused(total, survivors):
    try:
        share = share_std(total, survivors)
    except BadInput as error:
        assert math.hypot(total, 2.0) / math.sqrt(survivors) < MIN_SHARE_STD
        scale = int(str(error).split("by ")[-1].split(" or")[0])
        assert share_std(total * scale, survivors) >= MIN_SHARE_STD  # the remedy works
    else:
        assert share >= MIN_SHARE_STD
        assert total**2 <= survivors * share**2 - 4 * (1 - 1e-9)
        assert share * math.sqrt(survivors) <= total * 1.001


def test_a_sum_without_honest_clients_is_refused():
    with pytest.raises(BadInput, match="add no noise"):
        share_std(1000.0, 0)
