"""Stated epsilons against other ways to know them: closed forms, exact enumeration, dp-accounting's own accountants."""

from __future__ import annotations

import math
from itertools import product

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from fedcanary.errors import BadInput
from fedcanary.privacy import accounting
from fedcanary.privacy.accounting import (
    Mechanism,
    compose,
    distributed_gaussian_epsilon,
    dpsgd_epsilon,
    gaussian_epsilon,
    gaussian_std,
    laplace_scale,
    parallel,
    randomized_response_truth,
    sensitivity,
)
from fedcanary.privacy.noise import share_std

ZEROED = dp_accounting.NeighboringRelation.REPLACE_SPECIAL


def gaussian(z, count=1):
    return Mechanism(kind="gaussian", noise_multiplier=z, count=count)


def poisson(z, q, count):
    return Mechanism(kind="poisson_gaussian", noise_multiplier=z, sample_rate=q, count=count)


def laplace(b, count=1):
    return Mechanism(kind="discrete_laplace", noise_multiplier=b, count=count)


def shares(std, n, norm, count=1):
    return Mechanism(kind="discrete_gaussian", share_std=std, shares=n, sensitivity=norm, count=count)


# --- against dp-accounting


def event(m: Mechanism) -> dp_accounting.DpEvent:
    """The event of dp-accounting that says the same (for unit sensitivity)."""
    one = {
        "gaussian": lambda: dp_accounting.GaussianDpEvent(m.noise_multiplier),
        "discrete_gaussian": lambda: dp_accounting.GaussianDpEvent(m.share_std * math.sqrt(m.shares) / m.sensitivity),
        "poisson_gaussian": lambda: dp_accounting.PoissonSampledDpEvent(
            m.sample_rate, dp_accounting.GaussianDpEvent(m.noise_multiplier)
        ),
        "discrete_laplace": lambda: dp_event.DiscreteLaplaceDpEvent(1 / m.noise_multiplier, 1),
        "randomized_response": lambda: dp_event.DiscreteLaplaceDpEvent(m.epsilon, 1),
    }[m.kind]()
    return dp_accounting.SelfComposedDpEvent(one, m.count)


def finer(m: Mechanism, grid: float):
    """The same mechanism's PLD on a grid that splits ours, hence between the truth and what we state."""
    options = {"value_discretization_interval": grid, "use_connect_dots": True}
    if m.kind == "gaussian":
        return pld.from_gaussian_mechanism(m.noise_multiplier / math.sqrt(m.count), **options)
    if m.kind == "discrete_gaussian":  # the exact discrete one, for a single share
        one = pld.from_discrete_gaussian_mechanism(m.share_std, int(m.sensitivity), **options)
    elif m.kind == "poisson_gaussian":
        one = pld.from_gaussian_mechanism(m.noise_multiplier, sampling_prob=m.sample_rate, **options)
    else:
        one = pld.from_discrete_laplace_mechanism(m.epsilon or 1 / m.noise_multiplier, **options)
    return one.self_compose(m.count)


RESPONSE = Mechanism(kind="randomized_response", epsilon=0.4, count=12)
SETTINGS = [
    ([gaussian(4.225)], 1e-6),
    ([gaussian(0.8)], 1e-5),
    ([gaussian(20.0)], 1e-9),
    ([gaussian(4.225)], 0.01),
    ([gaussian(29.9, 50)], 1e-6),
    ([gaussian(40.0, 1000)], 1e-5),
    ([gaussian(5.0), gaussian(8.0, 6), gaussian(12.5, 3)], 1e-6),
    ([shares(4.225 * 64, 1, 64.0)], 1e-6),
    ([shares(400.0, 1, 150.0, 4)], 1e-6),
    ([laplace(1.0)], 1e-6),
    ([laplace(10.0, 50)], 1e-6),
    ([laplace(2.0, 4), gaussian(6.0, 2)], 1e-6),
    ([RESPONSE], 1e-6),
    ([RESPONSE, gaussian(3.0)], 1e-5),
    ([poisson(1.5, 0.01, 200)], 1e-5),
    ([poisson(2.0, 0.1, 20)], 1e-6),
    ([poisson(3.0, 0.5, 10)], 1e-6),
    ([poisson(2.0, 0.02, 100), gaussian(4.225)], 1e-6),
    ([poisson(2.0, 0.02, 100), laplace(5.0, 5), RESPONSE], 1e-6),
    ([gaussian(6.0), laplace(5.0, 5), RESPONSE, shares(500.0, 1, 100.0), poisson(2.0, 0.02, 50)], 1e-6),
]


@pytest.mark.parametrize(("mechanisms", "delta"), SETTINGS)
def test_agrees_with_dp_accounting(mechanisms, delta):
    ours = compose(mechanisms, delta, neighbours="zeroed")
    accountant = PLDAccountant(ZEROED, 5e-4)
    accountant.compose(dp_accounting.ComposedDpEvent([event(m) for m in mechanisms]))
    assert ours == pytest.approx(accountant.get_epsilon(delta), rel=0.01)


@pytest.mark.parametrize(
    ("mechanisms", "delta"),
    # Sampling on a fine grid is slow; the first and the last case stand for it by default.
    [pytest.param(*one, marks=[pytest.mark.slow] * (i in range(15, 19))) for i, one in enumerate(SETTINGS)],
)
def test_is_never_below(mechanisms, delta):
    ours = compose(mechanisms, delta, neighbours="zeroed")
    grid = 2.0**-14 if ours < 0.5 or any(m.sample_rate for m in mechanisms) else 2.0**-13
    reference = finer(mechanisms[0], grid)
    for m in mechanisms[1:]:
        reference = reference.compose(finer(m, grid))
    assert ours >= reference.get_epsilon_for_delta(delta) * (1 - 1e-9)


def test_the_table_has_the_promised_size():
    assert len(SETTINGS) == 20 and {m.kind for ms, _ in SETTINGS for m in ms} == set(accounting._NEEDS) - {"none"}


# --- against closed forms


def analytic_epsilon(z: float, delta: float) -> float:
    """Balle & Wang 2018 (arXiv 1805.06530), Theorem 8, solved for epsilon."""

    def excess(e):
        return stats.norm.cdf(0.5 / z - e * z) - math.exp(e + stats.norm.logcdf(-0.5 / z - e * z)) - delta

    return float(optimize.brentq(excess, 0.0, 0.5 / z**2 + 40 / z, xtol=1e-13)) if excess(0.0) > 0 else 0.0


@pytest.mark.parametrize("delta", [1e-2, 1e-6, 1e-12])
@pytest.mark.parametrize("z", [0.02, 0.1, 0.5, 1.0, 4.225, 30.0, 1000.0])
def test_gaussian_is_the_analytic_one_and_never_below(z, delta):
    for compositions in (1, 7):
        exact = analytic_epsilon(z / math.sqrt(compositions), delta)
        stated = gaussian_epsilon(3 * z, 3.0, delta, compositions)
        assert exact * (1 - 1e-10) <= stated <= exact * (1 + (1e-4 if z >= 0.1 else 1e-3))


@settings(deadline=None, max_examples=6)
@given(st.floats(0.01, 50.0), st.floats(-10.0, -1.0), st.integers(1, 100), st.floats(0.1, 1e6))
def test_calibration_is_the_inverse(epsilon, exponent, compositions, cap):
    delta = 10.0**exponent
    std = gaussian_std(epsilon, delta, cap, compositions)
    assert gaussian_epsilon(std, cap, delta, compositions) <= epsilon
    assert gaussian_epsilon(std * (1 - 1e-4), cap, delta, compositions) > epsilon


def test_the_worked_design():
    assert gaussian_std(1.0, 1e-6, 1.0) == pytest.approx(4.2247, abs=1e-4)
    assert gaussian_std(1.0, 1e-6, 1.0, 50) == pytest.approx(29.87, abs=0.01)
    assert compose([gaussian(4.225)], 1e-6, neighbours="substituted") == pytest.approx(2.12, abs=0.005)


def test_pure_mechanisms_cost_their_epsilon():
    for epsilon in (0.1, 1.0, 5.0):
        truth = randomized_response_truth(epsilon)
        assert math.log(truth / (1 - truth)) == pytest.approx(epsilon, rel=1e-12)
        m = Mechanism(kind="randomized_response", epsilon=epsilon)
        # delta = q (1 - e^(stated - epsilon)) at a stated epsilon below the pure one
        exact = epsilon + math.log(1 - 1e-6 / truth)
        for one in (m, laplace(laplace_scale(epsilon)), laplace(laplace_scale(epsilon, 3.0) / 3.0)):
            stated = compose([one], 1e-6, neighbours="zeroed")
            assert exact * (1 - 1e-12) <= stated <= epsilon
        assert compose([m], 1e-6, neighbours="substituted") == compose([m], 1e-6, neighbours="zeroed")
        twice = compose([laplace(1 / epsilon)], 1e-6, neighbours="substituted")
        assert 2 * epsilon - 1e-3 <= twice <= 2 * epsilon


# --- against exact enumeration of integer noise


def summed(std: float, n: int):
    """Probabilities of a sum of n discrete Gaussians, centred, by convolution."""
    reach = int(14 * std) + 3
    one = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * std**2))
    one /= one.sum()
    total = one
    for _ in range(n - 1):
        total = np.convolve(total, one)
        middle = len(total) // 2
        keep = min(middle, int(14 * std * math.sqrt(n)) + 3)
        total = total[middle - keep : middle + keep + 1]
    return total


def exact_epsilon(p, *shift: int, delta: float) -> float:
    """Epsilon of independent coordinates with noise p against the same, moved by `shift`: two tables, no formula."""
    with np.errstate(divide="ignore"):
        logs = [{i: float(v) for i, v in enumerate(np.log(p)) if v > -300} for _ in shift]
    here = {k: sum(c[i] for c, i in zip(logs, k, strict=True)) for k in product(*logs)}
    there = {tuple(i + s for i, s in zip(k, shift, strict=True)): v for k, v in here.items()}
    both = pld.from_two_probability_mass_functions(there, here, value_discretization_interval=1e-5)
    return float(both.get_epsilon_for_delta(delta))


def test_small_shares_cost_more_than_they_seem_and_are_refused():
    """The trap: 200 shares under integer counts (std 0.3 each) look like a Gaussian that costs 1; they cost 2.29."""
    total = gaussian_std(1.0, 1e-6, 1.0)
    true = exact_epsilon(summed(total / math.sqrt(200), 200), 1, delta=1e-6)
    assert gaussian_epsilon(total, 1.0, 1e-6) <= 1.0 and true == pytest.approx(2.287, abs=0.005)
    with pytest.raises(BadInput, match="below the safe"):
        share_std(total, 200)
    with pytest.raises(BadInput, match="share_std"):
        shares(total / math.sqrt(200), 200, 1.0)
    with pytest.raises(BadInput, match="1/2"):
        distributed_gaussian_epsilon(total / math.sqrt(200), 200, 1, 1.0, 1e-6)
    # Scaled as the refusal says, the same noise costs what it should.
    scaled = share_std(total * 14, 200)
    assert exact_epsilon(summed(scaled, 200), 14, delta=1e-6) <= 1.0


@pytest.mark.parametrize(("std", "n", "shift"), [(4.0, 1, (1,)), (4.0, 5, (10,)), (6.0, 3, (7,)), (4.0, 1, (3, -2))])
def test_the_bound_on_shares_holds_and_is_close(std, n, shift):
    exact = exact_epsilon(summed(std, n), *shift, delta=1e-6)
    norm = math.hypot(*shift)
    stated = compose([shares(std, n, norm)], 1e-6, neighbours="zeroed")
    lost = 1 / math.sqrt(1 - 4 / (n * std**2))  # what discreteness may cost at these very small scales
    assert exact - 1e-4 <= stated <= exact * lost**2 + 2e-3
    assert stated <= distributed_gaussian_epsilon(std, n, len(shift), norm, 1e-6) * lost**2


@pytest.mark.parametrize("norm", [1, 3])
@pytest.mark.parametrize("std", [0.5, 0.7, 1.0, 2.0])
def test_proposition_14_holds_for_small_shares(std, norm):
    exact = exact_epsilon(summed(std, 10), norm, delta=1e-6)
    assert exact <= distributed_gaussian_epsilon(std, 10, 1, norm, 1e-6)


@pytest.mark.parametrize(
    ("std", "shares", "dimension", "norm"), [(0.6, 10, 3, 1.0), (0.9, 200, 35, 4.0), (1.5, 9, 1, 5.0)]
)
def test_proposition_14_written_out_once_more(std, shares, dimension, norm):
    """As printed: minimum of three Renyi bounds; then Canonne, Kamath & Steinke 2020, Proposition 12, to epsilon."""
    tau = 10 * sum(math.exp(-2 * (math.pi * std) ** 2 * k / (k + 1)) for k in range(1, shares))
    total = std * math.sqrt(shares)
    l1 = min(norm * math.sqrt(dimension), norm**2)
    found = math.inf
    for i in range(1, 3000):
        a = 1.005 * math.exp(i / 400)
        renyi = min(
            a / 2 * (norm / total) ** 2 + tau * dimension,
            a / 2 * ((norm / total) ** 2 + 2 * l1 / total * tau + tau**2 * dimension),
            a / 2 * (norm / total + tau * math.sqrt(dimension)) ** 2,
        )
        found = min(found, renyi + math.log(1e6 / a) / (a - 1) + math.log(1 - 1 / a))
    assert distributed_gaussian_epsilon(std, shares, dimension, norm, 1e-6) == pytest.approx(found, rel=2e-3)


@pytest.mark.parametrize("n", [2, 5, 40])
@pytest.mark.parametrize("std", [0.7, 0.9])
def test_tau_is_how_far_a_sum_is_from_one_draw(std, n):
    total = summed(std, n)
    x = np.arange(len(total)) - len(total) // 2
    whole = np.exp(-(x**2) / (2 * n * std**2))
    near = np.abs(x) < 5 * std * math.sqrt(n)
    farthest = np.abs(np.log(total / (whole / whole.sum())))[near].max()
    assert farthest < accounting._tau(std, n) / 2
    assert n > 2 or farthest > accounting._tau(std, n) / 10  # later shares smooth what the first two left


def test_what_is_left_out_of_the_bound_is_smaller_than_any_last_digit():
    many = 10**9
    tau = 10 * many * math.exp(-2 * math.pi**2 * accounting.MIN_SHARE_STD**2 / 2)  # each term at most the first
    assert tau >= accounting._tau(accounting.MIN_SHARE_STD, 10_000)
    assert many * (tau / 2 + 5 * math.exp(-2 * math.pi**2 * accounting.SMOOTHING**2)) < 1e-24


def test_shares_made_for_an_epsilon_cost_no_more():
    for epsilon, n, cap in ((1.0, 200, 65_536.0), (0.1, 10_000, 65_536.0), (4.0, 50, 1_024.0)):
        std = share_std(gaussian_std(epsilon, 1e-6, cap), n)
        stated = compose([shares(std, n, cap)], 1e-6, neighbours="zeroed")
        assert epsilon * (1 - 1e-4) <= stated <= epsilon
        assert compose([shares(std, n // 2, cap)], 1e-6, neighbours="zeroed") > epsilon  # fewer survive: it costs more


# --- laws


MIXED = [gaussian(6.0), laplace(5.0, 5), poisson(3.0, 0.02, 20), gaussian(6.0), RESPONSE]


def test_order_and_grouping_do_not_matter_and_more_costs_more():
    whole = compose(MIXED, 1e-6, neighbours="zeroed")
    assert compose(MIXED[::-1], 1e-6, neighbours="zeroed") == whole
    grouped = [gaussian(6.0, 2), *MIXED[1:3], *[Mechanism(kind="randomized_response", epsilon=0.4)] * 12]
    assert compose(grouped, 1e-6, neighbours="zeroed") == whole
    for i in range(len(MIXED)):
        assert compose(MIXED[:i] + MIXED[i + 1 :], 1e-6, neighbours="zeroed") < whole
    assert compose(MIXED, 1e-6, neighbours="substituted") > whole > compose(MIXED, 1e-4, neighbours="zeroed")


def test_disjoint_panels_cost_the_dearest():
    panels = [[gaussian(5.0)], [gaussian(3.0)], [gaussian(9.0, 2)]]
    assert parallel(panels, 1e-6, neighbours="zeroed") == compose([gaussian(3.0)], 1e-6, neighbours="zeroed")
    assert parallel([], 1e-6, neighbours="zeroed") == compose([], 1e-6, neighbours="zeroed") == 0.0


def test_no_privacy_costs_infinity_with_or_without_company():
    none = Mechanism(kind="none")
    assert compose([none], 1e-6, neighbours="zeroed") == compose([*MIXED, none], 1e-6, neighbours="zeroed") == math.inf


def test_sampling_helps_only_where_it_is_said():
    plain = compose([gaussian(4.0, 100)], 1e-6, neighbours="zeroed")
    sampled = dpsgd_epsilon(4.0, 0.01, 100, 1e-6, neighbours="zeroed")
    assert sampled < plain / 20
    assert sampled < dpsgd_epsilon(4.0, 0.01, 100, 1e-6, neighbours="substituted")
    for neighbours in ("zeroed", "substituted"):  # everyone sampled: no help
        whole = compose([gaussian(4.0, 2)], 1e-6, neighbours=neighbours)
        assert dpsgd_epsilon(4.0, 1.0, 2, 1e-6, neighbours=neighbours) == pytest.approx(whole, rel=1e-3)


def test_substitution_doubles_the_distance():
    assert sensitivity(3.0, "zeroed") == 3.0 and sensitivity(3.0, "substituted") == 6.0
    for one, half in ((gaussian(4.0), gaussian(2.0)), (laplace(4.0), laplace(2.0))):
        apart = compose([half], 1e-6, neighbours="zeroed")
        assert compose([one], 1e-6, neighbours="substituted") == pytest.approx(apart, rel=1e-6)


def test_a_mechanism_survives_being_written_down():
    for m in [*MIXED, Mechanism(kind="none"), shares(4.5, 200, 65_536.0), gaussian(1 / 3)]:
        assert Mechanism.from_json(m.to_json()) == m


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "3", "{}", '{"kind": "gaussian"}', '{"kind": "gauss", "noise_multiplier": 1}'),
        '{"kind": "gaussian", "noise_multiplier": 0}',
        '{"kind": "gaussian", "noise_multiplier": "1"}',
        '{"kind": "gaussian", "noise_multiplier": NaN}',
        '{"kind": "gaussian", "noise_multiplier": Infinity}',
        '{"kind": "gaussian", "noise_multiplier": 1, "count": 0}',
        '{"kind": "gaussian", "noise_multiplier": 1, "count": 1.5}',
        '{"kind": "gaussian", "noise_multiplier": 1, "epsilon": 1}',
        '{"kind": "gaussian", "noise_multiplier": 1, "sigma": 1}',
        '{"kind": "poisson_gaussian", "noise_multiplier": 1, "sample_rate": 1.5}',
        '{"kind": "discrete_gaussian", "share_std": 3.9, "shares": 3, "sensitivity": 1}',
        '{"kind": "discrete_gaussian", "share_std": 5, "shares": 0, "sensitivity": 1}',
    ],
)
def test_what_is_no_mechanism_is_refused(text):
    with pytest.raises(BadInput):
        Mechanism.from_json(text)


def test_every_problem_of_a_mechanism_is_named():
    with pytest.raises(BadInput) as caught:
        Mechanism(kind="poisson_gaussian", noise_multiplier=-1.0, sample_rate=2.0, shares=3, count=0)
    assert len(caught.value.problems) == 4


def test_wishes_out_of_range_are_refused():
    for delta in (0.0, 1.0, -1.0, math.nan, 1e-13):
        with pytest.raises(BadInput, match="delta"):
            compose([gaussian(1.0)], delta, neighbours="zeroed")
        with pytest.raises(BadInput, match="delta"):
            gaussian_std(1.0, delta, 1.0)
    for bad in (0.0, -1.0, math.nan, math.inf):
        for call, arguments in (
            (gaussian_std, (bad, 1e-6, 1.0)),
            (gaussian_std, (1.0, 1e-6, bad)),
            (gaussian_epsilon, (1.0, bad, 1e-6)),
            (gaussian_epsilon, (bad, 1.0, 1e-6)),
            (laplace_scale, (bad,)),
            (randomized_response_truth, (bad,)),
        ):
            with pytest.raises(BadInput):
                call(*arguments)
    with pytest.raises(BadInput, match="did you mean 'zeroed'"):
        compose([gaussian(1.0)], 1e-6, neighbours="zero")
