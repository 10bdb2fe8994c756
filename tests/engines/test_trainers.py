"""Clients who train in a round and say nothing of it but their update: what they send, cost and are asked."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcanary import pipeline, study
from fedcanary.clients import panel
from fedcanary.engines import privacy_terms
from fedcanary.engines.clients import Work
from fedcanary.engines.consent import UNBOUNDED, Consent
from fedcanary.engines.local import LocalClients, apply_update
from fedcanary.engines.protection import LEDGER, Protection
from fedcanary.errors import BadInput, ClientFailed
from fedcanary.models import adapters
from fedcanary.privacy.contract import Reason
from fedcanary.privacy.ledger import Ledger
from fedcanary.privacy.release import Gate
from fedcanary.privacy.seal import FIXED, UPDATE, Message, Terms, seal, seal_update
from fedcanary.record import RunRecord
from fedcanary.report.html import render
from fedcanary.report.summary import summarise
from fedcanary.types import Coord
from oracles.few import MadeUp, bare, setup_of

LAYOUT = {
    "p": (
        Coord(name="x", low=-1, high=1, purpose="x", scale=1.0, zero=0.25),
        Coord(name="missing", low=0, high=1, purpose="x", scale=1.0),
        Coord(name="detail", low=-1, high=1, purpose="x"),
    )
}
TRUSTS = ("none", "central", "local", "secure_aggregation")
by_trust = pytest.mark.parametrize("trust", TRUSTS)


def terms_of(trust: str, floor: int = 4) -> Terms:
    if trust == "none":
        return Terms(trust="none", floor=floor)
    return Terms(trust=trust, noise_multiplier=0.02, delta=1e-6, floor=floor, dropouts=0.3, simulated=3)


def opened(trust: str, answering: int, training: int, floor: int = 4, smuggled: float = 0.0):
    """A round of clients who all say x = .5 and change their tensor by one, and of others who only train."""
    terms, charges = terms_of(trust, floor), []
    everyone = range(answering + training)
    gate = Gate(1, LAYOUT, terms, charges.append, cohort=set(everyone), panel=set(range(answering)))
    said = Message(readings={"p": np.array([0.5, 0.0, 0.1])}, update=np.array([1.0, 2.0, 1.0]))
    taken = []
    for client in everyone:
        vector = seal(said, LAYOUT, terms, 1, client) if client < answering else seal_update(said.update, LAYOUT, terms)
        if client == answering and smuggled:
            vector[0] += type(vector[0])(smuggled)
        taken.append(gate.put(client, vector))
    return gate, gate.close(), charges, taken


# --- the door -----------------------------------------------------------------------------------------------------


@by_trust
def test_readings_are_over_those_who_answer_and_the_update_is_over_all(trust):
    _, releases, charges, taken = opened(trust, 6, 5)
    assert all(taken)
    assert releases["p"].count == 6.0
    noise = 6 * max(float(releases["p"].noise_std[0]), 1e-9)
    assert abs(releases["p"].total[0] - 6 * 0.5) < noise + 0.01  # who only trains adds no reading, not even a zero's
    np.testing.assert_allclose(releases[UPDATE].total, [11.0, 22.0, 11.0], atol=1e-6)
    alone = opened(trust, 6, 0)[2]
    assert [(c.purpose, c.event, c.epsilon) for c in charges] == [(c.purpose, c.event, c.epsilon) for c in alone]


@by_trust
def test_what_is_sent_beside_an_update_is_the_same_whatever_the_client_holds(trust):
    terms = terms_of(trust)
    one, other = (seal_update(np.array(u), LAYOUT, terms) for u in ([1.0, 2.0, 1.0], [-3.0, 0.5, 7.0]))
    width = 3 if trust != "none" else len(LAYOUT["p"])
    assert not one[:width].any() and not other[:width].any()
    assert (one[width:] != other[width:]).all()
    scale = 1.0 if trust == "none" else FIXED
    np.testing.assert_array_equal(one[width:] / scale, [1.0, 2.0, 1.0])


@pytest.mark.parametrize("trust", ["none", "central", "local"])
def test_a_reading_of_someone_who_only_trains_is_refused_where_it_can_be_seen(trust):
    gate, releases, _, taken = opened(trust, 6, 5, smuggled=0.5 if trust == "none" else 100)
    assert taken == [True] * 6 + [False] + [True] * 4
    assert gate.refused == Counter({"out of bounds": 1})
    assert releases["p"].count == 6.0 and releases[UPDATE].total[-1] == pytest.approx(10.0)


@by_trust
def test_those_who_only_train_do_not_fill_a_cohort(trust):
    gate, releases, charges, _ = opened(trust, 3, 20)
    assert releases == {}
    assert "3 clients" in gate.aborted
    assert charges  # a round that is not opened is paid for all the same


def test_an_update_that_is_not_finite_stays():
    with pytest.raises(Exception, match="not finite"):
        seal_update(np.array([math.nan, 1.0]), LAYOUT, terms_of("central"))


# --- the draw -----------------------------------------------------------------------------------------------------


def test_trainers_are_drawn_anew_from_those_who_are_there_and_do_not_answer():
    def there(client: int) -> bool:
        return client % 5 != 0

    rounds = [panel.others(1, t, 40, [1, 2, 3], 10, there) for t in range(1, 40)]
    assert all(len(set(drawn)) == 10 and not {1, 2, 3} & set(drawn) for drawn in rounds)
    assert not any(client % 5 == 0 for drawn in rounds for client in drawn)
    often = Counter(client for drawn in rounds for client in drawn)
    assert len(often) == 29 and max(often.values()) < 39 and len(set(rounds)) == 39
    assert panel.others(1, 1, 5, [0, 1], 10, lambda client: True) == (2, 3, 4)
    assert panel.others(1, 1, 5, [0, 1], 0, lambda client: True) == ()


def test_everyone_may_train_in_each_round_and_answers_once(tmp_path):
    setup = bare(12, {"rounds": 3, "clients": {"also_train": 8}, "privacy": {"min_cohort": 4}})
    with Protection(setup, RunRecord.open(tmp_path)) as protected:
        cohorts = [protected.cohort(t) for t in (1, 2, 3)]
    assert sorted(c for cohort in cohorts for c in cohort.clients) == list(range(12))
    assert all({*cohort.clients, *cohort.trainers} == set(range(12)) for cohort in cohorts)


# --- a run --------------------------------------------------------------------------------------------------------

APART = {"rounds": 2, "clients": {"also_train": 3}, "privacy": {"min_cohort": 3, "dropouts": 0.0}}


@pytest.mark.parametrize("method", ["fedavg", "ditto"])
def test_who_only_trains_reads_nothing_and_pays_nothing(tiny, tmp_path, monkeypatch, method):
    setup = setup_of(tiny["llama"], 6, APART | {"personalize": {"method": method}})
    read: list[int] = []
    stack = LocalClients._stack

    def watched(self, round, clients, *rest):
        read.extend(clients)
        return stack(self, round, clients, *rest)

    monkeypatch.setattr(LocalClients, "_stack", watched)
    record = pipeline.run(setup, tmp_path / "run")
    assert sorted(read) == list(range(6))  # each answers once, and trains twice
    bodies = list(record.of("round"))
    said = [(body["clients"], body["also_trained"], body["failed"], body["refused"]) for body in bodies]
    assert said == [(3, 3, 0, {})] * 2
    assert {release.count for table in record.releases().values() for release in table.values()} == {3.0}
    for client in range(6):
        place = tmp_path / "run" / "clients" / f"{client:06d}"
        with Ledger.open(place / LEDGER, owner=f"client {client}", budget=UNBOUNDED) as one:
            assert len(one.rows()) == 1  # for its one answer
        assert method == "fedavg" or len(list(place.glob("private.*"))) >= 1
    pipeline.run(setup, tmp_path / "again")
    assert list(RunRecord.load(tmp_path / "again").of("round")) == bodies


@pytest.mark.parametrize("on_failure", ["drop", "stop"])
def test_who_only_trains_and_fails_counts_as_failed(tiny, tmp_path, monkeypatch, on_failure):
    """Its training begins from NaN, so its loss is not finite."""
    tables = {"rounds": 1, "clients": {"per_round": 3, "also_train": 3}, "personalize": {"on_failure": on_failure}}
    setup = setup_of(tiny["llama"], 6, APART | tables | {"engine": {"threads": 1, "stack": 1}})
    with Protection(setup, RunRecord.open(tmp_path / "drawn")) as protected:
        cohort = protected.cohort(1)
    train = LocalClients._train

    def poisoned(self, round, clients, shared, *rest):
        bad = cohort.trainers[1] in clients
        start = {name: tensor * math.nan for name, tensor in shared.items()} if bad else shared
        return train(self, round, clients, start, *rest)

    monkeypatch.setattr(LocalClients, "_train", poisoned)
    if on_failure == "stop":
        with pytest.raises(ClientFailed, match=rf"'user-{cohort.trainers[1]}', round 1: its training loss"):
            pipeline.run(setup, tmp_path / "run")
        return
    record = pipeline.run(setup, tmp_path / "run")
    clients = summarise(record)["clients"]
    said = {name: clients[name] for name in ("asked", "also_trained", "failed", "answered", "refused")}
    assert said == {"asked": [3], "also_trained": [3], "failed": [1], "answered": [3.0], "refused": {}}
    moved = adapters.load(pipeline.round_folder(tmp_path / "run", 1))
    assert all(tensor.isfinite().all() for tensor in moved.values())
    page = render(summarise(record))
    assert "6, 3 in each round, and 3 who only train" in page
    assert "of those asked (outline); 3 more only trained; 1 failed in all" in page
    assert ">only trained</th>" in page


def test_a_server_that_asks_for_no_probe_gets_no_reading(tiny, tmp_path):
    """A request that costs nothing must show nothing: not even where its clients are those drawn to answer."""
    setup = setup_of(tiny["llama"], 6, APART)
    clients = LocalClients(setup, tmp_path / "run" / "clients")
    request = clients.consent.request(1, 3).model_copy(update={"probes": ()})
    terms = privacy_terms.terms(setup.study, 3)
    sent = [one for part in clients.work(Work(request, [0, 1, 2], setup.shared, terms)) for one in part]
    numbers = sum(t.numel() for t in setup.shared.values()) + 1
    assert len(sent) == 3
    for one in sent:
        assert not one.vector[:-numbers].any() and one.vector[-numbers:].any()


def test_the_adapter_moves_by_the_mean_change_of_all_who_train(tiny, tmp_path):
    moved = []
    for name, clients in (("apart", {"per_round": 3, "also_train": 3}), ("all", {"per_round": 6})):
        setup = setup_of(tiny["llama"], 6, APART | {"rounds": 1, "clients": clients})
        pipeline.run(setup, tmp_path / name)
        moved.append(adapters.load(pipeline.round_folder(tmp_path / name, 1)))
    for name, tensor in moved[0].items():
        torch.testing.assert_close(tensor, moved[1][name], rtol=0, atol=1e-6)
    assert any((t - setup.initial[n]).abs().max() > 1e-3 for n, t in moved[0].items())


def test_a_contract_says_so_or_clients_refuse(tmp_path):
    apart, usual = (bare(12, {"clients": clients, "privacy": {"min_cohort": 4}}) for clients in ({"also_train": 4}, {}))
    for setup, expected in ((apart, []), (usual, [Reason.APART])):
        folder = tmp_path / str(setup.study.clients.also_train)
        consent = Consent(setup, partial(Path.joinpath, folder))
        request = consent.request(1, 4).model_copy(update={"probes": ()})
        assert consent.refuses("0", request) == expected
        assert consent.refuses("0", request) == expected  # as often as it is asked
        assert consent.refuses("0", consent.request(2, 4)) == []  # its one answer is still to come
        assert consent.refuses("0", request) == expected
    text = Consent(apart, lambda client: tmp_path).contract.text
    assert "apart = true" in text and "apart" not in Consent(usual, lambda client: tmp_path).contract.text


def test_a_run_with_made_up_clients_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "LocalClients", MadeUp)
    setup = bare(12, {"rounds": 3, "clients": {"also_train": 8}, "privacy": {"min_cohort": 4}})
    whole = pipeline.run(setup, tmp_path / "whole")

    def stop(progress):
        if progress.round == 2 and progress.done == 6:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pipeline.run(setup, tmp_path / "halves", watch=stop)
    again = pipeline.run(setup, tmp_path / "halves")
    assert [entry.body for entry in again.entries] == [entry.body for entry in whole.entries]


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"personalize": {"method": "local_only"}}, "local_only sends no update"),
        ({"privacy": {"updates": {"noise": 2.0, "clip": 1.0}}}, "noised updates are paid for once"),
        ({"guard": {}}, "a guard judges by readings"),
        (
            {"privacy": {"unit": "example", "record": {"noise": 1.0, "clip": 1.0, "sample_rate": 0.5}}},
            "pays for each training",
        ),
    ],
)
def test_where_nobody_can_only_train_the_study_says_why(tables, says):
    tree = {"clients": {"also_train": 5}, "privacy": {"updates": {"noise": "none"}}}
    for name, table in tables.items():
        tree[name] = {**tree.get(name, {}), **table}
    with pytest.raises(BadInput, match=says):
        study.parse(tree)


def test_the_floor_is_of_those_who_answer(tmp_path):
    setup = bare(40, {"rounds": 2, "clients": {"also_train": 15}, "privacy": {"min_cohort": 4, "dropouts": 0.1}})
    with Protection(setup, RunRecord.open(tmp_path)) as protected:
        cohort = protected.cohort(1)
        assert (len(cohort.clients), len(cohort.trainers)) == (20, 15)
        assert protected.gate(1, cohort).terms == privacy_terms.terms(setup.study, 20)


@pytest.mark.parametrize("weight", [0.0, -0.5, float("nan")])
def test_no_weight_to_divide_by_moves_nothing(weight):
    """Noise on a small cohort's sum can leave none."""
    shared = {"a": torch.tensor([1.0, 2.0])}
    assert apply_update(shared, np.array([3.0, 4.0, weight])) == shared
    moved = apply_update(shared, np.array([3.0, 4.0, 2.0]))
    assert moved["a"].tolist() == [2.5, 4.0]
