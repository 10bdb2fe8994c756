"""The monitor's step against a plain rewriting of it; its error rates; what it may never say; the verdict."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcanary.monitor import base as monitor
from fedcanary.monitor import eprocess
from fedcanary.monitor.verdict import judge
from fedcanary.privacy.release import restore
from fedcanary.probes.base import CLIP
from fedcanary.record import fields, plain
from fedcanary.rng import stream
from fedcanary.types import Evidence, Mode, Release

MARGIN = 0.05
PARTS = dict.fromkeys(Mode, ("delta",))
UNITS = {mode: f"unit of {mode}" for mode in Mode}
MEANS = [m for m in Mode if m not in (Mode.AMPLIFIED_BIAS, Mode.FAIRNESS_COLLAPSE)]
EROSION = Mode.ALIGNMENT_EROSION


def release(probe: str, round: int, columns: dict[str, np.ndarray], count: int) -> Release:
    return restore(
        {
            "round": round,
            "probe": probe,
            "coords": list(columns),
            "total": [float(np.sum(c)) for c in columns.values()],
            "count": count,
            "noise_std": [0.0] * len(columns),
            "sensitivity": math.inf,
            "event": "NonPrivate",
            "charge_id": "x",
        }
    )


def answers(mode: Mode, d, round: int = 1, missing: int = 0, tail: float = 0.1) -> Release:
    """What clients with these differences, and some that can say nothing, release about a mode."""
    d = np.clip(np.asarray(d, dtype=float), -CLIP, CLIP)
    names = ("contrast:a", "square:a") if mode == Mode.AMPLIFIED_BIAS else ("delta", "square")
    columns = {names[0]: d, names[1]: d**2, "tail": d < -tail, "missing": np.ones(missing)}
    return release(mode, round, columns, len(d) + missing)


def plan(horizon: int = 12, r: float = 0.0, alpha: float = 0.05, margin: float = MARGIN) -> monitor.Plan:
    return monitor.plan(dict.fromkeys(Mode, margin), PARTS, UNITS, alpha, horizon, groups={"a": r})


def walk(plan: monitor.Plan, rounds) -> list[dict[Mode, Evidence]]:
    state, table = monitor.start(plan), []
    for releases in rounds:
        state, evidence = monitor.step(plan, state, releases)
        table.append({e.mode: e for e in evidence})
    return table


def only(mode: Mode, ds, **how) -> list[dict[str, Release]]:
    return [{} if d is None else {mode: answers(mode, d, t, **how)} for t, d in enumerate(ds, start=1)]


# --- against a plain rewriting ----------------------------------------------------------------------------------


def oracle(plan: monitor.Plan, mode: Mode, rounds: list[Release | None]) -> list[tuple[float, float]]:
    """(e_worse, e_not_worse) after every round, from the definitions and without logarithms of sums."""
    (mode_plan,) = (p for p in plan.modes if p.mode == mode)
    horizon, found = plan.horizon, []
    for t in range(1, len(rounds) + 1):
        worse_of, clear_of = [], []
        for s in mode_plan.streams:
            bits = s.kind == "share"

            def worse(r: Release | None, bet: int, s=s, bits=bits) -> float:
                if r is None:
                    return 1.0
                n, v = r.count, s.sign * r.sum(s.coord)
                if bits:
                    x = eprocess.Sums(n=n, b=v)
                    return math.exp(eprocess.log_bits_above(x, s.margin, eprocess.above_bets(x, s.margin)[bet]))
                x = eprocess.Sums(n=n, s=v, q=r.sum(s.square))
                lam, tilt = eprocess.worse_bets(x, s.margin, None)[bet]
                return math.exp(eprocess.log_worse(x, s.margin, lam, tilt))

            def clear(r: Release, bet: int, s=s, bits=bits) -> float:
                n, v, k = r.count, s.sign * r.sum(s.coord), r.sum("missing")
                if bits:
                    x = eprocess.Sums(n=n, b=v + k)
                    return math.exp(eprocess.log_bits_below(x, s.margin, eprocess.below_bets(x, s.margin)[bet]))
                x = eprocess.Sums(n=n, s=v - k * CLIP, q=r.sum(s.square) + k * CLIP**2)
                near = min(s.margin, monitor.REACH)
                return math.exp(eprocess.log_clear(x, near, eprocess.clear_bets(x, near)[bet]))

            # every start round u has weight 1 / T: its bet is the product of the rounds u..t
            total = 0.0
            bets = len(eprocess.ABOVE if bits else eprocess.PLAIN)
            for bet in range(bets):
                gains = [worse(r, bet) for r in rounds[:t]]
                total += sum(math.prod(gains[u:]) for u in range(t)) / horizon
            worse_of.append(total / bets + (horizon - t) / horizon)
            window = rounds[max(t - monitor.WINDOW, 0) : t]
            if any(r is None for r in window):
                clear_of.append(0.0)
                continue
            passes = [math.prod(clear(r, bet) for r in window) for bet in range(len(eprocess.WITHIN))]
            clear_of.append(float(np.mean(passes)))
        found.append((float(np.mean(worse_of)), min(clear_of)))
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(Mode)),
    st.lists(st.one_of(st.none(), st.lists(st.floats(-CLIP, CLIP), min_size=1, max_size=8)), min_size=1, max_size=6),
    st.integers(0, 3),
    st.sampled_from([-0.3, 0.0, 0.1]),
)
def test_a_step_is_what_the_definitions_say(mode, ds, missing, r):
    chosen = plan(horizon=6, r=r)
    rounds = only(mode, ds, missing=missing)
    expected = oracle(chosen, mode, [x.get(mode) for x in rounds])
    for evidence, (worse, clear) in zip(walk(chosen, rounds), expected, strict=True):
        assert evidence[mode].e_worse == pytest.approx(worse, rel=1e-9)
        assert evidence[mode].e_not_worse == pytest.approx(clear, rel=1e-9, abs=1e-300)


def test_thresholds_share_one_alpha_over_modes_and_rounds():
    """Six modes: an alarm needs 6 / alpha; a clear 6 T / alpha."""
    chosen = plan(horizon=10, alpha=0.1)
    for d, state in ((-0.2, "alarm"), (0.1, "clear")):
        table = walk(chosen, only(EROSION, [[d] * 12] * 10))
        for evidence in table:
            one = evidence[EROSION]
            beyond = one.e_worse >= 60 if state == "alarm" else one.e_not_worse >= 600
            assert (one.state == state) == beyond
        assert table[-1][EROSION].state == state
        assert table[0][EROSION].state == "unknown"


# --- what it says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(Mode))
def test_degraded_is_alarm_fine_is_clear(mode):
    bad = {Mode.AMPLIFIED_BIAS: 0.2}.get(mode, -0.2)
    table = walk(plan(), only(mode, [[bad] * 60] * 6))
    assert [t[mode].state for t in table][-1] == "alarm"
    assert "clear" not in [t[mode].state for t in table]
    table = walk(plan(), only(mode, [[0.0] * 120] * 6))
    assert [t[mode].state for t in table][-1] == "clear"
    assert "alarm" not in [t[mode].state for t in table]
    others = [e for t in table for m, e in t.items() if m != mode]
    assert {e.state for e in others} == {"unknown"}


def test_an_alarm_stays_and_remembers_since_when():
    table = walk(plan(), only(EROSION, [[0.05] * 30] * 3 + [[-0.2] * 30] * 3 + [[0.2] * 300] * 6))
    states = [t[EROSION].state for t in table]
    first = states.index("alarm")
    assert 3 <= first <= 5
    assert set(states[first:]) == {"alarm"}
    assert [t[EROSION].since_round for t in table] == [None] * first + [first + 1] * (12 - first)
    assert table[-1][EROSION].estimate == pytest.approx(-0.2)  # the estimate is of now, the alarm of the run


def test_an_alarm_within_the_margin_says_why():
    """One client in ten lost .25 and the others gained: the mean is fine. Later the harm is over, the alarm stays."""
    few = np.array([-0.25] * 20 + [0.04] * 180)
    chosen = monitor.plan(dict.fromkeys(Mode, MARGIN), PARTS, UNITS, 0.05, 12, groups={}, severe=0.03)

    def of(d, t):
        columns = {"delta": d, "square": d**2, "severe": (d < -0.2).astype(float), "missing": np.zeros(1)}
        return {EROSION: release(EROSION, t, columns, len(d))}

    table = walk(chosen, [of(few, t) for t in range(1, 5)] + [of(np.full(200, 0.04), 5)])
    assert table[3][EROSION].state == "alarm" and table[3][EROSION].estimate < 0
    assert table[3][EROSION].why == "the mean is within its margin, but 10% of the clients lost more than 0.2"
    assert table[3][EROSION].details["severe"] == pytest.approx(0.1)
    assert table[4][EROSION].why == "this round is within the margin; an alarm stays"


def test_no_release_is_unknown_and_teaches_nothing():
    table = walk(plan(), only(EROSION, [[0.1] * 90, [0.1] * 90, None, [0.1] * 90, [0.1] * 90, [0.1] * 90, None]))
    assert [t[EROSION].state for t in table] == ["clear", "clear", *["unknown"] * 3, "clear", "unknown"]
    gone = table[2][EROSION]
    assert math.isnan(gone.estimate) and math.isnan(gone.interval[0])
    assert gone.why == "no release in this round"
    assert gone.e_not_worse == 0.0
    assert gone.e_worse == pytest.approx(table[1][EROSION].e_worse, rel=1e-12)
    nothing = walk(plan(), [{}] * 12)
    assert {e.state for t in nothing for e in t.values()} == {"unknown"}
    assert all(e.e_worse == pytest.approx(1.0) for e in nothing[-1].values())


def test_a_clear_expires_with_its_window():
    table = walk(plan(), only(EROSION, [[0.1] * 90] + [[-MARGIN] * 90] * 4))
    states = [t[EROSION].state for t in table]
    assert states[0] == "clear"
    assert states[monitor.WINDOW :] == ["unknown"] * 2


def test_a_mode_without_streams_is_unknown():
    bare = monitor.plan(dict.fromkeys(Mode, MARGIN), PARTS, UNITS, 0.05, 4, groups={})
    table = walk(bare, [{Mode.AMPLIFIED_BIAS: answers(Mode.AMPLIFIED_BIAS, [0.2] * 90)}] * 4)
    assert {t[Mode.AMPLIFIED_BIAS].state for t in table} == {"unknown"}
    assert math.isnan(table[0][Mode.AMPLIFIED_BIAS].estimate)
    assert walk(bare, [{}])[0][Mode.AMPLIFIED_BIAS].why == "no public items of this mode's role"


@pytest.mark.parametrize("mode", [EROSION, Mode.FAIRNESS_COLLAPSE, Mode.AMPLIFIED_BIAS])
def test_a_client_that_could_not_say_counts_as_the_worst_for_clear(mode):
    worst = {Mode.AMPLIFIED_BIAS: 0.0}.get(mode, -CLIP)
    silent = walk(plan(), only(mode, [[0.0] * 90] * 3, missing=20))
    spoken = walk(plan(), only(mode, [[0.0] * 90 + [worst] * 20] * 3))
    if mode == Mode.AMPLIFIED_BIAS:  # it has two directions, and the worst client is the worst in both
        assert silent[-1][mode].e_not_worse < spoken[-1][mode].e_not_worse
    else:
        assert silent[-1][mode].e_not_worse == pytest.approx(spoken[-1][mode].e_not_worse)
    assert silent[-1][mode].state == "unknown"
    assert "clear" in {t[mode].state for t in walk(plan(), only(mode, [[0.0] * 90] * 3))}
    assert silent[-1][mode].e_worse <= 1  # and it is no evidence that anything got worse


def test_why_names_the_clients_that_could_not_say():
    table = walk(plan(), only(EROSION, [[0.0] * 4], missing=12))
    assert table[0][EROSION].why.startswith("75% of the clients")
    assert "more clients or rounds" in walk(plan(), only(EROSION, [[0.0] * 4]))[0][EROSION].why


@pytest.mark.parametrize(
    ("r", "change", "alarm"),
    [
        (0.3, -0.25, False),  # a gap that narrows
        (-0.3, 0.25, False),
        (0.3, 0.2, True),  # one that widens
        (-0.3, -0.2, True),
        (0.0, 0.2, True),
        (0.0, -0.2, True),
        (0.05, -0.25, True),  # one that turns round and is wider than before
        (0.1, -0.2, False),  # one that turns round and is as wide as before
        (0.0, 0.04, False),
    ],
)
def test_only_a_wider_gap_is_an_alarm(r, change, alarm):
    table = walk(plan(r=r), only(Mode.AMPLIFIED_BIAS, [[change] * 80] * 8))
    last = table[-1][Mode.AMPLIFIED_BIAS]
    assert (last.state == "alarm") == alarm
    assert last.estimate == pytest.approx(abs(r + change) - abs(r))


def test_what_the_clip_hides_is_never_cleared():
    """A gap of .3 that turned into -.65 reads as -.25 at every client: too deep for the clip to show, so unknown."""
    table = walk(plan(r=0.3), only(Mode.AMPLIFIED_BIAS, [[-0.95] * 500] * 8))
    assert {t[Mode.AMPLIFIED_BIAS].state for t in table} == {"unknown"}
    table = walk(plan(margin=0.4), only(EROSION, [[-0.9] * 500] * 8))
    assert {t[EROSION].state for t in table} == {"unknown"}
    fine = walk(plan(r=0.3), only(Mode.AMPLIFIED_BIAS, [[0.0] * 200] * 8))
    assert fine[-1][Mode.AMPLIFIED_BIAS].state == "clear"


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(MEANS), st.data())
def test_a_stream_at_or_beyond_the_margin_is_never_cleared(mode, data):
    """Deterministic: whatever the rounds' clients, if each round's own mean is at most -margin."""
    rounds = []
    for _ in range(4):
        d = np.array(data.draw(st.lists(st.floats(-CLIP, CLIP), min_size=1, max_size=30)))
        d = np.clip(d - max(0.0, d.mean() + MARGIN) - 1e-9, -CLIP, CLIP)
        while d.mean() > -MARGIN:
            d = np.clip(d - 0.01, -CLIP, CLIP)
        rounds.append(d)
    table = walk(plan(horizon=4, alpha=0.9), only(mode, rounds))
    assert "clear" not in {t[mode].state for t in table}
    assert max(t[mode].e_not_worse for t in table) <= 1 + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(MEANS), st.data())
def test_a_stream_inside_the_margin_never_alarms(mode, data):
    rounds = []
    for _ in range(4):
        d = np.array(data.draw(st.lists(st.floats(-CLIP, CLIP), min_size=1, max_size=30)))
        while d.mean() < -MARGIN:
            d = np.clip(d + 0.01, -CLIP, CLIP)
        rounds.append(d)
    table = walk(plan(horizon=4, alpha=0.9), only(mode, rounds))
    assert "alarm" not in {t[mode].state for t in table}
    assert max(t[mode].e_worse for t in table) <= 1 + 1e-9


@pytest.mark.parametrize("total, n, said", [(-6.0, 24, 0.0), (-1.0, 24, 0.0), (30.0, 24, 1.0), (6.0, 24, 0.25)])
def test_a_share_that_noise_carries_beyond_0_or_1_is_shown_within_its_interval(total, n, said):
    fair = Mode.FAIRNESS_COLLAPSE
    (plan_of,) = (p for p in plan().modes if p.mode == fair)
    noised = replace(release(fair, 1, {"tail": np.array([total])}, n), noise_std=(2.0,))
    estimate, (low, high), _ = monitor.headline(plan_of, noised)
    assert estimate == said
    assert 0 <= low <= estimate <= high <= 1


def test_estimates_and_intervals_are_of_the_round():
    d = np.array([-0.1, 0.0, -0.2, -0.1])
    table = walk(plan(), [{EROSION: answers(EROSION, d), Mode.FAIRNESS_COLLAPSE: answers(Mode.FAIRNESS_COLLAPSE, d)}])
    erosion, fairness = table[0][EROSION], table[0][Mode.FAIRNESS_COLLAPSE]
    assert erosion.estimate == pytest.approx(0.1)  # how much worse
    half = 1.96 * math.sqrt(d.var() / 4)
    assert erosion.interval == pytest.approx((0.1 - half, 0.1 + half), rel=0.2)
    assert erosion.interval[0] < erosion.estimate < erosion.interval[1]
    assert fairness.estimate == 0.25
    assert erosion.unit == f"unit of {EROSION}"
    assert erosion.details["delta"] == pytest.approx(-0.1)
    half_missing = walk(plan(), only(EROSION, [d], missing=4))[0][EROSION]
    assert half_missing.estimate == pytest.approx(0.1)  # the mean of those who could say


# --- purity and replay ------------------------------------------------------------------------------------------


def random_rounds(seed: int, rounds: int = 8) -> list[dict[str, Release]]:
    draw = stream(seed, "monitor")
    table = []
    for t in range(1, rounds + 1):
        present = {m: answers(m, draw.normal(-0.03, 0.1, 30), t, int(draw.integers(3))) for m in Mode}
        table.append({m: r for m, r in present.items() if draw.random() < 0.9})
    return table


def test_replay_from_the_written_record_is_equal_bit_for_bit():
    chosen, rounds = plan(r=0.07), random_rounds(3)
    written = json.loads(json.dumps(plain(monitor.plan_body(chosen))))
    assert monitor.plan_from(written) == chosen
    again = [{m: restore(json.loads(json.dumps(plain(fields(r))))) for m, r in releases.items()} for releases in rounds]
    one, two = walk(chosen, rounds), walk(monitor.plan_from(written), again)
    assert json.dumps([[plain(fields(e)) for e in t.values()] for t in one]) == json.dumps(
        [[plain(fields(e)) for e in t.values()] for t in two]
    )


def test_step_changes_nothing_it_was_given():
    chosen, rounds = plan(), random_rounds(4)
    state = monitor.start(chosen)
    for releases in rounds:
        before = repr(state)
        one, two = monitor.step(chosen, state, releases), monitor.step(chosen, state, releases)
        assert repr(one) == repr(two)
        assert repr(state) == before
        state = one[0]
    assert state.round == len(rounds)


# --- error rates over many runs ---------------------------------------------------------------------------------


def at_margin(draw, t: int, n: int) -> np.ndarray:
    """Two points, as far apart as the clip allows: mean exactly -margin."""
    return np.where(draw.random(n) < (CLIP + MARGIN) / (2 * CLIP), -CLIP, CLIP)


def skewed(draw, t: int, n: int) -> np.ndarray:
    """Rarely far below, mostly just inside: mean exactly -margin."""
    p = 0.06
    high = (-MARGIN + p * CLIP) / (1 - p)
    return np.where(draw.random(n) < p, -CLIP, high)


def burst(draw, t: int, n: int) -> np.ndarray:
    """Quiet until round 6, then as noisy as the clip allows; the mean stays."""
    return np.full(n, -MARGIN) + draw.normal(0, 0.01, n) if t < 6 else at_margin(draw, t, n)


RUNS, ALPHA = 400, 0.05
ALLOWED = 38  # P(Binomial(400, .05) > 38) = 7e-5: the chance that a correct program fails each test below


@pytest.mark.statistical
@pytest.mark.parametrize("null", [at_margin, skewed, burst])
@pytest.mark.parametrize("side", ["alarm", "clear"])
def test_over_whole_runs_false_words_are_rare(null, side):
    """400 runs of 12 rounds, 30 clients, all six modes exactly at the margin; seed 1.

    At most alpha = 5% of the runs may hold any false alarm, and at most 5% any false clear, at any time in any mode.
    """
    shares = {Mode.FAIRNESS_COLLAPSE: lambda draw, t, n: np.where(draw.random(n) < MARGIN, -0.2, 0.0)}
    shares[Mode.AMPLIFIED_BIAS] = lambda draw, t, n: -null(draw, t, n) if t % 2 else null(draw, t, n)
    chosen, wrong = plan(horizon=12, alpha=ALPHA), 0
    for run in range(RUNS):
        draw = stream(1, "false", null.__name__, run)
        state, said = monitor.start(chosen), set()
        for t in range(1, 13):
            releases = {m: answers(m, shares.get(m, null)(draw, t, 30), t) for m in Mode}
            if side == "clear":  # that mode's two directions cannot both be at the margin: one is well inside
                del releases[Mode.AMPLIFIED_BIAS]
            state, evidence = monitor.step(chosen, state, releases)
            said |= {e.state for e in evidence}
        wrong += side in said
    assert wrong <= ALLOWED


@pytest.mark.statistical
def test_a_real_drop_is_found_soon():
    """200 runs, seed 2: thirty clients with mean -.15 (sd .1) from round 4; at least 95% alarm within four rounds.

    A correct program fails with negligible probability: the observed rate is 100%.
    """
    found = 0
    for run in range(200):
        draw = stream(2, "power", run)
        ds = [draw.normal(0.0 if t < 4 else -0.15, 0.1, 30) for t in range(1, 8)]
        found += walk(plan(), only(EROSION, ds))[-1][EROSION].state == "alarm"
    assert found >= 190


# --- verdict and influence --------------------------------------------------------------------------------------


def evidence_of(**states: str) -> list[Evidence]:
    return [
        Evidence(
            mode=mode,
            state=states.get(mode, "unknown"),
            estimate=0.0,
            interval=(0.0, 0.0),
            unit="",
            e_worse=1.0,
            e_not_worse=1.0,
        )
        for mode in Mode
    ]


def utility(base: float, now: float) -> Release:
    return release("utility", 1, {"score_base": np.array([base]), "score_gain": np.array([now - base])}, 1)


@pytest.mark.parametrize(
    ("base", "now", "silent"), [(0.6, 0.7, True), (0.6, 0.6, True), (0.6, 0.59, False), (math.nan, 0.7, False)]
)
def test_silent_is_an_alarm_while_utility_looks_fine(base, now, silent):
    verdict = judge(evidence_of(alignment_erosion="alarm", fairness_collapse="clear"), utility(base, now), "report")
    assert verdict.silent[EROSION] == silent
    assert not any(v for mode, v in verdict.silent.items() if mode != EROSION)  # only alarms are failures
    assert verdict.states[EROSION] == "alarm"
    assert verdict.action == "adopt"


@pytest.mark.parametrize(("gain", "silent"), [(0.05, True), (-0.05, True), (-0.07, False)])
def test_noise_alone_does_not_make_a_failure_loud(gain, silent):
    """Noise of standard deviation 0.03 on the mean gain: only what is beyond 0.06 is a fall."""
    noised = replace(utility(0.6, 0.6 + gain), noise_std=np.array([0.1, 0.03]))
    assert judge(evidence_of(alignment_erosion="alarm"), noised, "report").silent[EROSION] == silent


def test_without_utility_nothing_is_called_silent():
    verdict = judge(evidence_of(alignment_erosion="alarm"), None, "report")
    assert not any(verdict.silent.values())


@pytest.mark.parametrize(
    ("state", "policy", "action"),
    [("alarm", "hold", "hold"), ("alarm", "report", "adopt"), ("clear", "hold", "adopt"), ("unknown", "hold", "adopt")],
)
def test_the_policy_holds_only_at_an_alarm_and_when_told(state, policy, action):
    verdict = judge(evidence_of(alignment_erosion=state), utility(0.5, 0.6), policy)
    assert verdict.action == action
    assert bool(verdict.reasons) == (state == "alarm")


def test_evidence_of_an_unbroken_drop_only_grows():
    table = walk(plan(), only(EROSION, [[-0.1] * 25] * 8))
    values = [t[EROSION].e_worse for t in table]
    assert all(a < b for a, b in pairwise(values))


# --- parts of a mode --------------------------------------------------------------------------------------------


def in_parts(refusal, persona, missing_persona: int = 0, rounds: int = 6) -> list[dict[str, Release]]:
    """Rounds in which mode 6 is said in two parts, the second of which some clients cannot say."""
    one, two = np.asarray(refusal, dtype=float), np.asarray(persona, dtype=float)
    columns = {"refusal": one, "refusal_square": one**2, "refusal_missing": np.zeros(0)}
    columns |= {"persona": two, "persona_square": two**2, "persona_missing": np.ones(missing_persona)}
    columns |= {"tail": np.zeros(0), "missing": np.zeros(0)}
    return [{EROSION: release(EROSION, t, columns, len(one))} for t in range(1, rounds + 1)]


def two_parts() -> monitor.Plan:
    parts = {**PARTS, EROSION: ("refusal", "persona")}
    return monitor.plan(dict.fromkeys(Mode, MARGIN), parts, UNITS, 0.05, 12, groups={})


def test_a_gain_in_one_part_hides_no_loss_in_another():
    """The two parts' mean never moves; a plan that tested it would call this clear."""
    last = walk(two_parts(), in_parts([-0.2] * 60, [0.2] * 60))[-1][EROSION]
    assert (last.state, last.part, last.estimate) == ("alarm", "refusal", pytest.approx(0.2))
    assert last.details == pytest.approx({"refusal": -0.2, "persona": 0.2, "tail": 0.0})
    joined = walk(plan(), only(EROSION, [[0.0] * 120] * 6))[-1][EROSION]
    assert joined.state == "clear"


def test_a_mode_is_clear_only_when_all_its_parts_are():
    assert walk(two_parts(), in_parts([0.0] * 120, [0.0] * 120))[-1][EROSION].state == "clear"
    assert walk(two_parts(), in_parts([0.0] * 120, [-MARGIN] * 120))[-1][EROSION].state == "unknown"


def test_whoever_cannot_say_a_part_is_left_out_of_its_mean_and_counts_against_its_clear():
    few = walk(two_parts(), in_parts([0.0] * 120, [-0.04] * 60, missing_persona=60))[-1][EROSION]
    assert few.state == "unknown"
    assert (few.part, few.estimate) == ("persona", pytest.approx(0.04))
    assert "50% of the clients could not score it" in few.why


# --- what may be asked beside the means -------------------------------------------------------------------------


def beside(n: int, d: np.ndarray, round: int = 1) -> dict[str, Release]:
    """Fairness with differences d, and calibration whose clients err by .1 in opposite directions in two bins."""
    zero = np.zeros(n)
    fair = {"delta": d, "square": d**2, "tail": zero, "missing": zero}
    error = {f"signed:{b}": np.full(n, {1: 0.1, 3: -0.1}.get(b, 0.0)) for b in range(5)}
    calibrated = {"delta": zero, "square": zero, "tail": zero, "severe": zero, "missing": zero, **error}
    return {
        Mode.FAIRNESS_COLLAPSE: release(Mode.FAIRNESS_COLLAPSE, round, fair, n),
        Mode.CONFIDENCE_MISCALIBRATION: release(
            Mode.CONFIDENCE_MISCALIBRATION, round, calibrated | {"ece_square": np.full(n, 0.04)}, n
        ),
    }


def test_spread_and_pooled_error_alarm_where_means_and_shares_are_fine():
    """Pooled error .2: each client's own has not changed, and no bin's sign is the same as the other's."""
    d = np.repeat([-0.2, 0.2], 150)  # no tail bit is set in this made-up release: only the spread speaks
    margins = dict.fromkeys(Mode, MARGIN)
    asked = monitor.plan(margins, PARTS, UNITS, 0.05, 12, groups={}, severe=0.03, spread=0.01, pooled=0.1)
    plain = monitor.plan(margins, PARTS, UNITS, 0.05, 12, groups={}, severe=0.03)
    rounds = [beside(300, d, t) for t in range(1, 5)]
    for chosen, state in ((asked, "alarm"), (plain, "clear")):
        last = walk(chosen, rounds)[-1]
        assert last[Mode.FAIRNESS_COLLAPSE].state == state
        assert last[Mode.CONFIDENCE_MISCALIBRATION].state == state
    fine = monitor.plan(margins, PARTS, UNITS, 0.05, 12, groups={}, spread=0.06, pooled=0.3)
    last = walk(fine, rounds)[-1]
    assert {last[m].state for m in (Mode.FAIRNESS_COLLAPSE, Mode.CONFIDENCE_MISCALIBRATION)} == {"clear"}
    assert monitor.plan_from(json.loads(json.dumps(plain_body(asked)))) == asked


def plain_body(chosen: monitor.Plan):
    return plain(monitor.plan_body(chosen))


@pytest.mark.statistical
def test_a_pooled_error_at_its_limit_is_no_alarm():
    """1,000 windows of 12 rounds, 50 clients whose pooled error is exactly the limit, seed 5: at most 1% alarm.

    A maximum over bins or a plain |mean| would be biased upwards by the clients' own scatter; at .05 / 6 a correct
    program fails this with probability below 1e-6.
    """
    rng = stream(5, "pooled")
    chosen = monitor.plan(dict.fromkeys(Mode, MARGIN), PARTS, UNITS, 0.05, 12, groups={}, pooled=0.1)
    alarms = 0
    for _ in range(1000):
        state = monitor.start(chosen)
        for t in range(1, 13):
            scatter = rng.normal(0, 0.05, (5, 50))
            signed = np.array([0.05, -0.05, 0, 0, 0])[:, None] + scatter
            columns = {"delta": np.zeros(50), "square": np.zeros(50), "missing": np.zeros(50)}
            columns |= {f"signed:{b}": signed[b] for b in range(5)}
            columns["ece_square"] = np.abs(signed).sum(axis=0) ** 2
            mode = Mode.CONFIDENCE_MISCALIBRATION
            state, _ = monitor.step(chosen, state, {mode: release(mode, t, columns, 50)})
        alarms += Mode.CONFIDENCE_MISCALIBRATION in state.since
    assert alarms <= 10
