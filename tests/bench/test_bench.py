"""The simulator against the program it stands for: messages, door, monitor; its truth; its rules; its command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from fedcanary import cli
from fedcanary.bench import grid, measure, people, rules, scenarios, windows
from fedcanary.bench.evidence import evidence
from fedcanary.bench.federations import Federation, load, save
from fedcanary.bench.measure import OURS, Cell
from fedcanary.bench.tables import page
from fedcanary.monitor import base as monitor
from fedcanary.privacy import noise
from fedcanary.privacy.encode import UNIT
from fedcanary.privacy.release import restore
from fedcanary.rng import stream
from fedcanary.types import Mode

FIRST = next(iter(Mode))


@pytest.fixture(scope="module")
def made():
    """A made-up population of which one mode is harmed."""
    return scenarios.worked("shift .10", scenarios.WORKED["shift .10"], horizon=12, seed=3)


@pytest.fixture(scope="module")
def readings():
    return load(grid.READINGS)


@pytest.fixture(scope="module")
def real(readings):
    """A real federation with a plant, as a scenario."""
    by_plant = {r.federation.plant: r for r in readings if r.federation.method == "fedavg"}
    calm = next(r for r in readings if r.federation == Federation())
    margins = grid.MarginTable().model_dump()
    return scenarios.recorded(calm, by_plant[Mode.ALIGNMENT_EROSION], grid.instruments(), margins, horizon=20)


# --- panels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [7, 50, 101, 1000, 30_000])
def test_a_panels_sum_is_that_of_n_clients(made, n):
    """The first coordinate of an extra client that always says 1 is n, exactly, whatever n is cut into."""
    ones = people.People(
        encoding=made.people.encoding,
        messages=np.ones_like(made.people.messages),
        exact={("x", "y"): np.ones(made.people.messages.shape[:2])},
    )
    drawn = people.draw(ones, [0, 0, 1], n, 5, "rotating", stream(1, "panels"))
    assert (drawn.messages == n).all()
    assert (drawn.exact["x", "y"] == n).all()


def test_panels_have_the_populations_mean_and_the_scatter_of_independent_clients(made):
    n, key = 400, (FIRST, "delta")
    drawn = people.draw(made.people, [0] * 3 + [1] * 3, n, 400, "rotating", stream(2, "panels"))
    means = drawn.exact[key] / n
    for phase, rows in ((0, means[:3]), (1, means[3:])):
        assert rows.mean() == pytest.approx(made.people.mean(*key, phase), abs=5 * 0.1 / math.sqrt(n * rows.size))
        assert rows.std() == pytest.approx(0.1 / math.sqrt(n), rel=0.1)
    together = np.corrcoef(means[0], means[1])[0, 1]
    assert abs(together) < 0.2


def test_the_same_clients_answer_in_every_round_under_same(made):
    drawn = people.draw(made.people, [0, 0, 1], 100, 50, "same", stream(3, "panels"))
    exact = drawn.exact[FIRST, "delta"]
    np.testing.assert_array_equal(exact[0], exact[1])
    np.testing.assert_allclose(exact[2], exact[0] - 100 * 0.1, atol=1e-9)  # the very clients, shifted


def test_few_kinds_of_clients_are_counted(real):
    drawn = people.draw(real.people, [0], 64, 2000, "rotating", stream(4, "panels"))
    mean = real.people.mean(Mode.ALIGNMENT_EROSION, "refusal", 0)
    values = drawn.exact[Mode.ALIGNMENT_EROSION, "refusal"] / 64
    assert values.mean() == pytest.approx(mean, abs=5 * values.std() / math.sqrt(values.size))


# --- the monitor, many windows at once --------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["made", "real"])
def test_windows_are_judged_as_the_monitor_judges_them_one_by_one(which, request):
    """The same sums, path by path, through `Encoding.read`, a `Release` and `monitor.step`."""
    scenario = request.getfixturevalue(which)
    n, paths, std = 150, 4, 4.2
    plan, encoding = scenario.clears, scenario.people.encoding
    rng = stream(5, "windows")
    panels = people.draw(scenario.people, scenario.phase_of(plan.horizon, 3), n, paths, "rotating", rng)
    totals = people.noised(panels, std, rng)
    walked = windows.judge(plan, windows.sums_of(encoding, totals, n, std))
    seen = set()
    for path in range(paths):
        state = monitor.start(plan)
        for t in range(plan.horizon):
            read, lost, lost_std = encoding.read(totals[t, path].astype(np.int64), n, std * UNIT)
            releases = {
                probe: restore(
                    {
                        "round": t + 1,
                        "probe": probe,
                        "coords": list(s.coords),
                        "total": s.total.tolist(),
                        "count": n,
                        "noise_std": s.noise_std.tolist(),
                        "sensitivity": 1.0,
                        "event": "x",
                        "charge_id": "x",
                        "lost": float(lost),
                        "lost_std": lost_std,
                    }
                )
                for probe, s in read.items()
            }
            state, told = monitor.step(plan, state, releases)
            for e in told:
                assert (e.state == "alarm") == walked.alarm[e.mode][t, path]
                assert (e.state == "clear") == walked.clear[e.mode][t, path]
                seen.add(e.state)
    assert seen == {"alarm", "clear", "unknown"}


@pytest.mark.statistical
def test_simulated_noise_gives_the_false_alarms_of_real_discrete_gaussian_noise():
    """300 windows of 50 rounds with noise drawn by OpenDP, at N = 200: at most .05 + 4 sd of false alarms.

    A correct program's rate is below .01, so it fails with probability below 1e-9. The rounds' noise has the std asked.
    """
    scenario = scenarios.worked("nothing", None, horizon=50, seed=7)
    n, paths, std = 200, 300, 4.225
    rng = stream(7, "real noise")
    panels = people.draw(scenario.people, [0] * 50, n, paths, "rotating", rng)
    size = panels.messages.size
    drawn = np.array(noise.gaussian_noise(std * UNIT, size), dtype=np.float64).reshape(panels.messages.shape)
    assert drawn.std() == pytest.approx(std * UNIT, rel=0.02)
    walked = windows.judge(scenario.alarms, windows.sums_of(scenario.people.encoding, panels.messages + drawn, n, std))
    alarmed = np.logical_or.reduce([bits[-1] for bits in walked.alarm.values()])
    assert alarmed.mean() <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / paths)


@pytest.mark.statistical
@pytest.mark.parametrize("name", scenarios.NULLS)
def test_false_alarms_stay_below_alpha_on_every_null_and_a_forgetful_monitor_is_caught(name, monkeypatch):
    """2,000 windows at N = 200, seed 1: the 95% interval ends below alpha. Then the planted bug: noise left unpaid."""
    before, after, share = scenarios.NULLS[name]
    scenario = scenarios.worked(name, after, 50, seed=1, calm=before, share=share)
    assert not scenario.harmed
    cell = Cell(scenario=scenario, n=200, paths=2000, change=10 if after else 0, against=())
    row = next(r for r in measure.measure(cell) if r["mode"] == "any")
    assert row["false_alarm_high"] <= 0.05
    monkeypatch.setattr("fedcanary.monitor.eprocess.noise_cost", lambda step, *terms: 0.0)
    worse = next(r for r in measure.measure(cell) if r["mode"] == "any")
    assert worse["false_alarm_low"] > 0.05


def test_truth_is_computed_from_the_population(made, real):
    assert made.harmed == {FIRST}
    assert Mode.ALIGNMENT_EROSION in real.harmed
    edge = scenarios.worked("skewed", None, 12, seed=1, calm=scenarios.skewed, share=0.04)
    assert not edge.harmed
    assert edge.people.mean(FIRST, "delta") == pytest.approx(0.0, abs=1e-12)
    assert scenarios.worked("skewed", None, 12, seed=1, calm=scenarios.skewed, share=0.03).harmed == set(Mode)


def test_a_cells_rows_say_power_where_it_is_harmed_and_false_alarms_elsewhere(made):
    rows = measure.measure(Cell(scenario=made, n=500, paths=60, change=3))
    ours = {r["mode"]: r for r in rows if r["rule"] == OURS}
    assert ours[FIRST]["power"] == 1.0 and ours[FIRST]["delay_median"] == 1.0
    assert ours["any"]["false_alarm_runs"] == 60 and ours["any"]["false_alarm"] == 0.0
    assert "power" not in ours[Mode.ALIGNMENT_EROSION] and ours[Mode.ALIGNMENT_EROSION]["clear_median"] <= 3
    blind = next(r for r in rows if r["rule"] == "utility" and r["mode"] == FIRST)
    assert blind["power"] == 0.0 and math.isinf(blind["delay_median"])
    read_every_round = next(r for r in rows if r["rule"] == "z-test" and r["mode"] == "any")
    assert read_every_round["false_alarm"] > 0.5


def test_rates_have_exact_intervals():
    row = measure.rate("x", 0, 1000)
    assert (row["x_low"], row["x_high"]) == (0.0, pytest.approx(1 - 0.025 ** (1 / 1000)))
    assert measure.rate("x", 1000, 1000)["x_high"] == 1.0
    middle = measure.rate("x", 50, 1000)
    assert (middle["x_low"], middle["x_high"]) == (pytest.approx(0.0373, abs=1e-4), pytest.approx(0.0654, abs=1e-4))


def test_delays_count_from_the_change_and_leave_early_alarms_out():
    alarm = np.array([[0, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 0]], dtype=bool)
    np.testing.assert_array_equal(windows.first(alarm), [3, 2, 1, math.inf])
    np.testing.assert_array_equal(windows.delays(alarm, 2), [2, 1, math.nan, math.inf])


def test_phases_before_and_after_a_change(real):
    assert real.phase_of(5, 3) == [0, 0, 1, 2, 3]
    assert real.phase_of(14, 2)[-2:] == [10, 10]  # ten recorded rounds, the last one stays
    assert real.phase_of(3, 0) == [0, 0, 0]


def test_bonferroni_is_the_z_test_at_a_smaller_level(made):
    rng = stream(6, "rules")
    panels = people.draw(made.people, made.phase_of(12, 3), 100, 50, "rotating", rng)
    sums = windows.sums_of(made.people.encoding, people.noised(panels, 4.0, rng), 100, 4.0)
    window = rules.Window(plan=made.alarms, sums=sums, panels=panels, people=made.people, change=3)
    for mode_plan in made.alarms.modes:
        often, seldom = rules.z_test(window, mode_plan), rules.bonferroni(window, mode_plan)
        assert (often | ~seldom).all() and often.sum() > seldom.sum()
    assert not rules.three_sd(window, made.alarms.modes[0])[:2].any()  # the reference raises nothing itself


# --- recorded readings ------------------------------------------------------------------------------------------


def test_recordings_come_back_as_they_were_written(readings, tmp_path):
    save(readings[:3], tmp_path / "some.npz")
    for a, b in zip(load(tmp_path / "some.npz"), sorted(readings[:3], key=lambda r: r.federation), strict=True):
        assert (a.federation, a.layout, a.gaps) == (b.federation, b.layout, b.gaps)
        np.testing.assert_array_equal(a.values, b.values)


def test_packaged_readings_are_of_the_instruments_of_today(readings):
    """Every number that today's probes would send was recorded, within its bounds, in every federation asked for."""
    layout = {p.name: [c.name for c in p.coords] for p in grid.instruments()}
    for recording in readings:
        assert {probe: list(names) for probe, names in recording.layout.items()} == layout
        assert np.isfinite(recording.values).all()
        for probe in grid.instruments():
            for c in probe.coords:
                values = recording.values[..., recording.at(probe.name, c.name)]
                assert values.min() >= c.low - 1e-4 and values.max() <= c.high + 1e-4
    names = {(r.federation.method, r.federation.plant) for r in readings}
    assert names == {(m, p) for m in grid.METHODS for p in (grid.NONE, *Mode)}


@pytest.mark.slow
def test_a_federation_recorded_again_reads_the_same():
    """Two rounds of four clients, twice; and the first again as the packaged ones were made."""
    from fedcanary.bench.federations import run

    one, two = (run(Federation(clients=4, rounds=2)) for _ in range(2))
    np.testing.assert_array_equal(one.values, two.values)
    assert one.values.shape[:2] == (2, 4)
    assert not np.array_equal(one.values, run(Federation(clients=4, rounds=2, plant=FIRST)).values)


# --- the grid, its tables and the command -----------------------------------------------------------------------


def test_the_grid_asks_everything_of_fedavg_and_no_cell_twice(readings):
    todo = grid.tasks(grid.Size(), readings)
    cells = [(t.kind, t.key, *cell) for t in todo for cell in t.cells]
    assert len(cells) == len(set(cells))
    assert len({(t.kind, t.key) for t in todo}) == len(scenarios.NULLS) + 2 * len(scenarios.WORKED) + 1 + 13 + 6 * 7
    of = {key: [c[2:] for c in cells if c[1] == key] for key in {c[1] for c in cells}}
    assert len(of["fedavg", FIRST, "1"]) == len(grid.PANELS) * len(grid.EPSILONS) * 2
    assert {n for n, *_ in of["ditto", FIRST, "1"]} == {200, 1000}
    assert {windows for *_, windows in of["fedavg", "none", "1"]} == {10_000}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The command, at a size that takes seconds."""
    out = tmp_path_factory.mktemp("bench") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "QUICK", grid.Size(wide=False, nulls=40, runs=20, panels=(200,)))
        patch.setattr(people, "BLOCKS", 512)
        patch.setattr(scenarios, "MADE", 4096)
        assert cli.main(["bench", "--quick", "--jobs", "1", "--out", str(out)]) == 0
    return out


def test_the_command_writes_rows_tables_and_evidence(small, capsys):
    rows = [json.loads(line) for line in (small / "results.jsonl").read_text().splitlines()]
    assert {r["setting"] for r in rows} == {"null", "worked", "first", "recorded"}
    text = (small / "README.md").read_text()
    for heading in ("False alarms", "Power and delay", "Clear", "Planted failures", "Other rules"):
        assert f"## {heading}" in text
    assert not (small / "part").exists()
    told = json.loads((small / "evidence.json").read_text())
    assert {f["kind"] for f in told["figures"]} == {"false_alarm", "power"}
    assert cli.main(["landscape", "--evidence", str(small / "evidence.json"), "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert "none" in json.dumps(ours)  # forty windows cannot show a rate below .05


def test_results_are_not_written_over(small, capsys):
    before = {p.name: p.read_bytes() for p in small.iterdir()}
    assert cli.main(["bench", "--quick", "--out", str(small)]) == 2
    assert "already holds results" in capsys.readouterr().err
    assert cli.main(["bench", "--jobs", "0", "--out", str(small / "new")]) == 2
    assert cli.main(["bench", "--out", str(small / "README.md")]) == 2
    assert {p.name: p.read_bytes() for p in small.iterdir()} == before


def test_evidence_is_of_real_readings_under_a_finite_epsilon_only(small):
    rows = [json.loads(line) for line in (small / "results.jsonl").read_text().splitlines()]
    figures = evidence(rows, "x", {})["figures"]
    assert all(f["private"] and math.isfinite(f["epsilon"]) for f in figures)
    endless = [{**r, "epsilon": math.inf} for r in rows]
    assert not [f for f in evidence(endless, "x", {})["figures"] if f["source"] == "recorded"]


def test_tables_say_nothing_of_what_was_not_measured():
    assert "fedcanary" not in page([]).split("## Clear")[0].replace("Share of windows", "")


def test_the_package_holds_its_readings():
    assert Path(grid.READINGS).stat().st_size < 3_000_000
