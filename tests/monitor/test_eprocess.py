"""E-values against exact enumeration: their mean under the null is at most 1, computed without sampling."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fedcanary.monitor import eprocess as e
from fedcanary.probes.base import CLIP

MARGINS = st.floats(0.0, 0.2)
EDGE = 1e-9
WORSE, CLEAR, BITS = (0.4, 0.8, 1.5, 2.4, 3.1), (0.4, 0.8, 1.5, 2.4, 4.2), (0.25, 0.5, 1.0, 2.0)


def value(function, d, margin: float, lam: float) -> float:
    """exp of a log e-value for the exact numbers of some clients."""
    d = np.asarray(d, dtype=float)
    return math.exp(function(e.Sums(n=len(d), s=float(d.sum()), q=float((d**2).sum())), margin, lam))


def bits(function, b: int, n: int, share: float, lam: float) -> float:
    return math.exp(function(e.Sums(n=n, b=b), share, lam))


def expectation(points, probabilities, n: int, statistic) -> float:
    """E statistic(d_1..d_n) over every one of the outcomes of n independent draws."""
    total = 0.0
    for outcome in product(range(len(points)), repeat=n):
        weight = math.prod(probabilities[i] for i in outcome)
        total += weight * statistic([points[i] for i in outcome])
    return total


@st.composite
def at_the_margin(draw, points: int):
    """A distribution on two or three points of [-CLIP, CLIP] whose mean is exactly minus the margin."""
    margin = draw(MARGINS)
    low = draw(st.floats(-CLIP, -margin - 0.001)) if margin < CLIP - 0.001 else -CLIP
    high = draw(st.floats(-margin + 0.001, CLIP))
    p = (high + margin) / (high - low)
    if points == 2:
        return margin, [low, high], [p, 1 - p]
    other_low = draw(st.floats(-CLIP, -margin - 0.001))
    q = (high + margin) / (high - other_low)
    mix = draw(st.floats(0, 1))
    weights = [mix * p, (1 - mix) * q, mix * (1 - p) + (1 - mix) * (1 - q)]
    return margin, [low, other_low, high], weights


@settings(max_examples=150, deadline=None)
@given(at_the_margin(2), st.integers(1, 7))
@example((0.05, [-CLIP, CLIP], [0.6, 0.4]), 7)
@example((0.05, [-CLIP, -0.049], [0.001 / 0.201, 0.2 / 0.201]), 7)
@example((0.05, [-0.051, CLIP], [0.3 / 0.301, 0.001 / 0.301]), 7)
def test_two_points_at_the_margin_have_mean_e_value_at_most_one(law, n):
    margin, points, weights = law
    assert np.dot(points, weights) == pytest.approx(-margin, abs=1e-12)
    for function, lambdas in ((e.log_worse, WORSE), (e.log_clear, CLEAR)):
        for lam in lambdas:
            mean = expectation(points, weights, n, lambda d, f=function, lam=lam: value(f, d, margin, lam))
            assert mean <= 1 + EDGE


@settings(max_examples=60, deadline=None)
@given(at_the_margin(3), st.integers(1, 4))
def test_three_points_at_the_margin_too(law, n):
    margin, points, weights = law
    assert np.dot(points, weights) == pytest.approx(-margin, abs=1e-12)
    for function, lambdas in ((e.log_worse, WORSE), (e.log_clear, CLEAR)):
        for lam in lambdas:
            mean = expectation(points, weights, n, lambda d, f=function, lam=lam: value(f, d, margin, lam))
            assert mean <= 1 + EDGE


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-CLIP, CLIP), min_size=4, max_size=7), st.integers(1, 4))
def test_a_panel_drawn_without_replacement_is_covered(population, n):
    """The population's mean is the margin; every panel of n is counted once."""
    d = np.array(population)
    margin = float(-d.mean())
    assume(0 <= margin <= 0.2)
    panels = list(combinations(population, n))
    for function, lambdas in ((e.log_worse, WORSE), (e.log_clear, CLEAR)):
        for lam in lambdas:
            assert np.mean([value(function, panel, margin, lam) for panel in panels]) <= 1 + EDGE


@given(st.lists(st.floats(-CLIP, CLIP), min_size=1, max_size=60), MARGINS)
def test_no_evidence_when_the_very_clients_are_on_the_other_side(d, margin):
    """Whoever the clients are: if their own sum is not beyond the margin, no single round gives any evidence."""
    d = np.array(d)
    for lam in WORSE:
        if d.sum() >= -len(d) * margin:
            assert value(e.log_worse, d, margin, lam) <= 1 + EDGE
    for lam in CLEAR:
        if d.sum() <= -len(d) * margin:
            assert value(e.log_clear, d, margin, lam) <= 1 + EDGE


@given(st.lists(st.floats(-CLIP, CLIP), min_size=1, max_size=40), MARGINS)
def test_an_e_value_is_below_the_bet_it_stands_for(d, margin):
    """The honest version: prod (1 - lambda (d_i + m)) and prod (1 + lambda (d_i + m)), client by client."""
    y = np.array(d) + margin
    for lam in WORSE:
        if lam * (CLIP + margin) < 1:
            bet = float(np.log1p(-lam * y).sum())
            assert math.log(max(value(e.log_worse, d, margin, lam), 1e-300)) <= bet + 1e-9
        else:
            assert value(e.log_worse, d, margin, lam) == 0.0
    for lam in CLEAR:
        if lam * (CLIP - margin) < 1:
            bet = float(np.log1p(lam * y).sum())
            assert math.log(max(value(e.log_clear, d, margin, lam), 1e-300)) <= bet + 1e-9


@given(st.floats(0.001, 0.999), st.integers(1, 40))
def test_bits_have_mean_e_value_at_most_one_at_the_share(share, n):
    def mean(function, lam) -> float:
        return sum(
            math.comb(n, b) * share**b * (1 - share) ** (n - b) * bits(function, b, n, share, lam) for b in range(n + 1)
        )

    for lam in BITS:
        assert mean(e.log_bits_above, lam) == pytest.approx(1.0, abs=1e-9)
        assert mean(e.log_bits_below, lam) == pytest.approx(1.0, abs=1e-9)


@given(st.integers(1, 200), st.data(), st.floats(0.01, 0.9))
def test_bits_of_the_very_clients(n, data, share):
    b = data.draw(st.integers(0, n))
    for lam in BITS:
        if b <= share * n:
            assert bits(e.log_bits_above, b, n, share, lam) <= 1 + EDGE
        if b >= share * n:
            assert bits(e.log_bits_below, b, n, share, lam) <= 1 + EDGE


def test_real_change_is_evidence():
    """Forty clients at -.15 against a margin of .05, and at 0; both ways by the proof's own formula, by hand."""
    lam, margin, n = 1.5, 0.05, 40
    h = lam * (CLIP + margin)
    kappa = (-math.log(1 - h) - h) / h**2
    assert e.kappa(h) == pytest.approx(kappa)
    assert e.log_worse(e.Sums(n=n, s=-6.0, q=0.9), margin, lam) == pytest.approx(
        lam * 0.1 * n - kappa * lam**2 * 0.01 * n
    )
    assert max(value(e.log_worse, [-0.15] * n, margin, lam) for lam in WORSE) > 120
    assert max(value(e.log_clear, [0.0] * n, margin, lam) for lam in CLEAR) > 120
    assert max(bits(e.log_bits_above, 20, n, 0.05, lam) for lam in BITS) > 120


@given(st.floats(1e-5, 0.999), st.floats(-0.999, 50))
def test_kappa_is_the_constant_of_its_inequality(h, x):
    assume(x >= -h)
    assert math.log1p(x) >= x - e.kappa(h) * x**2 - 1e-9


@given(st.lists(st.floats(-700, 700), min_size=1, max_size=8))
def test_log_mean_exp(logs):
    with np.errstate(over="ignore"):
        expected = float(np.logaddexp.reduce(logs) - np.log(len(logs)))
    assert e.log_mean_exp(logs) == pytest.approx(expected, abs=1e-9)


def test_log_mean_exp_of_nothing_gained():
    assert e.log_mean_exp([-math.inf, -math.inf]) == -math.inf
    assert e.log_mean_exp([-math.inf, 0.0]) == pytest.approx(math.log(0.5))
    assert e.log_mean_exp([2000.0, 2000.0]) == 2000.0


# --- discrete Laplace noise -------------------------------------------------------------------------------------


@given(st.floats(0.3, 0.9), st.floats(0.02, 1.0), st.integers(2, 200), st.integers(0, 20), st.data())
def test_discrete_laplace_noise_is_paid_for_exactly(p, share, n, ones, data):
    """One count under noise of P(k) = (1 - p) / (1 + p) p^|k|: the mean over all k is the noiseless e-value."""
    lam = data.draw(st.floats(0.01, 0.6)) * -math.log(p)  # within the moments that exist
    k = np.arange(-4000, 4001)
    weights = math.log((1 - p) / (1 + p)) + np.abs(k) * math.log(p)
    std = math.sqrt(2 * p) / (1 - p)
    share = min(share, 0.9)
    for function in (e.log_bits_above, e.log_bits_below):
        exact = function(e.Sums(n=n, b=float(ones)), share, lam)
        noisy = function(e.Sums(n=n, b=ones + k.astype(float), b_std=std, step=1.0), share, lam)
        assert np.logaddexp.reduce(weights + noisy - exact) == pytest.approx(0.0, abs=1e-9)
        gaussian = function(e.Sums(n=n, b=ones + k.astype(float), b_std=std), share, lam)
        assert np.logaddexp.reduce(weights + gaussian - exact) >= 0.0  # taken for Gaussian, it would not be an e-value


def test_a_bet_beyond_the_moments_of_laplace_noise_wins_nothing():
    assert e.log_bits_above(e.Sums(n=10, b=10.0, b_std=3.0, step=1.0), 0.1, 2.0) == -math.inf


# --- spread ----------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-CLIP, CLIP), st.floats(0.05, 1)), min_size=2, max_size=4),
    st.integers(1, 4),
    st.sampled_from(BITS),
)
def test_spread_has_mean_e_value_at_most_one_at_the_very_variance(law, n, lam):
    """Any distribution, whatever its mean: enumerated, with the variance allowed exactly its own."""
    points, weights = zip(*law, strict=True)
    p = np.array(weights) / sum(weights)
    variance = float(p @ np.square(points) - (p @ np.array(points)) ** 2)

    def sums(d) -> e.Sums:
        return e.Sums(n=len(d), s=float(np.sum(d)), q=float(np.square(d).sum()))

    for function in (e.log_spread_above, e.log_spread_below):
        mean = expectation(points, p.tolist(), n, lambda d, f=function: math.exp(f(sums(d), max(variance, 0.0), lam)))
        assert mean <= 1 + EDGE


def test_spread_is_seen_while_the_mean_stands_still():
    """300 clients at -.2, 0 and .2 in equal parts: variance .0267 against .01; then the other way round."""
    d = np.repeat([-0.2, 0.0, 0.2], 100)
    wide = e.Sums(n=300, s=float(d.sum()), q=float((d**2).sum()))
    assert max(e.log_spread_above(wide, 0.01, lam) for lam in BITS) > math.log(120)
    assert max(e.log_spread_below(wide, 0.01, lam) for lam in BITS) < 0
    narrow = e.Sums(n=300, s=300 * 0.1, q=300 * 0.1**2)  # all gained the same: no spread at all
    assert max(e.log_spread_above(narrow, 0.01, lam) for lam in BITS) < 0
    assert max(e.log_spread_below(narrow, 0.01, lam) for lam in BITS) > math.log(120)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(-CLIP, CLIP), st.booleans()), min_size=2, max_size=30),
    st.floats(0.001, 0.06),
    st.sampled_from(BITS),
)
def test_shrinkage_and_missing_clients_never_help_a_spread(clients, variance, lam):
    f, d, k = (np.array(column, dtype=float) for column in zip(*clients, strict=True))
    d = d * (1 - k)
    x = e.Sums(n=len(f), s=float(f @ d), q=float(f @ d**2), missing=float(f @ k), lost=float((1 - f).sum()))
    full = e.Sums(n=len(f), s=float(d.sum()), q=float((d**2).sum()))
    assert e.log_spread_above(x, variance, lam) <= e.log_spread_above(full, variance, lam) + 1e-9
    said = replace(full, missing=float(k.sum()))
    assert e.log_spread_below(x, variance, lam) <= e.log_spread_below(said, variance, lam) + 1e-9


@pytest.mark.parametrize("function", [e.log_spread_above, e.log_spread_below])
@pytest.mark.parametrize("name", ["s", "q", "lost", "missing"])
def test_noise_on_a_spread_is_paid_for(function, name):
    """With noise on one sum the e-value's mean is at most what it is without."""
    exact = e.Sums(n=200, s=1.0, q=3.0, lost=2.0, missing=1.0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()
    for std in (0.1, 1.0):
        noisy = [
            function(replace(exact, **{name: getattr(exact, name) + std * z, f"{name}_std": std}), 0.02, 0.5)
            for z in nodes
        ]
        mean = float(weights @ np.exp(np.array(noisy) - float(function(exact, 0.02, 0.5))))
        assert mean <= 1 + 1e-6


# --- harm that is concentrated in few clients -------------------------------------------------------------------


@st.composite
def severe_law(draw):
    """Three kinds of clients: severely harmed, worse and better, with mean -margin and a share of severe ones."""
    margin, share = draw(st.floats(0.0, 0.1)), draw(st.floats(0.01, 0.3))
    severe = draw(st.floats(-CLIP, -0.2))
    rest = (-margin - share * severe) / (1 - share)  # mean of the others
    assume(-CLIP < rest < CLIP)
    low, high = draw(st.floats(-CLIP, rest)), draw(st.floats(rest, CLIP))
    assume(high - low > 1e-3)
    p = (1 - share) * (high - rest) / (high - low)
    return margin, share, [(severe, 1), (low, 0), (high, 0)], [share, p, 1 - share - p]


def joint(d, b, margin, lam, tilt, share, **noise) -> float:
    d, b = np.array(d), np.array(b)
    x = e.Sums(n=len(d), s=float(d.sum()), q=float((d**2).sum()), b=float(b.sum()), **noise)
    return e.log_worse(x, margin, lam, tilt, share)


@settings(max_examples=60, deadline=None)
@given(severe_law(), st.integers(1, 5), st.sampled_from([(0.5, 0.2), (1.5, 0.5), (2.0, 1.5), (0.1, 2.0)]))
def test_a_joint_bet_has_mean_at_most_one_where_mean_and_share_are_both_just_allowed(law, n, bet):
    margin, share, points, weights = law
    lam, tilt = bet

    def statistic(clients) -> float:
        d, b = zip(*clients, strict=True)
        return math.exp(joint(d, b, margin, lam, tilt, share))

    assert expectation(points, weights, n, statistic) <= 1 + EDGE


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(-CLIP, CLIP), st.booleans()), min_size=1, max_size=30),
    st.floats(0.0, 0.2),
    st.floats(0.0, 0.3),
    st.sampled_from([(0.5, 0.2), (1.5, 0.5), (2.0, 0.9), (0.0, 1.0)]),
)
def test_a_joint_bet_is_below_the_clients_own(clients, margin, share, bet):
    """prod (1 - lam (f d + m) + tilt (f b - share)), client by client, shrunken or not."""
    f, d, b = (np.array(column, dtype=float) for column in zip(*clients, strict=True))
    x = e.Sums(n=len(f), s=float(f @ d), q=float(f @ d**2), b=float(f @ b))
    lam, tilt = bet
    assume(lam * (CLIP + margin) + tilt * share < 1)
    own = float(np.log1p(-lam * (f * d + margin) + tilt * (f * b - share)).sum())
    assert e.log_worse(x, margin, lam, tilt, share) <= own + 1e-9


def test_the_noise_on_the_bit_is_paid_for_and_forgetting_it_is_caught():
    """A planted bug: were the bit's noise left out of the payment, the e-value's mean would be above one."""
    n, margin, share, (lam, tilt), std = 50, 0.0, 0.03, (0.6, 0.5), 6.8
    d, b = [0.0] * n, [0.0] * n
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    exact = joint(d, b, margin, lam, tilt, share)
    noisy = [e.log_worse(e.Sums(n=n, b=std * z, b_std=std), margin, lam, tilt, share) for z in nodes]
    forgotten = [e.log_worse(e.Sums(n=n, b=std * z), margin, lam, tilt, share) for z in nodes]
    assert float(weights @ np.exp(np.array(noisy) - exact)) == pytest.approx(1.0, rel=1e-6)
    assert float(weights @ np.exp(np.array(forgotten) - exact)) > 5


def test_a_joint_bet_sees_a_tail_that_the_mean_hides():
    """Of 1,000 clients 6% lost .25 and the rest gained .016: the mean is fine, and twice the allowed share is not."""
    d, b = [-0.25] * 60 + [0.016] * 940, [1] * 60 + [0] * 940
    x = e.Sums(n=1000, s=float(np.sum(d)), q=float(np.square(d).sum()), b=60.0)
    assert np.mean(d) > 0
    both = max(e.log_worse(x, 0.0, lam, tilt, 0.03) for lam, tilt in e.worse_bets(x, 0.0, 0.03))
    alone = max(e.log_worse(x, 0.0, lam) for lam, _ in e.worse_bets(x, 0.0, None))
    assert alone <= 0 < math.log(120) < both
    assert sum(b) / 1000 == 2 * 0.03


@given(st.integers(2, 100_000), st.floats(0, 50), st.floats(0, 50), st.floats(0.0, 0.3), st.floats(0.0, 0.4))
def test_bets_are_never_for_all_or_nothing(n, s_std, b_std, margin, share):
    x = e.Sums(n=n, s_std=s_std, b_std=b_std, q_std=s_std / 2, lost_std=b_std, missing_std=b_std)
    for lam, tilt in [*e.worse_bets(x, margin, share), *e.worse_bets(x, margin, None)]:
        assert 0 <= lam * (CLIP + margin) + tilt * share <= e.SAFE + 1e-12
        assert math.isfinite(e.log_worse(x, margin, lam, tilt, share))
    near = min(margin, 0.2)
    for lam in e.clear_bets(x, near):
        assert 0 < lam * (CLIP - near) <= e.SAFE + 1e-12
    assert all(0 < lam <= e.STEEPEST for lam in (*e.above_bets(x, share), *e.below_bets(x, share)))


def test_a_bet_is_the_best_one_on_its_effect():
    """For normal differences of the assumed variance and normal noise: found by trying all others."""
    x = e.Sums(n=200, s_std=1.69)
    for (mean, _), (lam, _) in zip(e.PLAIN, e.worse_bets(x, 0.0, None), strict=True):
        grid = np.linspace(0.01, 6, 2000)
        growth = grid * mean - grid**2 * (e.VARIANCE + x.s_std**2 / x.n) / 2
        best = min(float(grid[np.argmax(growth)]), e.SAFE / CLIP)
        assert lam == pytest.approx(best, abs=0.01)


# --- shrunken messages and noise --------------------------------------------------------------------------------

TESTS = {
    "worse": (e.log_worse, WORSE),
    "clear": (e.log_clear, CLEAR),
    "above": (e.log_bits_above, BITS),
    "below": (e.log_bits_below, BITS),
}
USES = {
    "worse": {"s", "q"},
    "clear": {"s", "q", "missing", "lost"},
    "above": {"b"},
    "below": {"b", "missing", "lost"},
}


@pytest.mark.parametrize("test", TESTS)
@given(st.integers(1, 30), st.floats(0.005, 0.2), st.floats(0.01, 0.1), st.data())
def test_gaussian_noise_on_every_sum_costs_exactly_nothing_in_the_mean(test, n, margin, std, data):
    """E over the noise of the noisy e-value is the noiseless one, by 40-point Gauss-Hermite quadrature on each sum."""
    function, lambdas = TESTS[test]
    low = {"s": -CLIP * n, "q": 0.0, "b": 0.0, "missing": 0.0, "lost": 0.0}
    high = {"s": CLIP * n, "q": CLIP**2 * n, "b": n, "missing": n, "lost": n}
    exact = e.Sums(n=n, **{k: data.draw(st.floats(low[k], high[k])) for k in low})
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()
    lam = data.draw(st.sampled_from([lam for lam in lambdas if math.isfinite(function(exact, margin, lam))]))
    for name in low:
        noisy = replace(exact, **{name: getattr(exact, name) + std * nodes, f"{name}_std": std})
        change = np.exp(function(noisy, margin, lam) - function(exact, margin, lam))
        mean = float(weights @ np.broadcast_to(change, nodes.shape))  # one number where the test does not use the sum
        assert mean == pytest.approx(1.0, rel=1e-6)
        moved = function(replace(exact, **{f"{name}_std": std}), margin, lam) < function(exact, margin, lam)
        assert moved == (name in USES[test])


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(-CLIP, CLIP), st.booleans(), st.booleans()), min_size=1, max_size=30),
    st.floats(0.005, 0.2),
)
def test_shrunken_messages_stand_below_the_bet_on_the_unshrunken_clients(clients, margin):
    """Client by client: whoever is missing counts as the worst for clear, and shrinkage never helps a clear."""
    f, d, k, b = (np.array(column, dtype=float) for column in zip(*clients, strict=True))
    d, b = d * (1 - k), b * (1 - k)
    x = e.Sums(
        n=len(f),
        s=float(f @ d),
        q=float(f @ d**2),
        b=float(f @ b),
        missing=float(f @ k),
        lost=float((1 - f).sum()),
    )
    worst = np.where(k == 1, -CLIP, d)
    for lam in CLEAR:
        if lam * (CLIP - margin) < 1:
            assert e.log_clear(x, margin, lam) <= float(np.log1p(lam * (worst + margin)).sum()) + 1e-9
    for lam in WORSE:
        if lam * (CLIP + margin) < 1:
            assert e.log_worse(x, margin, lam) <= float(np.log1p(-lam * (f * d + margin)).sum()) + 1e-9
    ones = np.maximum(b, k)
    for lam in BITS:
        below = e.log_bits_below(e.Sums(n=len(f), b=float(ones.sum())), margin, lam)
        assert e.log_bits_below(x, margin, lam) <= below + 1e-9
        above = e.log_bits_above(e.Sums(n=len(f), b=float(b.sum())), margin, lam)
        assert e.log_bits_above(x, margin, lam) <= above + 1e-9
