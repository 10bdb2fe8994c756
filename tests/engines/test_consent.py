"""What clients refuse in a run, each by its own policy file: through `LocalClients.work`, to ledgers and record."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from fedcanary import pipeline
from fedcanary.engines.clients import Work
from fedcanary.engines.consent import Consent, contract_of
from fedcanary.engines.local import LocalClients
from fedcanary.engines.privacy_terms import terms
from fedcanary.engines.protection import LEDGER
from fedcanary.errors import BadInput
from fedcanary.privacy.contract import Reason
from fedcanary.privacy.ledger import Budget, Ledger
from oracles.few import MadeUp, bare, setup_of

AGREES = "max_delta = 1e-5\nupdates_without_noise = true\nsimulated_noise = true\n"
STRICT = 2  # the client with a policy of its own
UNBOUNDED = Budget(epsilon=math.inf, delta=1.0)


pytestmark = pytest.mark.usefixtures("one_thread")


def folder(tmp_path, **policies):
    """A folder of policies; clients without a file follow default.toml, which agrees."""
    place = tmp_path / "policies"
    place.mkdir()
    for name, text in {"default": AGREES, **policies}.items():
        (place / f"{name.replace('_', '-')}.toml").write_text(text)
    return {"clients": {"policies": str(place)}}


def ledger(out, client):
    return Ledger.open(out / "clients" / f"{client:06d}" / LEDGER, owner=f"client {client}", budget=UNBOUNDED)


def refused_in(out, clients):
    """{client: what its own ledger says it refused}, and how many charges it made."""
    found = {}
    for client in range(clients):
        if (out / "clients" / f"{client:06d}" / LEDGER).exists():
            with ledger(out, client) as one:
                found[client] = (one.refusals(), len(one.rows()))
    return found


# Each reason that a policy file can raise: the line that raises it (in place of an agreeing one), and the study.
RAISES = {
    Reason.NOT_PINNED: ('contract = "' + "0" * 64 + '"\n', {}),
    Reason.OWN_EPSILON: ("max_epsilon = 0.5\n", {}),
    Reason.OWN_DELTA: ("max_delta = 1e-9\n", {}),
    Reason.FORBIDDEN: ('forbidden_probes = ["fairness_collapse"]\n', {}),
    Reason.OWN_COHORT: ("min_cohort = 7\n", {}),
    Reason.OWN_TRUST: ('trusts = ["local", "central"]\n', {}),
    Reason.OWN_UNIT: ('units = ["example"]\n', {}),
    Reason.UPDATE_NOISE: ("updates_without_noise = false\n", {}),
    Reason.SIMULATED: ("simulated_noise = false\n", {}),
}


def merged(line: str) -> str:
    key = line.split(" =")[0]
    return "".join(kept for kept in AGREES.splitlines(keepends=True) if not kept.startswith(key)) + line


def test_every_reason_of_a_policy_file_is_here():
    """The others are about the contract or the request: a server that asks what it may not."""
    of_the_server = {"malformed", "other_contract", "contract_unsound", "number_not_in_contract"}
    of_the_server |= {"probe_not_in_contract", "update_not_in_contract", "round_not_in_contract"}
    of_the_server |= {"already_answered", "cohort_below_floor", "training_not_in_contract"}
    of_the_server |= {"training_apart_not_in_contract"}  # tests/engines/test_trainers.py
    of_the_server |= {"drill_down_not_in_contract", "slices_refused"}  # asked only after an alarm: tests/test_drill.py
    assert set(RAISES) | {Reason(word) for word in of_the_server} == set(Reason)


@pytest.mark.parametrize("reason", RAISES)
def test_a_stricter_client_refuses_and_the_others_go_on(reason, tmp_path, monkeypatch):
    """Made-up clients, real policies: the reason reaches the round's record as a count, and the client's own ledger."""
    monkeypatch.setattr(pipeline, "LocalClients", MadeUp)
    line, tables = RAISES[reason]
    setup = bare(6, {**folder(tmp_path, user_2=merged(line)), "rounds": 1, **tables})
    record = pipeline.run(setup, tmp_path / "run")
    (body,) = record.of("round")
    assert body["refused"] == {reason.value: 1}
    assert body["aborted"] == "" and body["failed"] == 0
    assert {release.count for release in record.releases()[1].values()} == {5.0}
    said = refused_in(tmp_path / "run", 6)
    assert said.pop(STRICT) == ({reason.value: 1}, 0)  # noted, and nothing paid
    assert set(said) == {0, 1, 3, 4, 5}
    assert all(one == ({}, 1) for one in said.values())
    outside = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and "clients" not in p.parts]
    assert not [p for p in outside if b"user-2" in p.read_bytes()]
    assert "user-2" not in json.dumps([entry.body for entry in record.entries])


def test_a_client_with_several_reasons_says_each_and_too_many_refusals_open_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "LocalClients", MadeUp)
    strict = merged("max_epsilon = 0.5\n").replace("simulated_noise = true", "simulated_noise = false")
    setup = bare(6, {**folder(tmp_path, user_1=strict, user_2=strict, user_3=strict), "rounds": 1})
    record = pipeline.run(setup, tmp_path / "run")
    (body,) = record.of("round")
    assert body["refused"] == {"over_own_epsilon": 3, "noise_simulated": 3}
    assert "3 clients answered" in body["aborted"]
    assert record.releases()[1] == {}
    assert {e["state"] for e in body["evidence"]} == {"unknown"}


def test_through_the_real_clients_a_refusal_comes_before_any_training(tiny, tmp_path, monkeypatch):
    """`LocalClients.work` on the tiny model: who refuses is not trained, not read and not in the sum."""
    strict = merged('forbidden_probes = ["utility"]\n')
    setup = setup_of(tiny["llama"], 6, {**folder(tmp_path, user_2=strict), "rounds": 1}, least=5)
    read: list[int] = []
    record = pipeline.run(setup, tmp_path / "run", oracle_tap=lambda round, client, readings: read.append(client))
    assert sorted(read) == [0, 1, 3, 4, 5]
    (body,) = record.of("round")
    assert body["refused"] == {"probe_forbidden": 1}
    assert record.releases()[1]["utility"].count == 5.0
    assert not list((tmp_path / "run" / "clients" / "000002").glob("private.*"))


def test_what_a_refusing_client_hands_over_is_its_reason_alone(tiny, tmp_path):
    setup = setup_of(tiny["llama"], 6, {**folder(tmp_path, user_2=merged("max_epsilon = 0.5\n")), "rounds": 1}, least=5)
    local = LocalClients(setup, tmp_path / "clients")
    request = local.consent.request(1, 6)
    sent = [one for part in local.work(Work(request, range(6), setup.shared, terms(setup.study, 6))) for one in part]
    assert [one.client for one in sent if one.vector is None] == [STRICT]
    assert [list(one.refused) for one in sent if one.refused] == [[Reason.OWN_EPSILON]]


# --- asked again


def asked(setup, tmp_path):
    return Consent(setup, lambda client: tmp_path / "clients" / f"{client:06d}")


def test_a_client_asked_twice_in_a_window_answers_once(tmp_path):
    """Rotating panels: one answer in a contract's window, whichever round asks; the refusal is its own to count."""
    consent = asked(bare(8), tmp_path)
    assert consent.refuses(0, consent.request(1, 4)) == []
    assert consent.refuses(0, consent.request(2, 4)) == [Reason.ANSWERED]
    with ledger(tmp_path, 0) as one:
        assert one.refusals() == {"already_answered": 1}
        assert len(one.rows()) == 1
        assert one.spent(1).epsilon == consent.contract.epsilon_per_window


def test_the_same_round_again_is_a_second_look_unless_noise_is_simulated(tmp_path):
    for noise, answer in (("system", [Reason.ANSWERED]), ("simulated", [])):
        consent = asked(bare(8, {"privacy": {"noise": noise}}), tmp_path / noise)
        assert consent.refuses(0, consent.request(1, 4)) == []
        assert consent.refuses(0, consent.request(1, 4)) == answer
        with ledger(tmp_path / noise, 0) as one:
            assert len(one.rows()) == 1  # and is not paid for twice


def test_the_next_window_and_another_contract_are_paid_for_by_the_same_ceiling(tmp_path):
    """A client's ceiling is for all that it answers in a window, whoever asks; the next window begins anew."""
    policy = folder(tmp_path, user_0=AGREES + "max_epsilon = 6.0\n")

    def consent(seed, window):
        return asked(bare(8, {**policy, "seed": seed, "privacy": {"window": window}}), tmp_path)

    first, other, later = consent(1, 1), consent(2, 1), consent(2, 2)
    assert first.refuses(0, first.request(1, 4)) == []
    assert other.refuses(0, other.request(1, 4)) == [Reason.OWN_EPSILON]  # 4 and 4 are over 6
    assert later.refuses(0, later.request(1, 4)) == []
    with ledger(tmp_path, 0) as one:
        assert one.spent(1).epsilon <= 6.0 and one.spent(2).epsilon <= 6.0
    assert other.refuses(1, other.request(1, 4)) == []  # whose policy has no ceiling


def test_the_same_panel_pays_for_the_window_once_and_answers_in_every_round(tmp_path):
    consent = asked(bare(4, {"rounds": 3, "privacy": {"panel": "same", "noise": "system"}}), tmp_path)
    assert [consent.refuses(0, consent.request(round, 4)) for round in (1, 2, 3)] == [[], [], []]
    assert consent.refuses(0, consent.request(4, 4)) == [Reason.ROUND, Reason.ANSWERED]
    with ledger(tmp_path, 0) as one:
        assert [row.charge.epsilon for row in one.rows()] == [consent.contract.epsilon_per_window, 0.0, 0.0]


# --- a server that asks what it may not


def test_a_server_that_asks_what_it_may_not_is_refused_with_the_reason(tmp_path):
    consent = asked(bare(8), tmp_path)
    good = consent.request(1, 4)
    lies = {
        Reason.OTHER_CONTRACT: good.model_copy(update={"contract": "f" * 64}),
        Reason.PROBE: good.model_copy(update={"probes": (*good.probes, "location")}),
        Reason.ROUND: good.model_copy(update={"round": 3}),
        Reason.FLOOR: good.model_copy(update={"cohort": 3}),
    }
    for client, (reason, request) in enumerate(lies.items()):
        assert consent.refuses(client, request) == [reason]
        with ledger(tmp_path, client) as one:
            assert (one.refusals(), one.rows()) == ({reason.value: 1}, ())
    consent.contract = consent.contract.model_copy(update={"noise_multiplier": 0.1})
    assert Reason.UNSOUND in consent.refuses(5, consent.request(1, 4))


def test_a_contract_that_lists_less_than_is_sent_is_refused(tmp_path):
    consent = asked(bare(8), tmp_path)
    whole = consent.contract
    consent.contract = whole.model_copy(update={"numbers": whole.numbers[1:]})
    consent._policies = lambda client: (
        Consent(bare(8), lambda c: tmp_path)._policies(client).model_copy(update={"contract": None})
    )
    assert Reason.UNLISTED in consent.refuses(0, consent.request(1, 4))


# --- policy files


def test_bad_policy_files_are_listed_all_at_once(tmp_path):
    """A misspelt ban, an unknown key, a wrong type, a file that is no TOML and one that is nobody's: five problems."""
    tables = folder(
        tmp_path,
        user_0='forbidden_probes = ["fairnes_collapse"]\n',
        user_1="max_epsilonn = 1.0\n",
        user_3='min_cohort = "many"\n',
        user_4="max_epsilon = = 1\n",
        user_77="max_epsilon = 1.0\n",
    )
    setup = bare(8, tables)
    with pytest.raises(BadInput) as caught:
        asked(setup, tmp_path)
    told = {problem.where.split("policies/")[1].split(".toml")[0]: problem for problem in caught.value.problems}
    assert set(told) == {"user-0", "user-1", "user-3", "user-4", "user-77"}
    assert "fairness_collapse" in told["user-0"].remedy and "max_epsilon" in told["user-1"].remedy
    assert "no client is called 'user-77'" in told["user-77"].what
    assert all(problem.remedy for problem in caught.value.problems)
    assert caught.value.exit_code == 2


def test_an_empty_folder_of_policies_is_no_consent(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(BadInput, match="holds no policy"):
        asked(bare(8, {"clients": {"policies": str(tmp_path / "none")}}), tmp_path)


def test_without_a_default_the_clients_without_a_file_agree_to_the_study(tmp_path):
    """As without a folder: they pin its contract, and another contract's digest is refused."""
    tables = folder(tmp_path, user_0=merged("max_epsilon = 0.5\n"))
    (tmp_path / "policies" / "default.toml").unlink()
    consent = asked(bare(8, tables), tmp_path)
    assert consent.refuses(0, consent.request(1, 4)) == [Reason.OWN_EPSILON]
    assert consent.refuses(1, consent.request(1, 4)) == []
    assert consent._policies(1).contract == consent.contract.digest


def test_a_changed_study_is_another_contract():
    one, two = (contract_of(bare(8, {"privacy": {"epsilon": epsilon}})) for epsilon in (4.0, 3.9))
    assert one.digest != two.digest
    setup = bare(8)
    assert contract_of(replace(setup)).digest == contract_of(setup).digest
