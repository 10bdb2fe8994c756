"""The probes' statistics against independent references, and their stated bounds as properties."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from fedcanary.probes import statistics as s
from fedcanary.rng import stream

NAN = float("nan")
unit = st.floats(0, 1, allow_nan=False)


@st.composite
def answered(draw, with_nan=True):
    n = draw(st.integers(1, 40))
    values = st.one_of(unit, st.just(NAN)) if with_nan else unit
    hits = st.sampled_from([0.0, 1.0, NAN] if with_nan else [0.0, 1.0])
    return draw(hnp.arrays(float, n, elements=values)), draw(hnp.arrays(float, n, elements=hits))


def reference_ece(confidence, correct, bins):
    """Guo et al. 2017, equation 3, written with plain loops."""
    pairs = [(c, y) for c, y in zip(confidence, correct, strict=True) if c == c and y == y]
    total = 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        own = [(c, y) for c, y in pairs if low < c <= high or (b == 0 and c == 0)]
        if own:
            gap = abs(sum(y for _, y in own) / len(own) - sum(c for c, _ in own) / len(own))
            total += len(own) / len(pairs) * gap
    return total if pairs else NAN


@given(answered(), st.integers(1, 15))
def test_ece_is_the_reference(data, bins):
    confidence, correct = data
    assert s.ece(confidence, correct, bins) == pytest.approx(reference_ece(confidence, correct, bins), nan_ok=True)


@pytest.mark.parametrize("bins", [5, 10, 15])
def test_confidence_on_an_edge_falls_in_the_bin_below_it(bins):
    for edge in range(1, bins + 1):
        sums = s.bin_sums(np.array([edge / bins]), np.array([1.0]), bins)
        assert sums[:, 0].tolist() == [float(b == edge - 1) for b in range(bins)]


@given(answered(), st.integers(1, 15))
def test_bounds_of_calibration(data, bins):
    confidence, correct = data
    sums = s.bin_sums(confidence, correct, bins)
    assert sums.shape == (bins, 3)
    assert sums[:, 0].sum() == np.sum(~np.isnan(confidence) & ~np.isnan(correct))
    assert (sums[:, 1:] >= 0).all() and (sums[:, 1:] <= sums[:, :1] + 1e-9).all()
    value, over, score = (
        s.ece(confidence, correct, bins),
        s.overconfidence(confidence, correct),
        s.brier(confidence, correct),
    )
    if sums[:, 0].sum():
        assert 0 <= value <= 1 + 1e-9 and abs(over) <= value + 1e-9 and 0 <= score <= 1
        assert over**2 <= score + 1e-9
    else:
        assert np.isnan([value, over, score]).all()


@given(answered())
def test_unscoreable_items_change_nothing(data):
    confidence, correct = data
    more = np.append(confidence, [NAN, 1.0, NAN]), np.append(correct, [1.0, NAN, NAN])
    for function in (s.brier, s.overconfidence, lambda c, y: s.ece(c, y, 5)):
        assert function(*more) == pytest.approx(function(confidence, correct), nan_ok=True)
    assert (s.bin_sums(*more, 5) == s.bin_sums(confidence, correct, 5)).all()


def test_all_unscoreable_is_nan_and_silent():
    nothing = np.array([NAN, NAN])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(
            [s.ece(nothing, nothing, 5), s.brier(nothing, nothing), s.overconfidence(nothing, nothing)]
        ).all()
        assert np.isnan(s.rate_gap(s.group_rates(nothing, ["a", "b"])))
        assert s.mcnemar(nothing, nothing) == s.McNemar(only_a=0, only_b=0, n=0, p_value=1.0)


@pytest.mark.parametrize("confidence", [[1.2], [-0.1]])
def test_confidence_outside_its_bounds_is_refused(confidence):
    with pytest.raises(ValueError, match="outside"):
        s.bin_sums(np.array(confidence), np.array([1.0]), 5)


def test_wrong_shapes_and_numbers_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        s.ece(np.ones(2), np.ones(3), 5)
    with pytest.raises(ValueError, match="bins"):
        s.bin_sums(np.ones(1), np.ones(1), 0)
    with pytest.raises(ValueError, match="groups"):
        s.group_rates(np.ones(2), ["a"])
    with pytest.raises(ValueError, match="wants 0, 1"):
        s.mcnemar(np.array([0.5]), np.array([1.0]))
    with pytest.raises(ValueError, match="level"):
        s.paired_bootstrap(np.ones(3), 1.0, stream(1, "t"))
    with pytest.raises(ValueError, match="power"):
        s.minimum_detectable_effect(np.ones(3), 0.05, 1.0)


@given(st.lists(answered(), min_size=1, max_size=6), st.integers(1, 10), st.sampled_from(["client", "item"]))
def test_masking_gap_is_never_negative(clients, bins, by):
    tables = np.stack([s.bin_sums(confidence, correct, bins) for confidence, correct in clients])
    gap = s.masking_gap(tables, by)
    assert 0 <= gap <= 1 + 1e-9 if tables[:, :, 0].sum() else np.isnan(gap)


def test_masking_gap_by_item_is_the_weighted_mean_minus_the_pool():
    rng = stream(7, "masking")
    clients = [(rng.uniform(size=n), rng.integers(0, 2, n).astype(float)) for n in (10, 40, 90)]
    tables = np.stack([s.bin_sums(c, y, 5) for c, y in clients])
    weighted = sum(len(c) * s.ece(c, y, 5) for c, y in clients) / 140
    pooled = s.ece(np.concatenate([c for c, _ in clients]), np.concatenate([y for _, y in clients]), 5)
    assert s.masking_gap(tables, "item") == pytest.approx(weighted - pooled)


def test_opposite_errors_are_masked():
    sure = s.bin_sums(np.full(10, 0.7), np.zeros(10), 5)
    unsure = s.bin_sums(np.full(10, 0.7), np.ones(10), 5)
    # |0.7 - 0| and |0.7 - 1| average to 0.5; the pool is off by |0.7 - 0.5|
    assert s.masking_gap(np.stack([sure, unsure])) == pytest.approx(0.5 - 0.2)
    assert s.masking_gap(np.stack([sure, sure])) == pytest.approx(0.0)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_gaps_agree_with_fairlearn(data):
    metrics = pytest.importorskip("fairlearn.metrics")
    n = data.draw(st.integers(8, 40))
    bits = hnp.arrays(np.int64, n, elements=st.integers(0, 1))
    truth, decision, group = data.draw(bits), data.draw(bits), data.draw(bits)
    group[:2], truth[:2] = (0, 1), (1, 1)  # two groups, each with an item whose truth is positive
    names = ["ab"[g] for g in group]
    ours = s.rate_gap(s.group_rates(decision.astype(float), names))
    assert ours == pytest.approx(metrics.demographic_parity_difference(truth, decision, sensitive_features=group))
    theirs = metrics.equal_opportunity_difference(truth, decision, sensitive_features=group)
    assert s.tpr_gap(decision.astype(float), truth.astype(float), names) == pytest.approx(theirs)


def test_a_group_that_was_not_scored_makes_the_gap_unknown():
    rates = s.group_rates(np.array([1.0, 0.0, NAN]), ["a", "b", "c"])
    assert rates["a"] == s.Rate(mean=1.0, n=1) and rates["c"].n == 0 and np.isnan(rates["c"].mean)
    assert np.isnan(s.rate_gap(rates)) and np.isnan(s.rate_gap({"a": rates["a"]}))
    assert np.isnan(s.tpr_gap(np.array([1.0, 0.0]), np.array([1.0, 0.0]), ["a", "b"]))


def test_items_without_a_group_are_left_out():
    assert s.group_rates(np.array([1.0, 0.0, 0.5]), ["a", None, "a"]) == {"a": s.Rate(mean=0.75, n=2)}


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, NAN]), st.sampled_from([0.0, 1.0, NAN])), max_size=60))
def test_mcnemar_is_the_exact_binomial_test(pairs):
    a, b = (np.array([pair[side] for pair in pairs], dtype=float) for side in (0, 1))
    found = s.mcnemar(a, b)
    differing = found.only_a + found.only_b
    assert found.n == sum(x == x and y == y for x, y in pairs)
    expected = stats.binomtest(found.only_a, differing, 0.5).pvalue if differing else 1.0
    assert found.p_value == pytest.approx(expected)
    assert s.mcnemar(b, a).p_value == found.p_value


def test_bootstrap_agrees_with_scipy():
    d = stream(3, "skewed").exponential(size=60) - 0.8
    ours = s.paired_bootstrap(d, 0.95, stream(3, "ours"), repeats=20_000)
    theirs = stats.bootstrap(
        (d,), np.mean, confidence_level=0.95, n_resamples=20_000, method="BCa", rng=stream(3, "theirs")
    ).confidence_interval
    # both ends are Monte Carlo estimates: their sd is below 0.004 here, so 0.02 is five of them
    assert ours.low == pytest.approx(theirs.low, abs=0.02) and ours.high == pytest.approx(theirs.high, abs=0.02)
    assert ours.estimate == pytest.approx(d.mean()) and ours.n == 60


@given(hnp.arrays(float, st.integers(0, 30), elements=st.one_of(st.floats(-1, 1), st.just(NAN))))
@settings(deadline=None)
def test_bootstrap_holds_its_laws(d):
    found = s.paired_bootstrap(d, 0.9, stream(1, "law"), repeats=200)
    again = s.paired_bootstrap(np.append(d, NAN), 0.9, stream(1, "law"), repeats=200)
    assert repr(found) == repr(again)  # equal, and NaN where NaN
    kept = d[~np.isnan(d)]
    assert found.n == kept.size
    if kept.size < 2 or np.ptp(kept) == 0:
        assert np.isnan([found.low, found.high]).all()
    else:
        assert kept.min() - 1e-9 <= found.low <= found.high <= kept.max() + 1e-9


def test_bootstrap_in_chunks_is_bootstrap_at_once(monkeypatch):
    d = stream(5, "d").normal(size=50)
    whole = s.paired_bootstrap(d, 0.9, stream(5, "b"), repeats=300)
    monkeypatch.setattr(s, "CHUNK", 500)
    assert s.paired_bootstrap(d, 0.9, stream(5, "b"), repeats=300) == whole


@pytest.mark.statistical
def test_bootstrap_covers():
    """400 trials of n = 40 normal differences, seed 11, level 0.9: a cover of 0.87 or more in truth (BCa is a little
    short at n = 40) falls below 0.82 with probability under 0.003."""
    rng = stream(11, "coverage")
    hits = 0
    for _ in range(400):
        found = s.paired_bootstrap(rng.normal(0.1, 1.0, 40), 0.9, rng, repeats=600)
        hits += found.low <= 0.1 <= found.high
    assert hits / 400 > 0.82


def test_minimum_detectable_effect_is_detected_with_its_power():
    """The noncentral t power at the returned effect is the power asked for, to the approximation's error."""
    d = stream(2, "mde").normal(size=30)
    effect = s.minimum_detectable_effect(d, 0.05, 0.8)
    ncp = effect / (d.std(ddof=1) / np.sqrt(30))
    power = stats.nct.sf(stats.t.ppf(0.975, 29), 29, ncp)
    assert power == pytest.approx(0.8, abs=0.02)


@given(st.integers(2, 30), st.integers(2, 9))
def test_minimum_detectable_effect_scales(n, factor):
    d = stream(1, "scale", n).normal(size=n)
    small = s.minimum_detectable_effect(d, 0.05, 0.8)
    assert s.minimum_detectable_effect(factor * d, 0.05, 0.8) == pytest.approx(factor * small)
    assert s.minimum_detectable_effect(np.tile(d, factor), 0.05, 0.8) < small
    assert s.minimum_detectable_effect(np.append(d, NAN), 0.05, 0.8) == pytest.approx(small)


@pytest.mark.parametrize("d", [[], [0.3], [0.0, 0.0, 0.0], [NAN, 1.0]])
def test_a_spread_that_was_not_seen_is_not_zero(d):
    assert np.isnan(s.minimum_detectable_effect(np.array(d), 0.05, 0.8))
