"""The planner: the monitor's own e-values, monotone forecasts, remedies that work, agreement with played windows."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from fedcanary.errors import BadInput
from fedcanary.monitor import base as monitor
from fedcanary.monitor.forecast import PATHS, Clients, walk
from fedcanary.monitor.planner import ModeForecast, Wish, _Planner, parse_effects, plan
from fedcanary.monitor.planner_text import text
from fedcanary.privacy import accounting
from fedcanary.privacy.release import restore
from fedcanary.probes import probes
from fedcanary.probes.base import DIFFERENCE
from fedcanary.record import plain
from fedcanary.types import Item, Mode, Role

ITEMS = {
    role: [Item(prompt="", choices=("x", "y"), answer=a, domain="kitchen", group="ab"[a]) for a in (0, 1)]
    for role in Role
}
PROBES = probes(ITEMS, 0.05)
MARGINS = dict.fromkeys(Mode, 0.05)
WISH = Wish(clients=720, epsilon=4.0, power=0.01)


CLIENTS = Clients(std=0.08, drift=-0.01, tail=0.02, missing=0.01)


def planner(wish: Wish) -> _Planner:
    return _Planner(wish, PROBES, MARGINS, dict.fromkeys(Mode, CLIENTS))


def forecast(kind="rotating", wish=WISH, **changes) -> dict[Mode, ModeForecast]:
    """By mode, without a search for remedies."""
    return {m.mode: m for m in planner(replace(wish, **changes)).forecast(kind).modes}


@pytest.mark.parametrize("mode", list(Mode))
def test_every_window_is_judged_as_the_monitor_judges_it(mode):
    ours = planner(WISH)
    judged = ours.windows.plan
    (mode_plan,) = (p for p in ours.modes if p.mode == mode)
    drawn = ours.windows._draw("rotating", mode_plan, ours.door(60, 1.2), 0.12)
    worse, clear = walk(judged, mode_plan, drawn, (WISH.rounds, ours.windows.paths))
    coords = list(drawn.values)
    for path in range(3):
        state = monitor.start(judged)
        for t in range(WISH.rounds):
            body = {
                "round": t + 1,
                "probe": mode,
                "coords": coords,
                "total": [drawn.values[c][t, path] for c in coords],
                "count": drawn.count,
                "noise_std": [drawn.noises[c] for c in coords],
                "sensitivity": 1.0,
                "event": "x",
                "charge_id": "x",
                "lost": drawn.lost[t, path],
                "lost_std": drawn.lost_std,
            }
            state, evidence = monitor.step(judged, state, {mode: restore(body)})
            (one,) = (e for e in evidence if e.mode == mode)
            assert worse[t, path] == pytest.approx(one.e_worse, rel=1e-9)
            assert clear[t, path] == pytest.approx(one.e_not_worse, rel=1e-9)


@pytest.mark.parametrize("kind", ["rotating", "same"])
def test_more_clients_more_epsilon_or_a_larger_effect_never_see_less(kind, monkeypatch):
    monkeypatch.setattr("fedcanary.monitor.forecast.PATHS", 300)
    some = forecast(kind, effects=dict.fromkeys(Mode, 0.1))
    for name, low, high in (("clients", 360, 2400), ("epsilon", 2.0, 6.0), ("effects", 0.06, 0.2)):
        few, many = (
            forecast(
                kind, **{"effects": dict.fromkeys(Mode, 0.1), name: x if name != "effects" else dict.fromkeys(Mode, x)}
            )
            for x in (low, high)
        )
        for mode in Mode:
            slack = 0.01  # a few of 300 windows; what alarms that rarely is chance
            assert few[mode].power - slack <= some[mode].power <= many[mode].power + slack, (name, mode)
            if name != "effects":
                assert few[mode].noise > some[mode].noise > many[mode].noise
                assert few[mode].width > some[mode].width > many[mode].width
                assert few[mode].clear - slack <= some[mode].clear <= many[mode].clear + slack


def test_noise_is_what_the_accountant_asks_and_the_shares_add():
    """With 60 of 60 answering where 42 must suffice, the sum has sqrt(60 / 42) times the noise."""
    std = accounting.gaussian_std(4.0, 1e-6, 1.0)
    expected = std * math.sqrt(60 / 42) * DIFFERENCE / 60
    assert forecast()[Mode.ALIGNMENT_EROSION].noise == pytest.approx(expected, rel=1e-3)
    central = forecast(trust="central")[Mode.ALIGNMENT_EROSION].noise
    assert central == pytest.approx(std * DIFFERENCE / 60, rel=1e-3)
    assert forecast(neighbours="substituted", trust="central")[Mode.ALIGNMENT_EROSION].noise == pytest.approx(
        2 * central, rel=1e-3
    )


def test_the_same_clients_pay_for_every_round():
    rotating, same = (planner(WISH).forecast(kind) for kind in ("rotating", "same"))
    assert (rotating.size, same.size) == (60, 720)
    assert same.noise_multiplier == pytest.approx(rotating.noise_multiplier * math.sqrt(12), rel=1e-6)
    spent = accounting.gaussian_epsilon(same.noise_multiplier, 1.0, 1e-6, compositions=12)
    assert 3.99 < spent <= 4.0


def test_which_panel_is_better_depends_on_how_many_can_be_asked_in_a_round(monkeypatch):
    monkeypatch.setattr("fedcanary.monitor.forecast.PATHS", 300)
    hard = replace(WISH, clients=480, epsilon=2.0, power=0.5)
    assert plan(hard, PROBES, MARGINS).recommended == "same"
    assert plan(replace(hard, per_round=40), PROBES, MARGINS).recommended == "rotating"


def test_an_effect_at_the_margin_alarms_no_more_often_than_alpha_allows():
    """1,000 windows of each mode by a fixed seed; each mode may use alpha / 6.

    Under `same` only with clients that are all alike: there the bound is about the clients that are asked.
    """
    wish = replace(WISH, clients=12_000, alpha=0.3, effects=dict.fromkeys(Mode, 0.05), change=1)
    allowed = 0.3 / 6 + 3 * math.sqrt(0.05 * 0.95 / PATHS)
    assert all(m.power <= allowed for m in forecast("rotating", wish).values())
    alike = forecast("same", replace(wish, spread=0.0))
    assert all(m.power <= allowed for mode, m in alike.items() if mode != Mode.FAIRNESS_COLLAPSE)


def test_an_effect_within_the_margin_is_said_to_be_no_reason_for_an_alarm():
    found = plan(replace(WISH, effects={Mode.ALIGNMENT_EROSION: 0.05}, power=0.5, epsilon=6.0), PROBES, MARGINS)
    (unmet,) = (u for u in found.unmet if u.what == "alarm")
    assert unmet.mode == Mode.ALIGNMENT_EROSION and "within the margin of 0.05: no alarm is due" in unmet.reason
    assert unmet.effect is not None and unmet.effect > 0.05


def test_too_few_clients_for_any_panel_is_said_with_the_number_that_would_do():
    none = plan(replace(WISH, clients=9), PROBES, MARGINS)
    assert none.recommended is None
    assert {(u.what, u.clients) for u in none.unmet} == {("panel", 120), ("panel", 10)}
    assert "9 clients in a round, and no sum of fewer than 10 is opened" in text(none)
    for clients, opens in ((119, (False, True)), (120, (True, True))):
        assert tuple(bool(forecast(kind, clients=clients)) for kind in ("rotating", "same")) == opens


def test_a_wish_that_cannot_be_met_comes_with_remedies_that_work(monkeypatch):
    monkeypatch.setattr("fedcanary.monitor.forecast.PATHS", 300)  # the same windows for what is said and what works
    poor = Wish(clients=480, epsilon=1.0)
    found = plan(poor, PROBES, MARGINS, dict.fromkeys(Mode, CLIENTS))
    assert found.recommended is not None
    for what, mode in (("alarm", Mode.FAIRNESS_COLLAPSE), ("clear", Mode.AMPLIFIED_BIAS)):
        (unmet,) = (u for u in found.unmet if u.mode == mode and u.what == what)
        assert f"{what} of {mode}" in text(found)
        assert unmet.clients is not None
        remedies = [{"clients": unmet.clients}, *([{"epsilon": unmet.epsilon}] if unmet.epsilon is not None else [])]
        if what == "alarm":
            assert unmet.effect is not None
            remedies.append({"effects": {mode: unmet.effect}})
        for remedy in remedies:
            m = forecast(found.recommended, poor, **remedy)[mode]
            assert (m.power if what == "alarm" else m.clear) >= poor.power, remedy


def test_nothing_within_reach_is_said_too():
    hopeless = replace(WISH, clients=40, per_round=40, rounds=2, epsilon=0.01, power=0.8)
    lines = text(plan(hopeless, PROBES, MARGINS)).splitlines()
    assert any("nothing within reach alone" in line for line in lines)


def test_bad_input_lists_every_problem():
    with pytest.raises(BadInput) as caught:
        plan(
            Wish(
                clients=0,
                epsilon=math.nan,
                delta=0.5,
                rounds=0,
                alpha=1.0,
                power=0.0,
                spread=-1.0,
                trust="blind",  # words that the types forbid, as a caller may type them
                neighbours="zero",
                min_cohort=1,
                dropouts=0.5,
                change=9,
                per_round=-1,
                effects={Mode.ALIGNMENT_EROSION: 0.3, Mode.FAIRNESS_COLLAPSE: 1.5},
            ),
            PROBES,
            {},
        )
    where = [p.where for p in caught.value.problems]
    expected = "clients epsilon delta rounds per_round alpha power change spread trust neighbours min_cohort dropouts"
    assert set(expected.split()) <= set(where)
    assert {"effect alignment_erosion", "effect fairness_collapse", *(f"margin {m}" for m in Mode)} <= set(where)
    assert all(p.remedy for p in caught.value.problems)


def test_effects_are_for_every_mode_or_for_one():
    found = parse_effects(["alignment_erosion=0.2", "0.1"])
    assert found[Mode.ALIGNMENT_EROSION] == 0.2 and found[Mode.AMPLIFIED_BIAS] == 0.1
    with pytest.raises(BadInput) as caught:
        parse_effects(["erosion=0.1", "much", "alignment_erosion="])
    assert len(caught.value.problems) == 3
    with pytest.raises(BadInput):  # NaN is a number to Python, but no effect
        plan(replace(WISH, effects=parse_effects(["nan"])), PROBES, MARGINS)


def test_a_plan_is_the_same_every_time_and_can_be_written_as_json():
    again = plan(WISH, PROBES, MARGINS)
    assert repr(again) == repr(plan(WISH, PROBES, MARGINS))
    assert json.loads(json.dumps(plain(asdict(again)), allow_nan=False))["wish"]["clients"] == 720
    said = text(again)
    assert "false alarms: at most 0.05" in said and f"recommended: {again.recommended}" in said


# --- against windows that are played out, message by message ----------------------------------------------------------


def benchmark(monkeypatch, pool: int):
    path = Path(__file__).parents[2] / "benchmarks" / "planner.py"
    spec = importlib.util.spec_from_file_location("planner_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "planner_benchmark", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "POOL", pool)
    return module


def test_a_forecast_agrees_with_a_few_played_windows(monkeypatch):
    """50 windows of 40 clients, seed 5. Noise over 600 sums (standard error 3%) and intervals within 15%.

    A correct program fails with probability below 1e-5 on noise; power and clear are within 4 standard errors (6e-5).
    """
    module = benchmark(monkeypatch, 2500)
    federation = module.Federation(module.MEASURED, seed=5)
    said, real = module.cell(federation, 40, 4.0, "rotating", Mode.FAIRNESS_COLLAPSE, None, 50)
    assert said.noise == pytest.approx(real["noise"], rel=0.15)
    assert said.width == pytest.approx(real["width"], rel=0.15)
    for name in ("power", "clear"):
        p = getattr(said, name)
        assert abs(real[name] - p) <= 4 * math.sqrt(max(p * (1 - p), 0.02) / 50) + 0.03


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("size", "epsilon", "kind", "mode", "effect"),
    [
        (40, 4.0, "rotating", Mode.ALIGNMENT_EROSION, 0.1),
        (100, 1.0, "rotating", Mode.ALIGNMENT_EROSION, 0.1),
        (60, 4.0, "rotating", Mode.CONFIDENCE_MISCALIBRATION, None),
        (200, 4.0, "same", Mode.ALIGNMENT_EROSION, 0.1),
    ],
)
def test_forecasts_are_within_a_fifth_of_played_windows(monkeypatch, size, epsilon, kind, mode, effect):
    """300 windows, seed 5: noise, width and delay within 20%, power within .1 (3 standard errors at .8).

    All powers here are above .75; a correct program fails a case with probability below .003, by power.
    """
    module = benchmark(monkeypatch, 20_000)
    federation = module.Federation(module.MEASURED, seed=5)
    said, real = module.cell(federation, size, epsilon, kind, mode, effect, 300)
    for name in ("noise", "width", "delay"):
        assert getattr(said, name) == pytest.approx(real[name], rel=0.2, abs=0.5 if name == "delay" else 0.0)
    assert said.power == pytest.approx(real["power"], abs=0.1)
    assert np.isfinite(real["delay"])
