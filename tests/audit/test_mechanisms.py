"""Attack on every mechanism: what is stated is never exceeded by the real code, and is by every planted bug.

Audits of seeded draws always give the same answer. Those of real (OpenDP) draws state a bound at confidence `SURE`, or
say their own; what they ask besides (that bugs are caught, that attacks have teeth) lies 6 or more standard deviations
from what is measured. So each fails a correct program with probability below 1e-6. Trials stand beside each test.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from audit import clopper_pearson, epsilon_lower_bound, one_run_lower_bound, one_run_p_value
from fedcanary.privacy.accounting import Mechanism, compose, gaussian_std, laplace_scale
from fedcanary.privacy.noise import (
    gaussian_noise,
    laplace_noise,
    randomized_response,
    share_std,
    simulated_gaussian,
    simulated_laplace,
    simulated_randomized_response,
)
from fedcanary.rng import stream

SEED = 20230508
SURE = 1 - 1e-6
EPSILON, DELTA = 2.0, 1e-6
CAP = 64  # L2 norm cap in integer units
STD = gaussian_std(EPSILON, DELTA, CAP)
DIRECTION = np.array([0.48, 0.6, 0.64])  # of the attacked client's vector
BULK = 0.05  # a second delta of the same guarantee, where bounds are tight with few trials


def stated(shares: int, neighbours="zeroed", deltas=(DELTA, BULK)):
    """{delta: epsilon} of the honest mechanism: what every audit below is held against."""
    m = Mechanism(kind="discrete_gaussian", share_std=share_std(STD, shares), shares=shares, sensitivity=float(CAP))
    return {delta: compose([m], delta, neighbours=neighbours) for delta in deltas}


@functools.cache
def sums(name: str, shares: int, trials: int, *, contribution=0.0, noise=1.0, silent=0):
    """(trials,) projections of noisy sums on the client's own direction; planted bugs: weaker noise, silent clients."""
    rng = stream(SEED, name, shares, contribution, noise, silent)
    size = (trials, shares - silent, len(DIRECTION))
    noisy = simulated_gaussian(rng, share_std(STD, shares) * noise, size).sum(axis=1)
    return (noisy + np.rint(contribution * CAP * DIRECTION)) @ DIRECTION


def exceeds(bounds: dict[float, float], a, b) -> bool:
    return any(epsilon_lower_bound(a, b, delta, SURE) > epsilon for delta, epsilon in bounds.items())


# on each of two inputs, 8 shares of 3 coordinates
def attacked(shares=8, trials=100_000, **bug):
    bug = {"contribution": 1.0, **bug}
    without = {**bug, "contribution": 0.0}
    return sums("with", shares, trials, **bug), sums("without", shares, trials, **without)


@pytest.mark.parametrize("shares", [1, 8])
def test_sums_of_shares_keep_their_epsilon(shares):
    """100,000 runs on each input."""
    a, b = attacked(shares)
    assert not exceeds(stated(shares), a, b)
    assert epsilon_lower_bound(a, b, BULK, SURE) > 0.7 * stated(shares)[BULK]  # the attack is not toothless


@pytest.mark.parametrize(
    ("bug", "trials"),
    [
        pytest.param({"noise": 0.25}, 10_000, id="noise/4"),
        pytest.param({"silent": 4}, 30_000, id="half of the clients add no share"),
        pytest.param({"silent": 2}, 100_000, id="a quarter of the clients add no share"),
        pytest.param({"contribution": 3.0}, 10_000, id="unclipped client"),
        pytest.param({"contribution": 1.2}, 100_000, id="client clipped a fifth too wide"),
    ],
)
def test_planted_bugs_in_sums_of_shares_are_caught(bug, trials):
    """By so many runs on each input, with the draws of a fixed seed."""
    assert exceeds(stated(8), *attacked(trials=trials, **bug))


def test_real_shares_keep_their_epsilon_and_a_planted_bug_is_caught():
    """7,000 runs on each input, 3 shares of one coordinate, drawn by OpenDP."""
    std = share_std(STD, 3)
    a, b = (gaussian_noise(std, 21_000).reshape(-1, 3).sum(axis=1) for _ in range(2))
    assert not exceeds(stated(3), a + CAP, b)
    assert exceeds(stated(3), a / 4 + CAP, b / 4)


def test_local_gaussian_must_be_stated_for_a_substituted_value():
    """40,000 runs on each input: one message of norm CAP against its opposite."""
    noise = [simulated_gaussian(stream(SEED, "local", i), STD, 40_000) for i in range(2)]
    a, b = noise[0] + CAP, noise[1] - CAP
    assert not exceeds(stated(1, "substituted"), a, b)
    assert exceeds(stated(1, "zeroed"), a, b)
    assert exceeds(stated(1, "substituted"), noise[0] / 4 + CAP, noise[1] / 4 - CAP)


@pytest.mark.parametrize(("epsilon", "real"), [(0.5, False), (1.0, False), (1.0, True)])
def test_discrete_laplace(epsilon, real):
    """100,000 seeded or 10,000 real runs on each input: one count more or less. Pure, hence tight."""

    def counts(name, scale):
        if real:
            return laplace_noise(scale, 10_000)
        return simulated_laplace(stream(SEED, "laplace", name, epsilon), scale, 100_000)

    scale = laplace_scale(epsilon)
    bound = epsilon_lower_bound(counts("a", scale) + 1, counts("b", scale), 0.0, SURE)
    assert (0.6 if real else 0.9) * epsilon < bound <= epsilon
    assert epsilon_lower_bound(counts("a", scale / 4) + 1, counts("b", scale / 4), 0.0, SURE) > epsilon
    assert epsilon_lower_bound(counts("a", scale) + 3, counts("b", scale), 0.0, SURE) > epsilon  # unclipped


@pytest.mark.parametrize("real", [False, True])
def test_randomized_response(real):
    """100,000 seeded or 2,000 real runs on each input: one bit against the other."""

    def answers(bit, epsilon):
        if real:
            return randomized_response(np.full(2_000, bit), epsilon)
        return simulated_randomized_response(stream(SEED, "bits", bit, epsilon), np.full(100_000, bit), epsilon)

    bound = epsilon_lower_bound(answers(True, 1.0), answers(False, 1.0), 0.0, SURE)
    assert (0.3 if real else 0.9) < bound <= 1.0  # real: 0.66 with a deviation of 0.05
    assert epsilon_lower_bound(answers(True, 4.0), answers(False, 4.0), 0.0, SURE) > 1.0


# The one-run audit: many canaries, each in or zeroed by its own coin, in one sum of a central Gaussian mechanism. At
# confidence 95% (the default) a correct program exceeds its epsilon for at most one seed in 20; the seed is fixed.
CANARIES, GUESSES = 2_000, 200


def one_run(directions: str, noise: float, seed: int = 0, norm: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Coins and scores of one run. Each canary has the norm cap, along its own coordinate or random unit direction."""
    rng = stream(SEED, "one run", directions, noise, seed)
    coins = np.where(rng.random(CANARIES) < 0.5, 1, -1)
    drawn = functools.partial(simulated_gaussian, rng, share_std(STD, 1) * noise)
    if directions == "own coordinate":
        return coins, norm * CAP * (coins == 1) + drawn(CANARIES)
    vectors = rng.standard_normal((CANARIES, 2 * CANARIES))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return coins, vectors @ (np.rint(norm * CAP * (coins == 1) @ vectors) + drawn(2 * CANARIES))


@pytest.mark.parametrize("directions", ["own coordinate", "random directions"])
def test_one_run_passes_the_real_noise_and_fails_a_quarter_of_it(directions):
    assert one_run_lower_bound(*one_run(directions, 1.0), GUESSES, DELTA) <= EPSILON
    assert one_run_lower_bound(*one_run(directions, 0.25), GUESSES, DELTA) > EPSILON


def test_one_run_sees_an_unclipped_client():
    assert one_run_lower_bound(*one_run("own coordinate", 1.0, norm=4.0), GUESSES, DELTA) > EPSILON


def test_one_run_on_real_noise():
    """2,000 sums of shares of 4 clients, drawn by OpenDP. A bound above EPSILON takes 184 right of 200 guesses.

    With the real noise each is right with probability below 0.75, so a correct program fails with P < 1e-8; with an
    eighth of it above 0.99, and fewer are right with P < 1e-9.
    """
    coins = np.where(stream(SEED, "coins").random(CANARIES) < 0.5, 1, -1)
    noise = gaussian_noise(share_std(STD, 4), 4 * CANARIES).reshape(4, -1).sum(axis=0)
    assert one_run_lower_bound(coins, noise + CAP * (coins == 1), GUESSES, DELTA) <= EPSILON
    assert one_run_lower_bound(coins, noise / 8 + CAP * (coins == 1), GUESSES, DELTA) > EPSILON


@pytest.mark.statistical
def test_one_run_over_many_seeds():
    """200 runs, seeds 1 to 200, each at confidence 0.95: for a correct program P(more than 27 exceed) < 1e-6, as
    Binomial(200, 0.05) bounds them. Of the runs with a quarter of the noise at least 190 are caught (measured: all).
    """
    seen = {noise: [one_run("own coordinate", noise, seed) for seed in range(1, 201)] for noise in (1.0, 0.25)}
    over = {n: sum(one_run_lower_bound(*r, GUESSES, DELTA) > EPSILON for r in runs) for n, runs in seen.items()}
    assert over[1.0] <= 27 and over[0.25] >= 190


def test_one_run_against_its_closed_forms():
    """All of r guesses right, and pure: p is q^r, q = e^eps / (1 + e^eps). With delta: Theorem 5.2, term by term."""
    coins = np.array([1, -1] * 50)
    q = 0.05 ** (1 / 40)
    assert one_run_lower_bound(coins, coins * 1.0, 40, 0.0) == pytest.approx(math.log(q / (1 - q)), abs=2e-4)
    assert one_run_lower_bound(coins, coins * 1.0, 40, 1e-6) < math.log(q / (1 - q))
    assert one_run_lower_bound(coins, -coins * 1.0, 40, 0.0) == 0.0
    assert one_run_lower_bound(coins, np.zeros(100), 40, 0.0) == 0.0
    for v, r, m, epsilon, delta in ((70, 80, 300, 1.0, 1e-5), (30, 30, 30, 2.0, 1e-3), (9, 20, 50, 0.1, 1e-4)):
        q = math.exp(epsilon) / (1 + math.exp(epsilon))
        pmf = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
        alpha = max(2 / i * sum(pmf[max(0, v - i) : v]) for i in range(1, m + 1))
        expected = min(1.0, sum(pmf[v:]) + m * delta * alpha)
        assert one_run_p_value(v, r, m, epsilon, delta) == pytest.approx(expected, rel=1e-9)


def test_one_run_takes_no_nonsense():
    for coins, scores, guesses in (([0, 1], [1, 2], 2), ([1, -1], [1, math.nan], 2), ([1, -1], [1], 2), ([1], [1], 2)):
        with pytest.raises(ValueError, match="canar"):
            one_run_lower_bound(coins, scores, guesses, DELTA)


def test_the_bound_on_two_inputs_is_wrong_no_more_often_than_it_says():
    """300 audits of 2 x 1,000 bits at confidence 0.9; P(Binomial(300, 0.1) > 58) < 1e-6."""
    epsilon, bits = 0.7, np.array([[True], [False]]).repeat(1_000, axis=1)
    answers = [
        simulated_randomized_response(stream(SEED, "coverage", i), bits, epsilon).astype(float) for i in range(300)
    ]
    assert sum(epsilon_lower_bound(a, b, 0.0, 0.9, candidates=3) > epsilon for a, b in answers) <= 58


def test_the_one_run_p_value_is_wrong_no_more_often_than_it_says():
    """2,000 runs of 200 bits, all guessed, at level 0.1, pure and with delta 1e-4 spent; P(> 270) < 1e-6."""
    epsilon, delta = 0.7, 1e-4
    for leak in (0.0, delta):
        rng = stream(SEED, "one-run coverage", leak)
        included = rng.random((2_000, 200)) < 0.5
        right = (simulated_randomized_response(rng, included, epsilon) == included) | (rng.random((2_000, 200)) < leak)
        low = {k: one_run_p_value(k, 200, 200, epsilon, leak) <= 0.1 for k in range(201)}
        assert sum(low[int(k)] for k in right.sum(axis=1)) <= 270


def _tail(n, p, ks):
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in ks)


def test_clopper_pearson_against_the_binomial_itself():
    for k, n in ((0, 10), (3, 10), (10, 10), (40, 1_000)):
        low, high = (float(x) for x in clopper_pearson(k, n, 0.99))
        assert (low, k) == (0, 0) or _tail(n, low, range(k, n + 1)) == pytest.approx(0.005, rel=1e-6)
        assert (high, k) == (1, n) or _tail(n, high, range(k + 1)) == pytest.approx(0.005, rel=1e-6)


@pytest.mark.statistical
def test_at_the_default_epsilon_and_delta():
    """16 million runs of 4 shares on each input, at epsilon 1 and delta 1e-6; seeded, so always the same answer
    (the bounds hold at confidence 0.999). About 25 CPU-seconds.
    """
    std = share_std(gaussian_std(1.0, DELTA, CAP), 4)

    def audit(silent: int) -> float:
        def runs(world: int):
            parts = [stream(SEED, "large", silent, world, i) for i in range(16)]
            size = (1_000_000, 4 - silent)
            return np.concatenate([simulated_gaussian(rng, std, size).sum(axis=1) for rng in parts])

        return epsilon_lower_bound(runs(0) + CAP, runs(1), DELTA, 0.999, candidates=2_000)

    assert 0.5 < audit(0) <= 1.0
    assert audit(2) > 1.0  # half of the clients add no share
