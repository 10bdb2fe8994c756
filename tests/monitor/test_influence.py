"""The influence graph as evidence: the fit recomputed from the federations, its likelihoods by hand, its limits."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import integrate, stats

from fedcanary.monitor import influence
from fedcanary.monitor.influence import FEEDBACK, FITTED, PRIMARY, Alarm, Lags, upstream
from fedcanary.types import Mode

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BIAS, CALIBRATION, FAIRNESS, ADAPTATION, DOMAIN, EROSION = Mode
TYPICAL = {CALIBRATION: 1.2, DOMAIN: 1.1, ADAPTATION: 1.2, EROSION: 3.8, BIAS: 2.8, FAIRNESS: 2.0}


def at(round: int, strength: float, error: float = 0.1) -> Alarm:
    return Alarm(round=round, strength=strength, error=error)


@pytest.fixture(scope="module")
def edges() -> ModuleType:
    """benchmarks/edges.py, which is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        spec = importlib.util.spec_from_file_location("edges", BENCHMARKS / "edges.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "edges", module)
        spec.loader.exec_module(module)
        return module


def test_the_graph_is_the_published_one() -> None:
    number = {mode: i for i, mode in enumerate(Mode, start=1)}
    assert {(number[a], number[b]) for a, b in PRIMARY} == {(1, 2), (1, 3), (2, 4), (2, 5), (3, 6), (5, 6)}
    assert {(number[a], number[b]) for a, b in FEEDBACK} == {(3, 4), (4, 6), (6, 1)}
    assert set(FITTED.effects) == {*PRIMARY, *FEEDBACK}


def test_the_constants_are_what_the_140_federations_say(edges: ModuleType) -> None:
    runs = edges.read(BENCHMARKS / "plants")
    assert len(runs) == 140
    for name, value in edges.strengths(runs).items():
        assert getattr(FITTED, name) == value, name


def test_the_lags_are_what_the_recorded_federations_say(edges: ModuleType) -> None:
    found = json.loads((BENCHMARKS / "silentbench" / "edges.json").read_text())
    assert found["settings"] == FITTED.settings
    for name, refitted in edges.orders(found["alarms"]).items():
        assert asdict(refitted) == pytest.approx(asdict(getattr(FITTED, name)), abs=0.005), name


def test_the_published_effects_are_paired_differences(edges: ModuleType) -> None:
    """One edge again, with scipy's paired t test instead of the script's arithmetic."""
    runs = edges.read(BENCHMARKS / "plants")
    by_seed = {(r["plant"], r["seed"]): r["judged"][CALIBRATION] for r in runs}
    pairs = [(by_seed[BIAS, seed], by_seed["none", seed]) for plant, seed in by_seed if plant == "none"]
    test = stats.ttest_rel(*zip(*pairs, strict=True))
    interval = test.confidence_interval()
    (shown,) = (
        e
        for e in json.loads((BENCHMARKS / "silentbench" / "edges.json").read_text())["edges"]
        if (e["parent"], e["child"]) == (BIAS, CALIBRATION)
    )
    assert shown["interval"] == pytest.approx([interval.low, interval.high])
    assert shown["effect"] == pytest.approx(np.mean([a - b for a, b in pairs]))


def test_held_out_seeds_name_the_cause(edges: ModuleType) -> None:
    """Fitted on ten seeds, judged on the other ten, and the reverse: better than the old rule and than chance."""
    named = edges.by_strength(edges.read(BENCHMARKS / "plants"), FITTED)
    child, planted = named["its child by an edge"], named["the planted mode itself"]
    assert child["alarms"] >= 20 and planted["alarms"] >= 20
    assert child["first"] >= 0.95
    assert child["likelihood"] >= child["chance"] + 0.2
    assert planted["likelihood"] >= 0.95  # the old rule blamed the planted mode's own victims
    assert planted["old_rule"] <= 0.1
    assert named["all"]["likelihood"] >= 0.85 > named["all"]["old_rule"] + 0.3


def test_strength_is_the_ratio_of_two_densities() -> None:
    """By hand: scipy's t along the edge, an adaptive integral on its own."""
    for parent, child in ((BIAS, CALIBRATION), (ADAPTATION, EROSION), (FAIRNESS, ADAPTATION)):
        alarms = {parent: at(1, 2.4, 0.2), child: at(1, 1.4, 0.15)}
        effect, (mean, std) = FITTED.effects[parent, child], FITTED.unplanted[child]
        cause, excess = 2.4 - FITTED.unplanted[parent][0], 1.4 - mean
        scale = math.sqrt(
            effect.spread**2 + (effect.error**2 + FITTED.settings**2) * cause**2 + (effect.slope * 0.2) ** 2 + 0.15**2
        )
        along = stats.t(FITTED.degrees, effect.slope * cause, scale).logpdf(excess)
        own, noise = stats.t(FITTED.own_degrees, *FITTED.own), math.hypot(0.15, std)
        alone, _ = integrate.quad(
            lambda z, own=own, noise=noise, excess=excess: own.pdf(z) * stats.norm(math.exp(z), noise).pdf(excess),
            math.log(excess) - 2,
            math.log(excess) + 2,
            points=[math.log(excess)],
        )
        (found,) = upstream(child, alarms, 1)
        assert found.order == 0.0  # one round has no order
        assert found.strength == pytest.approx((along - math.log(alone)) / math.log(10), abs=0.01)


def test_order_is_the_ratio_of_two_chances_that_add_up() -> None:
    fit, rounds = FITTED, 9
    for first in (1, 4, 9):
        ratios = [influence._order(fit, at(first, 1), at(t, 1), rounds) for t in range(1, rounds + 1)]
        lags = [t - first for t in range(1, rounds + 1)]
        same = np.array([fit.together.chance(k) for k in lags])
        alone = (1 / rounds + same / same.sum()) / 2
        assert alone.sum() == pytest.approx(1)
        assert float((10.0 ** np.array(ratios) * alone).sum()) == pytest.approx(1)


def test_a_child_at_once_or_soon_after_speaks_for_the_edge_and_long_before_against_it() -> None:
    order = [influence._order(FITTED, at(20, 1), at(t, 1), 40) for t in range(1, 41)]
    assert max(order[19:22]) > 0.1
    assert order[0] < -0.5 and order[39] < -0.5
    assert order[24] > order[39] and order[17] > order[9]


def test_what_bias_does_to_calibration_is_told_from_calibration_failing_itself() -> None:
    typical = FITTED.unplanted[CALIBRATION][0] + FITTED.effects[BIAS, CALIBRATION].slope * 2.7
    brought = upstream(CALIBRATION, {BIAS: at(2, 2.8), CALIBRATION: at(3, typical)}, 8)[0]
    assert brought.log10_ratio > 0 and brought.weight > 0.5
    itself = upstream(CALIBRATION, {BIAS: at(2, 2.8), CALIBRATION: at(3, 5.2)}, 8)[0]
    assert itself.log10_ratio < -0.5


def test_an_edge_without_a_measured_effect_never_wins() -> None:
    for parent, child in ((BIAS, FAIRNESS), (FAIRNESS, EROSION), (EROSION, BIAS)):
        for lag in range(3):
            alarms = {parent: at(1, TYPICAL[parent]), child: at(1 + lag, TYPICAL[child])}
            assert upstream(child, alarms, 10)[0].log10_ratio < 0, (parent, child)


def test_the_feedback_that_runs_the_other_way_blames_nobody() -> None:
    """Planted erosion brings adaptation into alarm; the graph has that edge only backwards."""
    alarms = {EROSION: at(3, 3.8), ADAPTATION: at(2, 1.45)}
    (backwards,) = upstream(EROSION, alarms, 10)
    assert (backwards.mode, backwards.edge) == (ADAPTATION, "feedback")
    assert backwards.log10_ratio < -1
    assert upstream(ADAPTATION, alarms, 10) == ()


def test_only_direct_parents_in_alarm_are_weighed_and_weights_add_up_with_on_its_own() -> None:
    assert upstream(EROSION, {}, 5) == ()
    assert upstream(EROSION, {EROSION: at(1, 1.5), BIAS: at(1, 3.0)}, 5) == ()
    everything = {mode: at(2, 1.5) for mode in Mode}
    found = upstream(EROSION, everything, 5)
    assert {u.mode for u in found} == {FAIRNESS, DOMAIN, ADAPTATION}
    assert [u.log10_ratio for u in found] == sorted((u.log10_ratio for u in found), reverse=True)
    alone = 1 - sum(u.weight for u in found)
    assert all(u.weight / alone == pytest.approx(10**u.log10_ratio, rel=1e-6) for u in found if u.log10_ratio > -9)


def test_a_rougher_measurement_says_less() -> None:
    ratios = [
        upstream(FAIRNESS, {BIAS: at(1, 2.8, e), FAIRNESS: at(1, 2.0, e)}, 6)[0].strength for e in (0.05, 0.5, 2.0)
    ]
    assert ratios[0] < ratios[1] < ratios[2] < 0


def test_nothing_overflows(recwarn: pytest.WarningsRecorder) -> None:
    for strength in (-50.0, 0.0, 1e-9, 1e3, math.nan):
        for error in (0.0, 1e-6, 50.0):
            for rounds, first in ((1, 1), (5000, 5000), (5000, 1)):
                alarms = {ADAPTATION: at(first, 3.0), EROSION: at(1, strength, error)}
                (found,) = upstream(EROSION, alarms, rounds)
                assert math.isfinite(found.log10_ratio) and 0 <= found.weight <= 1


def test_strength_is_read_over_the_last_rounds_of_the_alarm() -> None:
    curve = [(0.0, -0.1, 0.1), (0.2, 0.1, 0.3), (math.nan,) * 3, (0.4, 0.204, 0.596), (0.2, 0.004, 0.396)]
    found = influence.alarm(2, curve, 0.1)
    assert found.strength == pytest.approx(3.0)
    assert found.error == pytest.approx(1.0)
    assert influence.alarm(5, curve, 0.1).strength == pytest.approx(2.0)
    assert math.isnan(influence.alarm(3, curve[:3], 0.1).strength)


def test_lags_are_fitted_with_one_pseudo_observation_of_each_outcome(edges: ModuleType) -> None:
    """Far from both ends of a window the likeliest chances and hazards have a closed form."""
    nothing = Lags(at_once=1 / 3, later=1 / 3, hazard_later=0.5, hazard_earlier=0.5)
    assert asdict(edges.lags({})) == pytest.approx(asdict(nothing), abs=0.002)
    pairs = {(500, 500 + lag, 1000): weight for lag, weight in {0: 60.0, 1: 20.0, 2: 10.0, -1: 10.0}.items()}
    closed = Lags(at_once=61 / 103, later=31 / 103, hazard_later=31 / 42, hazard_earlier=11 / 12)
    assert asdict(edges.lags(pairs)) == pytest.approx(asdict(closed), abs=0.002)
    either = edges.lags(pairs, symmetric=True)
    assert either.later == pytest.approx(1 - either.at_once - either.later, abs=0.002)
    assert either.hazard_later == either.hazard_earlier
