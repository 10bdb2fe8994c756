"""A run's privacy over its whole length: panels, budgets, ledgers shared by runs, and rounds that were interrupted."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from fedcanary import pipeline
from fedcanary.engines import privacy_terms
from fedcanary.engines.protection import LEDGER, Protection, spent_by
from fedcanary.errors import EXIT_BAD_INPUT, EXIT_REFUSED, BadInput, Refused
from fedcanary.privacy import secagg
from fedcanary.privacy.accounting import Mechanism, gaussian_epsilon
from fedcanary.privacy.ledger import Budget, Ledger, OverBudget
from fedcanary.privacy.release import Gate
from fedcanary.record import RunRecord
from oracles.few import MadeUp, bare

NOISED = {"noise": 40.0, "clip": 1.0}
EPSILON = 4.0


def study(clients, rounds=3, seed=1, available=1.0, per_round=None, **privacy):
    table = {"min_cohort": 4, "epsilon": EPSILON, "updates": NOISED, **privacy}
    more = {"available": available} | ({"per_round": per_round} if per_round else {})
    return bare(clients, {"rounds": rounds, "seed": seed, "clients": more, "privacy": table})


@pytest.fixture
def play(monkeypatch, tmp_path):
    """Run a study with made-up clients in a folder; returns the record."""
    monkeypatch.setattr(pipeline, "LocalClients", MadeUp)
    return lambda setup, name="run": pipeline.run(setup, tmp_path / name)


def drawn(setup, out, complete=0):
    """Cohorts of all rounds that are left."""
    record = RunRecord.open(out)
    for round in range(record.rounds + 1, complete + 1):
        record.append("round", {"round": round})
    with Protection(setup, record) as protected:
        return [protected.cohort(round) for round in range(complete + 1, setup.study.rounds + 1)]


def ledger_of(path, epsilon=EPSILON, neighbours="zeroed"):
    budget = Budget(epsilon=epsilon, delta=1e-6)
    return Ledger.open(path, owner="few", budget=budget, spent=spent_by(neighbours))


def contents(out: Path) -> dict[str, bytes]:
    """Every file but wall times and the ledgers' own working files."""
    skipped = ("timing.jsonl", ".sqlite-wal", ".sqlite-shm")
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file() and not p.name.endswith(skipped)
    }


# --- panels


@pytest.mark.parametrize(("available", "complete"), [(1.0, 0), (0.5, 0), (1.0, 3), (0.5, 3), (0.5, 5)])
def test_rotating_panels_are_disjoint_over_a_run_and_after_a_resume(tmp_path, available, complete):
    setup = study(120, rounds=6, available=available, per_round=10)
    whole = drawn(setup, tmp_path / "whole")
    seen = [client for cohort in whole for client in cohort.clients]
    assert len(seen) == len(set(seen)) == 60
    assert [len(cohort.clients) for cohort in whole] == [10] * 6
    assert drawn(setup, tmp_path / "whole", complete) == whole[complete:]


def test_panels_of_a_window_are_disjoint_whoever_is_away():
    """40 seeds, shares from 0.2 to 1; with few there, rounds without anyone use nobody up."""
    for seed in range(40):
        setup = study(40, rounds=8, seed=seed, available=0.2 + 0.8 * (seed % 5) / 4, trust="central")
        used: list[int] = []
        protected = object.__new__(Protection)
        protected._study, protected._clients, protected._used, protected._given_up = setup.study, 40, set(), set()
        protected._drawn, protected._there = {}, None
        for round in range(1, 9):
            cohort = protected.cohort(round)
            assert bool(cohort.clients) == (cohort.why_none == "")
            assert len(cohort.clients) in (0, 4, 5)
            used += cohort.clients
        assert len(used) == len(set(used))


def test_with_too_few_left_nobody_is_drawn_nothing_is_charged_and_nothing_is_known(play, tmp_path):
    record = play(study(11, rounds=4, per_round=4))
    rounds = list(record.of("round"))
    assert [body["clients"] for body in rounds] == [4, 4, 0, 0]
    assert "3 clients could be drawn" in rounds[2]["aborted"]
    assert {body["round"] for body in record.of("charge")} == {1, 2}
    assert [len(releases) > 0 for releases in record.releases().values()] == [True, True, False, False]
    with ledger_of(tmp_path / "run" / LEDGER) as ledger:
        assert {row.charge.round for row in ledger.rows()} == {1, 2}
    record = play(study(7, rounds=2, per_round=7, available=0.4), "away")  # nobody was ever drawn
    assert list(record.of("charge")) == []
    assert {e["state"] for body in record.of("round") for e in body["evidence"]} == {"unknown"}


def test_a_floor_above_the_panel_is_bad_input_with_its_remedy(tmp_path):
    for setup in (study(30, rounds=3, min_cohort=11), study(10, rounds=3, min_cohort=11, panel="same")):
        with pytest.raises(BadInput, match="min_cohort") as caught:
            Protection(setup, RunRecord.open(tmp_path))
        assert caught.value.exit_code == EXIT_BAD_INPUT
        assert "fewer rounds" in str(caught.value) and "fedcanary plan" in str(caught.value)
    assert not (tmp_path / LEDGER).exists()


# --- budgets


@pytest.mark.parametrize("updates", [NOISED, {"noise": "none"}], ids=["noised updates", "exact updates"])
@pytest.mark.parametrize("trust", ["secure_aggregation", "central", "local"])
def test_the_same_panel_in_every_round_composes_to_its_epsilon(play, tmp_path, trust, updates):
    """Recomputed from the charged mechanisms by hand: 1/z^2 adds up, and substituted neighbours are twice as far."""
    record = play(study(6, rounds=5, panel="same", trust=trust, updates=updates))
    far = 2.0 if trust == "local" else 1.0
    with ledger_of(tmp_path / "run" / LEDGER, neighbours="substituted" if trust == "local" else "zeroed") as ledger:
        spent, rows = ledger.spent(1).epsilon, ledger.rows()
        assert {row.status for row in rows} == {"released"}
    mechanisms = [Mechanism.from_json(json.dumps(dict(row.charge.mechanism))) for row in rows]
    assert len(mechanisms) == (10 if updates is NOISED else 5)
    precision = sum(m.sensitivity**2 / (m.shares * m.share_std**2) for m in mechanisms)
    by_hand = gaussian_epsilon(1 / math.sqrt(precision), far, 1e-6)
    # under secure aggregation six shares, where five would do, are a little more noise than was asked for
    assert by_hand == pytest.approx(spent, rel=1e-3)
    assert 0.85 * EPSILON < spent <= EPSILON
    costs = [body["spent"]["epsilon"] for body in record.of("charge")]
    assert costs == sorted(costs) and costs[-1] == spent


def test_rotating_panels_cost_what_one_costs(play):
    record = play(study(12, rounds=3))
    costs = [body["spent"]["epsilon"] for body in record.of("charge")]
    assert len(costs) == 6
    assert costs[1] == costs[-1] <= EPSILON  # readings and update of the first panel; the others are disjoint


def test_a_second_run_over_the_same_clients_is_refused_and_told_what_would_fit(play, tmp_path):
    shared = {"ledger": str(tmp_path / "privacy.ledger"), "updates": {"noise": "none"}}
    play(study(12, **shared), "first")
    with pytest.raises(OverBudget) as refused:
        play(study(12, seed=2, **shared), "second")
    assert refused.value.exit_code == EXIT_REFUSED
    told = str(refused.value)
    assert "would fit" in told and "the same in the next window" in told and "left: epsilon" in told
    record = RunRecord.load(tmp_path / "second")
    assert {entry.kind for entry in record.entries} == {"header"}  # nothing was opened
    record = play(study(12, seed=2, **shared, window=2), "next")
    assert record.ended and all(record.releases().values())
    with ledger_of(tmp_path / "privacy.ledger") as ledger:
        assert {row.charge.window for row in ledger.rows()} == {1, 2}
        assert ledger.spent(1).epsilon <= EPSILON and ledger.spent(2).epsilon <= EPSILON


def test_two_cheap_runs_share_a_window_and_a_third_is_refused(play, tmp_path):
    """What the ledger says would fit does fit: the same run with less epsilon, in a ledger of the same budget."""
    path = tmp_path / "privacy.ledger"
    half = study(12, updates={"noise": "none"}, epsilon=EPSILON, ledger=str(path))
    noise = privacy_terms.readings_noise(half.study)

    def one(seed, multiplier, name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(privacy_terms, "readings_noise", lambda *rest: multiplier)
            return play(study(12, seed=seed, updates={"noise": "none"}, ledger=str(path)), name)

    one(1, 1.5 * noise, "a")
    with ledger_of(path) as ledger:
        first = ledger.spent(1).epsilon
    one(2, 1.5 * noise, "b")  # 2 / 1.5^2 < 1
    with ledger_of(path) as ledger:
        assert first < ledger.spent(1).epsilon <= EPSILON  # runs add up: their panels may share clients
    with pytest.raises(OverBudget, match="times the noise") as refused:
        one(3, 1.5 * noise, "c")
    factor = float(str(refused.value).split("with ")[1].split(" times")[0])
    one(4, 1.5 * noise * factor, "d")


def test_a_ledger_of_other_neighbours_is_not_added_up_with_this_one(play, tmp_path, monkeypatch):
    """A budget spent under `substituted` must not look less than spent to a run that asks about `zeroed`."""
    path = str(tmp_path / "privacy.ledger")
    play(study(12, updates={"noise": "none"}, neighbours="substituted", ledger=path), "first")
    with ledger_of(Path(path), neighbours="substituted") as ledger:
        assert ledger.spent(1).epsilon == pytest.approx(EPSILON, rel=0.1)
    small = study(12, seed=2, updates={"noise": "none"}, ledger=path)
    noise = 1.2 * privacy_terms.readings_noise(small.study)
    monkeypatch.setattr(privacy_terms, "readings_noise", lambda *rest: noise)
    with contextlib.suppress(Refused, BadInput):
        play(small, "second")
    with ledger_of(Path(path), neighbours="substituted") as ledger:
        assert ledger.spent(1).epsilon <= EPSILON


# --- interruptions


class Cut(Exception):
    pass


def cut_after_opening(patch, at):
    """The process goes away when the sums of a round are open and nothing is written yet."""
    close = Gate.close

    def closing(self, masked=None):
        found = close(self, masked)
        if self._round == at:
            raise Cut
        return found

    patch.setattr(Gate, "close", closing)


def test_system_noise_does_not_open_an_interrupted_round_again(play, tmp_path, monkeypatch):
    setup, opened = study(12, noise="system"), []
    unmask = secagg.Server.unmask
    monkeypatch.setattr(secagg.Server, "unmask", lambda self: opened.append(self.terms.round_id) or unmask(self))
    with pytest.MonkeyPatch.context() as patch:
        cut_after_opening(patch, 2)
        with pytest.raises(Cut):
            play(setup)
    record = play(setup)
    assert [str(id).split()[-2] for id in opened] == ["1", "2", "3"]
    rounds = list(record.of("round"))
    assert ["second look" in body["aborted"] for body in rounds] == [False, True, False]
    assert [body["clients"] for body in rounds] == [4, 0, 4]
    assert [bool(releases) for releases in record.releases().values()] == [True, False, True]
    with ledger_of(tmp_path / "run" / LEDGER) as ledger:
        assert [(row.charge.round, row.status) for row in ledger.rows()] == [
            *[(1, "released")] * 2,
            *[(2, "aborted")] * 2,  # its budget is lost
            *[(3, "released")] * 2,
        ]
    assert pipeline.replay(record) == [(body["round"], body["evidence"]) for body in rounds]


def test_simulated_noise_goes_on_to_the_same_bytes(play, tmp_path):
    setup = study(12, noise="simulated")
    play(setup, "whole")
    with pytest.MonkeyPatch.context() as patch:
        cut_after_opening(patch, 2)
        with pytest.raises(Cut):
            play(setup, "halves")
    play(setup, "halves")
    one, other = contents(tmp_path / "whole"), contents(tmp_path / "halves")
    assert one.keys() == other.keys()
    assert {name for name in one if one[name] != other[name] and not name.endswith(LEDGER)} == set()
    heads = []
    for name in ("whole", "halves"):
        with ledger_of(tmp_path / name / LEDGER) as ledger:
            heads.append(ledger.verify())
    assert heads[0] == heads[1]


def test_fresh_noise_is_fresh_and_simulated_noise_is_not(play):
    for noise, same in (("system", False), ("simulated", True)):
        one, two = (play(study(4, rounds=1, noise=noise), f"{noise} {i}").releases()[1]["utility"] for i in range(2))
        assert np.array_equal(one.total, two.total) == same


def test_the_record_says_all_that_its_ledger_spent(play, tmp_path):
    """Cut between the ledger's charge and the record's, in the last round of a panel that pays in every round."""
    setup = study(6, rounds=2, panel="same", noise="system", updates={"noise": "none"})
    charge = Ledger.charge

    def cut(self, one):
        receipt = charge(self, one)
        if one.round == 2 and "clients" not in self._chain.path.parts:
            raise Cut
        return receipt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "charge", cut)
        with pytest.raises(Cut):
            play(setup)
    record = play(setup)
    with ledger_of(tmp_path / "run" / LEDGER) as ledger:
        said = list(record.of("charge"))[-1]["spent"]["epsilon"]
        assert said == ledger.spent(1).epsilon
